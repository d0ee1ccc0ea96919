"""The RTL processing element (hls/rtl): bit for bit its model, which is within gemm's bound, in the cycles predicted.

Plain runs simulate a part of everything with Icarus Verilog; `make rtl` sets POLYKERN_RTL=full: every element, all
tokens of every case, rows as long as a model's, with Verilator, and cells counted again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polykern.kernels.gemm import GEMM
from polykern.kernels.judge import judge
from polykern.kernels.op import Case, fp64, type_of
from polykern.runtime.fpga.cycles import Element, gemv_cycles
from rtl_cells import ELEMENTS, RESULTS, differences, digest, name_of, version
from rtl_model import (
    FORMATS,
    NUMERICS,
    Activations,
    Blocks,
    Group,
    Played,
    Tile,
    beats_of,
    blocks_of,
    exact_sums,
    gemv,
    gemv_bits,
    quantize,
    random_activations,
    random_blocks,
    round32,
)
from rtl_sim import RTL, SOURCES, Simulator, need, need_verilator, parameters, run

FULL = os.environ.get("POLYKERN_RTL") == "full"
TOOL = "verilator" if FULL else "iverilog"
SIMULATED = (
    [*ELEMENTS, Element(lanes=2, dsp=True), Element(lanes=4, minimum=True, dsp=True)]
    if FULL
    else [
        Element(),
        Element(lanes=2, minimum=True),
        Element(lanes=1),
        Element(lanes=2, dsp=True),
        Element(8, 2),
        Element(8, 1, minimum=True),
        Element(8, 2, dsp=True),
    ]
)
CASES = [c for c in GEMM.cases if c.attrs["precision"] == "fast" and c.dims["format"] in FORMATS]
Make = Callable[..., Simulator]


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """simulator(element, **parameters): built once a session."""
    if FULL:
        need_verilator()
    need(*(("g++", "make") if FULL else ("iverilog", "vvp")))
    made: dict[str, Simulator] = {}

    def make(element: Element, **others: int) -> Simulator:
        key = "-".join([name_of(element), *(f"{k}{v}" for k, v in others.items())])
        if key not in made:
            made[key] = Simulator(element, tmp_path_factory.mktemp("rtl") / key, TOOL, **others)
        return made[key]

    return make


def tile(rng: np.random.Generator, element: Element, rows: int, blocks: int, wild: bool = False) -> Tile:
    return Tile(random_blocks(rng, element, rows, blocks, wild), random_activations(rng, blocks, wild))


def predicted(element: Element, group: Group, stalls: int) -> float:
    """Of commands one behind the other: the latency of all but the last is hidden."""
    single = [gemv_cycles(element, t.blocks.rows, t.blocks.count * 32, load=t.load) for t in group.tiles]
    return sum(single) - (len(single) - 1) * element.latency + stalls


def check(element: Element, groups: list[Group], played: list[Played]) -> None:
    """Every result bit for bit, and every cycle accounted for."""
    assert len(played) == len(groups)
    for group, got in zip(groups, played, strict=True):
        np.testing.assert_array_equal(got.results, group.expected())
        assert got.cycles == predicted(element, group, got.stalls), (element, group)


# ---- The model -----------------------------------------------------------------------------------------------------


def test_rounding_to_float32_is_numpys() -> None:
    rng = np.random.default_rng(1)
    mantissas = rng.integers(-(1 << 53), 1 << 53, 4000)
    mantissas[:1000] = (mantissas[:1000] >> 29 << 29) + (1 << 28)  # half way between two float32
    exponents = rng.integers(-200, 140, 4000)
    values = np.ldexp(mantissas.astype(np.float64), exponents)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    got = np.array([round32(int(m), int(e) + 48) for m, e in zip(mantissas, exponents, strict=True)], np.uint32)
    np.testing.assert_array_equal(got.view(np.float32)[normal], expected[normal])
    assert np.all(got[~normal] & 0x7FFFFFFF == 0)
    assert np.isinf(expected).any()
    assert not normal.all()


@pytest.mark.parametrize(
    "element", [Element(), Element(minimum=True), Element(8, 2), Element(8, 2, minimum=True)], ids=name_of
)
def test_exact_sums_are_those_of_float64(element: Element) -> None:
    """A second formula: w x in float64, whose terms here are exact and whose sum loses less than float32 does."""
    rng = np.random.default_rng(2)
    blocks, x = random_blocks(rng, element, 20, 9), random_activations(rng, 9)
    weights = blocks.numbers() * blocks.scale.astype(np.float64)[..., None]
    if blocks.minimum is not None:
        weights = weights + blocks.minimum.astype(np.float64)[..., None]
    numbers = x.q * x.step.astype(np.float64)[:, None] * 2.0**x.exponent
    np.testing.assert_allclose(gemv(blocks, x), np.einsum("nbi,bi->n", weights, numbers), rtol=1e-6, atol=1e-6)


def test_the_largest_sums_fit_the_accumulator() -> None:
    """exact_sums asserts 112 bits; rows of 32768 numbers, all of them the largest that can be."""
    for element in (Element(), Element(minimum=True), Element(8, 2), Element(8, 2, minimum=True)):
        top = np.full((1, 1024), 65504, np.float16)
        stored = 0 if element.bits == 4 and not element.minimum else 15 if element.bits == 4 else -128
        blocks = Blocks(element.bits, np.full((1, 1024, 32), stored), top, top if element.minimum else None)
        x = Activations(np.full((1024, 32), -127, np.int8), top[0], 0)
        sums, _ = exact_sums(blocks, x)
        assert abs(sums[0]).bit_length() > 100


def run_case(case: Case) -> tuple[dict[str, Any], Blocks, list[Activations]]:
    inputs = GEMM.make_inputs(case)
    return inputs, blocks_of(inputs["w"]), [quantize(x) for x in inputs["x"]]


def with_bias(y: np.ndarray[Any, Any], inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    return y + inputs["bias"] if "bias" in inputs else y


@pytest.mark.parametrize("fmt", FORMATS)
def test_model_is_within_the_contracts_bound(fmt: str) -> None:
    worst = 0.0
    for case in (c for c in CASES if c.dims["format"] == fmt):
        inputs, blocks, rows = run_case(case)
        signature = GEMM.signature({name: type_of(value) for name, value in inputs.items()}, case.attrs)
        got = {"y": with_bias(np.stack([gemv(blocks, x) for x in rows]), inputs)}
        wide = fp64(inputs)
        verdict = judge(GEMM, case, signature, wide, GEMM.reference(wide, case.attrs), got, NUMERICS)
        assert not verdict.reason, f"{case.name}: {verdict.reason}"
        worst = max(worst, verdict.ratio)
    assert worst > 0.05  # the bound is not so wide that everything passes


def test_steps_far_below_the_largest_keep_their_bits() -> None:
    """Blocks down to 2**-29 of the row's largest are rounded as if they were alone."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((30, 32)) * 2.0 ** -np.arange(30)[:, None] * 1e20
    rounded = quantize(x.reshape(-1))
    again = rounded.q * rounded.step.astype(np.float64)[:, None] * 2.0**rounded.exponent
    assert np.all(np.abs(again - x) <= 0.505 * np.abs(x).max(axis=1, keepdims=True) / 127)


# ---- The simulation ------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 5), (2, 3), (3, 4), (9, 1), (5, 18), (2, 31), (3, 32), (2, 33), (1, 70)]
LONG = [(48, 18), (24, 48), (2, 1024), (300, 2)]


@pytest.mark.parametrize("element", SIMULATED, ids=name_of)
def test_random_tiles(simulator: Make, element: Element) -> None:
    """20 tiles, half of them with any finite float16 as scales and steps; no stalls: the cycles are the formula's."""
    rng = np.random.default_rng([element.bits, element.lanes, element.minimum, element.dsp])
    groups = [Group([tile(rng, element, *size, wild)]) for size in SIZES + LONG * FULL for wild in (False, True)]
    played = simulator(element).play(groups)
    check(element, groups, played)
    assert all(got.stalls == 0 for got in played)


@pytest.mark.parametrize("element", SIMULATED, ids=name_of)
def test_stalls_on_both_sides(simulator: Make, element: Element) -> None:
    rng = np.random.default_rng(4)
    held = [(0, 150, 0), (150, 0, 0), (0, 0, 254), (60, 128, 128), (200, 200, 230)] + [(30, 100, 250)] * FULL
    groups = [Group([tile(rng, element, 7, 6)], *hold) for hold in held]
    played = simulator(element).play(groups)
    check(element, groups, played)
    assert all(got.stalls > 0 for got in played)


@pytest.mark.parametrize("element", [Element(), Element(8, 1, minimum=True)], ids=name_of)
def test_reset_in_the_middle(simulator: Make, element: Element) -> None:
    """While x is loaded, in a row, between rows, with results under way: afterwards the same group gives the same."""
    rng = np.random.default_rng(5)
    tiles = [tile(rng, element, 6, 9), tile(rng, element, 2, 3)]
    groups = [Group(tiles, hold_y=100, reset_at=cycle) for cycle in (3, 9, 17, 21, 26, 33, 40, 55)]
    for group, got in zip(groups, simulator(element).play(groups), strict=True):
        np.testing.assert_array_equal(got.results, group.expected())


def test_commands_one_behind_the_other(simulator: Make) -> None:
    """Several matrices, some with the x of the one before; each loads while the rows before it are still under way."""
    element, rng = Element(), np.random.default_rng(6)
    first, other = random_activations(rng, 5), random_activations(rng, 12)
    tiles = [
        Tile(random_blocks(rng, element, 4, 5), first),
        Tile(random_blocks(rng, element, 1, 5), first, load=False),
        Tile(random_blocks(rng, element, 3, 12), other),
        Tile(random_blocks(rng, element, 2, 12), other, load=False),
        tile(rng, element, 1, 1),
        tile(rng, element, 5, 2),
    ]
    groups = [Group(tiles), Group(tiles, 40, 40, 40)]
    check(element, groups, simulator(element).play(groups))


def test_results_that_nobody_takes_stop_the_stream(simulator: Make) -> None:
    """More rows than the result FIFO has room for, taken rarely: nothing is lost, and the stream waits for credits."""
    element, rng = Element(), np.random.default_rng(7)
    groups = [Group([tile(rng, element, 40, 1)], hold_y=hold) for hold in (0, 200, 245)]
    played = simulator(element, OUT_DEPTH=4).play(groups)
    for group, got in zip(groups, played, strict=True):
        np.testing.assert_array_equal(got.results, group.expected())
        assert got.blocked > 0
    assert simulator(element).play(groups[:1])[0].blocked == 0  # 32 places never run out while results are taken


@pytest.mark.parametrize("element", [Element(), Element(lanes=1), Element(lanes=2, minimum=True)], ids=name_of)
@pytest.mark.parametrize("lost", [0, 26, 64, 128, 192])
def test_cycles_at_the_pace_of_memory(simulator: Make, element: Element, lost: int) -> None:
    """Memory that brings 1 - lost / 256 beats per cycle: the prediction, which knows no stall, is within 5%."""
    rng = np.random.default_rng(8)
    group = Group([tile(rng, element, 12, 36)], hold_w=-lost)
    assert len(beats_of(group.tiles[0].blocks)) == 12 * element.row_beats(36 * 32)
    (got,) = simulator(element).play([group])
    cycles = gemv_cycles(element, 12, 36 * 32, beats_per_cycle=1 - lost / 256)
    assert abs(got.cycles - cycles) <= 0.05 * got.cycles, (got.cycles, cycles)


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q8_0", *(["Q5_0", "Q5_1"] if FULL else [])])
def test_contract_cases(simulator: Make, fmt: str) -> None:
    """Every case of gemm in a format, bit for bit the model judged above: all tokens, or the first and last."""
    bits, minimum = FORMATS[fmt]
    element, groups = Element(bits, 4 if bits == 4 else 2, minimum), list[Group]()
    for case in (c for c in CASES if c.dims["format"] == fmt and (FULL or c.dims["N"] < 1000)):
        _, blocks, rows = run_case(case)
        chosen = rows if FULL else rows[:1] + rows[1:][-1:]
        groups.append(Group([Tile(blocks, x) for x in chosen]))
    check(element, groups, simulator(element).play(groups))


def test_what_is_no_number_reaches_its_rows_alone(simulator: Make) -> None:
    """A NaN or infinity among the scales is that row's, among the steps every row's; the rows after are untouched."""
    element, rng = Element(lanes=2, minimum=True), np.random.default_rng(9)
    blocks, x = random_blocks(rng, element, 5, 6), random_activations(rng, 6)
    assert blocks.minimum is not None
    blocks.scale[1, 5], blocks.minimum[3, 0] = np.inf, np.nan
    bad = Activations(x.q, np.where(np.arange(6) == 2, np.float16(np.nan), x.step), 0)
    infinite = Activations(x.q, x.step, 200)
    groups = [Group([Tile(blocks, x), Tile(blocks, bad), Tile(blocks, infinite), Tile(blocks, x)])]
    played = simulator(element).play(groups)
    check(element, groups, played)
    y = played[0].results.view(np.float32)
    assert np.isnan(y[:5]).tolist() == [False, True, False, True, False]
    assert np.isnan(y[5:10]).all()
    assert np.isinf(y[[10, 12, 14]]).all()
    np.testing.assert_array_equal(y[15:].view(np.uint32), gemv_bits(blocks, x))


# ---- Planted faults ------------------------------------------------------------------------------------------------

FAULTS = {
    "last block of a row dropped": ("gemv_pe.v", "used0[i] <= i < after;", "used0[i] <= i + 1 < after;"),
    "row starts from the one before": ("gemv_pe.v", "(first ? zero : total)", "total"),
    "header read once too often": (
        "gemv_pe.v",
        "if (row_ends || group_ends) header <= 1;",
        "if (row_ends) header <= 1;",
    ),
    "int4 not centred": ("block_dot.v", "OFFSET == 8 ? 1 <<", "OFFSET == 9 ? 1 <<"),
    "pairs the wrong way round": ("block_dot.v", ": set0 ? {x0[7], x0}", ": set0 ? {x1[7], x1}"),
    "subnormal scales as normal ones": ("half_product.v", "{|a[14:10], a[9:0]}", "{1'b1, a[9:0]}"),
    "sign of the scale lost": ("half_product.v", "a[15] ^ b[15] ?", "b[15] ?"),
    "ties not to even": ("to_float32.v", "(q4[104] | |q4[102:0])", "1'b1"),
    "credit given twice": ("gemv_pe.v", "if (pop && !row_taken) credits", "if (pop) credits"),
    "reset leaves rows under way": ("gemv_pe.v", "done <= rst ? 7'd0 :", "done <="),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    need("iverilog", "vvp")
    element, rng = Element(lanes=1), np.random.default_rng(10)
    name, before, after = FAULTS[fault]
    sources = [Path(shutil.copy(path, tmp_path)) for path in SOURCES]
    text = (tmp_path / name).read_text()
    assert text.count(before) == 1, "the fault's place in the source is gone"
    (tmp_path / name).write_text(text.replace(before, after))
    tie = Blocks(4, np.full((1, 2, 32), 8), np.ones((1, 2), np.float16), None)
    tie.quants[0, 0, 0], tie.quants[0, 1, 0] = 9, 9
    half = Activations(np.eye(2, 32, dtype=np.int8)[[0, 0]], np.array([1024, 2.0**-14], np.float16), 0)
    tiny = random_blocks(rng, element, 2, 2)
    tiny.scale[:] = 2.0**-24 * np.array([1, 1000])  # subnormal
    tiles = [tile(rng, element, 3, 34), Tile(tiny, random_activations(rng, 2)), Tile(tie, half)]
    groups = [
        *(Group([t]) for t in tiles),
        Group([tile(rng, element, 60, 1)], hold_y=250),
        Group([tile(rng, element, 6, 1)], hold_y=100, reset_at=27),
    ]
    simulator = Simulator(element, tmp_path / "build", sources=sources, OUT_DEPTH=4)
    try:
        played = simulator.play(groups)
    except (AssertionError, ValueError):  # results left over, or no numbers
        return
    same = [np.array_equal(got.results, group.expected()) for group, got in zip(groups, played, strict=True)]
    assert not all(same)


# ---- Sources and cells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS[:: 1 if FULL else 5], ids=name_of)
def test_verilator_has_nothing_to_say(element: Element) -> None:
    need_verilator()
    options = [f"-G{name}={value}" for name, value in parameters(element).items()]
    # Not every bit is used with every parameter; all other warnings are on.
    run("verilator", "--lint-only", "-Wall", "-Wno-UNUSEDSIGNAL", "--top-module", "gemv_pe", *options, *SOURCES)


def test_cells_are_of_these_sources() -> None:
    kept = json.loads(RESULTS.read_text())
    assert kept["sources_sha256"] == digest(), "hls/rtl changed: python bench/rtl_cells.py counts its cells again"
    assert [e["name"] for e in kept["elements"]] == [name_of(e) for e in ELEMENTS]
    by_name = {e["name"]: e["resources"] for e in kept["elements"]}
    for line in kept["per_lane"]:
        for element in ELEMENTS:
            if (element.bits, element.minimum, element.dsp) == (line["bits"], line["minimum"], line["dsp_products"]):
                for kind in ("lut", "ff", "dsp"):  # block RAM comes in whole blocks
                    found = by_name[name_of(element)][kind]
                    assert found == pytest.approx(line["base"][kind] + element.lanes * line["lane"][kind], rel=0.05)


def test_the_readmes_figures_are_the_files() -> None:
    by_name = {e["name"]: e["resources"] for e in json.loads(RESULTS.read_text())["elements"]}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (RTL / "README.md").read_text().splitlines()
        if line.startswith(("| 4 |", "| 8 |"))
    ]
    assert len(rows) >= 7
    for bits, lanes, header, products, *numbers in rows:
        element = Element(int(bits), int(lanes), header == "SM", products == "DSP")
        counted = [by_name[name_of(element)][kind] for kind in ("lut", "ff", "dsp", "bram")]
        assert [int(number) for number in numbers] == [*counted, element.latency]


def test_a_difference_in_cells_is_named() -> None:
    kept = {"name": "4-1-s-lut", "resources": {"lut": 1000, "dsp": 2}}
    found = {"name": "4-1-s-lut", "resources": {"lut": 1051, "dsp": 2}}
    assert differences(found, kept, 0.05) == ["4-1-s-lut: lut is 1051, the file has 1000"]
    assert differences(kept, kept, 0.0) == []


@pytest.mark.skipif(not FULL, reason="takes minutes; make rtl")
def test_cells_counted_again() -> None:
    need("yosys")
    script = Path(__file__).resolve().parents[1] / "bench" / "rtl_cells.py"
    chosen = "4-4-s-lut"
    done = subprocess.run(
        [sys.executable, script, "--check", "--only", chosen], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{version()}: {done.stdout}{done.stderr}"
