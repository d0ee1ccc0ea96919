"""Text to token ids and back, with the vocabulary inside a GGUF file.

encode        text -> ids; special tokens such as <|im_end|> are recognised in the text unless told not to
decode        ids -> text
token_bytes   the exact bytes of one token, which need not be whole characters: `stream` puts them together
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..kernels.errors import ModelError, UsageError
from .vocabulary import SILENT, WHOLE, TokenType, Vocabulary, read

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# The `tokenizers` package holds up to 0.5 KB per byte of text while it works (1 MB of digits: 450 MB, 3 s on Zen 4).
MAX_TEXT_BYTES = 8 << 20


class Tokenizer:
    """The vocabulary of one model.

    `vocab_size`: number of ids, 0 to vocab_size - 1. `bos_id`, `eos_id`: None where the model has none. `eos_ids`: all
    ids after which generation ends. `add_bos`, `add_eos`: what `encode` adds unless told otherwise. `path` is for error
    messages.
    """

    def __init__(self, vocabulary: Vocabulary, path: str) -> None:
        self.path = path
        self.vocab_size = len(vocabulary.texts)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self._vocabulary = vocabulary
        self._backends: dict[tuple[tuple[TokenType, ...], bool], Backend] = {}
        self._backend(WHOLE)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> Tokenizer:
        """The tokenizer that the key/value section `metadata` of the GGUF file `path` describes.

        Raises ModelFormatError where a key is missing or contradicts another, ModelError where the vocabulary is of a
        kind that is not supported.
        """
        return cls(read(metadata, path), path)

    def encode(
        self,
        text: str,
        *,
        special: bool = True,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        continuation: bool = False,
        errors: Literal["strict", "replace", "ignore"] = "strict",
    ) -> list[int]:
        """The ids of `text`.

        `special`: control tokens written out in the text become their ids; False treats them as plain text (for text
        from outside). `add_bos`, `add_eos`: True, False, or None for what the model wants, but never a second one.
        `continuation`: the text goes on from an earlier one, so neither a first token nor a first space is added.
        `errors`: lone surrogates, and characters that the vocabulary cannot express, are a UsageError ("strict"),
        become U+FFFD ("replace") or are dropped ("ignore": what other implementations do without a word).
        """
        text = self._checked(text, errors)
        kinds = WHOLE if special else (TokenType.USER_DEFINED,)  # text that is never split, but is text
        ids = self._encoded(text, kinds, continuation)
        if add_bos or (add_bos is None and self.add_bos and not continuation and ids[:1] != [self.bos_id]):
            ids.insert(0, self._required(self.bos_id, "beginning-of-sequence"))
        if add_eos or (add_eos is None and self.add_eos and ids[-1:] != [self.eos_id]):
            ids.append(self._required(self.eos_id, "end-of-sequence"))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out control tokens. SentencePiece vocabularies put a space before the first word, which
        is taken off again unless `continuation` says that the text goes on from an earlier one.
        """
        out = bytearray()
        prefix = at_start = self._vocabulary.space_prefix and not continuation
        for token_id in ids:
            piece = self.token_bytes(token_id)
            if self._vocabulary.types[token_id] in WHOLE:
                at_start = prefix
                if skip_special and self.is_control(token_id):
                    continue
            elif at_start:
                piece = piece.removeprefix(b" ")
                at_start = False
            out += piece
        return out.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; not necessarily whole characters. A control token gives its name."""
        return self._vocabulary.token_bytes(self._valid(token_id))

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it (`Ġthe`, `▁the`, `<|im_end|>`)."""
        return self._vocabulary.texts[self._valid(token_id)]

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary writes as `text`."""
        return self._vocabulary.ids.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether the token stands for no text: control tokens and the unknown token."""
        return self._vocabulary.types[self._valid(token_id)] in SILENT

    def _backend(self, kinds: tuple[TokenType, ...], *, space_prefix: bool = True) -> Backend:
        key = (kinds, space_prefix)
        if key not in self._backends:
            self._backends[key] = self._vocabulary.backend(kinds, space_prefix=space_prefix)
        return self._backends[key]

    def _encoded(self, text: str, kinds: tuple[TokenType, ...], continuation: bool) -> list[int]:
        if not (continuation and self._vocabulary.space_prefix):
            return self._backend(kinds).encode(text, add_special_tokens=False).ids
        # Without the space up to the first token that was found whole; after that one, words start afresh.
        encoded = self._backend(kinds, space_prefix=False).encode(text, add_special_tokens=False)
        ids: list[int] = encoded.ids
        for index, token_id in enumerate(ids):
            start = encoded.offsets[index][0]
            # The unknown token may also stand for a character that is in no token.
            if self._vocabulary.types[token_id] in kinds and text.startswith(self.token_text(token_id), start):
                return ids[:index] + self._backend(kinds).encode(text[start:], add_special_tokens=False).ids
        return ids

    def _valid(self, token_id: int) -> int:
        if not 0 <= operator.index(token_id) < self.vocab_size:
            raise UsageError(f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1})")
        return token_id

    def _required(self, token_id: int | None, name: str) -> int:
        if token_id is None:
            raise ModelError(f"{self.path}: a {name} token was asked for, but the model has none")
        return token_id

    def _checked(self, text: str, errors: str) -> str:
        """`text` in characters that the vocabulary can express, after the policy `errors`."""
        missing = self._vocabulary.missing_bytes
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            problem, where = "is not valid Unicode: lone surrogate", error.start
        else:
            if len(data) > MAX_TEXT_BYTES:
                raise UsageError(f"the text has {len(data)} bytes, at most {MAX_TEXT_BYTES} can be encoded at once")
            if missing.isdisjoint(data):
                return text
            problem = "has a character that this vocabulary cannot express:"
            where = next(i for i, char in enumerate(text) if not missing.isdisjoint(char.encode()))
        if errors == "strict":
            raise UsageError(f"the text {problem} U+{ord(text[where]):04X} at character {where}; remove or replace it")

        def expressible(char: str) -> bool:
            return not "\ud800" <= char <= "\udfff" and missing.isdisjoint(char.encode())

        substitute = "\ufffd" if errors == "replace" else ""
        return self._checked("".join(char if expressible(char) else substitute for char in text), "strict")
