"""What a model computes: logits against a plain second implementation, and the programs that do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain_llama
import pytest
from gguf_image import Image, Key
from polykern.backends import open_backend
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import add_weights, load
from polykern.runtime.model import build_program, qkv_groups
from polykern.runtime.plan import plan
from polykern.runtime.programs import chunk_sizes
from polykern.runtime.settings import Settings
from polykern.runtime.step import Executable
from tiny_llama import llama_image
from tiny_models import MODELS, mixed_formats, tokens, vector

Write = Callable[[Image], Path]


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


# Chunks


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [8]),
        (8, [8]),
        (9, [8, 8]),
        (16, [8, 8]),
        (32, [8, 8, 8, 8]),
        (33, [64]),
        (64, [64]),
        (65, [64, 8]),
        (100, [64, 64]),
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
