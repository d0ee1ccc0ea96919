"""The process that compiles: one JSON request a line on stdin, for each a JSON line and the object code on stdout.

It ends when nobody asks for a while, since TVM keeps 250 MB.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
from collections.abc import Mapping
from typing import Any

from .target import BY_NAME, HostTarget

IDLE_S = 10.0


def build(request: Mapping[str, Any], target: HostTarget) -> bytes:
    """The object file of a kernel or a driver."""
    from . import driver

    if "driver" in request:
        return driver.build_driver(request["driver"], target)
    emit = getattr(importlib.import_module(request["module"]), request["emit"])
    return driver.build_kernel(emit, dict(request["options"]), request["symbol"], target)


def main() -> None:
    # TVM and LLVM print what they like to stdout: answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while select.select([0], [], [], IDLE_S)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        request = json.loads(line)
        try:
            payload = build(request, BY_NAME[request["target"]])
            answer: dict[str, Any] = {"nbytes": len(payload)}
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is told, in one line
            lines = str(error).strip().splitlines() or [""]
            payload, answer = b"", {"error": f"{type(error).__name__}: {lines[-1]}"}
        answers.write(json.dumps(answer).encode() + b"\n" + payload)
        answers.flush()


if __name__ == "__main__":
    main()
