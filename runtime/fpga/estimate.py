"""What comes out: cycles, speed and area of a decode step on a part, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from ...kernels.errors import DoesNotFit
from .configuration import Configuration
from .parts import Part, Resources

Limit = Literal["memory", "compute", "depth"]
LIMITS: tuple[Limit, ...] = ("memory", "compute", "depth")
UNITS = {"lut": "LUT", "ff": "FF", "dsp": "DSP", "bram": "BRAM", "uram": "URAM"}


@dataclass(frozen=True)
class CallEstimate:
    """What one call costs in cycles; `nbytes` is what it reads. Calls that are alike are one, with a `count`."""

    op: str
    label: str
    signature: str
    nbytes: float
    memory: float
    compute: float
    depth: float
    count: int = 1

    @property
    def cycles(self) -> float:
        return max(self.memory, self.compute) + self.depth

    @property
    def limit(self) -> Limit:
        """What takes most of its time."""
        if self.depth > max(self.memory, self.compute):
            return "depth"
        return "memory" if self.memory >= self.compute else "compute"


@dataclass(frozen=True)
class Estimate:
    """A decode step of a model on a part. `memory` maps what lies in the board's memory to bytes."""

    part: Part
    configuration: Configuration
    calls: tuple[CallEstimate, ...]
    area: Mapping[str, Resources]
    memory: Mapping[str, int]

    @cached_property
    def cycles(self) -> float:
        return sum(call.count * call.cycles for call in self.calls)

    @property
    def seconds(self) -> float:
        return self.cycles / (self.configuration.mhz * 1e6)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.seconds

    @property
    def nbytes(self) -> float:
        """What a step reads."""
        return sum(call.count * call.nbytes for call in self.calls)

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @cached_property
    def shares(self) -> dict[Limit, float]:
        """Part of the cycles in which memory or compute paces the stream, and in which nothing streams (depth)."""
        found: dict[Limit, float] = dict.fromkeys(LIMITS, 0.0)
        for call in self.calls:
            found["memory" if call.memory >= call.compute else "compute"] += call.count * max(call.memory, call.compute)
            found["depth"] += call.count * call.depth
        return {limit: cycles / self.cycles for limit, cycles in found.items()}

    @property
    def limit(self) -> Limit:
        return max(LIMITS, key=lambda limit: self.shares[limit])

    @cached_property
    def used(self) -> Resources:
        total = Resources()
        for part in self.area.values():
            total += part
        return total

    @cached_property
    def fill(self) -> dict[str, float]:
        """Of each kind, what is used of what may be: above 1 does not fit."""
        used, may = vars(self.used), vars(self.part.fillable)
        return {kind: used[kind] / may[kind] for kind in used}

    @property
    def share(self) -> float:
        """The largest of `fill`: how full the part is."""
        return max(self.fill.values())

    def over(self) -> list[str]:
        """By how much each kind of resource is too small: "DSP 1200 of 998 (202 over)"."""
        used, may = asdict(self.used), asdict(self.part.fillable)
        return [
            f"{UNITS[kind]} {used[kind]:,.0f} of {may[kind]:,.0f} ({used[kind] - may[kind]:,.0f} over)"
            for kind in used
            if used[kind] > may[kind]
        ]

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "part": self.part.name,
            "configuration": self.configuration,
            "tokens_per_s": self.tokens_per_s,
            "cycles": self.cycles,
            "seconds": self.seconds,
            "limit": self.limit,
            "shares": self.shares,
            "bytes": self.nbytes,
            "gb_per_s": self.gb_per_s,
            "peak_gb_per_s": self.part.gb_per_s,
            "calls": [
                {
                    **asdict(call),
                    "cycles": call.cycles,
                    "limit": call.limit,
                    "share": call.count * call.cycles / self.cycles,
                }
                for call in self.calls
            ],
            "resources": {
                "used": self.used,
                "by": self.area,
                "fillable": self.part.fillable,
                "chip": self.part.chip,
                "fill": self.fill,
                "share": self.share,
            },
            "memory": {**self.memory, "capacity": self.part.memory_bytes},
        }


def check_memory(part: Part, memory: Mapping[str, int]) -> None:
    """DoesNotFit if the board's memory cannot hold what the model needs."""
    need = sum(memory.values())
    if need > part.memory_bytes:
        what = ", ".join(f"{name} {_gib(nbytes)}" for name, nbytes in memory.items())
        raise DoesNotFit(
            f"{part.name} has {_gib(part.memory_bytes)} of memory and the model needs {_gib(need)} ({what}):"
            f" {_gib(need - part.memory_bytes)} too much; take a smaller --format, --ctx or model"
        )


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
