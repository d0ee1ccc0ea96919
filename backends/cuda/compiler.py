"""Kernels from their specs to binaries a driver loads: from the cache, else by Triton or NVRTC in child processes.

No GPU is needed: compile_child.py compiles for a named architecture. A start from the cache, or from a folder that
`runtime compile` wrote (aot.py), imports no compiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata
from typing import Any

from ...kernels.errors import DeviceError
from ..cache import KernelCache
from ..compile_process import CompileFailed, CompilePool
from .launch import KernelSpec, Target
from .sources import FOLDER

CACHE = KernelCache("cuda", "CUDA kernels")
FORMAT = 2
PACKAGES = ("triton", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")  # the last: of CUDA 13


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    code       cubin (AMD: code object)
    symbol     its entry point
    threads    in a block
    shared     bytes of shared memory Triton wants at launch; CUDA C++ says so in its Launch
    registers, local_bytes, static_shared   for one thread and for one block; local memory is where registers spill to
    """

    code: bytes
    symbol: str
    threads: int
    shared: int
    registers: int
    local_bytes: int
    static_shared: int

    @property
    def about(self) -> dict[str, Any]:
        """All but the code, JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "code"}

    @classmethod
    def of(cls, about: dict[str, Any], code: bytes) -> Binary:
        return cls(code, **{f.name: about[f.name] for f in fields(cls) if f.name != "code"})


@cache
def sources() -> str:
    """What kernels are written in: a changed line in any of them makes all of them new."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("triton/*.py"), *FOLDER.glob("*.cu")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compilers() -> dict[str, str]:
    """Versions of the compilers that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def key_fields(spec: KernelSpec, target: Target, driver: str) -> dict[str, Any]:
    """What a binary depends on, and what may run it."""
    return {
        "format": FORMAT, "kernel": asdict(spec), "sources": sources(), "target": target.name,
        "compilers": compilers(), "driver": driver,
    }  # fmt: skip


class Compiler:
    """Binaries for one target. `driver` is part of the cache's key ("" without a GPU). Close it to end its children."""

    def __init__(self, target: Target, driver: str = "") -> None:
        self.target, self.driver = target, driver
        self._binaries: dict[KernelSpec, Binary] = {}
        self._pool = CompilePool(f"{__package__}.compile_child")

    def binaries(self, specs: Sequence[KernelSpec], progress: Callable[[int, int], None] | None = None) -> list[Binary]:
        """One for each spec. Raises DeviceError for one that does not compile."""
        from . import aot

        missing: list[KernelSpec] = []
        for spec in dict.fromkeys(specs):
            if spec not in self._binaries:
                found = self._cached(spec) or aot.find(spec, self.target)
                if found is None:
                    missing.append(spec)
                else:
                    self._binaries[spec] = found
        with ThreadPoolExecutor(max(1, min(_processors(), len(missing)))) as pool:
            for done, (spec, binary) in enumerate(zip(missing, pool.map(self._compile, missing), strict=True)):
                self._binaries[spec] = binary
                if progress:
                    progress(done + 1, len(missing))
        return [self._binaries[spec] for spec in specs]

    def close(self) -> None:
        self._pool.close()

    def _cached(self, spec: KernelSpec) -> Binary | None:
        payload = CACHE.load(key_fields(spec, self.target, self.driver))
        if payload is None:
            return None
        about, _, code = payload.partition(b"\n")
        return Binary.of(json.loads(about), code)

    def _compile(self, spec: KernelSpec) -> Binary:
        from . import aot

        what = f"cannot compile {spec.label} for {self.target.name}"
        if not compilers():
            missing = f"Triton is not installed, and {aot.where()} does not hold it"
            raise DeviceError(f"{what}: {missing}: pip install 'polykern[cuda]'")
        try:
            about, code = self._pool.ask(what, {"spec": asdict(spec), "target": asdict(self.target)})
        except CompileFailed as error:
            raise DeviceError(str(error)) from error
        binary = Binary.of(about, code)
        if binary.shared + binary.static_shared > self.target.shared_bytes:
            needed, limit = binary.shared + binary.static_shared, self.target.shared_bytes
            raise DeviceError(f"{what}: it takes {needed} bytes of shared memory, a block may have {limit}")
        CACHE.store(key_fields(spec, self.target, self.driver), json.dumps(binary.about).encode() + b"\n" + code)
        return binary


def _processors() -> int:
    from os import sched_getaffinity

    return len(sched_getaffinity(0))


def spec_of(fields: dict[str, Any]) -> KernelSpec:
    """A spec from what `asdict` and JSON made of it."""
    params = tuple((name, kind) for name, kind in fields["params"])
    constants = tuple((name, value) for name, value in fields["constants"])
    return KernelSpec(fields["file"], fields["function"], params, constants, fields["warps"], fields["stages"])
