"""WGSL kernels through wgpu, where there is an adapter: generated for browsers, judged like all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from polykern.backends.replay import launch_list
from polykern.backends.tvm.portable import emit, names, targets
from polykern.backends.tvm.portable.machine import MACHINES
from polykern.kernels.conformance import run
from polykern.kernels.op import NUMPY_DTYPES, Signature, TensorType
from polykern.kernels.quant import Array, Weight
from polykern.kernels.spi import BoundCall, DeviceInfo, Kernel, Launch, Unsupported

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")
wgpu: Any = pytest.importorskip("wgpu", reason="wgpu is not installed: pip install wgpu")

MACHINE = MACHINES["webgpu"]
WIDEST = 65535  # maxComputeWorkgroupsPerDimension


def _device() -> Any:
    for adapter in wgpu.gpu.enumerate_adapters_sync():
        if "shader-f16" in adapter.features:
            return adapter.request_device_sync(required_features=["shader-f16"])
    pytest.skip("no WebGPU adapter with shader-f16; a CPU has one with Debian's mesa-vulkan-drivers")


class WebGPUBackend:
    """As its manifest says: pointers are storage buffers, scalars one uniform buffer with packGridDimX at its end."""

    name, device, page_size = "webgpu", DeviceInfo("wgpu"), 16

    def __init__(self) -> None:
        self.gpu = _device()
        self.target = targets.parse("webgpu")
        self._loaded: dict[str, tuple[emit.Emitted, Any]] = {}

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        reason = emit.refusal(signature, MACHINE)
        if reason:
            return Unsupported(signature.op, reason)
        return Kernel(f"webgpu.{signature.op}", emit.numerics(signature, MACHINE))

    def alloc(self, kind: TensorType) -> Any:
        return self._buffer(math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize)

    def _buffer(self, nbytes: int) -> Any:
        use = wgpu.BufferUsage
        return self.gpu.create_buffer(size=max(4, -(-nbytes // 4) * 4), usage=use.STORAGE | use.COPY_SRC | use.COPY_DST)

    def write(self, buffer: Any, array: Array, offset: int = 0) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.gpu.queue.write_buffer(buffer, offset * array.itemsize, _padded(data, 4))

    def read(self, buffer: Any, kind: TensorType, offset: int = 0) -> Array:
        dtype = np.dtype(NUMPY_DTYPES[kind.dtype])
        nbytes = math.prod(kind.shape) * dtype.itemsize
        data = self.gpu.queue.read_buffer(buffer, offset * dtype.itemsize, -(-nbytes // 4) * 4)
        return np.frombuffer(data, np.uint8)[:nbytes].view(dtype).reshape(kind.shape).copy()

    def pack(self, weight: Weight) -> Any:
        buffer = self._buffer(weight.nbytes)
        self.write(buffer, weight.data.reshape(-1))
        return buffer

    def prepare(self, signatures: Sequence[Signature]) -> None:
        for signature in signatures:
            symbol = names.symbol(signature)
            if symbol not in self._loaded:
                emitted = emit.emit(signature, self.target, symbol)
                stage = {"module": self.gpu.create_shader_module(code=emitted.code.decode()), "entry_point": symbol}
                self._loaded[symbol] = emitted, self.gpu.create_compute_pipeline(layout="auto", compute=stage)

    def bind(self, call: BoundCall) -> Launch:
        self.prepare([call.signature])
        emitted, pipeline = self._loaded[names.symbol(call.signature)]
        buffers: list[Any] = []
        scalars: list[int] = []
        for parameter in emitted.parameters:
            if parameter.kind != "pointer":
                scalars.append(getattr(call.tensors[parameter.name], parameter.kind))
            elif parameter.role == "scratch":
                buffers.append(self._buffer(4 * math.prod(parameter.shape)))
            else:
                buffers.append(call.tensors[parameter.name].buffer)
        uniform = np.array([*scalars, emitted.grid - 1], np.int32).view(np.uint8)
        usage = wgpu.BufferUsage.UNIFORM
        buffers.append(self.gpu.create_buffer_with_data(data=_padded(uniform, 16), usage=usage))
        entries = [
            {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
            for i, buffer in enumerate(buffers)
        ]
        group = self.gpu.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        width = min(emitted.grid, WIDEST)

        def launch() -> None:
            encoder = self.gpu.create_command_encoder()
            one = encoder.begin_compute_pass()
            one.set_pipeline(pipeline)
            one.set_bind_group(0, group)
            one.dispatch_workgroups(width, 1, -(-emitted.grid // width))
            one.end()
            self.gpu.queue.submit([encoder.finish()])

        return launch

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def synchronize(self) -> None:
        """Reading a buffer waits."""

    def close(self) -> None:
        """Buffers go with their last handle."""


def _padded(data: Array, multiple: int) -> Array:
    return np.append(data, np.zeros(-len(data) % multiple, np.uint8))


@pytest.fixture(scope="module")
def backend() -> WebGPUBackend:
    return WebGPUBackend()


@pytest.mark.parametrize("op", sorted(emit.kernels()))
def test_conforms(backend: WebGPUBackend, op: str) -> None:
    report = run(backend, ops=[op], profile="small")
    assert not report.failures, "\n".join(map(str, report.failures))
    refused = {case.reason for case in report.cases if case.status == "unsupported"}
    assert refused == ({"9 buffers, webgpu has 8 at most"} if op == "rope_kv_append" else set())
