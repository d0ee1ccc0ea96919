"""CUDA C++ to cubins, by NVRTC through CuPy: no driver, no toolkit and no headers are needed."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from ...kernels.errors import BackendUnavailable, DeviceError
from .launch import KernelSpec
from .sources import cuda_source

# The wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc, and where they keep the library.
WHEELS = {"nvidia.cuda_nvrtc": "lib/libnvrtc.so.12", "nvidia.cu13": "lib/libnvrtc.so.13"}


def definitions(spec: KernelSpec) -> dict[str, int]:
    """What the source of a spec is compiled for: its constants, and WARPS of a block."""
    return {**dict(spec.constants), "WARPS": spec.warps}


def compile_cubin(spec: KernelSpec, arch: str) -> bytes:
    """The cubin of a kernel for an architecture ("75", "90", "100a").

    Raises BackendUnavailable where there is no NVRTC, and DeviceError with the compiler's first error.
    """
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions(spec).items()]
    program = nvrtc.createProgram(cuda_source(spec.file), spec.file, (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
        return _whole(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        reason = _first_error(nvrtc.getProgramLog(program)) or str(error)
        raise DeviceError(f"NVRTC cannot compile {spec.file} for sm_{arch}: {reason}") from error
    finally:
        nvrtc.destroyProgram(program)


def _whole(code: bytes) -> bytes:
    """The cubin with the last byte that CuPy 14.2 takes off its end, as if it were a text's: a zero, the upper half of
    an alignment in the program headers, which an ELF file's header places (System V ABI, figure 4-3)."""
    start, size, count = (int.from_bytes(code[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2)))
    return code.ljust(start + size * count, b"\0")


def _first_error(log: str) -> str:
    lines = [" ".join(line.split()) for line in log.splitlines() if "error" in line]
    return lines[0] if lines else ""


@cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc as found
    except ImportError as error:
        raise BackendUnavailable(f"CuPy is not installed ({error}): pip install 'polykern[cuda]'") from error
    _preload()
    nvrtc: Any = found
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy's loader raises classes of its own
        reason = " ".join(str(error).split())
        raise BackendUnavailable(f"NVRTC was not found ({reason}): pip install nvidia-cuda-nvrtc-cu12") from error
    return nvrtc


def _preload() -> None:
    """CuPy looks for NVRTC in the interpreter's own site-packages and on the system, and takes what is loaded already:
    so it also finds a wheel that lies elsewhere on Python's path."""
    for package, library in WHEELS.items():
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:  # there is no `nvidia` at all
            continue
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / library).exists():
                ctypes.CDLL(str(Path(folder) / library))
                return
