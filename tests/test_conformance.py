"""The suite: it passes what is right, and every way of being wrong that we could think of fails it with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from polykern.backends.null import NullBackend
from polykern.backends.reference import ReferenceBackend
from polykern.kernels.conformance import Report, run
from polykern.kernels.errors import UsageError
from polykern.kernels.host import strided
from polykern.kernels.op import Mutant, Numerics, Signature, TensorType
from polykern.kernels.ops import OPS, small_cases
from polykern.kernels.quant import Array
from polykern.kernels.spi import BoundCall, DeviceInfo, DeviceTensor, Kernel, Launch, Unsupported

HOST = DeviceInfo("host")


@dataclass
class Changed(ReferenceBackend):
    """The reference backend with something done to it: `after` every launch, to a call, or to its numerics."""

    after: Callable[[BoundCall], None] | None = None
    call: Callable[[BoundCall], BoundCall] | None = None
    numerics: Numerics | None = None
    refuses: Callable[[Signature], bool] = field(default=lambda signature: False)

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        if self.refuses(signature):
            return Unsupported(signature.op, "not in the mood")
        answer = super().supports(signature)
        return replace(answer, numerics=self.numerics) if self.numerics and isinstance(answer, Kernel) else answer

    def bind(self, call: BoundCall) -> Launch:
        launch = super().bind(self.call(call) if self.call else call)

        def both() -> None:
            launch()
            if self.after:
                self.after(call)

        return both


def with_tensor(call: BoundCall, name: str, **changes: Any) -> BoundCall:
    return replace(call, tensors={**call.tensors, name: replace(call.tensors[name], **changes)})


def view(t: DeviceTensor) -> Array:
    return strided(t.buffer, t.shape, t.offset, t.row_stride)


def last(t: DeviceTensor) -> int:
    """The element of the buffer that holds the tensor's last element."""
    return t.offset + (t.shape[0] - 1) * t.row_stride + int(np.prod(t.shape[1:])) - 1


def failure(report: Report, text: str) -> str:
    """The report must fail and say `text` about some case, on one line."""
    assert not report.ok
    reasons = [row.reason for row in report.failures]
    assert reasons
    assert not [reason for reason in reasons if "\n" in reason]
    found = [reason for reason in reasons if text in reason]
    assert found, reasons[:3]
    return found[0]


@pytest.mark.parametrize("op", OPS)
def test_reference_passes_and_mutants_die(op: str) -> None:
    report = run(ReferenceBackend(HOST), ops=[op])
    assert report.failures == []
    assert report.survivors == []
    assert report.ok
    cases, mutants = len(OPS[op].cases), len(OPS[op].mutants)
    counts = {"passed": cases, "failed": 0, "unsupported": 0, "mutants": mutants, "killed": mutants}
    assert report.summary() == counts
    assert mutants > 0
    assert all(row.ratio is not None and row.ratio <= 1 for row in report.cases)


def test_rows_are_json() -> None:
    report = run(Changed(HOST, refuses=lambda s: s.tensors["w"].dtype == "F16"), ops=["gemm"])
    rows = json.loads(json.dumps(report.rows(), allow_nan=False))
    assert len(rows) == len(OPS["gemm"].cases)
    assert all(set(row) == {"op", "case", "status", "ratio", "kernel", "reason"} for row in rows)
    f16 = next(row for row in rows if row["case"].startswith("F16"))
    assert f16 == {
        "op": "gemm",
        "case": f16["case"],
        "status": "unsupported",
        "ratio": None,
        "kernel": "",
        "reason": "not in the mood",
    }
    f32 = next(row for row in rows if row["case"].startswith("F32"))
    assert (f32["status"], f32["kernel"], f32["reason"]) == ("passed", "numpy.gemm.f32", "")


def test_small_profile() -> None:
    report = run(ReferenceBackend(HOST), profile="small")
    assert report.ok
    assert report.summary()["mutants"] == 0
    assert len(report.cases) == sum(len(small_cases(op)) for op in OPS.values())


def test_precision_chooses_cases() -> None:
    report = run(ReferenceBackend(HOST), ops=["gemm", "add"], precision="fast")
    names = [row.case for row in report.cases if row.op == "gemm"]
    assert names == [case.name for case in OPS["gemm"].cases if case.attrs["precision"] == "fast"]
    assert [row for row in report.cases if row.op == "add"]
    assert report.ok


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    run(ReferenceBackend(HOST), ops=["add", "argmax"], progress=lambda *args: seen.append(args))
    total = len(OPS["add"].cases) + len(OPS["argmax"].cases)
    assert [done for _, done, _ in seen] == list(range(1, total + 1))
    assert {(what, count) for what, _, count in seen} == {("add", total), ("argmax", total)}


def test_one_case_reproduced() -> None:
    report = run(ReferenceBackend(HOST), ops=["gemm"], case=OPS["gemm"].cases[3].name)
    assert [row.case for row in report.cases] == [OPS["gemm"].cases[3].name]
    assert report.mutants == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ops": ["gem"]}, "unknown op 'gem'; did you mean 'gemm'? known: gemm, attention, "),
        ({"ops": ["zzz"]}, "unknown op 'zzz'; known: gemm, attention, "),
        ({"profile": "tiny"}, "profile is 'tiny'; use full or small"),
        ({"ops": ["gemm"], "case": "no"}, "no case 'no' of gemm to run"),
        ({"ops": ["gemm"], "precision": "wild"}, "no case of gemm to run"),
    ],
)
def test_wrong_arguments(arguments: Mapping[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as error:
        run(ReferenceBackend(HOST), **arguments)
    assert str(error.value).startswith(text)


def test_a_backend_that_does_nothing_fails_everything() -> None:
    report = run(NullBackend(HOST), profile="small")
    summary = report.summary()
    assert (summary["passed"], summary["unsupported"]) == (0, 0)
    assert summary["failed"] == len(report.cases) > 100
    failure(report, "read() does not give back the bytes of write()")


def test_a_backend_that_refuses_everything_is_not_ok() -> None:
    report = run(Changed(HOST, refuses=lambda s: True))
    summary = report.summary()
    assert (summary["passed"], summary["failed"], summary["mutants"], summary["killed"]) == (0, 0, 0, 0)
    assert summary["unsupported"] == len(report.cases) > 0
    assert not report.ok
    assert not run(Changed(HOST, refuses=lambda s: True), ops=["add"]).ok


def test_refusing_optional_ops_is_ok_and_required_ones_is_not() -> None:
    report = run(Changed(HOST, refuses=lambda s: s.op == "add"), ops=["add", "argmax"])
    assert report.ok
    assert report.summary()["unsupported"] == len(OPS["add"].cases)
    assert {mutant.op for mutant in report.mutants} == {"argmax"}

    def wide_heads(signature: Signature) -> bool:
        return signature.tensors["q"].shape[2] > 128

    report = run(Changed(HOST, refuses=wide_heads), ops=["attention"])
    assert report.failures == []
    assert [row.case for row in report.missing] == ["head-dim-256"]
    assert not report.ok


# Ways to be wrong. Each is one line of a kernel somewhere.


def past_the_end(call: BoundCall) -> None:
    y = call.tensors["y"]
    y.buffer[last(y) + 1] = 0


def far_past_the_end(call: BoundCall) -> None:
    y = call.tensors["y"]
    y.buffer[last(y) + 33] = 0


def before_the_start(call: BoundCall) -> None:
    y = call.tensors["y"]
    y.buffer[y.offset - 1] = 0


def in_the_gap(call: BoundCall) -> None:
    y = call.tensors["y"]
    if y.shape[0] > 1 and y.row_stride > y.shape[1]:
        y.buffer[y.offset + y.shape[1]] = 0


def input_changed(call: BoundCall) -> None:
    view(call.tensors["x"])[-1, -1] += 1


def beside_the_input(call: BoundCall) -> None:
    x = call.tensors["x"]
    x.buffer[last(x) + 2] = 0


def last_unwritten(call: BoundCall) -> None:
    view(call.tensors["y"])[-1, -1] = np.nan


def infinite(call: BoundCall) -> None:
    view(call.tensors["y"])[0, 0] = np.inf


def one_off(call: BoundCall) -> None:
    y = view(call.tensors["y"])
    y[-1, 0] += 0.01 * np.abs(y).max() + 1


def one_ulp_off(call: BoundCall) -> None:
    y = view(call.tensors["y"])
    y[-1, -1] = np.nextafter(y[-1, -1], np.float32(np.inf))


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (past_the_end, "wrote out of bounds of y: 1 elements, the first 1 behind its end"),
        (far_past_the_end, "wrote out of bounds of y: 1 elements, the first 33 behind its end"),
        (before_the_start, "wrote out of bounds of y: 1 elements, the first 1 before its start"),
        (in_the_gap, "wrote out of bounds of y: 1 elements, the first in a gap between its rows (element "),
        (input_changed, "changed its input x at element "),
        (beside_the_input, "wrote out of bounds of x: 1 elements, the first 2 behind its end"),
        (last_unwritten, "] is nan, expected "),
        (infinite, "y[0, 0] is inf, expected "),
        (one_off, " elements are wrong"),
        (one_ulp_off, " within 0 (error "),
        (lambda call: 1 / 0, "the call raised ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_results_and_writes(after: Callable[[BoundCall], None], text: str) -> None:
    report = run(Changed(HOST, after=after), ops=["gemm"])
    reason = failure(report, text)
    row = next(row for row in report.failures if row.reason == reason)
    again = f"runtime conformance --backend reference --op gemm --case {row.case} (seed 1)"
    assert reason.endswith(f"; to reproduce: {again}")
    assert run(Changed(HOST, after=after), ops=["gemm"], case=row.case).failures == [row]
    assert report.survivors == []  # the mutants are judged whatever the backend does


def test_a_wrong_element_is_named_with_numbers() -> None:
    report = run(Changed(HOST, after=one_off), ops=["gemm"], case="F32-exact-3x48x32")
    (row,) = report.failures
    assert row.reason.startswith("y[2, 0] is ")
    assert "; 1 of 144 elements are wrong; to reproduce: " in row.reason
    assert row.ratio is not None
    assert row.ratio > 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda call: with_tensor(call, "y", offset=0), "wrote out of bounds of y"),
        (lambda call: with_tensor(call, "x", offset=0), "elements are wrong"),
        (lambda call: with_tensor(call, "x", row_stride=0), "elements are wrong"),
        (lambda call: with_tensor(call, "y", row_stride=0), "wrote out of bounds of y"),
        (lambda call: with_tensor(call, "x", offset=call.tensors["x"].offset + 1), "elements are wrong"),
    ],
)
def test_views_taken_wrongly(change: Callable[[BoundCall], BoundCall], text: str) -> None:
    failure(run(Changed(HOST, call=change), ops=["gemm"]), text)


def test_half_of_the_cases_have_strided_rows() -> None:
    strides: list[bool] = []

    def note(call: BoundCall) -> None:
        y = call.tensors["y"]
        assert y.offset > 0
        strides.append(y.row_stride > y.shape[1])

    run(Changed(HOST, after=note), ops=["gemm"])
    assert 0.4 < np.mean(strides) < 0.6


@pytest.mark.parametrize(
    ("numerics", "text"),
    [
        (Numerics("f64", 1), "elements are wrong"),
        (
            Numerics("f32", 1 << 24),
            "numpy.gemm.f32 declares numerics that bound nothing: depth 16777216 in f32: the error bound is void",
        ),
    ],
)
def test_numerics_are_held_against_the_kernel(numerics: Numerics, text: str) -> None:
    failure(run(Changed(HOST, numerics=numerics), ops=["gemm", "rms_norm"]), text)


def test_declaring_wide_errors_lets_mutants_live() -> None:
    """Integer cases still kill what they can reach; what only noise tells apart survives, and that is not ok."""
    report = run(Changed(HOST, numerics=Numerics("f32", 1 << 23, "f32", 1e6)), ops=["rms_norm", "glu"])
    assert report.failures == []
    assert report.survivors
    assert not report.ok


@pytest.mark.parametrize("method", ["supports", "alloc", "write", "read", "pack", "bind", "capture", "synchronize"])
def test_methods_that_raise_fail_cases(method: str) -> None:
    backend = ReferenceBackend(HOST)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("device\nlost")

    setattr(backend, method, broken)
    report = run(backend, ops=["gemm"])
    assert report.summary()["failed"] == len(OPS["gemm"].cases)
    failure(report, "raised OSError: device lost")


def test_prepare_that_raises_is_a_failure() -> None:
    backend = ReferenceBackend(HOST)
    backend.prepare = lambda signatures: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    report = run(backend, ops=["add"])
    assert [(row.case, row.reason) for row in report.failures] == [
        ("prepare", "prepare() raised ZeroDivisionError: division by zero")
    ]
    assert not report.ok


def test_supports_that_answers_nonsense_is_a_failure() -> None:
    backend = ReferenceBackend(HOST)
    backend.supports = lambda signature: None  # type: ignore[method-assign,assignment,return-value]
    failure(run(backend, ops=["add"]), "supports() returned NoneType, expected Kernel or Unsupported")


def test_interrupt_passes_through() -> None:
    backend = ReferenceBackend(HOST)

    def interrupt(call: BoundCall) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Changed(HOST, after=interrupt), ops=["add"])
    backend.supports = interrupt  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        run(backend, ops=["add"])


def test_read_of_another_type() -> None:
    @dataclass
    class Widening(ReferenceBackend):
        def read(self, buffer: Any, kind: TensorType, offset: int = 0) -> Array:
            return super().read(buffer, kind, offset).astype(np.float64)

    failure(run(Widening(HOST), ops=["gemm"]), "raised ContractError: read() of f32[")


def test_small_profile_finds_results_that_differ_from_run_to_run() -> None:
    runs = 0

    def flicker(call: BoundCall) -> None:
        nonlocal runs
        runs += 1
        y = view(call.tensors["y"])
        if runs % 2 == 0 and np.abs(y).min() > 0.01:
            y += np.spacing(y)

    report = run(Changed(HOST, after=flicker), ops=["gemm"], profile="small")
    failure(report, "y differs between two runs on the same inputs")


def test_a_launch_that_keeps_its_first_result_fails_the_second_run() -> None:
    @dataclass
    class Once(ReferenceBackend):
        def bind(self, call: BoundCall) -> Launch:
            launch, done = super().bind(call), []
            return lambda: None if done else (done.append(1), launch())[1]

    failure(run(Once(HOST), ops=["gemm"], profile="small"), "y differs between two runs on the same inputs")


# The judge of mutants


def test_a_mutant_that_is_right_survives() -> None:
    add = OPS["add"]
    wide = Mutant("wide", lambda inputs, attrs: {"x": add.reference(inputs, attrs)["x"].astype(np.float64)})
    raising = Mutant("raising", lambda inputs, attrs: {"x": 1 / 0})  # type: ignore[dict-item]
    op = replace(add, mutants=(Mutant("right", add.reference), wide, raising, *add.mutants))
    report = run(ReferenceBackend(HOST), ops=[op])
    assert [mutant.mutant for mutant in report.survivors] == ["right", "wide", "raising"]
    assert report.summary()["mutants"] - report.summary()["killed"] == 3
    assert report.failures == []
    assert not report.ok


def test_a_case_list_that_is_too_short_lets_mutants_live() -> None:
    gemm = OPS["gemm"]
    op = replace(gemm, cases=tuple(case for case in gemm.cases if not case.dims.get("bias")))
    report = run(ReferenceBackend(HOST), ops=[op])
    assert "bias_ignored" in {mutant.mutant for mutant in report.survivors}
    assert not report.ok


def test_mutants_count_only_against_supported_cases() -> None:
    """One that is wrong only where a backend refuses judges nothing; one that is wrong elsewhere is still held to."""
    report = run(Changed(HOST, refuses=lambda s: "bias" in s.tensors), ops=["gemm"])
    assert [mutant.mutant for mutant in report.hidden] == ["bias_ignored"]
    assert report.survivors == []
    assert report.summary()["mutants"] - report.summary()["killed"] == 1
    loose = Numerics("f32", 1 << 23)
    report = run(Changed(HOST, numerics=loose, refuses=lambda s: s.tensors["w"].dtype != "F32"), ops=["gemm"])
    assert [mutant.mutant for mutant in report.survivors] == ["bias_ignored"]
    assert "w_min_dropped" in {mutant.mutant for mutant in report.hidden}


def test_part_of_an_optional_op_is_no_worse_than_none_of_it() -> None:
    assert run(Changed(HOST, refuses=lambda s: s.tensors["w"].dtype != "F32"), ops=["gemm_add"]).ok


def test_an_op_with_its_own_check() -> None:
    def check(inputs: Any, attrs: Any, expected: Any, got: Any, numerics: Any) -> str | None:
        assert expected["x"].dtype == np.float64
        assert got["x"].dtype == np.float32
        return "too large" if np.abs(got["x"]).max() > 2 else None

    op = replace(OPS["add"], check=check, mutants=())
    report = run(ReferenceBackend(HOST), ops=[op])
    failure(report, "too large; to reproduce: ")
