"""Object code made callable: TVM's runtime, its thread pool, and LLVM's in-process linker (apache-tvm-ffi-orcjit).

Only the runtime is loaded, not the compiler: 0.2 s and 60 MB, where `import tvm` takes a second and 250 MB. No linker
of the system is needed, and nothing is written to disk to be loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...kernels.errors import BackendUnavailable, DeviceError
from .driver import ENTRY

Run = Callable[[int, int, int], None]  # (address of the tape, entries, workers)

_NO_CXX = "polykern-uses-no-c++"  # the linker would ask a C++ compiler where its library is; C objects need none
_session: Any = None


def find_runtime() -> Path:
    """TVM's runtime library, without importing TVM. Raises BackendUnavailable with what to install."""
    for name in ("tvm", "tvm_ffi", "tvm_ffi_orcjit"):
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailable(f"no module {name}: pip install 'polykern[tvm]'")
    found = importlib.util.find_spec("tvm")
    folders = list(found.submodule_search_locations or []) if found else []
    for path in (path for folder in folders for path in Path(folder).glob("lib/libtvm_runtime.*")):
        if path.suffix in (".so", ".dylib"):
            return path
    raise BackendUnavailable("apache-tvm has no lib/libtvm_runtime: reinstall it")


@contextmanager
def without_torch() -> Generator[None]:
    """While TVM is imported, torch is not found: tvm_ffi would import it for DLPack, which nothing uses here, and a
    start would take 2.0 s, not 0.8."""
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules["torch"]


def start(threads: int) -> None:
    """Load the runtime once in this process, and give its thread pool `threads` threads."""
    global _session  # noqa: PLW0603 - what is loaded into a process is loaded once
    runtime = find_runtime()
    # Read when a pool starts; without it TVM takes half of the processors for hyper-threads and leaves them out.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    try:
        with without_torch():
            import tvm_ffi

        if _session is None:
            ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
            with without_torch():
                import tvm_ffi_orcjit

            # No ORC runtime: it is for constructors and thread-local variables, which kernels have none of.
            _session = tvm_ffi_orcjit.ExecutionSession(orc_rt=None)
        configure: Any = tvm_ffi.get_global_func("runtime.config_threadpool")
        configure(1, threads)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"TVM's runtime does not load: {error}") from error


def load(objects: Sequence[bytes]) -> Run:
    """A driver and its kernels, linked. Raises DeviceError for code that does not fit together."""
    try:
        module = _session.load_module(list(objects), cxx=_NO_CXX)
        entry = module[ENTRY]
    except (RuntimeError, AttributeError, KeyError, ValueError) as error:
        raise DeviceError(f"tvm cannot link its kernels: {str(error).strip().splitlines()[-1]}") from error
    pointer = ctypes.c_void_p

    def run(tape: int, count: int, workers: int) -> None:
        entry(pointer(tape), count, workers)

    return run
