"""The contract: every op there is, in one mapping. Nothing else needs to be told of a new op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .add import ADD
from .advance import ADVANCE
from .argmax import ARGMAX
from .attention import ATTENTION
from .dequantize import DEQUANTIZE
from .embedding import EMBEDDING
from .gather import GATHER
from .gemm import GEMM
from .gemm_add import GEMM_ADD
from .glu import GLU
from .kv_append import KV_APPEND
from .op import Case, Inputs, Op, Signature, type_of
from .rms_norm import RMS_NORM
from .rms_norm_gemm import RMS_NORM_GEMM
from .rms_norm_gemm_glu import RMS_NORM_GEMM_GLU
from .rope import ROPE
from .rope_kv_append import ROPE_KV_APPEND
from .sample import SAMPLE
from .softcap import SOFTCAP

# Required ops first, then optional primitives, then fused ops.
OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        GEMM,
        ATTENTION,
        DEQUANTIZE,
        EMBEDDING,
        GATHER,
        RMS_NORM,
        ROPE,
        KV_APPEND,
        GLU,
        ADD,
        SOFTCAP,
        ARGMAX,
        SAMPLE,
        ADVANCE,
        RMS_NORM_GEMM,
        GEMM_ADD,
        RMS_NORM_GEMM_GLU,
        ROPE_KV_APPEND,
    )
}


def required_ops() -> tuple[Op, ...]:
    """Ops without which a backend is none."""
    return tuple(op for op in OPS.values() if op.required)


def primitive_ops() -> tuple[Op, ...]:
    """Optional ops that are not made of others."""
    return tuple(op for op in OPS.values() if not op.required and op.decompose is None)


def fused_ops() -> tuple[Op, ...]:
    """Optional ops that `decompose` into primitives."""
    return tuple(op for op in OPS.values() if op.decompose is not None)


def case_signature(op: Op, case: Case, inputs: Inputs | None = None) -> Signature:
    """The signature of a case, checked against the op's declaration."""
    inputs = op.make_inputs(case) if inputs is None else inputs
    return op.signature({name: type_of(value) for name, value in inputs.items() if value is not None}, case.attrs)


def small_cases(op: Op, least: int = 8) -> tuple[Case, ...]:
    """A few cheap cases that together show everything: for interpreters of kernels, such as Oclgrind.

    Each has fewer than 100,000 multiply-adds. The case that shows most new values of attributes, fills, formats and
    flags comes first, the cheapest of several; once everything was shown it begins anew, until there are `least`.
    """
    sizes = {case.name: op.cost(case_signature(op, case)).flops // 2 for case in op.cases}
    left = {case.name: _features(op, case) for case in op.cases if sizes[case.name] < 100_000}
    chosen: list[str] = []
    unseen = set[Any]().union(*left.values())
    while left and (unseen or len(chosen) < least):
        unseen = unseen or set[Any]().union(*left.values())
        best = max(left, key=lambda name: (len(left[name] & unseen), -sizes[name]))
        chosen.append(best)
        unseen -= left.pop(best)
    return tuple(case for case in op.cases if case.name in chosen)


def _features(op: Op, case: Case) -> set[Any]:
    """What a case shows: its fill, attribute values, formats, flags, and whether it has one row or several."""
    dims = case.dims
    shown: set[Any] = {("fill", case.fill), *case.attrs.items()}
    shown |= {(name, value) for name, value in dims.items() if isinstance(value, (str, bool)) or name in ("D", "S")}
    if "G" in dims and "H" in dims:
        shown.add(("heads per kv head", dims["H"] // dims["G"]))
    if op.name == "gemm":
        shown.add((dims["format"], case.attrs["precision"]))
    if "R" in dims and "D" in dims:
        shown.add(("partial", dims["R"] < dims["D"]))
    rows = sum(queries for _, queries in dims["seqs"]) if "seqs" in dims else dims.get("T", dims.get("N"))
    return shown | {("one row", rows == 1), ("padding", dims.get("pad", 0) > 0)}
