"""The boards an estimate can be made for: what is on the chip, what memory hangs on it, and who says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

# The engine reads 512 bits of a channel in a cycle (hls/README.md).
BEAT_BYTES = 64

# How much of each kind a design can fill and still be placed and routed at its clock: the thresholds of Vivado's
# report_failfast (UG1292, UltraFast Design Methodology Quick Reference, "assess with report_failfast"). From memory.
FILLABLE: Mapping[str, float] = {"lut": 0.70, "ff": 0.50, "dsp": 0.80, "bram": 0.80, "uram": 0.80}


@dataclass(frozen=True)
class Resources:
    """Counts of what an FPGA is made of. bram: blocks of 36 Kib; uram: blocks of 288 Kib."""

    lut: float = 0
    ff: float = 0
    dsp: float = 0
    bram: float = 0
    uram: float = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, count: float) -> Resources:
        return Resources(**{name: value * count for name, value in vars(self).items()})


@dataclass(frozen=True)
class Part:
    """A board.

    channels          memory channels that an engine can have
    port_bits         width of a channel's port; one of fewer than 512 bits brings a beat in several cycles
    gb_per_s          what all channels can bring, by the data sheet, in 10^9 bytes/s
    is_shared         whether they lead to one memory, of which fewer channels get more each
    efficiency        part of that which long sequential reads were measured to get
    memory_bytes      what can be reached at that speed: weights and KV cache must lie there
    chip              everything on the chip
    platform          what the vendor's static region keeps of it
    mhz               clock if none is asked for; sweep_mhz: the highest that a sweep tries
    sources           field -> where its number comes from
    """

    name: str
    title: str
    channels: int
    port_bits: int
    gb_per_s: float
    is_shared: bool
    efficiency: float
    memory_bytes: int
    chip: Resources
    platform: Resources
    mhz: int
    sweep_mhz: int
    sources: Mapping[str, str]

    @cached_property
    def fillable(self) -> Resources:
        """What a design may use: the chip without the platform, up to FILLABLE of the chip."""
        chip, platform = vars(self.chip), vars(self.platform)
        return Resources(**{n: int(min(chip[n] * FILLABLE[n], chip[n] - platform[n])) for n in chip})

    def channel_gb_per_s(self, active: int) -> float:
        """What each of `active` channels gets of the memory in long sequential reads."""
        return self.gb_per_s * self.efficiency / (active if self.is_shared else self.channels)


# Z. Wang et al., Shuhai: Benchmarking High Bandwidth Memory on FPGAs (FCCM 2020, arXiv 2005.04324), long reads on a
# U280: 425 of 460 GB/s from its HBM, and from its two channels of DDR4 36 of 38.4 GB/s (the latter from memory).
HBM_EFFICIENCY = 425 / 460
DDR4_EFFICIENCY = 36 / 38.4

_HBM = "UG1393 (2023.1), HBM Configuration and Use: 32 pseudo-channels of 256 MB, 14.375 GB/s each at most"
_SHUHAI = "arXiv 2005.04324 (Shuhai), measured on a U280"
_FROM_MEMORY = "(from memory: not read again for this table)"
_CLOCK = f"U280 designs of this kind: DFX 200, FlightLLM 225, arXiv 2312.15159 245 MHz {_FROM_MEMORY}"

PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part(
            name="u280",
            title="Alveo U280",
            channels=32,
            port_bits=512,
            gb_per_s=32 * 14.375,
            is_shared=False,
            efficiency=HBM_EFFICIENCY,
            memory_bytes=8 << 30,
            chip=Resources(lut=1_303_680, ff=2_607_360, dsp=9_024, bram=2_016, uram=960),
            platform=Resources(lut=234_000, ff=457_000, dsp=534, bram=529, uram=0),
            mhz=225,
            sweep_mhz=250,
            sources={
                "channels": _HBM,
                "port_bits": "UG1393, as above: a switch adapts 512 bits of a kernel to the HBM port",
                "gb_per_s": _HBM,
                "is_shared": _HBM + ": a channel has its own",
                "efficiency": _SHUHAI,
                "memory_bytes": _HBM + "; the card's 32 GB of DDR4 at 38 GB/s is left out",
                "chip": f"DS963, Alveo U280 data sheet, FPGA resources {_FROM_MEMORY}",
                "platform": f"UG1120, U280 gen3x16 xdma, chip less the resources it leaves {_FROM_MEMORY}",
                "mhz": "512 bits at 225 MHz are the 14.375 GB/s of a channel",
                "sweep_mhz": _CLOCK,
            },
        ),
        Part(
            name="u50",
            title="Alveo U50",
            channels=32,
            port_bits=512,
            gb_per_s=316,
            is_shared=False,
            efficiency=HBM_EFFICIENCY,
            memory_bytes=8 << 30,
            chip=Resources(lut=871_680, ff=1_743_360, dsp=5_952, bram=1_344, uram=640),
            platform=Resources(lut=140_000, ff=280_000, dsp=4, bram=180, uram=0),
            mhz=200,
            sweep_mhz=250,
            sources={
                "channels": _HBM,
                "port_bits": "as the U280",
                "is_shared": "as the U280",
                "gb_per_s": f"DS965, Alveo U50 data sheet: 316 GB/s for the card {_FROM_MEMORY}",
                "efficiency": _SHUHAI + "; taken to hold for the same HBM here",
                "memory_bytes": _HBM,
                "chip": f"DS965, Alveo U50 data sheet, FPGA resources {_FROM_MEMORY}",
                "platform": "assumed: the share of the U280's platform",
                "mhz": "512 bits at 155 MHz are the 9.9 GB/s of a channel; some room above it",
                "sweep_mhz": _CLOCK,
            },
        ),
        Part(
            name="kv260",
            title="Kria KV260",
            channels=4,
            port_bits=128,
            gb_per_s=19.2,
            is_shared=True,
            efficiency=DDR4_EFFICIENCY,
            memory_bytes=4 << 30,
            chip=Resources(lut=117_120, ff=234_240, dsp=1_248, bram=144, uram=64),
            platform=Resources(),
            mhz=300,
            sweep_mhz=333,
            sources={
                "channels": "UG1085, Zynq UltraScale+ TRM: ports HP0 to HP3, of 128 bits",
                "port_bits": "the same",
                "is_shared": "all four lead to the processing system's one DDR4 controller (UG1085)",
                "gb_per_s": "DS987 (v1.1), K26: 4 GB of 64-bit DDR4 at 2400 Mb/s",
                "efficiency": _SHUHAI + ", its DDR4; taken to hold behind the processing system's controller",
                "memory_bytes": "DS987 (v1.1); an operating system takes its share of it",
                "chip": "DS987, programmable logic of the XCK26",
                "platform": "none: bare metal, the processing system is hard logic",
                "mhz": "arXiv 2502.10659; what four ports of 128 bits need for 19.2 GB/s",
                "sweep_mhz": f"DS987/DS925: HP ports at 333 MHz {_FROM_MEMORY}",
            },
        ),
    )
}
