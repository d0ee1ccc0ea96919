"""One case on one backend: laid out in guarded memory, run, judged; and the op's mutants on the same data."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import ContractError
from .guards import Guarded, bits_of
from .judge import Verdict, judge
from .op import NUMPY_DTYPES, Case, Inputs, Mutant, Op, Outputs, Signature, fp64, type_of
from .quant import Array, Weight
from .spi import Backend, BoundCall, DeviceTensor, Kernel, Unsupported


def describe(what: str, error: Exception) -> str:
    return f"{what} raised {type(error).__name__}: {' '.join(str(error).split())}"


@dataclass
class Trial:
    """`answer` is what the backend says to the case's signature; a string if asking failed."""

    op: Op
    case: Case
    inputs: Inputs
    signature: Signature
    answer: Kernel | Unsupported | str

    @classmethod
    def ask(cls, backend: Backend, op: Op, case: Case) -> Trial:
        inputs = {name: value for name, value in op.make_inputs(case).items() if value is not None}
        signature = op.signature({name: type_of(value) for name, value in inputs.items()}, case.attrs)
        try:
            answer: Any = backend.supports(signature)
        except Exception as error:  # noqa: BLE001 - a vendor's code
            answer = describe("supports()", error)
        if not isinstance(answer, (Kernel, Unsupported, str)):
            answer = f"supports() returned {type(answer).__name__}, expected Kernel or Unsupported"
        return cls(op, case, inputs, signature, answer)

    @cached_property
    def wide(self) -> dict[str, Any]:
        return fp64(self.inputs)

    @cached_property
    def expected(self) -> Outputs:
        """The float64 reference, computed once for the kernel and all mutants."""
        with np.errstate(all="ignore"):
            return self.op.reference(self.wide, self.signature.attrs)

    def judge(self, got: Outputs) -> Verdict:
        assert isinstance(self.answer, Kernel)
        numerics = self.answer.numerics
        try:
            with np.errstate(all="ignore"):
                return judge(self.op, self.case, self.signature, self.wide, self.expected, got, numerics)
        except ContractError as error:
            return Verdict(np.inf, f"{self.answer.name} declares numerics that bound nothing: {error}")

    def run(self, backend: Backend, is_repeated: bool) -> Verdict:
        """Run the case once, or twice from the same inputs, which must give the same bits."""
        placed, launch = self._bind(backend)
        got, reason = _launch(backend, placed, launch)
        if reason:
            return Verdict(np.inf, reason)
        verdict = self.judge(got)
        if is_repeated and not verdict.reason:
            again, reason = _launch(backend, placed, launch)
            differs = [n for n, value in again.items() if not np.array_equal(bits_of(value), bits_of(got[n]))]
            if reason or differs:
                return Verdict(np.inf, reason or f"{differs[0]} differs between two runs on the same inputs")
        return verdict

    def _bind(self, backend: Backend) -> tuple[list[Guarded], Any]:
        loose = bool(zlib.crc32(self.case.name.encode()) & 1)  # half of the cases, the same ones everywhere
        tensors: dict[str, DeviceTensor] = {}
        placed: list[Guarded] = []
        for name, kind in self.signature.tensors.items():
            value = self.inputs.get(name)
            if isinstance(value, Weight):
                tensors[name] = DeviceTensor(backend.pack(value), kind.shape, kind.dtype)
                continue
            guarded = Guarded.place(backend, self.op.param(name), kind, value, loose)
            tensors[name] = guarded.tensor
            placed.append(guarded)
        launch = backend.bind(BoundCall(self.op.name, tensors, self.signature.attrs, self.case.name))
        return placed, backend.capture([launch])

    def tell(self, mutants: Iterable[Mutant]) -> dict[str, bool]:
        """Mutant -> whether this case rejects it. Those that do here just what the reference does are left out.

        They compute in float32 like a kernel (some are wrong only there: exp without its shift overflows). So that none
        dies of rounding alone, the reference in float32 has to pass first.
        """
        mutants = list(mutants)
        right = self._outputs(self.op.reference) if mutants else None
        if right is None or self.judge(right).reason:
            return {}
        told: dict[str, bool] = {}
        for mutant in mutants:
            got = self._outputs(mutant.run)
            if got is not None and not _same(got, right):
                told[mutant.name] = bool(self.judge(got).reason)
        return told

    def _outputs(self, run: Any) -> Outputs | None:
        """What `run` computes in float32, as a kernel would store it (none may die of returning float64), or None."""
        try:
            with np.errstate(all="ignore"):
                outputs: Outputs = run(self.inputs, self.signature.attrs)
        except Exception:  # noqa: BLE001 - a mutant that cannot take this case is not caught by it
            return None
        types = {name: NUMPY_DTYPES[self.signature.tensors[name].dtype] for name in outputs}
        return {name: np.asarray(value, types[name]) for name, value in outputs.items()}


def _same(a: Outputs, b: Outputs) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(bits_of(a[name]), bits_of(b[name])) for name in a)


def _launch(backend: Backend, placed: list[Guarded], launch: Any) -> tuple[dict[str, Array], str]:
    """The outputs after one run from fresh inputs, and what the run damaged."""
    for guarded in placed:
        guarded.reset(backend)
    launch()
    backend.synchronize()
    got: dict[str, Array] = {}
    for guarded in placed:
        flat = guarded.read(backend)
        reason = guarded.damage(flat)
        if reason:
            guarded.reset(backend)
            is_memory = guarded.damage(guarded.read(backend))
            return {}, "read() does not give back the bytes of write()" if is_memory else reason
        if guarded.param.is_written:
            got[guarded.param.name] = guarded.value(flat)
    return got, ""
