"""References and error bounds against formulas written out element by element, and against other correct algorithms."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest
from polykern.kernels.errors import ContractError
from polykern.kernels.op import Case, Inputs, Numerics, Outputs, fp64
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.rope import RopeScaling, attention_factor, cos_sin_table, frequencies
from polykern.kernels.sample import philox4x32, uniform
from polykern.kernels.testdata import random_weight


def run(name: str, inputs: Inputs, **attrs: Any) -> Outputs:
    op = OPS[name]
    return op.reference(fp64(inputs), op.with_defaults(attrs))


def cases(name: str, *parts: str) -> list[Case]:
    chosen = [case for case in OPS[name].cases if not parts or any(part in case.name for part in parts)]
    assert chosen
    return chosen


def assert_close(got: Array, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


# attention ------------------------------------------------------------------------------------------------------------


def page_of(inputs: Inputs, seq: int, position: int) -> int | None:
    """The page of a sequence's key; None where there is none."""
    table, (pages, _, page_size, _) = inputs["block_table"], inputs["k_pages"].shape
    if not (0 <= seq < len(table) and 0 <= position < table.shape[1] * page_size):
        return None
    page = int(table[seq, position // page_size])
    return page if 0 <= page < pages else None


def plain_attention(inputs: Inputs, attrs: dict[str, Any]) -> Array:
    """One query and one head at a time, keys looked up one by one."""
    q = inputs["q"].astype(np.float64)
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = inputs["k_pages"].shape
    y = np.zeros(q.shape)
    for t in range(tokens):
        seq, p = int(inputs["seq_ids"][t]), int(inputs["positions"][t])
        if seq < 0:
            continue
        keys = [j for j in range(p + 1) if not attrs["window"] or p - j < attrs["window"]]
        if p < 0 or any(page_of(inputs, seq, j) is None for j in keys):
            y[t] = np.nan
            continue
        for h in range(heads):
            scores, values = [], []
            for j in keys:
                slot = page_of(inputs, seq, j), h // (heads // kv_heads), j % page_size
                s = float(np.dot(q[t, h], inputs["k_pages"][slot].astype(np.float64)))
                s *= attrs["scale"] or 1 / math.sqrt(head_dim)
                if attrs["softcap"]:
                    s = attrs["softcap"] * math.tanh(s / attrs["softcap"])
                scores.append(s)
                values.append(inputs["v_pages"][slot].astype(np.float64))
            weights = [math.exp(s - max(scores)) for s in scores]
            y[t, h] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return y


@pytest.mark.parametrize("case", cases("attention"), ids=lambda case: case.name)
def test_attention_is_what_its_formula_says(case: Case) -> None:
    op = OPS["attention"]
    inputs, attrs = op.make_inputs(case), op.with_defaults(case.attrs)
    assert_close(run("attention", inputs, **case.attrs)["y"], plain_attention(inputs, attrs))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_online_softmax_in_float32_is_within_the_bound(block: int) -> None:
    """The other way to compute it: one pass over blocks of keys with running maximum and sums, everything float32."""
    op = OPS["attention"]
    worst = 0.0
    for case in cases("attention", "decode", "softcap", "window-", "head-dim"):
        if "lost" in case.name:
            continue
        inputs, attrs = op.make_inputs(case), op.with_defaults(case.attrs)
        q, table = inputs["q"], inputs["block_table"]
        _, kv_heads, page_size, head_dim = inputs["k_pages"].shape
        scale, y = np.float32(attrs["scale"] or head_dim**-0.5), np.zeros_like(q)
        for t in np.flatnonzero(inputs["seq_ids"] >= 0):
            p = int(inputs["positions"][t])
            first = max(0, p + 1 - attrs["window"]) if attrs["window"] else 0
            j = np.arange(first, p + 1)
            pages, slots = table[inputs["seq_ids"][t], j // page_size], j % page_size
            group = np.arange(q.shape[1]) // (q.shape[1] // kv_heads)
            k, v = (inputs[name][pages, :, slots].astype(np.float32)[:, group] for name in ("k_pages", "v_pages"))
            top, total = np.full(q.shape[1], -np.inf, np.float32), np.zeros(q.shape[1], np.float32)
            total_v = np.zeros_like(q[t])
            for start in range(0, len(j), block):
                part = slice(start, start + block)
                scores = np.einsum("hd,jhd->jh", q[t] * scale, k[part])
                if attrs["softcap"]:
                    scores = np.float32(attrs["softcap"]) * np.tanh(scores / np.float32(attrs["softcap"]))
                new = np.maximum(top, scores.max(axis=0))
                weights, rescale = np.exp(scores - new), np.exp(top - new)
                total = total * rescale + weights.sum(axis=0)
                total_v = total_v * rescale[:, None] + np.einsum("jh,jhd->hd", weights, v[part])
                top = new
            y[t] = total_v / total[:, None]
        expected = op.reference(fp64(inputs), attrs)
        depth = max(head_dim, -(-table.shape[1] * page_size // block) + block)
        bound = op.error_bound(fp64(inputs), attrs, expected, Numerics(depth=depth))["y"]
        error = np.abs(y - expected["y"])
        assert (error <= bound).all(), case.name
        worst = max(worst, float((error / np.maximum(bound, 1e-30)).max()))
    assert worst > 1e-3


# rms_norm, glu, softcap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("rms_norm", "5x123", "eps", "offset"), ids=lambda case: case.name)
def test_rms_norm_is_what_its_formula_says(case: Case) -> None:
    inputs = OPS["rms_norm"].make_inputs(case)
    attrs = OPS["rms_norm"].with_defaults(case.attrs)
    expected = np.zeros(inputs["x"].shape)
    for t, row in enumerate(inputs["x"].astype(float).tolist()):
        root = math.sqrt(math.fsum(v * v for v in row) / len(row) + attrs["eps"])
        for k, v in enumerate(row):
            expected[t, k] = v / root * (float(inputs["weight"][k]) + attrs["weight_offset"])
    assert_close(run("rms_norm", inputs, **case.attrs)["y"], expected)


GATES = {
    "silu": lambda g: -0.0 if g < -700 else g / (1 + math.exp(-g)),
    "gelu_tanh": lambda g: g * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "gelu_erf": lambda g: g * 0.5 * math.erfc(-g / math.sqrt(2)),
}


@pytest.mark.parametrize("case", cases("glu"), ids=lambda case: case.name)
def test_glu_is_what_its_formula_says(case: Case) -> None:
    inputs = OPS["glu"].make_inputs(case)
    expected = [
        GATES[case.attrs["kind"]](g) * u
        for g, u in zip(inputs["gate"].ravel().tolist(), inputs["up"].ravel().tolist(), strict=True)
    ]
    got = run("glu", inputs, **case.attrs)["y"]
    np.testing.assert_allclose(got.ravel(), expected, rtol=1e-11, atol=1e-13)


def test_softcap_is_what_its_formula_says() -> None:
    x = np.array([[-math.inf, -1e30, -45.0, -1.0, 0.0, 0.001, 30.0, 1e30, math.inf, math.nan]], np.float32)
    expected = [[30 * math.tanh(v / 30) for v in x[0].tolist()]]
    assert_close(run("softcap", {"x": x})["x"], expected)


# rope -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize(("head_dim", "rot_dim"), [(2, 2), (5, 4), (64, 64), (80, 32)])
def test_rope_turns_pairs_as_complex_numbers(pairing: str, head_dim: int, rot_dim: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 2, head_dim))
    positions = np.array([0, 31, -1, 7], np.int32)
    table = cos_sin_table(frequencies(rot_dim, 10000.0), 32)
    expected = x.copy()
    for t, h, i in np.ndindex(4, 2, rot_dim // 2):
        if positions[t] < 0:
            continue
        a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + rot_dim // 2)
        angle = positions[t] * 10000.0 ** (-2 * i / rot_dim)
        turned = complex(x[t, h, a], x[t, h, b]) * cmath.exp(1j * angle)
        expected[t, h, a], expected[t, h, b] = turned.real, turned.imag
    got = run("rope", {"x": x, "cos_sin": table, "positions": positions}, pairing=pairing)["x"]
    np.testing.assert_allclose(got, expected, atol=5e-7)  # the table is float32
    np.testing.assert_array_equal(got[2], x[2])
    np.testing.assert_array_equal(got[..., rot_dim:], x[..., rot_dim:])


def test_rope_makes_scores_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 1, 1, 64))
    table = cos_sin_table(frequencies(64, 10000.0), 200)

    def score(p: int, j: int) -> float:
        turned = [
            run("rope", {"x": x, "cos_sin": table, "positions": np.array([at], np.int32)}, pairing="half")["x"]
            for x, at in ((q, p), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(12, 5) == pytest.approx(score(107, 100), abs=1e-5)
    assert abs(score(12, 5) - score(13, 5)) > 1e-3


def test_frequencies_without_scaling_linear_and_by_factors() -> None:
    plain = [1 / 10000.0 ** (2 * i / 10) for i in range(5)]
    assert_close(frequencies(10, 10000.0), plain)
    assert_close(frequencies(10, 10000.0, RopeScaling("linear", factor=8.0)), [f / 8 for f in plain])
    factors = (1.0, 1.5, 2.0, 30.0, 64.0)
    got = frequencies(10, 10000.0, RopeScaling("factors", factors=factors))
    assert_close(got, [f / by for f, by in zip(plain, factors, strict=True)])


def test_llama3_frequencies_by_wavelength() -> None:
    """Llama 3.1: factor 8, low 1, high 4, 8192; the three ranges by wavelength, as its authors describe them."""
    scaling = RopeScaling("llama3", factor=8.0, original_context=8192)
    expected, ranges = [], set()
    for i in range(64):
        f = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            ranges.add("high")
            expected.append(f)
        elif wavelength > 8192 / 1:
            ranges.add("low")
            expected.append(f / 8)
        else:
            ranges.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    assert ranges == {"high", "low", "between"}
    assert_close(frequencies(128, 500000.0, scaling), expected)


@pytest.mark.parametrize(("dim", "base", "context", "factor"), [(128, 1e6, 32768, 4.0), (64, 1e4, 4096, 16.0)])
def test_yarn_frequencies_by_turns(dim: int, base: float, context: int, factor: float) -> None:
    """Pairs that turn more than 32 times within the original context are kept, those below 1 divided by the factor."""
    got = frequencies(dim, base, RopeScaling("yarn", factor=factor, original_context=context))
    plain = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])

    def pair_of(turns: float) -> float:
        """The i that solves context * base**(-2i/dim) = 2 pi turns, by bisection."""
        low, high = 0.0, 10.0 * dim
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if context * base ** (-2 * middle / dim) > 2 * math.pi * turns else (low, middle)
        return low

    first, last = math.floor(pair_of(32)), math.ceil(pair_of(1))
    assert 0 < first < last < dim // 2
    for i in range(dim // 2):
        share = min(max((i - first) / (last - first), 0), 1)  # of interpolation
        assert got[i] == pytest.approx(plain[i] * (1 - share) + plain[i] / factor * share, rel=1e-12)
    assert got[0] == plain[0]
    assert got[-1] == pytest.approx(plain[-1] / factor)


def test_attention_factor_and_table() -> None:
    assert attention_factor(RopeScaling("yarn", factor=4.0)) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(RopeScaling("yarn", factor=4.0, attention_factor=1.2)) == 1.2
    assert attention_factor(RopeScaling("linear", factor=4.0)) == 1.0
    table = cos_sin_table(np.array([1.0, 0.01]), 100_001, 1.5)
    assert table.shape == (100_001, 4)
    assert table.dtype == np.float32
    at = [math.cos(1e5), math.cos(1e3), math.sin(1e5), math.sin(1e3)]
    np.testing.assert_allclose(table[100_000], [1.5 * v for v in at], rtol=1e-6)


def test_frequencies_refuse_what_they_cannot_use() -> None:
    for call, message in (
        (lambda: frequencies(7, 1e4), "rope: 7 rotated dimensions; expected a positive even number"),
        (lambda: frequencies(8, 1e4, RopeScaling("factors", factors=(1.0,))), "rope: 1 factors for 4 frequencies"),
        (
            lambda: frequencies(8, 1e4, RopeScaling("yarn", factor=2.0)),
            "rope: yarn scaling needs original_context, the context length of training",
        ),
    ):
        with pytest.raises(ContractError) as error:
            call()
        assert str(error.value) == message


# kv_append, embedding, gather, advance --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("kv_append"), ids=lambda case: case.name)
def test_kv_append_writes_each_token_to_its_slot(case: Case) -> None:
    inputs = OPS["kv_append"].make_inputs(case)
    page_size, written, skipped = case.dims["S"], set(), 0
    expected = {name: inputs[name].copy() for name in ("k_pages", "v_pages")}
    for t, (seq, p) in enumerate(zip(inputs["seq_ids"].tolist(), inputs["positions"].tolist(), strict=True)):
        page, slot = page_of(inputs, seq, p), p % page_size
        if page is None:
            skipped += 1
            continue
        written.add((page, slot))
        for kv_head in range(case.dims["G"]):
            expected["k_pages"][page, kv_head, slot] = inputs["k"][t, kv_head]
            expected["v_pages"][page, kv_head, slot] = inputs["v"][t, kv_head]
    assert len(written) == len(inputs["positions"]) - skipped
    assert bool(skipped) == any(case.dims.get(flag) for flag in ("pad", "beyond", "lost"))
    op = OPS["kv_append"]
    outputs = op.reference(inputs, {})
    bound = op.error_bound(fp64(inputs), {}, op.reference(fp64(inputs), {}), Numerics())
    for name, pages in expected.items():
        np.testing.assert_array_equal(outputs[name], pages, strict=True)
        slots = np.zeros((pages.shape[0], page_size), bool)
        slots[tuple(np.transpose(list(written)))] = True
        assert not bound[name].swapaxes(1, 2)[~slots].any()
        is_half = pages.dtype == np.float16
        assert (bound[name].swapaxes(1, 2)[slots] > 0).all() == is_half


@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q6_K"])
def test_embedding_takes_rows_and_scales_them(name: str) -> None:
    weight = random_weight(np.random.default_rng(1), name, 7, 256, "normal")
    ids = np.array([6, 0, -1, 7, 6, -(2**31)], np.int32)
    got = OPS["embedding"].reference({"token_ids": ids, "w": weight}, {"scale": 3.0})["y"]
    dense = weight.dense()
    zero = np.zeros(256)
    np.testing.assert_allclose(got, [dense[6] * 3, dense[0] * 3, zero, zero, dense[6] * 3, zero], rtol=1e-7)


def test_gather_and_advance() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    got = OPS["gather"].reference({"x": x, "rows": np.array([2, -1, 0, 3], np.int32)}, {})["y"]
    np.testing.assert_array_equal(got, np.array([[4, 5], [0, 0], [0, 1], [0, 0]], np.float32), strict=True)
    moved = {"positions": np.array([4, -1, 9], np.int32), "seq_ids": np.array([0, -1, 2], np.int32)}
    positions = OPS["advance"].reference(moved, {})["positions"]
    np.testing.assert_array_equal(positions, np.array([5, -1, 10], np.int32), strict=True)


# dequantize -----------------------------------------------------------------------------------------------------------


def plain_block(fmt: str, data: bytes) -> list[float]:
    """One block by the layouts in ggml-common.h of ggml-org/ggml at d99724f: low nibbles are the first half."""
    half = lambda at: float(np.frombuffer(data[at : at + 2], "<f2")[0])  # noqa: E731
    has_min = fmt.endswith("_1")
    d, m, rest = half(0), half(2) if has_min else 0.0, data[4 if has_min else 2 :]
    if fmt == "Q8_0":
        return [d * int(np.int8(np.uint8(b))) for b in rest]
    high = [0] * 32
    if fmt.startswith("Q5"):
        bits, rest = int.from_bytes(rest[:4], "little"), rest[4:]
        high = [(bits >> i & 1) * 16 for i in range(32)]
    quants = [(rest[i] & 15 if i < 16 else rest[i - 16] >> 4) + high[i] for i in range(32)]
    zero = {"Q4_0": 8, "Q5_0": 16}.get(fmt, 0)
    return [d * (quant - zero) + m for quant in quants]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_dequantize_reads_blocks_as_their_layout_says(name: str) -> None:
    weight = random_weight(np.random.default_rng(2), name, 3, 96, "normal")
    blocks = weight.data.reshape(-1, FORMATS[name].block_bytes)
    expected = [plain_block(name, block.tobytes()) for block in blocks]
    got = OPS["dequantize"].reference({"w": weight}, {})["y"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.reshape(expected, (3, 96)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_dequantize_widens_floats_exactly(name: str) -> None:
    values = np.array([[1.0, -2.5, 0.0, 3.0e-5, 65280.0]], np.float32)
    weight = Weight.from_array(values, name)
    expected = {"F32": values, "F16": values.astype(np.float16).astype(np.float32)}.get(name)
    if expected is None:  # bfloat16: the upper half of a float32, rounded to nearest even
        bits = values.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
        expected = bits.astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(OPS["dequantize"].reference({"w": weight}, {})["y"], expected, strict=True)


# argmax, sample -------------------------------------------------------------------------------------------------------


def test_argmax_rules() -> None:
    nan, inf = np.nan, np.inf
    rows = [
        [1, 3, 3, 2],
        [nan, 1, nan, 1],
        [nan] * 4,
        [-inf] * 4,
        [nan, -inf, nan, -inf],
        [-3, -1, -2, -1],
        [0, inf, 5, inf],
    ]
    got = OPS["argmax"].reference({"x": np.array(rows, np.float32)}, {})["ids"]
    np.testing.assert_array_equal(got, np.array([1, 1, 0, 0, 0, 1, 1], np.int32), strict=True)


def test_philox_known_answers() -> None:
    """tests/kat_vectors of Random123 1.14.0, rows `philox4x32 10`."""
    rows = (
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    )
    given, expected = (np.array([[int(w, 16) for w in row[i].split()] for row in rows], np.uint32) for i in (0, 1))
    np.testing.assert_array_equal(philox4x32(given[:, :4], given[:, 4:]), expected, strict=True)


def plain_sample(logits: list[float], params: list[float], u: float) -> int:
    """One row in float64, with sets of ids, one token at a time."""
    temperature, k, top_p, min_p = params
    if not (0 < temperature < math.inf and math.isfinite(max(logits))):
        return logits.index(max(logits))
    p = [math.exp((x - max(logits)) / temperature) for x in logits]
    kept = set(range(len(p)))
    if 1 <= k < len(logits):
        kth = sorted(logits)[-int(k)]
        kept = {i for i in kept if logits[i] >= kth}
    if top_p < 1:
        remaining = math.fsum(p[i] for i in kept)
        for threshold in sorted({p[i] for i in kept}, reverse=True):
            candidates = {i for i in kept if p[i] >= threshold}
            if math.fsum(p[i] for i in candidates) >= top_p * remaining:
                kept = candidates
                break
    if min_p > 0:
        kept = {i for i in kept if p[i] >= min(min_p, 1) * max(p)}
    total, reached = math.fsum(p[i] for i in kept), 0.0
    for i in sorted(kept):
        reached += p[i]
        if reached > u * total:
            return i
    return max(kept)


@pytest.mark.parametrize("case", [c for c in cases("sample") if c.dims["V"] <= 1000], ids=lambda case: case.name)
def test_sample_is_what_its_words_say(case: Case) -> None:
    inputs = OPS["sample"].make_inputs(case)
    outputs = OPS["sample"].reference(inputs, {})
    for t, u in enumerate(uniform(inputs["rng"])):
        row = np.where(np.isnan(inputs["x"][t]), -np.inf, inputs["x"][t]).astype(np.float64)
        assert outputs["ids"][t] == plain_sample(row.tolist(), inputs["params"][t].tolist(), u)
    np.testing.assert_array_equal(outputs["rng"][:, 0], inputs["rng"][:, 0])
    np.testing.assert_array_equal(outputs["rng"][:, 1], inputs["rng"][:, 1] + np.uint32(1))
    assert outputs["rng"][-1, 1] == 0  # the largest counter wraps


def float32_sample(x: Array, params: Array, rng: Array) -> Array:
    """A kernel's way: everything in float32, sums one by one, the threshold of top_p found by bisection."""
    ids = np.zeros(len(x), np.int32)
    for t, u in enumerate(uniform(rng).astype(np.float32)):
        temperature, k, top_p, min_p = params[t]
        p = np.exp2((x[t] / temperature - x[t].max() / temperature) * np.float32(math.log2(math.e)))
        if 0 < k < len(p):
            p[x[t] < np.sort(x[t])[-int(k)]] = 0
        if top_p < 1:
            low, high, need = np.float32(0), p.max(), top_p * np.cumsum(p)[-1]
            for _ in range(40):
                middle = (low + high) / np.float32(2)
                low, high = (middle, high) if p[p >= middle].cumsum()[-1] >= need else (low, middle)
            p[p < low] = 0
        p[p < min_p * p.max()] = 0
        reached = np.cumsum(p)
        ids[t] = int(np.argmax(reached > u * reached[-1]))
    return ids


def test_float32_draws_are_accepted_and_wrong_ones_are_not() -> None:
    op = OPS["sample"]
    rng = np.random.default_rng(5)
    rows, vocab = 1500, 123
    x = (rng.standard_normal((rows, vocab)) * 2).astype(np.float32)
    settings = np.array(
        [(1, 0, 1, 0), (0.7, 40, 0.95, 0.05), (1.3, 20, 1, 0), (1, 0, 0.8, 0), (1, 0, 1, 0.1)], np.float32
    )
    inputs = {
        "x": x,
        "params": settings[np.arange(rows) % len(settings)],
        "rng": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    }
    expected = op.reference(inputs, {})
    ids = float32_sample(x, inputs["params"], inputs["rng"])
    numerics = Numerics(depth=vocab)
    assert op.check is not None
    assert op.check(fp64(inputs), {}, expected, {**expected, "ids": ids}, numerics) is None

    refused = 0
    for row in range(200):
        wrong = expected["ids"].copy()
        wrong[row] = (wrong[row] + 1) % vocab
        message = op.check(fp64(inputs), {}, expected, {**expected, "ids": wrong}, numerics)
        refused += message is not None and message.startswith(f"ids[{row}] is {wrong[row]}, expected {wrong[row] - 1}")
    assert refused >= 195  # the next id may lie within rounding of u


def test_sample_check_allows_both_sides_of_a_border_and_no_more() -> None:
    """u within rounding of the border between two tokens: either is right, a third is not."""
    op = OPS["sample"]
    state = np.array([[1, 2]], np.uint32)
    u = float(uniform(state)[0])
    x = np.log(np.array([[u, 1 - u, 1e-6]])).astype(np.float32)  # the border between ids 0 and 1 is at u
    inputs = {"x": x, "params": np.array([[1, 0, 1, 0]], np.float32), "rng": state}
    expected = op.reference(inputs, {})
    assert op.check is not None
    messages = [
        op.check(fp64(inputs), {}, expected, {**expected, "ids": np.array([i], np.int32)}, Numerics(depth=3))
        for i in range(3)
    ]
    assert messages[:2] == [None, None]
    assert messages[2] is not None
    assert "outside its share" in messages[2]


def test_sample_draws_in_proportion() -> None:
    """30,000 draws from one row: each count within five standard deviations."""
    rows, p = 30_000, np.array([0.5, 0.25, 0.15, 0.1])
    state = np.stack([np.full(rows, 7), np.arange(rows)], axis=1).astype(np.uint32)
    x = np.broadcast_to(np.log(p).astype(np.float32), (rows, 4))
    params = np.broadcast_to(np.array([1, 0, 1, 0], np.float32), (rows, 4))
    ids = OPS["sample"].reference({"x": x, "params": params, "rng": state}, {})["ids"]
    counts = np.bincount(ids, minlength=4)
    assert (np.abs(counts - rows * p) < 5 * np.sqrt(rows * p * (1 - p))).all()


# fused ops ------------------------------------------------------------------------------------------------------------


def test_fused_ops_are_their_parts_in_a_row() -> None:
    for name in ("rms_norm_gemm", "rms_norm_gemm_glu", "gemm_add"):
        op = OPS[name]
        for case in op.cases[::7]:
            inputs = op.make_inputs(case)
            attrs = case_signature(op, case, inputs).attrs
            got = op.reference(fp64(inputs), attrs)["y"]
            x = inputs["x"].astype(np.float64)
            if "weight" in inputs:
                norm = np.sqrt((x * x).mean(axis=1, keepdims=True) + attrs["eps"])
                x = x / norm * (inputs["weight"] + np.float64(attrs["weight_offset"]))
            products = {k: np.einsum("tk,nk->tn", x, v.dense()) for k, v in inputs.items() if isinstance(v, Weight)}
            if name == "rms_norm_gemm_glu":
                gate = np.vectorize(GATES[attrs["kind"]])(products["w_gate"])
                assert_close(got, gate * products["w_up"])
            else:
                assert_close(got, products["w"] + inputs.get("bias", 0.0) + inputs.get("y", 0.0))
