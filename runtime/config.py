"""What the keys and tensors of a GGUF file mean, as one checked description of a model.

A family of models is a row of ARCHITECTURES, not a class: what its name implies and no key says. Key names and
defaults: docs/gguf.md of ggml-org/ggml at 01f0d4d; where that is silent, src/llama-model.cpp of ggml-org/llama.cpp at
067d44f. A hyper-parameter or tensor nobody here understands is an error, since ignoring it would give wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import numpy as np

from ..kernels.errors import ModelError
from ..kernels.op import TensorType
from ..kernels.quant import Array
from ..kernels.rope import RopeScaling, attention_factor, cos_sin_table, frequencies
from .gguf import GGUFFile

# Larger than any dimension of a published model by far; what it bounds is compared with tensor shapes next.
MAX_DIM = 1 << 24
MAX_CONTEXT = (1 << 31) - 1  # positions are int32


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` implies.

    pairing   which numbers RoPE rotates together, as in the op `rope`: the converter permutes the rows of Q and K for
              `llama` so that they are neighbours
    qk_norm   each head of Q and K goes through an RMS norm before RoPE
    glu       activation of the gated feed-forward, as in the op `glu`
    """

    name: str
    pairing: Literal["interleaved", "half"]
    qk_norm: bool = False
    glu: Literal["silu", "gelu_tanh", "gelu_erf"] = "silu"


ARCHITECTURES: Mapping[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("llama", pairing="interleaved"),  # also Mistral, SmolLM2, TinyLlama and others of that shape
        Architecture("qwen2", pairing="half"),  # its biases on Q, K and V are found among the tensors
        Architecture("qwen3", pairing="half", qk_norm=True),
    )
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `dims` of each head are rotated; `factors` divide the scaled frequencies (Llama 3)."""

    dims: int
    base: float
    scaling: RopeScaling
    factors: tuple[float, ...] = ()

    def table(self, length: int) -> Array:
        """float32 [length, dims]: the op `rope`'s cos_sin."""
        inv_freq = frequencies(self.dims, self.base, self.scaling)
        if self.factors:
            inv_freq = inv_freq / np.array(self.factors)
        return cos_sin_table(inv_freq, length, attention_factor(self.scaling))


@dataclass(frozen=True)
class Layer:
    """Sizes that may differ from block to block. `window` 0: attends to everything before."""

    heads: int
    kv_heads: int
    feed_forward: int
    window: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. `tensors` holds type and shape of every weight that is used, by GGUF name."""

    architecture: Architecture
    context_length: int
    embedding_length: int
    vocab_size: int
    head_dim: int
    layers: tuple[Layer, ...]
    rms_eps: float
    rope: Rope
    attention_scale: float
    attention_softcap: float
    final_softcap: float
    tensors: Mapping[str, TensorType]

    @property
    def head(self) -> str:
        """The tensor behind the logits: its own, or the embedding's (tied)."""
        return "output.weight" if "output.weight" in self.tensors else "token_embd.weight"

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> ModelConfig:
        """Read and check everything; marks what it uses as consumed.

        Raises ModelFormatError for a value that is out of range by itself, ModelError for one that contradicts
        another, a missing, extra or misshapen tensor, and a key that is not understood.
        """
        return _Reader(gguf).config()


class _Reader:
    """One pass over one file; `fail` prefixes its path."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        kind = gguf.get("general.type", str, "model")
        if kind != "model":
            self.fail(f"general.type is {kind!r}, expected 'model': this file cannot be run by itself")
        name = gguf.get("general.architecture", str)
        if name not in ARCHITECTURES:
            self.fail(f"architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        self.architecture = ARCHITECTURES[name]

    def fail(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.gguf.path}: {problem}")

    def key(self, name: str) -> str:
        return f"{self.architecture.name}.{name}"

    def number(self, name: str, default: int | None = None, low: int = 1, high: int = MAX_DIM) -> int:
        key = self.key(name)
        if default is None:
            return self.gguf.get(key, int, low=low, high=high)
        return self.gguf.get(key, int, default, low=low, high=high)

    def real(self, name: str, default: float, low: float, high: float) -> float:
        return self.gguf.get(self.key(name), float, default, low=low, high=high)

    def per_layer(self, name: str, count: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A key that holds one number for all layers or an array with one for each."""
        key = self.key(name)
        if not self.gguf.metadata_types.get(key, "").startswith("array"):
            if default is not None and key not in self.gguf.metadata:
                return default
            return (self.number(name),) * count
        values = tuple(int(v) for v in self.gguf.get_array(key, int))
        if len(values) != count:
            self.fail(f"{key} has {len(values)} values for {count} layers")
        for layer, value in enumerate(values):
            if not 1 <= value <= MAX_DIM:
                self.fail(f"{key} is {value} for layer {layer}, expected 1 to {MAX_DIM}")
        return values

    def config(self) -> ModelConfig:
        # A layer has tensors, so the count is bounded before anything is built from it.
        blocks = self.number("block_count", high=max(1, len(self.gguf.tensors)))
        context = self.number("context_length", high=MAX_CONTEXT)
        embedding = self.number("embedding_length")
        heads = self.per_layer("attention.head_count", blocks)
        kv_heads = self.per_layer("attention.head_count_kv", blocks, heads)
        feed_forward = self.per_layer("feed_forward_length", blocks)
        window = self.number("attention.sliding_window", 0, low=0, high=MAX_CONTEXT)
        for layer, (h, g) in enumerate(zip(heads, kv_heads, strict=True)):
            if h % g:
                self.fail(f"layer {layer} has {h} attention heads, not a multiple of its {g} key-value heads")
        head_dim = self._head_dim(embedding, heads[0])
        layers = tuple(Layer(h, g, f, window) for h, g, f in zip(heads, kv_heads, feed_forward, strict=True))
        rope = self._rope(head_dim, context)
        tensors = self._tensors(embedding, head_dim, layers, rope)
        config = ModelConfig(
            architecture=self.architecture,
            context_length=context,
            embedding_length=embedding,
            vocab_size=tensors["token_embd.weight"].shape[0],
            head_dim=head_dim,
            layers=layers,
            rms_eps=self.gguf.get(self.key("attention.layer_norm_rms_epsilon"), float, low=1e-12, high=1.0),
            rope=rope,
            attention_scale=self.real("attention.scale", 0.0, 0.0, 1e6),
            attention_softcap=self.real("attn_logit_softcapping", 0.0, 0.0, 1e6),
            final_softcap=self.real("final_logit_softcapping", 0.0, 0.0, 1e6),
            tensors=tensors,
        )
        self._finish(config)
        return config

    def _head_dim(self, embedding: int, heads: int) -> int:
        if self.key("attention.key_length") not in self.gguf.metadata and embedding % heads:
            self.fail(
                f"embedding_length {embedding} is not a multiple of head_count {heads}, and key_length is missing"
            )
        head_dim = self.number("attention.key_length", embedding // heads)
        value_dim = self.number("attention.value_length", head_dim)
        if value_dim != head_dim:
            self.fail(f"attention.value_length {value_dim} differs from key_length {head_dim}, which is not supported")
        return head_dim

    def _rope(self, head_dim: int, context: int) -> Rope:
        dims = self.number("rope.dimension_count", head_dim)
        if dims > head_dim or dims % 2:
            self.fail(f"rope.dimension_count is {dims}, expected an even number up to the head dimension {head_dim}")
        base = self.real("rope.freq_base", 10000.0, 2.0, 1e15)
        # "linear" by default and a factor of 0 for "off" are llama.cpp's reading of older files.
        kind = self.gguf.get(self.key("rope.scaling.type"), str, "linear")
        factor = self.real("rope.scaling.factor", self.real("rope.scale_linear", 0.0, 0.0, 1e6), 0.0, 1e6)
        scaling = RopeScaling(
            kind="yarn" if kind == "yarn" else "linear",
            factor=factor,
            original_context=self.number("rope.scaling.original_context_length", context, high=MAX_CONTEXT),
            beta_fast=self.real("rope.scaling.yarn_beta_fast", 32.0, 1e-3, 1e6),
            beta_slow=self.real("rope.scaling.yarn_beta_slow", 1.0, 1e-3, 1e6),
        )
        if kind not in ("none", "linear", "yarn"):
            self.fail(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
        if kind == "none" or factor in (0.0, 1.0):
            scaling = RopeScaling()
        # This key multiplies what the scaling type prescribes by itself.
        more = self.real("rope.scaling.attn_factor", 1.0, 1e-6, 1e6)
        scaling = replace(scaling, attention_factor=more * attention_factor(scaling))
        return Rope(dims, base, scaling, self._rope_factors(dims))

    def _rope_factors(self, dims: int) -> tuple[float, ...]:
        name = "rope_freqs.weight"
        if name not in self.gguf.tensors:
            return ()
        self.require_shape(name, (dims // 2,))
        self.gguf.check_finite(name)
        factors = tuple(float(f) for f in self.gguf.array(name))
        if min(factors) <= 0:
            self.fail(f"tensor {name} holds {min(factors):g}, expected positive factors")
        return factors

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.gguf.tensor(name).shape
        if found != shape:
            self.fail(f"tensor {name} has shape {list(found)}, expected {list(shape)}")

    def _tensors(self, embedding: int, head_dim: int, layers: tuple[Layer, ...], rope: Rope) -> dict[str, TensorType]:
        """Type of every weight that is used; checks shapes, formats and finiteness."""
        vocab = self.gguf.tensor("token_embd.weight").shape[0]
        found: dict[str, TensorType] = {}
        for name, shape, required in expected_tensors(self.architecture, vocab, embedding, head_dim, layers):
            if not required and name not in self.gguf.tensors:
                continue
            self.require_shape(name, shape)
            if len(shape) == 1:
                self.gguf.check_finite(name)
                self.gguf.array(name)
                found[name] = TensorType(shape, "f32")
            else:
                found[name] = TensorType(shape, self.gguf.weight(name).format.name)
        return found

    def _finish(self, config: ModelConfig) -> None:
        """Whatever is left in the file must be known not to matter."""
        for key, allowed in _MUST_BE.items():
            value = self.gguf.get(self.key(key), type(allowed), allowed)
            if value != allowed:
                self.fail(f"key {self.key(key)} is {value}, which is not supported")
        vocab = self.number("vocab_size", config.vocab_size)
        tokens = self.gguf.get_array("tokenizer.ggml.tokens", str, None)
        for what, count in (("vocab_size", vocab), ("tokenizer.ggml.tokens", len(tokens or ()) or vocab)):
            if count != config.vocab_size:
                self.fail(f"{what} counts {count} tokens, but token_embd.weight has {config.vocab_size} rows")
        for pattern, reason in _IGNORED.items():
            self.gguf.ignore(pattern.format(arch=self.architecture.name), reason)
        # Keys of other namespaces (provenance, adapters' notes) say nothing about this architecture.
        for name in self.gguf.metadata:
            if not name.startswith(self.key("")):
                self.gguf.ignored.setdefault(name, f"not a parameter of {self.architecture.name} models")
        left = self.gguf.unconsumed()
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            self.fail(f"{left[0]} is not understood{more}: running without it would give wrong answers")


# Keys that may only say what this runtime does anyway.
_MUST_BE: Mapping[str, bool | int] = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "expert_count": 0,
    "expert_used_count": 0,
}

_IGNORED: Mapping[str, str] = {
    "general.*": "describes the model",
    "tokenizer.*": "read by the tokenizer and the chat template",
    "quantize.*": "how the file was quantised",
    "{arch}.rope.scaling.finetuned": "how the model was trained",
    "blk.*.attn_rot_embd.weight": "a frequency table, recomputed from rope.freq_base",
}


def expected_tensors(
    architecture: Architecture, vocab: int, embedding: int, head_dim: int, layers: tuple[Layer, ...]
) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether required) of each tensor of the model."""
    yield "token_embd.weight", (vocab, embedding), True
    for i, layer in enumerate(layers):
        queries, keys = layer.heads * head_dim, layer.kv_heads * head_dim
        matrices = {
            "attn_q": (queries, embedding),
            "attn_k": (keys, embedding),
            "attn_v": (keys, embedding),
            "attn_output": (embedding, queries),
            "ffn_gate": (layer.feed_forward, embedding),
            "ffn_up": (layer.feed_forward, embedding),
            "ffn_down": (embedding, layer.feed_forward),
        }
        for name, shape in matrices.items():
            yield f"blk.{i}.{name}.weight", shape, True
            yield f"blk.{i}.{name}.bias", shape[:1], False
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", (embedding,), True
        if architecture.qk_norm:
            for name in ("attn_q_norm", "attn_k_norm"):
                yield f"blk.{i}.{name}.weight", (head_dim,), True
    yield "output_norm.weight", (embedding,), True
    yield "output.weight", (vocab, embedding), False
