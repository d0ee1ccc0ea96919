"""The memory bandwidth a decode step could have at best: how fast this process can read."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np

ARRAY_BYTES = 512 << 20  # well past any cache


# Threads of a backend go on spinning when their work is done, TVM's for 13 ms (300,000 times `pause`, which takes 140
# cycles since Skylake): a sweep beside them measured half of what memory gives.
SETTLE_S = 0.04


class ReadProbe:
    """Read-only sweeps over memory by `threads` threads; `gb_per_s` is the median of those done so far.

    A sweep is numpy's maximum over int32, which releases the GIL. Of the reductions tried (maximum, sum, xor, dot; 8 to
    64 bits) it was the fastest on Zen 3 with 2 threads: 29 GB/s, xor 26, float32 sum 19.
    """

    def __init__(self, threads: int | None = None, nbytes: int = ARRAY_BYTES) -> None:
        self.threads = threads or usable_processors()
        self.nbytes = nbytes
        # Distinct values: pages that were never written, or hold zeros only, may all be one page.
        self._parts = np.array_split(np.arange(nbytes // 4, dtype=np.int32), self.threads)
        self._pool = ThreadPoolExecutor(self.threads)
        self.all: list[float] = []

    def sweep(self) -> float:
        """Read everything once; GB/s (1e9 bytes per second)."""
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        list(self._pool.map(np.max, self._parts))
        self.all.append(self.nbytes / (time.perf_counter() - started) / 1e9)
        return self.all[-1]

    @property
    def gb_per_s(self) -> float:
        return median(self.all)

    def close(self) -> None:
        self._pool.shutdown()
        self._parts = []


class DeviceProbe:
    """The same for a device with memory of its own: its backend's `peaks()["read"]`, measured at every sweep."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.all: list[float] = []

    def sweep(self) -> float:
        self.all.append(float(self._backend.peaks()["read"]))
        return self.all[-1]

    @property
    def gb_per_s(self) -> float:
        return median(self.all)

    def close(self) -> None:
        """Nothing is held."""


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
