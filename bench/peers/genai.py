"""OpenVINO GenAI, which reads GGUF files itself, on the CPU with its own choice of precisions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class Side:
    def __init__(self, model: str, threads: int, ctx: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.genai, self.openvino, self.numpy = openvino_genai, openvino, numpy
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # else a prompt that was seen before is not computed again
        scheduler.max_num_batched_tokens = ctx  # the whole prompt at once
        scheduler.cache_size = 1  # GB
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY"
        )

    def about(self) -> dict[str, Any]:
        core = self.openvino.Core()
        read = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        hints = {name: str(core.get_property("CPU", name)).removeprefix("<Type: ").strip("'>") for name in read}
        features = [str(feature) for feature in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
        return {"version": f"openvino-genai {self.genai.__version__}", "hints": hints, "capabilities": features}

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        return [int(token) for token in self._generate(ids, count)[0]]

    def prompt(self, ids: Sequence[int]) -> float:
        started = time.perf_counter()
        self._generate(ids, 1)
        return time.perf_counter() - started

    def decode(self, ids: Sequence[int], count: int) -> float:
        """The first token ends the prompt; `count` more follow."""
        times = self._generate(ids, count + 1)[1]
        return times[-1] - times[0]

    def _generate(self, ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Tokens, and when each of them was there."""
        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        times: list[float] = []
        status, base = self.genai.StreamingStatus.RUNNING, self.genai.StreamerBase

        class Clock(base):  # type: ignore[misc, valid-type]
            def write(self, token: Any) -> Any:
                now = time.perf_counter()
                times.extend([now] * (len(token) if isinstance(token, list) else 1))
                return status

            def end(self) -> None:
                pass

        prompt = self.openvino.Tensor(self.numpy.array([ids], self.numpy.int64))
        result = self.pipeline.generate(prompt, config, Clock())
        tokens = list(result.tokens[0])
        if len(tokens) != count or len(times) != count:
            raise RuntimeError(f"asked for {count} tokens, got {len(tokens)} in {len(times)} steps")
        return tokens, times
