"""What the tvm backend says its units can do, which the benchmark suite holds kernels against."""

from __future__ import annotations

import math
from typing import Any

import pytest
from polykern.backends.registry import open_backend
from polykern.backends.tvm.target import usable

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")


@pytest.mark.parametrize("level", [level.name for level in usable()])
def test_peaks_of_every_level_that_this_cpu_can_run(level: str) -> None:
    backend: Any = open_backend("tvm", device=level)
    try:
        peaks = backend.peaks()
        target = backend.target
    finally:
        backend.close()
    assert peaks.keys() == {"int8", "f32"} | ({"bf16"} if target.amx else set())
    assert all(math.isfinite(peak) and peak > 0 for peak in peaks.values())
