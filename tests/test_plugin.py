"""A hardware vendor's first day: the plug-in that CONTRIBUTING.md shows, installed with pip, judged and used."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from polykern.backends import list_backends, open_backend, probe
from polykern.backends.adapters import FromVersion0
from polykern.kernels import conformance
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.ops import OPS, required_ops
from polykern.kernels.spi import Backend, Provider
from polykern.runtime.cli import main
from tiny_llama import valid_llama_gguf

ROOT = Path(__file__).resolve().parent.parent


def shown(language: str) -> str:
    """The one block of that language in CONTRIBUTING.md."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    return block


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the plug-in."""
    pytest.importorskip("pip", reason="installing the plug-in needs pip")
    source, site = tmp_path_factory.mktemp("acme-npu"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(shown("toml"))
    (source / "acme_npu.py").write_text(shown("python"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def acme(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in on sys.path, not imported yet."""
    monkeypatch.delenv("POLYKERN_BACKENDS", raising=False)
    monkeypatch.syspath_prepend(str(site))
    sys.modules.pop("acme_npu", None)
    yield
    sys.modules.pop("acme_npu", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for weights in ("F32", "Q4_0"):
        (folder / f"{weights}.gguf").write_bytes(valid_llama_gguf(weight_format=weights))
    return folder


def document(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("acme")
def test_it_is_listed_without_being_imported() -> None:
    (entry,) = [entry for entry in list_backends() if entry.name == "acme"]
    assert (entry.value, entry.distribution, entry.problem) == ("acme_npu:provider", "acme-npu", "")
    assert "acme_npu" not in sys.modules
    assert [device.name for device in probe("acme").devices] == ["ACME NPU-1"]
    assert isinstance(sys.modules["acme_npu"].provider, Provider)
    assert isinstance(open_backend("acme"), Backend)
    assert open_backend().name != "acme"  # its order is None
    with pytest.raises(
        BackendUnavailable, match=r"^backend 'acme' is not available: no device 'NPU-2'; there is 0 ACM"
    ):
        open_backend("acme", device="NPU-2")


@pytest.mark.usefixtures("acme")
def test_what_is_missing_after_one_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "conformance", "--backend", "acme", status=1)
    assert (found["level"], found["ok"], found["summary"]["failed"]) == ("partial", False, 0)
    gemm = [case for case in found["cases"] if case["op"] == "gemm"]
    passed = [case for case in gemm if case["status"] == "passed"]
    assert passed
    assert all(case["case"].startswith("F32-") and case["kernel"] == "acme.gemm_f32" for case in passed)
    assert {c["reason"] for c in gemm if c["case"].startswith("Q4_0")} == {
        "no gemm kernel for Q4_0 weights yet, only for F32"
    }
    counts = {op.name: len(op.cases) for op in required_ops()}
    refused = {**counts, "gemm": counts["gemm"] - len(passed)}
    assert found["missing"] == [
        f"{name}: {refused[name]} of {count} cases are refused, and it is required" for name, count in counts.items()
    ]


@pytest.mark.usefixtures("acme")
def test_report_names_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "conformance", "--backend", "acme", "--op", "gemm", "--precision", "exact", status=1)
    assert [found[name] for name in ("backend", "device", "vendor", "driver", "profile")] == [
        "acme", "ACME NPU-1", "ACME", "1.0", "full",
    ]  # fmt: skip
    assert found["plugin"] == {
        "distribution": "acme-npu",
        "version": "0.1",
        "spi_version": 1,
        "describe": {"compiler": "npucc 1.0", "commit": "0123abc"},
    }
    assert found["asked"] == {"ops": ["gemm"], "case": None, "precision": "exact"}
    assert {"commit", "date", "host"} <= found.keys()
    assert {"python", "polykern", "numpy"} <= found["versions"].keys()
    seeds = {case.name: case.seed for case in OPS["gemm"].cases}
    assert all(case["seed"] == seeds[case["case"]] for case in found["cases"])


@pytest.mark.usefixtures("acme")
def test_wrong_kernel_is_told_from_unfinished_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(*more: str) -> list[str]:
        capsys.readouterr()
        assert main(["conformance", "--backend", "acme", "--op", "gemm", *more]) == 1
        return capsys.readouterr().out.splitlines()

    assert "partial: everything that it accepts passes" in lines()
    assert any(
        re.fullmatch(r"\d mutants not judged: they are wrong only in cases that are refused", line) for line in lines()
    )
    acme_npu = importlib.import_module("acme_npu")

    bind = acme_npu.Acme.bind

    def transposed(self: Any, call: Any) -> Any:
        w = call.tensors["w"].buffer
        w[...] = w[::-1].copy()
        return bind(self, call)

    monkeypatch.setattr(acme_npu.Acme, "bind", transposed)
    wrong = lines()
    assert "partial: everything that it accepts passes" not in wrong
    assert any(re.fullmatch(r"missing: gemm: \d+ of \d+ cases fail", line) for line in wrong)
    failed = next(line for line in wrong if line.startswith("failed: gemm "))
    again = re.search(r"to reproduce: runtime (conformance --backend acme --op gemm --case \S+) \(seed \d+\)$", failed)
    assert again
    assert main(again[1].split()) == 1


@pytest.mark.usefixtures("acme")
def test_plan_says_why(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(weights: str) -> dict[str, Any]:
        rows = document(
            capsys, "plan", "--backend", "acme", "--fallback", "allow", "-m", str(models / f"{weights}.gguf")
        )
        return {row["op"]: row for row in rows}

    rows = plan("F32")
    assert rows["attention"]["how"] == "reference"
    assert rows["attention"]["reason"] == "no attention kernel yet"
    assert [part["kernel"] for part in rows["gemm_add"]["parts"]] == ["acme.gemm_f32", "reference"]
    assert all(row["how"] == "reference" for row in plan("Q4_0").values())


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize("weights", ["F32", "Q4_0"])
def test_it_answers_like_the_reference(models: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(backend: str) -> Any:
        model = ["-m", str(models / f"{weights}.gguf"), "--raw", "-n", "12", "--fallback", "allow"]
        return document(capsys, "run", "--backend", backend, *model, "hello world")

    ours, theirs = answer("acme"), answer("reference")
    assert (ours["backend"], ours["device"]) == ("acme", "ACME NPU-1")
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(ours["token_ids"]) == 12
    assert ours["plan"]["reference"] > 0


@pytest.mark.usefixtures("acme")
def test_fallback_policy(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--backend", "acme", "-m", str(models / "F32.gguf"), "--raw", "-n", "1", "hello"]
    assert main([*arguments, "--fallback", "error"]) == 1
    said = capsys.readouterr().err
    assert "acme refuses " in said
    assert "embedding: no embedding kernel yet (1x)" in said
    assert main(arguments) == 0
    assert "acme leaves " in capsys.readouterr().err
    assert main([*arguments, "--fallback", "allow"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("acme")
def test_it_keeps_working_when_the_interface_moves_on(
    monkeypatch: pytest.MonkeyPatch, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plug-in as it would have been written for version 0, which knew neither `capture` nor `prepare`."""
    acme_npu = importlib.import_module("acme_npu")

    monkeypatch.setattr(acme_npu.Provider, "spi_version", 0)
    for name in ("capture", "prepare"):
        monkeypatch.delattr(acme_npu.Acme, name)
    backend = open_backend("acme")
    assert isinstance(backend, FromVersion0)
    assert conformance.run(backend, ops=["gemm"]).failures == []
    model = ["-m", str(models / "F32.gguf"), "--raw", "-n", "2", "--fallback", "allow", "hello"]
    assert len(document(capsys, "run", "--backend", "acme", *model)["token_ids"]) == 2


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("acme")
def test_table_of_a_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bench/support.py on reports of one's own: a table, and what is wrong with the claim."""
    support, part, whole = script("support"), tmp_path / "part.json", tmp_path / "whole.json"
    part.write_text(json.dumps(document(capsys, "conformance", "--backend", "acme", "--op", "gemm", status=1)))
    whole.write_text(json.dumps(document(capsys, "conformance", "--backend", "acme", status=1)))
    assert support.main([str(part), str(whole)]) == 1
    said = capsys.readouterr()
    assert "| op | acme: ACME NPU-1 | acme: ACME NPU-1 |" in said.out
    assert re.search(r"^\| `attention` \| not run \| \d+ unsupported \|$", said.out, re.M)
    assert re.search(r"^acme on ACME NPU-1 \(driver 1\.0\): \d+ of \d+ .*, acme-npu 0\.1\.  $", said.out, re.M)
    first, second, third = said.err.splitlines()
    assert re.match(r"part.json: \d+ cases of the contract are missing, first add ", first)
    assert second.startswith("part.json: the backend does not conform; gemm: ")
    assert third.startswith("whole.json: the backend does not conform; gemm: ")
    assert "attention: " in third
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        support.main([str(tmp_path / "other.json")])
    assert "expected documents of runtime conformance --json: KeyError: 'cases'" in capsys.readouterr().err


def test_contract_page_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = script("contract")
    assert contract.main(["--check"]) == 0, capsys.readouterr().err
    monkeypatch.setattr(contract, "PAGE", tmp_path / "README.md")
    assert contract.main(["--check"]) == 1
    assert "out of date: run python bench/contract.py" in capsys.readouterr().err
    assert contract.main([]) == 0
    assert contract.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for op in OPS.values():
        assert f"\n## {op.name}\n\n{op.doc}\n" in text
