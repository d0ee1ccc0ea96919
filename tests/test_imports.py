"""What importing costs, seen from a fresh interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENDORS = {"pyopencl", "tvm", "tvm_ffi", "triton", "cupy", "torch"}


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def modules_after(code: str, cwd: Path) -> set[str]:
    done = run(f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))", cwd)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_listing_backends_imports_none_of_them(tmp_path: Path) -> None:
    loaded = modules_after(
        "import polykern.backends as b; names = [e.name for e in b.list_backends()]; "
        "assert {'opencl', 'reference', 'null'} <= set(names), names",
        tmp_path,
    )
    assert not VENDORS & loaded
    own = {"polykern.backends", "polykern.backends.registry", "polykern.backends.adapters", "polykern.backends.replay"}
    assert {m for m in loaded if m.startswith("polykern.backends")} == own
    assert not {m for m in loaded if m.startswith("polykern.runtime")}


def test_loading_our_providers_imports_no_vendor(tmp_path: Path) -> None:
    loaded = modules_after(
        "from polykern.backends import list_backends, load_provider\n"
        "for e in list_backends():\n"
        "    if e.distribution == 'polykern': load_provider(e.name)",
        tmp_path,
    )
    assert not VENDORS & loaded
    assert {"polykern.backends.opencl", "polykern.backends.reference", "polykern.backends.null"} <= loaded


def test_importing_the_contract_imports_no_gguf_reader(tmp_path: Path) -> None:
    loaded = modules_after("import polykern.kernels.ops, polykern.kernels.conformance", tmp_path)
    assert not (VENDORS | {"gguf"}) & loaded


def test_top_level_kernels_is_refused() -> None:
    """A working directory that holds this folder must not shadow the PyPI package `kernels`."""
    done = run("import kernels", ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {ROOT}/kernels/__init__.py is polykern.kernels, imported here as 'kernels': "
        "run from another directory"
    )


def test_tvm_starts_without_torch(tmp_path: Path) -> None:
    """tvm_ffi imports it where it is installed, which takes longer than all the rest; who wants it gets it later."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")
    code = "from polykern.backends import open_backend; backend = open_backend('tvm', threads=1)"
    assert "torch" not in modules_after(code, tmp_path)
    if importlib.util.find_spec("torch"):
        done = run(f"{code}; import torch; print(torch.ones(5).sum().item())", tmp_path)
        assert done.stdout == "5.0\n", done.stderr
