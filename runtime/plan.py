"""How a program will run on a backend, decided before the first token: per call native, decomposed or reference."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..kernels.errors import ContractError, UnsupportedOp, UsageError
from ..kernels.host import dense_stride, span
from ..kernels.op import Op, Signature
from ..kernels.ops import OPS
from ..kernels.program import BufferSpec, Call, Program, View, decompose
from ..kernels.quant import FORMATS
from ..kernels.spi import Backend, Kernel, Unsupported

Fallback = Literal["error", "warn", "allow"]
FALLBACKS: tuple[Fallback, ...] = ("error", "warn", "allow")

# native: one kernel of the backend. decomposed: several, none of them on the host. reference: on the host, at least
# in part.
How = Literal["native", "decomposed", "reference"]

logger = logging.getLogger("polykern.plan")


@dataclass(frozen=True)
class PlannedCall:
    """A call and how it runs.

    `kernel` names the backend's kernel (native) or "reference"; `reason` says why nothing better was possible (empty
    for native); `parts` are the primitives a fused call was taken apart into; `nbytes` is what has to be moved at
    least.
    """

    call: Call
    signature: Signature
    kernel: str
    native: bool
    nbytes: int
    reason: str = ""
    parts: tuple[PlannedCall, ...] = ()

    @property
    def how(self) -> How:
        if not all(leaf.native for leaf in self.leaves()):
            return "reference"
        return "decomposed" if self.parts else "native"

    def leaves(self) -> Iterator[PlannedCall]:
        """The calls that are really made, in order."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Plan:
    """A program's calls with the backend's answers, and every buffer they need."""

    program: Program
    backend: Backend
    calls: tuple[PlannedCall, ...]
    buffers: dict[str, BufferSpec] = field(default_factory=dict[str, BufferSpec])

    @property
    def nbytes(self) -> int:
        """Bytes one run has to move at least."""
        return sum(call.nbytes for call in self.calls)

    def leaves(self) -> Iterator[PlannedCall]:
        for call in self.calls:
            yield from call.leaves()

    def counts(self) -> dict[How, int]:
        """How many of the program's calls are native, decomposed, reference."""
        counts: dict[How, int] = {"native": 0, "decomposed": 0, "reference": 0}
        for call in self.calls:
            counts[call.how] += 1
        return counts

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per call of the program; `share` is its part of the bytes to move, 0 to 1."""
        return [self._row(call) for call in self.calls]

    def _row(self, planned: PlannedCall) -> dict[str, Any]:
        row: dict[str, Any] = {
            "label": planned.call.label,
            "op": planned.call.op,
            "how": planned.how,
            "kernel": planned.kernel,
            "reason": planned.reason,
            "bytes": planned.nbytes,
            "share": planned.nbytes / max(1, self.nbytes),
            "signature": str(planned.signature),
        }
        if planned.parts:
            row["parts"] = [self._row(part) for part in planned.parts]
        return row


def plan(program: Program, backend: Backend, fallback: Fallback = "warn") -> Plan:
    """Ask the backend about every call; take refused fused calls apart, leave the rest to the host reference.

    fallback "error": raise UnsupportedOp if anything would run on the host. "warn": log one line. "allow": say nothing.
    Raises ContractError for a program that does not fit the contract, whatever the backend.
    """
    if fallback not in FALLBACKS:
        raise UsageError(f"fallback is {fallback!r}; use one of {', '.join(FALLBACKS)}")
    planner = _Planner(backend, dict(program.buffers))
    made = Plan(program, backend, tuple(planner.plan(call) for call in program.calls), planner.buffers)
    on_host = [leaf for leaf in made.leaves() if not leaf.native]
    if on_host and fallback != "allow":
        share = sum(leaf.nbytes for leaf in on_host) / max(1, made.nbytes)
        total = sum(1 for _ in made.leaves())
        what = f"{len(on_host)} of {total} calls of {program.name} ({share:.0%} of the bytes)"
        if fallback == "error":
            raise UnsupportedOp(
                f"{backend.name} refuses {what}: {_reasons(on_host)}; --fallback warn runs them on the host"
            )
        logger.warning("%s leaves %s to the host, slowly: %s", backend.name, what, _reasons(on_host))
    return made


def _reasons(refused: Sequence[PlannedCall]) -> str:
    """The first three different reasons, each with how many calls it stopped."""
    counts = Counter(f"{leaf.call.op}: {leaf.reason}" for leaf in refused)
    shown = [f"{reason} ({count}x)" for reason, count in list(counts.items())[:3]]
    if len(counts) > len(shown):
        shown.append(f"and {len(counts) - len(shown)} more reasons")
    return "; ".join(shown)


class _Planner:
    """Plans call after call; a backend is asked once per signature."""

    def __init__(self, backend: Backend, buffers: dict[str, BufferSpec]) -> None:
        self.backend = backend
        self.buffers = buffers
        self.answers: dict[str, Kernel | Unsupported] = {}

    def plan(self, call: Call) -> PlannedCall:
        op, signature = self._checked(call)
        answer = self._ask(signature)
        nbytes = op.cost(signature).nbytes
        if isinstance(answer, Kernel):
            return PlannedCall(call, signature, answer.name, True, nbytes)
        on_host = PlannedCall(call, signature, "reference", False, nbytes, answer.reason)
        if op.decompose is None:
            return on_host
        before = dict(self.buffers)
        calls, temporaries = decompose(op, call, signature)
        self.buffers.update({spec.name: spec for spec in temporaries})
        parts = tuple(self.plan(part) for part in calls)
        if not any(leaf.native for part in parts for leaf in part.leaves()):
            self.buffers = before
            return on_host  # in one piece: the host would gain nothing from the parts
        kernel = " + ".join(part.kernel for part in parts)
        return PlannedCall(call, signature, kernel, False, sum(p.nbytes for p in parts), answer.reason, parts)

    def _ask(self, signature: Signature) -> Kernel | Unsupported:
        key = str(signature)
        if key not in self.answers:
            try:
                answer: Any = self.backend.supports(signature)
            except Exception as error:  # noqa: BLE001 - a plug-in's code; its refusal is as good as any other
                answer = Unsupported(signature.op, f"supports() raised {type(error).__name__}: {error}")
            if not isinstance(answer, (Kernel, Unsupported)):
                answer = Unsupported(signature.op, f"supports() returned {type(answer).__name__}")
            self.answers[key] = answer
        return self.answers[key]

    def _checked(self, call: Call) -> tuple[Op, Signature]:
        """The op and full signature of a call, every view of it inside its buffer."""
        where = f"{call.label or call.op}"
        op = OPS.get(call.op)
        if op is None:
            raise ContractError(f"{where}: no op {call.op!r}; the contract has {', '.join(OPS)}")
        try:
            signature = op.signature({name: view.type for name, view in call.args.items()}, call.attrs)
        except ContractError as error:
            raise ContractError(f"{where}: {error}") from error
        missing = [name for name in signature.tensors if name not in call.args]
        if missing:
            raise ContractError(f"{where}: {call.op} needs {', '.join(missing)}")
        for name, view in call.args.items():
            self._check_view(f"{where}: {name}", view)
        return op, signature

    def _check_view(self, where: str, view: View) -> None:
        spec = self.buffers.get(view.buffer)
        if spec is None:
            raise ContractError(f"{where}: no buffer {view.buffer!r} in the program")
        if spec.dtype != view.dtype:
            raise ContractError(f"{where}: {view.dtype} view of buffer {spec.name}, which is {spec.dtype}")
        if view.dtype in FORMATS:
            if (view.offset, view.shape) != (0, spec.shape):
                raise ContractError(f"{where}: a quantised weight can only be used whole: {list(spec.shape)}")
            return
        row_stride = dense_stride(view.shape) if view.row_stride is None else view.row_stride
        end = view.offset + span(view.shape, row_stride)
        if view.offset < 0 or end > math.prod(spec.shape) or row_stride < dense_stride(view.shape):
            raise ContractError(
                f"{where}: view {list(view.shape)} at {view.offset}, row stride {row_stride}, does not fit buffer "
                f"{spec.name} {list(spec.shape)}"
            )
