"""The kernels of hls/ in C simulation as a backend, for tests: contract calls become calls of a shared library.

`python hls_device.py LIBRARY [OP ...]` runs the suite on it and prints a JSON summary: a library under
AddressSanitizer can only be loaded by a process in which the sanitizer was loaded first.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hls_pack import channels_of, layout, up
from polykern.backends.checks import check_axes, check_call, check_signature, check_transfer
from polykern.backends.replay import launch_list
from polykern.kernels.errors import DeviceError
from polykern.kernels.glu import KINDS
from polykern.kernels.op import NUMPY_DTYPES, Numerics, Signature, TensorType
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import BoundCall, Buffer, DeviceInfo, DeviceTensor, Kernel, Launch, Unsupported

OPS = ("gemm", "attention", "dequantize", "rms_norm", "rope", "glu")
LANES, PARTIALS = 16, 8


class Memory:
    """Device memory of whole beats on a 64-byte boundary, from the allocator that a sanitizer watches."""

    def __init__(self, nbytes: int) -> None:
        libc = ctypes.CDLL(None)
        libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t, ctypes.c_size_t)
        libc.free.argtypes = (ctypes.c_void_p,)
        size = up(max(nbytes, 1), 64) * 64
        self.address: int = libc.aligned_alloc(64, size)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))[:nbytes]
        weakref.finalize(self, libc.free, self.address)


class HlsFormat(ctypes.Structure):
    """A row of FORMATS in engine.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("bits", "offset", "header", "group_length", "block_length"))


class HlsDevice:
    """A Backend whose device is the library at `path`. Weights are packed for its number of channels."""

    name, page_size = "hls", 16

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.csim_formats.restype = ctypes.POINTER(HlsFormat)
        self.channels = self.constant("channels")
        self.device = DeviceInfo(
            f"C simulation, {self.channels} channels, {self.constant('tokens')} tokens,"
            f" {self.constant('head_lanes')} head lanes"
        )
        self.formats = self.library.csim_formats()[: self.constant("format_count")]
        self.format_ids = {name: index for index, name in enumerate(FORMATS)}

    def constant(self, name: str) -> int:
        return getattr(self.library, f"csim_{name}")()

    def set_depth(self, fifo: str, depth: int) -> None:
        """Gives FIFOs of that name another depth (0: their own), as if engine.h said so."""
        self.library.csim_set_depth(fifo.encode(), depth)

    # -- what there is

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        op = check_signature(signature)
        if isinstance(op, Unsupported):
            return op
        if op.name not in OPS:
            return Unsupported(op.name, f"no HLS kernel for {op.name}; there are {', '.join(OPS)}")
        too_long = check_axes(op, signature, 2**24)
        answer: str | Kernel = getattr(self, f"_{op.name}_kernel")(signature)
        return too_long or (Unsupported(op.name, answer) if isinstance(answer, str) else answer)

    def _gemm_kernel(self, signature: Signature) -> str | Kernel:
        weight = signature.tensors["w"]
        name, in_features = weight.dtype, weight.shape[1]
        if in_features > self.constant("max_in_features"):
            return f"in_features {in_features} > {self.constant('max_in_features')}: x is held on chip"
        if signature.attrs["precision"] == "exact" or FORMATS[name].is_float:
            words = up(in_features, LANES)
            return Kernel("hls.gemm_float", Numerics("f32", up(words, PARTIALS) + 3 + 4))
        bits = self.formats[self.format_ids[name]].bits
        depth = up(layout(name, in_features)[0], PARTIALS) + 3 + (2 if bits == 4 else 1)
        return Kernel(f"hls.gemm_int{bits}", Numerics("f32", depth, "int8"))

    def _dequantize_kernel(self, signature: Signature) -> str | Kernel:
        return Kernel("hls.dequantize", Numerics())

    def _attention_kernel(self, signature: Signature) -> str | Kernel:
        tensors = signature.tensors
        head_dim, pages = tensors["q"].shape[2], tensors["k_pages"]
        if head_dim > self.constant("max_head_dim"):
            return f"head_dim {head_dim} > {self.constant('max_head_dim')}: a head's sums are held on chip"
        if tensors["v_pages"].dtype != pages.dtype:
            return f"keys in {pages.dtype} and values in {tensors['v_pages'].dtype}: a kernel is built for one of them"
        keys = tensors["block_table"].shape[1] * pages.shape[2]
        # a score: trees of 16 products and of the words of a key; a value: every fourth key, a rescaling per 16
        return Kernel(f"hls.attention_{pages.dtype}", Numerics("f32", max(8, up(keys, 4) + 4 + 2)))

    def _rms_norm_kernel(self, signature: Signature) -> str | Kernel:
        features = signature.tensors["x"].shape[1]
        if features > self.constant("max_norm_features"):
            return f"features {features} > {self.constant('max_norm_features')}: a row waits in a FIFO for its norm"
        return Kernel("hls.rms_norm", Numerics("f32", up(up(features, LANES), PARTIALS) + 4 + 3))

    def _rope_kernel(self, signature: Signature) -> str | Kernel:
        head_dim = signature.tensors["x"].shape[2]
        if head_dim > self.constant("max_head_dim"):
            return f"head_dim {head_dim} > {self.constant('max_head_dim')}: a head is turned on chip"
        return Kernel("hls.rope", Numerics())

    def _glu_kernel(self, signature: Signature) -> str | Kernel:
        return Kernel("hls.glu", Numerics())

    # -- memory

    def alloc(self, kind: TensorType) -> Buffer:
        return Memory(math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize)

    def write(self, buffer: Buffer, array: Array, offset: int = 0) -> None:
        check_transfer(buffer.bytes.size // array.itemsize, array.dtype, array.size, array.dtype, offset)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.bytes[offset * array.itemsize : offset * array.itemsize + flat.size] = flat

    def read(self, buffer: Buffer, kind: TensorType, offset: int = 0) -> Array:
        dtype = np.dtype(NUMPY_DTYPES[kind.dtype])
        count = math.prod(kind.shape)
        check_transfer(buffer.bytes.size // dtype.itemsize, dtype, count, dtype, offset)
        part = buffer.bytes[offset * dtype.itemsize : (offset + count) * dtype.itemsize]
        return part.copy().view(dtype).reshape(kind.shape)

    def pack(self, weight: Weight) -> Buffer:
        packed: list[Memory] = []
        for content in channels_of(weight, self.channels):
            packed.append(Memory(content.size))
            packed[-1].bytes[:] = content
        return packed

    # -- calls

    def bind(self, call: BoundCall) -> Launch:
        check_call(call)
        answer = self.supports(call.signature)
        assert isinstance(answer, Kernel), answer
        kernel = answer.name.removeprefix("hls.")
        function = getattr(self.library, f"csim_{kernel}")
        function.restype = ctypes.c_char_p
        arguments = getattr(self, f"_{call.op}_arguments")(call.tensors, call.attrs)

        def launch(call: BoundCall = call) -> None:  # keeps the buffers of the call
            error = function(*arguments)
            if error is not None:
                raise DeviceError(f"{kernel}: {error.decode()}")

        return launch

    def _weights(self, tensor: DeviceTensor) -> Any:
        return (ctypes.c_void_p * self.channels)(*(memory.address for memory in tensor.buffer))

    def _gemm_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        w, bias = tensors["w"], tensors.get("bias")
        return [
            self._weights(w), *_rows(tensors["x"]), _start(bias) if bias else ctypes.c_void_p(), int(bias is not None),
            _start(tensors["y"]), _i64(tensors["y"].row_stride), self.format_ids[w.dtype],
            tensors["x"].shape[0], w.shape[1], w.shape[0],
        ]  # fmt: skip

    def _dequantize_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        w = tensors["w"]
        return [self._weights(w), *_rows(tensors["y"]), self.format_ids[w.dtype], w.shape[1], w.shape[0]]

    def _attention_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        pages, table = tensors["k_pages"], tensors["block_table"]
        tokens, heads, head_dim = tensors["q"].shape
        scale = attrs["scale"] or head_dim**-0.5
        return [
            *_rows(tensors["q"]), *_rows(pages)[:2], *_rows(tensors["v_pages"])[:2],
            _start(table), _start(tensors["seq_ids"]), _start(tensors["positions"]), *_rows(tensors["y"]),
            ctypes.c_float(scale), ctypes.c_float(attrs["softcap"]), attrs["window"],
            tokens, heads, pages.shape[1], head_dim, pages.shape[2], pages.shape[0], *table.shape,
        ]  # fmt: skip

    def _rms_norm_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        numbers = [ctypes.c_float(attrs["eps"]), ctypes.c_float(attrs["weight_offset"])]
        x, y = tensors["x"], tensors["y"]
        return [*_rows(x), *_rows(tensors["weight"])[:2], *_rows(y), *numbers, *x.shape]

    def _rope_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        x, table = tensors["x"], tensors["cos_sin"]
        base, offset, stride = _rows(x)
        is_half = int(attrs["pairing"] == "half")
        angles = [_start(table), _i64(table.row_stride), _start(tensors["positions"])]
        return [base, base, offset, stride, *angles, is_half, *x.shape, table.shape[1], table.shape[0]]

    def _glu_arguments(self, tensors: Mapping[str, DeviceTensor], attrs: Mapping[str, Any]) -> list[Any]:
        gate = tensors["gate"]
        rows = [argument for name in ("gate", "up", "y") for argument in _rows(tensors[name])]
        return [*rows, KINDS.index(attrs["kind"]), *gate.shape]

    def capture(self, launches: Sequence[Launch]) -> Launch:
        return launch_list(launches)

    def prepare(self, signatures: Sequence[Signature]) -> None:
        """The library is compiled."""

    def synchronize(self) -> None:
        """Every launch has ended when it returns."""

    def close(self) -> None:
        """Buffers go with their last handle."""


def _i64(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _rows(tensor: DeviceTensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
    """A port that transfers beats: the buffer, and offset and row stride in numbers."""
    return ctypes.c_void_p(tensor.buffer.address), _i64(tensor.offset), _i64(tensor.row_stride)


def _start(tensor: DeviceTensor) -> ctypes.c_void_p:
    """A port that transfers single numbers: the address of the first."""
    itemsize = np.dtype(NUMPY_DTYPES[tensor.dtype]).itemsize
    return ctypes.c_void_p(tensor.buffer.address + tensor.offset * itemsize)


def main(arguments: list[str]) -> None:
    """Prints what the suite finds on each op: `summary`, and of failures and surviving mutants the text."""
    from polykern.kernels.conformance import run

    library, *ops = arguments
    found: dict[str, Any] = {}
    for op in ops or OPS:
        report = run(HlsDevice(Path(library)), ops=[op])
        problems = [*report.failures, *report.survivors, *report.missing]
        found[op] = {"summary": report.summary(), "problems": [str(problem) for problem in problems]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
