"""An op as one declared object: parameters, reference, cost, cases, error bound, mutants.

Everything that tests, benchmarks, plans and backends know about an op comes from its `Op`. A new op is one file with
one `Op` in it; nothing else needs to be told.

Letters used throughout `kernels/`: T tokens (rows) in the call, K in_features, N out_features, H query heads,
G kv heads, D head_dim, B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from .errors import ContractError
from .quant import FORMATS, Array, Weight

Attrs = Mapping[str, Any]
Inputs = Mapping[str, Any]  # parameter name -> ndarray, or Weight for a "weight" parameter
Outputs = dict[str, Array]

# float32: unit roundoff of one rounding to nearest (IEEE 754)
U32 = 2.0**-24

# in: read. out: written whole. inout: read and written. clobber: read, and undefined afterwards. weight: a matrix in
# a QuantFormat that the backend has packed.
Role = Literal["in", "out", "inout", "clobber", "weight"]

# What the numbers of a tensor are, so that data can be made from its declaration alone (testdata.inputs_for). angles:
# cosines, then sines. token_ids, rows: indices along `vocab`, `tokens`. pages: of the cache, each in one place.
# seq_ids, positions: of the rows of a batch. sampling: temperature, top_k, top_p, min_p. seeds: any bits.
Values = Literal["numbers", "angles", "token_ids", "rows", "pages", "seq_ids", "positions", "sampling", "seeds"]


@dataclass(frozen=True)
class Param:
    """One tensor of an op: axes by name, the dtypes it may have (`weight`: any name in FORMATS), what its numbers are.

    An axis whose name is a number has that length. All axes but the first are dense; the first may have a row stride,
    so that a call can work on a part of a wider buffer (the K columns of a fused QKV projection). A tensor that is
    written shares no element with another tensor of its call.
    """

    name: str
    axes: tuple[str, ...]
    role: Role = "in"
    dtypes: tuple[str, ...] = ("f32",)
    optional: bool = False
    values: Values = "numbers"

    @property
    def is_written(self) -> bool:
        return self.role in ("out", "inout")


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a tensor: "f32", "f16", "i32", "u32", or for weights the name of a QuantFormat."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "u32": np.uint32}


def type_of(value: Array | Weight) -> TensorType:
    """The TensorType of a host value."""
    if isinstance(value, Weight):
        return TensorType(value.shape, value.format.name)
    for name, dtype in NUMPY_DTYPES.items():
        if value.dtype == dtype:
            return TensorType(tuple(value.shape), name)
    raise ContractError(f"no tensor dtype for numpy {value.dtype}; use one of {', '.join(NUMPY_DTYPES)}")


@dataclass(frozen=True)
class Signature:
    """What a backend is asked about: an op with the types of its tensors and its attributes, no data."""

    op: str
    tensors: Mapping[str, TensorType]
    attrs: Attrs = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        tensors = ", ".join(f"{name} {kind}" for name, kind in self.tensors.items())
        attrs = "".join(f" {key}={value}" for key, value in self.attrs.items())
        return f"{self.op}({tensors}){attrs}"


@dataclass(frozen=True)
class Numerics:
    """What a kernel states about its arithmetic; the error bound is computed from it.

    accumulate   dtype of every sum ("f32", "f64")
    depth        longest chain of additions behind one output: K for a serial loop, ceil(K / lanes) + log2(lanes) for a
                 blocked or tree reduction. Declaring K where the chain is shorter makes the bound blunt.
    activations  "f32": used as they are. "int8": rounded once per row and block of 32 to round(x / s),
                 s = max|x| / activation_levels. "bf16": they and the weights rounded to bfloat16
    activation_levels  at least 127; more where a kernel's arithmetic leaves room for finer steps
    function_ulp largest error of exp, tanh, sin and rsqrt as used by the kernel, in ulp
                 (OpenCL 3.0 full profile: exp 3, tanh 5, rsqrt 2; C and numpy: <= 1)
    """

    accumulate: str = "f32"
    depth: int = 1
    activations: Literal["f32", "int8", "bf16"] = "f32"
    function_ulp: float = 4.0
    activation_levels: int = 127

    @property
    def unit(self) -> float:
        return 2.0**-53 if self.accumulate == "f64" else U32

    def gamma(self, extra: float = 0.0) -> float:
        """Relative error bound of a sum of products: depth + extra roundings (Higham, Accuracy and Stability, 3.1)."""
        k = (self.depth + extra) * self.unit
        if k >= 1.0:
            raise ContractError(f"depth {self.depth} in {self.accumulate}: the error bound is void; accumulate wider")
        return k / (1.0 - k)


@dataclass(frozen=True)
class Cost:
    """What a call must at least do: bytes it has to move (weights and caches once) and floating-point operations."""

    nbytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One point of an op's test grid.

    `dims` are free numbers the op's `make_inputs` understands, `fill` names how the data is drawn ("normal", "integer":
    small integers on which every correct kernel is bit-equal, or an op's own kinds), `seed` makes it reproducible.
    """

    name: str
    dims: Mapping[str, Any]
    attrs: Attrs = field(default_factory=dict[str, Any])
    fill: str = "normal"
    seed: int = 1

    @property
    def is_exact(self) -> bool:
        """Whether results must be bit-equal: every partial sum of integers is exact, in whatever order."""
        return self.fill == "integer"


@dataclass(frozen=True)
class Mutant:
    """A deliberately wrong kernel. A case list is good only if some case tells it from the reference."""

    name: str
    run: Callable[[Inputs, Attrs], Outputs]


Reference = Callable[[Inputs, Attrs], Outputs]
ErrorBound = Callable[[Inputs, Attrs, Outputs, Numerics], Outputs]
Check = Callable[[Inputs, Attrs, Outputs, Outputs, Numerics], str | None]
Validate = Callable[[Signature], str | None]
Decompose = Callable[[Signature, "Emit"], None]
# Emit(op, {param: tensor name or TensorType for a new temporary}, attrs); see program.decompose
Emit = Callable[[str, Mapping[str, Any], Attrs], None]


@dataclass(frozen=True)
class Op:
    """A declared operation.

    reference    float arithmetic in the dtype of its inputs: with float64 inputs it is the definition, with float32
                 inputs it is what the `reference` backend runs. Returns every "out" and "inout" parameter.
    cost         lower bound on bytes and flops of a call
    data_cost    the same where it depends on the data (how many keys attention sees); see `cost_of`
    splits       axes along which results do not depend on each other: of the entries of such an axis, taken from every
                 tensor that has it, the op computes those entries of its results (see testdata.part)
    make_inputs  host data for a case
    error_bound  largest permitted |result - reference| for every element, from inputs, reference result and numerics;
                 (cases of fill "integer" are held to 0 whatever it says)
    check        replaces the element-wise comparison where "close" means something else (sample); returns what is
                 wrong, or None
    decompose    for a fused op: the primitives that together do the same
    required     a backend without this op is no backend for decode
    attrs        name -> default. A value must be what the default is: a finite number, an integer, or a text out of
                 `choices`
    choices      name -> the texts an attribute may have
    validate     what else a call must fulfil: returns what is wrong ("7 query heads are no multiple of ..."), or None
    """

    name: str
    doc: str
    params: tuple[Param, ...]
    reference: Reference
    cost: Callable[[Signature], Cost]
    make_inputs: Callable[[Case], dict[str, Any]]
    error_bound: ErrorBound
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...]
    attrs: Attrs = field(default_factory=dict[str, Any])
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    validate: Validate | None = None
    check: Check | None = None
    decompose: Decompose | None = None
    required: bool = False
    splits: tuple[str, ...] = ()
    data_cost: Callable[[Signature, Inputs], Cost] | None = None

    def param(self, name: str) -> Param:
        for param in self.params:
            if param.name == name:
                return param
        raise ContractError(f"{self.name} has no parameter {name!r}; it has {', '.join(p.name for p in self.params)}")

    def cost_of(self, signature: Signature, inputs: Inputs) -> Cost:
        """What a call with these inputs must do."""
        return self.data_cost(signature, inputs) if self.data_cost else self.cost(signature)

    def with_defaults(self, attrs: Attrs) -> dict[str, Any]:
        """All attributes; a ContractError for one the op does not have, or a value it cannot have."""
        unknown = sorted(set(attrs) - set(self.attrs))
        if unknown:
            known = ", ".join(self.attrs) or "none"
            raise ContractError(f"{self.name} has no attribute {unknown[0]!r}; it has {known}")
        for name, value in attrs.items():
            expected = self._expected(name, value)
            if expected:
                raise ContractError(f"{self.name}: {name} is {value!r}, expected {expected}")
        return {**self.attrs, **attrs}

    def _expected(self, name: str, value: Any) -> str:
        """What the attribute `name` should be instead of `value`; empty if it may be that."""
        if name in self.choices:
            return "" if value in self.choices[name] else " or ".join(self.choices[name])
        if isinstance(self.attrs[name], int):
            return "" if isinstance(value, Integral) else "an integer"
        return "" if isinstance(value, Real) and math.isfinite(value) else "a finite number"

    def bind(self, tensors: Mapping[str, TensorType]) -> dict[str, int]:
        """Axis name -> length, from the given tensors; a ContractError where one breaks its declaration or another's.

        No axis is empty, and the rows of a weight are whole blocks.
        """
        dims: dict[str, tuple[int, str]] = {}
        for name, kind in tensors.items():
            param = self.param(name)
            allowed = tuple(FORMATS) if param.role == "weight" else param.dtypes
            if kind.dtype not in allowed:
                raise ContractError(f"{self.name}: {name} is {kind.dtype}, expected {' or '.join(allowed)}")
            fixed = [(axis, length) for axis, length in zip(param.axes, kind.shape, strict=False) if axis.isdigit()]
            if len(kind.shape) != len(param.axes) or any(int(axis) != length for axis, length in fixed):
                raise ContractError(f"{self.name}: {name} is {list(kind.shape)}, expected [{', '.join(param.axes)}]")
            for axis, length in zip(param.axes, kind.shape, strict=True):
                if length < 1:
                    raise ContractError(f"{self.name}: {axis} is {length} in {name}, expected at least 1")
                if dims.setdefault(axis, (length, name))[0] != length:
                    other, owner = dims[axis]
                    raise ContractError(f"{self.name}: {axis} is {other} in {owner} but {length} in {name}")
            if param.role == "weight":
                _check_blocks(self.name, name, kind)
        return {axis: length for axis, (length, _) in dims.items()}

    def signature(self, tensors: Mapping[str, TensorType], attrs: Attrs) -> Signature:
        """Check tensors and attributes against the declaration; fill in defaults and the types of missing outputs.

        A ContractError says what does not fit; what passes here needs no further checks of types in a backend.
        """
        dims = self.bind(tensors)
        full = dict(tensors)
        for param in self.params:
            if param.name in full or param.optional:
                continue
            if param.role != "out":
                raise ContractError(f"{self.name}: {param.name} [{', '.join(param.axes)}] is missing")
            full[param.name] = TensorType(tuple(dims[axis] for axis in param.axes), param.dtypes[0])
        signature = Signature(self.name, full, self.with_defaults(attrs))
        problem = self.validate(signature) if self.validate else None
        if problem:
            raise ContractError(f"{self.name}: {problem}")
        return signature


def _check_blocks(op: str, name: str, kind: TensorType) -> None:
    try:
        FORMATS[kind.dtype].row_bytes(kind.shape[1])
    except ContractError as error:
        raise ContractError(f"{op}: {name}: {error}") from error


def fp64(inputs: Inputs) -> dict[str, Any]:
    """The same inputs with every float array widened to float64; integers and weights stay."""
    return {
        name: value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for name, value in inputs.items()
    }


def dense(weight: Any, like: Array) -> Array:
    """A weight as floats in the precision of `like` [N, K]."""
    return weight.dense(like.dtype)


def signature_bytes(signature: Signature, names: Iterable[str]) -> int:
    """Bytes of the named tensors, weights in their file format."""
    total = 0
    for name in names:
        kind = signature.tensors.get(name)
        if kind is None:
            continue
        if kind.dtype in FORMATS:
            total += kind.shape[0] * FORMATS[kind.dtype].row_bytes(kind.shape[1])
        else:
            total += int(np.prod(kind.shape)) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize
    return total


def rng_for(case: Case) -> np.random.Generator:
    """A generator seeded by the case's name and seed: the same data on every machine."""
    return np.random.default_rng([case.seed, *case.name.encode()])
