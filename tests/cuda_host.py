"""A stand-in for an NVIDIA GPU, which cannot be had here: CUDA C++ compiled by g++, its threads as fibers.

The source is the very one that NVRTC gets (cuda_host.h has the language). For speed one library serves all specs of a
file: their definitions are variables there, and `exact` compiles a library for each instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from polykern.backends.cuda.interpreter import HostBuffer, InterpretedDevice
from polykern.backends.cuda.launch import KernelSpec, Launch, Pointer, Target
from polykern.backends.cuda.nvrtc import definitions
from polykern.backends.cuda.sources import FOLDER

HERE = Path(__file__).parent
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
TARGET = Target("cuda", "90", 3, 227 << 10)


def compiler() -> str | None:
    return shutil.which("g++")


class ExactBuffer(HostBuffer):
    """Nothing behind its last byte, for a sanitizer to see."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.empty(max(1, nbytes), np.uint8)
        self.nbytes, self.address = nbytes, self.array.ctypes.data
        assert self.address % 16 == 0


class HostCudaDevice(InterpretedDevice):
    """Plans like a GPU; runs CUDA C++ as above, and Triton in its interpreter."""

    target = TARGET

    def __init__(self, folder: Path, exact: bool = False, flags: Sequence[str] = ()) -> None:
        self._folder, self._exact, self._flags = folder, exact, tuple(flags)
        self._libraries: dict[str, ctypes.CDLL] = {}

    def alloc(self, nbytes: int, what: str) -> HostBuffer:
        return ExactBuffer(nbytes)

    def fastest(self, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """Of those in CUDA C++ one or another, always the same for a key."""
        ours = [launches for launches in candidates if not launches[0].spec.is_triton] or candidates
        return ours[zlib.crc32(repr(key).encode()) % len(ours)]

    def bind(self, launch: Launch) -> Callable[[], None]:
        if launch.spec.is_triton:
            return super().bind(launch)
        library, spec = self._library(launch.spec), launch.spec
        assert launch.shared <= self.target.shared_bytes
        values = [_c_value(value) for value in launch.arguments.values()]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        held = (values, launch)

        def run(held: Any = held) -> None:
            if not self._exact:
                for name, value in definitions(spec).items():
                    ctypes.c_int.in_dll(library, f"variable_{name}").value = value
            problem = library.launch(pointers, launch.grid[0], 32 * spec.warps, launch.shared)
            if problem:
                raise RuntimeError(f"{spec.label}: {problem.decode()}")

        return run

    def _library(self, spec: KernelSpec) -> ctypes.CDLL:
        """As in C: `const char *launch(void **arguments, int grid, int threads, size_t shared)`."""
        names = definitions(spec)
        if self._exact:
            defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        else:
            defined = "".join(f'extern "C" {{ int variable_{x}; }}\n#define {x} variable_{x}\n' for x in names)
        source = (
            f'#include "{HERE}/cuda_host.h"\n{defined}#include "{FOLDER}/{spec.file}"\n'
            'extern "C" const char *launch(void **arguments, int grid, int threads, size_t shared_bytes) {\n'
            f"  return host::launch({spec.function}, arguments, grid, threads, shared_bytes);\n}}\n"
        )
        if source not in self._libraries:
            name = self._folder / hashlib.sha256(source.encode()).hexdigest()[:16]
            name.with_suffix(".cpp").write_text(source)
            # Never more than what is written: a GPU's own contractions are in the error bounds, a CPU's would hide.
            options = [
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-shared",
                "-Wno-unknown-pragmas",
                "-ffp-contract=off",
                *self._flags,
            ]
            command = ["g++", *options, "-o", str(name.with_suffix(".so")), str(name.with_suffix(".cpp"))]
            plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            library = self._libraries[source] = ctypes.CDLL(str(name.with_suffix(".so")))
            library.launch.restype = ctypes.c_char_p
            library.launch.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
        return self._libraries[source]


def _c_value(value: Pointer | int | float) -> Any:
    if isinstance(value, Pointer):
        return ctypes.c_void_p(value.buffer.address + value.offset)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)
