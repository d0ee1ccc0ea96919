"""The README's support table, generated from conformance reports that are kept in bench/results.

    runtime conformance --profile full --backend opencl --json > bench/results/conformance-opencl.json
    python bench/support.py            rewrites the table in README.md
    python bench/support.py --check    says whether it is up to date, and whether the reports cover today's contract
    python bench/support.py FILE...    prints the table for reports of your own, and what is wrong with them

A cell is what the suite found for one op on one backend, weight format by weight format where these differ.
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
NO_FORMAT = "-"

Report = Mapping[str, Any]


def formats() -> dict[tuple[str, str], str]:
    """(op, case) -> the weight format the case is about, for all cases of the contract."""
    return {(op.name, case.name): str(case.dims.get("format", NO_FORMAT)) for op in OPS.values() for case in op.cases}


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
            found.append("; ".join([f"{name}: the backend does not conform", *report.get("missing", [])]))
    return found


def table(reports: Mapping[str, Report]) -> str:
    """The Markdown table: one row for each op, one column for each report; weight formats inside the cells."""
    case_format = formats()
    found: dict[str, dict[str, dict[str, list[str]]]] = {name: {} for name in reports}  # report, op, format: statuses
    for name, report in reports.items():
        for case in report["cases"]:
            weights = case_format.get((case["op"], case["case"]), NO_FORMAT)
            found[name].setdefault(case["op"], {}).setdefault(weights, []).append(case["status"])
    header = ["op", *(f"{r['backend']}: {r['device']}" for r in reports.values())]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for op in OPS:
        lines.append(f"| `{op}` | {' | '.join(cell(found[name].get(op, {})) for name in reports)} |")
    return "\n".join([*lines, "", *(footnote(report) for report in reports.values())])


def cell(by_format: Mapping[str, Sequence[str]]) -> str:
    """ "16 ✓", "414 ✓ in 11 formats", or, where formats differ, each kind of outcome with the formats it holds for."""
    outcomes: dict[tuple[bool, bool, bool], list[str]] = defaultdict(list)
    for weights, statuses in by_format.items():
        outcomes["passed" in statuses, "failed" in statuses, "unsupported" in statuses].append(weights)
    parts: list[str] = []
    for names in outcomes.values():
        text = counts([status for name in names for status in by_format[name]])
        if len(outcomes) > 1:
            text = f"{' '.join(names)}: {text}"
        elif len(names) > 1:
            text += f" in {len(names)} formats"
        parts.append(text)
    return "; ".join(parts) or "not run"


def counts(statuses: Sequence[str]) -> str:
    """How many cases passed, failed and were refused; what is 0 is left out."""
    marks = {"passed": "✓", "failed": "✗", "unsupported": "unsupported"}
    return ", ".join(f"{statuses.count(s)} {mark}" for s, mark in marks.items() if s in statuses)


def footnote(report: Report) -> str:
    counts, device = report["summary"], report["device"]
    if report.get("driver"):
        device += f" (driver {report['driver']})"
    plugin, version = report.get("plugin", {}), report.get("versions", {}).get("polykern", "unknown")
    made_by = f"commit {report['commit'][:12]}" if report["commit"] else f"polykern {version}"
    if plugin.get("distribution", "polykern") != "polykern":
        made_by += f", {plugin['distribution']} {plugin['version']}"
    return (
        f"{report['backend']} on {device}: {counts['killed']} of {counts['mutants']} deliberately wrong"
        f" kernels rejected; {report['date'][:10]}, {made_by}.  "
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
    parser.add_argument("reports", nargs="*", type=Path, metavar="FILE", help="documents of runtime conformance --json")
    args = parser.parse_args(argv)
    if args.reports:
        try:
            given = {path.name: json.loads(path.read_text()) for path in args.reports}
            print(table(given))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"expected documents of runtime conformance --json: {type(error).__name__}: {error}")
        found = problems(given)
        print("\n".join(found) or "the reports cover the contract and conform", file=sys.stderr)
        return 1 if found else 0
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
