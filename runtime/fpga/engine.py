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
    return replace(cells(element_for(stream, lanes, products)), bram=0)


def cells(element: Element) -> Resources:
    """What was counted, or follows from it: minima cost the same whatever multiplies, and lanes lie on a line."""
    if element in CELLS:
        return CELLS[element]
    if element.minimum and element.dsp:
        with_minimum, without = replace(element, dsp=False), replace(element, dsp=False, minimum=False)
        return cells(replace(element, minimum=False)) + cells(with_minimum) + cells(without) * -1
    counted = sorted(lanes for lanes in (1, 2, 4) if replace(element, lanes=lanes) in CELLS)
    few, many = (CELLS[replace(element, lanes=lanes)] for lanes in (counted[0], counted[-1]))
    part = (element.lanes - counted[0]) / (counted[-1] - counted[0])
    return few * (1 - part) + many * part
