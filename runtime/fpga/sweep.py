"""The search: every configuration worth a look on a part, the best of those that fit, and the frontier among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from ...kernels.errors import DoesNotFit
from .configuration import Configuration
from .estimate import UNITS, Estimate, check_memory
from .parts import FILLABLE, Part
from .step import Step
from .streams import CHANNELS, LANES

PRODUCTS: tuple[Literal["lut", "dsp"], ...] = ("lut", "dsp")
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


def attention_units(step: Step) -> list[int]:
    """Counts that leave none idle: some of the heads that share a kv head, then all of them for some kv heads."""
    group = step.heads // step.kv_heads
    return sorted({*_divisors(group), *(group * copies for copies in _divisors(step.kv_heads))})


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def grid(
    step: Step,
    part: Part,
    channels: int | None = None,
    lanes: int | None = None,
    mhz: float | None = None,
    attention: int | None = None,
    products: Literal["lut", "dsp"] | None = None,
) -> list[Configuration]:
    """The configurations worth a look; a value that is given is not varied."""
    clocks = [*range(100, part.sweep_mhz, MHZ_STEP), part.sweep_mhz]
    axes: tuple[Sequence[Any], ...] = (
        [channels] if channels else [count for count in CHANNELS if count <= part.channels],
        [lanes] if lanes else LANES,
        [mhz] if mhz else clocks,
        [attention] if attention else attention_units(step),
        PRODUCTS if products is None else (products,),
    )
    return [Configuration(*point) for point in product(*axes)]


def sweep(step: Step, part: Part, configurations: Sequence[Configuration], launch_us: float = 0.0) -> Sweep:
    """Estimate them all. DoesNotFit, with the numbers, if the model or each of them is too large for the part."""
    check_memory(part, step.memory)
    estimates = tuple(step.estimate(part, configuration, launch_us) for configuration in configurations)
    fitting = [e for e in estimates if e.share <= 1]
    if not fitting:
        smallest = min(estimates, key=lambda e: e.share)
        which = "" if len(estimates) == 1 else f", the smallest of {len(estimates)} designs asked for"
        limit = ", ".join(f"{FILLABLE[kind]:.0%} {UNITS[kind]}" for kind in FILLABLE)
        raise DoesNotFit(
            f"{part.name} is too small for {smallest.configuration}{which}: {', '.join(smallest.over())};"
            f" a design can fill {limit} of a chip"
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
