"""Streams of tokens and of text: whole characters only, and stop strings wherever the pieces are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polykern.kernels.errors import UsageError
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.stream import StopStrings, TextStream
from polykern.runtime.tokenizer import Tokenizer
from vocabularies import byte_level, sentencepiece

BYTES = Tokenizer.from_metadata(byte_level(), "m.gguf")  # byte b is token b + 3
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def smollm(default_model: Path) -> Tokenizer:
    with GGUFFile.open(default_model) as file:
        return Tokenizer.from_metadata(file.metadata, str(default_model))


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    text = TextStream(tokenizer, skip_special=skip_special)
    return [*(text.push(i) for i in ids), text.finish()]


def fed(stop: StopStrings, pieces: list[str]) -> str:
    return "".join(stop.push(piece) for piece in pieces) + stop.finish()


# Text


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 49151)), skip=st.booleans())
def test_any_tokens_joined_are_their_text(smollm: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(stream(smollm, ids, skip_special=skip)) == smollm.decode(ids, skip_special=skip)


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_text_comes_back_in_whole_characters(smollm: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces = stream(smollm, smollm.encode(text, errors="ignore", special=False))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == smollm.decode(smollm.encode(text, errors="ignore", special=False))


@settings(deadline=None)
@given(text=TEXT)
def test_cut_after_any_byte(text: str) -> None:
    data = text.encode()
    pieces = stream(BYTES, [byte + 3 for byte in data])
    for cut in range(len(data) + 1):
        assert "".join(pieces[:cut]) == data[:cut].decode("utf-8", "ignore"), "whole characters, and all of them"


@settings(deadline=None)
@given(data=st.binary())
def test_bytes_that_are_no_text(data: bytes) -> None:
    assert "".join(stream(BYTES, [byte + 3 for byte in data])) == data.decode("utf-8", "replace")


def test_invalid_bytes_are_replaced_once_that_is_certain() -> None:
    text = TextStream(BYTES)
    assert text.push(0xFF + 3) == "\ufffd", "no character has this byte"
    assert [text.push(byte + 3) for byte in b"\xe2\x82"] == ["", ""], "may become a euro sign"
    assert text.push(ord("a") + 3) == "\ufffda"
    assert [text.push(byte + 3) for byte in "€".encode()] == ["", "", "€"]
    assert text.push(0xF0 + 3) == ""
    assert text.finish() == "\ufffd"
    assert text.finish() == ""
    assert text.push(ord("b") + 3) == "b"


def test_control_tokens() -> None:
    ids = [1, *BYTES.encode("hé"), 2]
    assert "".join(stream(BYTES, ids)) == "hé"
    assert "".join(stream(BYTES, ids, skip_special=False)) == "<|im_start|>hé<|im_end|>"
    first, second = (byte + 3 for byte in "é".encode())
    assert "".join(stream(BYTES, [first, 2, second])) == "é" == BYTES.decode([first, 2, second])


def test_a_stream_goes_on_from_the_prompt() -> None:
    tok = Tokenizer.from_metadata(sentencepiece(("▁the", "▁t", "he", "▁", "t", "h", "e")), "m.gguf")
    ids = tok.encode("the", add_bos=False)
    assert "".join(stream(tok, ids)) == " the" == tok.decode(ids, continuation=True)
    assert "".join(stream(tok, [byte + 3 for byte in "日".encode()])) == "日"


# Stop strings


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads one character after the other until a stop string is complete; of several the longest."""
    for end in range(len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


ALPHABET = st.sampled_from("ab\n")


@settings(deadline=None, max_examples=500)
@given(
    pieces=st.lists(st.text(ALPHABET, max_size=5), max_size=8),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
)
def test_stops_do_not_depend_on_the_cuts(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    shown = ""
    expected, found = by_definition("".join(pieces), stops)
    for piece in pieces:
        shown += stop.push(piece)
        assert expected.startswith(shown), "nothing is shown that a stop string takes back"
    assert (shown + stop.finish(), stop.stopped) == (expected, found)


def test_what_is_held_back() -> None:
    stop = StopStrings(["\nUser:", "END"])
    assert [stop.push(piece) for piece in ("Hi", "\n", "Us", "ers", " E", "N", "D!", "more")] == [
        "Hi", "", "", "\nUsers", " ", "", "", "",
    ]  # fmt: skip
    assert stop.stopped == "END"
    assert stop.finish() == ""
    stop = StopStrings(["END"])
    assert stop.push("The E") == "The "
    assert stop.finish() == "E"
    assert stop.stopped is None


def test_no_stop_strings() -> None:
    stop = StopStrings([])
    assert fed(stop, ["a", "", "b"]) == "ab"
    assert stop.stopped is None


def test_an_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="a stop string is empty: it would stop every text at once"):
        StopStrings(["x", ""])
