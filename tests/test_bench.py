"""The kernel benchmark suite (bench/): its cases, the check before the clock, what is written and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compare
import numpy as np
import plots
import pytest
from kernelbench import results
from kernelbench.cases import MODELS, BenchCase, build_cases
from kernelbench.results import Row, duration
from kernelbench.roofline import Meter, Roofline
from kernelbench.stand import Refused, Stand, WrongResult, spread
from polykern.backends import open_backend
from polykern.backends.reference import ReferenceBackend
from polykern.kernels.errors import UsageError
from polykern.kernels.op import Cost, Op
from polykern.kernels.ops import OPS
from polykern.kernels.spi import DeviceInfo, Unsupported
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.model import build_program
from polykern.runtime.plan import plan

ROOT = Path(__file__).resolve().parent.parent


def small(**choice: Any) -> list[BenchCase]:
    return build_cases(16, **{"models": ["135M"], **choice})


# Cases


@pytest.mark.parametrize("model", MODELS)
def test_every_op_of_the_contract_is_timed(model: str) -> None:
    cases = build_cases(16, models=[model])
    assert {case.op for case in cases} == set(OPS)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)


def test_shapes_are_those_of_the_default_model(default_model: Path) -> None:
    """What a decode step of the real file calls is what is timed."""
    config = ModelConfig.from_gguf(GGUFFile.open(default_model))
    program = build_program(config, tokens=1, ctx=4096, page_size=16)
    called = {str(call.signature) for call in plan(program, open_backend("null")).calls}
    timed = {str(case.signature) for case in small()}
    assert called <= timed, called - timed


def test_filters_leave_other_names_as_they_are() -> None:
    everything = {case.name: case for case in small()}
    for choice in ({"tokens": [512]}, {"ops": ["gemm", "sample"]}, {"tokens": [8], "ops": ["attention"]}):
        some = small(**choice)
        assert some
        assert all(everything[case.name] == case for case in some)
        if "ops" in choice:
            assert {case.op for case in some} <= set(choice["ops"])
    assert {case.tokens for case in small(tokens=[512])} == {0, 512}  # dequantize has no rows
    assert [case.context for case in small(ops=["attention"], tokens=[1])] == [128, 4096]
    assert [case.context for case in small(ops=["attention"], tokens=[1], contexts=[77])] == [0]
    assert {case.signature.tensors["w"].dtype for case in small(ops=["gemm"], weight_format="Q5_0")} == {"Q5_0"}
    assert {case.signature.attrs["precision"] for case in small(ops=["gemm"], precision="exact")} == {"exact"}


def test_a_context_shorter_than_the_chunk_is_the_chunk() -> None:
    (short, long) = small(ops=["attention"], tokens=[512])
    assert (short.context, long.context) == (512, 4096)
    assert short.signature.tensors["block_table"].shape == (1, 32)


def test_what_a_step_streams_is_known() -> None:
    cases = {case.name: case for case in small()}
    down = cases["gemm_add-ffn_down-135M-M1-576x1536-Q4_1"]
    assert down.streamed == ("w",)
    # All weights of the file (95 MB), and the KV cache of 4096 tokens in 30 layers.
    assert down.reach == pytest.approx(95e6 + 30 * 4096 * 2 * 3 * 64 * 2, rel=0.03)
    assert cases["attention-135M-M1-ctx128-1x9x64"].streamed == ("k_pages", "v_pages")
    assert cases["glu-ffn_gate_up-135M-M1-1x1536"].streamed == ()  # its inputs were just written


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ops": ["gem"]}, f"unknown op 'gem'; did you mean 'gemm'? known: {', '.join(OPS)}"),
        ({"models": ["135m"]}, "unknown model '135m'; did you mean '135M'? known: 135M, 1.7B, 8B"),
        ({"models": ["70B"]}, "unknown model '70B'; known: 135M, 1.7B, 8B"),
        ({"weight_format": "Q4_2"}, "unknown weight format 'Q4_2'; did you mean 'Q4_K'? known: F32,"),
    ],
)
def test_unknown_names_are_told(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        small(**choice)
    assert str(caught.value).startswith(message)


def with_op(op: Op) -> dict[str, Op]:
    return {**OPS, op.name: op}


def test_a_new_op_is_timed_with_no_further_code() -> None:
    twice = replace(OPS["add"], name="twice")
    contract = with_op(twice)
    cases = small(contract=contract, ops=["twice"])
    assert [case.name for case in cases] == [f"twice-135M-M{m}-{m}x576" for m in (1, 8, 512)]

    class Backend(ReferenceBackend):
        def supports(self, signature: Any) -> Any:
            return super().supports(replace(signature, op="add"))

        def bind(self, call: Any) -> Any:
            return super().bind(replace(call, op="add"))

    placed = Stand(Backend(DeviceInfo("host")), contract).place(cases[0])
    assert placed.check() <= 1


def test_an_op_with_axes_that_no_model_has_is_timed_in_its_largest_case() -> None:
    params = tuple(replace(param, axes=("experts", "features")) for param in OPS["add"].params)
    (case,) = small(contract=with_op(replace(OPS["add"], name="route", params=params)), ops=["route"])
    assert case.signature.tensors["x"].shape == (2, 576)
    assert case.own_case is not None


# The check before the clock


class Wrong(ReferenceBackend):
    """Right but for what `spoil` does to the first written tensor after each launch of `op`."""

    op, launches = "gemm", 0

    def spoil(self, values: Any) -> None:
        values[-1] *= 1.5

    def supports(self, signature: Any) -> Any:
        return Unsupported(signature.op, "no rope here") if signature.op == "rope" else super().supports(signature)

    def bind(self, call: Any) -> Any:
        right = super().bind(call)
        written = next(p.name for p in OPS[call.op].params if p.is_written)

        def launch() -> None:
            right()
            if call.op == self.op:
                self.launches += 1
                self.spoil(call.tensors[written].buffer)

        return launch


def case_of(op: str, tokens: int = 8) -> BenchCase:
    """A case of `op` with few copies of its weights."""
    return replace(small(ops=[op], tokens=[tokens])[-1], reach=1 << 20)


@pytest.mark.parametrize("op", ["gemm", "attention", "glu", "rope_kv_append", "argmax"])
def test_a_wrong_kernel_is_not_timed(op: str) -> None:
    backend = Wrong(DeviceInfo("host"))
    backend.op = op
    if op == "argmax":
        backend.spoil = lambda values: values.__iadd__(1)  # type: ignore[method-assign]
    if op == "rope_kv_append":
        backend.spoil = lambda values: values.__imul__(1.01)  # type: ignore[method-assign]
    placed = Stand(backend).place(case_of(op, 1 if op == "argmax" else 8))
    with pytest.raises(WrongResult) as caught:
        placed.check()
    assert str(caught.value).startswith(f"numpy.{op}.f32 is wrong, not timed: ")
    assert " expected " in str(caught.value)
    assert backend.launches == 1


def test_what_is_not_written_or_not_finite_is_wrong() -> None:
    backend = Wrong(DeviceInfo("host"))
    case = case_of("gemm", 512)
    placed = Stand(backend).place(case)

    def unwritten(values: Any) -> None:  # as the guard left it
        values.view(np.uint32)[12345] = 0x7FC5A5A5

    def infinite(values: Any) -> None:
        values[576 * 3 + 5] = np.inf

    width = case.signature.tensors["y"].shape[1]
    row, column = divmod(576 * 3 + 5, width)
    for spoil, message in (
        (unwritten, f"1 of {512 * width} elements of y were not written"),
        (infinite, f"y[{row}, {column}] is not finite"),
    ):
        backend.spoil = spoil  # type: ignore[method-assign]
        with pytest.raises(WrongResult, match=r"^numpy\.gemm\.f32 is wrong, not timed: ") as caught:
            placed.check()
        assert message in str(caught.value)


def test_a_refusal_has_its_reason() -> None:
    with pytest.raises(Refused) as caught:
        Stand(Wrong(DeviceInfo("host"))).place(case_of("rope"))
    assert str(caught.value) == "reference refuses it: no rope here"


def test_right_kernels_pass_in_every_op() -> None:
    stand = Stand(open_backend("reference"))
    for op in OPS:
        case = case_of(op, 8 if op not in ("argmax", "sample", "softcap", "advance") else 1)
        assert 0 <= stand.place(case).check() <= 1, op


def test_launches_rotate_over_what_a_step_would_read() -> None:
    case = replace(case_of("gemm"), reach=10 << 20)
    nbytes = 576 * 1536 // 32 * 20
    placed = Stand(open_backend("reference")).place(case)
    assert len(placed.launches) == -(-(10 << 20) // nbytes)
    assert placed.streamed == len(placed.launches) * nbytes
    ran: list[int] = []
    placed.launches = [lambda i=i: ran.append(i) for i in range(7)]
    one_round, calls, rounds = placed.rounds(0.01)
    assert rounds >= 3
    ran.clear()
    one_round()
    assert len(ran) == calls
    assert calls % 7 == 0  # launches this short are repeated, each copy as often as any other
    assert sorted(set(ran)) == list(range(7))
    assert ran[:8] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_a_sample_has_both_ends() -> None:
    for length, count in ((5, 4), (1000, 4), (1000, 999)):
        indices = spread(length, count)
        assert len(set(indices)) == count
        assert (indices[0], indices[-1]) == (0, length - 1)


# Limits


def test_the_roofline_is_the_larger_of_two_times() -> None:
    roofline = Roofline(20.0, {"f32": 100.0, "int8": 400.0})
    assert roofline.least_seconds(Cost(20_000, 1000), "f32") == (1e-6, "read")
    assert roofline.least_seconds(Cost(20_000, 200_000), "f32") == (2e-6, "f32")
    assert roofline.least_seconds(Cost(20_000, 200_000), "int8") == (1e-6, "read")
    assert roofline.least_seconds(Cost(20_000, 800_000), "int8") == (2e-6, "int8")
    assert Roofline(20.0, {"f32": 100.0}).least_seconds(Cost(0, 800_000), "int8") == (8e-6, "f32")


def test_a_device_with_its_own_memory_is_measured_by_its_backend_or_not_at_all() -> None:
    gpu = ReferenceBackend(DeviceInfo("gpu", detail={"type": "gpu"}))
    meter = Meter(gpu)
    assert meter.measure() == 0
    assert meter.roofline() is None

    class Stating(ReferenceBackend):
        def peaks(self) -> dict[str, float]:
            return {"read": 900.0, "f32": 20e3, "int8": 200e3}

    stated = Meter(Stating(gpu.device)).roofline()
    assert stated == Roofline(900.0, {"f32": 20e3, "int8": 200e3})


# Documents


def row(name: str = "gemm-a", median_s: float | None = 1e-4, noise: float = 0.01, **changes: Any) -> Row:
    made = Row("b", "d", name, "gemm", "ffn_down", "135M", 1, 0, "576x1536 Q4_1", "gemm(…)")
    if median_s is not None:
        made.status, made.median_s, made.q1_s, made.q3_s = (
            "timed",
            median_s,
            median_s * (1 - noise),
            median_s * (1 + noise),
        )
        made.bytes, made.flops, made.bound, made.fraction = 500_000, 1_800_000, "read", 0.5
        made.gb_per_s, made.gop_per_s = made.bytes / median_s / 1e9, made.flops / median_s / 1e9
    return replace(made, **changes)


def document(path: Path, rows: Sequence[Row], read_gb_per_s: float = 20.0) -> Path:
    device = results.device_entry(
        "b", DeviceInfo("d", driver="1"), Roofline(read_gb_per_s, {"f32": 200.0}), [19.0, 21.0]
    )
    results.write(path, rows, [device], {"precision": "fast"})
    return path


def test_a_document_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [row(times=[1e-4, 1.1e-4]), row("gone", None, status="unsupported", reason="no kernel")]
    found = results.read(document(tmp_path / "new" / "a.json", rows))
    assert [results.rounded(asdict(row)) for row in rows] == [asdict(row) for row in found["rows"]]
    assert {"host", "versions", "commit", "date", "devices", "options"} <= found.keys()
    assert found["devices"][0]["read_gb_per_s"] == 20.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read {}: No such file or directory"),
        ("{", "{} is no JSON document: "),
        ("[]", '{} is no result of `pytest bench`: it has no `"what": "kernels"` and `rows`'),
        ('{"what": "kernels", "rows": [], "schema": 0}', "{} has schema 0, expected 1: run `pytest bench` again"),
        ('{"what": "kernels", "rows": [{"op": "gemm"}], "schema": 1}', "{} is damaged: "),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, message: str, capsys: Any) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    for main, arguments in ((compare.main, [str(path), str(path)]), (plots.main, [str(path)])):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"error: {message.format(path)}" in error


def test_times_have_three_digits() -> None:
    assert [duration(s) for s in (0.99e-6, 5.0321e-6, 48.61e-6, 123.4e-6, 1.5e-3, 2.0)] == [
        "0.99 µs", "5.03 µs", "48.6 µs", "123 µs", "1.50 ms", "2.00 s",
    ]  # fmt: skip


# compare


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0%", 0.0), (" 12.5 % ", 0.125)])
def test_thresholds(text: str, value: float) -> None:
    assert compare.threshold(text) == value


def test_bad_thresholds_are_usage(tmp_path: Path, capsys: Any) -> None:
    for text in ("five", "-5%", "2000%", ""):
        with pytest.raises(SystemExit) as caught:
            compare.main(["a", "b", f"--threshold={text}"])
        assert caught.value.code == 2
        assert f"threshold is {text!r}, expected a percentage such as 5% or 0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("new_s", "noise", "least", "verdict"),
    [
        (1.04e-4, 0.001, 0.05, "same"),
        (1.06e-4, 0.001, 0.05, "slower"),
        (1.06e-4, 0.001, 0.10, "same"),
        (1.20e-4, 0.15, 0.05, "same"),  # beyond the threshold, but not beyond the noise
        (0.97e-4, 0.001, 0.05, "same"),
        (0.94e-4, 0.001, 0.05, "faster"),
        (0.80e-4, 0.30, 0.05, "same"),
        (1.001e-4, 0.0001, 0.0, "slower"),
    ],
)
def test_verdicts(new_s: float, noise: float, least: float, verdict: str) -> None:
    (change,) = compare.compare([row(noise=noise)], [row(median_s=new_s, noise=noise)], least)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(new_s / 1e-4)


def test_cases_that_broke_or_came_or_went() -> None:
    failed, refused = row(median_s=None, status="failed", reason="wrong"), row(median_s=None, status="unsupported")
    for old, new, verdict in (
        ([row()], [failed], "broken"),
        ([row()], [refused], "broken"),
        ([refused], [failed], "broken"),
        ([failed], [row()], "fixed"),
        ([refused], [row()], "fixed"),
        ([refused], [refused], "same"),
        ([row()], [], "gone"),
        ([], [row()], "new"),
        ([row()], [row(signature="other")], "gone"),
    ):
        (change,) = compare.compare(old, new, 0.05)
        assert change.verdict == verdict, (old, new)


def test_exit_status_and_output(tmp_path: Path, capsys: Any) -> None:
    fast = document(tmp_path / "fast.json", [row(), row("gemm-b")])
    slow = document(tmp_path / "slow.json", [row(median_s=2e-4), row("gemm-b")], read_gb_per_s=15.0)
    assert compare.main([str(fast), str(slow)]) == 1
    text = capsys.readouterr().out
    assert "2 cases, threshold 5%: 1 slower, 1 same" in text
    assert "the machine itself reads 0.75 times as fast as then: so may every kernel" in text
    assert [line.split() for line in text.splitlines() if line.startswith("slower")] == [
        ["slower", "b", "gemm-a", "100", "µs", "200", "µs", "2.00"]
    ]
    assert "gemm-b" not in text
    assert compare.main([str(slow), str(fast)]) == 0
    assert compare.main([str(fast), str(slow), "--threshold", "120%"]) == 0
    capsys.readouterr()
    assert compare.main([str(fast), str(slow), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["threshold"]) == (False, 0.05)
    assert [(c["case"], c["verdict"], c["ratio"]) for c in found["changes"]] == [
        ("gemm-a", "slower", 2.0),
        ("gemm-b", "same", 1.0),
    ]


# plots


def test_pictures(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    rows = [row(), row("gemm-b", tokens=512, fraction=1.7), row("gemm-c", None, reason="wrong, not timed")]
    rows += [replace(r, model="8B") for r in rows]
    source = document(tmp_path / "kernels-x.json", rows)
    assert plots.main([str(source), "-o", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert sorted(Path(p).name for p in written) == sorted(
        f"kernels-x-{model}-{kind}.{suffix}"
        for model in ("135M", "8B") for kind in ("bars", "roofline") for suffix in ("png", "svg")
    )  # fmt: skip
    for path in map(Path, written):
        assert path.stat().st_size > 5000
    svg = (tmp_path / "out" / "kernels-x-135M-bars.svg").read_text()
    for text in ("Part of the roofline: b kernels in the shapes of the 135M model", results.read(source)["date"][:10]):
        assert text in svg
    assert "memory: 20.0 GB/s" in (tmp_path / "out" / "kernels-x-8B-roofline.svg").read_text()


# The command


def bench(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", "bench", "-p", "no:cacheprovider"]
    # pytest-benchmark times nothing where it believes to run beside others.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**alone, "PYTEST_ADDOPTS": "", **(env or {})},
    )  # fmt: skip


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    chosen = ("--backend", "reference", "--op", "add,glu", "--model", "135M", "--tokens", "1,8", "--budget", "0.01")
    ran = bench(*chosen, "--json", str(path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout
    for text in ("of roofline", "limits measured in this run: read ", f"results: {path}", "attn_output"):
        assert text in ran.stdout
    found = results.read(path)
    assert [(r.op, r.tokens, r.status) for r in found["rows"]] == [
        ("glu", 1, "timed"), ("add", 1, "timed"), ("glu", 8, "timed"), ("add", 8, "timed"),
    ]  # fmt: skip
    for r in found["rows"]:
        assert r.median_s
        assert r.fraction
        assert r.q1_s <= r.median_s <= r.q3_s
        assert len(r.times) >= 3
        assert r.bound == "read"
        assert r.error_ratio is not None
        assert r.error_ratio <= 1
    assert found["options"]["op"] == "add,glu"
    assert found["devices"][0]["peak_gop_per_s"]["f32"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "opncl"], "unknown backend 'opncl'; did you mean 'opencl'? known: cuda, "),
        (["--op", "gem"], "unknown op 'gem'; did you mean 'gemm'? known: "),
        (["--backend", "reference", "--device", "tpu"], "backend 'reference' is not available: "),
        (["--tokens", "1,many"], "--tokens is 'many', expected whole numbers from 1 to 1048576"),
        (["--tokens", "0"], "--tokens is '0', expected whole numbers from 1 to 1048576"),
        (["--op", ","], "--op is empty: leave it out, or name something"),
        (["--budget", "0"], "--budget is 0, expected seconds above 0"),
        (
            ["--op", "argmax", "--tokens", "512", "--backend", "reference"],
            "no case left: the models call none of these",
        ),
    ],
)
def test_wrong_options_are_usage(arguments: list[str], message: str) -> None:
    ran = bench(*arguments)
    assert ran.returncode == 4, ran.stdout + ran.stderr
    assert f"ERROR: {message}" in ran.stderr + ran.stdout
    assert "Traceback" not in ran.stderr + ran.stdout


PLUGIN = """
from dataclasses import asdict, replace
from polykern.backends.reference import ReferenceBackend, ReferenceProvider
from polykern.kernels.spi import DeviceInfo, Unsupported


class Wrong(ReferenceBackend):
    def supports(self, signature):
        return Unsupported("glu", "no glu yet") if signature.op == "glu" else super().supports(signature)

    def bind(self, call):
        right, x = super().bind(call), call.tensors["x"].buffer

        def launch():
            right()
            x[3] += 0.5

        return launch


class Provider(ReferenceProvider):
    def open(self, options):
        return Wrong(DeviceInfo("crooked"), name="wrong")


provider = Provider()
"""


def test_a_wrong_plug_in_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "wrong_plugin.py").write_text(PLUGIN)
    info = tmp_path / "wrong-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[polykern.backends]\nwrong = wrong_plugin:provider\n")
    path = tmp_path / "r.json"
    ran = bench(
        "--backend", "wrong", "--op", "add,glu", "--model", "135M", "--tokens", "1", "--json", str(path),
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 skipped" in ran.stdout
    assert "numpy.add.f32 is wrong, not timed: x[0, 3] is " in ran.stdout
    glu, add = results.read(path)["rows"]
    assert (glu.status, glu.reason) == ("unsupported", "wrong refuses it: no glu yet")
    assert (add.status, add.times, add.median_s) == ("failed", [], None)
