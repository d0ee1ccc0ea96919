"""The direction of imports, read from the source: kernels <- backends <- runtime, vendors only inside functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "backends", "runtime")
MAY_IMPORT = {"kernels": {"kernels"}, "backends": {"kernels", "backends"}, "runtime": set(LAYERS)}
# What each layer may import from outside at module level; None: not looked at.
OUTSIDE = {"kernels": {"numpy", "ml_dtypes", "gguf"}, "backends": {"numpy", "ml_dtypes", "platformdirs", "filelock"}}
VENDORS = {"pyopencl", "tvm", "tvm_ffi", "triton", "cupy", "torch", "cuda", "jax"}
# Device code, which the backend's sources.py loads when a kernel is wanted: there the language is imported.
DEVICE_CODE = {"backends/cuda/triton": "triton"}
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, bool, int]]:
    """(dotted module, whether it runs when the file is imported, line); our own modules as polykern.<layer>...."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(block)
    }
    package = ["polykern", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(tree):
        eager = id(node) not in lazy and id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
            for name in names:
                yield name, eager, node.lineno


def violations(source: str, path: Path) -> list[str]:
    """Every import of `source`, taken as the file `path`, that breaks the direction."""
    layer, found = path.relative_to(ROOT).parts[0], []
    for name, eager, line in imports(ast.parse(source), path):
        top, where = name.split(".")[0], f"{path.relative_to(ROOT)}:{line}: {name}"
        if top == "polykern":
            other = name.split(".")[1] if "." in name else ""
            if other not in MAY_IMPORT[layer]:
                found.append(f"{where}: {layer} must not import it")
            continue
        if top in LAYERS:
            found.append(f"{where}: use a relative import")
        elif top in VENDORS and layer != "backends":
            found.append(f"{where}: a vendor library outside backends")
        elif top in VENDORS and eager and top != DEVICE_CODE.get(str(path.parent.relative_to(ROOT))):
            found.append(f"{where}: import it in the function that needs it")
        elif layer in OUTSIDE and top not in sys.stdlib_module_names and top not in OUTSIDE[layer] | VENDORS and eager:
            found.append(f"{where}: {layer} may import only {', '.join(sorted(OUTSIDE[layer]))}")
        elif layer == "kernels" and top not in sys.stdlib_module_names and top not in OUTSIDE[layer]:
            found.append(f"{where}: kernels may import only {', '.join(sorted(OUTSIDE[layer]))}")
    return found


def backend_names_compared(source: str) -> list[str]:
    """Comparisons with, or matches of, a backend's name: the runtime may ask what a backend can, never which it is."""
    names = {"opencl", "reference", "null", "tvm", "cuda", "fpga"}
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        texts: list[ast.expr] = []
        subject = ""
        if isinstance(node, ast.Compare):
            texts, subject = [node.left, *node.comparators], ast.unparse(node)
        elif isinstance(node, ast.MatchValue):
            texts, subject = [node.value], "case " + ast.unparse(node.value)
        constants = {c.value for text in texts for c in ast.walk(text) if isinstance(c, ast.Constant)}
        if constants & names and "how" not in subject:
            found.append(f"line {node.lineno}: {subject}")  # type: ignore[attr-defined]
    return found


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_direction(path: Path) -> None:
    assert violations(path.read_text(), path) == []


@pytest.mark.parametrize("path", [p for p in FILES if "runtime" in p.parts], ids=lambda path: path.name)
def test_runtime_does_not_ask_which_backend_it_is(path: Path) -> None:
    assert backend_names_compared(path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "text"),
    [
        ("kernels/x.py", "from ..backends import registry", "kernels must not import it"),
        ("kernels/x.py", "from .. import runtime", "kernels must not import it"),
        ("kernels/x.py", "def f():\n    from ..runtime.step import Step", "kernels must not import it"),
        ("kernels/x.py", "import polykern.backends.null", "kernels must not import it"),
        ("kernels/x.py", "import scipy", "kernels may import only gguf, ml_dtypes, numpy"),
        ("kernels/x.py", "def f():\n    import scipy", "kernels may import only gguf, ml_dtypes, numpy"),
        ("kernels/x.py", "def f():\n    import torch", "a vendor library outside backends"),
        ("kernels/x.py", "from kernels import op", "use a relative import"),
        ("backends/x.py", "from ..runtime import plan", "backends must not import it"),
        ("backends/opencl/x.py", "from ...runtime import plan", "backends must not import it"),
        ("backends/x.py", "import pyopencl as cl", "import it in the function that needs it"),
        ("backends/x.py", "try:\n    from torch import cuda\nexcept ImportError: pass", "import it in the function"),
        ("backends/x.py", "class A:\n    import triton", "import it in the function"),
        ("backends/x.py", "import rich", "backends may import only filelock, ml_dtypes, numpy, platformdirs"),
        ("runtime/x.py", "def f():\n    import pyopencl", "a vendor library outside backends"),
    ],
)
def test_the_check_finds(file: str, source: str, text: str) -> None:
    (found,) = violations(source, ROOT / file)
    assert text in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/x.py", "import numpy as np\nimport math\nfrom .op import Op\nfrom . import quant"),
        ("backends/x.py", "from ..kernels.op import Op\ndef f():\n    import pyopencl"),
        ("backends/opencl/x.py", "from ...kernels import spi\nfrom ..common import launch_list\nfrom . import y"),
        ("backends/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyopencl"),
        ("runtime/x.py", "from ..backends import open_backend\nfrom ..kernels.op import Op\nimport rich"),
    ],
)
def test_the_check_allows(file: str, source: str) -> None:
    assert violations(source, ROOT / file) == []


def test_the_name_check_finds_and_allows() -> None:
    assert backend_names_compared("if backend.name == 'opencl': pass")
    assert backend_names_compared("if args.backend in ('cuda', 'tvm'): pass")
    assert backend_names_compared("match name:\n    case 'reference': pass")
    assert not backend_names_compared("if call.how == 'reference': pass")
    assert not backend_names_compared("open_backend('reference')")
