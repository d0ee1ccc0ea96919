"""Cells of the RTL processing element (hls/rtl), counted by Yosys: writes bench/results/rtl-cells.json, or checks it.

    python bench/rtl_cells.py            count every element and write the file (ten minutes)
    python bench/rtl_cells.py --check    count again and compare; --only 4-1-s-lut counts one element

What is counted is a netlist for UltraScale+ before placement. It is no Vivado report: Yosys uses neither both
outputs of a LUT6 nor carry chains of three numbers, which Vivado does, and it says nothing about clock speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from polykern.runtime.fpga.cycles import Element

ROOT = Path(__file__).resolve().parents[1]
RTL = ROOT / "hls" / "rtl"
SOURCES = sorted(path for path in RTL.glob("*.v") if path.name != "gemv_pe_tb.v")
RESULTS = ROOT / "bench" / "results" / "rtl-cells.json"
FAMILY = "xcup"

LANES = {4: (1, 2, 4), 8: (1, 2)}
ELEMENTS = [
    *(Element(bits, lanes, minimum) for bits in LANES for minimum in (False, True) for lanes in LANES[bits]),
    *(Element(bits, lanes, dsp=True) for bits in LANES for lanes in (1, LANES[bits][-1])),
]

# Another version of Yosys may map differently; more than this apart is another circuit.
TOLERANCE = 0.05

# LUTs in a distributed RAM and a shift register (UG574, UltraScale CLB, tables of SLICEM configurations).
LUTS = {"RAM32M16": 8, "RAM32M": 4, "RAM64M8": 8, "RAM64M": 4, "SRL16E": 1, "SRLC32E": 1}


def name_of(element: Element) -> str:
    """bits-lanes-header-products: 4-4-s-lut."""
    header, products = "sm" if element.minimum else "s", "dsp" if element.dsp else "lut"
    return f"{element.bits}-{element.lanes}-{header}-{products}"


def digest() -> str:
    """Of the Verilog without comments and layout: whether the counts are of these sources."""
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in SOURCES)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def version() -> str:
    return subprocess.run(["yosys", "-V"], capture_output=True, text=True, check=True).stdout.split(" (")[0].strip()


def count(element: Element) -> dict[str, int]:
    """Cells by kind of the whole processing element, each lane flattened and the rest around them."""
    settings = {
        "WEIGHT_BITS": element.bits,
        "LANES": element.lanes,
        "HAS_MIN": int(element.minimum),
        "USE_DSP": int(element.dsp),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "stat.txt"
        script = "; ".join(
            (
                f"read_verilog {' '.join(map(str, SOURCES))}",
                "chparam " + " ".join(f"-set {name} {value}" for name, value in settings.items()) + " gemv_pe",
                "hierarchy -top gemv_pe",
                # All lanes are alike, and are mapped once.
                "setattr -mod -set keep_hierarchy 1 *block_lane",
                f"synth_xilinx -family {FAMILY} -top gemv_pe -flatten -noiopad -noclkbuf",
                f"tee -q -o {found} stat",
            )
        )
        subprocess.run(["yosys", "-q", "-p", script], capture_output=True, check=True)
        lines = found.read_text().split("Number of cells:")[-1].splitlines()[1:]
    counts = dict(line.split() for line in lines if line.strip())  # of the whole hierarchy, which comes last
    return {kind: int(number) for kind, number in counts.items()}


def resources(cells: Mapping[str, int]) -> dict[str, float]:
    """LUTs (shift registers and distributed RAM as the LUTs they take), flip-flops, DSP blocks, block RAMs of 36 Kib.

    Inverters in front of a LUT or carry chain disappear into them and are not counted, nor are carry chains and
    multiplexers behind LUTs (F7, F8, F9), which every slice has.
    """
    luts = sum(n * (LUTS.get(kind, 1 if kind.startswith("LUT") else 0)) for kind, n in cells.items())
    return {
        "lut": luts,
        "ff": sum(n for kind, n in cells.items() if kind.startswith("FD")),
        "dsp": cells.get("DSP48E2", 0),
        "bram": cells.get("RAMB36E2", 0) + cells.get("RAMB18E2", 0) / 2,
    }


def per_lane(elements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of element what a lane takes and what is there without any: the line through fewest and most."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for element in elements:
        kinds.setdefault((element["bits"], element["minimum"], element["dsp_products"]), []).append(element)
    lines: list[dict[str, Any]] = []
    for (bits, minimum, dsp), group in kinds.items():
        few, many = min(group, key=lambda e: e["lanes"]), max(group, key=lambda e: e["lanes"])
        lane = {
            kind: round((many["resources"][kind] - few["resources"][kind]) / (many["lanes"] - few["lanes"]), 2)
            for kind in few["resources"]
        }
        base = {kind: round(few["resources"][kind] - lane[kind] * few["lanes"], 2) for kind in lane}
        lines.append({"bits": bits, "minimum": minimum, "dsp_products": dsp, "lane": lane, "base": base})
    return lines


def record(element: Element) -> dict[str, Any]:
    cells = count(element)
    print(name_of(element), resources(cells), file=sys.stderr, flush=True)
    return {
        "name": name_of(element),
        "bits": element.bits,
        "lanes": element.lanes,
        "minimum": element.minimum,
        "dsp_products": element.dsp,
        "resources": resources(cells),
        "cells": cells,
    }


def differences(found: dict[str, Any], kept: dict[str, Any], tolerance: float) -> list[str]:
    """Resources that are further apart than `tolerance` of what is kept."""
    return [
        f"{found['name']}: {kind} is {found['resources'][kind]:g}, the file has {number:g}"
        for kind, number in kept["resources"].items()
        if abs(found["resources"][kind] - number) > tolerance * number
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--only", metavar="NAME", help="one element, such as 4-1-s-lut (with --check)")
    args = parser.parse_args()
    if shutil.which("yosys") is None:
        print("no yosys on PATH: apt-get install yosys", file=sys.stderr)
        return 1
    if args.only and (not args.check or args.only not in map(name_of, ELEMENTS)):
        print(f"--only goes with --check and one of {', '.join(map(name_of, ELEMENTS))}", file=sys.stderr)
        return 2
    chosen = [element for element in ELEMENTS if args.only in (None, name_of(element))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(record, chosen))
    if not args.check:
        last = ["git", "log", "-1", "--format=%h", "--abbrev=12", "--", "hls/rtl/*.v"]
        commit = subprocess.run(last, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        document = {
            "tool": version(),
            "command": f"synth_xilinx -family {FAMILY} -flatten -noiopad -noclkbuf",
            "commit": commit,
            "sources_sha256": digest(),
            "max_blocks": 1024,
            "per_lane": per_lane(found),
            "elements": found,
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        return 0
    kept = json.loads(RESULTS.read_text())
    same_tool = kept["tool"] == version()
    by_name = {element["name"]: element for element in kept["elements"]}
    wrong = [line for one in found for line in differences(one, by_name[one["name"]], 0.0 if same_tool else TOLERANCE)]
    if not same_tool:
        print(f"counted by {version()}, the file by {kept['tool']}: up to {TOLERANCE:.0%} apart", file=sys.stderr)
    print("\n".join(wrong) or f"{len(found)} as in {RESULTS.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
