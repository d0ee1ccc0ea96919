"""What a bug report needs to say about a machine. Each part is found on its own: one that fails says so."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import ICD_FOLDERS, cpu, memory_bytes, packages
from .models import DEFAULT_MODEL, KNOWN, cache_dir

VARIABLES = ("POLYKERN_", "OCL_", "OPENCL_", "POCL_", "PYOPENCL_", "CL_CONFIG_", "CUDA_", "HF_H", "XDG_CACHE_HOME")


def examine() -> dict[str, Any]:
    """Everything, as one JSON-able object. Does not raise."""
    from .commands.backends import survey

    parts: dict[str, Callable[[], Any]] = {
        "python": python,
        "platform": lambda: {
            "system": platform.platform(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()),
        },
        "cpu": cpu,
        "memory_bytes": memory_bytes,
        "packages": packages,
        # before the backends are asked, who set variables of their drivers
        "environment": lambda: {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "opencl_icds": opencl_icds,
        "backends": survey,
        "cache": cache,
        "choices": choices,
    }
    found = {name: _guarded(part) for name, part in parts.items()}
    found["advice"] = _guarded(lambda: advice(found))
    return found


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # noqa: BLE001 - a report about a broken machine must not break on it
        return {"error": f"{type(error).__name__}: {error}"}


def python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix}


def opencl_icds() -> list[dict[str, Any]]:
    """The system's OpenCL drivers: each .icd file, the library it names, and whether an absolute one is there."""
    folders = [os.environ["OCL_ICD_VENDORS"]] if os.environ.get("OCL_ICD_VENDORS") else ICD_FOLDERS
    found: list[dict[str, Any]] = []
    for icd in sorted(icd for folder in folders for icd in Path(folder).glob("*.icd")):
        library = icd.read_text(errors="replace").strip()
        exists = Path(library).exists() if library.startswith("/") else None  # a bare name is found by the linker
        found.append({"file": str(icd), "library": library, "exists": exists})
    return found


def cache() -> dict[str, Any]:
    """Where the cache is, and the bytes under each of its folders."""
    root = cache_dir()
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    sizes = {folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in folders}
    model = root / "models" / KNOWN[DEFAULT_MODEL].file_name
    return {"path": str(root), "bytes": sizes, "default_model": str(model) if model.is_file() else None}


def choices() -> list[dict[str, Any]]:
    """What `--backend auto` remembers, the newest first."""
    from .choice import remembered

    return remembered()


def advice(found: dict[str, Any]) -> list[str]:
    """What to do next, the most useful first."""
    todo: list[str] = []
    backends = found["backends"] if isinstance(found["backends"], list) else []
    for backend in backends:
        if not backend["available"]:
            todo.append(f"backend {backend['name']}: {backend['reason']}")
    for icd in found["opencl_icds"] if isinstance(found["opencl_icds"], list) else []:
        if icd["exists"] is False:
            todo.append(f"{icd['file']} names {icd['library']}, which is not there: reinstall or remove that driver")
    cached = found["cache"].get("default_model")
    if not cached and not (isinstance(found["packages"], dict) and found["packages"].get("pip")):
        todo.append("no pip in this environment: models known by name cannot be fetched (python -m ensurepip)")
    elif not cached:
        todo.append(f"the default model is not cached yet: runtime pull {DEFAULT_MODEL}")
    return todo
