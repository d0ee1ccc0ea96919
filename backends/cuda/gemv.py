"""Products of a few rows of x with quantised weights in `fast`, by integer dot products: gemv_dp4a.cu.

One more way for gemm.py to offer, on NVIDIA GPUs: it reads the weights once, at 16 bytes per lane, and multiplies them
as the integers they are, where Triton makes floats of them first.
"""

from __future__ import annotations

from ...kernels.glu import KINDS
from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from ..products import halves_of, weight_of
from . import formats
from .launch import (
    FUNCTION_ULP,
    Launch,
    Planner,
    Target,
    cdiv,
    launch,
    place,
    pointer,
    power_of_two,
    weight_arguments,
)

LEVELS = 127  # integers up to this, as 8 bits hold them
MOST_ROWS = 8  # of x; beyond, tensor cores have something to do
LEAST_ARCH = 75  # what the backend opens; dp4a itself is there since 6.1
# Warps of a block, and blocks that a multiprocessor has registers for without spilling any (64, 80 and 128 for a
# thread), for 1, 2 and more rows of x. Many warps share the work of rounding x, few spread a short weight over more
# multiprocessors.
BLOCKS = (((16, 2), (8, 4)), ((8, 3),), ((8, 2),))
RESERVED = 1 << 10  # bytes of shared memory that CUDA takes for each block (CUDA C++ Programming Guide 12.9, table 27)


def is_offered(target: Target, signature: Signature) -> bool:
    """Whether `candidates` has any."""
    if target.kind != "cuda" or int(target.arch) < LEAST_ARCH or halves_of(signature):
        return False
    fmt, _, columns = weight_of(signature)
    rows = signature.tensors["x"].shape[0]
    if fmt.is_float or rows > MOST_ROWS or signature.attrs["precision"] != "fast":
        return False
    return shared_bytes(rows, columns, max(warps for shapes in BLOCKS for warps, _ in shapes)) <= target.shared_bytes


def numerics(signature: Signature) -> Numerics:
    """What every candidate keeps to.

    A lane adds up one unit in 32: of 16 columns and one product, or of 32 and at most two. The warp's 5 additions,
    bias, y, and the factor of the norm follow. Of a row's squares it adds up at most 4 sums of 4 per 512 columns,
    before those of the block.
    """
    columns = weight_of(signature)[2]
    sums = 2 * cdiv(columns, 512) + 8
    squares = 4 * cdiv(columns, 512) + 24 if "weight" in signature.tensors else 0
    return Numerics("f32", max(sums, squares), "int8", FUNCTION_ULP, LEVELS)


def shared_bytes(rows: int, columns: int, warps: int) -> int:
    """Of each row of x the integers, 8 bytes per block of 32, and a part of its sum of squares per warp."""
    return power_of_two(rows) * (columns + columns // formats.BLOCK * 8) + warps * 4


def candidates(planner: Planner, call: BoundCall) -> list[list[Launch]]:
    """Launches that do `call` (gemm or an op fused with it), none where it is not offered.

    The most promising come first. Only the order depends on the GPU, so that what is compiled ahead serves all of an
    architecture.
    """
    signature = call.signature
    if not is_offered(planner.target, signature):
        return []
    fmt, features, _ = weight_of(signature)
    rows = power_of_two(signature.tensors["x"].shape[0])
    # Two rows of w at a time make two loads at once, and use x twice. With 8 rows of x four of them halve what shared
    # memory has to give; for blocks of more than 4 or 8 bits and a scale, registers do not suffice.
    layout = formats.LAYOUTS[fmt.name]
    sources = (2, 4, 1) if rows == 8 and layout.bits in (4, 8) and not layout.has_min else (2, 1)
    if "w_up" in signature.tensors:
        sources = tuple(n // 2 for n in sources if n > 1)
    blocks = BLOCKS[2 if layout.halves and rows > 1 else min(rows, 3) - 1]
    shapes = [(warps, per_sm, w_rows) for w_rows in sources for warps, per_sm in blocks]
    units = planner.target.multiprocessors

    def imbalance(shape: tuple[int, int, int]) -> float:
        """What the multiprocessor with most rows of w has, by the average, to a tenth."""
        at_once = shape[0] * shape[2]
        return round(cdiv(cdiv(features, at_once), units) * at_once * units / features, 1)

    return [[_launch(planner.target, call, *shape)] for shape in sorted(shapes, key=imbalance)]


def _launch(target: Target, call: BoundCall, warps: int, per_sm: int, w_rows: int) -> Launch:
    x, y = call.tensors["x"], call.tensors["y"]
    fmt, features, columns = weight_of(call.signature)
    weight, bias, up = (call.tensors.get(name) for name in ("weight", "bias", "w_up"))
    w = call.tensors["w_gate" if up else "w"]
    arguments = {
        **place("x", x), "weight": pointer(weight or x), "eps": float(call.attrs.get("eps", 0.0)),
        "weight_offset": float(call.attrs.get("weight_offset", 0.0)), **weight_arguments("w", w),
        **weight_arguments("up", up or w), "bias": pointer(bias or y), **place("y", y), "rows": x.shape[0],
        "columns": columns, "features": features,
    }  # fmt: skip
    constants = {
        **formats.constants(fmt), "ROWS": power_of_two(x.shape[0]), "W_ROWS": w_rows, "PER_SM": per_sm,
        "NORM": int(weight is not None), "GLU": 1 + KINDS.index(call.attrs["kind"]) if up else 0,
        "BIAS": int(bias is not None), "ADD": int(call.op == "gemm_add"),
    }  # fmt: skip
    shared = shared_bytes(x.shape[0], columns, warps)
    resident = max(1, min(per_sm, (target.shared_bytes + RESERVED) // (shared + RESERVED)))
    grid = min(target.multiprocessors * resident, cdiv(features, warps * w_rows))
    return launch("gemv_dp4a.cu", "gemv_dp4a", (grid,), arguments, constants, warps=warps, shared=shared)
