"""One forward step of a decoder-only transformer, written down as a Program.

The same straight line of calls serves every bucket: decode (one token per sequence) and prefill (a chunk of tokens).
It writes what is best for a device with the fused ops; a backend without them gets their decomposition from the plan.

State buffers, shared by all programs of a session (B sequences, P pages, S page_size, G kv heads, D head_dim):

    token_ids, positions, seq_ids   i32 [B]          decode inputs; decode writes the next id and advances by itself
    prefillT.token_ids, .positions, .seq_ids   i32 [T]   the same for a chunk of T; padding rows have seq_id -1
    prefillT.rows                   i32 [B]          rows of the chunk whose logits are wanted (logits="last")
    block_table                     i32 [B, max_pages]
    blk.N.k_pages, blk.N.v_pages    f16 [P, G, S, D]
    cos_sin                         f32 [ctx, rope dims]
    sampling, rng                   f32 [B, 4], u32 [B, 2]   as in the op `sample`
    logits                          f32 [B or T, vocab]      for the host, with head="logits"
    logit_bias                      f32 [vocab]              added to the logits, with biased=True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Literal

from ..kernels.program import Program, View
from .config import ModelConfig

Logits = Literal["none", "last", "all"]
Head = Literal["argmax", "sample", "logits"]


def qkv_groups(config: ModelConfig, layer: int) -> list[tuple[str, ...]]:
    """Which of Q, K and V are one weight, their rows stacked: neighbours that are stored in the same format.

    With a QK norm they stay apart, because a norm over [T * heads, head_dim] needs rows without gaps.
    """
    groups: list[tuple[str, ...]] = []
    previous = ""
    for name in ("attn_q", "attn_k", "attn_v"):
        stored = config.tensors[f"blk.{layer}.{name}.weight"].dtype
        if stored == previous and not config.architecture.qk_norm:
            groups[-1] += (name,)
        else:
            groups.append((name,))
        previous = stored
    return groups


def group_name(group: tuple[str, ...]) -> str:
    """attn_q + attn_k + attn_v -> attn_qkv."""
    return "attn_" + "".join(name[-1] for name in group)


def stacked_tensors(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Weight buffers that are made of several tensors of the file -> those tensors, in order (some biases may lack)."""
    return {
        f"blk.{layer}.{group_name(group)}.{part}": tuple(f"blk.{layer}.{name}.{part}" for name in group)
        for layer in range(len(config.layers))
        for group in qkv_groups(config, layer)
        if len(group) > 1
        for part in ("weight", "bias")
    }


def build_program(
    config: ModelConfig,
    *,
    tokens: int,
    ctx: int,
    page_size: int,
    sequences: int = 1,
    logits: Logits = "last",
    head: Head = "argmax",
    biased: bool = False,
    precision: str = "fast",
) -> Program:
    """The program of one bucket.

    tokens     rows per run; tokens == sequences makes it a decode step
    ctx        capacity of the KV cache in tokens per sequence
    logits     none: only fill the KV cache (the last layer stops there); last: one row per sequence; all: every row
    head       what becomes of the logits: the next token ids by argmax or sampling, or a buffer the host reads
    biased     whether a bias from the host is added to the logits (-infinity: never chosen)
    precision  exact | fast, as in the op `gemm`
    """
    is_decode = tokens == sequences
    name = f"decode.{head}{'.biased' if biased else ''}" if is_decode else f"prefill{tokens}.{logits}"
    block = _Blocks(config, Program(name), tokens, sequences, ctx, page_size, precision)
    block.embed()
    for layer in range(len(config.layers)):
        q, pages = block.fill_cache(layer)
        if logits == "none" and layer == len(config.layers) - 1:
            return block.p  # nobody would read what follows
        block.attend(layer, q, pages)
        block.feed_forward(layer)
    if logits == "last" and not is_decode:
        block.select_last()
    block.finish(head, biased)
    if is_decode:
        block.advance()
    return block.p


class _Blocks:
    """The parts of a transformer, each as calls on the program `p`; the hidden state `x` [T, embedding] is between."""

    def __init__(
        self, config: ModelConfig, p: Program, tokens: int, sequences: int, ctx: int, page_size: int, precision: str
    ) -> None:
        self.config, self.p, self.tokens, self.sequences = config, p, tokens, sequences
        self.prefix = "" if tokens == sequences else f"prefill{tokens}."
        self.norm = {"eps": config.rms_eps}
        self.precision = {"precision": precision}
        self.page_size, self.pages = page_size, -(-ctx // page_size)
        self.token_ids = self.state(f"{self.prefix}token_ids", tokens)
        self.cos_sin = self.state("cos_sin", ctx, config.rope.dims, dtype="f32")
        self.where = {
            "block_table": self.state("block_table", sequences, self.pages),
            "seq_ids": self.state(f"{self.prefix}seq_ids", tokens),
            "positions": self.state(f"{self.prefix}positions", tokens),
        }
        self.x = self.scratch("x", config.embedding_length)

    def state(self, name: str, *shape: int, dtype: str = "i32") -> View:
        return self.p.buffer(name, shape, dtype, "state")

    def scratch(self, name: str, width: int, rows: int | None = None) -> View:
        # The width is in the name because layers may differ in it; not the rows, so that buckets can share the buffer.
        return self.p.buffer(f"{name}.{width}", (rows or self.tokens, width), "f32")

    def weight(self, name: str) -> View:
        kind = self.config.tensors[name]
        return self.p.buffer(name, kind.shape, kind.dtype, "weight")

    def linear(self, name: str) -> dict[str, View]:
        """The arguments `w` and, if the model has one, `bias`."""
        args = {"w": self.weight(f"{name}.weight")}
        if f"{name}.bias" in self.config.tensors:
            args["bias"] = self.weight(f"{name}.bias")
        return args

    def stacked(self, label: str, tensors: list[str], rows: int) -> dict[str, View]:
        """The same of several linear layers, their rows stacked."""
        kind = self.config.tensors[f"{tensors[0]}.weight"]
        args = {"w": self.p.buffer(f"{label}.weight", (rows, kind.shape[1]), kind.dtype, "weight")}
        if any(f"{name}.bias" in self.config.tensors for name in tensors):
            args["bias"] = self.p.buffer(f"{label}.bias", (rows,), "f32", "weight")
        return args

    def embed(self) -> None:
        args = {"token_ids": self.token_ids, "w": self.weight("token_embd.weight"), "y": self.x}
        self.p.call("embedding", args, label="token_embd")

    def fill_cache(self, i: int) -> tuple[View, dict[str, View]]:
        """Q, K and V of layer `i`, rotated, K and V appended to its pages: (q [T, H, D], the pages)."""
        blk, layer, dim = f"blk.{i}", self.config.layers[i], self.config.head_dim
        part = self.project(i, {"attn_q": layer.heads, "attn_k": layer.kv_heads, "attn_v": layer.kv_heads})
        shape = (self.sequences * self.pages, layer.kv_heads, self.page_size, dim)
        pages = {name: self.state(f"{blk}.{name}", *shape, dtype="f16") for name in ("k_pages", "v_pages")}
        q = part["attn_q"].reshape(self.tokens, layer.heads, dim)
        k, v = (part[name].reshape(self.tokens, layer.kv_heads, dim) for name in ("attn_k", "attn_v"))
        args = {"q": q, "k": k, "v": v, "cos_sin": self.cos_sin, **self.where, **pages}
        self.p.call("rope_kv_append", args, {"pairing": self.config.architecture.pairing}, f"{blk}.rope_kv_append")
        return q, pages

    def project(self, i: int, heads: Mapping[str, int]) -> dict[str, View]:
        """Q, K and V by name, each [T, heads * D]; columns of one buffer unless a QK norm needs them dense."""
        blk, dim = f"blk.{i}", self.config.head_dim
        widths = {name: count * dim for name, count in heads.items()}
        if self.config.architecture.qk_norm:
            part = {name: self.scratch(name, width) for name, width in widths.items()}
        else:
            qkv = self.scratch("attn_qkv", sum(widths.values()))
            ends = list(accumulate(widths.values(), initial=0))
            part = {
                name: View(qkv.buffer, (self.tokens, width), "f32", start, qkv.shape[1])
                for (name, width), start in zip(widths.items(), ends, strict=False)
            }
        norm = self.weight(f"{blk}.attn_norm.weight")
        for group in qkv_groups(self.config, i):
            label, rows = f"{blk}.{group_name(group)}", sum(widths[name] for name in group)
            tensors = [f"{blk}.{name}" for name in group]
            weights = self.linear(label) if len(group) == 1 else self.stacked(label, tensors, rows)
            y = replace(part[group[0]], shape=(self.tokens, rows))
            self.p.call(
                "rms_norm_gemm",
                {"x": self.x, "weight": norm, **weights, "y": y},
                {**self.norm, **self.precision},
                label,
            )
        if self.config.architecture.qk_norm:
            for name in ("attn_q", "attn_k"):
                by_head = (self.tokens * heads[name], dim)
                normed = self.scratch(f"{name}_norm", widths[name])
                args = {"x": part[name].reshape(*by_head), "weight": self.weight(f"{blk}.{name}_norm.weight")}
                self.p.call("rms_norm", {**args, "y": normed.reshape(*by_head)}, self.norm, f"{blk}.{name}_norm")
                part[name] = normed
        return part

    def attend(self, i: int, q: View, pages: dict[str, View]) -> None:
        """Attention of layer `i` and its output projection, added to `x`."""
        blk, config = f"blk.{i}", self.config
        y = self.scratch("attention", config.layers[i].heads * config.head_dim)
        attrs = {
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
            "window": config.layers[i].window,
        }
        self.p.call("attention", {"q": q, **pages, **self.where, "y": y.reshape(*q.shape)}, attrs, f"{blk}.attention")
        label = f"{blk}.attn_output"
        self.p.call("gemm_add", {"x": y, **self.linear(label), "y": self.x}, self.precision, label)

    def feed_forward(self, i: int) -> None:
        """The gated feed-forward of layer `i`, added to `x`."""
        blk, width = f"blk.{i}", self.config.layers[i].feed_forward
        gate, up = self.linear(f"{blk}.ffn_gate"), self.linear(f"{blk}.ffn_up")
        normed = {"x": self.x, "weight": self.weight(f"{blk}.ffn_norm.weight")}
        hidden = self.scratch("ffn", width)
        glu = {"kind": self.config.architecture.glu}
        attrs = {**self.norm, **self.precision}
        if "bias" in gate or "bias" in up:  # which the fused op does not have
            part = {"gate": self.scratch("ffn_gate", width), "up": self.scratch("ffn_up", width)}
            self.p.call("rms_norm_gemm", {**normed, **gate, "y": part["gate"]}, attrs, f"{blk}.ffn_gate")
            self.p.call("rms_norm_gemm", {**normed, **up, "y": part["up"]}, attrs, f"{blk}.ffn_up")
            self.p.call("glu", {**part, "y": hidden}, glu, f"{blk}.ffn_glu")
        else:
            args = {**normed, "w_gate": gate["w"], "w_up": up["w"], "y": hidden}
            self.p.call("rms_norm_gemm_glu", args, {**attrs, **glu}, f"{blk}.ffn_gate_up")
        label = f"{blk}.ffn_down"
        self.p.call("gemm_add", {"x": hidden, **self.linear(label), "y": self.x}, self.precision, label)

    def select_last(self) -> None:
        """Keep of `x` the rows that the host named."""
        y = self.scratch("last", self.config.embedding_length, self.sequences)
        self.p.call(
            "gather", {"x": self.x, "rows": self.state(f"{self.prefix}rows", self.sequences), "y": y}, label="last"
        )
        self.x = y

    def finish(self, head: Head, biased: bool) -> None:
        """Logits, and what becomes of them."""
        rows, vocab = self.x.shape[0], self.config.vocab_size
        if head == "logits":
            logits = self.state(f"{self.prefix}logits", rows, vocab, dtype="f32")
        else:
            logits = self.scratch("logits", vocab, rows)
        args = {"x": self.x, "weight": self.weight("output_norm.weight"), "w": self.weight(self.config.head)}
        if biased:
            args["bias"] = self.state("logit_bias", vocab, dtype="f32")
        self.p.call("rms_norm_gemm", {**args, "y": logits}, {**self.norm, **self.precision}, "output")
        if self.config.final_softcap:
            self.p.call("softcap", {"x": logits}, {"cap": self.config.final_softcap}, "softcap")
        if head == "logits":
            return
        args = {"x": logits, "ids": self.state("token_ids", self.sequences)}
        if head == "sample":
            args["params"] = self.state("sampling", self.sequences, 4, dtype="f32")
            args["rng"] = self.state("rng", self.sequences, 2, dtype="u32")
        self.p.call(head, args, label=head)

    def advance(self) -> None:
        """One position further, for the next step."""
        args = {"positions": self.where["positions"], "seq_ids": self.where["seq_ids"]}
        self.p.call("advance", args, label="advance")
