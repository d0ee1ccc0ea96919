"""What the documents promise and a program can check."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from polykern.kernels.ops import OPS
from polykern.kernels.quant import FORMATS
from polykern.runtime.commands import COMMANDS
from polykern.runtime.config import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def quickstart() -> list[str]:
    """The `sh` blocks of the Quickstart, without their fences."""
    section = README.split("\n## Quickstart\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)


def test_quickstart_is_two_commands() -> None:
    blocks = quickstart()
    assert len(blocks) == 2
    for block in blocks:
        (line,) = block.splitlines()
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert '.venv/bin/runtime --backend opencl "' in blocks[0]
    assert blocks[1].rstrip().endswith(".venv/bin/pytest -n auto")


@pytest.mark.skipif(shutil.which("awk") is None or shutil.which("bash") is None, reason="needs bash and awk")
def test_continuous_integration_runs_the_second_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"^quickstart=\$\((.*?)\)$", script, re.M | re.S)
    assert found
    shell = subprocess.run(["bash", "-c", found[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shell.stdout == quickstart()[1]
    assert script.endswith('\nbash -euo pipefail -c "$quickstart"\n')


def test_everything_is_mentioned() -> None:
    for command in COMMANDS:
        assert re.search(rf"\*\*`runtime \[?{command}\b", README), command
    for word in (*ARCHITECTURES, *FORMATS, "POLYKERN_BACKEND", "POLYKERN_DEVICE", "POLYKERN_CACHE_DIR"):
        assert word in README, word


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_files_named_in_contributing_exist() -> None:
    for path in re.findall(
        r"`((?:kernels|backends|runtime|tests|bench)/[\w/]+\.\w+)`", (ROOT / "CONTRIBUTING.md").read_text()
    ):
        assert path == "kernels/NAME.py" or (ROOT / path).exists(), path


def test_changelog_knows_this_version() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    assert version[1] in (ROOT / "CHANGELOG.md").read_text()


def support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support", ROOT / "bench" / "support.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_support_table_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    if not list((ROOT / "bench" / "results").glob("conformance-*.json")):
        pytest.skip("no conformance report is kept in bench/results yet")
    assert support().main(["--check"]) == 0, capsys.readouterr().err


def report(**changes: Any) -> dict[str, Any]:
    """A report in which every case of the contract passed."""
    cases = [{"op": op.name, "case": case.name, "status": "passed"} for op in OPS.values() for case in op.cases]
    made = {
        "backend": "b",
        "device": "d",
        "ok": True,
        "cases": cases,
        "summary": {"mutants": 5, "killed": 5},
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
    }
    return {**made, **changes}


def test_support_check_finds_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, good = support(), report()
    assert module.problems({"a.json": good}) == []
    short = report(cases=good["cases"][1:])
    (missing,) = module.problems({"a.json": short})
    first = good["cases"][0]
    assert missing == f"a.json: 1 cases of the contract are missing, first {first['op']} {first['case']}"
    (stray,) = module.problems({"a.json": report(cases=[*good["cases"], {**first, "case": "old"}])})
    assert stray == f"a.json: 1 cases are not in the contract, first {first['op']} old"
    assert module.problems({"a.json": report(ok=False)}) == ["a.json: the backend does not conform"]


def test_support_writes_and_checks_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, readme = support(), tmp_path / "README.md"
    readme.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    monkeypatch.setattr(module, "README", readme)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert module.main([]) == 1  # no report yet
    cases = report()["cases"]
    cases[0] = {**cases[0], "status": "unsupported"}
    (tmp_path / "conformance-b.json").write_text(json.dumps(report(cases=cases)))
    assert module.main(["--check"]) == 1
    assert "the support table is out of date" in capsys.readouterr().err
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| op | b: d |" in text
    assert re.search(r"^\| `attention` \| \d+ ✓ \|$", text, re.M)
    assert re.search(rf"^\| `dequantize` \| \d+ ✓ in {len(FORMATS)} formats \|$", text, re.M)
    assert re.search(r"^\| `gemm` \| F32: \d+ ✓, 1 unsupported; F16 .*Q6_K: \d+ ✓ \|$", text, re.M)
