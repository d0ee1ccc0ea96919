"""What the device could do at best, measured in the same run as the kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from polykern.kernels.op import Cost
from polykern.kernels.spi import Backend
from polykern.runtime.bandwidth import ReadProbe

SIDE = 1024  # of the square float32 matrices whose product is timed: 12 MB, 2.1 Gflop


@dataclass
class Roofline:
    """`read`: GB/s; `peaks`: Gop/s by unit ("f32", "int8", "bf16"). Medians of what was measured between the cases.

    A multiply-add counts as two operations.
    """

    read: float
    peaks: dict[str, float] = field(default_factory=dict[str, float])

    def least_seconds(self, cost: Cost, unit: str) -> tuple[float, str]:
        """(the least a call can take, what holds it back: "read" or the unit of its arithmetic).

        Where nobody says how fast a unit is, f32 stands for it: a kernel may then be above the roofline.
        """
        unit = unit if unit in self.peaks else "f32"
        limits = {"read": cost.nbytes / self.read / 1e9, unit: cost.flops / self.peaks[unit] / 1e9}
        bound = max(limits, key=lambda name: limits[name])
        return limits[bound], bound


class Meter:
    """Measures a device's limits, a little before each case, so that both sides see the same machine.

    A backend may know its device better: `Backend.peaks` (kernels/spi.py) is asked once. For what that leaves out, a
    device whose memory is the host's is measured through the host: sweeps of the read probe, and products of float32
    matrices in numpy.
    """

    def __init__(self, backend: Backend) -> None:
        stated = getattr(backend, "peaks", None)
        self.stated: Mapping[str, float] = dict(stated()) if stated else {}
        self.is_host = backend.device.detail.get("type", "cpu") == "cpu"
        self.f32: list[float] = []
        self._probe: ReadProbe | None = None
        self._matrices: Any = None

    def measure(self) -> int:
        """One sweep and one product (the very first of each, which warm up, are dropped); how many there are now."""
        if not self.is_host:
            return 0
        if self._probe is None:
            self._probe = ReadProbe()
            self._matrices = np.random.default_rng(1).standard_normal((2, SIDE, SIDE), np.float32)
            self._probe.sweep()
            self._product()
            self._probe.all.clear()
        self._probe.sweep()
        self.f32.append(self._product())
        return len(self.f32)

    def _product(self) -> float:
        started = time.perf_counter()
        np.matmul(*self._matrices)
        return 2 * SIDE**3 / (time.perf_counter() - started) / 1e9

    @property
    def sweeps(self) -> list[float]:
        return self._probe.all if self._probe else []

    def roofline(self, at: int | None = None) -> Roofline | None:
        """The limits of the whole run, or around measurement `at`: of the two before a case and the two behind it.

        On a machine that others use as well, the limits change within a run, and a kernel's time with them. None for a
        device with memory of its own whose backend states no limits.
        """
        around = slice(None) if at is None else slice(max(0, at - 2), at + 2)
        measured = {"read": median(self.sweeps[around]), "f32": median(self.f32[around])} if self.f32 else {}
        limits = measured | self.stated
        if "read" not in limits or "f32" not in limits:
            return None
        return Roofline(limits.pop("read"), limits)

    def close(self) -> None:
        if self._probe:
            self._probe.close()
