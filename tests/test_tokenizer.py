"""Text to ids and back: against golden ids, against the definition of each algorithm, and on malformed vocabularies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polykern.kernels.errors import ModelError, ModelFormatError, PolykernError, UsageError
from polykern.runtime import tokenizer as tokenizer_module
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.pretokenizer import SCHEMES, build
from polykern.runtime.tokenizer import Tokenizer
from vocabularies import byte_level, sentencepiece

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def make(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata, "m.gguf")


@pytest.fixture(scope="session")
def smollm(default_model: Path) -> Tokenizer:
    with GGUFFile.open(default_model) as file:
        return Tokenizer.from_metadata(file.metadata, str(default_model))


@pytest.fixture(scope="session")
def byte_tokens(smollm: Tokenizer) -> frozenset[int]:
    """The bytes that are a token of their own."""
    pieces = (smollm.token_bytes(i) for i in range(smollm.vocab_size) if len(smollm.token_text(i)) == 1)
    return frozenset(piece[0] for piece in pieces)


# The default model


def test_golden_cases(smollm: Tokenizer, golden: dict[str, Any]) -> None:
    cases = [(case["text"], case["ids"]) for case in golden["tokenizer"]]
    cases += [(case["prompt"], case["prompt_ids"]) for case in golden["greedy"]]
    assert len(cases) >= 16
    for text, ids in cases:
        assert smollm.encode(text) == ids, text
        assert smollm.decode(ids, skip_special=False) == text


def test_what_the_default_model_says_of_itself(smollm: Tokenizer) -> None:
    assert (smollm.vocab_size, smollm.bos_id, smollm.eos_id) == (49152, 1, 2)
    assert not smollm.add_bos
    assert not smollm.add_eos
    assert {smollm.token_text(i) for i in smollm.eos_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert [i for i in range(smollm.vocab_size) if smollm.is_control(i)] == list(range(17))
    assert smollm.token_id("Ġthe") == smollm.encode(" the")[0]
    assert smollm.token_id("no such token") is None


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(TEXT, st.lists(st.sampled_from(["<|im_start|>", "<|", " ", "\n", "12", "é", "a"])).map("".join)))
def test_round_trip(smollm: Tokenizer, byte_tokens: frozenset[int], text: str) -> None:
    """Any text, but for the 21 bytes (U+0004 among them) that this vocabulary has no token for."""
    text = "".join(char for char in text if byte_tokens.issuperset(char.encode()))
    for special in (True, False):
        ids = smollm.encode(text, special=special)
        assert smollm.decode(ids, skip_special=False) == text
        assert b"".join(map(smollm.token_bytes, ids)).decode() == text
        assert special or not any(map(smollm.is_control, ids))


def test_special_tokens_in_text(smollm: Tokenizer) -> None:
    assert smollm.encode("<|im_end|>x") == [2, *smollm.encode("x")]
    plain = smollm.encode("<|im_end|>", special=False)
    assert len(plain) > 1
    assert 2 not in plain
    assert smollm.encode("<|im_end|", special=True) == smollm.encode("<|im_end|", special=False)
    ids = smollm.encode("<|im_start|>hi<|im_end|>")
    assert smollm.decode(ids) == "hi"
    assert smollm.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["a", " ", "1", "<|", "<|im_end|>", "The quick brown fox. "])
def test_a_megabyte_of_text(smollm: Tokenizer, unit: str) -> None:
    text = unit * ((1 << 20) // len(unit.encode()))
    assert smollm.decode(smollm.encode(text), skip_special=False) == text


# Any vocabulary


def test_text_that_cannot_be_encoded() -> None:
    tokens = byte_level()["tokenizer.ggml.tokens"]
    without_4 = [text for text in tokens if text != chr(256 + 4)]
    tok = make(byte_level(tokens=without_4, token_type=None))
    with pytest.raises(UsageError, match=r"cannot express: U\+0004 at character 2; remove or replace it"):
        tok.encode("ab\x04")
    with pytest.raises(UsageError, match=r"not valid Unicode: lone surrogate U\+DC80 at character 1; remove"):
        tok.encode("a\udc80\x04")
    assert tok.decode(tok.encode("a\udc80\x04b", errors="replace")) == "a\ufffd\ufffdb"
    assert tok.decode(tok.encode("a\udc80\x04b", errors="ignore")) == "ab"
    assert tok.decode(tok.encode("a\0b")) == "a\0b"
    assert tok.encode("") == []


def test_the_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_TEXT_BYTES", 10)
    tok = make(byte_level())
    assert len(tok.encode("é" * 5)) == 10
    with pytest.raises(UsageError, match="the text has 11 bytes, at most 10 can be encoded at once"):
        tok.encode("é" * 5 + "x")


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece(("a",))], ids=["gpt2", "llama"])
def test_ids_outside_the_vocabulary(metadata: dict[str, Any]) -> None:
    tok = make(metadata)
    last = tok.vocab_size - 1
    assert tok.token_bytes(last) == b"<user>"
    assert tok.token_bytes(np.int32(last)) == b"<user>"
    for bad in (-1, last + 1):
        for use in (tok.token_bytes, tok.token_text, tok.is_control, lambda i: tok.decode([i])):
            with pytest.raises(UsageError, match=rf"token id {bad} is outside the vocabulary \(0 to {last}\)"):
                use(bad)


def test_first_and_last_token() -> None:
    plain, both = make(byte_level()), make(byte_level(add_bos_token=True, add_eos_token=True))
    assert plain.encode("a") == [100]
    assert plain.encode("a", add_bos=True, add_eos=True) == [1, 100, 2] == both.encode("a")
    assert both.encode("a", add_bos=False, add_eos=False) == [100]
    assert both.encode("<|im_start|>a<|im_end|>") == [1, 100, 2], "never a second one on its own"
    assert both.encode("<|im_start|>a", add_bos=True) == [1, 1, 100, 2]
    assert both.encode("a", continuation=True, add_eos=False) == [100]
    assert both.encode("") == [1, 2]
    without = make(byte_level(bos_token_id=None))
    assert without.bos_id is None
    with pytest.raises(
        ModelError, match=r"m\.gguf: a beginning-of-sequence token was asked for, but the model has none"
    ):
        without.encode("a", add_bos=True)


def test_user_defined_tokens_are_text_that_is_never_split() -> None:
    tok = make(byte_level())
    user = tok.token_id("<user>")
    for special in (True, False):
        assert tok.encode("a<user>b", special=special) == [100, user, 101]
    assert not tok.is_control(user)
    assert tok.decode([user]) == "<user>"


def test_end_tokens() -> None:
    tokens = byte_level()["tokenizer.ggml.tokens"]
    changed = make(byte_level(tokens=[*tokens[:-1], "<|eot_id|>"], eos_token_id=5, eot_token_id=6, eom_token_id=7))
    assert changed.eos_ids == {0, 2, 5, 6, 7, len(tokens) - 1}
    assert changed.is_control(len(tokens) - 1), "an end token is a control token, even where the file says otherwise"
    html = make(byte_level(tokens=[*tokens[:-1], "</s>"]))
    assert html.eos_ids == {0, 2}, "</s> is an end only where it is a control token"
    assert make(sentencepiece(("a",))).eos_ids == {2}
    harmony = make(byte_level(tokens=[*tokens[:-3], "<|end|>", "<|return|>", "<|call|>"]))
    assert harmony.eos_ids == {0, 2, len(tokens) - 2, len(tokens) - 1}


def test_metadata_is_left_alone() -> None:
    metadata = byte_level(token_type=[1] * len(byte_level()["tokenizer.ggml.tokens"]))
    before = copy.deepcopy(metadata)
    make(metadata)
    assert metadata == before


# Byte-level BPE


def test_merges_by_rank() -> None:
    tok = make(byte_level(merges=("a b", "b c", "ab c", "c c", "c c")))
    assert [tok.token_text(i) for i in tok.encode("abcc bcc")] == ["abc", "c", "Ġ", "bc", "c"]


def test_a_word_that_is_a_token_is_not_merged() -> None:
    merges = ("b c", "a bc", "a b", "ab c")  # "abc" is reached through bc only if merged
    tokens = [*byte_level(merges=merges)["tokenizer.ggml.tokens"], "xyz"]
    for pre, pieces in (("gpt-2", ["x", "y", "z"]), ("llama-bpe", ["xyz"])):
        tok = make(byte_level(merges=merges, pre=pre, tokens=tokens, token_type=None))
        assert [tok.token_text(i) for i in tok.encode("xyz", add_bos=False)] == pieces


# Worked out by hand from the patterns; "|" stands between two words.
SPLITS = {
    "gpt-2": "Hello| World|'s| I|'|VE|  | 12345| x|=|y|;|\n|\n|नमस|्|त|े",
    "smollm": "Hello| World|'s| I|'|VE|   |1|2|3|4|5| x|=|y|;|\n|\n|नमस|्|त|े",
    "falcon": "Hello| World|'|s| I|'|VE|  | |123|45| x|=|y|;|\n|\n|नमस|्|त|े",
    "llama-bpe": "Hello| World|'s| I|'VE|  | |123|45| x|=y|;\n\n|नमस|्त|े",
    "qwen2": "Hello| World|'s| I|'VE|  | |1|2|3|4|5| x|=y|;\n\n|नमस|्त|े",
    "qwen35": "Hello| World|'s| I|'VE|  | |1|2|3|4|5| x|=y|;\n\n|नमस्ते",
    "gpt-4o": "Hello| World's| I'VE|  | |123|45| x|=y|;\n\n|नमस्ते",
    "tekken": "Hello| World|'s| I|'VE|  | |1|2|3|4|5| x|=y|;\n\n|नमस्ते",
    "deepseek-llm": "Hello| World|'|s| I|'|VE|   |12345| x|=|y|;|\n|\n|नमस्ते",
    "deepseek-coder": "Hello| World|'|s| I|'|VE|   |1|2|3|4|5| x|=|y|;|\n|\n|नमस|्|त|े",
    "deepseek-v3": "Hello| World|'s| I|'VE|   |123|45| x|=y|;\n\n|नमस्ते",
    "bloom": "Hello| World's| I'VE|  | 12345| x=y;|\n\n|नमस्ते",
    "seed-coder": "Hello| World|'s| I|'VE|  | |1|2|3|4|5| x|=y|;|\n\n|नमस|्त|े",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_where_text_is_split(pre: str) -> None:
    text = SPLITS[pre].replace("|", "")
    found = build(SCHEMES[pre].patterns).pre_tokenize_str(text)
    # A character that fills several words would be counted in each, so compare ends.
    assert [end for _, (_, end) in found] == [len("".join(SPLITS[pre].split("|")[: n + 1])) for n in range(len(found))]


def test_every_scheme_encodes_and_decodes() -> None:
    text = "Hello WorldFoo's I'VE   12345 x=y;\n\n 日本語 naïve, ça va?\t👩\u200d👩\u200d👧  \r\n"
    assert len(SCHEMES) >= 60
    for pre in SCHEMES:
        tok = make(byte_level(pre=pre))
        assert tok.decode(tok.encode(text)) == text, pre
        assert make(byte_level(pre=pre, add_bos_token=None)).add_bos == SCHEMES[pre].add_bos
    assert {pre for pre in SPLITS if SCHEMES[pre].add_bos} == {"llama-bpe", "tekken"}


def test_unknown_and_missing_pre(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ModelError, match=r"m.gguf: tokenizer.ggml.pre is 'kimi-k2', which is not .*: a.x-4.0, .*viking"
    ):
        make(byte_level(pre="kimi-k2"))
    assert make(byte_level(pre=None)).encode("a") == [100]
    assert "m.gguf: tokenizer.ggml.pre is missing" in caplog.text


# SentencePiece

PIECES = (
    "▁t", "he", "▁the", "▁a", "in", "▁▁", "er", "▁in", "ing", "▁▁▁▁", "re", "on", "▁th", "her", "▁she", "the", "aa",
    "▁", "t", "h", "e", "a", "i", "n", "g", "r", "o", "s", "é", "日", "<", "/", ">",
)  # fmt: skip


def by_definition(metadata: dict[str, Any], text: str) -> list[int]:
    """Merge the adjacent pair that makes the best-scored token, the leftmost of equals, until there is none; then
    bytes for what is in no token (Kudo & Richardson 2018, arXiv:1808.06226, section 3.1, as BPE)."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    parts = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@settings(deadline=None, max_examples=400)
@given(text=st.text(st.sampled_from("theaingros é日</>\n😀"), max_size=40))
def test_sentencepiece_by_definition(text: str) -> None:
    metadata = sentencepiece(PIECES)
    tok = make(metadata)
    assert tok.encode(text, add_bos=False, special=False) == by_definition(metadata, text)


@settings(deadline=None)
@given(text=TEXT.map(lambda text: text.replace("▁", "")), around=st.sampled_from(["", "<s>", "</s>", "<user>"]))
def test_sentencepiece_round_trip(text: str, around: str) -> None:
    for metadata in (sentencepiece(PIECES), sentencepiece(PIECES, add_space_prefix=False)):
        tok = make(metadata)
        whole = text + around + text
        assert tok.decode(tok.encode(whole, add_bos=False), skip_special=False) == whole
        assert tok.decode(tok.encode(text)) == text
        ids = tok.encode(whole, continuation=True)
        assert tok.bos_id not in ids or around == "<s>"
        if not around:
            assert tok.decode(ids, continuation=True) == whole


def test_sentencepiece_spaces_and_specials() -> None:
    tok = make(sentencepiece(PIECES))
    pieces: Callable[..., list[str]] = lambda *a, **k: [tok.token_text(i) for i in tok.encode(*a, **k)]  # noqa: E731
    assert pieces("the") == ["<s>", "▁the"]
    assert pieces("the", continuation=True) == ["the"]
    assert pieces("the</s>the", add_bos=False) == ["▁the", "</s>", "▁the"]
    assert pieces("the</s>the", continuation=True) == ["the", "</s>", "▁the"]
    assert pieces("the<user>the", continuation=True, special=False) == ["the", "<user>", "▁the"]
    assert pieces("</s>", special=False, add_bos=False) == ["▁", "<", "/", "s", ">"]
    assert pieces("<0x41>", special=False, add_bos=False)[1] == "<", "a byte's name is not that byte"
    assert tok.decode(tok.encode("the")) == "the"
    assert tok.decode(tok.encode("the"), continuation=True) == " the"
    assert tok.token_bytes(tok.encode(" the", add_bos=False)[0]) == b" "
    assert tok.token_bytes(3 + 0xE6) == b"\xe6"
    assert tok.add_bos
    assert (tok.bos_id, tok.eos_id) == (1, 2)


def test_sentencepiece_without_bytes_uses_the_unknown_token() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1], "tokenizer.ggml.scores": [0, 0, 0, -1, -2],
    }  # fmt: skip
    tok = make(metadata)
    assert tok.encode("a日本a") == [1, 3, 4, 0, 4]
    assert tok.encode("a日a", continuation=True) == [4, 0, 4]
    assert tok.encode("a日<unk>a", continuation=True) == [4, 0, 0, 3, 4]
    assert tok.decode([4, 0, 4]) == "aa"
    metadata["tokenizer.ggml.token_type"] = [1, 3, 3, 1, 1]
    with pytest.raises(
        ModelFormatError, match=r"m\.gguf: tokenizer\.ggml\.tokens: neither an unknown token nor all of"
    ):
        make(metadata)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["a", " ", "日"])
def test_sentencepiece_on_a_megabyte(unit: str) -> None:
    tok = make(sentencepiece(PIECES))
    text = unit * ((1 << 20) // len(unit.encode()))
    assert tok.decode(tok.encode(text)) == text


# Malformed files

TOKENS = byte_level()["tokenizer.ggml.tokens"]
LAST = len(TOKENS) - 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "m.gguf: the file has no tokenizer (key tokenizer.ggml.model)"),
        (
            byte_level(model="bert"),
            "m.gguf: tokenizer.ggml.model is 'bert'; supported: gpt2 (byte-level BPE), llama (Se",
        ),
        (byte_level(model=3), "m.gguf: tokenizer.ggml.model: expected str, found int"),
        (byte_level(tokens=None), "m.gguf: tokenizer.ggml.tokens: missing or empty"),
        (byte_level(tokens=[]), "m.gguf: tokenizer.ggml.tokens: missing or empty"),
        (byte_level(tokens="abc"), "m.gguf: tokenizer.ggml.tokens: expected an array, found str"),
        (byte_level(tokens=[1, 2]), "m.gguf: tokenizer.ggml.tokens: value 0 is of type int, expected str"),
        (byte_level(tokens=[*TOKENS[:-1], ""]), f"m.gguf: tokenizer.ggml.tokens: token {LAST} is empty"),
        (
            byte_level(tokens=[*TOKENS[:-1], "<|im_end|>"]),
            f"m.gguf: tokenizer.ggml.tokens: token '<|im_end|>' stands at 2 and again at {LAST}",
        ),
        (byte_level(token_type=[1, 3]), f"m.gguf: tokenizer.ggml.token_type: has 2 values for {LAST + 1} tokens"),
        (
            byte_level(token_type=[1] * LAST + [7]),
            f"tokenizer.ggml.token_type: token {LAST} has type 7, expected 0 to 6",
        ),
        (byte_level(token_type=[-1] + [1] * LAST), "tokenizer.ggml.token_type: token 0 has type -1, expected 0 to 6"),
        (
            byte_level(token_type=[6] + [1] * LAST),
            "tokenizer.ggml.token_type: token 0 is a byte but reads '<|endoftext|>', expected <0x..>",
        ),
        (byte_level(token_type=[1.5] * (LAST + 1)), "token_type: value 0 is of type float, expected int"),
        (byte_level(merges=None), "m.gguf: tokenizer.ggml.merges: missing; a gpt2 vocabulary needs it"),
        (
            byte_level(bos_token_id=LAST + 1),
            f"tokenizer.ggml.bos_token_id: is {LAST + 1}, but the vocabulary has {LAST + 1}",
        ),
        (byte_level(padding_token_id=-1), f"padding_token_id: is -1, but the vocabulary has {LAST + 1} tokens"),
        (byte_level(eos_token_id="2"), "m.gguf: tokenizer.ggml.eos_token_id: expected int, found str"),
        (byte_level(eos_token_id=True), "m.gguf: tokenizer.ggml.eos_token_id: expected int, found bool"),
        (byte_level(add_bos_token=1), "m.gguf: tokenizer.ggml.add_bos_token: expected bool, found int"),
        (
            byte_level(add_bos_token=True, bos_token_id=None),
            "add_bos_token: is true, but tokenizer.ggml.bos_token_id is missing",
        ),
        (
            byte_level(add_eos_token=True, eos_token_id=None),
            "add_eos_token: is true, but tokenizer.ggml.eos_token_id is missing",
        ),
        (sentencepiece(("a",), scores=(float("nan"),)), "tokenizer.ggml.scores: the score of token 259 is nan"),
        (sentencepiece(("a",), scores=(float("inf"),)), "tokenizer.ggml.scores: the score of token 259 is inf"),
        (sentencepiece(("a",), scores=(1.0, 2.0)), "m.gguf: tokenizer.ggml.scores: has 262 values for 261 tokens"),
        (
            sentencepiece(("a",)) | {"tokenizer.ggml.scores": None},
            "scores: missing; a llama vocabulary is merged by score",
        ),
        (sentencepiece(("a",), unknown_token_id=261), "unknown_token_id: is 261, but the vocabulary has 261 tokens"),
    ],
)
def test_malformed(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(PolykernError) as caught:
        make(metadata)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    unsupported = "has no tokenizer" in message or "supported:" in message
    assert type(caught.value) is (ModelError if unsupported else ModelFormatError)


@pytest.mark.parametrize(
    ("merge", "problem"),
    [
        ("a\u0109", "is 'aĉ', expected two tokens with a space between"),
        ("a b c", "is 'a b c', expected two tokens with a space between"),
        (" a", "is ' a', expected two tokens with a space between"),
        ("a ", "is 'a ', expected two tokens with a space between"),
        ("", "is '', expected two tokens with a space between"),
        ("日 a", "names '日', which is not in the vocabulary"),
        ("a 日", "names '日', which is not in the vocabulary"),
        ("b a", "names 'ba', which is not in the vocabulary"),
    ],
)
def test_malformed_merges(merge: str, problem: str) -> None:
    tokens = [*TOKENS[:-1], "ab"]
    with pytest.raises(ModelFormatError) as caught:
        make(byte_level(tokens=tokens, token_type=None, merges=["a b", merge]))
    assert str(caught.value) == f"m.gguf: tokenizer.ggml.merges: merge 1 {problem}"
