"""Kernels from their emitting functions to object code: from the cache, else through TVM in a child process.

The child is started for the first kernel that is missing and serves all that follow: importing TVM takes a second and
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
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ...kernels.errors import DeviceError
from ...kernels.spi import Progress
from ..cache import KernelCache
from .launch import KernelSpec
from .target import HostTarget

CACHE = KernelCache("tvm", "TVM kernels")
FORMAT = 1
TIMEOUT_S = 120.0  # for one kernel; the slowest takes 2 s


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
    """Object code for one target. Close it to end its child process."""

    def __init__(self, target: HostTarget) -> None:
        self.target = target
        self._kernels: dict[KernelSpec, bytes] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None  # what the child printed

    def kernels(self, specs: Sequence[KernelSpec], progress: Progress | None = None) -> list[bytes]:
        """An object file for each kernel. Raises DeviceError for one that does not compile."""
        wanted = list(dict.fromkeys(specs))
        for done, spec in enumerate(wanted):
            if progress and len(wanted) > 1:
                progress("compile", done, len(wanted))
            if spec not in self._kernels:
                module = spec.emit.__module__
                request = {"module": module, "emit": spec.emit.__name__, "options": spec.options, "symbol": spec.symbol}
                self._kernels[spec] = self._object(spec.label, _fields(self.target, spec.identity), request)
        if progress and len(wanted) > 1:
            progress("compile", len(wanted), len(wanted))
        return [self._kernels[spec] for spec in specs]

    def driver(self, symbols: Sequence[str]) -> bytes:
        """The object file of a driver (driver.py) that calls these kernels."""
        return self._object(
            "the driver", _fields(self.target, f"driver {' '.join(symbols)}"), {"driver": list(symbols)}
        )

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
        if self._said is not None:
            self._said.close()
            self._said = None

    def _object(self, label: str, fields: Mapping[str, Any], request: Mapping[str, Any]) -> bytes:
        found = CACHE.load(fields)
        if found is None:
            found = self._ask(label, request)
            CACHE.store(fields, found)
        return found

    def _ask(self, label: str, request: Mapping[str, Any]) -> bytes:
        """Object code from the child. Whatever happens there becomes one line."""
        if self._child is None:
            command = [sys.executable, "-m", f"{__package__}.compile_child"]
            # A file, not a pipe: nobody reads it while the child works, and a full pipe would stop the child.
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        child = self._child
        assert child.stdin is not None
        assert self._said is not None
        try:
            child.stdin.write(json.dumps({**request, "target": self.target.name}).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(self._line(child) or b"null")
            payload = self._exactly(child, answer["nbytes"]) if answer and "nbytes" in answer else b""
        except (OSError, TimeoutError, ValueError) as error:
            answer, payload = None, b""
            reason = str(error)
        else:
            reason = "its compiler ended"
        if answer is None:
            child.kill()
            child.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
            self.close()
            raise DeviceError(f"tvm cannot compile {label} for {self.target.name}: {' '.join([reason, *last])}")
        if "error" in answer:
            raise DeviceError(f"tvm cannot compile {label} for {self.target.name}: {answer['error']}")
        return payload

    @staticmethod
    def _line(child: subprocess.Popen[bytes]) -> bytes:
        assert child.stdout
        ready, _, _ = select.select([child.stdout], [], [], TIMEOUT_S)
        if not ready:
            raise TimeoutError(f"no answer within {TIMEOUT_S:.0f} s")
        return child.stdout.readline()

    @staticmethod
    def _exactly(child: subprocess.Popen[bytes], nbytes: int) -> bytes:
        assert child.stdout
        payload = child.stdout.read(nbytes)
        if len(payload) != nbytes:
            raise OSError("its compiler ended")
        return payload
