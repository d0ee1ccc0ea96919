"""What the user asked for, checked when it is written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..kernels.errors import UsageError

Fallback = Literal["error", "warn", "allow"]
Precision = Literal["exact", "fast"]


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class Settings:
    """How to load a model.

    ctx        KV-cache capacity in tokens; None: what the model was trained for, at most `load.DEFAULT_CTX`
    threads    compute threads; None: all the device has
    fallback   what to do about calls the backend refuses: error | warn (run them elsewhere and say so) | allow
    precision  exact: float activations; fast: a kernel may round them to int8 per block of 32
    """

    model: str | Path
    backend: str = "auto"
    device: str | None = None
    threads: int | None = None
    ctx: int | None = None
    fallback: Fallback = "warn"
    precision: Precision = "fast"

    def __post_init__(self) -> None:
        _require("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        _require("ctx", self.ctx, self.ctx is None or self.ctx >= 1, "at least 1 token")
        _require("fallback", self.fallback, self.fallback in get_args(Fallback), "error, warn or allow")
        _require("precision", self.precision, self.precision in get_args(Precision), "exact or fast")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the op `sample` defines each step exactly.

    temperature  0: the most likely token, nothing is drawn
    top_k        0: off
    top_p        1: off
    min_p        0: off
    seed         same seed, same prompt, same backend: same tokens
    suppress     ids that are never chosen
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    suppress: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        _require("temperature", self.temperature, finite and self.temperature >= 0, "a number >= 0")
        # top_k travels to the device as a float32, which is exact up to 2^24
        _require("top_k", self.top_k, 0 <= self.top_k <= 1 << 24, "0 (off) to 16777216")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1")
        _require("seed", self.seed, 0 <= self.seed < 1 << 32, "0 to 4294967295")
