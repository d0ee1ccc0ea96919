"""llama.cpp through the C interface that llama-cpp-python exposes, as its own llama-bench drives it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

LARGEST_BATCH = 2048  # llama_context_default_params; cut into micro-batches of 512


class Side:
    def __init__(self, model: str, threads: int, ctx: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = ctx, LARGEST_BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def about(self) -> dict[str, Any]:
        features = self.api.llama_print_system_info().decode().strip(" |\n")
        return {"version": f"llama-cpp-python {version('llama-cpp-python')}", "build": features}

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        self._clear()
        self._feed(ids)
        found: list[int] = []
        for _ in range(count):
            found.append(int(self._logits().argmax()))
            self._feed(found[-1:])
        return found

    def prompt(self, ids: Sequence[int]) -> float:
        self._clear()
        started = time.perf_counter()
        self._feed(ids)
        self._logits()
        return time.perf_counter() - started

    def decode(self, ids: Sequence[int], count: int) -> float:
        """As in llama-bench no token is chosen: what is fed does not depend on the logits."""
        self._clear()
        self._feed(ids)
        tokens = np.random.default_rng(len(ids)).integers(0, self.vocab, count).tolist()
        started = time.perf_counter()
        for token in tokens:
            self._feed([token])
            self._logits()
        return time.perf_counter() - started

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _feed(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), LARGEST_BATCH):
            part = ids[start : start + LARGEST_BATCH]
            tokens = (self.api.llama_token * len(part))(*part)
            status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part)))
            if status:
                raise RuntimeError(f"llama_decode of {len(part)} tokens: status {status}")
        self.api.llama_synchronize(self.context)

    def _logits(self) -> np.ndarray:
        """Of the last token fed, a view."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab,))
