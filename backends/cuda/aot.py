"""Kernels compiled ahead of time: a folder of binaries with a manifest, written by `runtime compile --target cuda:90`.

    kernels.json    format, target, sources (hash), compilers; for each kernel file, spec and what Binary says
    SYMBOL.cubin    code

`$POLYKERN_CUDA_KERNELS` names such a folder: a machine with a driver and no compiler runs from it. A folder made from
other sources than these, or for another architecture, is not used, and says so once.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .compiler import FORMAT, Binary, compilers, sources, spec_of
from .launch import KernelSpec, Target

VARIABLE = "POLYKERN_CUDA_KERNELS"
MANIFEST = "kernels.json"


def where() -> str:
    """The folder, for messages."""
    return os.environ.get(VARIABLE) or f"${VARIABLE} (unset)"


def find(spec: KernelSpec, target: Target) -> Binary | None:
    """A kernel of the folder, None if it is not there."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    return _binaries(path, target.name).get(spec)


def describe() -> dict[str, Any]:
    """For `runtime doctor`."""
    path = os.environ.get(VARIABLE)
    if not path:
        return {"path": ""}
    try:
        manifest = _manifest(Path(path))
        return {
            "path": path,
            "target": manifest["target"],
            "kernels": len(manifest["kernels"]),
            "problem": _refusal(manifest),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"path": path, "problem": str(error)}


def manifest(target: Target, binaries: dict[KernelSpec, Binary]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and files of a folder."""
    suffix = "cubin" if target.kind == "cuda" else "hsaco"
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for spec, binary in binaries.items():
        digest = hashlib.sha256(binary.code).hexdigest()
        name = f"{spec.function}.{hashlib.sha256(repr(spec).encode()).hexdigest()[:16]}.{suffix}"
        files[name] = binary.code
        rows.append({"file": name, "sha256": digest, "spec": asdict(spec), **binary.about})
    about = {"format": FORMAT, "target": target.name, "sources": sources(), "compilers": compilers()}
    return {**about, "kernels": rows}, files


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _refusal(manifest: dict[str, Any], target: str = "") -> str:
    """Why a folder cannot be used; empty if it can."""
    if manifest["format"] != FORMAT or manifest["sources"] != sources():
        return "it was compiled from other sources than these: compile it again with this version"
    if target and manifest["target"] != target:
        return f"it was compiled for {manifest['target']}, this GPU is {target}"
    return ""


@cache
def _binaries(path: str, target: str) -> dict[KernelSpec, Binary]:
    folder = Path(path).expanduser()
    found: dict[KernelSpec, Binary] = {}
    try:
        manifest = _manifest(folder)
        problem = _refusal(manifest, target)
        for row in [] if problem else manifest["kernels"]:
            code = (folder / row["file"]).read_bytes()
            if hashlib.sha256(code).hexdigest() != row["sha256"]:
                problem = f"{row['file']} is damaged (its SHA-256 is another)"
                found = {}
                break
            found[spec_of(row["spec"])] = Binary.of(row, code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem, found = f"{type(error).__name__}: {error}", {}
    if problem:
        warnings.warn(f"kernels of {VARIABLE}={path} are not used: {problem}", RuntimeWarning, stacklevel=2)
    return found
