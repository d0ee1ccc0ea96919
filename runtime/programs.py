"""The programs of a loaded model, one for each bucket of tokens, planned and compiled on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .config import ModelConfig
from .model import Head, Logits, build_program
from .plan import Fallback, Plan, plan
from .settings import Settings
from .step import Executable, Step

# A chunk reads all weights once, so long ones are what makes a prompt fast, and short ones keep a follow-up question
# from paying for 512 rows of padding. Each size costs one more compiled program.
PREFILL_CHUNKS = (512, 64, 8)

# What a chunk costs beside its rows, in rows: reading the weights, launches, tiles left half empty. Of SmolLM2-135M
# through OpenCL on 2 Zen 4 cores, 8 rows took 76 ms and 64 rows 310 ms in the same run.
CHUNK_OVERHEAD = 10

# Rows of one teacher-forced run. All its logits come back to the host: 64 rows of 152k tokens are 39 MB.
SCORE_CHUNK = 64


def chunk_sizes(tokens: int, sizes: Sequence[int] = PREFILL_CHUNKS) -> list[int]:
    """Chunks to run for `tokens`, largest first; only the last has padding. `sizes` fall.

    What full chunks of a size leave over goes to smaller ones, or to one more of that size where its padding is
    cheaper than the extra runs.
    """
    if tokens <= 0:
        return []
    size, *smaller = sizes
    full, left = divmod(tokens, size)
    rest = chunk_sizes(left, smaller) if smaller else []
    if left and (not rest or sum(rest) + CHUNK_OVERHEAD * len(rest) >= size + CHUNK_OVERHEAD):
        rest = [size]
    return [size] * full + rest


class Bucket(NamedTuple):
    """Which program: rows per run, whose logits it computes, and what becomes of them (as in `build_program`)."""

    tokens: int
    logits: Logits
    head: Head = "argmax"
    biased: bool = False


DECODE = Bucket(1, "last", "argmax")
DECODE_SAMPLING = Bucket(1, "last", "sample")
SCORE = Bucket(SCORE_CHUNK, "all", "logits")
SCORE_STEP = Bucket(1, "last", "logits")


def prefill(tokens: int) -> Bucket:
    """Fills the KV cache and nothing else: the last token of a prompt goes through the decode step."""
    return Bucket(tokens, "none")


class Programs:
    """Plans and compiles programs for one model on one backend; they share weights, KV cache and state buffers."""

    def __init__(self, config: ModelConfig, executable: Executable, settings: Settings, ctx: int) -> None:
        self.config, self.executable, self.settings, self.ctx = config, executable, settings, ctx
        self.backend = executable.backend
        self._steps: dict[Bucket, Step] = {}

    def plan(self, bucket: Bucket, fallback: Fallback | None = None) -> Plan:
        """The plan under `fallback` (None: what the settings say)."""
        program = build_program(
            self.config,
            **bucket._asdict(),
            ctx=self.ctx,
            page_size=self.backend.page_size,
            precision=self.settings.precision,
        )
        return plan(program, self.backend, fallback or self.settings.fallback)

    def step(self, bucket: Bucket, planned: Plan | None = None) -> Step:
        """The compiled program, ready to run; compiled on first use."""
        if bucket not in self._steps:
            self._steps[bucket] = self.executable.compile(planned or self.plan(bucket))
        return self._steps[bucket]
