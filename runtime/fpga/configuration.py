"""What of the engine is free to choose, and what it takes on the chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from . import constants as c
from .engine import processing_element
from .parts import Resources
from .streams import Stream

URAM_WORDS, BRAM_WORDS, BLOCK_BITS = 4096, 512, 72  # UG573: a block's depth at its full width of 72 bits


@dataclass(frozen=True)
class Configuration:
    """A design point.

    channels         memory channels, each with a processing element of its own
    lanes            weights that one of them multiplies in a cycle; a beat of more takes several
    mhz              clock of everything
    attention_units  query heads that are worked on at the same time, each `ATTENTION_LANES` products a cycle with keys
                     and as many with values
    products         what multiplies weights: LUTs, or a DSP block for each
    kv_bits          bits of a number in the KV cache: 16, or 8 to compare with what others built
    port_bits        width of a channel's memory port: 0 for the part's, or less to compare with what others built
    """

    channels: int
    lanes: int
    mhz: float
    attention_units: int
    products: Literal["lut", "dsp"] = "lut"
    kv_bits: int = 16
    port_bits: int = 0

    def __str__(self) -> str:
        return (
            f"{self.channels} {'channel' if self.channels == 1 else 'channels'} x {self.lanes} lanes"
            f" in {self.products.upper()}"
            f" at {self.mhz:g} MHz, {self.attention_units} attention {'unit' if self.attention_units == 1 else 'units'}"
        )


@dataclass(frozen=True)
class Widths:
    """What of a model decides about memory on the chip: longest row of a matrix, floats between ops, vocabulary."""

    in_features: int
    scratch: int
    vocab: int


def resources(configuration: Configuration, streams: Iterable[Stream], widths: Widths) -> dict[str, Resources]:
    """By what it is for. A model with several kinds of weights needs a processing element for each in every channel."""
    floats = Resources(dsp=c.FLOAT_MULTIPLY_ADD.value, lut=c.FLOAT_LUT.value, ff=c.FLOAT_FF.value)
    functions = Resources(dsp=c.FUNCTIONS_DSP.value, lut=c.FUNCTIONS_LUT.value, ff=c.FUNCTIONS_LUT.value)
    # One processing element serves all formats of a width; one that has a minimum does without it as well.
    kinds: dict[int, Stream] = {}
    for stream in streams:
        known = kinds.setdefault(stream.bits, stream)
        kinds[stream.bits] = replace(known, minimum=known.minimum or stream.minimum)
    element = Resources()
    for stream in kinds.values():
        exact = floats * c.EXACT_LANES.value
        element += exact if stream.is_float else processing_element(stream, configuration.lanes, configuration.products)
    element += activations(configuration.lanes, widths.in_features)
    port = Resources(lut=c.PORT_LUT.value, ff=c.PORT_LUT.value, bram=c.READ_FIFO_BRAM.value)
    words = -(-widths.scratch // (c.FLOATS_PER_CYCLE.value * URAM_WORDS)) + -(
        -widths.vocab // (c.FLOATS_PER_CYCLE.value * URAM_WORDS)
    )
    return {
        "engine": element * configuration.channels,
        "ports": port * configuration.channels,
        "attention": (floats * (2 * c.ATTENTION_LANES.value) + functions) * configuration.attention_units,
        "vector": floats * c.FLOATS_PER_CYCLE.value + functions,
        "buffers": Resources(uram=words * -(-32 * c.FLOATS_PER_CYCLE.value // BLOCK_BITS)),
        "control": Resources(lut=c.CONTROL_LUT.value, ff=c.CONTROL_LUT.value, bram=c.CONTROL_BRAM.value),
    }


def activations(lanes: int, in_features: int) -> Resources:
    """One copy of x: per lane of 32 weights a memory of 285 bits (step, 32 int8, sum), hls/rtl/activation_buffer.v."""
    blocks, banks = -(-in_features // 32), max(1, lanes // 32)
    return Resources(bram=banks * -(-285 // BLOCK_BITS) * -(-blocks // (banks * BRAM_WORDS)))
