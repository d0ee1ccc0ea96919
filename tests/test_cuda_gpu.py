"""backends/cuda/gpu.py against a stand-in for CuPy (no GPU can be had): arguments, replay, errors, devices."""

from __future__ import annotations

import inspect
import sys
from ctypes.util import find_library
from typing import Any

import numpy as np
import pytest
from cupy_stand_in import StandIn, StandInCompiler
from polykern.backends.cuda import gpu, provider
from polykern.kernels.errors import BackendUnavailable, DeviceError
from polykern.kernels.op import TensorType
from polykern.kernels.quant import Weight
from polykern.kernels.spi import BoundCall, DeviceTensor, OpenOptions

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
        DeviceError,
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
