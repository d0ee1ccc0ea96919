"""Which of several kernels for the same call is the fastest: timed once on the GPU, and remembered.

Memory that a launch may write is copied first, so that trying a kernel changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...kernels.errors import DoesNotFit
from ...kernels.spi import DeviceInfo
from ..cache import KernelCache
from .compiler import compilers, sources
from .gpu import GpuBuffer, GpuDevice
from .launch import Launch, Pointer

CACHE = KernelCache("cuda-choices", "choices among CUDA kernels")
COPIED = 64 << 20  # bytes: what is larger is a weight or logits, which a call that is repeated leaves as they were


def fastest(
    hardware: GpuDevice, device: DeviceInfo, key: tuple[Any, ...], candidates: Sequence[Sequence[Launch]]
) -> Sequence[Launch]:
    """The candidate that took least time, now or when the same was asked before with these compilers and this GPU."""
    asked = {
        "key": [str(part) for part in key], "kernels": [[x.spec.label for x in one] for one in candidates],
        "device": device.name, "driver": device.driver, "sources": sources(), "compilers": compilers(),
    }  # fmt: skip
    known = CACHE.load(asked)
    if known is not None and known.isdigit() and int(known) < len(candidates):
        return candidates[int(known)]
    try:
        times = [_time(hardware, launches) for launches in candidates]
    except DoesNotFit:  # the copies: a model that fills the GPU runs with the most promising kernels, untimed
        return candidates[0]
    best = times.index(min(times))
    CACHE.store(asked, str(best).encode())
    return candidates[best]


def _time(hardware: GpuDevice, launches: Sequence[Launch]) -> float:
    copies: dict[int, GpuBuffer] = {}

    def elsewhere(value: Any) -> Any:
        if not isinstance(value, Pointer) or value.buffer.nbytes > COPIED:
            return value
        if id(value.buffer) not in copies:
            copies[id(value.buffer)] = hardware.copy(value.buffer)
        return replace(value, buffer=copies[id(value.buffer)])

    moved = [replace(x, arguments={name: elsewhere(value) for name, value in x.arguments.items()}) for x in launches]
    hardware.load(moved)
    runs = [hardware.bind(x) for x in moved]

    def run() -> None:
        for one in runs:
            one()

    return hardware.time(run)
