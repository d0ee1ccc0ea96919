"""What a kind of target makes of a kernel: threads or loops, how wide an index and a word of memory are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A kind of TVM target as the kernels see it.

    kind         TVM's name: llvm, c, opencl, cuda, rocm, metal, webgpu
    suffix       of the files that its code generator's output goes into
    lanes        work-items that share a row (threadIdx.x); 1: no threads at all, the same loops run one after another
    spread       partial sums of a product, side by side: a serial target's compiler makes vectors of them
    index        dtype of offsets, row strides and addresses
    word_bits    width of the words that packed weights are read in
    half         pages of float16 are float16 to the compiler; else 16-bit words, converted by integer arithmetic, which
                 needs no extension (OpenCL's cl_khr_fp16) and no library function (LLVM before F16C)
    sqrt         name of the function, or LLVM intrinsic
    as_float     name of the function that makes a float32 of its bits, as_bits of the reverse; "": TIR's reinterpret
    max_buffers  a kernel with more is taken apart
    loader       how a kernel is started, in a line, for the manifest
    """

    kind: str
    suffix: str
    lanes: int
    loader: str
    spread: int = 1
    index: str = "int64"
    word_bits: int = 16
    half: bool = False
    sqrt: str = "sqrt"
    as_float: str = ""
    as_bits: str = ""
    max_buffers: int = 31

    @property
    def is_serial(self) -> bool:
        return self.lanes == 1


# The manifest's `launch` of a serial target is a plain call. 16 partial sums fill an AVX-512 register, or two of AVX2.
_CALL = "call the symbol as a C function that returns nothing, pointers and scalars in the order of `arguments`"
_SET = "pointers and scalars in the order of `arguments`, then launch `grid` work-groups of `block` work-items"

MACHINES: Mapping[str, Machine] = {
    machine.kind: machine
    for machine in (
        Machine("llvm", ".o", 1, _CALL, spread=16, sqrt="llvm.sqrt"),
        Machine("c", ".c", 1, _CALL, spread=16, sqrt="sqrtf", as_float="polykern_as_float", as_bits="polykern_as_bits"),
        Machine(
            "opencl", ".cl", 32,
            f"clSetKernelArg: {_SET} (global size: grid x block)",
            as_float="as_float", as_bits="as_uint",
        ),
        Machine(
            "cuda", ".cu", 32, f"cuLaunchKernel: {_SET}",
            sqrt="sqrtf", as_float="__uint_as_float", as_bits="__float_as_uint",
        ),
        Machine(
            "rocm", ".o", 32,
            f"link with `ld.lld --no-undefined -shared`, then hipModuleLaunchKernel: {_SET}",
            sqrt="llvm.sqrt",
        ),
        # One buffer holds all scalars, each in 8 bytes (struct <symbol>_args_t of the source).
        Machine(
            "metal", ".metal", 32,
            "pointers are buffer(0).., scalars follow in one constant buffer (struct <symbol>_args_t), then dispatch"
            " `grid` threadgroups of `block` threads",
        ),
        # WGSL has neither 64-bit nor 16-bit integers, and 8 storage buffers by default (maxStorageBuffersPerShaderStage
        # of the WebGPU specification).
        Machine(
            "webgpu", ".wgsl", 32,
            "pointers are storage buffers binding(0).., scalars follow in one uniform buffer (struct PODArgs, at its"
            " end packGridDimX = grid - 1), then dispatch `grid` workgroups, folded into x and z where x exceeds 65535",
            index="int32", word_bits=32, half=True, max_buffers=8,
        ),
    )
}  # fmt: skip
