"""Runs the compile process (`compile_child`) and turns whatever becomes of it into binaries or a DeviceError."""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...kernels.errors import DeviceError
from . import cache as disk

if TYPE_CHECKING:
    from .device import DeviceInfo

TIMEOUT_S = 300.0  # per program; the first includes the start of the child
Sources = Mapping[str, tuple[str, Sequence[str]]]  # {label: (source, options)}; a label is the name of a kernel file

_log = logging.getLogger(__name__)


def compile_programs(
    info: DeviceInfo, programs: Sources, fields: Mapping[str, Mapping[str, Any]]
) -> Generator[tuple[str, bytes]]:
    """(label, binary) as the child finishes each; an empty binary where the device gives none.

    `fields` name the build logs. Raises DeviceError for the first program that does not compile, or whose compiler dies
    or hangs. Close the generator to end the child early.
    """
    if not programs:
        return
    device = {
        "platform": info.platform,
        "platform_version": info.platform_version,
        "name": info.name,
        "driver": info.driver,
    }
    wanted = [{"label": label, "source": s, "options": list(o)} for label, (s, o) in programs.items()]
    child = _Child({"device": device, "programs": wanted})
    left = set(programs)
    current = next(iter(programs))
    try:
        while left:
            message = child.receive(TIMEOUT_S)
            if message is None:
                what = child.end(current)
                path = disk.save_log(current, fields[current], child.stderr_text())
                log = f" (all it printed: {path})" if path else ""
                full = "No space left on device" in child.stderr_text()
                hint = "; free some space, or set POLYKERN_CACHE_DIR to a folder on another disk" if full else ""
                raise DeviceError(f"{info.label}: the OpenCL compiler {what}{log}{hint}")
            if "start" in message:
                current = message["start"]
            elif "failed" in message:
                path = disk.save_log(current, fields[current], f"{child.stderr_text()}\n{message['log']}")
                raise DeviceError(f"{info.label}: {current} does not compile: {_first_error(message, path)}")
            else:
                left.discard(current)
                if message["log"]:
                    _log.debug("%s: %s: %s", info.label, current, message["log"])
                yield current, base64.b64decode(message["binary"])
        child.wait()
    finally:
        child.close()


def _first_error(message: Mapping[str, str], log: Path | None) -> str:
    lines = [line.strip() for line in message["log"].splitlines() if line.strip()]
    first = next((line for line in lines if "error:" in line.lower()), lines[0] if lines else "no reason given")
    return first + (f" (full log: {log})" if log else "")


def _child_command() -> list[str]:
    # Not by its path alone: its folder would come first on sys.path, and names there could hide what PyOpenCL imports.
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    return [sys.executable, "-c", code, str(Path(__file__).with_name("compile_child.py"))]


class _Child:
    """A running compile process: JSON lines from its stdout, the tail of its stderr."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path or ".") for path in sys.path)}
        try:
            self._process = subprocess.Popen(
                _child_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",  # `-c` imports from the working directory first
                start_new_session=True,  # so that a compiler's own children end with it
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise DeviceError(f"cannot start the OpenCL compile process {sys.executable}: {error}") from error
        self._timed_out = 0.0
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr: deque[str] = deque(maxlen=400)
        process: Any = self._process  # its streams are not None: they are pipes
        self._threads = [
            threading.Thread(target=_write_all, args=(process.stdin, json.dumps(request)), daemon=True),
            threading.Thread(target=self._read_messages, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None once the child has ended, or has said nothing for `timeout_s` seconds."""
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            self._timed_out = timeout_s
            return None

    def end(self, label: str) -> str:
        """What became of the child, as the rest of a sentence."""
        if not self._timed_out:
            self.wait()
        self.close()
        status = self._process.returncode
        if self._timed_out:
            text = f"did not finish {label} within {self._timed_out:g} s"
        elif status < 0:
            text = f"died of {_signal_name(-status)} on {label}"
        else:
            text = f"process ended with status {status} on {label}"
        lines = [line.strip() for line in self._stderr if line.strip()]
        telling = [line for line in lines if re.search("error|assert", line, re.IGNORECASE)] or lines
        return f"{text}; its last words: {telling[-1][:300]}" if lines else text

    def stderr_text(self) -> str:
        return "".join(self._stderr)

    def wait(self) -> None:
        """Lets the child end by itself, which leaves its compiler's files whole; after a while it need not."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)

    def close(self) -> None:
        """Ends the child, and what it started, if it still runs."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._threads:
            thread.join(timeout=10)

    def _read_messages(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._messages.put(message)
        self._messages.put(None)

    def _read_stderr(self, stream: IO[str]) -> None:
        with stream:
            self._stderr.extend(stream)


def _write_all(stream: IO[str], text: str) -> None:
    with suppress(OSError), stream:
        stream.write(text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
