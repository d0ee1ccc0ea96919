"""Models, contexts and settings that cannot be run: each refused in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_image import Image, Key
from polykern.backends.null import NullBackend
from polykern.kernels.errors import ModelError, ModelFormatError, UsageError
from polykern.kernels.op import Signature
from polykern.kernels.spi import DeviceInfo, Kernel, Unsupported
from polykern.runtime import memory
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import load
from polykern.runtime.memory import (
    MIB,
    PackingGuard,
    bytes_per_token,
    check_host_share,
    check_memory,
    weight_bytes,
)
from polykern.runtime.model import build_program
from polykern.runtime.plan import plan
from polykern.runtime.settings import Sampling, Settings
from tiny_llama import llama_image
from tiny_models import key, vector

Write = Callable[[Image], Path]


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


def test_a_model_that_grows_too_large_while_it_is_packed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference makes 4 bytes of each number; Q4_0 has 4.5 bits, so 64 MiB grow to 455 and the rest likewise."""
    guard = PackingGuard(1024 * MIB, "m.gguf")
    grown = 0
    monkeypatch.setattr(memory, "anonymous_memory", lambda: 100 * MIB + grown)
    monkeypatch.setattr(memory, "host_memory", lambda: 2984 * MIB)
    guard.hand_out(64 * MIB)
    grown = 455 * MIB  # less 256 for whatever else there may be: 3.1 bytes for one of the file
    with pytest.raises(ModelError) as error:
        guard.hand_out(64 * MIB)
    assert str(error.value) == (
        "m.gguf: 64 of 1024 MiB of weights are loaded, the rest would take 2985 MiB, this machine has 2984 MiB left:"
        " take a smaller model, or a --backend that keeps weights packed (`runtime backends` lists them)"
    )


def test_a_model_that_fits_while_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little was seen yet; as large as in the file; and on a card, where this process does not grow at all."""
    grown = 0
    monkeypatch.setattr(memory, "anonymous_memory", lambda: 100 * MIB + grown)
    for total, factor, available in ((63, 8, 0), (1024, 1, 1024), (1024, 0, 0)):
        monkeypatch.setattr(memory, "host_memory", lambda left=available: left * MIB)
        guard, grown = PackingGuard(total * MIB, "m.gguf"), 0
        for _ in range(total):
            guard.hand_out(MIB)
            grown += factor * MIB


def test_the_guard_watches_the_load(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GUARD_AFTER_BYTES", 0)
    monkeypatch.setattr(memory, "GUARD_SLACK_BYTES", 0)
    monkeypatch.setattr(memory, "host_memory", lambda: 300_000)
    seen = iter(range(0, 10**9, 100_000))
    monkeypatch.setattr(memory, "anonymous_memory", lambda: next(seen))
    with pytest.raises(ModelError, match="MiB of weights are loaded, the rest would take"):
        load(Settings(write(llama_image()), backend="null"))


def test_calls_on_the_host_need_room_for_their_weights(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward matrices of two layers, 3 * 64 * 128 numbers each, unpacked to 4 bytes a number."""
    config = ModelConfig.from_gguf(GGUFFile.open(write(llama_image())))
    backend = NullBackend(DeviceInfo("picky"))
    plain = backend.supports

    def supports(signature: Signature) -> Kernel | Unsupported:
        is_feed_forward = signature.op == "gemm_add" and signature.tensors["w"].shape == (64, 128)
        refused = is_feed_forward or signature.op in ("gemm", "rms_norm_gemm_glu")
        return Unsupported(signature.op, "too much") if refused else plain(signature)

    monkeypatch.setattr(backend, "supports", supports)
    made = plan(build_program(config, tokens=1, ctx=32, page_size=16), backend, "allow")
    needed = 2 * 3 * 64 * 128 * 4
    monkeypatch.setattr(memory, "host_memory", lambda: needed)
    check_host_share(made, "m.gguf")
    monkeypatch.setattr(memory, "host_memory", lambda: needed - 1)
    with pytest.raises(
        ModelError, match=r"^m\.gguf: \d+ calls that null refuses would run on the host and unpack 0 MiB"
    ):
        check_host_share(made, "m.gguf")


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
