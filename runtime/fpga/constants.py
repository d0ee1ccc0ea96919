"""Every number of the model that is not a part's: its value, its unit and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    value: int
    unit: str
    source: str


_ENGINE = "hls/README.md, The engine"
_PG060 = "PG060, Floating-Point Operator (from memory: not read again for this table)"
_HLS = "reports of Vitis HLS for fmul and fadd, 3 + 2 DSP, 77 + 198 LUT, 128 + 318 FF (from memory)"

# Time
MEMORY_LATENCY = Constant(
    64, "cycles", "UG1399 (2025.2), Options for Controlling AXI4 Burst Behavior: what Vitis HLS schedules a read for"
)
FLOATS_PER_CYCLE = Constant(16, "float32", f"{_ENGINE}: x comes in one beat of 16 floats per cycle")
EXACT_LANES = Constant(16, "products per cycle", f"{_ENGINE}: exact path")
ATTENTION_LANES = Constant(
    16, "products per cycle", "hls/engine.h, LANES: of a query with a key; as many of a weight with a value beside them"
)
FLOAT_DEPTH = Constant(8, "cycles", f"{_ENGINE}: a float32 adder takes up to 8 cycles")
EXP_DEPTH = Constant(20, "cycles", f"{_PG060}: float32 exponential")
ROOT_DEPTH = Constant(32, "cycles", f"{_PG060}: float32 reciprocal square root")

# Area
FLOAT_MULTIPLY_ADD = Constant(5, "DSP", f"a float32 product and a sum: {_HLS}")
FLOAT_LUT = Constant(275, "LUT", f"the same: {_HLS}")
FLOAT_FF = Constant(446, "FF", f"the same: {_HLS}")
FUNCTIONS_DSP = Constant(30, "DSP", f"{_PG060}: one exponential, division and reciprocal root in float32")
FUNCTIONS_LUT = Constant(4_000, "LUT", f"{_PG060}: the same functions")
READ_FIFO_BRAM = Constant(
    8,
    "BRAM",
    "UG1399 (2020.2), as above: a FIFO of outstanding reads x burst length x width: 512 beats of 512 bits are 8 blocks",
)
PORT_LUT = Constant(2_500, "LUT", "assumed: an AXI reader of 512 bits with its bursts")
CONTROL_LUT = Constant(15_000, "LUT", "assumed: the sequencer of a step, its registers and one AXI writer")
CONTROL_BRAM = Constant(16, "BRAM", "assumed: the sequencer's program and the tables of the page allocator")

CONSTANTS = {name.lower(): value for name, value in list(globals().items()) if isinstance(value, Constant)}
