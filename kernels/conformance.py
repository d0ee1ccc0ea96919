"""The suite: every case of every op on one backend, judged against the float64 reference, and the suite judged too.

Outputs are poisoned, every tensor lies in a guarded buffer, half of the cases have strided rows, and what a backend
refuses is counted apart from what passes. The op's mutants go through the same comparison with the numerics that the
backend declares: a mutant that survives shows that a pass means too little.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError
from .judge import Verdict
from .op import Case, Mutant, Op
from .ops import OPS, small_cases
from .spi import Backend, Kernel, Progress, Unsupported
from .trial import Trial, describe

Profile = Literal["full", "small"]
Status = Literal["passed", "failed", "unsupported"]


@dataclass(frozen=True)
class CaseResult:
    """`ratio`: largest error as a fraction of its bound, None where there is none (refused, raised, or bound 0)."""

    op: str
    case: str
    status: Status
    ratio: float | None = None
    kernel: str = ""
    reason: str = ""


@dataclass(frozen=True)
class MutantResult:
    """`killed_by` names the case that rejected the mutant; empty for a survivor.

    `shown`: in some case that ran, the mutant computes anything else than the reference.
    """

    op: str
    mutant: str
    killed_by: str
    shown: bool = True


@dataclass
class Report:
    """What the suite found. Ops in `required` are those a decode backend must have and that were asked for."""

    backend: str
    device: str
    profile: Profile
    required: tuple[str, ...] = ()
    cases: list[CaseResult] = field(default_factory=list[CaseResult])
    mutants: list[MutantResult] = field(default_factory=list[MutantResult])

    def summary(self) -> dict[str, int]:
        statuses = [case.status for case in self.cases]
        return {
            "passed": statuses.count("passed"),
            "failed": statuses.count("failed"),
            "unsupported": statuses.count("unsupported"),
            "mutants": len(self.mutants),
            "killed": sum(bool(mutant.killed_by) for mutant in self.mutants),
        }

    @property
    def failures(self) -> list[CaseResult]:
        return [case for case in self.cases if case.status == "failed"]

    @property
    def survivors(self) -> list[MutantResult]:
        """Mutants that no case rejects, but for those that only refused cases would show."""
        alive = [mutant for mutant in self.mutants if not mutant.killed_by]
        return [mutant for mutant in alive if mutant not in self.hidden]

    @property
    def hidden(self) -> list[MutantResult]:
        """Mutants that are right in every case that ran, of ops that refuse others: they judge nothing here."""
        refused = {case.op for case in self.cases if case.status == "unsupported"}
        return [mutant for mutant in self.mutants if not mutant.shown and mutant.op in refused]

    @property
    def missing(self) -> list[CaseResult]:
        """Refused cases of required ops."""
        return [case for case in self.cases if case.status == "unsupported" and case.op in self.required]

    @property
    def ok(self) -> bool:
        """Something passed, nothing failed, no mutant survived, and no required op was refused anywhere."""
        return self.summary()["passed"] > 0 and not (self.failures or self.survivors or self.missing)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per case: op, case, status, ratio, kernel, reason."""
        return [dict(vars(case)) for case in self.cases]


def run(
    backend: Backend,
    *,
    ops: Iterable[str | Op] | None = None,
    profile: Profile = "full",
    precision: str | None = None,
    case: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the suite on an open backend.

    ops        names (or Ops of your own); None: all of the contract
    profile    "full": every case, and the mutants; "small": few and cheap cases, for simulated devices, each run twice
               to see whether it is deterministic, without mutants (they need every case)
    precision  only the cases of this `precision` attribute, and those of ops without one
    case       only the case of this name, without mutants: to reproduce a failure
    progress   called as (op, cases done, cases in all)

    Raises UsageError for an unknown op, profile or case. A backend that raises fails the case, not the run.
    """
    if profile not in ("full", "small"):
        raise UsageError(f"profile is {profile!r}; use full or small")
    chosen = [_op(name) for name in (OPS.values() if ops is None else ops)]
    work = [(op, _cases(op, profile, precision, case)) for op in chosen]
    total = sum(len(cases) for _, cases in work)
    if not total:
        raise UsageError(f"no case{f' {case!r}' if case else ''} of {', '.join(op.name for op in chosen)} to run")
    required = tuple(op.name for op in chosen if op.required)
    report = Report(backend.name, backend.device.name, profile, required)
    for op, cases in work:
        mutants = op.mutants if profile == "full" and not case else ()
        _run_op(backend, op, cases, mutants, report, progress, total)
    return report


def _op(op: str | Op) -> Op:
    if isinstance(op, Op):
        return op
    if op not in OPS:
        close = difflib.get_close_matches(op, OPS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UsageError(f"unknown op {op!r}{hint} known: {', '.join(OPS)}")
    return OPS[op]


def _cases(op: Op, profile: Profile, precision: str | None, name: str | None) -> list[Case]:
    cases = small_cases(op) if profile == "small" else op.cases
    return [
        case
        for case in cases
        if (name is None or case.name == name)
        and (precision is None or op.with_defaults(case.attrs).get("precision", precision) == precision)
    ]


def _run_op(
    backend: Backend,
    op: Op,
    cases: list[Case],
    mutants: tuple[Mutant, ...],
    report: Report,
    progress: Progress | None,
    total: int,
) -> None:
    """All cases of one op; every mutant still alive is tried on each supported case."""
    trials = [Trial.ask(backend, op, case) for case in cases]
    supported = [trial for trial in trials if isinstance(trial.answer, Kernel)]
    try:
        backend.prepare([trial.signature for trial in supported])
    except Exception as error:  # noqa: BLE001 - a vendor's code
        report.cases.append(CaseResult(op.name, "prepare", "failed", reason=describe("prepare()", error)))
    killed: dict[str, str] = {}
    shown: set[str] = set()
    for trial in trials:
        report.cases.append(_result(trial, backend, report.profile == "small"))
        if isinstance(trial.answer, Kernel):
            told = trial.tell(mutant for mutant in mutants if mutant.name not in killed)
            shown.update(told)
            killed.update({name: trial.case.name for name, is_rejected in told.items() if is_rejected})
        if progress:
            progress(op.name, len(report.cases), total)
    if supported:
        report.mutants += [MutantResult(op.name, m.name, killed.get(m.name, ""), m.name in shown) for m in mutants]


def _result(trial: Trial, backend: Backend, is_repeated: bool) -> CaseResult:
    op, case, answer = trial.op.name, trial.case.name, trial.answer
    if isinstance(answer, Unsupported):
        return CaseResult(op, case, "unsupported", reason=answer.reason)
    if isinstance(answer, str):
        return CaseResult(op, case, "failed", reason=answer)
    try:
        verdict = trial.run(backend, is_repeated)
    except Exception as error:  # noqa: BLE001 - a vendor's code
        verdict = Verdict(math.inf, describe("the call", error))
    ratio = verdict.ratio if math.isfinite(verdict.ratio) else None
    if not verdict.reason:
        return CaseResult(op, case, "passed", ratio, answer.name)
    again = f"runtime conformance --backend {backend.name} --op {op} --case {case} (seed {trial.case.seed})"
    return CaseResult(op, case, "failed", ratio, answer.name, f"{verdict.reason}; to reproduce: {again}")
