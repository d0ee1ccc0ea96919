"""Brings the FPGA estimate to where it is read: counted cells into the package, figures into hls/BOARD.md.

    python bench/fpga_page.py            after `python bench/rtl_cells.py`, or a change of the model in runtime/fpga;
                                         draws the picture, too
    python bench/fpga_page.py --check    exit status 1 if either is out of date

An installed package has no bench/results, so runtime/fpga/cells.py holds a copy of rtl-cells.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polykern.kernels.errors import DoesNotFit
from polykern.runtime.config import ModelConfig
from polykern.runtime.fpga import cells as kept
from polykern.runtime.fpga.configuration import Configuration
from polykern.runtime.fpga.cycles import Element
from polykern.runtime.fpga.parts import PARTS, Resources
from polykern.runtime.fpga.plot import draw
from polykern.runtime.fpga.step import Step
from polykern.runtime.fpga.streams import AWQ
from polykern.runtime.fpga.sweep import grid, sweep
from polykern.runtime.gguf import GGUFFile

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "bench" / "results" / "rtl-cells.json"
CELLS = ROOT / "runtime" / "fpga" / "cells.py"
PAGE = ROOT / "hls" / "BOARD.md"
PICTURE = ROOT / "bench" / "results" / "fpga-sweep-u280"
CTX = 512
LAUNCH_US = 20

HEAD = '''\
"""What a processing element (hls/rtl/gemv_pe.v) takes on the chip, counted by Yosys: bench/results/rtl-cells.json.

Written by bench/fpga_page.py, because an installed package does not have that file. Yosys counts before placement and
packs less than Vivado does, so LUTs are on the high side (bench/rtl_cells.py says why).
"""

from __future__ import annotations

from collections.abc import Mapping

from .cycles import Element
from .parts import Resources

CELLS: Mapping[Element, Resources] = {
'''


def numbers(counted: Mapping[str, Any]) -> dict[Element, Resources]:
    """What was counted, as the package holds it."""
    return {
        Element(e["bits"], e["lanes"], e["minimum"], e["dsp_products"]): Resources(**e["resources"])
        for e in counted["elements"]
    }


def cells(counted: Mapping[str, Any]) -> str:
    """The module runtime/fpga/cells.py."""
    rows = ""
    for element in counted["elements"]:
        kind = ", ".join(f"{name}=True" for name in ("minimum", "dsp_products") if element[name]).replace(
            "_products", ""
        )
        used = element["resources"]
        rows += (
            f"    Element({element['bits']}, {element['lanes']}{', ' * bool(kind)}{kind}):"
            f" Resources({used['lut']:_}, {used['ff']:_}, {used['dsp']}, {used['bram']:g}),\n"
        )
    return f"{HEAD}{rows}}}\n"


def step_of(folder: Path, name: str, stored: str, embedding: str | None, *arguments: Any, **options: Any) -> Step:
    """The decode step of a model of that shape."""
    sys.path.insert(0, str(ROOT / "tests"))
    from shapes import write_shape

    path = write_shape(folder / f"{name}-{stored}.gguf", name, stored, embedding)
    with GGUFFile.open(path) as gguf:
        return Step(ModelConfig.from_gguf(gguf), *arguments, **options)


def sections(folder: Path) -> dict[str, str]:
    """What stands between the markers of hls/BOARD.md, by their names."""
    default = step_of(folder, "smollm2-135m", "Q4_1", "Q8_0", CTX)
    models = {
        "SmolLM2-135M, Q4_1 (the default)": default,
        "Llama-3.1-8B, Q4_0": step_of(folder, "llama-3.1-8b", "Q4_0", None, CTX),
    }
    best = [
        "| board | model | fastest design that fits | full | tokens/s | GB/s | limit |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for part in PARTS.values():
        for title, step in models.items():
            try:
                found = sweep(step, part, grid(step, part)).best
            except DoesNotFit:
                need = sum(step.memory.values()) / 2**30
                why = f"none: {need:.2f} GiB of weights and cache, {part.memory_bytes / 2**30:.2f} GiB of memory"
                best.append(f"| {part.title} | {title} | {why} | | | | |")
                continue
            best.append(
                f"| {part.title} | {title} | {found.configuration} | {found.share:.0%} | {found.tokens_per_s:.4g} |"
                f" {found.gb_per_s:.0f} of {part.gb_per_s:.0f} | {found.limit} |"
            )
    u280 = PARTS["u280"]
    chosen = sweep(default, u280, grid(default, u280)).best
    launched = default.estimate(u280, chosen.configuration, LAUNCH_US)
    calls = sum(kind.times for kind in default.kinds)
    launch = (
        f"The default model has {calls} calls: at {LAUNCH_US} us each the {u280.title}'s {chosen.tokens_per_s:.4g}"
        f" tokens/s become {launched.tokens_per_s:.3g}."
    )
    return {"best": "\n".join(best), "launch": launch, "published": published(folder)}


def published(folder: Path) -> str:
    """The model under the parameters that others state, beside what they measured."""
    kv260, u280 = PARTS["kv260"], PARTS["u280"]
    llama = step_of(folder, "llama-2-7b", "Q4_0", "F16", CTX, AWQ, kv_bits=8)
    full = step_of(folder, "llama-2-7b", "Q4_0", "F16", 1024, AWQ, kv_bits=8)
    small = step_of(folder, "smollm2-135m", "Q8_0", None, 64, kv_bits=8)
    speed = llama.estimate(kv260, Configuration(4, 32, 300, 2)).tokens_per_s
    memory = sum(full.memory.values()) / kv260.memory_bytes
    # Weights that are multiplied, 4 bits each: what the paper calls the theoretical limit.
    weights = sum(kind.times * m.shape[0] * m.shape[1] for kind in llama.kinds for m in kind.weights)
    ideal = kv260.gb_per_s * 1e9 / (weights / 2)
    port = small.estimate(kv260, Configuration(1, 32, 100, 1, port_bits=64)).tokens_per_s
    flight = llama.estimate(u280, Configuration(32, 128, 225, 16)).tokens_per_s
    return "\n".join(
        (
            "| board, by whom | model and stated parameters | published | model | off |",
            "|---|---|---:|---:|---:|",
            "| KV260, arXiv 2502.10659 | Llama2-7B, AWQ (4 bits, groups of 128), 8-bit cache, 300 MHz, bare metal"
            f" (group, clock from memory); at context {CTX} | around 5 tokens/s | {speed:.3g} | {speed / 5 - 1:+.0%} |",
            "| the same | part of what 19.2 GB/s would do with 4-bit weights alone, as its figure is read here"
            f" | 85% | {speed / ideal:.1%} | {speed / ideal / 0.85 - 1:+.1%} |",
            "| the same | memory in use at context 1024, the embedding in float16 | 93.3% |"
            f" {memory:.1%} | {memory / 0.933 - 1:+.1%} |",
            "| KV260, jonathansong/Torch2RISCV-accelerator at 094d535, build K1c | SmolLM2-135M, 8-bit weights and"
            f" cache, 100 MHz, one 64-bit port | 4.77 tokens/s | {port:.3g} | {port / 4.77 - 1:+.0%} |",
            "| U280, FlightLLM, arXiv 2401.03868 | Llama2-7B, 225 MHz, another engine (see below) |"
            f" 55 tokens/s (from memory) | {flight:.3g} | {flight / 55 - 1:+.0%} |",
        )
    )


def picture() -> None:
    """The sweep that hls/BOARD.md shows."""
    part = PARTS["u280"]
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(Path(folder), "llama-3.1-8b", "Q4_0", None, CTX)
    for file in draw(sweep(step, part, grid(step, part)), f"Llama-3.1-8B, Q4_0, context {CTX},", str(PICTURE)):
        if file.suffix == ".svg":  # as large again, and the page shows the other one
            file.unlink()


def page(text: str, found: Mapping[str, str]) -> str:
    """hls/BOARD.md with the sections between its markers replaced."""
    for name, section in found.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{section}{end}{rest.split(end)[1]}"
    return text


def stale() -> dict[Path, str]:
    """Files that are out of date, with what they should hold."""
    found: dict[Path, str] = {}
    if COUNTED.exists():
        counted = json.loads(COUNTED.read_text())
        if numbers(counted) != kept.CELLS:
            found[CELLS] = cells(counted)
    with tempfile.TemporaryDirectory() as folder:
        text = page(PAGE.read_text(), sections(Path(folder)))
    return found if text == PAGE.read_text() else {**found, PAGE: text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    found = stale()
    for path, text in found.items():
        if not args.check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
    if CELLS in found and not args.check:
        os.execv(sys.executable, [sys.executable, *sys.argv])  # the figures follow from what was just written
    if found and not args.check:
        picture()
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
