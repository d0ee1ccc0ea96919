"""The plainest capture, for devices without graphs or command buffers."""

from __future__ import annotations

from collections.abc import Sequence

from ..kernels.spi import Launch


def launch_list(launches: Sequence[Launch]) -> Launch:
    """One launch that runs all of them in order."""
    frozen = tuple(launches)

    def replay() -> None:
        for launch in frozen:
            launch()

    return replay
