"""backends/cuda/gpu.py against a stand-in for CuPy (no GPU can be had): arguments, replay, errors, devices."""

from __future__ import annotations

import inspect
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cupy_stand_in import StandIn, StandInCompiler
from polykern.backends.cuda import gpu, provider, tuning
from polykern.backends.cuda.interpreter import HostBuffer, InterpretedDevice
from polykern.backends.cuda.launch import Launch, Pointer, launch
from polykern.kernels.errors import BackendUnavailable, DeviceError, DoesNotFit
from polykern.kernels.op import TensorType
from polykern.kernels.quant import Weight
from polykern.kernels.spi import BoundCall, DeviceInfo, DeviceTensor, OpenOptions

pytest.importorskip("triton", reason="needs Triton's interpreter: pip install 'polykern[cuda]'")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    use(module, monkeypatch)
    return module


def use(module: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", module)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    monkeypatch.setattr(gpu, "Compiler", StandInCompiler)


def embedding(backend: Any, ids: np.ndarray[Any, Any], table: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """A bound embedding, its buffer of ids, and its output's buffer."""
    weight = backend.pack(Weight.from_array(table))
    given, out = (
        backend.alloc(TensorType(ids.shape, "i32")),
        backend.alloc(TensorType((len(ids), table.shape[1]), "f32")),
    )
    backend.write(given, ids)
    tensors = {
        "token_ids": DeviceTensor(given, ids.shape, "i32", 0, 1),
        "w": DeviceTensor(weight, table.shape, "F32"),
        "y": DeviceTensor(out, (len(ids), table.shape[1]), "f32", 0, table.shape[1]),
    }
    return backend.bind(BoundCall("embedding", tensors, {"scale": 2.0})), given, out


def test_a_replay_takes_no_new_arguments(stand_in: StandIn) -> None:
    backend = provider.open(OpenOptions())
    table = np.random.default_rng(5).standard_normal((123, 40), np.float32)
    launch, given, out = embedding(backend, np.array([5, 122, -1], np.int32), table)
    replay = backend.capture([launch])
    assert stand_in.launched == []  # recording runs nothing
    for ids in ([5, 122, -1], [0, 7, 7], [123, 1, 2]):
        backend.write(given, np.array(ids, np.int32))
        replay()
        backend.synchronize()
        known = [0 <= i < 123 for i in ids]
        expected = np.where(np.array(known)[:, None], table[np.where(known, ids, 0)] * 2, 0)
        np.testing.assert_array_equal(backend.read(out, TensorType((3, 40), "f32")), expected)
    assert stand_in.launched == []  # nor does a replay go through single launches
    launch()
    assert stand_in.launched == ["rows_of_weight"]
    backend.close()


def test_devices_say_what_they_are(stand_in: StandIn) -> None:
    (info,) = provider.devices()
    assert info.name == "Stand-in GPU"
    assert info.detail["compute_capability"] == "9.0"
    assert provider.open(OpenOptions("stand-in")).device.name == "Stand-in GPU"
    assert provider.open(OpenOptions("0")).target.name == "cuda:90"
    with pytest.raises(BackendUnavailable, match=r"no GPU '1': there is 0 \(Stand-in GPU\), and `interpret`"):
        provider.open(OpenOptions("1"))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(StandIn(capability=(7, 0)), monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"Stand-in GPU has compute capability 7.0; kernels need 7.5 or more"):
        provider.open(OpenOptions())
    use(StandIn(capability=(7, 5)), monkeypatch)
    assert provider.open(OpenOptions()).target.name == "cuda:75"


def test_an_old_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(StandIn(driver=11080), monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"supports CUDA 11.8, CuPy .* was built for 12.9: update the driver"):
        provider.open(OpenOptions())
    use(StandIn(driver=0), monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"the NVIDIA driver does not answer"):
        provider.open(OpenOptions())


def test_out_of_memory_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    use(StandIn(free=1000), monkeypatch)
    backend = provider.open(OpenOptions())
    backend.alloc(TensorType((250,), "f32"))
    with pytest.raises(
        DoesNotFit,
        match=r"^Stand-in GPU is out of memory: f32\[5\] needs 20 bytes, 0 of 1000 are free; take a smaller --ctx or",
    ):
        backend.alloc(TensorType((5,), "f32"))


def test_a_lost_gpu_says_so(stand_in: StandIn) -> None:
    backend = provider.open(OpenOptions())
    buffer = backend.alloc(TensorType((5,), "f32"))
    stand_in.fail = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    with pytest.raises(
        DeviceError, match=r"^Stand-in GPU: writing a buffer: CUDA_ERROR_ILLEGAL_ADDRESS: .*the GPU is lost"
    ):
        backend.write(buffer, np.ones(5, np.float32))
    stand_in.fail = "CUDA_ERROR_INVALID_VALUE: invalid argument"
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_INVALID_VALUE: invalid argument$"):
        backend.write(buffer, np.ones(5, np.float32))


def test_a_launch_that_fails_is_one_line(stand_in: StandIn) -> None:
    backend = provider.open(OpenOptions())
    run, _, _ = embedding(backend, np.array([5], np.int32), np.ones((7, 40), np.float32))
    stand_in.fail = "CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"
    with pytest.raises(DeviceError, match=r"^Stand-in GPU: running rows_of_weight.*: CUDA_ERROR_ECC.*the GPU is lost"):
        run()


def test_a_kernels_shared_memory_only_grows(stand_in: StandIn) -> None:
    """Its limit belongs to the function, which a large and a small launch share."""
    _, hardware = gpu.open_device(None)
    x, y = (Pointer(hardware.alloc(4096, "x"), 0, "fp32") for _ in range(2))

    def one(shared: int) -> Launch:
        arguments = {"x": x, "x_stride": 64, "y": y, "y_stride": 64, "rows": 5, "columns": 7}
        return launch("pointwise", "add", (1, 1), arguments, {"BLOCK_R": 8, "BLOCK_C": 8}, shared=shared)

    hardware.load([one(0)])
    runs = [hardware.bind(one(shared)) for shared in (48 << 10, 100 << 10, 60 << 10, (48 << 10) + 1)]
    assert list(stand_in.shared_limits.values()) == [100 << 10]
    for run in runs:
        run()
    assert stand_in.launched == ["add"] * 4
    with pytest.raises(DeviceError, match=r"asking for 300000 bytes of shared memory for add.*INVALID_VALUE"):
        hardware.bind(one(300_000))


def test_without_a_driver_the_reason_is_precise() -> None:
    if find_library("cuda"):
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(BackendUnavailable, match=r"^no NVIDIA driver found \(libcuda.so.1\): .*`--device interpret`"):
        provider.open(OpenOptions())


def test_the_stand_in_has_cupys_names() -> None:
    cupy = pytest.importorskip("cupy", reason="compares the stand-in with the installed CuPy")
    module = StandIn()
    for path in ("", "memory", "function", "driver", "runtime"):
        ours = getattr(module.cuda, path) if path else module.cuda
        theirs = getattr(cupy.cuda, path) if path else cupy.cuda
        for name in vars(ours):
            assert hasattr(theirs, name), f"CuPy has no cuda.{path}.{name}"
    assert inspect.isclass(cupy.cuda.Graph)
    for name in ("launch", "upload"):
        assert hasattr(cupy.cuda.Graph, name)
    for name in ("begin_capture", "end_capture", "synchronize"):
        assert hasattr(cupy.cuda.Stream, name)
    for name in ("memsetAsync", "getDeviceCount"):
        assert hasattr(cupy.cuda.runtime, name)
    assert hasattr(cupy.cuda, "get_elapsed_time")


class Timed(InterpretedDevice):
    """Hardware on which the kernel with most warps is the fastest; copies are counted."""

    def __init__(self) -> None:
        self.timed: list[int] = []
        self._bound: list[Launch] = []
        self.copies, self.room = 0, 100

    def copy(self, buffer: Any) -> Any:
        self.copies += 1
        if self.copies > self.room:
            raise DoesNotFit("the GPU is full")
        return HostBuffer(buffer.nbytes)

    def bind(self, launch: Launch) -> Any:
        self._bound.append(launch)
        return lambda: None

    def time(self, run: Any, repeats: int = 5) -> float:
        self.timed.append(self._bound[-1].spec.warps)
        return 1.0 / self.timed[-1]


def test_the_fastest_kernel_is_found_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path))
    buffer = HostBuffer(64)
    ways = [
        [
            launch(
                "rows",
                "rows_of_weight",
                (1,),
                {"x": Pointer(buffer, 0, "fp32"), "y": Pointer(buffer, 16, "fp32")},
                warps=n,
            )
        ]
        for n in (1, 8, 4)
    ]
    hardware, info = Timed(), DeviceInfo("GPU A", "", "CUDA 12.9")
    assert tuning.fastest(hardware, info, ("gemm", 5, 123), ways) is ways[1]
    assert hardware.timed == [1, 8, 4]
    assert hardware.copies == 3  # of the one buffer, for each way: what a launch writes is not what the call has
    assert tuning.fastest(hardware, info, ("gemm", 5, 123), ways) is ways[1]
    assert hardware.timed == [1, 8, 4]
    for other in (DeviceInfo("GPU B", "", "CUDA 12.9"), DeviceInfo("GPU A", "", "CUDA 13.0")):
        tuning.fastest(hardware, other, ("gemm", 5, 123), ways)
    tuning.fastest(hardware, info, ("gemm", 5, 124), ways)
    tuning.fastest(hardware, info, ("gemm", 5, 123), ways[:2])
    assert hardware.timed == [1, 8, 4] * 4 + [1, 8]


def test_a_full_gpu_times_nothing_and_remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path))
    buffer, hardware, info = HostBuffer(64), Timed(), DeviceInfo("GPU A", "", "CUDA 12.9")
    x = {"x": Pointer(buffer, 0, "fp32"), "y": Pointer(buffer, 16, "fp32")}
    ways = [[launch("rows", "rows_of_weight", (1,), x, warps=n)] for n in (1, 8)]
    hardware.room = 1
    assert tuning.fastest(hardware, info, ("gemm", 1), ways) is ways[0]
    hardware.room = 100
    assert tuning.fastest(hardware, info, ("gemm", 1), ways) is ways[1]
