"""How many 512-bit beats the engine reads for a matrix, by weight format: the table in hls/README.md, "The engine".

A row is padded to whole weight beats. Before every `group` weight beats stands one header beat with their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BEAT_BITS = 512
CHANNELS = (1, 2, 4, 8, 16, 32)  # what the engine can have (hls/engine.h)
LANES = (32, 64, 128)  # weights in a cycle that hls/rtl/gemv_pe.v can be built for


@dataclass(frozen=True)
class Stream:
    """A format on the engine's wire: `bits` a weight, a header beat before each `group` weight beats (0: none).

    `minimum`: blocks have a minimum too, which costs the engine a second product.
    """

    bits: int
    group: int
    minimum: bool = False

    @property
    def is_float(self) -> bool:
        return self.bits > 8

    @property
    def weights_per_beat(self) -> int:
        return BEAT_BITS // self.bits

    def weight_beats(self, in_features: int) -> int:
        return -(-in_features // self.weights_per_beat)

    def header_beats(self, in_features: int) -> int:
        return -(-self.weight_beats(in_features) // self.group) if self.group else 0

    def row_beats(self, in_features: int) -> int:
        """Beats of a row of `in_features` weights."""
        return self.weight_beats(in_features) + self.header_beats(in_features)


STREAMS: Mapping[str, Stream] = {
    "Q4_0": Stream(4, 8),
    "Q4_1": Stream(4, 4, minimum=True),
    "Q4_K": Stream(4, 8, minimum=True),
    "Q8_0": Stream(8, 16),
    "Q5_0": Stream(8, 16),
    "Q5_1": Stream(8, 8, minimum=True),
    "Q5_K": Stream(8, 16, minimum=True),
    "Q6_K": Stream(8, 8),
    "F16": Stream(16, 0),
    "BF16": Stream(16, 0),
    "F32": Stream(32, 0),
}

# Not a GGUF format, but what published accelerators read: 4-bit weights as AWQ (J. Lin et al., arXiv 2306.00978) stores
# them, a float16 scale and a 4-bit zero for 128. 25 such pairs of 20 bits fill a header beat.
AWQ = "awq-g128"
WHAT_IF: Mapping[str, tuple[str, Stream]] = {AWQ: ("Q4_0", Stream(4, 25, minimum=True))}
