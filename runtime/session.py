"""A loaded model that answers: prefill, the decode loop, and the KV cache kept from one prompt to the next.

The last token of a prompt goes through the decode step like every token after it, so a token is chosen in one place
only, and prefill does nothing but fill the cache. While decoding, the token id goes from the step to itself on the
device; the host reads it and decides whether to go on.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..kernels.errors import ModelError, UsageError
from ..kernels.quant import Array
from ..kernels.spi import Backend, Progress
from .choice import Choice
from .gguf import GGUFFile
from .plan import Plan
from .programs import DECODE, DECODE_SAMPLING, SCORE, SCORE_STEP, Bucket, Programs, chunk_sizes, prefill
from .settings import Sampling
from .step import Step
from .tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context"]


class Session:
    """One model on one backend with one sequence in its KV cache. Not thread-safe.

    ctx            capacity of the KV cache in tokens
    plan           how the decode step runs, call by call
    choice         what `--backend auto` decided on; None where there was nothing to decide
    metadata       the keys of the GGUF file
    timings        of the last generation: {"load_s", "ttft_s", "prefill_tps", "decode_tps"}; a rate nobody could
                   measure (no token) is 0
    finish_reason  why the last generation ended; None while it runs, or if it was abandoned
    """

    def __init__(
        self,
        programs: Programs,
        plan: Plan,
        tokenizer: Tokenizer,
        gguf: GGUFFile,
        load_s: float,
        choice: Choice | None = None,
    ) -> None:
        self.choice = choice
        self.plan, self.tokenizer, self.metadata, self.load_s = plan, tokenizer, gguf.metadata, load_s
        self.settings, self.config, self.ctx = programs.settings, programs.config, programs.ctx
        self.backend: Backend = programs.backend
        self.gguf_path = Path(self.settings.model)
        self.timings = self._no_timings()
        self.finish_reason: FinishReason | None = None
        self._programs, self._state = programs, programs.executable
        self._cached: list[int] = []  # tokens whose keys and values are in the cache, from position 0 on
        self._generation = 0
        pages = -(-self.ctx // self.backend.page_size)
        self._state.write("block_table", np.arange(pages, dtype=np.int32))
        self._state.write("cos_sin", self.config.rope.table(self.ctx))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.backend.close()

    def reset(self) -> None:
        """Forget the sequence in the KV cache; a generation under way cannot go on."""
        self._generation += 1
        self._cached = []

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = frozenset(),
    ) -> Iterator[int]:
        """Token ids that follow the prompt, one by one; ends before a token of `stop_ids`, which is not yielded.

        Ends with `finish_reason` "stop", "length" (max_tokens reached) or "context" (KV cache full). A prompt that
        begins like the sequence in the cache only pays for the rest. It may be abandoned at any time (Ctrl-C, break);
        the next call starts afresh. Raises ModelError for a prompt longer than `ctx`, UsageError for an empty one or
        an id outside the vocabulary.
        """
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"max_tokens is {max_tokens}, expected at least 0")
        prompt = self._checked("the prompt", prompt_ids)
        sampling = sampling or Sampling()
        if sampling.suppress:
            self._checked("suppress", sorted(sampling.suppress))
        return self._generate(prompt, max_tokens, sampling, frozenset(stop_ids))

    def _generate(
        self, prompt: list[int], max_tokens: int | None, sampling: Sampling, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        self._generation += 1
        mine = self._generation
        self.finish_reason = None if max_tokens != 0 else "length"
        self.timings = self._no_timings()
        if max_tokens == 0:
            return
        is_greedy = sampling.temperature == 0
        bucket = DECODE if is_greedy else DECODE_SAMPLING
        step = self._step(bucket._replace(biased=bool(sampling.suppress)))
        if sampling.suppress:
            bias = np.zeros(self.config.vocab_size, np.float32)
            bias[list(sampling.suppress)] = -np.inf
            self._state.write("logit_bias", bias)
        if not is_greedy:
            knobs = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            self._state.write("sampling", np.array([knobs], np.float32))
            self._state.write("rng", np.array([[sampling.seed, 0]], np.uint32))
        chunks = self._reuse(prompt[:-1])
        self.timings["load_s"] = self.load_s
        computed = len(prompt) - len(self._cached)
        started = time.perf_counter()
        self._prefill(prompt[len(self._cached) : -1], chunks)
        fed, produced, first_at = prompt[-1], 0, 0.0
        self._feed(fed)
        while self.finish_reason is None:
            token = self._next(step, fed)
            produced += 1
            now = time.perf_counter()
            if produced == 1:
                first_at = now
                self.timings["ttft_s"] = now - started
                self.timings["prefill_tps"] = computed / (now - started)
            else:
                self.timings["decode_tps"] = (produced - 1) / (now - first_at)
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            if produced == max_tokens:
                self.finish_reason = "length"
            elif len(self._cached) == self.ctx:
                self.finish_reason = "context"
            yield token
            if mine != self._generation:
                raise UsageError("the session was used for something else; this generation cannot go on")
            fed = token

    def nll(self, ids: Sequence[int], *, by_step: bool = False, progress: Progress | None = None) -> list[float]:
        """Negative log-likelihood (natural logarithm) of each token after the first, given those before it.

        Computed in chunks as a prompt is; `by_step` feeds the decode step, whose kernels may round differently.
        Raises ModelError for more than `ctx` tokens.
        """
        found: list[float] = []
        known = self._checked("the text", ids)
        for start, logits in self._scores(known[:-1], by_step):
            wide = logits.astype(np.float64)
            targets = known[start + 1 : start + 1 + len(wide)]
            wide -= wide.max(axis=1, keepdims=True)
            total = np.log(np.exp(wide).sum(axis=1))
            found += (total - wide[np.arange(len(wide)), targets]).tolist()
            if progress:
                progress("perplexity", len(found), len(known) - 1)
        return found

    def logits(self, ids: Sequence[int], *, by_step: bool = False) -> Array:
        """Logits after each token, float32 [len(ids), vocab]; `by_step` as in `nll`."""
        known = self._checked("the text", ids)
        return np.concatenate([logits for _, logits in self._scores(known, by_step)])

    def bench(
        self, prompt_tokens: int, decode_tokens: int, repetitions: int, progress: Progress | None = None
    ) -> dict[str, list[float]]:
        """Tokens per second of each repetition: {"pp512": [...], "tg128": [...]}, after one warm-up of each.

        pp: a prompt of random ids into an empty cache, up to the id that follows it. tg: so many decode steps from an
        empty cache, each read back. Either count may be 0, and is then left out.
        """
        for what, count in (("prompt", prompt_tokens), ("decode", decode_tokens)):
            if count > self.ctx:
                raise ModelError(f"{what} length {count} does not fit the context: --ctx is {self.ctx}")
        ids = np.random.default_rng(1).integers(0, self.config.vocab_size, max(1, prompt_tokens)).tolist()
        tests: dict[str, tuple[list[int], int]] = {}
        if prompt_tokens:
            tests[f"pp{prompt_tokens}"] = (ids, 1)
        if decode_tokens:
            tests[f"tg{decode_tokens}"] = (ids[:1], decode_tokens)
        found: dict[str, list[float]] = {}
        for name, (prompt, steps) in tests.items():
            seconds: list[float] = []
            for done in range(repetitions + 1):
                if progress:
                    progress(name, done, repetitions + 1)
                self.reset()
                chunks = self._reuse(prompt[:-1])
                started = time.perf_counter()
                self._prefill(prompt[:-1], chunks)
                self._feed(prompt[-1])
                token = prompt[-1]
                for _ in range(steps):
                    token = self._next(self._step(DECODE), token)
                seconds.append(time.perf_counter() - started)
            if progress:
                progress(name, repetitions + 1, repetitions + 1)
            found[name] = [max(len(prompt), steps) / s for s in seconds[1:]]
        return found

    # The KV cache holds `_cached`. It grows only after a run has ended, so an interrupt leaves it true.

    def _reuse(self, ids: list[int]) -> list[tuple[int, Step]]:
        """Cut the cache down to what it shares with `ids`; the compiled chunks that would add the rest."""
        shared = 0
        for old, new in zip(self._cached, ids, strict=False):
            if old != new:
                break
            shared += 1
        del self._cached[shared:]
        return [(size, self._step(prefill(size))) for size in chunk_sizes(len(ids) - shared)]

    def _prefill(self, ids: list[int], chunks: Sequence[tuple[int, Step]]) -> None:
        """Add `ids` to the cache."""
        done = 0
        for size, step in chunks:
            part = ids[done : done + size]
            self._write_inputs(f"prefill{size}.", size, part)
            step.run()
            # Without this an error of the device would surface later, as another's.
            self.backend.synchronize()
            self._cached += part
            done += size

    def _feed(self, token: int) -> None:
        """Put the decode step behind what is cached, about to read `token`."""
        self._write_inputs("", 1, [token])

    def _next(self, step: Step, fed: int) -> int:
        """Run the decode step on `fed`, which it reads by itself: the token that follows."""
        step.run()
        token = int(self._state.read("token_ids")[0])
        self._cached.append(fed)
        return token

    def _write_inputs(self, prefix: str, size: int, ids: list[int]) -> None:
        """`ids` behind what is cached, and padding rows up to `size`."""
        padding = np.full(size - len(ids), -1, np.int32)
        first = len(self._cached)
        inputs = {
            "token_ids": np.array(ids, np.int32),
            "positions": np.arange(first, first + len(ids), dtype=np.int32),
            "seq_ids": np.zeros(len(ids), np.int32),
        }
        for name, values in inputs.items():
            self._state.write(f"{prefix}{name}", np.concatenate([values, padding]))

    def _scores(self, ids: list[int], by_step: bool) -> Iterator[tuple[int, Array]]:
        """(index of its first token, logits [n, vocab]) of chunk after chunk."""
        self.reset()
        bucket = SCORE_STEP if by_step else SCORE
        size, prefix = bucket.tokens, "" if by_step else f"prefill{bucket.tokens}."
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            step = self._step(bucket)
            self._write_inputs(prefix, size, part)
            step.run()
            logits = self._state.read(f"{prefix}logits", (len(part), self.config.vocab_size))
            self._cached += part
            yield start, logits

    def _step(self, bucket: Bucket) -> Step:
        """A compiled program; compiling it late counts as loading."""
        started = time.perf_counter()
        step = self._programs.step(bucket)
        self.load_s += time.perf_counter() - started
        return step

    def _no_timings(self) -> dict[str, float]:
        return {"load_s": self.load_s, "ttft_s": 0.0, "prefill_tps": 0.0, "decode_tps": 0.0}

    def _checked(self, what: str, ids: Sequence[int]) -> list[int]:
        known = [operator.index(i) for i in ids]
        if not known:
            raise UsageError(f"{what} is empty: at least one token is needed")
        if len(known) > self.ctx:
            limit = self.config.context_length
            raise ModelError(f"{what} has {len(known)} tokens, --ctx is {self.ctx}, the model's maximum is {limit}")
        for place, token in enumerate(known):
            if not 0 <= token < self.config.vocab_size:
                last = self.config.vocab_size - 1
                raise UsageError(f"token {place} of {what} is {token}, outside the vocabulary (0 to {last})")
        return known
