"""The engine's processing elements: which one a weight format needs, and what it takes on the chip."""

from __future__ import annotations

from math import ceil

from .cycles import BLOCK, Element
from .parts import Resources
from .streams import Stream


def element_for(stream: Stream, lanes: int) -> Element:
    """The element that works on a format, `lanes` weights a cycle (no more than a beat holds)."""
    return Element(stream.bits, max(1, min(lanes, stream.weights_per_beat) // BLOCK), stream.minimum)


def row_cycles(stream: Stream, lanes: int, in_features: int) -> int:
    """Cycles of one row with every beat there when it is wanted: Element.row_cycles, for all headers of the table."""
    return ceil(ceil(in_features / BLOCK) / element_for(stream, lanes).lanes) + stream.header_beats(in_features)


def processing_element(stream: Stream, lanes: int) -> Resources:
    """STAND-IN."""
    blocks = element_for(stream, lanes).lanes
    return Resources(lut=blocks * (1250 if stream.bits == 4 else 2400) + 2500, ff=blocks * 2600 + 1500, dsp=3 * blocks)
