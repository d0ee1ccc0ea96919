"""TVM at work: kernels and the driver that runs them, compiled to object files.

The driver is one TVM function `run(tape, count, workers)`. The tape is an array of pairs (number of the kernel,
address of its arguments); its threads are started once, run every kernel of the tape, and meet at a barrier between
two. So a decode step is one call from Python and one parallel region: 2.2 ms, where a call for each op takes 4.8 (2
threads, SmolLM2-135M, bench/results/step-tvm.json).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .emit import Emitter
from .target import HostTarget

ENTRY = "run"
_C_CALL = 2  # tvm's CallingConv::kDeviceKernelLaunch: on a CPU target, a function with plain C arguments


def tvm_target(target: HostTarget) -> Any:
    import tvm

    fields: dict[str, Any] = {"kind": "llvm", "mcpu": target.mcpu}
    if target.machine != "x86_64":
        fields["mtriple"] = f"{target.machine}-unknown-linux-gnu"
    if target.features:
        fields["mattr"] = list(target.features)
    return tvm.target.Target(fields)


def lower(emit: Callable[..., None], options: Mapping[str, Any], symbol: str, target: HostTarget) -> Any:
    """The runtime module of one kernel."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder

    with IRBuilder() as written, builder.prim_func(s_tir=True):
        builder.func_name(symbol)
        builder.func_attr({"global_symbol": symbol, "calling_conv": _C_CALL})
        emit(Emitter(target, builder), **options)
    return compile_module(written.get(), target)


def compile_module(function: Any, target: HostTarget) -> Any:
    """TVM's lowering without its simplifier: that puts every named value back where it is used, so that a sum over
    lanes, each step of which uses the one before twice, grows without end. LLVM simplifies what is left.
    """
    import tvm
    from tvm.tirx import transform
    from tvm.tirx.build import codegen_build

    into = tvm_target(target)
    passes = [
        transform.BindTarget(into.with_host(into)),
        transform.FlattenBuffer(),
        transform.AnnotateEntryFunc(),
        transform.SplitHostDevice(),
        transform.MakePackedAPI(),
        transform.LowerTVMBuiltin(),
        transform.LowerIntrin(),
    ]
    return codegen_build(tvm.transform.Sequential(passes)(tvm.IRModule.from_expr(function)), into)


def build_kernel(emit: Callable[..., None], options: Mapping[str, Any], symbol: str, target: HostTarget) -> bytes:
    return _object(lower(emit, options, symbol, target))


def build_driver(symbols: Sequence[str], target: HostTarget) -> bytes:
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder

    T: Any = builder

    def choose(number: Any, arguments: Any, worker: Any, workers: Any, first: int = 0) -> None:
        call = T.call_extern("void", symbols[first], arguments, worker, workers)
        if first + 1 == len(symbols):
            T.evaluate(call)
            return
        with T.If(number == T.int64(first)):
            with T.Then():
                T.evaluate(call)
            with T.Else():
                choose(number, arguments, worker, workers, first + 1)

    with IRBuilder() as written, T.prim_func(s_tir=True):
        T.func_name(ENTRY)
        T.func_attr({"global_symbol": ENTRY})
        address = T.arg("tape", T.handle())
        count = T.arg("count", T.int32())
        workers = T.arg("workers", T.int32())
        pointer = T.handle("int64")
        T.Bind(T.reinterpret(pointer.ty, address), var=pointer)
        tape = T.decl_buffer((1 << 40,), "int64", data=pointer)
        barrier = T.attr("default", "pragma_parallel_barrier_when_finish", 1)
        start = T.attr("default", "pragma_parallel_launch_point", 1)
        with start, T.serial(0, count) as i, barrier, T.parallel(0, workers) as worker:
            choose(tape[2 * i], T.reinterpret(pointer.ty, tape[2 * i + 1]), worker, workers)
    return _object(compile_module(written.get(), target))


def _object(module: Any) -> bytes:
    handle, path = tempfile.mkstemp(suffix=".o")
    os.close(handle)
    try:
        module.write_to_file(path)
        with open(path, "rb") as file:
            return file.read()
    finally:
        os.unlink(path)
