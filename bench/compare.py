"""Which kernels got slower or faster between two results of `pytest bench`.

    python bench/compare.py OLD.json NEW.json                    exit status 1 if anything got slower, or broke
    python bench/compare.py OLD.json NEW.json --threshold 10%    what differs by less is the same
    python bench/compare.py OLD.json NEW.json --json             one document on stdout

A case counts as changed if its median moved by more than the threshold, and further than noise explains: the middle
halves of the rounds do not overlap. Other work on the machine is not noise of that kind: the limits that both runs
measured are printed as well, and where they differ, so may every time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kernelbench.results import Row, duration, limits, read

Verdict = Literal["slower", "faster", "same", "broken", "fixed", "gone", "new"]
BAD: tuple[Verdict, ...] = ("slower", "broken")


@dataclass
class Change:
    """One case in both files. `ratio`: new time / old time, above 1 is slower; None without two times."""

    backend: str
    device: str
    case: str
    verdict: Verdict
    old_s: float | None = None
    new_s: float | None = None
    ratio: float | None = None
    note: str = ""


def threshold(text: str) -> float:
    """ "5%" or "0.05" as 0.05."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"threshold is {text!r}, expected a percentage such as 5% or 0.05")
    return value


def compare(old: Sequence[Row], new: Sequence[Row], least: float) -> list[Change]:
    """Every case of either side, worst first."""
    before = {(row.backend, row.device, row.case): row for row in old}
    after = {(row.backend, row.device, row.case): row for row in new}
    changes = [_change(key, before.get(key), after.get(key), least) for key in {**before, **after}]
    rank = {verdict: i for i, verdict in enumerate(("broken", "slower", "gone", "new", "fixed", "faster", "same"))}
    return sorted(changes, key=lambda c: (rank[c.verdict], -(c.ratio or 0)))


def _change(key: tuple[str, str, str], old: Row | None, new: Row | None, least: float) -> Change:
    if old is None or new is None:
        return Change(*key, "new" if old is None else "gone")
    if old.signature != new.signature:
        return Change(*key, "gone", note="another call goes by this name now")
    if old.median_s is None or new.median_s is None:
        if old.status == new.status:
            return Change(*key, "same", note=new.reason)
        is_broken = new.status == "failed" or old.status == "timed"
        verdict: Verdict = "broken" if is_broken else "fixed"
        return Change(*key, verdict, old.median_s, new.median_s, note=new.reason or old.reason)
    ratio = new.median_s / old.median_s
    (old_low, old_high), (new_low, new_high) = old.middle, new.middle
    if ratio > 1 + least and new_low > old_high:
        verdict = "slower"
    elif ratio < 1 / (1 + least) and new_high < old_low:
        verdict = "faster"
    else:
        verdict = "same"
    return Change(*key, verdict, old.median_s, new.median_s, ratio)


def remarks(old: Mapping[str, Any], new: Mapping[str, Any], least: float) -> list[str]:
    """Why the two files may not be comparable at all."""
    found: list[str] = []
    for what, name in (("model", "processor"), ("memory_bytes", "memory"), ("usable", "number of processors")):
        was, now = old["host"].get(what), new["host"].get(what)
        if was != now:
            found.append(f"another {name}: {was}, now {now}")
    before = {(d["backend"], d["device"]): d for d in old["devices"]}
    for device in new["devices"]:
        was = before.get((device["backend"], device["device"]))
        if was is None:
            found.append(f"{device['backend']}, {device['device']} is only in the new file")
            continue
        found.append(f"{device['backend']}, {device['device']}: {limits(was)}; now {limits(device)}")
        if was["read_gb_per_s"] and device["read_gb_per_s"]:
            moved = device["read_gb_per_s"] / was["read_gb_per_s"]
            if abs(moved - 1) > least:
                found.append(f"the machine itself reads {moved:.2f} times as fast as then: so may every kernel")
        if was["driver"] != device["driver"]:
            found.append(f"another driver: {was['driver']}, now {device['driver']}")
    for option in ("precision", "format"):
        if old["options"].get(option) != new["options"].get(option):
            found.append(f"another --{option}: {old['options'].get(option)}, now {new['options'].get(option)}")
    return found


def show(changes: Sequence[Change], notes: Sequence[str], least: float, is_all: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for note in notes:
        console.print(note, markup=False)
    counts = {
        verdict: sum(c.verdict == verdict for c in changes) for verdict in dict.fromkeys(c.verdict for c in changes)
    }
    shown = [c for c in changes if is_all or c.verdict != "same"]
    styles = {"slower": "red", "broken": "bold red", "faster": "green", "fixed": "green", "gone": "yellow"}
    if shown:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "backend", "case", "old", "new", "new/old", ""):
            table.add_column(column, justify="right" if column in ("old", "new", "new/old") else "left", no_wrap=True)
        for c in shown:
            times = ["" if t is None else duration(t) for t in (c.old_s, c.new_s)]
            ratio = "" if c.ratio is None else f"{c.ratio:.2f}"
            table.add_row(c.verdict, c.backend, c.case, *times, ratio, c.note, style=styles.get(c.verdict))
        console.print(table)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"{len(changes)} cases, threshold {least:.0%}: {summary}", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--threshold", type=threshold, default=0.05, metavar="P", help="5%% or 0.05 (default: 5%%)")
    parser.add_argument("--all", action="store_true", help="list the cases that stayed the same, too")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
    except ValueError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    changes = compare(old["rows"], new["rows"], args.threshold)
    notes = remarks(old, new, args.threshold)
    is_worse = any(change.verdict in BAD for change in changes)
    if args.json:
        document = {
            "ok": not is_worse,
            "threshold": args.threshold,
            "notes": notes,
            "changes": [asdict(change) for change in changes],
        }
        print(json.dumps(document, allow_nan=False))
    else:
        show(changes, notes, args.threshold, args.all)
    return 1 if is_worse else 0


if __name__ == "__main__":
    sys.exit(main())
