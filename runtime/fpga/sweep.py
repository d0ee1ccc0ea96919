"""The search: every configuration worth a look on a part, the best of those that fit, and the frontier among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...kernels.errors import DoesNotFit
from .configuration import Configuration
from .estimate import Estimate, check_memory
from .parts import Part
from .step import Step

LANES = (32, 64, 128)
ATTENTION_UNITS = (1, 2, 4, 8, 16, 32)
MHZ_STEP = 25
# Speeds this close are one: then the smaller design is the better one.
ALIKE = 0.01


@dataclass(frozen=True)
class Sweep:
    """All estimates, in no order, `best` of them, and the `frontier`: nothing smaller is as fast; smallest first."""

    part: Part
    estimates: tuple[Estimate, ...]
    best: Estimate
    frontier: tuple[Estimate, ...]

    @property
    def fitting(self) -> int:
        return sum(1 for e in self.estimates if e.share <= 1)

    def document(self) -> dict[str, Any]:
        """The JSON document: every point in short, the best in full."""
        return {
            "best": self.best.document(),
            "frontier": [_short(e) for e in self.frontier],
            "points": [_short(e) for e in self.estimates],
        }


def _short(estimate: Estimate) -> dict[str, Any]:
    return {
        "configuration": estimate.configuration,
        "tokens_per_s": estimate.tokens_per_s,
        "share": estimate.share,
        "limit": estimate.limit,
    }


def grid(
    part: Part,
    channels: int | None = None,
    lanes: int | None = None,
    mhz: float | None = None,
    attention_units: int | None = None,
) -> list[Configuration]:
    """The configurations a sweep tries; a value that is given is not varied."""
    powers = [2**i for i in range(part.channels.bit_length()) if 2**i <= part.channels]
    clocks = [*range(100, part.sweep_mhz, MHZ_STEP), part.sweep_mhz]
    axes = (
        [channels] if channels else powers,
        [lanes] if lanes else LANES,
        [mhz] if mhz else clocks,
        [attention_units] if attention_units else ATTENTION_UNITS,
    )
    return [Configuration(*point) for point in product(*axes)]


def sweep(step: Step, part: Part, configurations: Sequence[Configuration], launch_us: float = 0.0) -> Sweep:
    """Estimate them all. DoesNotFit if the model, or each of them, is too large for the part."""
    check_memory(part, step.memory)
    estimates = tuple(step.estimate(part, configuration, launch_us) for configuration in configurations)
    fitting = [e for e in estimates if e.share <= 1]
    if not fitting:
        smallest = min(estimates, key=lambda e: e.share)
        raise DoesNotFit(
            f"{part.name} is too small for every configuration asked for; the smallest, {smallest.configuration},"
            f" takes {', '.join(smallest.over())}"
        )
    fastest = max(e.tokens_per_s for e in fitting)
    # A lower clock is easier to reach than a higher one, hence the second key.
    best = min(
        (e for e in fitting if e.tokens_per_s >= (1 - ALIKE) * fastest),
        key=lambda e: (e.share, e.configuration.mhz, -e.tokens_per_s),
    )
    return Sweep(part, estimates, best, frontier(fitting))


def frontier(estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """Those that no other beats in both speed and size, smallest first."""
    found: list[Estimate] = []
    for estimate in sorted(estimates, key=lambda e: (e.share, -e.tokens_per_s, e.configuration.mhz)):
        if not found or estimate.tokens_per_s > found[-1].tokens_per_s:
            found.append(estimate)
    return tuple(found)
