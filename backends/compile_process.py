"""Compilers as child processes, for backends whose compiler is slow to import, large, or given to aborting.

A child is a module whose `main` calls `serve`: one JSON request a line on stdin, for each a JSON line and a payload on
stdout. It ends when nobody asks for a while, since compilers keep hundreds of megabytes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

IDLE_S = 10.0
TIMEOUT_S = 120.0  # for one kernel; the slowest take some seconds


class Refused(Exception):
    """The compiler said no, and works on."""


def serve(build: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], bytes]]) -> None:
    """The child's side: `build` gives a JSON-able answer and a payload for a request."""
    # Compilers print what they like to stdout: answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while select.select([0], [], [], IDLE_S)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            about, payload = build(json.loads(line))
            answer: dict[str, Any] = {**about, "nbytes": len(payload)}
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is told, in one line
            lines = str(error).strip().splitlines() or [""]
            payload, answer = b"", {"error": f"{type(error).__name__}: {lines[-1]}"}
        answers.write(json.dumps(answer).encode() + b"\n" + payload)
        answers.flush()


class CompileProcess:
    """A process of `module`."""

    def __init__(self, module: str) -> None:
        # A file, not a pipe: nobody reads it while the child works, and a full pipe would stop the child.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)

    def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Answer and payload. Raises Refused with the compiler's reason; OSError, TimeoutError or ValueError where the
        child is lost."""
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
            raise Refused(answer["error"])
        payload = back.read(answer["nbytes"])
        if len(payload) != answer["nbytes"]:
            raise OSError("its compiler ended")
        return answer, payload

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


class CompilePool:
    """Processes of one module, started when they are needed; every one serves one caller at a time."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._idle: list[CompileProcess] = []

    def ask(self, what: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Answer and payload. Whatever happens becomes one line behind `what`, a CompileFailed."""
        is_used = bool(self._idle)
        child = self._idle.pop() if is_used else CompileProcess(self._module)
        try:
            found = child.ask(request)
        except Refused as error:
            self._idle.append(child)
            raise CompileFailed(f"{what}: {error}") from error
        except (OSError, TimeoutError, ValueError) as error:
            if is_used and isinstance(error, OSError) and not isinstance(error, TimeoutError):
                # It ends after a while without work, maybe while it was asked.
                child.close()
                return self.ask(what, request)
            last = child.last_words()
            raise CompileFailed(f"{what}: {error} {last}".rstrip()) from error
        self._idle.append(child)
        return found

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class CompileFailed(Exception):
    """What was compiled, and why it could not be."""
