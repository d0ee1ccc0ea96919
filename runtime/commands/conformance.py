"""`runtime conformance`: the contract's cases on one backend, and whether those cases would notice a wrong kernel."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from ..output import Output
from .options import add_device, name

if TYPE_CHECKING:
    from ...kernels.conformance import CaseResult, Report

HELP = "Judge a backend: every case of every op against the reference, and the kill rate of deliberately wrong kernels."
EXAMPLE = "runtime conformance --backend opencl --op gemm --profile small"
SHOWN = 20


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
    from ...backends import open_backend
    from ...kernels import conformance
    from ..machine import provenance
    from ..progress import ProgressBars

    with ProgressBars() as progress:
        backend = open_backend(args.backend, device=args.device, threads=args.threads, progress=progress)
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
                "cases": report.rows(),
                "mutants": report.mutants,
                "ok": report.ok,
                "backend": report.backend,
                "device": report.device,
                "profile": report.profile,
                **provenance(),
            }
        )
    else:
        show(report, out)
    return 0 if report.ok else 1


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
        out.line(f"survived: {mutant.op} {mutant.mutant}: no case that this backend runs tells it from a right kernel")
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
