"""Model files that have the shape of a real model and no data: all of their tensors are a hole in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf_image import F32, Image, Key, Tensor
from polykern.kernels.quant import FORMATS


@dataclass(frozen=True)
class Shape:
    """Sizes as in the config.json of each model on the Hugging Face hub. `tied`: the head is the embedding."""

    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    context: int = 4096


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32000, tied=False),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256, tied=False, context=131072),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128256, tied=True, context=131072),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, tied=True, context=8192),
}


def write_shape(path: Path, name: str, fmt: str = "Q4_0", embedding: str | None = None) -> Path:
    """A GGUF file of architecture llama at `path`, matrices in `fmt`; sparse, so that it takes kilobytes of disk."""
    shape, tensors = SHAPES[name], list[Tensor]()
    end = 0

    def add(tensor: str, dims: tuple[int, ...], stored: str) -> None:
        nonlocal end
        tensors.append(Tensor(tensor, dims, FORMATS[stored].gguf_type if stored != "F32" else F32, offset=end))
        rows = 1 if len(dims) == 1 else dims[1]
        end += -(-rows * FORMATS[stored].row_bytes(dims[0]) // 32) * 32

    def matrix(tensor: str, rows: int, columns: int, stored: str = fmt) -> None:
        add(f"{tensor}.weight", (columns, rows), stored)

    kv = shape.hidden // shape.heads * shape.kv_heads
    matrix("token_embd", shape.vocab, shape.hidden, embedding or fmt)
    for i in range(shape.layers):
        add(f"blk.{i}.attn_norm.weight", (shape.hidden,), "F32")
        add(f"blk.{i}.ffn_norm.weight", (shape.hidden,), "F32")
        matrix(f"blk.{i}.attn_q", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.attn_k", kv, shape.hidden)
        matrix(f"blk.{i}.attn_v", kv, shape.hidden)
        matrix(f"blk.{i}.attn_output", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.ffn_gate", shape.ff, shape.hidden)
        matrix(f"blk.{i}.ffn_up", shape.ff, shape.hidden)
        matrix(f"blk.{i}.ffn_down", shape.hidden, shape.ff)
    add("output_norm.weight", (shape.hidden,), "F32")
    if not shape.tied:
        matrix("output", shape.vocab, shape.hidden)
    numbers = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
    }
    keys = [Key("general.architecture", "str", "llama")]
    keys += [Key(f"llama.{key}", "u32", value) for key, value in numbers.items()]
    keys += [Key("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5)]
    header = Image(keys, tensors).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return path
