"""What an op declares beyond its formula: data for any call of it, and the axes along which a call falls apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from polykern.kernels.attention import ATTENTION
from polykern.kernels.errors import ContractError
from polykern.kernels.op import Op, Param, TensorType, fp64, type_of
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.testdata import DISTINCT_ROWS, inputs_for, large_weight, part

ALL = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@ALL
def test_integers_say_what_they_are(op: Op) -> None:
    silent = [p.name for p in op.params if p.role != "out" and p.dtypes[0] in ("i32", "u32") and p.values == "numbers"]
    assert not silent, f"{op.name}: {silent} need `values`, so that data can be made for any call"


@ALL
def test_inputs_are_made_from_the_declaration(op: Op) -> None:
    for case in op.cases[:: max(1, len(op.cases) // 12)]:
        signature = case_signature(op, case)
        inputs = inputs_for(op, signature, np.random.default_rng(1))
        assert {n: type_of(v) for n, v in inputs.items()} == {n: signature.tensors[n] for n in inputs}
        with np.errstate(all="ignore"):
            outputs = op.reference(fp64(inputs), signature.attrs)
        for name, value in outputs.items():
            assert np.isfinite(value).all(), f"{case.name}: {name}"
        floats = [v for v in inputs.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
        assert all(v.any() for v in floats), f"{case.name}: zeros"


def test_a_batch_is_made_of_the_last_tokens_that_fit() -> None:
    kinds = {
        "q": TensorType((5, 4, 8), "f32"),
        "k_pages": TensorType((9, 2, 16, 8), "f16"),
        "v_pages": TensorType((9, 2, 16, 8), "f16"),
        "block_table": TensorType((2, 3), "i32"),
        "seq_ids": TensorType((5,), "i32"),
        "positions": TensorType((5,), "i32"),
    }
    signature = ATTENTION.signature(kinds, {})
    inputs = inputs_for(ATTENTION, signature, np.random.default_rng(2))
    assert inputs["seq_ids"].tolist() == [0, 0, 0, 1, 1]
    assert inputs["positions"].tolist() == [45, 46, 47, 46, 47]
    assert len(np.unique(inputs["block_table"])) == 6
    # Both sequences are read whole, the queries of a chunk see one key more each.
    cost, most = ATTENTION.cost_of(signature, inputs), ATTENTION.cost(signature)
    assert cost.nbytes == most.nbytes
    assert cost.flops == 4 * 4 * 8 * (46 + 47 + 48 + 47 + 48) < most.flops
    inputs["positions"][:] = [0, 1, 2, 0, 1]
    few = ATTENTION.cost_of(signature, inputs)
    assert few.flops == 4 * 4 * 8 * (1 + 2 + 3 + 1 + 2)
    assert cost.nbytes - few.nbytes == 2 * (96 - 5) * 2 * 8 * 2
    window = replace(signature, attrs={**signature.attrs, "window": 2})
    assert ATTENTION.cost_of(window, inputs).flops == 4 * 4 * 8 * (1 + 2 + 2 + 1 + 2)


def test_integers_without_a_meaning_are_refused() -> None:
    op = replace(OPS["advance"], params=(Param("positions", ("tokens",), "inout", dtypes=("i32",)),))
    signature = op.signature({"positions": TensorType((3,), "i32")}, {})
    with pytest.raises(ContractError) as caught:
        inputs_for(op, signature, np.random.default_rng(1))
    assert str(caught.value) == "advance: positions is i32, and its `values` do not say which integers"


def test_a_large_weight_repeats_its_rows() -> None:
    weight = large_weight(np.random.default_rng(1), TensorType((DISTINCT_ROWS + 5, 32), "Q4_0"))
    assert weight.shape == (DISTINCT_ROWS + 5, 32)
    assert np.array_equal(weight.data[:5], weight.data[DISTINCT_ROWS:])
    assert not np.array_equal(weight.data[:5], weight.data[5:10])


@ALL
def test_an_op_falls_apart_along_its_splits(op: Op) -> None:
    """The reference of a part of the inputs is that part of the reference, for every case and axis."""
    for case in op.cases:
        if case.dims.get("T") == 1 and len(op.cases) > 100:
            continue  # a single row: the others show as much
        inputs = fp64({n: v for n, v in op.make_inputs(case).items() if v is not None})
        signature = case_signature(op, case, op.make_inputs(case))
        dims = op.bind(signature.tensors)
        with np.errstate(all="ignore"):
            whole = op.reference(inputs, signature.attrs)
            for axis in op.splits:
                taken = {axis: np.unique([0, dims[axis] // 3, dims[axis] - 1])}
                got = op.reference(part(op, inputs, taken), signature.attrs)
                for name, expected in part(op, whole, taken).items():
                    np.testing.assert_allclose(got[name], expected, 1e-9, 1e-9, err_msg=f"{case.name} {axis} {name}")


@ALL
def test_splits_are_axes_of_the_op(op: Op) -> None:
    written = {axis for p in op.params if p.is_written for axis in p.axes}
    assert set(op.splits) <= written
