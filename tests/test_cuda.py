"""The cuda backend without a GPU: every op through Triton's interpreter, packed weights, specs without tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import gguf
import numpy as np
import pytest
from polykern.backends import open_backend
from polykern.backends.cuda import CudaBackend, formats, op_kernels
from polykern.backends.cuda.interpreter import TARGET, InterpretedDevice
from polykern.backends.cuda.launch import Launch, Pointer, Sketch, Target, sketch_of
from polykern.kernels.conformance import run
from polykern.kernels.op import Case, TensorType
from polykern.kernels.ops import OPS, case_signature, small_cases
from polykern.kernels.quant import FORMATS, Weight
from polykern.kernels.spi import BoundCall, DeviceInfo, DeviceTensor, Kernel
from polykern.kernels.testdata import random_weight

pytest.importorskip("triton", reason="Triton is not installed: pip install 'polykern[cuda]'")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[CudaBackend]:
    opened = open_backend("cuda", device="interpret")
    assert isinstance(opened, CudaBackend)
    yield opened
    opened.close()


# What kernels compute: races between programs, and arithmetic that only GPUs do, are for a machine that has one


def test_there_is_a_kernel_for_every_op() -> None:
    assert set(op_kernels()) == set(OPS)


@pytest.mark.parametrize("op", op_kernels())
def test_conforms(interpreter: CudaBackend, op: str) -> None:
    report = run(interpreter, ops=[op])
    summary = report.summary()
    assert report.ok, "\n".join(str(problem) for problem in [*report.failures, *report.survivors, *report.missing])
    assert summary["passed"] == len(OPS[op].cases)
    assert summary["killed"] == summary["mutants"] >= 3


@pytest.mark.parametrize("op", ["gemm", "attention", "argmax"])
def test_runs_alike_twice(interpreter: CudaBackend, op: str) -> None:
    """With what the run before left in scratch memory."""
    report = run(interpreter, ops=[op], profile="small")
    assert report.ok, "\n".join(map(str, report.failures))


def test_a_row_that_many_programs_share(interpreter: CudaBackend) -> None:
    """Ties far apart, each row's winner in another part; and the vocabulary of a large model, with its last token."""
    vocab = 262_144 + 3
    x = np.full((5, vocab), -1.0, np.float32)
    expected = [0, 4096, 100_003, 262_144, vocab - 1]
    for row, first in enumerate(expected):
        x[row, first:] = np.where(np.arange(vocab - first) % 1000 == 0, 7.0, np.nan)
        x[row, :first] = -np.inf
    for op in ("argmax", "sample"):
        inputs = {"x": x}
        if op == "sample":  # top_k 1 keeps ties: only the first is left of them
            inputs |= {
                "params": np.tile(np.array([0, 0, 1, 0], np.float32), (5, 1)),
                "rng": np.zeros((5, 2), np.uint32),
            }
        tensors = {name: placed(interpreter, value) for name, value in inputs.items()}
        ids = tensors["ids"] = DeviceTensor(interpreter.alloc(TensorType((5,), "i32")), (5,), "i32", 0, 1)
        interpreter.bind(BoundCall(op, tensors, {}))()
        assert interpreter.read(ids.buffer, ids.type).tolist() == expected


def placed(backend: CudaBackend, value: np.ndarray) -> DeviceTensor:
    dtype = {"float32": "f32", "float16": "f16", "int32": "i32", "uint32": "u32"}[value.dtype.name]
    buffer = backend.alloc(TensorType(value.shape, dtype))
    backend.write(buffer, value)
    return DeviceTensor(buffer, value.shape, dtype, 0, int(np.prod(value.shape[1:])))


# Packed weights


@pytest.mark.parametrize("rows", [1, 5, 123])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_what_gguf_says(
    interpreter: CudaBackend, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = max(96, 3 * FORMATS[name].block_length)
    weight = random_weight(np.random.default_rng(rows), name, rows, columns, "normal")
    monkeypatch.setattr(formats, "_PACKED_AT_ONCE", 3 * weight.data.shape[1])  # packed in pieces, the last a short one
    packed = interpreter.pack(weight)
    y = DeviceTensor(interpreter.alloc(TensorType((rows, columns), "f32")), (rows, columns), "f32", 0, columns)
    interpreter.bind(BoundCall("dequantize", {"w": DeviceTensor(packed, weight.shape, name), "y": y}, {}))()
    theirs = gguf.dequantize(weight.data, gguf.GGMLQuantizationType(FORMATS[name].gguf_type)).reshape(rows, columns)
    np.testing.assert_allclose(interpreter.read(y.buffer, y.type), theirs, rtol=3e-7, atol=3e-7 * np.abs(theirs).max())


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_take_hardly_more_than_the_file(name: str) -> None:
    weight = random_weight(np.random.default_rng(1), name, 64, 2048, "normal")
    assert weight.nbytes <= formats.pack(weight).nbytes <= 1.03 * weight.nbytes


# Specs: what is compiled before there are tensors is what tensors will ask for

TARGETS = (
    Target("cuda", "80", 108, 163 << 10),
    Target("cuda", "90", 132, 227 << 10),
    Target("hip", "gfx942", 304, 64 << 10),
    TARGET,
)


class StandIn(InterpretedDevice):
    """Memory of this process, for a target whose kernels it cannot run."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def bind(self, launch: Launch) -> Callable[[], None]:
        return lambda: pytest.fail(f"{launch.spec.label} was run")

    def fastest(self, key: object, candidates: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        return candidates[0]


def bound(backend: CudaBackend, op: str, case: Case, offset: int = 0) -> tuple[Launch, ...]:
    """The launches of a case with dense tensors, `offset` elements into their buffers."""
    inputs = OPS[op].make_inputs(case)
    tensors: dict[str, DeviceTensor] = {}
    for name, kind in case_signature(OPS[op], case).tensors.items():
        if isinstance(inputs.get(name), Weight):
            tensors[name] = DeviceTensor(backend.pack(inputs[name]), kind.shape, kind.dtype)
        else:
            buffer = backend.alloc(TensorType((int(np.prod(kind.shape)) + offset,), kind.dtype))
            tensors[name] = DeviceTensor(buffer, kind.shape, kind.dtype, offset, int(np.prod(kind.shape[1:])))
    return backend.bind(BoundCall(op, tensors, case.attrs)).launches


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("op", op_kernels())
def test_a_sketch_has_the_specs_of_a_call(op: str, target: Target) -> None:
    backend = CudaBackend(DeviceInfo("stand-in"), StandIn(target))
    for case in small_cases(OPS[op]):
        signature = case_signature(OPS[op], case)
        sketched = op_kernels()[op].bind(Sketch(target), sketch_of(signature))
        every = {x.spec for x in op_kernels()[op].bind(Sketch(target, every=True), sketch_of(signature))}
        launches = bound(backend, op, case)
        assert [x.spec for x in launches] == [x.spec for x in sketched]
        assert [x.grid for x in launches] == [x.grid for x in sketched]
        assert {x.spec for x in launches} <= every
        answer = backend.supports(signature)
        assert isinstance(answer, Kernel)
        assert answer.name in {f"cuda.{x.spec.label}" for x in launches}


def test_what_is_not_aligned_is_compiled_for_that() -> None:
    backend = CudaBackend(DeviceInfo("stand-in"), StandIn(TARGETS[1]))
    case = next(case for case in OPS["add"].cases if case.name == "2x576")
    aligned, loose = (dict(bound(backend, "add", case, offset)[0].spec.params) for offset in (0, 5))
    assert (aligned["x"], loose["x"]) == ("*fp32/16", "*fp32")


def test_scratch_memory_is_none_of_the_callers() -> None:
    """Kernels of a step run one after another: all share what lies between two launches of one call."""
    backend = CudaBackend(DeviceInfo("stand-in"), StandIn(TARGETS[1]))
    case = next(case for case in OPS["argmax"].cases if case.name == "1x49157")
    first, second = (bound(backend, "argmax", case)[0].arguments["values"] for _ in range(2))
    assert isinstance(first, Pointer)
    assert isinstance(second, Pointer)
    assert first.buffer is second.buffer
