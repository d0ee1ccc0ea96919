"""Cycles of the GEMV processing element (hls/rtl/gemv_pe.v): one formula, held to its simulation by tests/test_rtl.py.

    cycles = 1 + load + rows * row_cycles + latency + stalls

    1           the command is taken
    load        in_features / 32 + 4: x goes into its buffer, one block of 32 per cycle; 0 where it stays as it was
    row_cycles  header beats, one cycle each, and weight beats, a cycle for each word of `lanes` blocks in use
    latency     from the last word of weights to its row's result; constant for an element, paid once, because the rows
                before are in the pipeline at the same time, and the next command may be too
    stalls      cycles in which the element wanted a beat (of x or of weights) and none was there, or in which all its
                credits for results were out because nobody took them

Where memory brings r < 1 beats per cycle evenly, its stalls make the rows max(beats / r, rows * row_cycles) long: while
a beat with more words than one is worked on, the next has time to arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

BLOCK = 32
BEAT_BITS = 512


@dataclass(frozen=True)
class Element:
    """A processing element as it is built: the parameters of hls/rtl/gemv_pe.v.

    bits     of a stored weight: 4 or 8
    lanes    blocks of 32 weights per cycle: 1, 2 or 4, at most what a beat holds (4 of 4 bits, 2 of 8 bits)
    minimum  whether headers hold a minimum beside each scale (SM rather than S)
    dsp      products in DSP blocks rather than in LUTs
    """

    bits: int = 4
    lanes: int = 4
    minimum: bool = False
    dsp: bool = False

    @property
    def beat_blocks(self) -> int:
        return BEAT_BITS // (BLOCK * self.bits)

    @property
    def header_blocks(self) -> int:
        return BEAT_BITS // (32 if self.minimum else 16)

    @property
    def latency(self) -> int:
        """Cycles between the one that takes a row's last weights and its result; the latter is counted."""
        dot = 6 if self.dsp else 7 if self.bits == 4 else 8  # products or bit planes, tree
        scale = 4 + self.minimum  # times scale and step, shift, minimum
        tree = self.lanes.bit_length() - 1  # lanes together
        return 2 + dot + scale + tree + 1 + 6 + 1  # beat and buffer; those; accumulator; to float32; FIFO

    def row_beats(self, in_features: int) -> int:
        """Beats of one row as they lie in memory."""
        blocks = ceil(in_features / BLOCK)
        return ceil(blocks / self.beat_blocks) + ceil(blocks / self.header_blocks)

    def row_cycles(self, in_features: int) -> int:
        """Cycles of one row if every beat is there when it is wanted."""
        blocks = ceil(in_features / BLOCK)
        return ceil(blocks / self.lanes) + ceil(blocks / self.header_blocks)


def gemv_cycles(
    element: Element,
    rows: int,
    in_features: int,
    *,
    load: bool = True,
    beats_per_cycle: float = 1.0,
    stalls: float = 0.0,
) -> float:
    """Cycles from the command to the last of `rows` results of the element's channel.

    `beats_per_cycle`: what the channel's memory brings, evenly; `stalls`: cycles known to be lost beyond that.
    """
    fill = 1 + (ceil(in_features / BLOCK) + 4 if load else 0)
    stream = max(rows * element.row_beats(in_features) / beats_per_cycle, rows * element.row_cycles(in_features))
    return fill + stream + element.latency + stalls
