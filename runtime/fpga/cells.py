"""What a processing element (hls/rtl/gemv_pe.v) takes on the chip, counted by Yosys: bench/results/rtl-cells.json.

Of these, the elements of 4 bits with 1 and 2 lanes, scales only and products in LUTs were counted; the others follow
them in proportion until `python bench/rtl_cells.py` has counted them and `python bench/fpga_page.py` has been run.
"""

from __future__ import annotations

from collections.abc import Mapping

from .cycles import Element
from .parts import Resources

CELLS: Mapping[Element, Resources] = {
    Element(4, 1): Resources(4_309, 4_579, 2, 8),
    Element(4, 2): Resources(5_988, 7_174, 4, 8),
    Element(4, 4): Resources(9_346, 12_364, 8, 16),
    Element(4, 1, dsp=True): Resources(3_730, 3_984, 34, 8),
    Element(4, 2, dsp=True): Resources(4_830, 5_984, 68, 8),
    Element(4, 4, dsp=True): Resources(7_030, 9_984, 136, 16),
    Element(4, 1, minimum=True): Resources(4_909, 5_279, 4, 8),
    Element(4, 2, minimum=True): Resources(7_188, 8_574, 8, 8),
    Element(4, 4, minimum=True): Resources(11_746, 15_164, 16, 16),
    Element(4, 1, minimum=True, dsp=True): Resources(4_330, 4_684, 36, 8),
    Element(4, 2, minimum=True, dsp=True): Resources(6_030, 7_384, 72, 8),
    Element(4, 4, minimum=True, dsp=True): Resources(9_430, 12_784, 144, 16),
    Element(8, 1): Resources(5_530, 5_884, 2, 8),
    Element(8, 2): Resources(8_430, 9_784, 4, 8),
    Element(8, 1, dsp=True): Resources(3_880, 4_284, 34, 8),
    Element(8, 2, dsp=True): Resources(5_130, 6_584, 68, 8),
    Element(8, 1, minimum=True): Resources(6_130, 6_584, 4, 8),
    Element(8, 2, minimum=True): Resources(9_630, 11_184, 8, 8),
    Element(8, 1, minimum=True, dsp=True): Resources(4_480, 4_984, 36, 8),
    Element(8, 2, minimum=True, dsp=True): Resources(6_330, 7_984, 72, 8),
}
