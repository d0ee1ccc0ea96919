"""Kernels from their emitting functions to object code: from the cache, else through TVM in child processes.

Children are started for the first kernels that are missing and serve all that follow: importing TVM takes a second and
250 MB, which a start from the cache never pays, and an LLVM that aborts takes the child along, not the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ...kernels.errors import DeviceError
from ...kernels.spi import Progress
from ..cache import KernelCache
from ..compile_process import CompileFailed, CompilePool
from .launch import KernelSpec
from .target import HostTarget, processors

CACHE = KernelCache("tvm", "TVM kernels")
FORMAT = 1


@cache
def _sources() -> str:
    """What kernels are written by: a changed line anywhere in this folder makes all of them new."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _fields(target: HostTarget, what: str) -> dict[str, Any]:
    """What object code depends on."""
    return {
        "format": FORMAT,
        "kernel": what,
        "sources": _sources(),
        "target": [target.name, target.machine, target.mcpu, target.dot, list(target.features)],
        "tvm": metadata.version("apache-tvm"),
    }


class Compiler:
    """Object code for one target. Close it to end its child processes."""

    def __init__(self, target: HostTarget) -> None:
        self.target = target
        self._kernels: dict[KernelSpec, bytes] = {}
        self._pool = CompilePool(f"{__package__}.compile_child")

    def kernels(self, specs: Sequence[KernelSpec], progress: Progress | None = None) -> list[bytes]:
        """An object file for each kernel. Raises DeviceError for one that does not compile."""
        wanted = [spec for spec in dict.fromkeys(specs) if spec not in self._kernels]
        missing: list[KernelSpec] = []
        for spec in wanted:
            found = CACHE.load(_fields(self.target, spec.identity))
            if found is None:
                missing.append(spec)
            else:
                self._kernels[spec] = found
        # LLVM takes a second for a large kernel, and a model needs a dozen: as many children as there are processors.
        with ThreadPoolExecutor(max(1, min(processors(), len(missing)))) as pool:
            for done, (spec, code) in enumerate(zip(missing, pool.map(self._compile, missing), strict=True)):
                self._kernels[spec] = code
                if progress:
                    progress("compile", done + 1, len(missing))
        return [self._kernels[spec] for spec in specs]

    def driver(self, symbols: Sequence[str]) -> bytes:
        """The object file of a driver (driver.py) that calls these kernels."""
        fields = _fields(self.target, f"driver {' '.join(symbols)}")
        found = CACHE.load(fields)
        return self._ask("the driver", fields, {"driver": list(symbols)}) if found is None else found

    def close(self) -> None:
        self._pool.close()

    def _compile(self, spec: KernelSpec) -> bytes:
        request = {
            "module": spec.emit.__module__, "emit": spec.emit.__name__, "options": spec.options, "symbol": spec.symbol,
        }  # fmt: skip
        return self._ask(spec.label, _fields(self.target, spec.identity), request)

    def _ask(self, label: str, fields: Mapping[str, Any], request: Mapping[str, Any]) -> bytes:
        """Object code from a child, kept in the cache. Whatever happens there becomes one line."""
        try:
            what = f"tvm cannot compile {label} for {self.target.name}"
            _, code = self._pool.ask(what, {**request, "target": self.target.name})
        except CompileFailed as error:
            raise DeviceError(str(error)) from error
        CACHE.store(fields, code)
        return code
