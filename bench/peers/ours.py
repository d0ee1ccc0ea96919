"""polykern on one of its backends. In `exact` precision it also judges what the other sides say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class Side:
    def __init__(
        self, model: str, threads: int, ctx: int, backend: str, device: str | None = None, precision: str = "fast"
    ) -> None:
        from polykern.runtime.load import load
        from polykern.runtime.settings import Settings

        self.session = load(
            Settings(
                model=model, backend=backend, device=device, threads=threads, ctx=ctx, precision=precision  # type: ignore[arg-type]
            )
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        from polykern.runtime.machine import commit, packages

        return {
            "version": f"polykern {packages()['polykern']}",
            "commit": commit(),
            "backend": self.session.backend.name,
            "device": self.session.backend.device.name,
            "precision": self.session.settings.precision,
            "vocab": self.session.config.vocab_size,
        }

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        self.session.reset()
        return list(self.session.generate(ids, max_tokens=count))

    def prompt(self, ids: Sequence[int]) -> float:
        self.session.reset()
        started = time.perf_counter()
        next(self.session.generate(ids, max_tokens=1))
        return time.perf_counter() - started

    def decode(self, ids: Sequence[int], count: int) -> float:
        """The first token ends the prompt; `count` more follow."""
        self.session.reset()
        tokens = self.session.generate(ids, max_tokens=count + 1)
        next(tokens)
        started = time.perf_counter()
        if sum(1 for _ in tokens) != count:
            raise RuntimeError(f"the context of {self.session.ctx} tokens is too small for {len(ids)} and {count} more")
        return time.perf_counter() - started

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.session.tokenizer.encode(text) for text in texts]

    def regrets(self, ids: Sequence[int], chosen: Sequence[int]) -> list[float]:
        """By how much the logit of each chosen token is below the largest: 0 where this model chooses the same."""
        logits = self.session.logits([*ids, *chosen[:-1]])[len(ids) - 1 :]
        return [float(row.max() - row[token]) for row, token in zip(logits, chosen, strict=True)]
