"""What one decode step costs, and what making it one call and fusing its ops gains.

    python bench/step.py --backend tvm --json > bench/results/step-tvm.json

Times the captured step of a model beside the same step launched kernel by kernel, and beside steps in which one fused
op is taken apart into its primitives. All of them in turn, in one process; medians with the middle half of the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

from polykern.backends.replay import launch_list
from polykern.kernels.ops import fused_ops
from polykern.kernels.spi import Unsupported
from polykern.runtime.load import load
from polykern.runtime.machine import provenance
from polykern.runtime.model import build_program
from polykern.runtime.models import DEFAULT_MODEL, resolve
from polykern.runtime.plan import plan
from polykern.runtime.programs import DECODE
from polykern.runtime.session import Session
from polykern.runtime.settings import Settings
from polykern.runtime.step import Step

TOKENS = 32  # steps in a row, as in a generation; each is read back


class Without:
    """A backend that refuses one op."""

    def __init__(self, backend: Any, op: str) -> None:
        self._backend, self._op = backend, op

    def supports(self, signature: Any) -> Any:
        if signature.op == self._op:
            return Unsupported(signature.op, "left out to see what it gains")
        return self._backend.supports(signature)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def steps(session: Session) -> dict[str, Step]:
    """The variants by name: the step as it is, launched one by one, and without each fused op it uses."""
    programs = session._programs  # the state that its steps share
    program = build_program(
        session.config, **DECODE._asdict(), ctx=session.ctx, page_size=session.backend.page_size,
        precision=session.settings.precision,
    )  # fmt: skip
    found = {"one call": programs.step(DECODE)}
    captured = session.backend.capture
    session.backend.capture = launch_list  # type: ignore[method-assign]
    found["launch by launch"] = programs.executable.compile(plan(program, session.backend))
    session.backend.capture = captured  # type: ignore[method-assign]
    used = {call.op for call in program.calls}
    for op in fused_ops():
        if op.name in used:
            apart: Any = plan(program, Without(session.backend, op.name))  # type: ignore[arg-type]
            found[f"{op.name} taken apart"] = programs.executable.compile(replace(apart, backend=session.backend))
    return found


def measure(session: Session, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: milliseconds a token, and how much more than the first."""
    variants = steps(session)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    first: list[int] = []
    for turn in range(rounds + 1):
        for name, step in variants.items():
            spent, tokens = _run(session, step)
            first = first or tokens
            # A decomposition may round otherwise, so only the start must agree.
            assert tokens[0] == first[0], f"{name} gives token {tokens[0]}, not {first[0]}"
            if turn:
                seconds[name].append(spent)
    base = median(seconds["one call"])
    return [_row(name, times, len(variants[name].segments), base) for name, times in seconds.items()]


def _run(session: Session, step: Step) -> tuple[float, list[int]]:
    session.reset()
    session._feed(1)
    read: Callable[[str], Any] = session._state.read
    started, tokens = time.perf_counter(), list[int]()
    for _ in range(TOKENS):
        step.run()
        tokens.append(int(read("token_ids")[0]))
    return (time.perf_counter() - started) / TOKENS, tokens


def _row(name: str, times: list[float], segments: int, base: float) -> dict[str, Any]:
    low, _, high = quantiles(times, n=4)
    return {
        "step": name,
        "ms_median": median(times) * 1e3,
        "ms_middle_half": [low * 1e3, high * 1e3],
        "over_one_call": median(times) / base - 1,
        "segments": segments,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What one decode step costs, in one call and taken apart.")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--device", default=None)
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("-r", "--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    settings = Settings(model=resolve(args.model), backend=args.backend, device=args.device, ctx=256)
    with load(settings) as session:
        rows = measure(session, args.rounds)
        device = session.backend.device.name
    if args.json:
        print(json.dumps({"results": rows, "backend": args.backend, "device": device, **provenance()}))
        return
    for row in rows:
        low, high = row["ms_middle_half"]
        print(f"{row['step']:32} {row['ms_median']:.3f} ms ({low:.3f} to {high:.3f}) {row['over_one_call']:+.1%}")


if __name__ == "__main__":
    main()
