"""The process of one side: loads a model, then does what it is asked, one JSON line in and one JSON line out.

    PYTHON worker.py MODULE '{"model": "m.gguf", "threads": 2, "ctx": 1024}'

MODULE is a file beside this one with a class `Side` (below). It may run under another interpreter than the one that
asks: this file and the peers' need nothing but the standard library, numpy and the peer itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Protocol


class Side(Protocol):
    """One system with one model. Its clock starts when the model is loaded and the ids are at hand."""

    def __init__(self, model: str, threads: int, ctx: int) -> None:
        """Load `model`, a GGUF file, for sequences of up to `ctx` tokens."""
        ...

    def about(self) -> dict[str, Any]:
        """version, and whatever explains the speed: device, build, precision. weight_bytes where the file's weights
        are held in another size: bytes of each number."""
        ...

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens behind `ids`, the end of the answer ignored."""
        ...

    def prompt(self, ids: Sequence[int]) -> float:
        """Seconds from an empty cache to the logits behind `ids`."""
        ...

    def decode(self, ids: Sequence[int], count: int) -> float:
        """Seconds of `count` decode steps with `ids` in the cache: one token in, one result out, in turn."""
        ...


def die_with_parent() -> None:
    """This process is stopped most of the time and would outlive a parent that was killed. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, <linux/prctl.h>


def main() -> int:
    die_with_parent()
    module, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout; only answers may

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        side = importlib.import_module(module).Side(**options)
        answer(result=side.about())
        for line in sys.stdin:
            request = json.loads(line)
            answer(result=getattr(side, request.pop("do"))(**request))
    except ModuleNotFoundError as error:
        answer(missing=error.name or str(error))
        return 1
    except Exception as error:  # noqa: BLE001  whatever a peer raises becomes one line in the report
        first = next(iter(str(error).strip().splitlines()), "")
        answer(error=first if type(error).__module__.startswith("polykern") else f"{type(error).__name__}: {first}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
