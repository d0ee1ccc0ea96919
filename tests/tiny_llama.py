"""Tiny but complete Llama models with random weights, as GGUF images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from gguf_image import F32, Image, Key, Tensor
from polykern.kernels.quant import FORMATS, Weight, dequantize_rows


def random_blocks(rng: np.random.Generator, name: str, rows: int, columns: int, sigma: float) -> bytes:
    """A matrix in format `name`: all bits of its quants random, its scales such that the numbers have mean about 0 and
    standard deviation about `sigma`."""
    fmt = FORMATS[name]
    if fmt.is_float:
        return Weight.from_array(rng.normal(0, sigma, (rows, columns)), name).data.tobytes()
    count = rows * columns // fmt.block_length
    if columns % fmt.block_length:
        raise ValueError(f"{name} needs rows of a multiple of {fmt.block_length}, not {columns}")
    scale = sigma / _spread(name) * rng.uniform(0.7, 1.3, count)
    return _blocks(rng, name, scale).tobytes()


# The minimum that centres the numbers, in units of the scale: w = d*q + m, and w = d*sc*q - dmin*min for the K formats.
_CENTRE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q4_K": 7.5, "Q5_K": 15.5}


def _blocks(rng: np.random.Generator, name: str, scale: np.ndarray) -> np.ndarray:
    fmt = FORMATS[name]
    blocks = rng.integers(0, 256, (len(scale), fmt.block_bytes), np.uint8)
    for part in fmt.fields:
        if part.kind in ("scale", "min"):
            factor = 1.0 if part.kind == "scale" else _CENTRE[name]
            stored = (scale * factor).astype("<f2")[:, None].view(np.uint8)
            blocks[:, part.offset : part.offset + 2] = stored
        elif part.dtype == "i1" and part.kind == "subscale":  # keeps the scale clear of subnormal float16 numbers
            small = rng.integers(-15, 16, (len(scale), part.count), np.int8).view(np.uint8)
            blocks[:, part.offset : part.offset + part.count] = small
    return blocks


@cache
def _spread(name: str) -> float:
    """Standard deviation of the numbers in blocks with a scale of 1."""
    blocks = _blocks(np.random.default_rng(0), name, np.ones(256))
    return float(dequantize_rows(FORMATS[name], blocks).std())


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE (GPT-2) writes for the bytes 0 to 255."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(shifted)) for b in range(256)]


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
_COMMON = ["Ġ t", "h e", "Ġt he", "Ġ a", "i n", "r e", "o n", "Ġ Ġ", "in g", "Ġa n", "e r", "Ġ w", "o r", "l d", "l o"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe_tokenizer(vocab: int) -> tuple[list[str], list[str]]:
    """`vocab` tokens (special, one per byte, merged) and the merges that make the last kind."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [f"{a} {b}" for a in letters for b in letters]
    merges: dict[str, str] = {}  # token -> merge
    for merge in (*_COMMON, *pairs, *(f"{p.replace(' ', '')} {c}" for p in pairs for c in letters)):
        merges.setdefault(merge.replace(" ", ""), merge)
    wanted = vocab - SMALLEST_VOCAB
    if not 0 <= wanted <= len(merges):
        raise ValueError(f"a vocabulary has {SMALLEST_VOCAB} to {SMALLEST_VOCAB + len(merges)} tokens, not {vocab}")
    chosen = list(merges.items())[:wanted]
    return [*SPECIAL_TOKENS, *byte_alphabet(), *(token for token, _ in chosen)], [merge for _, merge in chosen]


def llama_image(
    *,
    architecture: str = "llama",
    n_layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ff: int = 128,
    vocab: int = 320,
    weight_format: str = "Q8_0",
    embedding_format: str | None = None,
    tied: bool = True,
    qkv_bias: bool = False,
    context: int = 256,
    eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_dim: int | None = None,
    rope_scaling: Mapping[str, str | bool | int | float] | None = None,
    rope_freqs: Sequence[float] | None = None,
    pre: str = "smollm",
    seed: int = 0,
) -> Image:
    """A complete decoder with random weights, its layout that of real Llama files; edit it before `encode()` if needed.

    `rope_scaling` holds what follows "llama.rope.scaling." ({"type": "linear", "factor": 4.0}); `rope_freqs` becomes
    the tensor rope_freqs.weight. K formats need hidden, heads * head_dim and ff to be multiples of 256. Logits have a
    standard deviation of about 4, so that greedy decoding seldom meets a near tie.
    """
    rng = np.random.default_rng(seed)
    tokens, merges = bpe_tokenizer(vocab)
    tensors: list[Tensor] = []

    def matrix(name: str, rows: int, columns: int, fmt: str = weight_format, gain: float = 1.0) -> None:
        data = random_blocks(rng, fmt, rows, columns, gain / columns**0.5)
        tensors.append(Tensor(name, (columns, rows), FORMATS[fmt].gguf_type, data))

    def vector(name: str, numbers: Any) -> None:
        data = np.asarray(numbers, "<f4")
        tensors.append(Tensor(name, data.shape, F32, data.tobytes()))

    def norm(name: str) -> None:
        vector(name, 1 + 0.1 * rng.normal(size=hidden))

    matrix("token_embd.weight", vocab, hidden, embedding_format or weight_format, gain=4.0)
    if rope_freqs is not None:
        vector("rope_freqs.weight", rope_freqs)
    for layer in range(n_layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        for projection, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            matrix(f"{block}attn_{projection}.weight", count * head_dim, hidden)
            if qkv_bias:
                vector(f"{block}attn_{projection}.bias", 0.5 * rng.normal(size=count * head_dim))
        matrix(block + "attn_output.weight", hidden, heads * head_dim)
        norm(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", ff, hidden)
        matrix(block + "ffn_up.weight", ff, hidden)
        matrix(block + "ffn_down.weight", hidden, ff)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", vocab, hidden, embedding_format or weight_format, gain=4.0)

    def rope_kind(setting: str | bool | int | float) -> str:
        return {str: "str", bool: "bool", int: "u32", float: "f32"}[type(setting)]

    a = architecture
    keys = [
        Key("general.architecture", "str", a),
        Key("general.name", "str", f"tiny {weight_format}"),
        Key("general.quantization_version", "u32", 2),
        Key(f"{a}.block_count", "u32", n_layers),
        Key(f"{a}.context_length", "u32", context),
        Key(f"{a}.embedding_length", "u32", hidden),
        Key(f"{a}.feed_forward_length", "u32", ff),
        Key(f"{a}.attention.head_count", "u32", heads),
        Key(f"{a}.attention.head_count_kv", "u32", kv_heads),
        Key(f"{a}.attention.layer_norm_rms_epsilon", "f32", eps),
        Key(f"{a}.rope.freq_base", "f32", rope_theta),
        Key(f"{a}.rope.dimension_count", "u32", rope_dim or head_dim),
        *(Key(f"{a}.rope.scaling.{k}", rope_kind(v), v) for k, v in (rope_scaling or {}).items()),
        Key(f"{a}.vocab_size", "u32", vocab),
        Key("tokenizer.ggml.model", "str", "gpt2"),
        Key("tokenizer.ggml.pre", "str", pre),
        Key("tokenizer.ggml.tokens", "array[str]", tokens),
        Key("tokenizer.ggml.token_type", "array[i32]", [3] * len(SPECIAL_TOKENS) + [1] * (vocab - len(SPECIAL_TOKENS))),
        Key("tokenizer.ggml.merges", "array[str]", merges),
        Key("tokenizer.ggml.bos_token_id", "u32", 1),
        Key("tokenizer.ggml.eos_token_id", "u32", 2),
        Key("tokenizer.ggml.unknown_token_id", "u32", 0),
        Key("tokenizer.ggml.padding_token_id", "u32", 2),
        Key("tokenizer.ggml.add_bos_token", "bool", False),
        Key("tokenizer.chat_template", "str", CHAT_TEMPLATE),
    ]
    if heads * head_dim != hidden:
        keys += [Key(f"{a}.attention.{part}_length", "u32", head_dim) for part in ("key", "value")]
    return Image(keys, tensors)


def valid_llama_gguf(**settings: Any) -> bytes:
    """The bytes of `llama_image(**settings)`."""
    return llama_image(**settings).encode()
