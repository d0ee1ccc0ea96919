"""Tokens to text while they come in: no half characters, no half stop strings.

    text = TextStream(tokenizer)
    stop = StopStrings(["\\nUser:"])
    for token_id in generated:
        print(stop.push(text.push(token_id)), end="")
        if stop.stopped:
            break
    print(stop.push(text.finish()) + stop.finish())

A token is bytes, not characters: an emoji may arrive in four pieces, and a model may produce bytes that are no UTF-8.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..kernels.errors import UsageError
from .tokenizer import Tokenizer


class TextStream:
    """What `push` and `finish` return, joined, is `tokenizer.decode(ids, continuation=True)`.

    Bytes are held back until they are a whole character; those that cannot become one are U+FFFD as soon as that is
    certain. `skip_special` as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often "", if it is part of a character."""
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back, as U+FFFD: no more tokens come. The stream is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopStrings:
    """Text up to the first of `stops`, however it is cut into pieces.

    "First" is the one that is complete first; of several complete at the same character, the longest. `stopped` is
    that string, None before. What might still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("a stop string is empty: it would stop every text at once")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain not to belong to a stop string; "" for good once one is found."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: no more text comes, so it is no stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
