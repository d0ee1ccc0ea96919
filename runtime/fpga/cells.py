"""What a processing element (hls/rtl/gemv_pe.v) takes on the chip, counted by Yosys: bench/results/rtl-cells.json.

Written by bench/fpga_page.py, because an installed package does not have that file. Yosys counts before placement and
packs less than Vivado does, so LUTs are on the high side (bench/rtl_cells.py says why).
"""

from __future__ import annotations

from collections.abc import Mapping

from .cycles import Element
from .parts import Resources

CELLS: Mapping[Element, Resources] = {
    Element(4, 1): Resources(4_309, 4_579, 2, 8),
    Element(4, 2): Resources(5_988, 7_174, 4, 8),
    Element(4, 4): Resources(9_059, 12_365, 8, 16),
    Element(4, 1, minimum=True): Resources(4_722, 4_963, 4, 8),
    Element(4, 2, minimum=True): Resources(6_673, 7_942, 8, 8),
    Element(4, 4, minimum=True): Resources(10_512, 13_901, 16, 16),
    Element(8, 1): Resources(5_522, 6_111, 3, 8),
    Element(8, 2): Resources(8_180, 10_240, 6, 8),
    Element(8, 1, minimum=True): Resources(5_870, 6_498, 5, 8),
    Element(8, 2, minimum=True): Resources(8_879, 11_014, 10, 8),
    Element(4, 1, dsp=True): Resources(3_445, 3_665, 34, 8),
    Element(4, 4, dsp=True): Resources(5_316, 8_676, 136, 16),
    Element(8, 1, dsp=True): Resources(3_398, 4_054, 35, 8),
    Element(8, 2, dsp=True): Resources(4_147, 6_110, 70, 8),
}
