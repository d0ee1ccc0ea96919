"""A decoder-only transformer as plainly as it can be written: float64, one token, one head, one key after another.

Shares nothing with the runtime but the dequantised numbers; the tests' second opinion.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf_image import Image
from polykern.kernels.quant import BY_GGUF_TYPE, dequantize_rows


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(float(np.mean(x * x)) + eps) * weight


def rope_angles(get: Any, dims: int, factors: np.ndarray | None) -> tuple[list[float], float]:
    """Angle per position of each pair, and the factor of cosine and sine."""
    base, kind = get("rope.freq_base", 10000.0), get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", 0.0) or 1.0
    angles, magnitude = [], 1.0
    for pair in range(dims // 2):
        theta = base ** (-2 * pair / dims) / (1.0 if factors is None else float(factors[pair]))
        if kind == "yarn":
            # arXiv 2309.00071, with its ramp in numbers of turns replaced by the usual one in dimensions
            original = get("rope.scaling.original_context_length", get("context_length"))
            ends = [dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32.0, 1.0)]
            low, high = max(0, math.floor(ends[0])), min(dims - 1, math.ceil(ends[1]))
            interpolated = min(1.0, max(0.0, (pair - low) / max(0.001, high - low)))
            angles.append(theta / factor * interpolated + theta * (1 - interpolated))
            magnitude = 0.1 * math.log(factor) + 1
        else:
            angles.append(theta / (factor if kind == "linear" else 1.0))
    return angles, magnitude * get("rope.scaling.attn_factor", 1.0)


def rotate(head: np.ndarray, position: int, angles: list[float], magnitude: float, interleaved: bool) -> np.ndarray:
    out = head.copy()
    for pair, angle in enumerate(angles):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + len(angles))
        cos, sin = math.cos(position * angle) * magnitude, math.sin(position * angle) * magnitude
        out[i] = head[i] * cos - head[j] * sin
        out[j] = head[j] * cos + head[i] * sin
    return out


def logits(image: Image, ids: list[int]) -> np.ndarray:
    """float64 [len(ids), vocab]. Keys and values are rounded to float16, as the cache holds them."""
    keys = {key.name: key.content for key in image.keys}
    arch = keys["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        return keys.get(f"{arch}.{name}", default)

    tensors: dict[str, np.ndarray] = {}
    for t in image.tensors:
        fmt = BY_GGUF_TYPE[t.type_id]
        rows = np.frombuffer(t.data, np.uint8).reshape(-1, fmt.row_bytes(t.dims[0]))
        tensors[t.name] = dequantize_rows(fmt, rows).astype(np.float64).reshape(tuple(reversed(t.dims)))

    def per_layer(name: str, layer: int) -> int:
        found = get(name)
        return found if isinstance(found, int) else found[layer]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return tensors[f"{name}.weight"] @ x + tensors.get(f"{name}.bias", 0.0)

    eps, window = get("attention.layer_norm_rms_epsilon"), get("attention.sliding_window", 0)
    dim = get("attention.key_length") or get("embedding_length") // per_layer("attention.head_count", 0)
    angles, magnitude = rope_angles(get, get("rope.dimension_count", dim), tensors.get("rope_freqs.weight"))
    scale, cap = get("attention.scale", 0.0) or dim**-0.5, get("attn_logit_softcapping", 0.0)
    interleaved = arch == "llama"
    cache: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in range(get("block_count"))]
    out = []
    for position, token in enumerate(ids):
        x = tensors["token_embd.weight"][token].copy()
        for layer, (past_k, past_v) in enumerate(cache):
            blk = f"blk.{layer}"
            heads, kv_heads = per_layer("attention.head_count", layer), per_layer("attention.head_count_kv", layer)
            h = rms_norm(x, tensors[f"{blk}.attn_norm.weight"], eps)
            q, k, v = (linear(f"{blk}.attn_{name}", h).reshape(-1, dim) for name in "qkv")
            if f"{blk}.attn_q_norm.weight" in tensors:
                q = np.array([rms_norm(head, tensors[f"{blk}.attn_q_norm.weight"], eps) for head in q])
                k = np.array([rms_norm(head, tensors[f"{blk}.attn_k_norm.weight"], eps) for head in k])
            q = [rotate(head, position, angles, magnitude, interleaved) for head in q]
            past_k.append(np.array([rotate(head, position, angles, magnitude, interleaved) for head in k], np.float16))
            past_v.append(v.astype(np.float16))
            first = max(0, position - window + 1) if window else 0
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = []
                for past in range(first, position + 1):
                    score = float(q[head] @ past_k[past][group].astype(np.float64)) * scale
                    scores.append(cap * math.tanh(score / cap) if cap else score)
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                mixed += [sum(s * past_v[first + i][group].astype(np.float64) for i, s in enumerate(shares))]
            x = x + linear(f"{blk}.attn_output", np.concatenate(mixed))
            h = rms_norm(x, tensors[f"{blk}.ffn_norm.weight"], eps)
            gate = linear(f"{blk}.ffn_gate", h)
            x = x + linear(f"{blk}.ffn_down", gate / (1 + np.exp(-gate)) * linear(f"{blk}.ffn_up", h))
        h = rms_norm(x, tensors["output_norm.weight"], eps)
        y = tensors.get("output.weight", tensors["token_embd.weight"]) @ h
        final = get("final_logit_softcapping", 0.0)
        out.append(final * np.tanh(y / final) if final else y)
    return np.array(out)
