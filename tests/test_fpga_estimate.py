"""`runtime fpga estimate`: the model's arithmetic, published boards, the search, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fpga_page
import pytest
from gguf_image import save
from polykern.kernels.quant import FORMATS
from polykern.runtime.cli import main
from polykern.runtime.config import ModelConfig
from polykern.runtime.fpga.cells import CELLS
from polykern.runtime.fpga.configuration import Configuration
from polykern.runtime.fpga.constants import CONSTANTS
from polykern.runtime.fpga.cycles import BLOCK, Element, gemv_cycles
from polykern.runtime.fpga.engine import cells, element_for
from polykern.runtime.fpga.estimate import LIMITS, Estimate
from polykern.runtime.fpga.parts import BEAT_BYTES, PARTS, Part, Resources
from polykern.runtime.fpga.step import Step
from polykern.runtime.fpga.streams import AWQ, STREAMS, WHAT_IF
from polykern.runtime.fpga.sweep import ALIKE, PRODUCTS, Sweep, attention_units, grid, sweep
from polykern.runtime.gguf import GGUFFile
from shapes import write_shape
from tiny_models import MODELS

ROOT = Path(__file__).resolve().parents[1]
U280, KV260 = PARTS["u280"], PARTS["kv260"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files in the shape of real models, without data."""
    folder = tmp_path_factory.mktemp("shapes")
    wanted = {
        "135m": ("smollm2-135m", "Q4_1", "Q8_0"),
        "135m-q8": ("smollm2-135m", "Q8_0", None),
        "7b": ("llama-2-7b", "Q4_0", "F16"),
        "8b": ("llama-3.1-8b", "Q4_0", None),
    }
    return {name: write_shape(folder / f"{name}.gguf", *arguments) for name, arguments in wanted.items()}


def step_of(path: Path, ctx: int = 512, *arguments: Any, **options: Any) -> Step:
    with GGUFFile.open(path) as gguf:
        return Step(ModelConfig.from_gguf(gguf), ctx, *arguments, **options)


@pytest.fixture(scope="module")
def small(files: dict[str, Path]) -> Step:
    return step_of(files["135m"])


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document of `runtime fpga estimate`."""
    assert main(["fpga", "estimate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and the one line on stderr."""
    status = main(["fpga", "estimate", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return status, line.removeprefix("runtime: error: ")


# The model's arithmetic


def test_streams_are_the_table_of_the_engine() -> None:
    readme = (ROOT / "hls" / "README.md").read_text()
    rows = re.findall(r"^\| (Q\w+) \| (?:u?int)([48]) .*\| (\d+) \| (\w+) \| (\d+) \| ([\d.]+) \|$", readme, re.M)
    assert {row[0] for row in rows} == {name for name, fmt in FORMATS.items() if not fmt.is_float}
    for name, bits, per_beat, header, group, bits_per_weight in rows:
        stream = STREAMS[name]
        assert (stream.bits, stream.weights_per_beat, stream.group) == (int(bits), int(per_beat), int(group)), name
        assert stream.minimum == (header in ("SM", "K")), name
        long_row = stream.weights_per_beat * stream.group * 3
        assert stream.row_beats(long_row) * 512 / long_row == float(bits_per_weight), name
    assert STREAMS.keys() == FORMATS.keys()


@pytest.mark.parametrize(("in_features", "beats"), [(1, 2), (128, 2), (129, 3), (1024, 9), (1025, 11), (576, 6)])
def test_rows_are_whole_beats(in_features: int, beats: int) -> None:
    assert STREAMS["Q4_0"].row_beats(in_features) == beats


@pytest.mark.parametrize("lanes", [32, 64, 128])
@pytest.mark.parametrize("part", [U280, KV260], ids=lambda part: part.name)
def test_a_product_takes_what_the_cycle_model_of_the_rtl_says(small: Step, part: Part, lanes: int) -> None:
    """All of a call's cycles but what comes before the first beat: making x, the memory's latency."""
    at = Configuration(part.channels, lanes, part.mhz, 3)
    estimate = small.estimate(part, at)
    checked = 0
    for kind, call in zip(small.kinds, estimate.calls, strict=True):
        for matrix in kind.weights[:1]:
            rows = -(-sum(m.shape[0] for m in kind.weights) // at.channels)
            pace = part.channel_gb_per_s(at.channels) * 1e3 / at.mhz / BEAT_BYTES
            element = element_for(small.streams[matrix.dtype], lanes)
            expected = gemv_cycles(element, rows, matrix.shape[1], load=False, beats_per_cycle=pace)
            passes = -(-matrix.shape[1] // 16) * (2 if "weight" in kind.signature.tensors else 1)
            before = 64 + passes + (32 if "weight" in kind.signature.tensors else 0)
            assert call.cycles == pytest.approx(expected + before), call.label
            checked += 1
    assert checked == 5
    assert element_for(STREAMS["Q8_0"], 128).lanes * BLOCK == 64, "a beat holds no more"


def test_calls_are_those_of_the_model(small: Step) -> None:
    counts = {(kind.op.name, kind.label): kind.times for kind in small.kinds}
    assert counts["attention", "blk.0.attention"] == 30
    assert counts["rms_norm_gemm", "output"] == 1
    assert sum(counts.values()) == 1 + 30 * 6 + 3


@pytest.mark.parametrize("name", MODELS)
def test_any_model_that_runs_has_an_estimate(name: str, tmp_path: Path) -> None:
    """Biases, QK norms, mixed formats, layers that differ, windows, soft caps."""
    step = step_of(save(tmp_path, MODELS[name]()), 64)
    for part in PARTS.values():
        estimate = step.estimate(part, Configuration(4, 64, 200, 2))
        assert sum(call.count for call in estimate.calls) == sum(kind.times for kind in step.kinds)
        assert all(call.cycles > 0 for call in estimate.calls)
        assert 0 < estimate.gb_per_s < part.gb_per_s


def test_totals_add_up(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    found = asked(capsys, "-m", str(files["135m"]))
    assert found["cycles"] == pytest.approx(sum(call["count"] * call["cycles"] for call in found["calls"]))
    assert found["tokens_per_s"] == pytest.approx(found["configuration"]["mhz"] * 1e6 / found["cycles"])
    assert found["bytes"] == pytest.approx(sum(call["count"] * call["nbytes"] for call in found["calls"]))
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["limit"] == max(LIMITS, key=lambda limit: found["shares"][limit])
    for kind, used in found["resources"]["used"].items():
        assert used == pytest.approx(sum(area[kind] for area in found["resources"]["by"].values()))
    assert found["resources"]["share"] == pytest.approx(max(found["resources"]["fill"].values()))
    assert found["gb_per_s"] < found["peak_gb_per_s"]


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.name)
def test_more_is_never_slower(small: Step, part: Part) -> None:
    start = Configuration(1, 32, 100, 1)
    speed = small.estimate(part, start).tokens_per_s
    for change in ({"lanes": 64}, {"mhz": 200.0}, {"attention_units": 3}, {"channels": part.channels}):
        assert small.estimate(part, replace(start, **change)).tokens_per_s >= 0.999 * speed, change
    assert small.estimate(part, replace(start, port_bits=64)).tokens_per_s < speed


def test_a_longer_context_and_a_larger_format_take_longer(files: dict[str, Path]) -> None:
    at = Configuration(32, 128, 225, 8)
    speeds = [step_of(files["135m"], ctx).estimate(U280, at).tokens_per_s for ctx in (1, 512, 8192)]
    assert speeds == sorted(speeds, reverse=True)
    by_format = [
        step_of(files["135m"], 64, fmt).estimate(KV260, Configuration(4, 32, 300, 1))
        for fmt in ("Q4_0", "Q4_1", "Q8_0", "F16")
    ]
    assert [e.nbytes for e in by_format] == sorted(e.nbytes for e in by_format)
    assert [e.memory["weights"] for e in by_format] == sorted(e.memory["weights"] for e in by_format)


def test_the_host_costs_what_it_is_said_to(small: Step) -> None:
    at = Configuration(32, 128, 225, 8)
    calls = sum(kind.times for kind in small.kinds)
    added = small.estimate(U280, at, launch_us=20).seconds - small.estimate(U280, at).seconds
    assert added == pytest.approx(calls * 20e-6)


def test_cells_are_those_that_were_counted() -> None:
    counted = ROOT / "bench" / "results" / "rtl-cells.json"
    if not counted.exists():
        pytest.skip("no bench/results/rtl-cells.json: `python bench/rtl_cells.py` writes it, with Yosys")
    assert fpga_page.numbers(json.loads(counted.read_text())) == CELLS, "out of date: python bench/fpga_page.py"


def test_the_package_is_written_as_it_was_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used = {"lut": 10, "ff": 20, "dsp": 3, "bram": 8.0}
    counted = {"elements": [{"bits": 4, "lanes": 1, "minimum": True, "dsp_products": False, "resources": used}]}
    assert "    Element(4, 1, minimum=True): Resources(10, 20, 3, 8),\n}\n" in fpga_page.cells(counted)
    results = tmp_path / "rtl-cells.json"
    results.write_text(json.dumps(counted))
    monkeypatch.setattr(fpga_page, "COUNTED", results)
    assert list(fpga_page.stale()) == [fpga_page.CELLS]


def test_what_was_not_counted_follows_from_what_was() -> None:
    for bits, counts in ((4, (1, 2, 4)), (8, (1, 2))):
        for minimum in (False, True):
            for dsp in (False, True):
                sizes = [cells(Element(bits, lanes, minimum, dsp)) for lanes in counts]
                assert [size.lut for size in sizes] == sorted(size.lut for size in sizes)
                assert all(size.ff > 0 for size in sizes)
            lut, dsp = (cells(Element(bits, counts[-1], minimum, products)) for products in (False, True))
            assert dsp.lut < lut.lut
            assert dsp.dsp >= lut.dsp + 32 * counts[-1]
        with_minimum, without = (cells(Element(bits, 1, minimum, dsp=True)) for minimum in (True, False))
        assert with_minimum.lut > without.lut


def test_products_in_dsp_blocks_save_luts(small: Step) -> None:
    lut, dsp = (small.estimate(U280, Configuration(8, 128, 225, 3, kind)) for kind in PRODUCTS)
    assert dsp.used.lut < lut.used.lut
    assert dsp.used.dsp >= lut.used.dsp + 8 * 128
    assert dsp.tokens_per_s == pytest.approx(lut.tokens_per_s, rel=0.01)


def test_everything_has_a_source() -> None:
    assert len(CONSTANTS) > 10
    for name, constant in CONSTANTS.items():
        assert constant.source, name
        assert constant.unit, name
    for part in PARTS.values():
        numbers = {field.name for field in fields(Part)} - {"name", "title", "sources"}
        assert part.sources.keys() == numbers, part.name
    for stored, stream in WHAT_IF.values():
        assert stored in FORMATS
        assert stream not in STREAMS.values()


# Published boards. Parameters and what each paper or log says: hls/BOARD.md


def test_kv260_llama2_7b(files: dict[str, Path]) -> None:
    """J. Li et al., arXiv 2502.10659: KV260, 4 GB of DDR4-2400, 64 bits, Llama2-7B in 4 bits (AWQ, groups of 128)
    and an 8-bit cache for 1024 tokens, bare metal: "around 5 token/s", 93.3% of the memory."""
    for ctx in (1, 512, 1024):
        estimate = step_of(files["7b"], ctx, AWQ, kv_bits=8).estimate(KV260, Configuration(4, 32, 300, 2))
        assert estimate.tokens_per_s == pytest.approx(5, rel=0.15), ctx
        assert estimate.limit == "memory"
        assert estimate.share < 1
    assert sum(estimate.memory.values()) / KV260.memory_bytes == pytest.approx(0.933, abs=0.02)


def test_kv260_smollm2_135m(files: dict[str, Path]) -> None:
    """jonathansong/Torch2RISCV-accelerator at 094d535, boards/kv260/README.md: SmolLM2-135M with int8 weights and an
    int8 cache at 100 MHz over one 64-bit port: 4.77 tok/s (build K1c). The model, which overlaps reading, says more."""
    step = step_of(files["135m-q8"], 64, kv_bits=8)
    estimate = step.estimate(KV260, Configuration(1, 32, 100, 1, port_bits=64))
    assert 1.0 < estimate.tokens_per_s / 4.77 < 1.25


def test_the_page_for_a_person_with_a_board_says_what_the_model_says() -> None:
    assert not fpga_page.stale(), "out of date: python bench/fpga_page.py"


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "BOARD.md"
    page.write_text(re.sub(r"\d\.\d\d \| -?\+?\d+%", "9.99 | +1%", fpga_page.PAGE.read_text()))
    monkeypatch.setattr(fpga_page, "PAGE", page)
    assert list(fpga_page.stale()) == [page]


# The search


@pytest.fixture(scope="module")
def found(small: Step) -> Sweep:
    return sweep(small, U280, grid(small, U280))


def test_the_best_fits_and_nothing_that_fits_is_faster(found: Sweep) -> None:
    fitting = [e for e in found.estimates if e.share <= 1]
    assert found.fitting == len(fitting)
    assert any(e.share > 1 for e in found.estimates)
    assert found.best in fitting
    assert found.best.tokens_per_s >= (1 - ALIKE) * max(e.tokens_per_s for e in fitting)
    assert found.best.share <= 1


def test_the_frontier_is_what_nothing_beats(found: Sweep) -> None:
    def beaten(e: Estimate) -> bool:
        return any(o.share <= e.share and o.tokens_per_s > e.tokens_per_s for o in found.estimates)

    assert len(found.frontier) > 5
    assert not any(beaten(e) for e in found.frontier)
    shares = [e.share for e in found.frontier]
    assert shares == sorted(shares)


def test_what_is_given_is_not_varied(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    document = asked(capsys, "-m", str(files["135m"]), "--sweep", "--channels", "4", "--freq", "150")
    points = [point["configuration"] for point in document["points"]]
    assert {(point["channels"], point["mhz"]) for point in points} == {(4, 150)}
    assert {point["lanes"] for point in points} == {32, 64, 128}
    fastest = max(point["tokens_per_s"] for point in document["points"] if point["share"] <= 1)
    assert document["best"]["tokens_per_s"] == pytest.approx(fastest, rel=ALIKE)


def test_the_picture(capsys: pytest.CaptureFixture[str], files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'polykern[bench]'")
    for name in ("one", "two.svg", "three.v2.png"):
        assert main(["fpga", "estimate", "-m", str(files["135m"]), "--sweep", "-o", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("drawn: ") == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        "one.png", "one.svg", "two.png", "two.svg", "three.v2.png", "three.v2.svg",
    }  # fmt: skip
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "one.svg").read_text()
    for words in ("Alveo U280", "tokens per second", "does not fit", "memory bandwidth", "nothing smaller is as fast"):
        assert words in text


def test_pictures_without_matplotlib(
    capsys: pytest.CaptureFixture[str], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, line = refused(capsys, "-m", str(files["135m"]), "--sweep", "-o", str(tmp_path / "x"))
    assert (status, line) == (2, "-o needs matplotlib: pip install 'polykern[bench]', or leave -o out")


# What is shown and what is refused


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_an_estimate_and_a_best(
    capsys: pytest.CaptureFixture[str], files: dict[str, Path], part: str
) -> None:
    assert main(["fpga", "estimate", "-m", str(files["135m"]), "--part", part]) == 0
    shown = capsys.readouterr().out
    for words in (
        PARTS[part].title,
        "tokens/s",
        "limit: ",
        "attention",
        "DSP",
        "of 4,096 MiB" if part == "kv260" else "",
    ):
        assert words in shown
    assert main(["fpga", "estimate", "-m", str(files["135m"]), "--part", part, "--sweep"]) == 0
    shown = capsys.readouterr().out
    assert "nothing smaller is as fast" in shown
    assert re.search(r"^best: \d+ channels? x \d+ lanes in (LUT|DSP) at ", shown, re.M)


def test_a_model_that_is_too_large(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    for more in ((), ("--sweep",)):
        status, line = refused(capsys, "-m", str(files["8b"]), "--part", "kv260", *more)
        assert status == 1
        assert line == (
            "kv260 has 4.00 GiB of memory and the model needs 4.27 GiB (weights 4.21 GiB, KV cache 0.06 GiB):"
            " 0.27 GiB too much; take a smaller --format, --ctx or model"
        )


def test_a_design_that_is_too_large(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    many = ("-m", str(files["135m"]), "--part", "kv260", "--attention-units", "32")
    status, line = refused(capsys, *many, "--channels", "4", "--lanes", "128", "--freq", "250", "--products", "lut")
    assert status == 1
    assert re.search(
        r"^kv260 is too small for 4 channels x 128 lanes in LUT at 250 MHz, 32 attention units: LUT [\d,]+ of 81,984"
        r" \([\d,]+ over\).* DSP [\d,]+ of 998 \([\d,]+ over\); a design can fill 70% LUT, .* of a chip$",
        line,
    )
    status, line = refused(capsys, *many, "--sweep")
    assert status == 1
    assert "32 attention units, the smallest of 198 designs asked for: LUT" in line


def test_what_is_not_given_is_chosen(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    chosen = asked(capsys, "-m", str(files["135m"]), "--part", "u50")["configuration"]
    assert chosen["mhz"] == PARTS["u50"].mhz
    given = asked(capsys, "-m", str(files["135m"]), "--part", "u50", "--channels", "2", "--attention-units", "3")
    assert (given["configuration"]["channels"], given["configuration"]["attention_units"]) == (2, 3)
    assert given["configuration"]["lanes"] == 128


def test_attention_units_divide_the_heads(small: Step, files: dict[str, Path]) -> None:
    assert attention_units(small) == [1, 3, 9]
    assert attention_units(step_of(files["8b"])) == [1, 2, 4, 8, 16, 32]


def test_heads_that_share_keys_read_them_once(small: Step) -> None:
    """hls/attention.cpp: with fewer units than query heads share a kv head, the cache is read again."""

    def cache(units: int) -> float:
        estimate = small.estimate(U280, Configuration(32, 128, 225, units))
        return next(call.nbytes for call in estimate.calls if call.op == "attention")

    assert cache(1) == 3 * cache(3)
    assert cache(2) == 2 * cache(3)
    assert cache(3) == cache(9) == 2 * 512 * 3 * 64 * 2


def test_over_counts_what_is_missing(small: Step) -> None:
    part = replace(KV260, chip=Resources(lut=1e6, ff=1e6, dsp=100, bram=1e4, uram=1e4))
    estimate = small.estimate(part, Configuration(4, 32, 300, 3))
    used = estimate.used.dsp
    assert estimate.over() == [f"DSP {used:,.0f} of 80 ({used - 80:,.0f} over)"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--part", "u250"], "argument --part: invalid choice: 'u250' (choose from"),
        (["--part", "kv260", "--channels", "8"], "--channels is 8, and kv260 has 4"),
        (["--channels", "3"], "argument --channels: invalid choice: 3 (choose from 1, 2, 4, 8, 16, 32)"),
        (["--lanes", "100"], "argument --lanes: invalid choice: 100 (choose from 32, 64, 128)"),
        (["--freq", "nan"], "expected a number from 10 to 500, got 'nan'"),
        (["--freq", "1e9"], "expected a number from 10 to 500, got '1e9'"),
        (["--attention-units", "-1"], "expected a whole number from 1 to 1024, got '-1'"),
        (["--launch-us", "-1"], "expected a number from 0 to 1e+06, got '-1'"),
        (["--ctx", "8193"], "--ctx is 8193, and the model was made for 8192 tokens"),
        (["--format", "Q3_K"], "argument --format: invalid choice: 'Q3_K' (choose from"),
        (["--format", "Q4_K"], "Q4_K needs rows of a multiple of 256 numbers, and this model has rows of 576"),
        (["-o", "x.png"], "-o draws a sweep; add --sweep"),
        (["--sweep", "-o", "/no/such/folder/x"], "-o: no folder /no/such/folder"),
        (["--kv", "f8"], "invalid choice: 'f8'"),
    ],
)
def test_nonsense_is_refused(
    capsys: pytest.CaptureFixture[str], files: dict[str, Path], arguments: list[str], text: str
) -> None:
    status, line = refused(capsys, "-m", str(files["135m"]), *arguments)
    assert status == 2
    assert text in line


def test_an_unknown_action_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fpga", "guess"]) == 2
    assert "invalid choice: 'guess' (choose from 'estimate')" in capsys.readouterr().err.replace(
        "from estimate", "from 'estimate'"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_command(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("fpga", "estimate", "sweep", "attention-units"):
        assert word in script
