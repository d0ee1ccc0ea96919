"""A model's meaning: logits against a plain second implementation, and refusals of what cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain_llama
import pytest
from gguf_image import F32, Image, Key, Tensor
from polykern.backends import open_backend
from polykern.backends.null import NullBackend
from polykern.kernels.errors import ModelError, ModelFormatError, UsageError
from polykern.kernels.quant import FORMATS
from polykern.kernels.spi import DeviceInfo
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import add_weights, bytes_per_token, check_memory, load, weight_bytes
from polykern.runtime.model import build_program, qkv_groups
from polykern.runtime.plan import plan
from polykern.runtime.programs import chunk_sizes
from polykern.runtime.settings import Sampling, Settings
from polykern.runtime.step import Executable
from tiny_llama import llama_image, random_blocks

Write = Callable[[Image], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(image: Image) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(image.encode())
        return path

    return to_file


def tokens(image: Image, count: int, seed: int = 3) -> list[int]:
    vocab = image.tensors[0].dims[1]
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def key(image: Image, name: str, kind: str, content: Any) -> Image:
    """`image` with the key `name` (after the architecture) set."""
    full = f"{image.keys[0].content}.{name}"
    image.keys = [k for k in image.keys if k.name != full] + [Key(full, kind, content)]
    return image


def vector(image: Image, name: str, length: int, around: float = 0.0) -> Image:
    data = np.random.default_rng(len(image.tensors)).normal(around, 0.3, length).astype("<f4")
    image.tensors.append(Tensor(name, (length,), F32, data.tobytes()))
    return image


def restored(image: Image, name: str, fmt: str) -> Image:
    """`image` with the matrix `name` drawn anew in another format."""
    tensor = next(t for t in image.tensors if t.name == name)
    columns, rows = tensor.dims
    data = random_blocks(np.random.default_rng(7), fmt, rows, columns, columns**-0.5)
    tensor.type_id, tensor.data = FORMATS[fmt].gguf_type, data
    return image


def mixed_formats() -> Image:
    """As in Q4_K_M files, V of a layer is finer than Q and K; and the other ways round."""
    image = llama_image(n_layers=4, qkv_bias=True)
    for name, fmt in (("0.attn_v", "Q5_1"), ("1.attn_q", "Q4_0"), ("2.attn_k", "F16"), ("3.ffn_down", "Q4_1")):
        restored(image, f"blk.{name}.weight", fmt)
    return image


def some_biases() -> Image:
    """Biases where Llama files seldom have them, and on K but not on Q and V."""
    image = llama_image()
    for name, length in (("attn_k", 32), ("attn_output", 64), ("ffn_gate", 128), ("ffn_down", 64)):
        vector(image, f"blk.1.{name}.bias", length)
    return image


def layers_differ() -> Image:
    image, other = llama_image(heads=4, kv_heads=2), llama_image(heads=2, kv_heads=1, ff=96)
    image.tensors = [t for t in image.tensors if not t.name.startswith("blk.1.")]
    image.tensors += [t for t in other.tensors if t.name.startswith("blk.1.")]
    key(image, "attention.head_count", "array[u32]", [4, 2])
    key(image, "attention.head_count_kv", "array[i32]", [2, 1])
    key(image, "attention.key_length", "u32", 16)
    return key(image, "feed_forward_length", "array[u32]", [128, 96])


def qwen3() -> Image:
    image = llama_image(architecture="qwen3", heads=4, kv_heads=2, head_dim=32)
    for layer in range(2):
        for name in ("attn_q_norm", "attn_k_norm"):
            vector(image, f"blk.{layer}.{name}.weight", 32, around=1.0)
    return image


MODELS: dict[str, Callable[[], Image]] = {
    "plain": llama_image,
    "one_layer": lambda: llama_image(n_layers=1, heads=1, kv_heads=1, hidden=32, head_dim=32, ff=32),
    "no_gqa_head_dim_8": lambda: llama_image(heads=4, kv_heads=4, head_dim=8, hidden=32, seed=1),
    "gqa_3_head_dim_64": lambda: llama_image(heads=3, kv_heads=1, head_dim=64, hidden=192, ff=96, seed=2),
    "odd_sizes_f32": lambda: llama_image(
        heads=3, kv_heads=3, head_dim=10, hidden=35, ff=17, vocab=261, weight_format="F32"
    ),
    "untied": lambda: llama_image(tied=False, weight_format="F16"),
    "bf16": lambda: llama_image(weight_format="BF16"),
    "q4_0": lambda: llama_image(weight_format="Q4_0"),
    "q4_1_in_q8_0": lambda: llama_image(weight_format="Q4_1", embedding_format="Q8_0"),
    "q5": lambda: llama_image(weight_format="Q5_0", embedding_format="Q5_1", tied=False),
    "k_formats": lambda: restored(
        llama_image(hidden=256, head_dim=64, ff=256, weight_format="Q4_K", embedding_format="Q6_K"),
        "blk.0.attn_v.weight",
        "Q5_K",
    ),
    "mixed_formats": mixed_formats,
    "qkv_bias": lambda: llama_image(qkv_bias=True),
    "some_biases": some_biases,
    "layers_differ": layers_differ,
    "eps": lambda: llama_image(eps=0.5),
    "partial_rope": lambda: llama_image(rope_dim=6, rope_theta=500.0),
    "rope_linear": lambda: llama_image(rope_scaling={"type": "linear", "factor": 4.0}),
    "rope_none": lambda: llama_image(rope_scaling={"type": "none", "factor": 4.0, "finetuned": True}),
    "rope_legacy": lambda: key(llama_image(), "rope.scale_linear", "f32", 1.0),
    "rope_yarn": lambda: llama_image(
        rope_scaling={"type": "yarn", "factor": 8.0, "original_context_length": 32, "attn_factor": 0.8}
    ),
    "rope_llama3": lambda: llama_image(rope_freqs=[1, 1, 1.5, 2, 4, 8, 8, 8]),
    "window_5": lambda: key(llama_image(), "attention.sliding_window", "u32", 5),
    "softcaps": lambda: key(
        key(llama_image(), "attn_logit_softcapping", "f32", 2.0), "final_logit_softcapping", "f32", 5.0
    ),
    "attention_scale": lambda: key(llama_image(), "attention.scale", "f32", 0.5),
    "qwen2": lambda: llama_image(architecture="qwen2", qkv_bias=True),
    "qwen3": qwen3,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_plain_implementation(name: str, write: Write) -> None:
    """70 tokens: more than one chunk, and than four pages.

    Logits have a standard deviation of 4. The largest difference seen is 1.4e-3, from keys that float32 and float64
    round to different float16 numbers.
    """
    image = MODELS[name]()
    ids = tokens(image, 70)
    with load(Settings(write(image), backend="reference", precision="exact")) as session:
        found = session.logits(ids)
    expected = plain_llama.logits(image, ids)
    assert found.shape == expected.shape
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    "name",
    ["eps", "partial_rope", "rope_linear", "rope_yarn", "rope_llama3", "window_5", "softcaps", "attention_scale"],
)
def test_a_setting_matters(name: str) -> None:
    """Each of these models differs from the plain one in a setting only: ignoring it would fail the test above."""
    image, plain = MODELS[name](), llama_image()
    ids = tokens(plain, 24)
    assert np.abs(plain_llama.logits(image, ids) - plain_llama.logits(plain, ids)).max() > 0.1


def test_two_ragged_sequences_on_scattered_pages(write: Write) -> None:
    """One prefill of 7 and 4 tokens and a padding row, then decode steps of both, against each sequence by itself."""
    image = llama_image()
    path = write(image)
    gguf = GGUFFile.open(path)
    config, backend = ModelConfig.from_gguf(gguf), open_backend("reference")
    executable = Executable(backend)
    add_weights(executable, config, gguf)
    shape: dict[str, Any] = {"ctx": 60, "page_size": 5, "sequences": 2, "precision": "exact"}
    chunk = executable.compile(plan(build_program(config, tokens=12, logits="all", head="logits", **shape), backend))
    last = executable.compile(plan(build_program(config, tokens=12, logits="last", **shape), backend))
    decode = executable.compile(plan(build_program(config, tokens=2, **shape), backend))
    texts = [tokens(image, 7, seed=1), tokens(image, 4, seed=2)]

    i32 = np.int32
    executable.write("cos_sin", config.rope.table(60))
    executable.write("block_table", np.random.default_rng(5).permutation(24).astype(i32).reshape(2, 12))
    for name in ("k_pages", "v_pages"):
        for layer in range(2):
            executable.write(f"blk.{layer}.{name}", np.full((24, 2, 5, 16), np.nan, np.float16))
    executable.write("prefill12.token_ids", np.array([*texts[0], *texts[1], -1], i32))
    executable.write("prefill12.seq_ids", np.array([0] * 7 + [1] * 4 + [-1], i32))
    executable.write("prefill12.positions", np.array([*range(7), *range(4), -1], i32))
    executable.write("prefill12.rows", np.array([6, 10], i32))
    chunk.run()
    found = executable.read("prefill12.logits")
    for text, rows in zip(texts, (slice(0, 7), slice(7, 11)), strict=True):
        np.testing.assert_allclose(found[rows], plain_llama.logits(image, text), rtol=0, atol=4e-3)

    last.run()
    executable.write("seq_ids", np.array([0, 1], i32))
    executable.write("positions", np.array([7, 4], i32))
    for _ in range(4):
        for text, token in zip(texts, executable.read("token_ids").tolist(), strict=True):
            assert token == plain_llama.logits(image, text)[-1].argmax()
            text.append(token)
        decode.run()
    assert executable.read("positions").tolist() == [11, 8]


def test_programs_as_data(write: Write) -> None:
    image = llama_image()
    config = ModelConfig.from_gguf(GGUFFile.open(write(image)))
    decode = build_program(config, tokens=1, ctx=100, page_size=16)
    assert [call.label for call in decode.calls] == [
        "token_embd",
        *(
            f"blk.{i}.{name}"
            for i in range(2)
            for name in ("attn_qkv", "rope_kv_append", "attention", "attn_output", "ffn_gate_up", "ffn_down")
        ),
        "output",
        "argmax",
        "advance",
    ]
    by_label = {call.label: call for call in decode.calls}
    tied = by_label["token_embd"].args["w"]
    assert by_label["output"].args["w"] == tied
    assert by_label["argmax"].args["ids"] == by_label["token_embd"].args["token_ids"]
    assert decode.buffers["blk.1.k_pages"].shape == (7, 2, 16, 16)
    assert decode.buffers["blk.1.attn_qkv.weight"].shape == (128, 64)
    chunk = build_program(config, tokens=64, ctx=100, page_size=16, logits="none")
    assert chunk.calls[-1].label == "blk.1.rope_kv_append"
    assert {name for name, spec in chunk.buffers.items() if spec.kind == "state"} == {
        *(f"prefill64.{name}" for name in ("token_ids", "positions", "seq_ids")),
        *(f"blk.{i}.{name}_pages" for i in range(2) for name in "kv"),
        "block_table",
        "cos_sin",
    }


def test_stacking_follows_the_formats(write: Write) -> None:
    config = ModelConfig.from_gguf(GGUFFile.open(write(mixed_formats())))
    assert [qkv_groups(config, layer) for layer in range(4)] == [
        [("attn_q", "attn_k"), ("attn_v",)],
        [("attn_q",), ("attn_k", "attn_v")],
        [("attn_q",), ("attn_k",), ("attn_v",)],
        [("attn_q", "attn_k", "attn_v")],
    ]


def test_everything_is_consumed_or_ignored_with_a_reason(write: Write) -> None:
    image = llama_image(rope_scaling={"type": "none", "finetuned": True})
    image.keys.append(Key("quantize.imatrix.file", "str", "x.dat"))
    image.keys.append(Key("mystudio.note", "str", "hello"))
    vector(image, "blk.0.attn_rot_embd.weight", 8)
    gguf = GGUFFile.open(write(image))
    ModelConfig.from_gguf(gguf)
    assert gguf.unconsumed() == []
    assert gguf.ignored["llama.rope.scaling.finetuned"] == "how the model was trained"
    assert gguf.ignored["quantize.imatrix.file"] == "how the file was quantised"
    assert gguf.ignored["mystudio.note"] == "not a parameter of llama models"
    assert gguf.ignored["tokenizer.ggml.merges"] == "read by the tokenizer and the chat template"
    assert gguf.ignored["blk.0.attn_rot_embd.weight"].startswith("a frequency table")


# What cannot be run


def without(image: Image, name: str) -> Image:
    image.keys = [k for k in image.keys if k.name != name]
    image.tensors = [t for t in image.tensors if t.name != name]
    return image


def tensor_as(name: str, **changes: Any) -> Image:
    image = llama_image(rope_freqs=[1.0] * 8)
    for tensor in image.tensors:
        if tensor.name == name:
            for field, value in changes.items():
                setattr(tensor, field, value)
    return image


def set_key(name: str, kind: str, content: Any) -> Image:
    image = llama_image()
    image.keys = [k for k in image.keys if k.name != name] + [Key(name, kind, content)]
    return image


NAN = np.array([np.nan] * 8, "<f4").tobytes()
WRONG_MODELS: dict[str, tuple[Callable[[], Image], str]] = {
    "architecture": (
        lambda: llama_image(architecture="mamba"),
        "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3",
    ),
    "no_architecture": (
        lambda: without(llama_image(), "general.architecture"),
        "key general.architecture is missing, expected a string",
    ),
    "adapter": (
        lambda: set_key("general.type", "str", "adapter"),
        "general.type is 'adapter', expected 'model': this file cannot be run by itself",
    ),
    "no_layers": (lambda: key(llama_image(), "block_count", "u32", 0), "is 0, expected at least 1 and at most 20"),
    "negative_layers": (
        lambda: key(llama_image(), "block_count", "i32", -1),
        "is -1, expected at least 1 and at most 20",
    ),
    "4_billion_layers": (
        lambda: key(llama_image(), "block_count", "u32", 4 * 10**9),
        "is 4000000000, expected at least 1 and at most 20",
    ),
    "layers_are_text": (
        lambda: key(llama_image(), "block_count", "str", "2"),
        "expected an integer, found str",
    ),
    "one_layer_too_many": (
        lambda: key(llama_image(), "block_count", "u32", 3),
        "tensor blk.2.attn_q.weight is missing; the file has 20 tensors",
    ),
    "one_layer_too_few": (
        lambda: key(llama_image(), "block_count", "u32", 1),
        "tensor blk.1.attn_norm.weight is not understood (and 8 more): running without it would give wrong answers",
    ),
    "no_heads": (
        lambda: key(llama_image(), "attention.head_count", "u32", 0),
        "is 0, expected at least 1 and at most 16777216",
    ),
    "huge_heads": (
        lambda: key(llama_image(), "attention.head_count", "u32", 2**31),
        "is 2147483648, expected at least 1 and at most 16777216",
    ),
    "heads_and_kv_heads": (
        lambda: key(llama_image(), "attention.head_count", "u32", 3),
        "layer 0 has 3 attention heads, not a multiple of its 2 key-value heads",
    ),
    "more_kv_heads": (
        lambda: key(llama_image(), "attention.head_count_kv", "u32", 8),
        "layer 0 has 4 attention heads, not a multiple of its 8 key-value heads",
    ),
    "heads_and_width": (
        lambda: key(key(llama_image(), "attention.head_count", "u32", 6), "attention.head_count_kv", "u32", 2),
        "embedding_length 64 is not a multiple of head_count 6, and key_length is missing",
    ),
    "heads_and_shapes": (
        lambda: Image(llama_image().keys, llama_image(heads=8).tensors),
        "tensor blk.0.attn_q.weight has shape [128, 64], expected [64, 64]",
    ),
    "heads_per_layer": (
        lambda: key(llama_image(), "attention.head_count", "array[u32]", [4, 4, 4]),
        "llama.attention.head_count has 3 values for 2 layers",
    ),
    "no_heads_in_a_layer": (
        lambda: key(llama_image(), "attention.head_count", "array[u32]", [4, 0]),
        "llama.attention.head_count is 0 for layer 1, expected 1 to 16777216",
    ),
    "value_length": (
        lambda: key(llama_image(), "attention.value_length", "u32", 8),
        "attention.value_length 8 differs from key_length 16, which is not supported",
    ),
    "no_width": (
        lambda: key(llama_image(), "embedding_length", "u32", 0),
        "is 0, expected at least 1 and at most 16777216",
    ),
    "width_and_shapes": (
        lambda: key(llama_image(), "embedding_length", "u32", 128),
        "tensor token_embd.weight has shape [320, 64], expected [320, 128]",
    ),
    "no_feed_forward": (lambda: key(llama_image(), "feed_forward_length", "u32", 0), "is 0, expected at least 1"),
    "feed_forward_and_shapes": (
        lambda: key(llama_image(), "feed_forward_length", "u32", 127),
        "tensor blk.0.ffn_gate.weight has shape [128, 64], expected [127, 64]",
    ),
    "odd_rope": (
        lambda: llama_image(rope_dim=15),
        "rope.dimension_count is 15, expected an even number up to the head dimension 16",
    ),
    "wide_rope": (
        lambda: llama_image(rope_dim=18),
        "rope.dimension_count is 18, expected an even number up to the head dimension 16",
    ),
    "rope_base_0": (lambda: llama_image(rope_theta=0.0), "is 0.0, expected at least 2.0 and at most"),
    "longrope": (
        lambda: llama_image(rope_scaling={"type": "longrope", "factor": 4.0}),
        "rope.scaling.type 'longrope' is not supported; supported: none, linear, yarn",
    ),
    "rope_factor_nan": (
        lambda: llama_image(rope_scaling={"factor": float("nan")}),
        "is nan, expected at least 0.0 and at most",
    ),
    "unknown_rope_key": (
        lambda: llama_image(rope_scaling={"yarn_ext_factor": 1.0}),
        "key llama.rope.scaling.yarn_ext_factor is not understood: running without it would give wrong answers",
    ),
    "eps_0": (lambda: llama_image(eps=0.0), "is 0.0, expected at least 1e-12 and at most 1.0"),
    "eps_negative": (lambda: llama_image(eps=-1e-5), "expected at least 1e-12 and at most 1.0"),
    "eps_nan": (lambda: llama_image(eps=float("nan")), "is nan, expected at least 1e-12 and at most 1.0"),
    "no_eps": (
        lambda: without(llama_image(), "llama.attention.layer_norm_rms_epsilon"),
        "key llama.attention.layer_norm_rms_epsilon is missing, expected a float",
    ),
    "context_0": (lambda: llama_image(context=0), "is 0, expected at least 1 and at most 2147483647"),
    "context_2_32": (
        lambda: llama_image(context=2**32 - 1),
        "is 4294967295, expected at least 1 and at most 2147483647",
    ),
    "experts": (
        lambda: key(llama_image(), "expert_count", "u32", 8),
        "key llama.expert_count is 8, which is not supported",
    ),
    "not_causal": (
        lambda: key(llama_image(), "attention.causal", "bool", False),
        "key llama.attention.causal is False, which is not supported",
    ),
    "unknown_key": (
        lambda: key(llama_image(), "residual_scale", "f32", 2.0),
        "key llama.residual_scale is not understood: running without it would give wrong answers",
    ),
    "unknown_tensor": (
        lambda: vector(llama_image(), "blk.0.attn_sinks.weight", 4),
        "tensor blk.0.attn_sinks.weight is not understood: running without it would give wrong answers",
    ),
    "missing_norm": (
        lambda: without(llama_image(), "output_norm.weight"),
        "tensor output_norm.weight is missing; the file has 19 tensors",
    ),
    "missing_embedding": (lambda: without(llama_image(), "token_embd.weight"), "tensor token_embd.weight is missing"),
    "qk_norm_missing": (
        lambda: llama_image(architecture="qwen3"),
        "tensor blk.0.attn_q_norm.weight is missing",
    ),
    "norm_of_wrong_length": (
        lambda: tensor_as("output_norm.weight", dims=(32,), data=bytes(128)),
        "tensor output_norm.weight has shape [32], expected [64]",
    ),
    "norm_is_a_matrix": (
        lambda: tensor_as("output_norm.weight", dims=(64, 1)),
        "tensor output_norm.weight has shape [1, 64], expected [64]",
    ),
    "norm_nan": (
        lambda: tensor_as("blk.0.ffn_norm.weight", data=NAN * 8),
        "value 0 is NaN or infinite",
    ),
    "embedding_is_a_vector": (
        lambda: tensor_as("token_embd.weight", dims=(320 * 64,)),
        "tensor token_embd.weight has shape [20480], expected [20480, 64]",
    ),
    "empty_embedding": (
        lambda: tensor_as("token_embd.weight", dims=(64, 0), data=b""),
        "is empty: shape [0, 64]",
    ),
    "rope_factors_nan": (lambda: tensor_as("rope_freqs.weight", data=NAN), "value 0 is NaN or infinite"),
    "rope_factors_0": (
        lambda: tensor_as("rope_freqs.weight", data=bytes(32)),
        "tensor rope_freqs.weight holds 0, expected positive factors",
    ),
    "rope_factors_too_few": (
        lambda: llama_image(rope_freqs=[1.0] * 7),
        "tensor rope_freqs.weight has shape [7], expected [8]",
    ),
    "foreign_format": (
        lambda: tensor_as("token_embd.weight", type_id=20, data=bytes(320 * 36)),
        "tensor token_embd.weight is stored as IQ4_NL, which is not supported",
    ),
    "vocab_size": (
        lambda: key(llama_image(), "vocab_size", "u32", 321),
        "vocab_size counts 321 tokens, but token_embd.weight has 320 rows",
    ),
    "tokens": (
        lambda: set_key("tokenizer.ggml.tokens", "array[str]", ["a", "b"]),
        "tokenizer.ggml.tokens counts 2 tokens, but token_embd.weight has 320 rows",
    ),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_model_is_refused_in_one_line(name: str, write: Write) -> None:
    build, problem = WRONG_MODELS[name]
    path = write(build())
    with pytest.raises((ModelError, ModelFormatError)) as error:
        load(Settings(path, backend="null"))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "\n" not in message


# Context and memory


def test_context_size(write: Write) -> None:
    path = write(llama_image(context=100_000))
    with load(Settings(path, backend="null")) as session:
        assert session.ctx == 4096
    with load(Settings(path, backend="null", ctx=100_000)) as session:
        assert session.ctx == 100_000
    with pytest.raises(ModelError, match="--ctx is 100001, the model's maximum is 100000 tokens"):
        load(Settings(path, backend="null", ctx=100_001))
    with load(Settings(write(llama_image(context=7)), backend="null")) as session:
        assert session.ctx == 7


def test_a_context_that_does_not_fit_names_one_that_does(write: Write) -> None:
    """Both sides of the limit, and nothing allocated: a token takes 2 layers * 2 * 2 heads * 16 * 2 + 64 bytes."""
    config = ModelConfig.from_gguf(GGUFFile.open(write(llama_image(context=2**31 - 1))))
    assert bytes_per_token(config) == 320
    device = DeviceInfo("small card", memory_bytes=weight_bytes(config) + 320 * 1600)
    backend = NullBackend(device)
    check_memory(config, 1600, backend, "m.gguf")
    with pytest.raises(ModelError) as error:
        check_memory(config, 1601, backend, "m.gguf")
    assert str(error.value) == (
        "m.gguf: --ctx 1601 takes 0 MiB beside 0 MiB of weights, small card has 1 MiB: --ctx 1600 fits"
    )
    full = NullBackend(DeviceInfo("full card", memory_bytes=1000))
    with pytest.raises(ModelError, match="full card has 0 MiB: no context fits beside the weights"):
        check_memory(config, 1, full, "m.gguf")


def test_an_absurd_context_is_refused_before_it_is_allocated(write: Write) -> None:
    path = write(llama_image(context=2**31 - 1))
    with pytest.raises(ModelError, match=r"--ctx 2147483647 takes 655360 MiB beside .*: --ctx \d+ fits"):
        load(Settings(path, backend="reference", ctx=2**31 - 1))


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Settings("m", threads=0), "threads is 0, expected at least 1"),
        (lambda: Settings("m", ctx=0), "ctx is 0, expected at least 1 token"),
        (lambda: Settings("m", fallback="maybe"), "fallback is 'maybe', expected error, warn or allow"),
        (lambda: Settings("m", precision="best"), "precision is 'best', expected exact or fast"),
        (lambda: Sampling(temperature=-0.1), "temperature is -0.1, expected a number >= 0"),
        (lambda: Sampling(temperature=float("inf")), "temperature is inf, expected a number >= 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature is nan, expected a number >= 0"),
        (lambda: Sampling(top_k=-1), "top_k is -1, expected 0 (off) to 16777216"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0, expected above 0, at most 1 (off)"),
        (lambda: Sampling(top_p=float("nan")), "top_p is nan, expected above 0, at most 1 (off)"),
        (lambda: Sampling(min_p=1.01), "min_p is 1.01, expected 0 (off) to 1"),
        (lambda: Sampling(seed=2**32), "seed is 4294967296, expected 0 to 4294967295"),
    ],
)
def test_wrong_settings(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert str(error.value) == message


# Chunks


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [8]),
        (8, [8]),
        (9, [8, 8]),
        (16, [8, 8]),
        (40, [8, 8, 8, 8, 8]),
        (41, [64]),
        (64, [64]),
        (65, [64, 8]),
        (100, [64, 8, 8, 8, 8, 8]),
        (511, [512]),
        (512, [512]),
        (520, [512, 8]),
        (1100, [512, 512, 64, 8, 8]),
    ],
)
def test_chunk_sizes(count: int, expected: list[int]) -> None:
    assert chunk_sizes(count) == expected


def test_chunks_hold_the_prompt_and_only_the_last_has_padding() -> None:
    for count in range(1, 1200):
        sizes = chunk_sizes(count)
        assert sum(sizes[:-1]) < count <= sum(sizes)
        assert sizes == sorted(sizes, reverse=True)
