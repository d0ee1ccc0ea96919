"""The contract holds itself to what it asks of kernels: references, bounds, cases, mutants and decompositions agree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from polykern.backends.null import NullBackend
from polykern.backends.reference import ReferenceBackend
from polykern.kernels.errors import ContractError
from polykern.kernels.judge import compare, judge
from polykern.kernels.op import NUMPY_DTYPES, Case, Inputs, Numerics, Op, Outputs, Signature, TensorType, fp64, type_of
from polykern.kernels.ops import OPS, case_signature, fused_ops, primitive_ops, required_ops, small_cases
from polykern.kernels.program import Call, View, decompose
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import DeviceInfo, Unsupported

PER_OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
# Results that a float32 computation gets exactly as the float64 one: copies, integers, and dequantisation.
EXACT_OPS = {"dequantize", "embedding", "gather", "argmax", "advance", "sample"}


def serial_depth(op: Op, signature: Signature) -> int:
    """The longest chain of additions of a kernel that adds one by one."""
    dims = op.bind(signature.tensors)
    if op.name == "attention":
        return max(dims["head_dim"], dims["max_pages"] * dims["page_size"])
    return max(dims.get("in_features", 1), dims.get("features", 1), dims.get("vocab", 1))


@cache
def prepared(name: str) -> tuple[tuple[Case, Inputs, Signature, Outputs], ...]:
    """Per case of an op: inputs, signature and the float64 reference."""
    op = OPS[name]
    rows: list[tuple[Case, Inputs, Signature, Outputs]] = []
    for case in op.cases:
        inputs = op.make_inputs(case)
        signature = case_signature(op, case, inputs)
        rows.append((case, inputs, signature, op.reference(fp64(inputs), signature.attrs)))
    return tuple(rows)


def verdict(
    op: Op, row: tuple[Case, Inputs, Signature, Outputs], got: Outputs, numerics: Numerics
) -> tuple[float, str]:
    case, inputs, signature, expected = row
    with np.errstate(all="ignore"):
        result = judge(op, case, signature, fp64(inputs), expected, got, numerics)
    return result.ratio, result.reason


def as_stored(signature: Signature, outputs: Outputs) -> Outputs:
    return {name: np.asarray(v, NUMPY_DTYPES[signature.tensors[name].dtype]) for name, v in outputs.items()}


def lanes16(op: Op, signature: Signature) -> Numerics:
    """What an OpenCL kernel of 16 lanes would declare: tight bounds, so that mutants have little room."""
    fast = signature.attrs.get("precision") == "fast"
    depth = serial_depth(op, signature) // 16 + 8
    return Numerics(depth=depth, activations="int8" if fast else "f32", function_ulp=5)


def arrays(inputs: Inputs) -> Iterator[tuple[str, Array]]:
    for name, value in inputs.items():
        yield name, value.data if isinstance(value, Weight) else value


def test_ops_are_listed_required_first_then_primitives_then_fused() -> None:
    assert [op.name for op in required_ops()] == ["gemm", "attention", "dequantize"]
    assert [op.name for op in fused_ops()] == ["rms_norm_gemm", "gemm_add", "rms_norm_gemm_glu", "rope_kv_append"]
    assert list(OPS.values()) == [*required_ops(), *primitive_ops(), *fused_ops()]
    assert all(name == op.name for name, op in OPS.items())


@PER_OP
def test_cases_have_names_of_their_own_and_the_same_data_every_time(op: Op) -> None:
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names)
    for case, inputs, _, _ in prepared(op.name):
        given = {p.name for p in op.params if p.role != "out"}
        assert {p.name for p in op.params if p.role != "out" and not p.optional} <= set(inputs) <= given
        again = dict(arrays(op.make_inputs(case)))
        for name, array in arrays(inputs):
            np.testing.assert_array_equal(array, again[name], strict=True)


@PER_OP
def test_reference_returns_what_is_written_and_leaves_its_inputs_alone(op: Op) -> None:
    written = {p.name for p in op.params if p.is_written}
    for case in op.cases[:: max(1, len(op.cases) // 40)]:
        inputs = op.make_inputs(case)
        signature = case_signature(op, case, inputs)
        before = {name: array.copy() for name, array in arrays(inputs)}
        outputs = op.reference(inputs, signature.attrs)
        op.error_bound(fp64(inputs), signature.attrs, op.reference(fp64(inputs), signature.attrs), Numerics())
        for mutant in op.mutants:
            with np.errstate(all="ignore"):
                wrong = mutant.run(inputs, signature.attrs)
            assert {n: (v.shape, v.dtype) for n, v in wrong.items()} == {
                n: (v.shape, v.dtype) for n, v in outputs.items()
            }, mutant.name
        assert set(outputs) == written
        for name, value in outputs.items():
            kind = signature.tensors[name]
            assert (value.shape, value.dtype) == (kind.shape, NUMPY_DTYPES[kind.dtype]), f"{case.name}: {name}"
        for name, array in arrays(inputs):
            np.testing.assert_array_equal(array, before[name], err_msg=f"{case.name}: {name} was modified")


@PER_OP
def test_float32_reference_is_within_the_bound_and_the_bound_is_not_blunt(op: Op) -> None:
    ratios: list[float] = []
    for row in prepared(op.name):
        case, inputs, signature, _ = row
        got = as_stored(signature, op.reference(inputs, signature.attrs))
        serial = Numerics(depth=serial_depth(op, signature))
        for numerics in (serial, lanes16(op, signature)):
            ratio, reason = verdict(op, row, got, numerics)
            assert not reason, f"{case.name}: {reason}"
            ratios.append(ratio)
    if op.name in EXACT_OPS:
        assert max(ratios) == 0
    else:
        assert max(ratios) > 1e-2  # a real error of float32 comes within a factor of 100 of the bound


@PER_OP
def test_every_mutant_is_killed_in_each_precision(op: Op) -> None:
    assert len({mutant.name for mutant in op.mutants}) == len(op.mutants) >= 3
    alive = {
        (precision, mutant.name): mutant
        for precision in (("exact", "fast") if "precision" in op.attrs else ("",))
        for mutant in op.mutants
    }
    for row in prepared(op.name):
        _, inputs, signature, _ = row
        precision = signature.attrs.get("precision", "")
        for key, mutant in list(alive.items()):
            if key[0] != precision:
                continue
            with np.errstate(all="ignore"):
                wrong = as_stored(signature, mutant.run(inputs, signature.attrs))
            if verdict(op, row, wrong, lanes16(op, signature))[1]:
                del alive[key]
    assert not alive, f"survive: {sorted(alive)}"


@PER_OP
def test_cost_counts_at_least_the_tensors_that_must_move(op: Op) -> None:
    for _, _, signature, _ in prepared(op.name):
        cost = op.cost(signature)
        written = [p.name for p in op.params if p.role == "out"]
        assert cost.nbytes >= sum(int(np.prod(signature.tensors[n].shape)) * 4 for n in written)
        assert cost.nbytes > 0 <= cost.flops


@PER_OP
def test_small_cases_are_few_and_cheap_and_show_every_attribute(op: Op) -> None:
    chosen = small_cases(op)
    assert 4 <= len(chosen) <= (30 if op.name == "gemm" else 20)
    for case in chosen:
        assert op.cost(case_signature(op, case)).flops < 200_000
    for attr in op.attrs:
        every = {case.attrs.get(attr) for case in op.cases}
        assert len({case.attrs.get(attr) for case in chosen}) >= min(2, len(every)), attr
    if op.name == "gemm":
        pairs = {(case.dims["format"], case.attrs["precision"]) for case in chosen}
        assert pairs == {(name, precision) for name in FORMATS for precision in ("exact", "fast")}
    if op.name == "dequantize":
        assert {case.dims["format"] for case in chosen} == set(FORMATS)


def run_decomposed(op: Op, inputs: Inputs, signature: Signature) -> Outputs:
    """The primitives' references, one after the other, on named arrays."""
    views = {name: View(name, kind.shape, kind.dtype) for name, kind in signature.tensors.items()}
    calls, temporaries = decompose(op, Call(op.name, views, signature.attrs), signature)
    memory: dict[str, Any] = {**inputs, **{spec.name: np.full(spec.shape, np.nan) for spec in temporaries}}
    for call in calls:
        primitive = OPS[call.op]
        assert primitive.decompose is None
        types = {name: view.type for name, view in call.args.items()}
        attrs = primitive.signature(types, call.attrs).attrs
        given = {name: memory[view.buffer] for name, view in call.args.items() if view.buffer in memory}
        outputs = primitive.reference(given, attrs)
        memory.update({call.args[name].buffer: value for name, value in outputs.items()})
    return {p.name: memory[p.name] for p in op.params if p.is_written}


@pytest.mark.parametrize("op", fused_ops(), ids=lambda op: op.name)
def test_decomposition_computes_the_same(op: Op) -> None:
    for row in prepared(op.name):
        case, inputs, signature, expected = row
        got = as_stored(signature, run_decomposed(op, inputs, signature))
        _, reason = verdict(op, row, got, Numerics(depth=serial_depth(op, signature)))
        assert not reason, f"{case.name}: {reason}"
        wide = run_decomposed(op, fp64(inputs), signature)
        for name, value in expected.items():
            np.testing.assert_allclose(wide[name], value, rtol=1e-12, atol=1e-12, err_msg=f"{case.name}: {name}")


def int8_rounded(x: Array) -> Array:
    """x [T, K] rounded per row and block of 32 to multiples of max|x| / 127, all in float32."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32)
    steps = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    quants = np.rint(blocks / np.where(steps == 0, np.float32(1), steps))
    return (quants * steps).reshape(x.shape[0], -1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", ["gemm", "gemm_add", "rms_norm_gemm", "rms_norm_gemm_glu"])
def test_int8_activations_are_within_the_int8_bound_and_outside_the_float_one(name: str) -> None:
    op = OPS[name]
    outside = 0
    for row in prepared(name):
        case, inputs, signature, _ = row
        if signature.attrs["precision"] != "fast":
            continue
        x, attrs = inputs["x"], signature.attrs
        if "weight" in inputs:
            x = OPS["rms_norm"].reference(inputs, {"eps": attrs["eps"], "weight_offset": attrs["weight_offset"]})["y"]
        weights = {key: value for key, value in inputs.items() if isinstance(value, Weight)}
        products = {key: int8_rounded(x) @ weight.dense().T for key, weight in weights.items()}
        if name == "rms_norm_gemm_glu":
            gated = {"gate": products["w_gate"], "up": products["w_up"]}
            got = OPS["glu"].reference(gated, {"kind": attrs["kind"]})["y"]
        else:
            got = products["w"] + inputs.get("bias", np.float32(0)) + (inputs["y"] if name == "gemm_add" else 0)
        ratio, reason = verdict(op, row, {"y": got}, lanes16(op, signature))
        assert not reason, f"{case.name}: {reason}"
        # "extreme": activations of one size are whole steps, and nothing is rounded
        assert case.is_exact or case.fill == "extreme" or ratio > 0
        outside += bool(verdict(op, row, {"y": got}, Numerics(depth=serial_depth(op, signature)))[1])
    assert outside > 20


def kinds(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorType]:
    return {name: TensorType(shape, dtype) for name, (dtype, shape) in shapes.items()}


@pytest.mark.parametrize(
    ("op", "tensors", "attrs", "message"),
    [
        ("gemm", kinds(x=("f32", (2, 64))), {}, "gemm: w [out_features, in_features] is missing"),
        (
            "gemm",
            kinds(x=("f32", (2, 64)), w=("Q4_0", (5, 96))),
            {},
            "gemm: in_features is 64 in x but 96 in w",
        ),
        ("gemm", kinds(x=("f16", (2, 64)), w=("Q4_0", (5, 64))), {}, "gemm: x is f16, expected f32"),
        ("gemm", kinds(x=("f32", (64,)), w=("Q4_0", (5, 64))), {}, "gemm: x is [64], expected [tokens, in_features]"),
        (
            "gemm",
            kinds(x=("f32", (2, 64)), w=("Q4_0", (5, 64))),
            {"precison": "fast"},
            "gemm has no attribute 'precison'; it has precision",
        ),
        ("add", kinds(x=("f32", (2, 3)), z=("f32", (2, 3))), {}, "add has no parameter 'z'; it has x, y"),
        ("add", kinds(x=("f32", (2, 3)), y=("f32", (2, 3))), {"cap": 1}, "add has no attribute 'cap'; it has none"),
        (
            "kv_append",
            kinds(k_pages=("i32", (1, 1, 1, 1))),
            {},
            "kv_append: k_pages is i32, expected f16 or f32",
        ),
        (
            "attention",
            kinds(q=("f32", (1, 2, 64)), k_pages=("f16", (9, 2, 16, 80))),
            {},
            "attention: head_dim is 64 in q but 80 in k_pages",
        ),
        ("add", kinds(x=("f32", (0, 3)), y=("f32", (0, 3))), {}, "add: tokens is 0 in x, expected at least 1"),
        (
            "gemm",
            kinds(x=("f32", (2, 100)), w=("Q4_0", (5, 100))),
            {},
            "gemm: w: Q4_0: a row of 100 numbers does not fill whole blocks of 32",
        ),
        ("sample", kinds(params=("f32", (2, 3))), {}, "sample: params is [2, 3], expected [tokens, 4]"),
    ],
)
def test_calls_that_break_a_declaration_are_named(
    op: str, tensors: dict[str, TensorType], attrs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError) as error:
        OPS[op].signature(tensors, attrs)
    assert str(error.value) == message


def _refusal(op: str, **replaced: Any) -> str:
    case = next(c for c in OPS[op].cases if "T" not in c.dims or c.dims["T"] > 1)
    attrs = {k: v for k, v in replaced.items() if k in OPS[op].attrs}
    inputs = {**OPS[op].make_inputs(case), **{k: v for k, v in replaced.items() if k not in attrs}}
    with pytest.raises(ContractError) as error:
        OPS[op].signature({name: type_of(value) for name, value in inputs.items()}, {**case.attrs, **attrs})
    return str(error.value)


def test_calls_are_refused_for_what_axes_and_dtypes_cannot_express() -> None:
    assert _refusal("glu", kind="relu") == "glu: kind is 'relu', expected silu or gelu_tanh or gelu_erf"
    assert _refusal("rope", pairing="neox") == "rope: pairing is 'neox', expected interleaved or half"
    odd = np.zeros((50, 3), np.float32)
    assert _refusal("rope", cos_sin=odd).startswith("rope: 3 rotated dimensions of ")
    q = np.zeros((1, 7, 64), np.float32)
    assert _refusal("attention", q=q) == "attention: 7 query heads are no multiple of 2 kv heads"


X, PAGES = kinds(x=("f32", (2, 64))), kinds(k_pages=("f16", (9, 2, 16, 64)), v_pages=("f16", (9, 2, 16, 64)))
NORM, PRODUCT = kinds(weight=("f32", (64,))), kinds(w=("Q4_0", (5, 64)))
ROWS = kinds(block_table=("i32", (3, 4)), seq_ids=("i32", (2,)), positions=("i32", (2,)))
Q, SIX_HEADS = {**kinds(q=("f32", (2, 7, 64))), **PAGES, **ROWS}, {**kinds(q=("f32", (2, 6, 64))), **PAGES, **ROWS}


@pytest.mark.parametrize(
    ("op", "tensors", "attrs", "problem"),
    [
        ("gemm", {**X, **PRODUCT}, {"precision": "fastest"}, "precision is 'fastest', expected exact or fast"),
        ("rms_norm_gemm", {**X, **NORM, **PRODUCT}, {"eps": -1e-5}, "eps is -1e-05, expected at least 0"),
        ("rms_norm", {**X, **NORM}, {"weight_offset": "1"}, "weight_offset is '1', expected a finite number"),
        ("softcap", X, {"cap": float("nan")}, "cap is nan, expected a finite number"),
        ("softcap", X, {"cap": 0}, "cap is 0, expected more than 0"),
        ("attention", Q, {}, "7 query heads are no multiple of 2 kv heads"),
        ("attention", SIX_HEADS, {"window": 1.5}, "window is 1.5, expected an integer"),
        ("attention", SIX_HEADS, {"window": -1}, "window is -1, expected 0 (none) to 2147483647"),
        ("attention", SIX_HEADS, {"window": 2**31}, "window is 2147483648, expected 0 (none) to 2147483647"),
        ("attention", SIX_HEADS, {"softcap": -1.0}, "softcap is -1.0, expected 0 (none) or more"),
        (
            "rope",
            kinds(x=("f32", (2, 3, 64)), cos_sin=("f32", (50, 66)), positions=("i32", (2,))),
            {},
            "66 rotated dimensions of 64; expected an even number up to that",
        ),
        (
            "rope_kv_append",
            {**SIX_HEADS, **kinds(k=("f32", (2, 2, 64)), v=("f32", (2, 2, 64)), cos_sin=("f32", (50, 63)))},
            {},
            "63 rotated dimensions of 64; expected an even number up to that",
        ),
    ],
)
def test_every_backend_refuses_a_wrong_call_with_the_same_words(
    op: str, tensors: dict[str, TensorType], attrs: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ContractError) as error:
        OPS[op].signature(tensors, attrs)
    assert str(error.value) == f"{op}: {problem}"
    for backend in (NullBackend(DeviceInfo("null")), ReferenceBackend(DeviceInfo("host"))):
        assert backend.supports(Signature(op, tensors, attrs)) == Unsupported(op, str(error.value))


def test_limits_of_attributes_are_allowed() -> None:
    for attrs in ({"window": 2**31 - 1}, {"softcap": 1e-30}, {"scale": -0.5}, {"window": np.int32(5)}):
        assert OPS["attention"].signature(SIX_HEADS, attrs).attrs == {**OPS["attention"].attrs, **attrs}
    assert OPS["softcap"].signature(X, {"cap": np.float32(1e-30)}).attrs["cap"] > 0
    assert OPS["rms_norm"].signature({**X, **NORM}, {"eps": 0}).attrs["eps"] == 0


def test_an_expected_nan_is_right_and_nothing_else_is() -> None:
    """Beside a NaN or an infinity a bound is NaN, and must not excuse a finite number."""
    expected, bound = np.array([np.nan, np.inf, 1.0]), np.array([np.nan, np.nan, 0.5])
    assert not compare("y", np.array([np.nan, np.inf, 1.4], np.float32), expected, bound).reason
    for wrong in ([0.0, np.inf, 1.0], [np.nan, 3e38, 1.0], [np.nan, -np.inf, 1.0], [np.nan, np.inf, np.nan]):
        assert compare("y", np.array(wrong, np.float32), expected, bound).reason
