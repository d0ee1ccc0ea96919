"""The kernels' source: Triton functions by name, CUDA C++ as text."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ...kernels.errors import BackendUnavailable
from .launch import KernelSpec

FOLDER = Path(__file__).parent
TRITON = f"{__package__}.triton"


def jitted(spec: KernelSpec, interpreted: bool = False) -> Any:
    """The Triton function of a spec, for the compiler or for the interpreter; its arguments are checked."""
    function = getattr(_modules(interpreted)[spec.file], spec.function)
    names = [name for name, _ in spec.params] + [name for name, _ in spec.constants]
    assert list(function.arg_names) == names, f"{spec.function}{tuple(function.arg_names)} is called with {names}"
    return function


def triton_version() -> str:
    return _triton().__version__


@cache
def cuda_source(file: str) -> str:
    return (FOLDER / file).read_text(encoding="utf-8")


@cache
def _modules(interpreted: bool) -> dict[str, ModuleType]:
    """The modules of triton/, loaded once for each: `triton.jit` decides when it decorates a function."""
    triton = _triton()
    package = TRITON + ("_interpreted" if interpreted else "")
    files = sorted((FOLDER / "triton").glob("[!_]*.py"))
    spec = importlib.util.spec_from_file_location(
        package, FOLDER / "triton" / "__init__.py", submodule_search_locations=[str(FOLDER / "triton")]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = interpreted
    try:
        spec.loader.exec_module(sys.modules[package])
        return {file.stem: importlib.import_module(f"{package}.{file.stem}") for file in files}
    finally:
        triton.knobs.runtime.interpret = before


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"Triton is not installed ({error}): pip install 'polykern[cuda]'") from error
    return triton
