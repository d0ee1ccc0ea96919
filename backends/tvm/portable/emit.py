"""From a kernel as TIR to a target's source or object, through TVM's passes and code generator, without its runtime.

TVM would split a function into a packed one for its own runtime and a kernel with parameters in an order of its choice.
Here a kernel is lowered as it stands, so that its parameters are those of builder.py on every target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ....kernels.errors import DeviceError
from ....kernels.op import Numerics, Signature
from .builder import Builder, Parameter
from .machine import MACHINES, Machine

Write = Callable[[Builder], None]
State = Callable[[Signature, Machine], Numerics]


@cache
def kernels() -> Mapping[str, tuple[Write, State]]:
    """Ops that have a kernel; the others are taken apart (kernels/program.py)."""
    from . import attention, gemm, pointwise, rms_norm, rope, rows, sample

    modules = (gemm, attention, rows, rms_norm, rope, pointwise, sample)
    return {op: kernel for module in modules for op, kernel in module.KERNELS.items()}


@dataclass(frozen=True)
class Emitted:
    """A kernel for one signature and target.

    code        the content of its file: UTF-8 source, or an object
    parameters  its arguments, in order
    grid, block number of work-groups and of work-items in one (1, 1 on a serial target)
    """

    symbol: str
    code: bytes
    parameters: tuple[Parameter, ...]
    grid: int
    block: int
    numerics: Numerics


def refusal(signature: Signature, machine: Machine) -> str:
    """Why there is no kernel for this signature, or ""."""
    if signature.op not in kernels():
        return f"no {signature.op} kernel of its own"
    pointers = len(signature.tensors) + (signature.op == "sample")
    if pointers > machine.max_buffers:
        return f"{pointers} buffers, {machine.kind} has {machine.max_buffers} at most"
    pages = signature.tensors.get("k_pages")
    head_dim = pages.shape[3] if pages else 0
    if signature.op == "attention" and head_dim > 4096:
        return f"head_dim {head_dim} > 4096: what a group's lanes put together is more than 16 KiB"
    return ""


def numerics(signature: Signature, machine: Machine) -> Numerics:
    """What the arithmetic of the signature's kernel is."""
    return kernels()[signature.op][1](signature, machine)


def emit(signature: Signature, target: Any, symbol: str) -> Emitted:
    """Compile one signature for a TVM target. Raises DeviceError with TVM's reason where it cannot."""
    machine = MACHINES[target.kind.name]
    write, _ = kernels()[signature.op]
    builder = Builder(signature, machine, target, symbol)
    write(builder)
    try:
        code = _generate(builder, target)
    except Exception as error:
        reason = " ".join(str(error).split())[-300:]
        raise DeviceError(f"TVM cannot generate {machine.kind} code for {signature.op}: {reason}") from error
    stated = numerics(signature, machine)
    return Emitted(symbol, code, tuple(builder.parameters), builder.grid, builder.lanes, stated)


def _generate(builder: Builder, target: Any) -> bytes:
    import tvm

    # No pass of TVM's: buffers are flat and threads bound as they are written, and the passes that simplify put the
    # value of each `Builder.keep` back where it is used, which takes minutes for chains like Philox.
    module = tvm.IRModule({builder.symbol: builder.function})
    kind = builder.machine.kind
    if kind == "rocm":
        return _rocm_object(module, target)
    return _FILES.get(kind, _source)(_build(kind, module, target))


def _build(kind: str, module: Any, target: Any) -> Any:
    import tvm

    return tvm.get_global_func(f"target.build.{kind}")(module, target)


def _source(built: Any) -> bytes:
    text = built.inspect_source()
    # TVM writes a few declarations twice, with trailing blanks.
    return ("\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n").encode()


_C_START = """\
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static inline float polykern_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t polykern_as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

"""


def _c_source(built: Any) -> bytes:
    """What TVM writes, without the headers and the variable of its runtime: a file that stands alone."""
    text = _source(built).decode()
    body = text.split("__tvm_ffi__library_ctx = NULL;\n")[1]
    body = re.sub(r'#ifdef __cplusplus\nextern "C"\n#endif\n', "", body)
    body = re.sub(r"^TVM_DLL \w+ \w+\([^)]*\);\n", "", body, flags=re.M)  # declarations of what it calls
    return (_C_START + body.replace("TVM_DLL ", "")).encode()


def _object(built: Any) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="polykern-") as folder:
        path = Path(folder) / "kernel.o"
        built.write_to_file(str(path), "o")
        return path.read_bytes()


def _rocm_object(module: Any, target: Any) -> bytes:
    """The relocatable object that TVM would have ld.lld link.

    TVM finds ROCm's device library and linker through two functions of its registry. Ours say that there is no library
    (the kernels call nothing) and take the object; what TVM then does with it needs a runtime that its wheels lack.
    """
    import tvm_ffi

    objects: list[bytes] = []

    def take(code: Any) -> Any:
        objects.append(bytes(code))
        return code

    replaced = {"tvm_callback_rocm_bitcode_path": lambda *_: tvm_ffi.convert([]), "tvm_callback_rocm_link": take}
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in replaced}
    for name, function in replaced.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        _build("rocm", module, target)
    except Exception:
        if not objects:
            raise
    finally:
        for name, function in before.items():
            if function is not None:
                tvm_ffi.register_global_func(name, function, override=True)
    return objects[0]


_FILES: Mapping[str, Callable[[Any], bytes]] = {"c": _c_source, "llvm": _object}
