"""The README's support table, generated from conformance reports that are kept in bench/results.

    runtime conformance --profile full --backend opencl --json > bench/results/conformance-opencl.json
    python bench/support.py            rewrites the table in README.md
    python bench/support.py --check    says whether it is up to date, and whether the reports cover today's contract

A cell is what the suite found, op by op and weight format by weight format: cases passed, or what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polykern.kernels.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- support table: bench/support.py -->", "<!-- end of support table -->"
FORMAT_COLUMN_FOR_NONE = "-"

Report = Mapping[str, Any]
Row = tuple[str, str]  # op, weight format or "-"


def formats() -> dict[tuple[str, str], str]:
    """(op, case) -> the weight format the case is about, for all cases of the contract."""
    return {
        (op.name, case.name): str(case.dims.get("format", FORMAT_COLUMN_FOR_NONE))
        for op in OPS.values()
        for case in op.cases
    }


def problems(reports: Mapping[str, Report]) -> list[str]:
    """Where a report does not say what the contract of today asks."""
    expected, found = set(formats()), []
    for name, report in reports.items():
        reported = {(case["op"], case["case"]) for case in report["cases"]}
        if missing := sorted(expected - reported):
            found.append(f"{name}: {len(missing)} cases of the contract are missing, first {' '.join(missing[0])}")
        if stray := sorted(reported - expected):
            found.append(f"{name}: {len(stray)} cases are not in the contract, first {' '.join(stray[0])}")
        if not report["ok"]:
            found.append(f"{name}: the backend does not conform")
    return found


def table(reports: Mapping[str, Report]) -> str:
    """The Markdown table, one row for each op and weight format, one column for each report."""
    case_format = formats()
    cells: dict[Row, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, report in reports.items():
        for case in report["cases"]:
            row = (case["op"], case_format.get((case["op"], case["case"]), FORMAT_COLUMN_FOR_NONE))
            cells[row][name].append(case["status"])
    order = {name: place for place, name in enumerate(OPS)}
    rows = sorted(cells, key=lambda row: (order.get(row[0], len(order)), list(case_format.values()).index(row[1])))
    header = ["op", "weights", *(f"{r['backend']}: {r['device']}" for r in reports.values())]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---|" * len(reports)]
    for op, weights in rows:
        found = [cell(cells[op, weights].get(name, [])) for name in reports]
        lines.append(f"| `{op}` | {weights} | {' | '.join(found)} |")
    return "\n".join([*lines, "", *(footnote(report) for report in reports.values())])


def cell(statuses: Sequence[str]) -> str:
    """ "12 ✓" when all passed; else how many did, failed or were refused."""
    passed, failed, refused = (statuses.count(s) for s in ("passed", "failed", "unsupported"))
    parts = [f"{passed} ✓"] if passed or not statuses else []
    parts += [f"{failed} ✗"] if failed else []
    parts += [f"{refused} unsupported"] if refused else []
    return ", ".join(parts)


def footnote(report: Report) -> str:
    counts = report["summary"]
    return (
        f"{report['backend']} on {report['device']}: {counts['killed']} of {counts['mutants']} deliberately wrong"
        f" kernels rejected; {report['date'][:10]}, commit {(report['commit'] or 'unknown')[:12]}.  "
    )


def reports() -> dict[str, Report]:
    """The kept reports by file name, in alphabetical order."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("conformance-*.json"))}


def with_table(readme: str, content: str) -> str:
    """`readme` with `content` between the two markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    args = parser.parse_args(argv)
    kept = reports()
    if not kept:
        print(f"no conformance-*.json in {RESULTS}: run `make conformance`", file=sys.stderr)
        return 1
    readme = README.read_text()
    wanted = with_table(readme, table(kept))
    if not args.check:
        README.write_text(wanted)
        return 0
    found = problems(kept)
    if wanted != readme:
        found.append("README.md: the support table is out of date: run `make support`")
    print("\n".join(found) or "the support table is up to date", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
