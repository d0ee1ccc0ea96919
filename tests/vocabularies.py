"""Small vocabularies as the key/value section of a GGUF file holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tiny_llama import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(merges: Sequence[str] | None = (), **keys: Any) -> dict[str, Any]:
    """`tokenizer.ggml.model` = gpt2: SPECIAL, the 256 bytes (byte b has id b + 3), what `merges` make, a tag <user>.

    `keys` replace or add `tokenizer.ggml.*`; None takes one away.
    """
    merged = dict.fromkeys(merge.replace(" ", "") for merge in merges or ())
    tokens = [*SPECIAL, *byte_alphabet(), *merged, "<user>"]
    types = [CONTROL] * len(SPECIAL) + [NORMAL] * (256 + len(merged)) + [USER_DEFINED]
    own: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": None if merges is None else list(merges),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return _prefixed(own | keys)


def sentencepiece(pieces: Sequence[str], scores: Sequence[float] | None = None, **keys: Any) -> dict[str, Any]:
    """`tokenizer.ggml.model` = llama: <unk>, <s>, </s>, the 256 bytes (byte b has id b + 3), `pieces` by falling score,
    and a tag <user>. `keys` as above."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<user>"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED]
    ranked = scores or [-float(rank) for rank in range(len(pieces))]
    own: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array([0.0] * 259 + list(ranked) + [0.0], np.float32),
    }
    return _prefixed(own | keys)


def _prefixed(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
