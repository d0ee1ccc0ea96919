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
    about = compiled.metadata
    for room in ("global_scratch_size", "profile_scratch_size"):
        # The launch passes null for both.
        assert not getattr(about, room, 0), f"{spec.function} wants {room.replace('_', ' ')}"
    code = compiled.asm["cubin" if is_cuda else "hsaco"]
    usage = cubin_usage(code) if is_cuda else _amd_usage(compiled.asm["amdgcn"])
    threads = spec.warps * gpu.warp_size
    # Shared memory of AMD's code objects is static, and counted there.
    return {"symbol": about.name, "threads": threads, "shared": about.shared if is_cuda else 0, **usage}, code


def _nvrtc(spec: KernelSpec, target: Target) -> tuple[Mapping[str, Any], bytes]:
    from .nvrtc import compile_cubin

    assert target.kind == "cuda", f"{spec.file} is CUDA C++"
    code = compile_cubin(spec, target.arch)
    return {"symbol": spec.function, "threads": 32 * spec.warps, "shared": 0, **cubin_usage(code)}, code


def cubin_usage(code: bytes) -> dict[str, int]:
    """Registers and local memory of a thread, and static shared memory, as cuobjdump of Triton's wheel reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    assert "REG" in found, f"cuobjdump said {said.strip()[-200:]!r}"
    return {
        "registers": found["REG"], "local_bytes": max(found["STACK"], found["LOCAL"]), "static_shared": found["SHARED"],
    }  # fmt: skip


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
