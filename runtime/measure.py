"""How fast one backend runs a model: a short test on its first layers and its head, in a process of its own.

A process of its own, because a driver may crash or hang, keeps its threads and its memory, and reads its environment
once. Only as many layers as fit in MEASURED_BYTES are loaded, so that the test takes about a second whatever the size
of the model; that is more than a cache holds, and every candidate gets the same.

`python -m polykern.runtime.measure` reads a request from stdin and writes one JSON document (`Speed`, or a problem).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from ..kernels.errors import PolykernError
from .choice import Speed
from .config import ModelConfig
from .memory import tensor_bytes
from .output import Output, one_line
from .settings import Settings

MEASURED_BYTES = 256 << 20
PROMPT_TOKENS = 64
DECODE_TOKENS = 8
REPETITIONS = 3
SLOW_TPS = 20  # below, a single token has to do, and a prompt of SHORT_PROMPT
SHORT_PROMPT = 8
MOST_ON_HOST = 0.1  # share of a step's bytes; what leaves more to the host is not a candidate
TIMEOUT_S = 120  # compiling everything takes 5 s from an empty cache


def first_layers(config: ModelConfig) -> ModelConfig:
    """The model cut down to its first layers, as many as fit in MEASURED_BYTES beside the rest, and at least two."""
    sizes = [0] * len(config.layers)
    for name, kind in config.tensors.items():
        if name.startswith("blk."):
            sizes[_layer(name)] += tensor_bytes(kind.shape, kind.dtype)
    left = MEASURED_BYTES - streamed(config) + sum(sizes)
    count = 0
    while count < len(sizes) and (count < 2 or sizes[count] <= left):
        left -= sizes[count]
        count += 1
    tensors = {n: k for n, k in config.tensors.items() if not n.startswith("blk.") or _layer(n) < count}
    return replace(config, layers=config.layers[:count], tensors=tensors)


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def streamed(config: ModelConfig) -> int:
    """Bytes of weights that one decode step reads: all but an embedding that is not the head too."""
    unread = {"token_embd.weight"} - {config.head}
    return sum(tensor_bytes(k.shape, k.dtype) for n, k in config.tensors.items() if n not in unread)


def speed_of(settings: Settings) -> tuple[Speed, str]:
    """Measure `settings.backend` here, in this process: its speed, and "layers of all layers"."""
    from .load import load

    whole: list[ModelConfig] = []

    def cut(config: ModelConfig) -> ModelConfig:
        whole.append(config)
        return first_layers(config)

    with load(replace(settings, fallback="allow"), cut=cut) as session:
        device = session.backend.device
        found = Speed(session.backend.name, device.name, device.driver)
        planned = list(session.plan.leaves())
        on_host = sum(leaf.nbytes for leaf in planned if not leaf.native) / max(1, sum(leaf.nbytes for leaf in planned))
        if on_host > MOST_ON_HOST:
            return replace(found, problem=f"leaves {on_host:.0%} of the bytes to the host"), ""

        def rate(prompt: int, steps: int, repetitions: int) -> float:
            (rates,) = session.bench(prompt, steps, repetitions).values()
            return max(rates)  # what else runs on the machine can only have slowed the others down

        decode = rate(0, 1, 1)
        slow = decode < SLOW_TPS
        if not slow:
            decode = rate(0, min(DECODE_TOKENS, session.ctx), REPETITIONS)
        # One token more than a chunk holds: the last goes through the decode step.
        prompt = rate(min(session.ctx, 1 + (SHORT_PROMPT if slow else PROMPT_TOKENS)), 0, 1 if slow else 2)
        share = streamed(session.config) / streamed(whole[0])
        layers = f"{len(session.config.layers)} of {len(whole[0].layers)}"
        return replace(found, decode_tps=decode * share, prompt_tps=prompt * share), layers


def measure(settings: Settings, environment: Mapping[str, str]) -> tuple[Speed, str]:
    """`speed_of` in a process of its own, with `environment`; whatever becomes of it, it is the speed or a problem."""
    search = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path or ".") for path in sys.path)}
    request = {**asdict(settings), "model": str(Path(settings.model).absolute())}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **search},
            cwd="/",  # `-m` imports from the working directory first
            start_new_session=True,  # so that whatever it starts ends with it
        )
    except OSError as error:
        return Speed(settings.backend, problem=f"no process to measure it in: {error.strerror}"), ""
    try:
        said, complaints = process.communicate(json.dumps(request).encode(), TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Speed(settings.backend, problem=f"did not answer within {TIMEOUT_S} s"), ""
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with suppress(ValueError, TypeError, KeyError):
        document = json.loads(said)
        return Speed(**document["speed"]), document["layers"]
    last = one_line((complaints.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1])[:200]
    status = process.returncode
    ended = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return Speed(settings.backend, problem=f"its process {ended}: {last}"), ""


def main() -> int:
    settings = Settings(**json.loads(sys.stdin.buffer.read()))
    with Output.open() as out:  # drivers print to stdout
        try:
            speed, layers = speed_of(settings)
        except (PolykernError, MemoryError) as error:
            speed, layers = Speed(settings.backend, problem=_plain(error, settings.backend)), ""
        out.json({"speed": asdict(speed), "layers": layers})
    sys.stdout.flush()
    os._exit(0)  # what a driver does when it is unloaded is of no interest


def _plain(error: BaseException, backend: str) -> str:
    return one_line(str(error) or "out of memory").removeprefix(f"backend {backend!r} is not available: ")


if __name__ == "__main__":
    sys.exit(main())
