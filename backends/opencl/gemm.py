"""gemm and the ops fused with it: norm before it, residual or GLU after it.

Up to GEMV_ROWS rows of x go through `gemv` (weights read once per row), more through `prepare` and `gemm` (weights
unpacked once per DEPTH of K and used for all rows). In `fast` both multiply 16-bit integers, pair by pair (pairs.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.glu import KINDS
from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall, DeviceTensor
from ..products import halves_of, weight_of
from .formats import ACTIVATION_LEVELS, TILE_ROWS, tiles_of, weight_program
from .launch import ERF_ULP, FUNCTION_ULP, Enqueue, OpKernel, ProgramSpec, place, start

if TYPE_CHECKING:
    from . import OpenCLBackend

GEMV_ROWS = 4
# Work-groups per compute unit: enough that a core that is late (another process, a slow page) is evened out.
GROUPS_PER_UNIT = 2
ADD, BIASED = 1, 2  # flags of the kernels: add to y instead of writing it; there is a bias
ROWS = 6  # rows of x that `gemm` multiplies at a time, or half of them
CHAIN = 64  # columns that `gemm` adds up before it adds their sum to the others, with float activations
GLU_KINDS = {kind: number for number, kind in enumerate(KINDS)}
_KIND_NUMBERS = tuple(f"{kind.upper()}={number}" for kind, number in GLU_KINDS.items())
POINTWISE = ProgramSpec(("activation.h", "pointwise.cl"), constants=_KIND_NUMBERS)
RMS_NORM = ProgramSpec(("lanes.h", "rms_norm.cl"))


def _is_int8(signature: Signature) -> bool:
    return signature.attrs["precision"] == "fast" and not weight_of(signature)[0].is_float


def gemm_program(signature: Signature) -> ProgramSpec:
    fmt = weight_of(signature)[0]
    fast = ("FAST",) if _is_int8(signature) else ()
    program = weight_program(fmt, "gemm.cl", "lanes.h", "pairs.h", "activation.h", defines=fast)
    numbers = (f"ADD={ADD}", f"BIASED={BIASED}", f"CHAIN={CHAIN}", *_KIND_NUMBERS)
    return replace(program, constants=(*program.constants, *numbers))


def programs(signature: Signature) -> list[ProgramSpec]:
    halves = halves_of(signature)
    if halves:
        return [*(spec for half in halves for spec in programs(half)), POINTWISE]
    return [gemm_program(signature)]


def numerics(signature: Signature) -> Numerics:
    ulp = ERF_ULP if signature.attrs.get("kind") == "gelu_erf" else FUNCTION_ULP
    halves = [numerics(half) for half in halves_of(signature)]
    if halves:
        activations = "int8" if any(half.activations == "int8" for half in halves) else "f32"
        return Numerics("f32", max(half.depth for half in halves), activations, ulp, ACTIVATION_LEVELS)
    fmt, _, k = weight_of(signature)
    norm = k // 16 + 20 if "weight" in signature.tensors else 0
    if _is_int8(signature):  # sums of a group are exact integers; two additions per group and the sum of a block
        return Numerics("f32", max(norm, 2 * k // fmt.group_length + 8), "int8", ulp, ACTIVATION_LEVELS)
    if signature.tensors["x"].shape[0] <= GEMV_ROWS:
        chain = k // 2 + 2 if fmt.is_float else fmt.group_length + 2 * k // fmt.group_length + 8
        return Numerics("f32", max(norm, chain), "f32", ulp)
    return Numerics("f32", max(norm, min(k, CHAIN) + -(-k // CHAIN)), "f32", ulp)


def bind(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    signature = call.signature
    halves = halves_of(signature)
    if halves:
        return _bind_halves(backend, call, halves)
    is_few = call.tensors["x"].shape[0] <= GEMV_ROWS
    return _bind_gemv(backend, call, signature) if is_few else _bind_gemm(backend, call, signature)


def _input(backend: OpenCLBackend, call: BoundCall, copies: int) -> tuple[Any, ...]:
    """x, the norm's weight (any buffer where there is no norm), and room for `copies` of x as the kernels want it."""
    fmt, _, k = weight_of(call.signature)
    groups = 0 if fmt.is_float else k // fmt.group_length
    weight = call.tensors.get("weight", call.tensors["x"])
    eps, offset = call.attrs.get("eps", 0.0), call.attrs.get("weight_offset", 0.0)
    numbers = (np.float32(eps), np.float32(offset), np.int32("weight" in call.tensors))
    return (*place(call.tensors["x"]), *start(weight), *numbers, backend.scratch("room", copies * (k + 4 * groups) * 4))


def _epilogue(call: BoundCall) -> tuple[tuple[Any, ...], np.int32]:
    """Buffer and offset of the bias (any buffer where there is none), and the flags."""
    bias = call.tensors.get("bias")
    flags = (ADD if call.op == "gemm_add" else 0) | (BIASED if bias else 0)
    return start(bias or call.tensors["y"]), np.int32(flags)


def _bind_gemv(backend: OpenCLBackend, call: BoundCall, signature: Signature) -> list[Enqueue]:
    _, n, k = weight_of(signature)
    y, rows, tiles = call.tensors["y"], call.tensors["x"].shape[0], tiles_of(n)
    chunk = -(-tiles // (GROUPS_PER_UNIT * backend.opened.threads))
    size = (-(-tiles // chunk), rows)
    source = _input(backend, call, size[0] * rows)
    dims = (np.int32(n), np.int32(k), np.int32(chunk))
    program = gemm_program(signature)
    if "w_gate" in call.tensors:
        gate, up = call.tensors["w_gate"].buffer, call.tensors["w_up"].buffer
        args = (gate, up, *source, *place(y), *dims, np.int32(GLU_KINDS[call.attrs["kind"]]))
        return [backend.enqueue(program, "gemv_glu", size, (1, 1), *args)]
    bias, flags = _epilogue(call)
    args = (call.tensors["w"].buffer, *source, *bias, *place(y), *dims, flags)
    return [backend.enqueue(program, "gemv", size, (1, 1), *args)]


def _bind_halves(backend: OpenCLBackend, call: BoundCall, halves: list[Signature]) -> list[Enqueue]:
    y, launches, outputs = call.tensors["y"], list[Enqueue](), list[DeviceTensor]()
    for half, name in zip(halves, ("w_gate", "w_up"), strict=True):
        rows, n = y.shape
        out = DeviceTensor(backend.scratch(name, rows * n * 4), y.shape, y.dtype, 0, n)
        tensors = {"x": call.tensors["x"], "weight": call.tensors["weight"], "w": call.tensors[name], "y": out}
        launches.extend(bind(backend, BoundCall(half.op, tensors, half.attrs, call.label)))
        outputs.append(out)
    kind = np.int32(GLU_KINDS[call.attrs["kind"]])
    args = (*place(outputs[0]), *place(outputs[1]), *place(y), kind)
    return [*launches, backend.enqueue(POINTWISE, "glu", y.shape[::-1], None, *args)]


def _bind_gemm(backend: OpenCLBackend, call: BoundCall, signature: Signature) -> list[Enqueue]:
    _, n, k = weight_of(signature)
    y, rows, tiles, program = call.tensors["y"], call.tensors["x"].shape[0], tiles_of(n), gemm_program(signature)
    source = _input(backend, call, rows)
    prepare = backend.enqueue(program, "prepare", (rows,), (1,), *source, np.int32(rows), np.int32(k))
    # Tiles that do not go round share their rows among several work-groups, each of which unpacks the tile again.
    chunks = min(-(-rows // ROWS), max(1, GROUPS_PER_UNIT * backend.opened.threads // tiles))
    chunk = -(-rows // (chunks * ROWS)) * ROWS
    size = (tiles, -(-rows // chunk))
    has_glu = "w_gate" in call.tensors
    sums = backend.scratch("sums", tiles * TILE_ROWS * (rows + ROWS) * 4 * (2 if has_glu else 1))
    bias, flags = _epilogue(call)
    args = (source[-1], *bias, *place(y), sums, *map(np.int32, (rows, n, k, chunk)))
    if has_glu:
        gate, up = call.tensors["w_gate"].buffer, call.tensors["w_up"].buffer
        kind = np.int32(GLU_KINDS[call.attrs["kind"]])
        return [prepare, backend.enqueue(program, "gemm_glu", size, (1, 1), gate, up, *args, kind)]
    return [prepare, backend.enqueue(program, "gemm", size, (1, 1), call.tensors["w"].buffer, *args, flags)]


def _rms_norm_programs(signature: Signature) -> Sequence[ProgramSpec]:
    return [RMS_NORM]


def _bind_rms_norm(backend: OpenCLBackend, call: BoundCall) -> list[Enqueue]:
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    numbers = (np.float32(call.attrs["eps"]), np.float32(call.attrs["weight_offset"]))
    args = (*place(x), *start(weight), *place(y), np.int32(x.shape[1]), *numbers)
    return [backend.enqueue(RMS_NORM, "rms_norm", (x.shape[0],), (1,), *args)]


KERNELS = [
    *(OpKernel(op, programs, numerics, bind) for op in ("gemm", "rms_norm_gemm", "gemm_add")),
    OpKernel("rms_norm_gemm_glu", programs, numerics, bind),
    OpKernel(
        "rms_norm",
        _rms_norm_programs,
        lambda signature: Numerics("f32", signature.tensors["x"].shape[1] // 16 + 20, "f32", FUNCTION_ULP),
        _bind_rms_norm,
    ),
]
