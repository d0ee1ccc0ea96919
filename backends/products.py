"""Products with weights, as every backend takes them apart: gemm and the ops fused with it."""

from __future__ import annotations

from ..kernels.op import Signature
from ..kernels.quant import FORMATS, QuantFormat


def weight_of(signature: Signature) -> tuple[QuantFormat, int, int]:
    """Format, out_features and in_features of the weight (of the gate, where there are two)."""
    kind = signature.tensors["w" if "w" in signature.tensors else "w_gate"]
    return FORMATS[kind.dtype], kind.shape[0], kind.shape[1]


def halves_of(signature: Signature) -> list[Signature]:
    """Gate and up as two `rms_norm_gemm` where their formats differ, for kernels that read one format; else none."""
    tensors, attrs = signature.tensors, signature.attrs
    if "w_up" not in tensors or tensors["w_up"].dtype == tensors["w_gate"].dtype:
        return []
    shared = {name: tensors[name] for name in ("x", "weight", "y")}
    kept = {name: attrs[name] for name in ("eps", "weight_offset", "precision")}
    return [Signature("rms_norm_gemm", {**shared, "w": tensors[w]}, kept) for w in ("w_gate", "w_up")]
