"""`runtime compile`: a model's kernels as artefacts for a target, ahead of time and without the target's device."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import Output, size_text
from .options import add_model, completes_files, name, whole

if TYPE_CHECKING:
    from ..artefacts import Artefacts

HELP = "Generate the kernels of a model for a target: source or objects, and a manifest that says how to call them."
EXAMPLE = """\
runtime compile --target "llvm -mcpu=znver4" -o kernels-znver4
runtime compile --target opencl --op gemm -o kernels-opencl
runtime compile --target cuda:90 -o kernels-h100"""
PAGE_SIZE = 16  # as the other backends of this project


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--target", type=name, required=True, metavar="TARGET",
        help="llvm, c, opencl, cuda, rocm, metal or webgpu, with options as in \"llvm -mcpu=znver4\"; TVM's tags and"
        " JSON are understood as well. cuda:90, cuda:80, ... or hip:gfx942: binaries of the cuda backend's own kernels",
    )  # fmt: skip
    completes_files(
        parser.add_argument("-o", "--output", type=name, required=True, metavar="DIR", help="the folder to make")
    )
    add_model(parser)
    parser.add_argument("--op", type=name, action="append", metavar="OP", help="only this op; may be repeated")
    parser.add_argument("--ctx", type=whole(1), metavar="N", help="tokens the KV cache holds (default: by the model)")
    parser.add_argument(
        "--page-size", type=whole(1, 4096), default=PAGE_SIZE, metavar="N",
        help="tokens in a page of the KV cache (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace what an earlier compile wrote to DIR")


def run(args: Namespace, out: Output) -> int:
    from ...backends.cuda import aot
    from ...backends.tvm.portable import targets
    from ...backends.tvm.portable.machine import MACHINES
    from ..artefacts import Folder, generate, generate_binaries, needs
    from ..config import ModelConfig
    from ..gguf import GGUFFile
    from ..load import context_size
    from ..models import resolve
    from ..progress import ProgressBars
    from ..settings import Settings

    is_binary = aot.is_architecture(args.target)
    target: Any = aot.parse(args.target) if is_binary else targets.parse(args.target)
    with ProgressBars() as progress, Folder(Path(args.output), args.force) as folder:
        path = resolve(args.model, progress)
        with GGUFFile.open(path) as gguf:
            config = ModelConfig.from_gguf(gguf)
        ctx = context_size(Settings(model=path, ctx=args.ctx), config, str(path))
        about = {
            "model": {"file": Path(path).name, "architecture": config.architecture.name},
            "ctx": ctx,
            "page_size": args.page_size,
        }
        if is_binary:
            artefacts = generate_binaries(config, target, ctx, args.page_size, args.op or (), about, progress)
        else:
            found = needs(config, MACHINES[str(target.kind.name)], ctx, args.page_size)
            artefacts = generate(found.only(args.op) if args.op else found, target, about, progress)
        folder.write(artefacts)
    if args.json:
        out.json({"path": str(folder.path), **artefacts.manifest})
    else:
        show(artefacts, folder.path, args.target, out)
    return 0


def show(artefacts: Artefacts, path: Path, target: str, out: Output) -> None:
    manifest = artefacts.manifest
    kernels: list[dict[str, Any]] = manifest["kernels"]
    counts = Counter(kernel["op"] for kernel in kernels)
    sizes: Counter[str] = Counter()
    for kernel in kernels:
        sizes[kernel["op"]] += len(artefacts.files[kernel["file"]])
    out.table(
        ("op", "kernels", "size"), [(op, n, size_text(sizes[op])) for op, n in counts.items()], ("kernels", "size")
    )
    parts = {row["op"]: (row["reason"], [part["op"] for part in row["into"]]) for row in manifest["decomposed"]}
    for op, (reason, into) in parts.items():
        out.line(f"{op}: as {', '.join(into)} ({reason})")
    for row in manifest["refused"]:
        out.line(f"refused: {row['op']}: {row['reason']}")
    out.line(
        f"{len(kernels)} kernels for {target}, {size_text(artefacts.nbytes)}, in {path};"
        f" {path / 'manifest.json'} says how to call them"
    )
