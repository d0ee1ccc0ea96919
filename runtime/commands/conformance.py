"""`runtime conformance`: the contract's cases on one backend, and whether those cases would notice a wrong kernel.

The `--json` document is what a claim of support rests on: it names the backend, its device, driver and distribution,
the machine, versions and commit, what was asked for, and for each case the seed that makes its data again.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from ..output import Output
from .options import add_device, name

if TYPE_CHECKING:
    from ...kernels.conformance import CaseResult, Report

HELP = "Judge a backend: every case of every op against the reference, and the kill rate of deliberately wrong kernels."
EXAMPLE = "runtime conformance --backend opencl --op gemm --profile small"
SHOWN = 20

# How far a backend is. wrong: a case fails, or a wrong kernel passes every case of its op. nothing: all is refused.
# partial: what it accepts passes, and something is missing. conforms: see Report.ok. complete: nothing is refused.
Level = Literal["wrong", "nothing", "partial", "conforms", "complete"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--op", type=name, action="append", metavar="OP", help="only this op; may be repeated")
    parser.add_argument("--case", type=name, metavar="CASE", help="only this case of the op, to reproduce a failure")
    parser.add_argument(
        "--profile", choices=("full", "small"), default="full",
        help="full: every case, and the mutants; small: few and cheap cases, each run twice to see whether results"
        " repeat, no mutants (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fast", "exact"), help="only cases of this precision (default: both)")
    add_device(parser)


def run(args: Namespace, out: Output) -> int:
    from ...kernels import conformance
    from ..machine import provenance
    from ..opening import open_chosen
    from ..progress import ProgressBars

    with ProgressBars() as progress:
        backend = open_chosen(args.backend, device=args.device, threads=args.threads, progress=progress)
        try:
            report = conformance.run(
                backend, ops=args.op, profile=args.profile, precision=args.precision, case=args.case, progress=progress
            )
        finally:
            backend.close()
    if args.json:
        out.json(
            {
                "summary": report.summary(),
                "cases": with_seeds(report),
                "mutants": report.mutants,
                "ok": report.ok,
                "level": level(report),
                "missing": missing(report),
                "backend": report.backend,
                "device": report.device,
                "vendor": backend.device.vendor,
                "driver": backend.device.driver,
                "detail": backend.device.detail,
                "plugin": plugin(report.backend),
                "profile": report.profile,
                "asked": {"ops": args.op, "case": args.case, "precision": args.precision},
                **provenance(),
            }
        )
    else:
        show(report, out)
    return 0 if report.ok else 1


def level(report: Report) -> Level:
    """How far the backend is, by the ops and cases that were asked for."""
    if report.failures or report.survivors:
        return "wrong"
    if not report.summary()["passed"]:
        return "nothing"
    if not report.ok:
        return "partial"
    return "conforms" if report.summary()["unsupported"] else "complete"


def missing(report: Report) -> list[str]:
    """What stands between this backend and conformance, in the order to work on it."""
    failed = Counter(case.op for case in report.failures)
    refused = Counter(case.op for case in report.missing)
    survived = Counter(mutant.op for mutant in report.survivors)
    of = Counter(case.op for case in report.cases)
    return [
        *(f"{op}: {count} of {of[op]} cases fail" for op, count in failed.items()),
        *(f"{op}: {count} of {of[op]} cases are refused, and it is required" for op, count in refused.items()),
        *(f"{op}: {count} wrong kernels are not told from right ones" for op, count in survived.items()),
    ]


def with_seeds(report: Report) -> list[dict[str, Any]]:
    """The rows of the report, each with the seed of its data (None for what is no case: `prepare`)."""
    from ...kernels.ops import OPS

    seeds = {(op.name, case.name): case.seed for op in OPS.values() for case in op.cases}
    return [row | {"seed": seeds.get((row["op"], row["case"]))} for row in report.rows()]


def plugin(backend: str) -> dict[str, Any]:
    """Where a backend comes from: distribution, its version, the SPI version it speaks, what it says of itself."""
    from ...backends import describe, list_backends, load_provider

    entry = next(entry for entry in list_backends() if entry.name == backend)
    return {
        "distribution": entry.distribution,
        "version": metadata.version(entry.distribution),
        "spi_version": load_provider(backend).spi_version,
        "describe": describe(entry),
    }


def show(report: Report, out: Output) -> None:
    out.line(f"{report.backend}, {report.device}, profile {report.profile}")
    ops = list(dict.fromkeys(case.op for case in report.cases))
    columns = ("op", "passed", "failed", "unsupported", "largest error / bound", "mutants killed")
    out.table(columns, [_row(op, report) for op in ops], right=columns[1:])
    for kind, cases in (("failed", report.failures), ("unsupported", unsupported(report))):
        for case in cases[:SHOWN]:
            out.line(f"{kind}: {case.op} {case.case}: {case.reason}")
        if len(cases) > SHOWN:
            out.line(f"{kind}: and {len(cases) - SHOWN} more; --json lists all")
    for mutant in report.survivors:
        out.line(f"survived: {mutant.op} {mutant.mutant}: no case rejects it: the kernel's Numerics promise too little")
    if report.hidden:
        out.line(f"{len(report.hidden)} mutants not judged: they are wrong only in cases that are refused")
    for line in missing(report):
        out.line(f"missing: {line}")
    if level(report) == "partial":
        out.line("partial: everything that it accepts passes")
    counts = report.summary()
    out.line(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['unsupported']} unsupported;"
        f" {counts['killed']} of {counts['mutants']} mutants killed: {'conforms' if report.ok else 'does not conform'}"
    )


def unsupported(report: Report) -> list[CaseResult]:
    """The first refused case for each op and reason."""
    first: dict[Any, CaseResult] = {}
    for case in report.cases:
        if case.status == "unsupported":
            first.setdefault((case.op, case.reason), case)
    return list(first.values())


def _row(op: str, report: Report) -> tuple[object, ...]:
    cases = [case for case in report.cases if case.op == op]
    mutants = [mutant for mutant in report.mutants if mutant.op == op]
    ratios = [case.ratio for case in cases if case.ratio is not None]
    killed = sum(bool(mutant.killed_by) for mutant in mutants)
    return (
        op,
        *(sum(case.status == status for case in cases) for status in ("passed", "failed", "unsupported")),
        f"{max(ratios):.3f}" if ratios else "",
        f"{killed} of {len(mutants)}" if mutants else "",
    )
