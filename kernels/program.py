"""What a model hands to a backend: named buffers and calls of ops on them, all shapes static.

Everything that changes from token to token (token ids, positions, block table, RNG state) lives in buffers, so a
captured program is replayed without new arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ContractError
from .op import Attrs, Op, Signature, TensorType

# weight: packed once at load. state: kept between runs, written by the host or by ops. scratch: holds nothing between
# runs, so backends may let scratch buffers share memory.
BufferKind = Literal["weight", "state", "scratch"]


@dataclass(frozen=True)
class BufferSpec:
    """A named buffer: dense, row-major, `dtype` as in TensorType."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: BufferKind


@dataclass(frozen=True)
class View:
    """A tensor inside a buffer: from element `offset` on, rows `row_stride` elements apart (None: dense)."""

    buffer: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    row_stride: int | None = None

    @property
    def type(self) -> TensorType:
        return TensorType(self.shape, self.dtype)

    def reshape(self, *shape: int) -> View:
        """The same rows, their inner axes regrouped."""
        return View(self.buffer, shape, self.dtype, self.offset, self.row_stride)


@dataclass(frozen=True)
class Call:
    """One op on views of buffers. `label` says where in the model it stands ("blk.3.attn_qkv")."""

    op: str
    args: Mapping[str, View]
    attrs: Attrs = field(default_factory=dict[str, Any])
    label: str = ""


@dataclass
class Program:
    """Buffers and the calls on them, in order. Built once per bucket (decode: 1 token, prefill: a chunk)."""

    name: str
    buffers: dict[str, BufferSpec] = field(default_factory=dict[str, BufferSpec])
    calls: list[Call] = field(default_factory=list[Call])

    def buffer(self, name: str, shape: tuple[int, ...], dtype: str, kind: BufferKind = "scratch") -> View:
        """Declare a buffer (or find it declared alike) and return a view of all of it."""
        spec = BufferSpec(name, shape, dtype, kind)
        if self.buffers.setdefault(name, spec) != spec:
            raise ContractError(f"{self.name}: buffer {name} is declared as {self.buffers[name]} and as {spec}")
        return View(name, shape, dtype)

    def call(self, op: str, args: Mapping[str, View], attrs: Attrs | None = None, label: str = "") -> None:
        self.calls.append(Call(op, dict(args), dict(attrs or {}), label))


def decompose(op: Op, call: Call, signature: Signature) -> tuple[list[Call], list[BufferSpec]]:
    """The primitive calls that do what the fused `call` does, and the scratch buffers they need.

    An op's `decompose` names its own parameters as strings and new temporaries as (name, TensorType) pairs.
    """
    calls: list[Call] = []
    buffers: dict[str, BufferSpec] = {}

    def view(value: Any) -> View:
        if isinstance(value, str):
            return call.args[value]
        name, kind = value
        # One temporary per op, role and shape serves every call: they run in order and nothing outlives its call. The
        # op's name keeps the temporaries of a decomposition inside a decomposition apart.
        full = f"tmp.{op.name}.{name}.{kind}"
        buffers[full] = BufferSpec(full, kind.shape, kind.dtype, "scratch")
        return View(full, kind.shape, kind.dtype)

    def emit(name: str, args: Mapping[str, Any], attrs: Attrs) -> None:
        bound = {p: view(v) for p, v in args.items() if not isinstance(v, str) or v in call.args}
        calls.append(Call(name, bound, dict(attrs), call.label))

    assert op.decompose is not None, f"{op.name} is not fused"
    op.decompose(signature, emit)
    return calls, list(buffers.values())
