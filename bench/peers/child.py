"""The other end of worker.py: one side's process, stopped whenever it is not asked anything.

A runtime's idle threads may spin for a while, or for ever, waiting for work (OpenMP, TBB and TVM all do); SIGSTOP
between questions makes sure that only one side computes at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().with_name("worker.py")


class SideFailed(Exception):
    """Why a side cannot take part, in one line. `missing`: the module that is not installed."""

    def __init__(self, reason: str, missing: str | None = None) -> None:
        super().__init__(reason)
        self.missing = missing


class Child:
    """`about` is what the side says about itself. Raises SideFailed when it cannot be started, and from `ask`."""

    def __init__(self, module: str, options: Mapping[str, Any], python: str, timeout: float = 900) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        threads = str(options["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TVM_NUM_THREADS": threads}
        command = [python, str(WORKER), module, json.dumps(options)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment
            )
        except OSError as error:
            raise SideFailed(f"{python}: {error.strerror}") from error
        try:
            self.about: dict[str, Any] = self._answer("while loading")
        except SideFailed:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it died; what it answers says how
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        found = self._answer(f"in {do}")
        self._signal(signal.SIGSTOP)
        return found

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _answer(self, when: str) -> Any:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], self.timeout)[0]:
            self._process.kill()
            raise SideFailed(f"no answer in {self.timeout:.0f} s {when}")
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(self._death(when))
        found = json.loads(line)
        if "result" in found:
            return found["result"]
        if "missing" in found:
            raise SideFailed(f"no module {found['missing']!r}", found["missing"])
        raise SideFailed(found["error"])

    def _death(self, when: str) -> str:
        status = self._process.wait()
        if status < 0:
            return f"killed by {signal.Signals(-status).name} {when}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit status {status} {when}: {lines[-1] if lines else 'it said nothing'}"
