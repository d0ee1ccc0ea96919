"""Calls that an OpenCL device must not be given, and numbers that must not come out of it looking right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from polykern.backends.opencl import LONGEST_AXIS, provider
from polykern.kernels.errors import BackendUnavailable, ContractError
from polykern.kernels.host import dense_stride
from polykern.kernels.op import Signature, TensorType, type_of
from polykern.kernels.quant import FORMATS, Array
from polykern.kernels.spi import Backend, BoundCall, DeviceTensor, OpenOptions, Unsupported
from polykern.kernels.testdata import random_weight


@pytest.fixture(scope="module", params=["intel", "pocl"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        opened = provider.open(OpenOptions(device=request.param))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def on(backend: Backend, array: Array) -> DeviceTensor:
    kind = type_of(array)
    buffer = backend.alloc(kind)
    backend.write(buffer, array)
    return DeviceTensor(buffer, kind.shape, kind.dtype, 0, dense_stride(kind.shape))


def gemm(backend: Backend, x: Array, name: str, precision: str) -> Array:
    """y [T, 35] of x [T, K] and a random weight."""
    weight = random_weight(np.random.default_rng(5), name, 35, x.shape[1], "normal")
    packed = DeviceTensor(backend.pack(weight), weight.shape, name)
    y = on(backend, np.zeros((len(x), 35), np.float32))
    tensors = {"x": on(backend, x), "w": packed, "y": y}
    backend.bind(BoundCall("gemm", tensors, {"precision": precision}))()
    return backend.read(y.buffer, y.type)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if not fmt.is_float])
def test_an_infinite_activation_gives_no_finite_number(backend: Backend, name: str) -> None:
    x = np.random.default_rng(3).standard_normal((2, 256), dtype=np.float32)
    x[0, 77] = np.inf
    y = gemm(backend, x, name, "fast")
    assert not np.isfinite(y[0]).any()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36, 1e-33, 1e35])
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K"])
def test_integers_of_tiny_and_huge_activations(backend: Backend, name: str, size: float) -> None:
    """The reciprocal of their scale is no float32, or they would overflow with an integer's range multiplied in."""
    x = np.random.default_rng(4).standard_normal((1, 256)).astype(np.float32)
    near = gemm(backend, x * np.float32(size), name, "fast")
    expected = gemm(backend, x, name, "fast").astype(np.float64) * size
    np.testing.assert_allclose(near, expected, rtol=0.02, atol=0.02 * np.abs(expected).max() + 1e-30)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_weights_unpacked_in_slices(backend: Backend, name: str, precision: str) -> None:
    """More columns than fit a work-group's local memory: sums wait between slices."""
    x = np.random.default_rng(6).standard_normal((13, 2304), dtype=np.float32)
    weight = random_weight(np.random.default_rng(5), name, 35, x.shape[1], "normal")
    expected = x @ weight.dense().T
    np.testing.assert_allclose(gemm(backend, x, name, precision), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("change", [{"offset": 1}, {"offset": -1}, {"row_stride": 65}, {"row_stride": 63}])
def test_a_view_that_leaves_its_buffer_is_refused(backend: Backend, change: dict[str, int]) -> None:
    x, y = (on(backend, np.ones((3, 64), np.float32)) for _ in "xy")
    placed: dict[str, Any] = {**vars(x), **change}
    with pytest.raises(ContractError) as error:
        backend.bind(BoundCall("add", {"x": DeviceTensor(**placed), "y": y}, {}, "blk.0"))
    place = f"at {placed['offset']}, row stride {placed['row_stride']}"
    assert str(error.value) == f"blk.0: x f32[3, 64] {place}, does not fit a buffer of 768 bytes"


def test_a_weight_that_is_too_short_is_refused(backend: Backend) -> None:
    x, y = (on(backend, np.ones(shape, np.float32)) for shape in ((1, 64), (1, 33)))
    short = random_weight(np.random.default_rng(0), "Q4_0", 32, 64, "normal")
    tensors = {"x": x, "w": DeviceTensor(backend.pack(short), (33, 64), "Q4_0"), "y": y}
    with pytest.raises(ContractError, match=r"w Q4_0\[33, 64\] .* does not fit a buffer of 1152 bytes"):
        backend.bind(BoundCall("gemm", tensors, {}))


def test_an_axis_beyond_32_bits_is_unsupported(backend: Backend) -> None:
    def answer(vocab: int) -> Any:
        tensors = {"x": TensorType((1, vocab), "f32"), "ids": TensorType((1,), "i32")}
        return backend.supports(Signature("argmax", tensors, {}))

    assert not isinstance(answer(LONGEST_AXIS), Unsupported)
    reason = f"vocab {LONGEST_AXIS + 1} > {LONGEST_AXIS}: kernels count in 32 bits"
    assert answer(LONGEST_AXIS + 1) == Unsupported("argmax", reason)
