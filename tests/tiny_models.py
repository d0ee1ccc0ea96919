"""Tiny models for whatever a GGUF file can say: one of each kind in MODELS, and edits to make more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf_image import F32, Image, Key, Tensor
from polykern.kernels.quant import FORMATS
from tiny_llama import llama_image, random_blocks


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
