"""Compiled OpenCL programs on disk, `programs/` under `environment.cache_root()`, and build logs beside them.

An entry is the device's binary; empty where the device cannot load its own binaries.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..cache import KernelCache, key_of
from .environment import FOLDER, cache_root

FORMAT = 1
PROGRAMS = KernelCache(f"{FOLDER}/programs", "OpenCL programs")


def save_log(label: str, fields: Mapping[str, Any], text: str) -> Path | None:
    """Keeps a build log, `logs/<label>-<start of the key>.log`; None if it cannot be kept."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", label)[:80]
    path = cache_root() / "logs" / f"{name}-{key_of(fields)[:12]}.log"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text, encoding="utf-8", errors="replace")
        return path
    return None


def cache_info() -> dict[str, Any]:
    """What `KernelCache.info` says of the programs, with the folder of everything as `path`."""
    return {**PROGRAMS.info(), "path": str(cache_root())}


def clear() -> int:
    """Removes all programs and logs, PoCL's unpacked copies too, and returns how many programs that were.

    Not while something runs on PoCL: it opens a kernel's file when the kernel is first launched.
    """
    entries = cache_info()["entries"]
    for name in ("programs", "logs", "pocl"):
        shutil.rmtree(cache_root() / name, ignore_errors=True)
    return entries
