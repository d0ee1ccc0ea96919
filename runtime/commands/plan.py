"""`runtime plan`: which kernel runs each call of a decode step, and why not another."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import groupby
from typing import Any

from ..output import Output
from .options import add_session, open_session

HELP = "Show how a model would run: kernel, reason and share of bytes for each call of a decode step."
EXAMPLE = "runtime plan --backend opencl -m smollm2-135m-instruct"


def add_arguments(parser: ArgumentParser) -> None:
    add_session(parser)
    parser.add_argument("--all", action="store_true", help="every call, not one line for calls that run alike")


def run(args: Namespace, out: Output) -> int:
    session = open_session(args)
    try:
        plan, device = session.plan, f"{session.backend.name}, {session.backend.device.name}"
        choice = session.choice
        rows = plan.rows()
    finally:
        session.close()
    if args.json:
        out.json(rows)
        return 0
    counts = plan.counts()
    out.line(f"{device}: {counts['native']} native, {counts['decomposed']} decomposed, {counts['reference']} reference")
    if choice:
        out.line(f"auto chose {choice}, measured {choice.date}")
    shown = [(1, row) for row in rows] if args.all else alike(rows)
    out.table(
        ("calls", "op", "how", "kernel", "bytes", "share", "reason"),
        [
            (n, r["op"], r["how"], r["kernel"], r["bytes"], f"{100 * n * r['share']:.1f}%", r["reason"])
            for n, r in shown
        ],
        right=("calls", "bytes", "share"),
    )
    return 0


def alike(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """One row, with its count, for all calls of the same op, shapes and kernel; in order of first appearance."""

    def key(row: dict[str, Any]) -> tuple[str, str]:
        return row["signature"], row["kernel"]

    first = {key(row): place for place, row in reversed(list(enumerate(rows)))}
    grouped = groupby(sorted(rows, key=lambda row: first[key(row)]), key)
    return [(len(same), same[0]) for same in (list(group) for _, group in grouped)]
