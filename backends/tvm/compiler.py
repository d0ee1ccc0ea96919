"""Kernels from their emitting functions to object code: from the cache, else through TVM in child processes.

Children are started for the first kernels that are missing and serve all that follow: importing TVM takes a second and
250 MB, which a start from the cache never pays, and an LLVM that aborts takes the child along, not the model.
"""

from __future__ import annotations

import hashlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ...kernels.errors import DeviceError
from ...kernels.spi import Progress
from ..cache import KernelCache
from .launch import KernelSpec
from .target import HostTarget, processors

CACHE = KernelCache("tvm", "TVM kernels")
FORMAT = 1
TIMEOUT_S = 120.0  # for one kernel; attention in tiles, the slowest, takes 3 s


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
        self._idle: list[_Child] = []

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
        while self._idle:
            self._idle.pop().close()

    def _compile(self, spec: KernelSpec) -> bytes:
        request = {
            "module": spec.emit.__module__, "emit": spec.emit.__name__, "options": spec.options, "symbol": spec.symbol,
        }  # fmt: skip
        return self._ask(spec.label, _fields(self.target, spec.identity), request)

    def _ask(self, label: str, fields: Mapping[str, Any], request: Mapping[str, Any]) -> bytes:
        """Object code from a child, kept in the cache. Whatever happens there becomes one line."""
        child = self._idle.pop() if self._idle else _Child()
        if child.has_ended:  # it does, after a while without work
            child.close()
            child = _Child()
        try:
            code = child.ask({**request, "target": self.target.name})
        except _Refused as error:
            self._idle.append(child)
            raise DeviceError(f"tvm cannot compile {label} for {self.target.name}: {error}") from error
        except (OSError, TimeoutError, ValueError) as error:
            last = child.last_words()
            raise DeviceError(f"tvm cannot compile {label} for {self.target.name}: {error} {last}".rstrip()) from error
        self._idle.append(child)
        CACHE.store(fields, code)
        return code


class _Refused(Exception):
    """The compiler said no, and works on."""


class _Child:
    """A process of compile_child.py."""

    def __init__(self) -> None:
        # A file, not a pipe: nobody reads it while the child works, and a full pipe would stop the child.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        command = [sys.executable, "-m", f"{__package__}.compile_child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: Mapping[str, Any]) -> bytes:
        """Raises _Refused with the compiler's reason; OSError, TimeoutError or ValueError where the child is lost."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        to.write(json.dumps(request).encode() + b"\n")
        to.flush()
        ready, _, _ = select.select([back], [], [], TIMEOUT_S)
        if not ready:
            raise TimeoutError(f"no answer within {TIMEOUT_S:.0f} s")
        line = back.readline()
        if not line:
            raise OSError("its compiler ended")
        answer = json.loads(line)
        if "error" in answer:
            raise _Refused(answer["error"])
        code = back.read(answer["nbytes"])
        if len(code) != answer["nbytes"]:
            raise OSError("its compiler ended")
        return code

    def last_words(self) -> str:
        """End the child; the last line that it printed."""
        self._process.kill()
        self._process.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        self.close()
        return "".join(last)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
