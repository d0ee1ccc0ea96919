"""The process that compiles (backends/compile_process.py): Triton for its kernels, NVRTC for CUDA C++."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compile_process import serve
from .compiler import spec_of
from .launch import KernelSpec, Target
from .sources import jitted

REGISTERS = 65536  # of a multiprocessor, and of a block at most (CUDA C++ Programming Guide 12.9, table 27)


def build(request: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
    """What Binary wants to know, and the code."""
    spec, target = spec_of(request["spec"]), Target(**request["target"])
    return _triton(spec, target) if spec.is_triton else _nvrtc(spec, target)


def _triton(spec: KernelSpec, target: Target) -> tuple[Mapping[str, Any], bytes]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_cuda = target.kind == "cuda"
    gpu = GPUTarget(target.kind, int(target.arch) if is_cuda else target.arch, 32 if is_cuda else 64)
    function = jitted(spec)
    signature = {name: kind.partition("/")[0] for name, kind in spec.params}
    signature |= {name: "constexpr" for name, _ in spec.constants}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, (_, kind) in enumerate(spec.params) if kind.endswith("/16")
    }
    source = ASTSource(function, signature, dict(spec.constants), aligned)
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    compiled = triton.compile(source, target=gpu, options=options)
    usage = cubin_usage(compiled.asm["cubin"]) if is_cuda else _amd_usage(compiled.asm["amdgcn"])
    if is_cuda and usage["local_bytes"]:
        # Left alone, ptxas spills a few registers for one more block on a multiprocessor; told how many a thread may
        # have, it uses them.
        most = min(255, REGISTERS // (32 * spec.warps) // 8 * 8)
        again = triton.compile(source, target=gpu, options={**options, "maxnreg": most})
        less = cubin_usage(again.asm["cubin"])
        if less["local_bytes"] < usage["local_bytes"]:
            compiled, usage = again, less
    about = compiled.metadata
    for room in ("global_scratch_size", "profile_scratch_size"):
        # The launch passes null for both.
        assert not getattr(about, room, 0), f"{spec.function} wants {room.replace('_', ' ')}"
    code = compiled.asm["cubin" if is_cuda else "hsaco"]
    threads = spec.warps * gpu.warp_size
    # Shared memory of AMD's code objects is static, and counted there.
    return {"symbol": about.name, "threads": threads, "shared": about.shared if is_cuda else 0, **usage}, code


def _nvrtc(spec: KernelSpec, target: Target) -> tuple[Mapping[str, Any], bytes]:
    from .nvrtc import compile_cubin

    assert target.kind == "cuda", f"{spec.file} is CUDA C++"
    code = compile_cubin(spec, target.arch)
    return {"symbol": spec.function, "threads": 32 * spec.warps, "shared": 0, **cubin_usage(code)}, code


def cubin_usage(code: bytes) -> dict[str, int]:
    """Registers and local memory of a thread, and static shared memory, as cuobjdump of Triton's wheel reads them.

    A stack frame that no instruction uses is none: ptxas reserves 8 or 16 bytes now and then and spills nothing.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = _cuobjdump("--dump-resource-usage", file.name)
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}
        assert "REG" in found, f"cuobjdump said {said.strip()[-200:]!r}"
        local = max(found["STACK"], found["LOCAL"])
        if local and not re.search(r"\b(STL|LDL)\b", _cuobjdump("-sass", file.name)):
            local = 0
    return {"registers": found["REG"], "local_bytes": local, "static_shared": found["SHARED"]}


def _cuobjdump(what: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), what, file], check=False, capture_output=True, text=True, timeout=60).stdout


def _amd_usage(assembly: str) -> dict[str, int]:
    """The same from the metadata of AMD's assembly."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"), "local_bytes": number("private_segment_fixed_size"),
        "static_shared": number("group_segment_fixed_size"),
    }  # fmt: skip


if __name__ == "__main__":
    # Its own cache would keep what ours keeps; 3.9 warns about a default that 3.10 changes: floating-point
    # contraction stays on, as the error bounds assume either.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        serve(build)
