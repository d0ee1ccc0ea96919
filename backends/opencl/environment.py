"""The folder and the environment variables of OpenCL runtimes. A runtime reads its variables once, when it starts."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path

import platformdirs

from .. import cache

FOLDER = "opencl"  # of what all backends keep

# How a CPU runtime is told its number of threads. Sub-devices (clCreateSubDevices, BY_COUNTS, 1 of 2 units) are
# accepted by both and limit neither: the kernel still used 1.99 (Intel 2026.2) and 1.93 (PoCL 3.1) cores, against
# 1.00 with these variables. They are read when the runtime starts.
THREAD_VARIABLES = {
    "intel": ("CL_CONFIG_CPU_TBB_NUM_WORKERS",),
    "pocl": ("POCL_CPU_MAX_CU_COUNT", "POCL_MAX_PTHREAD_COUNT"),  # the new name and the old
}

# PoCL fails where its folder is full. What it unpacks for one model takes 1.3 MB (SmolLM2-135M), other formats as much.
POCL_BYTES = 32 << 20


def cache_root() -> Path:
    """The folder of everything the OpenCL backend keeps."""
    return cache.cache_root() / FOLDER


def limit_threads(threads: int) -> None:
    """Tells CPU runtimes that have not started yet to use `threads` threads."""
    for variables in THREAD_VARIABLES.values():
        for variable in variables:
            os.environ[variable] = str(threads)


def thread_limit(name: str) -> int | None:
    """The number of threads that the environment sets for runtime `name`, None where it sets none."""
    for variable in THREAD_VARIABLES.get(name, ()):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def prepare_pocl() -> None:
    """Defaults for PoCL's own variables; a user's settings stay.

    PoCL compiles each kernel again for every work-group size, inside clEnqueue: 0.15 s a kernel, in this process, where
    a compiler that aborts takes us along. The size-independent code, which is part of the binary made in the child
    process, ran as fast (PoCL 3.1, GEMV and RMSNorm within 5%, a plain SiLU within its noise). And without a
    folder it can write to, PoCL reports a platform with no device.
    """
    os.environ.setdefault("POCL_WORK_GROUP_SPECIALIZATION", "0")
    if "POCL_CACHE_DIR" not in os.environ:
        folder = cache_root() / "pocl"
        if not _is_writable(folder) or shutil.disk_usage(folder).free < POCL_BYTES:
            folder = temporary_folder("polykern-pocl-")
        _remove_probes(folder)
        os.environ["POCL_CACHE_DIR"] = str(folder)


def prepare_pyopencl() -> None:
    """PyOpenCL keeps the Python code of its kernel calls under ~/.cache/pytools, and fails if it cannot write there."""
    if not _is_writable(Path(platformdirs.user_cache_dir("pytools", "pytools"))):
        os.environ.setdefault("PYOPENCL_NO_CACHE", "1")


@functools.cache
def processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that the processor has; nothing where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _is_writable(folder: Path) -> bool:
    """Makes the folder if need be."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.access(folder, os.W_OK | os.X_OK)


def _remove_probes(folder: Path) -> None:
    """PoCL 3.1 tries at every start whether it can write, and leaves the empty file there."""
    with contextlib.suppress(OSError):
        for file in folder.glob("tempfile_??????"):
            status = file.stat()
            if status.st_size == 0 and status.st_mtime < time.time() - 3600:  # not one that a start needs just now
                file.unlink()


def temporary_folder(prefix: str) -> Path:
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
