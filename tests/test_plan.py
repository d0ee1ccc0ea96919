"""Plans and steps: what runs where and why, and that a program computes the same whichever way it is run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from polykern.backends.null import NullBackend
from polykern.backends.reference import ReferenceBackend
from polykern.kernels.errors import ContractError, DeviceError, UnsupportedOp, UsageError
from polykern.kernels.op import Numerics, Signature
from polykern.kernels.ops import OPS
from polykern.kernels.program import Program, View
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import Backend, DeviceInfo, Kernel, Launch, Unsupported
from polykern.runtime.plan import plan
from polykern.runtime.step import Executable

H, G, D, S, K, V, PAGES = 4, 2, 16, 4, 64, 37, 8
FUSED = ("rms_norm_gemm", "rope_kv_append", "gemm_add", "rms_norm_gemm_glu")


@dataclass
class Picky(ReferenceBackend):
    """The reference backend, refusing what `refuses` names; `captured` lists the lengths of captured runs."""

    refuses: Mapping[str, str] = field(default_factory=dict)
    captured: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        self.asked.append(str(signature))
        if signature.op in self.refuses:
            return Unsupported(signature.op, self.refuses[signature.op])
        return super().supports(signature)

    def capture(self, launches: Sequence[Launch]) -> Launch:
        self.captured.append(len(launches))
        return super().capture(launches)


def picky(*ops: str, reason: str = "no such kernel") -> Picky:
    return Picky(DeviceInfo("picky"), "picky", refuses=dict.fromkeys(ops, reason))


def null() -> NullBackend:
    return NullBackend(DeviceInfo("null"))


def layer(tokens: int, name: str = "decode", prefix: str = "") -> Program:
    """One decoder layer on `tokens` rows, logits and ids: fused QKV in one buffer, tied embedding, paged cache."""
    p = Program(name)
    ids = p.buffer(f"{prefix}token_ids", (tokens,), "i32", "state")
    positions = p.buffer(f"{prefix}positions", (tokens,), "i32", "state")
    seq_ids = p.buffer(f"{prefix}seq_ids", (tokens,), "i32", "state")
    batch = {"block_table": p.buffer("block_table", (2, PAGES // 2), "i32", "state")}
    batch |= {"seq_ids": seq_ids, "positions": positions}
    pages = {n: p.buffer(n, (PAGES, G, S, D), "f16", "state") for n in ("k_pages", "v_pages")}
    embed = p.buffer("embed", (V, K), "Q8_0", "weight")
    norm = p.buffer("norm", (K,), "f32", "weight")
    x = p.buffer("x", (tokens, K), "f32")
    width = (H + 2 * G) * D
    qkv = p.buffer("qkv", (tokens, width), "f32")
    q = View("qkv", (tokens, H, D), "f32", 0, width)
    k = View("qkv", (tokens, G, D), "f32", H * D, width)
    v = View("qkv", (tokens, G, D), "f32", (H + G) * D, width)
    y = p.buffer("attn", (tokens, H, D), "f32")
    act = p.buffer("act", (tokens, 2 * K), "f32")
    logits = p.buffer(f"{prefix}logits", (tokens, V), "f32", "state")

    p.call("embedding", {"token_ids": ids, "w": embed, "y": x}, label="embed")
    w_qkv = p.buffer("w_qkv", (width, K), "Q4_1", "weight")
    p.call("rms_norm_gemm", {"x": x, "weight": norm, "w": w_qkv, "y": qkv}, {"eps": 1e-6}, "blk.0.attn_qkv")
    cos_sin = p.buffer("cos_sin", (PAGES * S, D), "f32", "weight")
    p.call(
        "rope_kv_append",
        {"q": q, "k": k, "v": v, "cos_sin": cos_sin, **batch, **pages},
        {"pairing": "half"},
        "blk.0.rope",
    )
    p.call("attention", {"q": q, **pages, **batch, "y": y}, label="blk.0.attn")
    w_o = p.buffer("w_o", (K, H * D), "F16", "weight")
    p.call("gemm_add", {"x": y.reshape(tokens, H * D), "w": w_o, "y": x}, label="blk.0.attn_out")
    gate, up = (p.buffer(n, (2 * K, K), "Q6_K" if K % 256 == 0 else "Q5_0", "weight") for n in ("w_gate", "w_up"))
    p.call("rms_norm_gemm_glu", {"x": x, "weight": norm, "w_gate": gate, "w_up": up, "y": act}, label="blk.0.glu")
    down = p.buffer("w_down", (K, 2 * K), "F32", "weight")
    p.call("gemm_add", {"x": act, "w": down, "y": x}, label="blk.0.down")
    p.call("rms_norm_gemm", {"x": x, "weight": norm, "w": embed, "y": logits}, label="logits")
    p.call("argmax", {"x": logits, "ids": ids}, label="sample")
    p.call("advance", {"positions": positions, "seq_ids": seq_ids}, label="advance")
    return p


def weights(program: Program) -> dict[str, Weight | Array]:
    rng = np.random.default_rng(7)
    made: dict[str, Weight | Array] = {}
    for spec in program.buffers.values():
        if spec.kind != "weight":
            continue
        values = rng.standard_normal(spec.shape).astype(np.float32) / 4
        if spec.dtype == "f32":
            made[spec.name] = np.cos(values) if spec.name == "cos_sin" else 1 + values
        elif FORMATS[spec.dtype].is_float:
            made[spec.name] = Weight.from_array(values, spec.dtype)
        else:
            import gguf

            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(FORMATS[spec.dtype].gguf_type))
            made[spec.name] = Weight(FORMATS[spec.dtype], spec.shape, data)
    return made


def load(backend: Backend, *programs: Program, progress: Any = None) -> tuple[Executable, list[Any]]:
    """An executable with all weights and compiled steps, state as after `start`."""
    exe = Executable(backend, progress)
    for name, value in weights(programs[0]).items():
        exe.add_weight(name, value)
    steps = [exe.compile(plan(p, backend, "allow")) for p in programs]
    exe.write("block_table", np.array([[5, 2, 7, 0], [1, 3, 4, 6]], np.int32))
    for name in ("k_pages", "v_pages"):
        exe.write(name, np.full((PAGES, G, S, D), np.nan, np.float16))
    return exe, steps


def start(exe: Executable, prefix: str = "") -> None:
    """A ragged batch: three tokens of one sequence, one of another, one row of padding."""
    exe.write(f"{prefix}token_ids", np.array([3, 36, 0, 11, -1], np.int32))
    exe.write(f"{prefix}positions", np.array([0, 1, 2, 0, -1], np.int32))
    exe.write(f"{prefix}seq_ids", np.array([0, 0, 0, 1, -1], np.int32))


def outcome(backend: Backend, runs: int = 2) -> dict[str, Array]:
    """Everything the layer leaves behind after some runs."""
    exe, (step,) = load(backend, layer(5))
    start(exe)
    for _ in range(runs):
        step.run()
    return {name: exe.read(name) for name in ("logits", "token_ids", "positions", "k_pages", "v_pages")}


@pytest.fixture(scope="module")
def native() -> dict[str, Array]:
    return outcome(picky())


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ((), {"native": 10, "decomposed": 0, "reference": 0}),
        (FUSED, {"native": 4, "decomposed": 6, "reference": 0}),
        (("attention",), {"native": 9, "decomposed": 0, "reference": 1}),
        (("attention", "rope_kv_append", "kv_append"), {"native": 8, "decomposed": 0, "reference": 2}),
        ((*FUSED, "rms_norm"), {"native": 4, "decomposed": 3, "reference": 3}),
        ((*FUSED, "rope", "kv_append", "argmax"), {"native": 3, "decomposed": 5, "reference": 2}),
        (tuple(OPS), {"native": 0, "decomposed": 0, "reference": 10}),
    ],
    ids=lambda value: "-".join(value)[:40] or "nothing" if isinstance(value, tuple) else "",
)
def test_same_result_whatever_is_refused(
    refused: tuple[str, ...], expected: dict[str, int], native: dict[str, Array]
) -> None:
    backend = picky(*refused)
    assert plan(layer(5), backend, "allow").counts() == expected
    got = outcome(picky(*refused))
    assert set(got) == set(native)
    for name, value in native.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_allclose(got[name], value, rtol=2e-3 if value.dtype == np.float16 else 1e-4, atol=1e-4)
    assert np.isfinite(got["logits"]).all()
    assert got["positions"].tolist() == [2, 3, 4, 2, -1]


def test_launches_between_host_calls_are_captured_as_one() -> None:
    backend = picky("attention")
    outcome(backend)
    assert backend.captured == [3, 6]
    backend = picky()
    outcome(backend)
    assert backend.captured == [10]
    backend = picky(*OPS)
    outcome(backend)
    assert backend.captured == []


def test_a_backend_is_asked_once_per_signature() -> None:
    backend = picky()
    program = layer(1)
    for _ in range(3):
        program.calls += layer(1).calls
    plan(program, backend)
    assert len(backend.asked) == len(set(backend.asked)) == 10


def test_rows_say_what_and_why() -> None:
    backend = picky("rms_norm_gemm", "rms_norm", "attention", reason="head_dim 16 is odd")
    rows = plan(layer(2), backend, "allow").rows()
    json.dumps(rows)
    by_label = {row["label"]: row for row in rows}
    assert len(rows) == len(by_label) == 10
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    embed = by_label["embed"]
    assert (embed["how"], embed["kernel"], embed["reason"]) == ("native", "numpy.embedding.f32", "")
    assert by_label["blk.0.attn"]["how"] == "reference"
    assert by_label["blk.0.attn"]["kernel"] == "reference"
    assert by_label["blk.0.attn"]["reason"] == "head_dim 16 is odd"
    qkv = by_label["blk.0.attn_qkv"]
    assert qkv["how"] == "reference"  # a part of it leaves the device
    assert qkv["kernel"] == "reference + numpy.gemm.f32"
    assert [(part["op"], part["how"]) for part in qkv["parts"]] == [("rms_norm", "reference"), ("gemm", "native")]
    assert qkv["bytes"] == sum(part["bytes"] for part in qkv["parts"])


def test_decomposition_into_native_calls_is_no_fallback() -> None:
    made = plan(layer(2), picky(*FUSED), "error")
    assert made.counts() == {"native": 4, "decomposed": 6, "reference": 0}
    assert made.rows()[1]["how"] == "decomposed"
    assert made.rows()[1]["reason"] == "no such kernel"


def test_policy_error() -> None:
    backend = picky("attention", "argmax", reason="too wide")
    with pytest.raises(UnsupportedOp) as error:
        plan(layer(2), backend, "error")
    text = str(error.value)
    assert text.startswith("picky refuses 2 of 10 calls of decode (")
    assert "attention: too wide (1x); argmax: too wide (1x)" in text
    assert text.endswith("; --fallback warn runs them on the host")
    with pytest.raises(UnsupportedOp, match=r"; and 2 more reasons; --fallback warn"):
        plan(layer(2), picky("attention", "argmax", "advance", "embedding", "gemm_add", "gemm"), "error")


def test_policy_warn_and_allow(caplog: pytest.LogCaptureFixture) -> None:
    backend = picky("attention")
    with caplog.at_level(logging.WARNING):
        plan(layer(2), backend, "allow")
        plan(layer(2), picky(*FUSED))
        assert caplog.messages == []
        plan(layer(2), backend)
    (message,) = caplog.messages
    assert message.startswith("picky leaves 1 of 10 calls of decode (")
    assert message.endswith("of the bytes) to the host, slowly: attention: no such kernel (1x)")


def test_policy_unknown() -> None:
    with pytest.raises(UsageError, match=r"^fallback is 'never'; use one of error, warn, allow$"):
        plan(layer(1), null(), "never")  # type: ignore[arg-type]


def test_supports_that_raises_is_a_refusal() -> None:
    backend = null()
    backend.supports = lambda signature: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(UnsupportedOp, match=r"supports\(\) raised ZeroDivisionError: division by zero"):
        plan(layer(1), backend, "error")
    backend.supports = lambda signature: None  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(UnsupportedOp, match=r"supports\(\) returned NoneType"):
        plan(layer(1), backend, "error")


def broken(**changes: Any) -> Program:
    program = Program("broken")
    x = program.buffer("x", (3, 4), "f32")
    args: dict[str, Any] = {"x": x, "y": program.buffer("y", (3, 4), "f32"), **changes}
    program.call("add", {name: view for name, view in args.items() if view is not None}, label="here")
    return program


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"y": None}, "here: add: y [tokens, features] is missing"),
        ({"y": View("z", (3, 4), "f32")}, "here: y: no buffer 'z' in the program"),
        ({"y": View("y", (3, 4), "f32", 1)}, "here: y: view [3, 4] at 1, row stride 4, does not fit buffer y [3, 4]"),
        ({"y": View("y", (3, 4), "f32", -1)}, "here: y: view [3, 4] at -1, row stride 4, does not fit buffer y [3, 4]"),
        ({"y": View("y", (3, 4), "f32", 0, 5)}, "here: y: view [3, 4] at 0, row stride 5, does not fit buffer y"),
        ({"y": View("y", (3, 4), "f32", 0, 3)}, "here: y: view [3, 4] at 0, row stride 3, does not fit buffer y"),
        ({"y": View("y", (3, 4), "f16")}, "here: add: y is f16, expected f32"),
        ({"y": View("y", (4, 3), "f32")}, "here: add: "),
    ],
)
def test_programs_that_break_the_contract(changes: dict[str, Any], text: str) -> None:
    for backend in (null(), picky(*OPS)):
        with pytest.raises(ContractError) as error:
            plan(broken(**changes), backend, "allow")
        assert str(error.value).startswith(text), error.value


def test_views_at_the_very_end_fit() -> None:
    made = plan(broken(y=View("y", (2, 4), "f32", 4), x=View("x", (2, 4), "f32", 4)), null())
    assert made.counts()["native"] == 1
    made = plan(broken(y=View("y", (2, 4), "f32", 0, 8), x=View("x", (2, 4), "f32")), null())
    assert made.counts()["native"] == 1


def test_unknown_op() -> None:
    program = Program("p")
    program.call("matmul", {"x": program.buffer("x", (1, 1), "f32")})
    with pytest.raises(ContractError, match=r"^matmul: no op 'matmul'; the contract has "):
        plan(program, null())


def test_a_view_of_another_dtype_than_its_buffer() -> None:
    program = Program("p")
    program.buffer("y", (3, 4), "f16")
    program.call("add", {"x": program.buffer("x", (3, 4), "f32"), "y": View("y", (3, 4), "f32")})
    with pytest.raises(ContractError, match=r"^add: y: f32 view of buffer y, which is f16$"):
        plan(program, null())


# Steps


def test_launches_run_in_order_and_again() -> None:
    backend = null()
    exe, (step,) = load(backend, layer(5))
    step.run()
    step.run()
    labels = [call.label for call in layer(5).calls]
    assert [launch.label for launch in backend.launches] == labels * 2
    qkv = backend.launches[2].tensors
    assert [(qkv[n].offset, qkv[n].row_stride) for n in "qkv"] == [(0, 128), (64, 128), (96, 128)]
    assert qkv["q"].buffer is qkv["k"].buffer
    assert qkv["cos_sin"].row_stride == D
    assert backend.launches[1].attrs["eps"] == 1e-6
    assert backend.launches[1].attrs["precision"] == "exact"
    assert exe.read("logits").shape == (5, V)


def test_steps_share_weights_and_state() -> None:
    """Three tokens in one chunk, or one after the other through the decode program: the same next token and cache."""

    def after(chunked: bool) -> tuple[list[int], Array, Array]:
        exe, (decode, prefill) = load(picky("kv_append", "rope_kv_append"), layer(1), layer(3, "prefill", "p."))
        exe.write("seq_ids", np.zeros(1, np.int32))
        if chunked:
            exe.write("p.token_ids", np.array([3, 36, 0], np.int32))
            exe.write("p.positions", np.arange(3, dtype=np.int32))
            exe.write("p.seq_ids", np.zeros(3, np.int32))
            prefill.run()
            exe.write("token_ids", exe.read("p.token_ids", (1,), 2))
            exe.write("positions", np.array([3], np.int32))
        else:
            for position, token in enumerate([3, 36, 0]):
                exe.write("token_ids", np.array([token], np.int32))
                exe.write("positions", np.array([position], np.int32))
                decode.run()
        ids = []
        for _ in range(4):
            ids.append(int(exe.read("token_ids")[0]))
            decode.run()
        return ids, exe.read("k_pages"), exe.read("logits")

    (ids, pages, logits), (other_ids, other_pages, other_logits) = after(True), after(False)
    assert ids == other_ids
    np.testing.assert_allclose(pages, other_pages, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(logits, other_logits, rtol=1e-4, atol=1e-4)


def test_weights_are_packed_once_with_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    backend = picky()
    packed: list[Weight] = []
    pack = backend.pack

    def counting(weight: Weight) -> Any:
        packed.append(weight)
        return pack(weight)

    backend.pack = counting  # type: ignore[method-assign]
    load(backend, layer(1), layer(3, "prefill", "p."), progress=lambda *args: seen.append(args))
    assert len(packed) == 6
    assert seen[:9] == [("pack", done, 8) for done in range(9)]


def test_weights_only_used_on_the_host_are_not_packed() -> None:
    backend = picky("embedding")
    backend.pack = lambda weight: pytest.fail(f"packed {weight.format.name}")  # type: ignore[method-assign]
    program = Program("lookup")
    embed, y = program.buffer("embed", (V, K), "Q8_0", "weight"), program.buffer("y", (2, K), "f32", "state")
    program.call("embedding", {"token_ids": program.buffer("ids", (2,), "i32", "state"), "w": embed, "y": y})
    exe = Executable(backend)
    weight = weights(layer(1))["embed"]
    exe.add_weight("embed", weight)
    step = exe.compile(plan(program, backend, "allow"))
    exe.write("ids", np.array([36, 5], np.int32))
    step.run()
    assert isinstance(weight, Weight)
    np.testing.assert_array_equal(exe.read("y"), weight.dense()[[36, 5]])


def test_weights_made_when_needed() -> None:
    backend, program = picky(), layer(5)
    exe = Executable(backend)
    made: list[str] = []
    for name, value in weights(program).items():
        exe.add_weight(name, lambda name=name, value=value: made.append(name) or value)
    assert made == []
    exe.compile(plan(program, backend))
    assert sorted(made) == sorted(weights(program))


def test_missing_weight() -> None:
    backend, program = null(), layer(1)
    with pytest.raises(ContractError, match=r"^weight 'embed' Q8_0\[37, 64\] was not added, or released$"):
        Executable(backend).compile(plan(program, backend))


def test_a_large_model_takes_no_memory_on_null() -> None:
    program = Program("large")
    x, w = program.buffer("x", (1, 1 << 20), "f32"), program.buffer("w", (1 << 20, 1 << 20), "Q4_0", "weight")
    program.call("gemm", {"x": x, "w": w, "y": program.buffer("y", (1, 1 << 20), "f32", "state")})
    program.buffer("k_pages", (1 << 20, 1 << 10, 16, 128), "f16", "state")
    made = plan(program, null(), "error")
    assert made.nbytes > 500e9
    assert made.rows()[0]["share"] == 1.0


def test_errors_of_executables() -> None:
    backend = null()
    exe, (step,) = load(backend, layer(5))
    for action, text in [
        (lambda: exe.add_weight("embed", np.zeros(1)), "weight 'embed' was added before"),
        (lambda: exe.read("nothing"), "no state buffer 'nothing' in any compiled program"),
        (lambda: exe.read("x"), "no state buffer 'x' in any compiled program"),
        (lambda: step.read("nothing"), "decode has no buffer 'nothing'"),
        (lambda: exe.read("embed"), "buffer embed is a packed Q8_0 weight and cannot be read back"),
        (lambda: exe.write("positions", np.zeros(5)), "buffer positions is i32, the array float64"),
        (lambda: exe.write("positions", np.zeros(6, np.int32)), "6 elements at 0 do not fit buffer positions [5]"),
        (lambda: exe.write("positions", np.zeros(5, np.int32), 1), "5 elements at 1 do not fit buffer positions [5]"),
        (lambda: exe.read("positions", (5,), 1), "5 elements at 1 do not fit buffer positions [5]"),
        (lambda: exe.read("positions", (5,), -1), "5 elements at -1 do not fit buffer positions [5]"),
        (
            lambda: exe.compile(plan(layer(5), null())),
            "decode was planned for another open backend than it is compiled on",
        ),
    ]:
        with pytest.raises(ContractError) as error:
            action()
        assert str(error.value) == text
    exe.write("positions", np.zeros(1, np.int32), 4)
    assert step.read("x", (2, K), K).shape == (2, K)


def test_buffers_declared_otherwise() -> None:
    backend = null()
    exe, _ = load(backend, layer(5))
    with pytest.raises(
        ContractError, match=r"^buffer token_ids is .*\(5,\).* in one program and .*\(3,\).* in another"
    ):
        exe.compile(plan(layer(3), backend))


def test_misshapen_weight() -> None:
    backend, program = null(), layer(1)
    exe = Executable(backend)
    for name, value in weights(program).items():
        exe.add_weight(name, value[:-1] if name == "norm" else value)  # type: ignore[index]
    with pytest.raises(ContractError, match=r"^weight 'norm' is f32\[63\], the program wants f32\[64\]$"):
        exe.compile(plan(program, backend))


def test_released_weights() -> None:
    backend = null()
    exe, _ = load(backend, layer(1))
    exe.release_weights()
    exe.compile(plan(layer(3, "prefill", "p."), backend))
    other = layer(3, "more", "m.")
    new = other.buffer("new", (V, K), "Q8_0", "weight")
    other.calls = []
    other.call("embedding", {"token_ids": View("m.token_ids", (3,), "i32"), "w": new, "y": View("x", (3, K), "f32")})
    with pytest.raises(ContractError, match=r"^weight 'new' Q8_0\[37, 64\] was not added, or released$"):
        exe.compile(plan(other, backend))


def test_a_promise_that_bind_breaks() -> None:
    backend = null()
    backend.bind = lambda call: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(DeviceError) as error:
        load(backend, layer(1))
    assert str(error.value) == (
        "null failed binding embed, which it had accepted as null.embedding: ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("pack", r"null failed packing \S+ Q\S+ \[\d+, 64\]: ZeroDivisionError: division by zero"),
        ("alloc", r"null failed packing norm f32 \[64\]: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_backend_raises_while_loading_is_its_own_error(method: str, text: str) -> None:
    backend = null()
    setattr(backend, method, lambda *_: 1 / 0)
    with pytest.raises(DeviceError, match=f"^{text}$"):
        load(backend, layer(1))


def test_what_a_launch_raises_is_the_backends_error() -> None:
    backend = null()
    backend.capture = lambda launches: lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    _, (step,) = load(backend, layer(1))
    with pytest.raises(DeviceError, match=r"^null failed running decode: ZeroDivisionError: division by zero$"):
        step.run()


def test_scratch_is_shared_where_it_is_large_enough() -> None:
    backend = null()
    _, (large, small, larger) = load(backend, layer(5), layer(1, "one", "1."), layer(9, "nine", "9."))
    assert large.buffers["x"][0] is small.buffers["x"][0]
    assert large.buffers["x"][0] is not larger.buffers["x"][0]
    assert large.buffers["k_pages"][0] is larger.buffers["k_pages"][0]


def test_kernel_numerics_are_not_needed_to_plan() -> None:
    backend = null()
    backend.supports = lambda signature: Kernel("k", Numerics())  # type: ignore[method-assign]
    assert plan(layer(1), backend).counts()["native"] == 10
