"""transformers on torch: the model unpacked to `dtype`, eager, attention by torch's SDPA."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Side:
    def __init__(self, model: str, threads: int, ctx: int, dtype: str = "bfloat16") -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the file is here; without this each load asks the hub first
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.transformers, self.dtype = torch, transformers, getattr(torch, dtype)
        path = Path(model)
        # Packed weights are unpacked again in every step on a CPU (integrations/gguf/kernels.py of transformers 5.24).
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=self.dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
        ).eval()

    def about(self) -> dict[str, Any]:
        return {
            "version": f"torch {self.torch.__version__}, transformers {self.transformers.__version__}",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "weight_bytes": self.dtype.itemsize,
        }

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        cache = self._cache()
        found, token = [], self._step(ids, cache)
        for _ in range(count):
            found.append(token)
            token = self._step([token], cache)
        return found

    def prompt(self, ids: Sequence[int]) -> float:
        cache = self._cache()
        started = time.perf_counter()
        self._step(ids, cache)
        return time.perf_counter() - started

    def decode(self, ids: Sequence[int], count: int) -> float:
        cache = self._cache()
        token = self._step(ids, cache)
        started = time.perf_counter()
        for _ in range(count):
            token = self._step([token], cache)
        return time.perf_counter() - started

    def _cache(self) -> Any:
        return self.transformers.DynamicCache(config=self.model.config)

    def _step(self, ids: Sequence[int], cache: Any) -> int:
        batch = self.torch.tensor([ids])
        return int(self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
