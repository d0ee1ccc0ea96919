"""The vocabulary section of a GGUF file, checked and turned into what the `tokenizers` package runs.

Two kinds: `gpt2` (byte-level BPE, see `pretokenizer`) and `llama` (SentencePiece BPE: merges by score, bytes for what
is not in the vocabulary). Key names, defaults and the names of end tokens follow
https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp, called
"llama-vocab.cpp" below; where it repairs a malformed file (empty tokens, ids out of range) this reader refuses.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn

from ..kernels.errors import ModelError, ModelFormatError
from . import pretokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

log = logging.getLogger(__name__)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.h, `llama_token_type`)."""

    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


SILENT = (TokenType.CONTROL, TokenType.UNKNOWN)  # these stand for no text of their own
WHOLE = (*SILENT, TokenType.USER_DEFINED)  # these are found in the text before anything is split

# Tokens that end a turn or a text whatever the file's own keys say (llama-vocab.cpp, `special_eog_ids`).
END_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip


@dataclass
class Vocabulary:
    """What both kinds come down to.

    `texts`, `types`: per token id, as the file writes them; `ids` is the inverse of `texts`. `byte_of`: character to
    byte in a byte-level vocabulary. `missing_bytes`: bytes that no token can express. `space_prefix`: a space is put
    before the first word.
    """

    texts: list[str]
    ids: dict[str, int]
    types: list[int]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    model: BPE
    pre_tokenizer: Any = None
    space_prefix: bool = False
    missing_bytes: frozenset[int] = frozenset()
    byte_of: Mapping[str, int] | None = None

    def backend(self, kinds: tuple[TokenType, ...], *, space_prefix: bool = True) -> Backend:
        """A `tokenizers.Tokenizer` that finds tokens of `kinds` whole. All share one model, so another costs little.

        `space_prefix`: put the space before the first word, if the vocabulary wants one.
        """
        from tokenizers import AddedToken, normalizers
        from tokenizers import Tokenizer as Backend

        backend = Backend(self.model)
        if self.byte_of is None:
            first: list[Any] = [normalizers.Prepend("▁")] if space_prefix and self.space_prefix else []
            backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        if self.pre_tokenizer is not None:
            backend.pre_tokenizer = self.pre_tokenizer
        whole = [text for text, kind in zip(self.texts, self.types, strict=True) if kind in kinds]
        backend.add_tokens([AddedToken(text, normalized=False) for text in whole])
        return backend

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; its own name if it is found whole."""
        text, kind = self.texts[token_id], self.types[token_id]
        if kind in WHOLE:
            return text.encode("utf-8")
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if self.byte_of is None:
            return text.replace("▁", " ").encode("utf-8")
        try:
            return bytes([self.byte_of[char] for char in text])
        except KeyError:  # a token added later as plain text
            return text.encode("utf-8")


def read(metadata: Mapping[str, Any], path: str) -> Vocabulary:
    """The vocabulary that the key/value section `metadata` of the GGUF file `path` describes.

    Raises ModelFormatError where a key is missing or contradicts another, ModelError where the vocabulary is of a kind
    that is not supported.
    """
    keys = _Keys(metadata, path)
    model = keys.get("model", str, None)
    if model is None:
        raise ModelError(f"{path}: the file has no tokenizer (key tokenizer.ggml.model)")
    if model == "gpt2":
        return _byte_level(keys)
    if model == "llama":
        return _sentencepiece(keys)
    raise ModelError(
        f"{path}: tokenizer.ggml.model is {model[:64]!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
    )


class _Keys:
    """Checked access to `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self.metadata, self.path = metadata, path

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelFormatError(self.path, f"tokenizer.ggml.{key}", None, problem)

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            self.fail(key, f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any] | None:
        """The array as a list, or None where the file has none. `length`: what it must have, one value per token."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list):
            self.fail(key, f"expected an array, found {type(value).__name__}")
        values = list(values)
        if length is not None and len(values) != length:
            self.fail(key, f"has {len(values)} values for {length} tokens")
        allowed = {float, int} if kind is float else {kind}
        if not set(map(type, values)) <= allowed:
            index = next(i for i, item in enumerate(values) if type(item) not in allowed)
            self.fail(key, f"value {index} is of type {type(values[index]).__name__}, expected {kind.__name__}")
        return values

    def common(self, *, bos_id: int | None = None, eos_id: int | None = None, add_bos: bool) -> dict[str, Any]:
        """The fields of `Vocabulary` that both kinds have. The arguments hold where the file does not say."""
        texts = self.array("tokens", str)
        if not texts:
            self.fail("tokens", "missing or empty")
        ids = {text: index for index, text in enumerate(texts)}
        if len(ids) != len(texts):
            first = next(index for index, text in enumerate(texts) if ids[text] != index)
            self.fail("tokens", f"token {texts[first][:64]!r} stands at {first} and again at {ids[texts[first]]}")
        if "" in ids:
            self.fail("tokens", f"token {ids['']} is empty")
        types = self._types(texts)

        named = {name: default for name, default in (("bos", bos_id), ("eos", eos_id)) if default in range(len(texts))}
        named |= self._named_ids(len(texts))
        ends = {ids[name] for name in END_NAMES & ids.keys()}
        if {"<|return|>", "<|call|>"} <= ids.keys():  # harmony: <|end|> closes a message, not the turn
            ends.discard(ids.get("<|end|>", -1))
        for index in ends:
            types[index] = TokenType.CONTROL  # files exist that call them normal; llama-vocab.cpp corrects them too
        # "</s>" is also an HTML tag, so only where the file calls it a control token.
        ends |= {ids[text] for text in ("</s>",) if text in ids and types[ids[text]] == TokenType.CONTROL}
        ends |= {named[name] for name in ("eos", "eot", "eom") if name in named}

        flags = {
            "bos": self.get("add_bos_token", bool, add_bos and "bos" in named),
            "eos": self.get("add_eos_token", bool, False),
        }
        for name in (name for name, wanted in flags.items() if wanted and name not in named):
            self.fail(f"add_{name}_token", f"is true, but tokenizer.ggml.{name}_token_id is missing")
        return {
            "texts": texts,
            "ids": ids,
            "types": types,
            "bos_id": named.get("bos"),
            "eos_id": named.get("eos"),
            "eos_ids": frozenset(ends),
            "add_bos": flags["bos"],
            "add_eos": flags["eos"],
        }

    def _types(self, texts: list[str]) -> list[int]:
        types = self.array("token_type", int, len(texts))
        if types is None:
            return [int(TokenType.NORMAL)] * len(texts)
        if not set(types) <= set(TokenType):
            index = next(i for i, kind in enumerate(types) if kind not in set(TokenType))
            self.fail("token_type", f"token {index} has type {types[index]}, expected 0 to {max(TokenType)}")
        byte = int(TokenType.BYTE)
        for index in (i for i, kind in enumerate(types) if kind == byte):
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", texts[index]):
                self.fail("token_type", f"token {index} is a byte but reads {texts[index][:64]!r}, expected <0x..>")
        return types

    def _named_ids(self, size: int) -> dict[str, int]:
        """`{"bos": 1, …}` from every key `tokenizer.ggml.<name>_token_id`, each checked to be an id."""
        named: dict[str, int] = {}
        for key in self.metadata:
            if match := re.fullmatch(r"tokenizer\.ggml\.((\w+)_token_id)", key):
                index = self.get(match[1], int, None)
                if not 0 <= index < size:
                    self.fail(match[1], f"is {index}, but the vocabulary has {size} tokens")
                named[match[2]] = index
        return named


def _byte_level(keys: _Keys) -> Vocabulary:
    """`tokenizer.ggml.model` = gpt2: BPE over bytes written as printable characters, with an explicit merge list."""
    from tokenizers.models import BPE

    pre = keys.get("pre", str, None)
    if pre is None:
        log.warning("%s: tokenizer.ggml.pre is missing, text may be split in the wrong places", keys.path)
        pre = "default"
    scheme = pretokenizer.scheme(pre, keys.path)
    fields = keys.common(add_bos=scheme.add_bos)
    ids = fields["ids"]
    lines = keys.array("merges", str)
    if lines is None:
        keys.fail("merges", "missing; a gpt2 vocabulary needs it")
    merges: dict[tuple[str, str], None] = {}  # a pair listed twice keeps its first rank
    for index, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            keys.fail("merges", f"merge {index} is {line[:64]!r}, expected two tokens with a space between")
        if left not in ids or right not in ids or left + right not in ids:
            unknown = next(text for text in (left, right, left + right) if text not in ids)
            keys.fail("merges", f"merge {index} names {unknown[:64]!r}, which is not in the vocabulary")
        merges[left, right] = None
    byte_of = _byte_characters()
    return Vocabulary(
        **fields,
        model=BPE(vocab=ids, merges=list(merges), ignore_merges=scheme.ignore_merges),
        pre_tokenizer=pretokenizer.build(scheme.patterns),
        byte_of=byte_of,
        missing_bytes=frozenset(byte for char, byte in byte_of.items() if char not in ids),
    )


def _byte_characters() -> dict[str, int]:
    """Character -> byte of GPT-2's map: printable Latin-1 stands for itself, the rest for U+0100 and up in order.

    https://github.com/openai/gpt-2/blob/1b8a0187d70a2dbe4de8322598496d476e069f4c/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(rest)}


def _sentencepiece(keys: _Keys) -> Vocabulary:
    """`tokenizer.ggml.model` = llama: the adjacent pair that makes the token with the highest score is merged first.

    The score order becomes a merge list: every way to cut a token into two others, by falling score. Pairs of equal
    score are then ranked by id, where SentencePiece takes the leftmost; that can only matter where two cuts of one
    token, or two tokens of equal score, overlap in the text.
    """
    from tokenizers.models import BPE

    fields = keys.common(bos_id=1, eos_id=2, add_bos=True)
    texts, ids, types = fields["texts"], fields["ids"], fields["types"]
    scores = keys.array("scores", float, len(texts))
    if scores is None:
        keys.fail("scores", "missing; a llama vocabulary is merged by score")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            keys.fail("scores", f"the score of token {index} is {score}")
    unknown = keys.get("unknown_token_id", int, next((i for i, kind in enumerate(types) if kind == 2), None))
    if unknown is None and not all(f"<0x{byte:02X}>" in ids for byte in range(256)):
        keys.fail("tokens", "neither an unknown token nor all of <0x00> to <0xFF>: not every text could be encoded")

    # Control, unknown and byte tokens never come out of plain text, whatever it spells.
    pieces = {text: i for text, i in ids.items() if types[i] not in (*SILENT, TokenType.BYTE)}
    ranked = [
        (-scores[index], pieces[text[:cut]], pieces[text[cut:]])
        for text, index in pieces.items()
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]
    ranked.sort()
    return Vocabulary(
        **fields,
        model=BPE(
            vocab=ids,
            merges=[(texts[left], texts[right]) for _, left, right in ranked],
            unk_token=None if unknown is None else texts[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
        space_prefix=keys.get("add_space_prefix", bool, True),
    )
