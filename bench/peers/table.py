"""Tables of what run.py found: on the terminal, and in the README.

python bench/peers/table.py            rewrites the tables in README.md from bench/results/peers-*.json
python bench/peers/table.py --check    says whether they are up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- comparison: bench/peers/table.py -->", "<!-- end of comparison -->"

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def rates(side: Mapping[str, Any], test: str) -> list[float]:
    return next(row["tps_all"] for row in side["results"] if row["test"] == test)


def best(document: Document, test: str, peer: bool) -> Mapping[str, Any] | None:
    """The fastest of the peers, or of ours."""
    candidates = [side for side in document["sides"] if side["peer"] == peer]
    return max(candidates, key=lambda side: median(rates(side, test)), default=None)


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def speed(side: Mapping[str, Any], test: str) -> str:
    """Median, and least to most."""
    found = rates(side, test)
    return f"{number(median(found))} ({number(min(found))}–{number(max(found))})"


def ratios(document: Document, test: str, ours: Mapping[str, Any]) -> list[str]:
    """How many times as fast `ours` is as each side, round by round: the median."""
    mine = rates(ours, test)
    return [
        "" if side is ours else f"{median(a / b for a, b in zip(mine, rates(side, test), strict=True)):.2f}×"
        for side in document["sides"]
    ]


def show(document: Document) -> None:
    """The comparison on stdout: speeds, share of the bandwidth, and one column of ratios for each side of ours."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(
        f"{document['model']['file']}, {document['threads']} threads, {document['host']['model']};"
        f" memory is read at {document['read_gb_per_s']:.1f} GB/s"
    )
    ours = [side for side in document["sides"] if not side["peer"]]
    for test in document["tests"]:
        grid = Table(title=test, title_justify="left", box=None, pad_edge=False)
        grid.add_column("side")
        for name in ("tok/s", "least–most", "of bandwidth", *(f"{side['name']} is" for side in ours)):
            grid.add_column(name, justify="right")
        columns = [ratios(document, test, side) for side in ours]
        for place, side in enumerate(document["sides"]):
            found = rates(side, test)
            row = next(row for row in side["results"] if row["test"] == test)
            share = f"{row['roofline_fraction']:.0%}" if "roofline_fraction" in row else ""
            spread = f"{number(min(found))}–{number(max(found))}"
            grid.add_row(side["name"], number(median(found)), spread, share, *(column[place] for column in columns))
        console.print(grid)
    for name, reason in document["left_out"].items():
        console.print(f"{name}: left out: {reason}", markup=False, highlight=False)
    if (document["others_cpu_share"] or 0) > 0.05:
        console.print(
            f"Other processes took {document['others_cpu_share']:.0%} of the processors: repeat on a quiet machine."
        )


def markdown(document: Document) -> str:
    """One table: a row for each side, a column for each test; behind a peer's speed, how many times ours that is."""
    tests, sides = document["tests"], document["sides"]
    lines = [
        "| " + " | ".join([f"`{document['model']['file']}`, tok/s", *tests]) + " |",
        "|---" + "|---:" * len(tests) + "|",
    ]
    for side in sides:
        cells: list[str] = []
        for test in tests:
            mine, cell = best(document, test, peer=False), speed(side, test)
            if side["peer"] and mine:
                cell += f", {ratios(document, test, mine)[list(sides).index(side)]}"
            cells.append(cell)
        lines.append(f"| {title(side)} | {' | '.join(cells)} |")
    commit, date = (document["commit"] or "unknown")[:12], document["date"][:10]
    host = document["host"]["model"] + (" with AMX" if "amx_int8" in document["host"].get("flags", ()) else "")
    read = f"memory read at {document['read_gb_per_s']:.1f} GB/s in the same run"
    lines += [
        "",
        f"{host}, {document['threads']} threads, {read}; {date}, commit {commit}.  ",
    ]
    return "\n".join(lines)


def title(side: Mapping[str, Any]) -> str:
    name, _, fmt = side["name"].partition(":")
    text = name if side["peer"] else f"**polykern {name}**"
    return f"{text}, file requantised to {fmt}" if fmt else text


def documents() -> dict[str, Document]:
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("peers-*.json"))}


def with_tables(readme: str, found: Mapping[str, Document]) -> str:
    """`readme` with the tables between the two markers."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(map(markdown, found.values())) + f"\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    args = parser.parse_args(argv)
    found = documents()
    if not found:
        print(f"no peers-*.json in {RESULTS}: run `make peers`", file=sys.stderr)
        return 1
    readme = README.read_text()
    wanted = with_tables(readme, found)
    if not args.check:
        README.write_text(wanted)
        return 0
    stale = wanted != readme
    print(
        f"the comparison is {'out of date: run python bench/peers/table.py' if stale else 'up to date'}",
        file=sys.stderr,
    )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
