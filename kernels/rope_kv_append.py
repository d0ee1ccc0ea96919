"""rope_kv_append: q and k rotated, k and v into the cache: all that lies between projection and attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from .kv_append import (
    BATCHES,
    append,
    lost_wrapped,
    make_pages,
    slot_off_by_one,
    stored_bound,
    unknown_sequence_is_last,
)
from .mutants import changed_attrs, changed_inputs, changed_output, padding_taken, table_ignored
from .op import (
    NUMPY_DTYPES,
    Attrs,
    Case,
    Cost,
    Emit,
    Inputs,
    Mutant,
    Numerics,
    Op,
    Outputs,
    Param,
    Signature,
    rng_for,
    signature_bytes,
)
from .quant import Array
from .rope import PAIRINGS, make_table, next_position, other_pairing, rot_dim_problem, rotate, rotation_bound


def _rotated(inputs: Inputs, attrs: Attrs, name: str) -> Array:
    return rotate(inputs[name], inputs["cos_sin"], inputs["positions"], attrs["pairing"])


def reference(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {
        "q": _rotated(inputs, attrs, "q"),
        "k_pages": append(inputs, "k_pages", _rotated(inputs, attrs, "k")),
        "v_pages": append(inputs, "v_pages", inputs["v"]),
    }


def cost(signature: Signature) -> Cost:
    tensors = signature.tensors
    tokens, heads, head_dim = tensors["q"].shape
    kv_heads, rot_dim = tensors["k"].shape[1], tensors["cos_sin"].shape[1]
    element = np.dtype(NUMPY_DTYPES[tensors["k_pages"].dtype]).itemsize
    nbytes = signature_bytes(signature, ("q", "q", "k", "v", "block_table", "seq_ids", "positions"))
    nbytes += tokens * (4 * rot_dim + 2 * kv_heads * head_dim * element)
    return Cost(nbytes, 3 * tokens * (heads + kv_heads) * rot_dim)


def error_bound(inputs: Inputs, attrs: Attrs, outputs: Outputs, numerics: Numerics) -> Outputs:
    def rotation(name: str) -> Array:
        return rotation_bound(inputs[name], inputs["cos_sin"], inputs["positions"], attrs["pairing"])

    return {
        "q": rotation("q"),
        "k_pages": stored_bound(inputs, "k_pages", _rotated(inputs, attrs, "k"), rotation("k")),
        "v_pages": stored_bound(inputs, "v_pages", inputs["v"]),
    }


def make_inputs(case: Case) -> dict[str, Any]:
    rng, d = rng_for(case), case.dims
    batch = make_pages(rng, case)
    tokens = len(batch["seq_ids"])
    q = rng.standard_normal((tokens, d["H"], d["D"]), dtype=np.float32)
    k, v = rng.standard_normal((2, tokens, d["G"], d["D"]), dtype=np.float32)
    return {"q": q, "k": k, "v": v, "cos_sin": make_table(d.get("R", d["D"]), d.get("L", 60)), **batch}


def decompose(signature: Signature, emit: Emit) -> None:
    attrs = {"pairing": signature.attrs["pairing"]}
    for name in ("q", "k"):
        emit("rope", {"x": name, "cos_sin": "cos_sin", "positions": "positions"}, attrs)
    names = ("k", "v", "block_table", "seq_ids", "positions", "k_pages", "v_pages")
    emit("kv_append", {name: name for name in names}, {})


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []
    for pairing in PAIRINGS:
        for name, seqs, dims in BATCHES:
            # A heads-per-kv-head ratio of its own, and partial rotation in every other case.
            shape: dict[str, Any] = {"S": 16, "G": 2, "D": 64, "seqs": seqs, **dims}
            shape["H"] = shape["G"] * (1 + len(cases) % 4)
            shape["R"] = shape["D"] // (1 + len(cases) % 2) // 2 * 2
            cases.append(Case(f"{pairing}-{name}", shape, {"pairing": pairing}))
        dims = {"S": 8, "G": 2, "H": 4, "D": 16, "seqs": ((20, 6), (19, 1)), "L": 17}
        cases.append(Case(f"{pairing}-past-the-angles", dims, {"pairing": pairing}))
    return tuple(cases)


def _unrotated_k(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {**reference(inputs, attrs), "k_pages": append(inputs, "k_pages", inputs["k"])}


def _rotated_v(inputs: Inputs, attrs: Attrs) -> Outputs:
    return {**reference(inputs, attrs), "v_pages": append(inputs, "v_pages", _rotated(inputs, attrs, "v"))}


def _opposite(inputs: dict[str, Any]) -> dict[str, Any]:
    """The sines with their sign turned."""
    table = inputs["cos_sin"].copy()
    table[:, table.shape[1] // 2 :] *= -1
    return {"cos_sin": table}


ROPE_KV_APPEND = Op(
    name="rope_kv_append",
    doc="q rotated in place; k rotated and stored, v stored in the paged cache; see rope and kv_append. k is undefined "
    "afterwards.",
    params=(
        Param("q", ("tokens", "heads", "head_dim"), "inout"),
        Param("k", ("tokens", "kv_heads", "head_dim"), "clobber"),
        Param("v", ("tokens", "kv_heads", "head_dim")),
        Param("cos_sin", ("table_length", "rot_dim"), values="angles"),
        Param("block_table", ("sequences", "max_pages"), dtypes=("i32",), values="pages"),
        Param("seq_ids", ("tokens",), dtypes=("i32",), values="seq_ids"),
        Param("positions", ("tokens",), dtypes=("i32",), values="positions"),
        Param("k_pages", ("pages", "kv_heads", "page_size", "head_dim"), "inout", dtypes=("f16", "f32")),
        Param("v_pages", ("pages", "kv_heads", "page_size", "head_dim"), "inout", dtypes=("f16", "f32")),
    ),
    attrs={"pairing": "interleaved"},
    choices={"pairing": PAIRINGS},
    validate=lambda signature: rot_dim_problem(signature, "q"),
    splits=("heads", "kv_heads"),
    reference=reference,
    cost=cost,
    make_inputs=make_inputs,
    error_bound=error_bound,
    cases=_cases(),
    mutants=(
        Mutant("pairing_swapped", changed_attrs(reference, other_pairing)),
        Mutant("wrong_direction", changed_inputs(reference, _opposite)),
        Mutant("position_off_by_one", changed_inputs(reference, next_position)),
        Mutant("slot_off_by_one", changed_inputs(reference, slot_off_by_one)),
        Mutant("k_not_rotated", _unrotated_k),
        Mutant("v_rotated", _rotated_v),
        Mutant("q_not_rotated", changed_output(reference, "q", lambda q, i: i["q"])),
        Mutant("k_and_v_swapped", changed_inputs(reference, lambda i: {"k": i["v"], "v": i["k"]})),
        Mutant("block_table_ignored", changed_inputs(reference, table_ignored)),
        Mutant("lost_page_wrapped", changed_inputs(reference, lost_wrapped)),
        Mutant("unknown_sequence_is_last", changed_inputs(reference, unknown_sequence_is_last)),
        Mutant("padding_row_written", changed_inputs(reference, padding_taken)),
    ),
    decompose=decompose,
)
