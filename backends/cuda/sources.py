"""The kernels' source: Triton functions by name, CUDA C++ as text."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
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
    function = _functions(interpreted)[spec.file][spec.function]
    names = [name for name, _ in spec.params] + [name for name, _ in spec.constants]
    assert list(function.arg_names) == names, f"{spec.function}{tuple(function.arg_names)} is called with {names}"
    return function


def triton_version() -> str:
    return _triton().__version__


@cache
def cuda_source(file: str) -> str:
    return (FOLDER / file).read_text(encoding="utf-8")


@cache
def _functions(interpreted: bool) -> dict[str, dict[str, Any]]:
    """Per module of triton/ what it has, loaded once for each: `triton.jit` decides when it decorates a function."""
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
        modules = {file.stem: importlib.import_module(f"{package}.{file.stem}") for file in files}
    finally:
        triton.knobs.runtime.interpret = before
    functions = {stem: dict(vars(module)) for stem, module in modules.items()}
    if interpreted:
        _call_directly(modules, functions)
    return functions


def _call_directly(modules: Mapping[str, ModuleType], functions: Mapping[str, Mapping[str, Any]]) -> None:
    """Have interpreted functions call each other as plain functions: the interpreter else sets up all of
    triton.language anew at each call, which the kernel that calls has done (0.8 ms each, half of all time)."""
    for stem, module in modules.items():
        for name, value in functions[stem].items():
            if hasattr(value, "rewrite"):
                setattr(module, name, value.rewrite())


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"Triton is not installed ({error}): pip install 'polykern[cuda]'") from error
    return triton
