"""OpenCL programs from source: from the cache, else compiled in a child process.

A source must be whole: what an `#include` brings is not part of the cache's key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cache as disk
from . import compiler, environment
from .compile_child import build_source
from .compiler import Sources

if TYPE_CHECKING:
    import pyopencl as cl

    from ...kernels.spi import Progress
    from .device import DeviceInfo, OpenedDevice

_log = logging.getLogger(__name__)


def build(
    opened: OpenedDevice, label: str, source: str, options: Sequence[str] = (), *, progress: Progress | None = None
) -> cl.Program:
    """One built program. Several are faster with `build_many`: one child process compiles them all."""
    return build_many(opened, {label: (source, options)}, progress=progress)[label]


def build_many(opened: OpenedDevice, programs: Sources, *, progress: Progress | None = None) -> dict[str, cl.Program]:
    """Built programs by label, each from the cache or else compiled in a child process and then cached.

    `progress(label, done, total)` is called as each becomes ready. Raises DeviceError for the first that does not
    compile (with the compiler's first error and the path of its full log), or whose compiler aborts, or is not done
    within `compiler.TIMEOUT_S`; what was compiled before it stays in the cache.
    """
    ready: dict[str, cl.Program] = {}
    fields = {label: _fields(opened.info, *programs[label]) for label in programs}

    def finish(label: str, program: cl.Program) -> None:
        ready[label] = program
        if progress is not None:
            progress(label, len(ready), len(programs))

    for label, (source, options) in programs.items():
        binary = disk.PROGRAMS.load(fields[label])
        if binary == b"":
            finish(label, _from_checked_source(opened, label, source, options))
        elif binary is not None:
            program = _from_binary(opened, label, binary, options)
            if program is None:  # whole, yet refused: a driver that changed under an unchanged version
                disk.PROGRAMS.discard(fields[label])
            else:
                finish(label, program)

    missing = {label: programs[label] for label in programs if label not in ready}
    with closing(compiler.compile_programs(opened.info, missing, fields)) as compiled:
        for label, binary in compiled:
            source, options = programs[label]
            program = _from_binary(opened, label, binary, options) if binary else None
            disk.PROGRAMS.store(fields[label], b"" if program is None else binary)
            finish(label, program or _from_checked_source(opened, label, source, options))
    return {label: ready[label] for label in programs}


def _from_binary(opened: OpenedDevice, label: str, binary: bytes, options: Sequence[str]) -> cl.Program | None:
    """The program, or None if the device refuses its own binary."""
    import pyopencl as cl

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a compiler log
            return cl.Program(opened.context, [opened.device], [binary]).build(list(options))
    except cl.Error as error:
        _log.info("%s: %s cannot be loaded from its binary: %s", opened.info.label, label, error)
        return None


def _from_checked_source(opened: OpenedDevice, label: str, source: str, options: Sequence[str]) -> cl.Program:
    """For a device that cannot load binaries; the source has compiled in a child before."""
    from .device import named_errors

    with named_errors(f"compiling {label} for {opened.info.label}"):
        return build_source(opened.context, source, options)


def _fields(info: DeviceInfo, source: str, options: Sequence[str]) -> dict[str, Any]:
    """What a binary depends on. Thread counts and PoCL's folder change nothing in it."""
    import pyopencl as cl

    neutral = {"POCL_CACHE_DIR", *(name for names in environment.THREAD_VARIABLES.values() for name in names)}
    prefixes = ("CL_CONFIG_", "POCL_", "PYOPENCL_BUILD_OPTIONS")
    return {
        "format": disk.FORMAT,
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "options": list(options),
        "platform": info.platform,
        "platform_version": info.platform_version,
        "device": info.name,
        "driver": info.driver,
        "opencl_c": info.opencl_c,
        "pyopencl": cl.VERSION_TEXT,
        "processor": _processor() if info.is_host else "",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes) and k not in neutral},
    }


@cache
def _processor() -> str:
    """Model and instruction sets of the CPU: a CPU runtime compiles for exactly these, under one device name."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return platform.machine()
    kept = ("model name", "flags", "Features", "CPU part")
    return hashlib.sha256("\n".join(x for x in first.splitlines() if x.startswith(kept)).encode()).hexdigest()
