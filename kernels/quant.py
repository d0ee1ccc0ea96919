"""Weight formats: how a row of K numbers is stored in blocks, as data.

A `QuantFormat` says how long a block is, how many bytes it takes and which field lies where; `Weight` is a host matrix
in one of them. Dequantisation, the definition every kernel is judged against, is the `gguf` package's own
(`gguf.quants`), not a transcription of ours; block sizes are asserted against its table. Field layouts:
ggml-common.h of ggml-org/ggml at d99724f.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ContractError

Array = NDArray[Any]

# What a field holds: "scale" and "min" multiply quants or are added to them, "subscale" packs several 6-bit (or int8)
# factors, "quants" holds the low bits of the quantised numbers and "high" their remaining bits.
FieldKind = Literal["scale", "min", "subscale", "quants", "high"]


@dataclass(frozen=True)
class Field:
    """One field of a block: `count` numbers of `dtype` from byte `offset` on."""

    name: str
    offset: int
    dtype: str
    count: int
    kind: FieldKind

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * self.count


@dataclass(frozen=True)
class QuantFormat:
    """A weight format.

    `gguf_type` is the type id in a GGUF tensor record, `block_length` the numbers per block (along K), `block_bytes`
    its size, `group_length` the numbers that share one scale, `bits` the width of a quantised number (0: a float).
    """

    name: str
    gguf_type: int
    block_length: int
    block_bytes: int
    group_length: int
    bits: int
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        end = 0
        for field in self.fields:
            assert field.offset == end, f"{self.name}: field {field.name} at {field.offset}, expected {end}"
            end += field.nbytes
        assert end == self.block_bytes, f"{self.name}: fields take {end} bytes, block_bytes is {self.block_bytes}"

    @property
    def is_float(self) -> bool:
        return self.bits == 0

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes / self.block_length

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row of `in_features` numbers; a ContractError unless they fill whole blocks."""
        if in_features <= 0 or in_features % self.block_length:
            raise ContractError(
                f"{self.name}: a row of {in_features} numbers does not fill whole blocks of {self.block_length}"
            )
        return in_features // self.block_length * self.block_bytes


def _format(
    name: str, gguf_type: int, block: int, nbytes: int, group: int, bits: int, *fields: tuple[str, str, int, FieldKind]
) -> QuantFormat:
    offset, built = 0, []
    for field_name, dtype, count, kind in fields:
        built.append(Field(field_name, offset, dtype, count, kind))
        offset += built[-1].nbytes
    return QuantFormat(name, gguf_type, block, nbytes, group, bits, tuple(built))


FORMATS: Mapping[str, QuantFormat] = {
    f.name: f
    for f in (
        _format("F32", 0, 1, 4, 1, 0, ("x", "<f4", 1, "quants")),
        _format("F16", 1, 1, 2, 1, 0, ("x", "<f2", 1, "quants")),
        _format("BF16", 30, 1, 2, 1, 0, ("x", "<u2", 1, "quants")),
        _format("Q4_0", 2, 32, 18, 32, 4, ("d", "<f2", 1, "scale"), ("qs", "u1", 16, "quants")),
        _format(
            "Q4_1", 3, 32, 20, 32, 4, ("d", "<f2", 1, "scale"), ("m", "<f2", 1, "min"), ("qs", "u1", 16, "quants")
        ),
        _format(
            "Q5_0", 6, 32, 22, 32, 5, ("d", "<f2", 1, "scale"), ("qh", "u1", 4, "high"), ("qs", "u1", 16, "quants")
        ),
        _format(
            "Q5_1", 7, 32, 24, 32, 5,
            ("d", "<f2", 1, "scale"), ("m", "<f2", 1, "min"), ("qh", "u1", 4, "high"), ("qs", "u1", 16, "quants"),
        ),
        _format("Q8_0", 8, 32, 34, 32, 8, ("d", "<f2", 1, "scale"), ("qs", "i1", 32, "quants")),
        _format(
            "Q4_K", 12, 256, 144, 32, 4,
            ("d", "<f2", 1, "scale"), ("dmin", "<f2", 1, "min"), ("scales", "u1", 12, "subscale"),
            ("qs", "u1", 128, "quants"),
        ),
        _format(
            "Q5_K", 13, 256, 176, 32, 5,
            ("d", "<f2", 1, "scale"), ("dmin", "<f2", 1, "min"), ("scales", "u1", 12, "subscale"),
            ("qh", "u1", 32, "high"), ("qs", "u1", 128, "quants"),
        ),
        _format(
            "Q6_K", 14, 256, 210, 16, 6,
            ("ql", "u1", 128, "quants"), ("qh", "u1", 64, "high"), ("scales", "i1", 16, "subscale"),
            ("d", "<f2", 1, "scale"),
        ),
    )
}  # fmt: skip
BY_GGUF_TYPE: Mapping[int, QuantFormat] = {f.gguf_type: f for f in FORMATS.values()}


@cache
def _gguf_quants() -> Any:
    """`gguf.quants`, once, with its block table checked against ours."""
    import gguf

    for fmt in FORMATS.values():
        theirs = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(fmt.gguf_type)]
        assert theirs == (fmt.block_length, fmt.block_bytes), f"{fmt.name}: gguf says {theirs}"
    return gguf.quants, gguf.GGMLQuantizationType


def dequantize_rows(fmt: QuantFormat, rows: Array) -> Array:
    """float32 [n, K] of `rows`, uint8 [n, row_bytes] in `fmt`: the definition (gguf.quants.dequantize)."""
    if fmt.name == "F32":
        return np.ascontiguousarray(rows).view(np.float32)
    if fmt.name == "F16":
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    quants, types = _gguf_quants()
    return quants.dequantize(np.ascontiguousarray(rows), types(fmt.gguf_type))


@dataclass(frozen=True)
class Weight:
    """A host matrix [out_features, in_features] in a QuantFormat, rows in whole blocks along in_features.

    `data` is uint8 [out_features, row_bytes], possibly a read-only view of a memory-mapped file.
    """

    format: QuantFormat
    shape: tuple[int, int]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        expected = (self.shape[0], self.format.row_bytes(self.shape[1]))
        if self.data.shape != expected or self.data.dtype != np.uint8:
            raise ContractError(
                f"{self.format.name} {list(self.shape)}: bytes are {self.data.dtype} {list(self.data.shape)},"
                f" expected uint8 {list(expected)}"
            )

    @classmethod
    def from_array(cls, array: Array, name: str = "F32") -> Weight:
        """A float matrix as a Weight in F32, F16 or BF16 (rounded to nearest even)."""
        import ml_dtypes

        dtype: Any = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[name]
        dense = np.ascontiguousarray(array, dtype=dtype)
        return cls(FORMATS[name], (dense.shape[0], dense.shape[1]), dense.view(np.uint8))

    @property
    def nbytes(self) -> int:
        return self.data.size

    def dense(self, dtype: Any = np.float32) -> Array:
        """The matrix as floats [out_features, in_features], dequantised by definition."""
        step = max(1, (1 << 24) // self.shape[1])  # dequantise 64 MiB at a time: gguf's code needs several copies
        parts = [dequantize_rows(self.format, self.data[i : i + step]) for i in range(0, self.shape[0], step)]
        dense = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return dense.astype(dtype, copy=False)

    def zero_point(self) -> Array:
        """What each number would be with all its quant bits zero, float32 [out_features, in_features].

        A kernel that evaluates d*q and the constant part separately rounds each of them, so an error bound needs
        |w - zero_point| + |zero_point|, not |w| (Q4_0: 8*d, Q4_1: m, Q6_K: 32*d*scale).
        """
        if self.format.is_float:
            return np.zeros(self.shape, np.float32)
        blocks = self.data.reshape(-1, self.format.block_bytes).copy()
        for field in self.format.fields:
            if field.kind in ("quants", "high"):
                blocks[:, field.offset : field.offset + field.nbytes] = 0
        return dequantize_rows(self.format, blocks.reshape(self.data.shape))

    def magnitude(self) -> Array:
        """|w - zero_point| + |zero_point|, float64: the size of the terms a kernel adds up."""
        zero = self.zero_point().astype(np.float64)
        return np.abs(self.dense(np.float64) - zero) + np.abs(zero)

    def rows(self, start: int, stop: int) -> Weight:
        return Weight(self.format, (stop - start, self.shape[1]), self.data[start:stop])


def concat_rows(weights: list[Weight]) -> Weight:
    """Weights of one format and in_features stacked along out_features (fused QKV)."""
    first = weights[0]
    for other in weights[1:]:
        if other.format is not first.format or other.shape[1] != first.shape[1]:
            raise ContractError(
                f"cannot stack {other.format.name} {list(other.shape)} under {first.format.name} {list(first.shape)}"
            )
    return Weight(
        first.format, (sum(w.shape[0] for w in weights), first.shape[1]), np.concatenate([w.data for w in weights])
    )
