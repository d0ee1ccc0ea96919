"""`make gpu` (bench/gpu.py) rehearsed without a GPU: what it writes, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import pytest

SANITIZER = """#!/bin/sh
[ "$2" = {bad} ] || exit 0
echo "========= Error: a race"
exit 9
"""


def sound(**changes: Any) -> dict[str, Any]:
    checks = {name: {"ok": True} for name in gpu.CHECKS}
    return {"conformance": {"ok": True}, "sanitizer": checks, **changes}


def test_a_rehearsal_times_kernels_and_steps(tmp_path: Path) -> None:
    options = ["--backends", "reference", "--models", "tiny", "--formats", "Q4_0", "--batches", "1,5"]
    assert gpu.main([*options, "--skip-conformance", "-o", str(tmp_path / "x.json")]) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert {row["op"] for row in document["kernels"]} == {"gemm", "attention"}
    assert all(row["median_s"] > 0 and row["error_ratio"] <= 1 for row in document["kernels"])
    assert [(row["batch"], row["tokens_per_s"] > 0) for row in document["steps"]] == [(1, True), (5, True)]
    assert document["left_out"]["torch"]
    assert document["commit"]


def test_a_run_that_proved_nothing_fails() -> None:
    assert gpu.is_sound(sound(), False)
    assert gpu.is_sound(sound(sanitizer={"left_out": "compute-sanitizer is not installed"}), False)
    checks = sound()["sanitizer"]
    assert gpu.is_sound(sound(sanitizer=checks | {"initcheck": {"ok": False}}), False)
    for bad in (
        sound(conformance={"ok": False}), sound(conformance={"problem": "crashed"}), sound(sanitizer={"problem": "no"}),
        sound(sanitizer=checks | {"racecheck": {"ok": False}}),
    ):  # fmt: skip
        assert not gpu.is_sound(bad, False)
        assert gpu.is_sound(bad, True)


def test_what_the_sanitizer_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "left_out" in gpu.sanitizer("cuda", None) or "memcheck" in gpu.sanitizer("cuda", None)
    (tmp_path / "compute-sanitizer").write_text(SANITIZER.format(bad="racecheck"))
    (tmp_path / "compute-sanitizer").chmod(0o755)
    found = gpu.sanitizer("cuda", None)
    assert found["racecheck"] == {"ok": False, "rc": 9, "said": ["========= Error: a race"]}
    assert found["memcheck"]["ok"]
    assert found["initcheck"]["ok"]
