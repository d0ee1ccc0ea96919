"""Kernels compiled ahead of time: a folder of binaries with a manifest, written by `runtime compile --target cuda:90`.

    manifest.json           target, multiprocessors of the parts it is for, sources (hash), compilers, model; for each
                            kernel its op, file, spec, and what a launch needs to know (compiler.Binary)
    FUNCTION.HASH.cubin     code (AMD: .hsaco)

`$POLYKERN_CUDA_KERNELS` names such a folder: a machine with a driver and no compiler runs from it. A folder made from
other sources than these, or for another architecture, is not used, and says so once.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...kernels.errors import UsageError
from ...kernels.op import Signature
from ...kernels.spi import Kernel, Unsupported
from .compiler import FORMAT, Binary, Compiler, compilers, sources, spec_of
from .launch import KernelSpec, Launch, Sketch, Target, sketch_of

VARIABLE = "POLYKERN_CUDA_KERNELS"
MANIFEST = "manifest.json"
# Architecture -> multiprocessors of its parts, the largest first, and KiB of shared memory for a block (CUDA C++
# Programming Guide 12.9, table 27 "Technical Specifications per Compute Capability"; AMD Instinct MI300 ISA guide,
# section 2; parts: NVIDIA's white papers and data sheets of RTX 8000, T4, A100, A30, A40, A10, L40, RTX 4090, L4, H100
# SXM and PCIe, H20, B200, RTX PRO 6000, RTX 5090). Grids are planned anew on the GPU, but how a call is cut decides
# which kernels it takes, and that depends on how many units want work.
CUDA = {"75": ((72, 40), 64), "80": ((108, 56), 163), "86": ((84, 72), 99), "87": ((16, 8), 163),
        "89": ((142, 128, 58), 99), "90": ((132, 114, 78), 227), "100": ((148,), 227), "103": ((160, 148), 227),
        "120": ((188, 170), 99)}  # fmt: skip
HIP = {"gfx942": ((304,), 64)}


def where() -> str:
    """The folder, for messages."""
    return os.environ.get(VARIABLE) or f"${VARIABLE} (unset)"


def find(spec: KernelSpec, target: Target) -> Binary | None:
    """A kernel of the folder, None if it is not there."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    return _binaries(path, target.name).get(spec)


def fitting(target: Target) -> Target:
    """The GPU `target` as kernels should be planned for it: with no compiler, as the part of its architecture that the
    folder was compiled for and that it comes closest to from above."""
    path = os.environ.get(VARIABLE)
    if not path or compilers() or not _binaries(path, target.name):
        return target
    counts = _manifest(Path(path).expanduser())["multiprocessors"]
    return replace(target, multiprocessors=max((n for n in counts if n <= target.multiprocessors), default=min(counts)))


def describe() -> dict[str, Any]:
    """For `runtime doctor`."""
    path = os.environ.get(VARIABLE)
    if not path:
        return {"path": ""}
    try:
        manifest = _manifest(Path(path))
        return {
            "path": path,
            "target": manifest["target"],
            "kernels": len(manifest["kernels"]),
            "problem": _refusal(manifest),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"path": path, "problem": str(error)}


def is_architecture(text: str) -> bool:
    """Whether a target is one of ours, "cuda:90", rather than a kind that TVM generates source for, "cuda"."""
    return text.startswith(("cuda:", "hip:"))


def parse(text: str) -> Target:
    """`cuda:90`, `hip:gfx942`, as `runtime compile --target` takes them."""
    kind, _, arch = text.partition(":")
    known = {"cuda": CUDA, "hip": HIP}[kind]
    if arch not in known:
        close = ", ".join(f"{kind}:{name}" for name in known)
        raise UsageError(f"--target {text}: no such architecture; known: {close}")
    multiprocessors, shared = known[arch]
    return Target(kind, arch, multiprocessors[0], shared << 10)


def parts(target: Target) -> list[Target]:
    """`target` as each part of its architecture."""
    counts, _ = {"cuda": CUDA, "hip": HIP}[target.kind][target.arch]
    return [replace(target, multiprocessors=n) for n in counts]


@dataclass(frozen=True)
class Generator:
    """What `plan` asks in the place of a backend: which calls have a kernel for this target."""

    target: Target
    name: str = "cuda"

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        from . import supports

        return supports(self.target, signature)

    def launches(self, signature: Signature) -> list[Launch]:
        """Everything that a call of this signature may launch on any part, whichever way is chosen there."""
        from . import op_kernels

        kernel, call = op_kernels()[signature.op], sketch_of(signature)
        return [x for part in parts(self.target) for x in kernel.bind(Sketch(part, every=True), call)]


def generate(
    target: Target, wanted: Mapping[str, Sequence[Signature]], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and files for every kernel of the signatures, given by op."""
    generator = Generator(target)
    ops: dict[KernelSpec, str] = {}
    for op, signatures in wanted.items():
        for signature in signatures:
            for launch in generator.launches(signature):
                ops.setdefault(launch.spec, op)
    compiler = Compiler(target)
    try:
        binaries = dict(zip(ops, compiler.binaries(list(ops), progress), strict=True))
    finally:
        compiler.close()
    suffix = "cubin" if target.kind == "cuda" else "hsaco"
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for spec, binary in binaries.items():
        name = f"{spec.function}.{hashlib.sha256(repr(spec).encode()).hexdigest()[:16]}.{suffix}"
        files[name] = binary.code
        digest = hashlib.sha256(binary.code).hexdigest()
        rows.append({"op": ops[spec], "file": name, "sha256": digest, "spec": asdict(spec), **binary.about})
    counts = [part.multiprocessors for part in parts(target)]
    about = {"format": FORMAT, "target": target.name, "multiprocessors": counts, "sources": sources()}
    return {**about, "compilers": compilers(), "kernels": rows}, files


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _refusal(manifest: dict[str, Any], target: str = "") -> str:
    """Why a folder cannot be used; empty if it can."""
    if manifest["format"] != FORMAT or manifest["sources"] != sources():
        return "it was compiled from other sources than these: compile it again with this version"
    if target and manifest["target"] != target:
        return f"it was compiled for {manifest['target']}, this GPU is {target}"
    return ""


@cache
def _binaries(path: str, target: str) -> dict[KernelSpec, Binary]:
    folder = Path(path).expanduser()
    found: dict[KernelSpec, Binary] = {}
    try:
        manifest = _manifest(folder)
        problem = _refusal(manifest, target)
        for row in [] if problem else manifest["kernels"]:
            code = (folder / row["file"]).read_bytes()
            if hashlib.sha256(code).hexdigest() != row["sha256"]:
                problem = f"{row['file']} is damaged (its SHA-256 is another)"
                found = {}
                break
            found[spec_of(row["spec"])] = Binary.of(row, code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem, found = f"{type(error).__name__}: {error}", {}
    if problem:
        warnings.warn(f"kernels of {VARIABLE}={path} are not used: {problem}", RuntimeWarning, stacklevel=2)
    return found
