"""The engine's processing elements: which one a weight format needs, and what it takes on the chip."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from .cells import CELLS
from .cycles import BLOCK, Element
from .parts import Resources
from .streams import Stream


def element_for(stream: Stream, lanes: int, products: str = "lut") -> Element:
    """The element that works on a format, `lanes` weights a cycle (no more than a beat holds)."""
    return Element(stream.bits, max(1, min(lanes, stream.weights_per_beat) // BLOCK), stream.minimum, products == "dsp")


def row_cycles(stream: Stream, lanes: int, in_features: int) -> int:
    """Cycles of one row with every beat there when it is wanted: Element.row_cycles, for all headers of the table."""
    return ceil(ceil(in_features / BLOCK) / element_for(stream, lanes).lanes) + stream.header_beats(in_features)


def processing_element(stream: Stream, lanes: int, products: str) -> Resources:
    """Its cells, without the memory that holds x, whose size is the model's."""
    return replace(CELLS[element_for(stream, lanes, products)], bram=0)
