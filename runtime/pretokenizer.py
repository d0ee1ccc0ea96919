"""How byte-level BPE vocabularies split text into words before merging: `tokenizer.ggml.pre` as data.

Each scheme is a sequence of regular expressions. Every expression isolates its matches inside the pieces the one
before it left; what lies between two matches is a piece as well. Names, sequences and flags follow
https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
(`llm_tokenizer_bpe` for the expressions, `llama_vocab::impl::load` for names and flags). That engine knows no `(?i:…)`
and no possessive quantifiers and writes them out; here stands the form of the models' own tokenizer.json, which it
quotes beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..kernels.errors import ModelError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class Scheme:
    """One way to split: `patterns` in order; `ignore_merges`: a word that is a token as it stands is not merged;
    `add_bos`: the default where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ANY_DIGIT = r"\p{N}"
_THREE_DIGITS = "[0-9][0-9][0-9]"


def _cl100k(digits: str, letter: str = r"\p{L}") -> str:
    """The family of OpenAI's cl100k: `digits` a run of digits, `letter` what a word is made of."""
    other = r"[^\s\p{L}\p{N}]" if letter == r"\p{L}" else r"[^\s\p{L}\p{M}\p{N}]"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?{other}+[\r\n]*|{_BLANKS}"


def _o200k(digits: str, suffix: str) -> str:
    """The family of o200k: words end where case turns from lower to upper."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    words = f"{head}{upper}*{lower}+{suffix}|{head}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


def _ranges(spec: str) -> str:
    """`41-5A B5` as the inside of a character class."""
    return "".join("-".join(rf"\x{{{point}}}" for point in item.split("-")) for item in spec.split())


# The letters DeepSeek-LLM counts as words of their own: most cased letters, but by an older list than Unicode's.
_DEEPSEEK_LETTERS = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1"
    " 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A"
    " 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4"
    " 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128"
    " 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D"
    " A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F"
    " 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_PUNCTUATION = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_CJK = "[" + _ranges("4E00-9FA5 800-4E00 AC00-D7FF") + "]+"
_DEEPSEEK3_CJK = "[" + _ranges("4E00-9FA5 3040-309F 30A0-30FF") + "]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS
)
_BLOOM = r" ?[^(\s|" + _ranges("2E 2C 21 3F 2026 3002 FF0C 3001 964 6D4 60C") + ")]+"  # . , ! ? … 。 ， 、 । ۔ ،
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+"
    rf"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SCHEMES: dict[str, Scheme] = {
    "default": Scheme((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
    "gpt-2": Scheme((_GPT2,)),
    "smollm": Scheme((_ANY_DIGIT, _GPT2)),
    "falcon": Scheme((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
    "llama-bpe": Scheme((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    "dbrx": Scheme((_cl100k(r"\p{N}{1,3}"),)),
    "qwen2": Scheme((_cl100k(_ANY_DIGIT),)),
    "qwen35": Scheme((_cl100k(_ANY_DIGIT, r"[\p{L}\p{M}]"),)),
    "gpt-4o": Scheme((_o200k(r"\p{N}{1,3}", _CONTRACTIONS + "?"),)),
    "tekken": Scheme((_o200k(_ANY_DIGIT, ""),), ignore_merges=True, add_bos=True),
    "deepseek-llm": Scheme(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Scheme((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _ANY_DIGIT)),
    "deepseek-v3": Scheme((r"\p{N}{1,3}", _DEEPSEEK3_CJK, _DEEPSEEK3_WORDS)),
    "bloom": Scheme((_BLOOM,)),
    "viking": Scheme((_BLOOM, _ANY_DIGIT)),
    "bailingmoe": Scheme((_BAILING,)),
    "seed-coder": Scheme((_SEED,)),
}

# Other names for the same splitting. A file's name for it is the model's, so several mean one.
_ALIASES: dict[str, str] = {
    "gpt-2": "phi-2 mpt olmo jais gigachat mellum modern-bert a.x-4.0 exaone4 trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo megrez stablelm2 hunyuan grok-2 solar-open",
    "gpt-4o": "llama4 kanana2 minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm",
    "bloom": "poro-chat gpt3-finnish",
    "bailingmoe": "bailingmoe2 llada-moe",
}

SCHEMES: dict[str, Scheme] = _SCHEMES | {
    alias: _SCHEMES[name] for name, aliases in _ALIASES.items() for alias in aliases.split()
}


def scheme(name: str, path: str) -> Scheme:
    """The scheme `tokenizer.ggml.pre` names. Raises ModelError, naming `path` and the known ones, for any other."""
    if name not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise ModelError(f"{path}: tokenizer.ggml.pre is {name[:64]!r}, which is not known here; known: {known}")
    return SCHEMES[name]


def build(patterns: tuple[str, ...]) -> PreTokenizer:
    """`patterns`, then the byte-to-character map, as one pre-tokenizer of the `tokenizers` package."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)
