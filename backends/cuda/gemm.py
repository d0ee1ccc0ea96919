"""gemm and the ops fused with it: norm before it, residual or GLU after it.

Up to GEMV_ROWS rows of x go through `gemv`, in float32, or in `fast` through the integers of gemv.py, which takes up to
8. More go through `prepare`, which norms and rounds them once, and `gemm`: bfloat16 on tensor cores in `fast`, float32
in `exact`. Where programs are too few for the device, each takes a part of K, and `add_parts` ends the product; so it
does where gate and up, of different formats, are two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...kernels.op import Numerics, Signature
from ...kernels.quant import FORMATS
from ...kernels.spi import BoundCall
from ..products import halves_of
from . import formats, gemv
from .launch import (
    FUNCTION_ULP,
    Argument,
    Launch,
    OpKernel,
    Planner,
    Pointer,
    Target,
    cdiv,
    launch,
    place,
    pointer,
    power_of_two,
    room,
    weight_arguments,
)

GEMV_ROWS = {"cuda": 4, "interpret": 4, "hip": 1}
WARPS_PER_UNIT = 16  # that a multiprocessor should have at least, to have loads enough under way
# Tiles of rows of w that a program of `gemv` takes, by rows of x times weights: as many as leave registers. AMD's
# compiler has all x of a step in registers at once, and spills sooner.
REPEAT = {"cuda": {1: 4, 2: 2, 4: 2}, "hip": {1: 2}}
STEPS = 4  # of K that a program of `gemm` should take at least
LARGE_TILES = ("90", "100")  # whose matrix instructions leave registers for 256 rows of x at a time
BFLOAT_ARCH = 80  # NVIDIA GPUs before it have no bfloat16 in their tensor cores


def _numerics(target: Target, signature: Signature) -> Numerics:
    rows, k = signature.tensors["x"].shape
    is_fast = signature.attrs["precision"] == "fast"
    if rows > GEMV_ROWS[target.kind]:
        if gemv.is_offered(target, signature):
            return gemv.numerics(signature)
        # A matrix instruction adds 8 to 16 products at a time and may cut off where float32 would round.
        return Numerics("f32", k // 4 + 32, "bf16", FUNCTION_ULP) if _is_bfloat(target, signature) else _plain(k + 32)
    formats_read = {kind.dtype for kind in signature.tensors.values() if kind.dtype in FORMATS}
    depth = 32 + max(2 * cdiv(cdiv(k, _unit(dtype)), 8) for dtype in formats_read)
    if is_fast and any(dtype in formats.LAYOUTS for dtype in formats_read):
        integers = gemv.numerics(signature)
        return replace(integers, depth=max(depth, integers.depth))
    return _plain(depth)


def _plain(depth: int) -> Numerics:
    return Numerics("f32", depth, "f32", FUNCTION_ULP)


def _is_bfloat(target: Target, signature: Signature) -> bool:
    return signature.attrs["precision"] == "fast" and (target.kind != "cuda" or int(target.arch) >= BFLOAT_ARCH)


def _bind(planner: Planner, call: BoundCall) -> Sequence[Launch]:
    (rows, k), n = call.tensors["x"].shape, call.tensors["y"].shape[1]
    ways = gemv.candidates(planner, call)
    if rows <= GEMV_ROWS[planner.target.kind]:
        is_choice = not (ways or planner.target.is_interpreted)
        ways += [_gemv(planner, call, is_wide) for is_wide in ((False, True) if is_choice else (False,))]
    ways = ways or _many(planner, call)
    names = [call.tensors[name].dtype for one in _passes(call) for name in one]
    return planner.choose((call.op, *names, power_of_two(rows), n, k, call.attrs["precision"]), ways)


def _many(planner: Planner, call: BoundCall) -> list[list[Launch]]:
    return [_gemm(planner, call, tile) for tile in _tiles(planner.target, call)]


@dataclass(frozen=True)
class _Parts:
    """How a product is taken apart: into weights read together ("w", or gate and up), and `splits` of K. Its sums lie
    in scratch memory, [splits, weights, rows, n], if there are several."""

    planner: Planner
    call: BoundCall
    splits: int

    @property
    def passes(self) -> list[list[str]]:
        return _passes(self.call)

    @property
    def is_split(self) -> bool:
        return self.splits > 1 or len(self.passes) > 1

    @property
    def stride(self) -> int:
        """Elements between the sums of two splits."""
        rows, n = self.call.tensors["y"].shape
        return sum(map(len, self.passes)) * rows * n

    def sums(self, number: int = 0) -> Pointer:
        """Of the pass `number`; any address where nothing is split."""
        if not self.is_split:
            return pointer(self.call.tensors["y"])
        rows, n = self.call.tensors["y"].shape
        found = room(self.planner, "sums", self.splits * self.stride * 4)
        return replace(found, offset=number * rows * n * 4)

    def squares(self) -> Pointer:
        """[splits, rows], of x."""
        if not self.is_split:
            return pointer(self.call.tensors["y"])
        return room(self.planner, "squares", self.splits * self.call.tensors["y"].shape[0] * 4)

    def end(self, has_squares: bool) -> list[Launch]:
        """What ends a product whose sums are split."""
        if not self.is_split:
            return []
        (rows, k), n = self.call.tensors["x"].shape, self.call.tensors["y"].shape[1]
        arguments, constants = _epilogue(self.call)
        block = power_of_two(n) if self.planner.target.is_interpreted else 256
        arguments = {
            "sums": self.sums(), "squares": self.squares(), **arguments, "rows": rows, "n": n, "columns": k,
            "splits": self.splits, "eps": float(self.call.attrs.get("eps", 0.0)),
        }  # fmt: skip
        constants = {"NORM": int(has_squares), **constants, "BLOCK": block}
        return [launch("epilogue", "add_parts", (rows, cdiv(n, block)), arguments, constants)]


def _passes(call: BoundCall) -> list[list[str]]:
    if "w" in call.tensors:
        return [["w"]]
    return [["w_gate"], ["w_up"]] if halves_of(call.signature) else [["w_gate", "w_up"]]


def _epilogue(call: BoundCall) -> tuple[dict[str, Argument], dict[str, Any]]:
    y, bias = call.tensors["y"], call.tensors.get("bias")
    constants = {
        "GLU": call.attrs.get("kind", ""), "BIASED": int(bias is not None), "ADD": int(call.op == "gemm_add"),
    }  # fmt: skip
    return {"bias": pointer(bias or y), **place("y", y)}, constants


def _norm(call: BoundCall) -> dict[str, float]:
    return {"eps": float(call.attrs.get("eps", 0.0)), "offset": float(call.attrs.get("weight_offset", 0.0))}


def _reading(call: BoundCall, names: list[str]) -> tuple[dict[str, Argument], dict[str, Any]]:
    """Arguments and constants of the weights of a pass."""
    first, last = call.tensors[names[0]], call.tensors[names[-1]]
    arguments = {**weight_arguments("w", first), **weight_arguments("u", last)}
    return arguments, formats.constants(FORMATS[first.dtype])


def _gemv(planner: Planner, call: BoundCall, is_wide: bool) -> list[Launch]:
    x, n = call.tensors["x"], call.tensors["y"].shape[1]
    rows, k = x.shape
    passes = _passes(call)
    shapes = [_gemv_shape(planner.target, call.tensors[one[0]].dtype, n, k, rows * len(one), is_wide) for one in passes]
    parts = _Parts(planner, call, max(splits for _, _, splits in shapes))
    ending, how = _epilogue(call)
    launches: list[Launch] = []
    for number, (names, (repeat, warps, _)) in enumerate(zip(passes, shapes, strict=True)):
        weights, constants = _reading(call, names)
        dtype = call.tensors[names[0]].dtype
        unit, (lanes, across) = _unit(dtype), _lanes(planner.target, dtype, n, repeat)
        arguments = {
            **place("x", x), "norm": pointer(call.tensors.get("weight", x)), **weights, **ending,
            "sums": parts.sums(number), "sums_stride": n, "parts_stride": parts.stride, "squares": parts.squares(),
            "rows": rows, "n": n, "columns": k, "steps": cdiv(cdiv(k, unit * across * warps), parts.splits),
            **_norm(call),
        }  # fmt: skip
        constants = {
            "NORM": int("weight" in call.tensors), **how, "GLU": how["GLU"] if len(names) > 1 else "",
            "SPLIT": int(parts.is_split), **constants, "UNIT": unit, "ROWS": power_of_two(rows), "REPEAT": repeat,
            "WARPS": warps, "LANES": lanes, "ACROSS": across,
        }  # fmt: skip
        grid = (cdiv(n, repeat * lanes), parts.splits)
        launches.append(launch("gemv", "gemv", grid, arguments, constants, warps, stages=1))
    return [*launches, *parts.end("weight" in call.tensors)]


def _unit(dtype: str) -> int:
    """Columns of a weight that one thread reads at once."""
    return 4 if dtype in formats.FLOAT_BYTES else formats.BLOCK


def _lanes(target: Target, dtype: str, n: int, repeat: int) -> tuple[int, int]:
    """Rows of w, and units side by side, 128 bytes, that a warp reads at once."""
    across = 16 if formats.FLOAT_BYTES.get(dtype) == 2 else 8
    if target.is_interpreted:
        return power_of_two(min(2048, cdiv(n, repeat))), across
    return (64 if target.kind == "hip" else 32) // across, across


def _gemv_shape(target: Target, dtype: str, n: int, k: int, products: int, is_wide: bool) -> tuple[int, int, int]:
    """Tiles of rows in a program, warps, and splits of K, for `products`: rows of x times weights. Fewer rows and more
    warps (`is_wide`) read longer parts of rows, and x more often."""
    lanes, across = _lanes(target, dtype, n, 2)
    units = cdiv(k, _unit(dtype))
    if target.is_interpreted:  # a split where that is possible, so that it is proven
        return 2, 1, 2 if units > across else 1
    enough = target.multiprocessors * WARPS_PER_UNIT
    repeat = REPEAT[target.kind].get(power_of_two(products), 1)
    while repeat > 1 and cdiv(n, repeat * lanes) * 8 < enough:
        repeat //= 2
    if is_wide and repeat > 1:
        repeat //= 2
    programs = cdiv(n, repeat * lanes)
    warps = min(8 if is_wide or programs * 4 < enough else 4, power_of_two(cdiv(units, across)))
    splits = min(cdiv(units, across * warps), cdiv(enough, 2 * programs * warps))
    return repeat, warps, splits


@dataclass(frozen=True)
class _Tile:
    """Of `gemm`: rows of x, rows of w, blocks of 32 columns; and how many programs a multiprocessor should have."""

    m: int
    n: int
    blocks: int
    warps: int
    stages: int
    programs: int


def _tiles(target: Target, call: BoundCall) -> list[_Tile]:
    """Few rows wait for memory: more programs and more loads under way. Many wait for the tensor cores: there the more
    rows of x share the unpacking of a weight the better, if there are tiles enough for all multiprocessors."""
    rows, weights = call.tensors["x"].shape[0], len(_passes(call)[0])
    if target.is_interpreted:  # several programs and steps where that is possible, but large ones: each takes long
        (_, k), n = call.tensors["x"].shape, call.tensors["y"].shape[1]
        n_tile, blocks = power_of_two(cdiv(n, 2)), power_of_two(cdiv(k, 2 * formats.BLOCK))
        return [_Tile(32, min(1024, max(32, n_tile)), min(16, blocks), 1, 1, 1)]
    if not _is_bfloat(target, call.signature):
        found = [_Tile(min(64, power_of_two(rows)), 64, 1, 8, 2, 2)]
    elif rows <= 32:
        # Two tiles of float32 weights spill on 8.0 (bench/results/kernels-cuda-compiled.json).
        is_large = weights > 1 and call.tensors["w_gate"].dtype == "F32"
        found = [_Tile(max(16, power_of_two(rows)), 64, 2 if is_large else 4, 4, 5, 3)]
    elif rows <= 64:
        found = [_Tile(64, 64, 2, 4, 3, 2)]
    else:
        found = [_Tile(128, 128 // weights, 2, 8, 3, 1)]
        programs = cdiv(rows, 256) * cdiv(call.tensors["y"].shape[1], 128 // weights)
        if len(_passes(call)) == 1 and programs >= target.multiprocessors and target.arch in LARGE_TILES:
            found.append(_Tile(256, 128 // weights, 2, 8, 3, 1))
    return [replace(tile, stages=min(tile.stages, _stages(target, call, tile))) for tile in found]


def _stages(target: Target, call: BoundCall, tile: _Tile) -> int:
    """Stages whose loads fit shared memory, beside a tile of weights as operands."""
    element = 2 if _is_bfloat(target, call.signature) else 4
    read = sum(_bytes_read(call.tensors[name].dtype) for name in _passes(call)[0])
    one = tile.blocks * (tile.m * formats.BLOCK * element + tile.n * read)
    operands = tile.n * tile.blocks * formats.BLOCK * element * len(_passes(call)[0])
    fitting = (target.shared_bytes - operands) // one
    return max(1, fitting if target.kind == "cuda" else min(fitting + 1, 2))  # AMD: the last stage is in registers


def _bytes_read(dtype: str) -> int:
    """Of 32 columns of a row, without scales."""
    if dtype in formats.FLOAT_BYTES:
        return formats.BLOCK * formats.FLOAT_BYTES[dtype]
    records = formats.LAYOUTS[dtype].records
    return records["quants"] + records.get("high", 0)


def _gemm(planner: Planner, call: BoundCall, tile: _Tile) -> list[Launch]:
    target, x, n = planner.target, call.tensors["x"], call.tensors["y"].shape[1]
    rows, k = x.shape
    is_rounded = _is_bfloat(target, call.signature)
    rounding = 0 if not is_rounded else 2 if target.is_interpreted else 1
    steps = cdiv(k, 32 * tile.blocks)
    width = steps * 32 * tile.blocks
    z = room(planner, "operand", rows * width * 4, "bf16" if rounding == 1 else "fp32")
    numbers = {"z_stride": width, "columns": k, **_norm(call)}
    norm = {"norm": pointer(call.tensors.get("weight", x)), "z": z}
    block = power_of_two(width) if target.is_interpreted else 1024
    constants = {"NORM": int("weight" in call.tensors), "ROUND": rounding, "BLOCK": block}
    launches = [launch("gemm", "prepare", (rows,), {**place("x", x), **norm, **numbers}, constants)]

    programs = cdiv(rows, tile.m) * cdiv(n, tile.n)
    enough = target.multiprocessors * tile.programs
    splits = min(2, steps) if target.is_interpreted else min(max(1, enough // programs), cdiv(steps, STEPS))
    parts = _Parts(planner, call, splits)
    ending, how = _epilogue(call)
    for number, names in enumerate(parts.passes):
        weights, constants = _reading(call, names)
        arguments = {
            "z": z, "z_stride": width, **weights, **ending, "sums": parts.sums(number), "sums_stride": n,
            "parts_stride": parts.stride, "rows": rows, "n": n, "columns": k, "steps": cdiv(steps, splits),
        }  # fmt: skip
        constants = {
            **how, "GLU": how["GLU"] if len(names) > 1 else "", "SPLIT": int(parts.is_split), **constants,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_B": tile.blocks,
            "WHOLE": int(constants["BITS"] > 0 or k == width), "GROUP": 8, "ROUND": rounding,
        }  # fmt: skip
        launches.append(launch("gemm", "gemm", (programs, splits), arguments, constants, tile.warps, tile.stages))
    return [*launches, *parts.end(False)]


KERNELS = [OpKernel(op, _numerics, _bind) for op in ("gemm", "gemm_add", "rms_norm_gemm", "rms_norm_gemm_glu")]
