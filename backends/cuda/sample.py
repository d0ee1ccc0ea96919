"""argmax and sample: a row of logits in parts, over as many programs.

A threshold (the k-th largest mass; that of top_p) is found among the bits of floats, some bits a turn, each turn a
kernel, whose programs first settle the turn before. Turns for what no row asks for do nothing: they cost a launch.
"""

from __future__ import annotations

from ...kernels.op import Numerics, Signature
from ...kernels.spi import BoundCall
from .launch import (
    FUNCTION_ULP,
    Argument,
    Launch,
    OpKernel,
    Planner,
    Target,
    cdiv,
    launch,
    place,
    pointer,
    power_of_two,
    room,
)

BITS = 30  # of floats from 0 to 1
MOST_PARTS = 64  # what each program of the next kernel reads of a row: 64 sums for each of 64 thresholds, 16 KB
TILE = 1 << 14  # comparisons of masses and thresholds at once: 64 a thread
LARGEST_TILE = 1 << 20  # that Triton has
SIDE = 64  # of the square tiles of the walk


def _cut(target: Target, vocab: int) -> tuple[int, int, int]:
    """(parts, tokens in each, tokens at a time); for the interpreter as few as have all loops turn."""
    block, most = (min(1 << 12, power_of_two(vocab)), 4) if target.is_interpreted else (1024, MOST_PARTS)
    blocks = cdiv(vocab, block)
    parts = min(most, power_of_two(blocks))
    return parts, cdiv(blocks, parts) * block, block


def _turns(target: Target) -> tuple[int, list[int]]:
    """How many thresholds a turn has, and how far apart those of each turn are: all bits at first, then 1 at last."""
    bits = 10 if target.is_interpreted else 6
    return 1 << bits, [1 << shift for shift in range(BITS - bits, -1, -bits)]


def _largest(planner: Planner, call: BoundCall) -> tuple[Launch, dict[str, Argument]]:
    """The first kernel of both ops, and where it writes."""
    x = call.tensors["x"]
    rows, vocab = x.shape
    parts, step, block = _cut(planner.target, vocab)
    found: dict[str, Argument] = {
        "values": room(planner, "values", rows * parts * 4), "places": room(planner, "places", rows * parts * 4, "i32"),
    }  # fmt: skip
    arguments = {**place("x", x), **found, "columns": vocab, "part_columns": step}
    constants = {"PARTS": parts, "BLOCK": block}
    return launch("sample", "largest_of_parts", (rows, parts), arguments, constants), found


def _bind_argmax(planner: Planner, call: BoundCall) -> list[Launch]:
    rows, vocab = call.tensors["x"].shape
    first, found = _largest(planner, call)
    arguments = {**found, "ids": pointer(call.tensors["ids"])}
    constants = {"PARTS": _cut(planner.target, vocab)[0]}
    return [first, launch("sample", "argmax", (rows,), arguments, constants, warps=1)]


def _bind_sample(planner: Planner, call: BoundCall) -> list[Launch]:
    x, params, rng, ids = (call.tensors[name] for name in ("x", "params", "rng", "ids"))
    rows, vocab = x.shape
    parts, step, block = _cut(planner.target, vocab)
    ways, widths = _turns(planner.target)
    first, found = _largest(planner, call)
    plans = {"plans": room(planner, "plans", rows * 6 * 4)}
    given, sizes = {**place("x", x), **plans}, {"columns": vocab, "part_columns": step}
    turns = [(kind, width) for kind in ("count", "mass") for width in widths]
    first_of_mass = len(widths)

    def written(turn: int, suffix: str = "") -> dict[str, Argument]:
        """Where a turn leaves its results: the next one reads them while it writes its own, and the first sums of
        masses are wanted by all behind it."""
        name = "first" if turn == first_of_mass else str(turn % 2)
        dtype = "i32" if turn < first_of_mass else "fp32"
        return {
            f"lows{suffix}": room(planner, f"lows {turn % 2}", rows * 4, "i32"),
            f"sums{suffix}": room(planner, f"sums {name}", rows * parts * ways * 4, dtype),
        }

    first_sums = written(first_of_mass)["sums"]
    arguments = {
        **place("params", params), **place("rng", rng), **found, **plans, "ids": pointer(ids), "columns": vocab,
    }  # fmt: skip
    launches = [first, launch("sample", "plan", (rows,), arguments, {"PARTS": parts}, warps=1)]
    for turn, (kind, width) in enumerate(turns):
        kind_before, width_before = turns[turn - 1] if turn else ("", 0)
        arguments = {
            **given, **written(max(0, turn - 1), "_before"), "first_sums": first_sums,
            **written(turn), **sizes, "width_before": width_before, "width": width,
        }  # fmt: skip
        constants = {
            "KIND_BEFORE": kind_before, "KIND": kind, "WAYS": ways, "PARTS": parts,
            "BLOCK_W": min(ways, (LARGEST_TILE if planner.target.is_interpreted else TILE) // block), "BLOCK": block,
        }  # fmt: skip
        launches.append(launch("sample", "sums_above", (rows, parts), arguments, constants, warps=8))
    leasts = {"leasts": room(planner, "leasts", rows * 4), "kept": room(planner, "kept", rows * parts * 4)}
    arguments = {
        **given, **written(len(turns) - 1, "_before"), "first_sums": first_sums, **leasts,
        **sizes, "width_before": turns[-1][1],
    }  # fmt: skip
    constants = {"WAYS": ways, "PARTS": parts, "BLOCK": block}
    launches.append(launch("sample", "shares", (rows, parts), arguments, constants))
    arguments = {**given, **leasts, "ids": pointer(ids), **sizes}
    constants = {"PARTS": parts, "BLOCK_R": SIDE, "BLOCK_C": SIDE}
    return [*launches, launch("sample", "sample", (rows,), arguments, constants, warps=8)]


def _numerics(target: Target, signature: Signature) -> Numerics:
    """Sums over the tokens of a part, at most one by one over blocks and 16 in a block's tree; the walk adds up parts,
    tiles, and the two sides of a tile."""
    parts, step, block = _cut(target, signature.tensors["x"].shape[1])
    return Numerics("f32", step // block + 16 + parts + cdiv(step, SIDE * SIDE) + 2 * SIDE, "f32", FUNCTION_ULP)


KERNELS = [OpKernel("argmax", _numerics, _bind_argmax), OpKernel("sample", _numerics, _bind_sample)]
