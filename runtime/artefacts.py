"""Ahead-of-time kernels: which ones a model's programs need, and a folder with their code and a manifest.

    manifest.json   target, versions, weight layouts, and for each kernel its op, file, symbol, arguments in order,
                    launch dimensions and numerics; the same bytes for the same input
    programs.json   the model's programs: buffers, and calls of kernels on views of them, in order
    SYMBOL.ext      one file for each kernel: source, or a relocatable object

A folder that has a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.errors import PolykernError, UsageError
from ..kernels.gemm import PRECISIONS
from ..kernels.op import Signature
from ..kernels.ops import OPS
from ..kernels.quant import FORMATS
from ..kernels.spi import Kernel, Progress, Unsupported
from .config import ModelConfig
from .model import build_program, stacked_tensors
from .output import plain
from .plan import Plan, PlannedCall, plan
from .programs import DECODE, DECODE_SAMPLING, PREFILL_CHUNKS, Bucket, prefill
from .step import row_stride_of

FORMAT = 1  # of the manifest
MANIFEST, PROGRAMS = "manifest.json", "programs.json"
BUCKETS: tuple[Bucket, ...] = (DECODE, DECODE_SAMPLING, *(prefill(tokens) for tokens in PREFILL_CHUNKS))


@dataclass(frozen=True)
class _Generator:
    """What `plan` asks in the place of a backend: which calls have a kernel for this kind of target."""

    name: str
    machine: Any

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        from ..backends.tvm.portable import emit, names

        reason = emit.refusal(signature, self.machine)
        if reason:
            return Unsupported(signature.op, reason)
        return Kernel(names.symbol(signature), emit.numerics(signature, self.machine))


@dataclass
class Wanted:
    """A kernel to generate: a signature and the programs that call it, each with how often."""

    symbol: str
    signature: Signature
    programs: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class Needs:
    """What a model needs for a target: kernels, ops that are taken apart into others, ops that have no kernel; and
    `programs`, the content of programs.json (None: only a part of the kernels is wanted)."""

    wanted: dict[str, Wanted] = field(default_factory=dict[str, Wanted])
    decomposed: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
    refused: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
    programs: dict[str, Any] | None = None

    def add(self, planned: Plan, by_signature: bool = False) -> None:
        """The calls of a plan; a kernel is told by its symbol, or where one symbol serves many, by its signature."""
        for call in planned.calls:
            self._add(call, planned.program.name, by_signature)

    def _add(self, call: PlannedCall, program: str, by_signature: bool) -> None:
        key, op = str(call.signature), call.signature.op
        if call.native:
            wanted = self.wanted.setdefault(key if by_signature else call.kernel, Wanted(call.kernel, call.signature))
            wanted.programs[program] = wanted.programs.get(program, 0) + 1
        elif call.parts:
            into = [{"op": part.signature.op, "symbol": part.kernel} for part in call.parts]
            row = {"op": op, "signature": key, "reason": call.reason, "into": into}
            self.decomposed.setdefault(key, row)
            for part in call.parts:
                self._add(part, program, by_signature)
        else:
            self.refused.setdefault(key, {"op": op, "signature": key, "reason": call.reason})

    def only(self, ops: Sequence[str]) -> Needs:
        """The part that belongs to these ops: their kernels, and the kernels they are taken apart into."""
        for op in ops:
            if op not in OPS:
                raise UsageError(f"unknown op {op!r}; known: {', '.join(OPS)}")
        there = {wanted.signature.op for wanted in self.wanted.values()}
        there |= {row["op"] for row in [*self.decomposed.values(), *self.refused.values()]}
        missing = [op for op in ops if op not in there]
        if missing:
            needed = ", ".join(op for op in OPS if op in there)
            raise UsageError(f"no program of this model calls {', '.join(missing)}; they call {needed}")
        decomposed = {key: row for key, row in self.decomposed.items() if row["op"] in ops}
        symbols = {part["symbol"] for row in decomposed.values() for part in row["into"]}
        return Needs(
            {s: w for s, w in self.wanted.items() if w.signature.op in ops or s in symbols},
            decomposed,
            {key: row for key, row in self.refused.items() if row["op"] in ops},
        )


def needs(config: ModelConfig, machine: Any, ctx: int, page_size: int) -> Needs:
    """What the decode and prefill programs of a model call."""
    found = Needs()
    generator: Any = _Generator(f"compile {machine.kind}", machine)
    programs: dict[str, Any] = {}
    for bucket in BUCKETS:
        program = build_program(config, **bucket._asdict(), ctx=ctx, page_size=page_size, precision="exact")
        planned = plan(program, generator, "allow")
        found.add(planned)
        programs[program.name] = _program(planned)
    found.programs = {"stacked": stacked_tensors(config), "rope": asdict(config.rope), "programs": programs}
    return found


def _program(planned: Plan) -> dict[str, Any]:
    """Buffers and calls of a program; a call that no kernel does has no symbol."""
    buffers = {b.name: {"kind": b.kind, "dtype": b.dtype, "shape": b.shape} for b in planned.buffers.values()}
    calls = [
        {
            "op": leaf.call.op,
            "symbol": leaf.kernel if leaf.native else None,
            "tensors": {
                name: {"buffer": view.buffer, "offset": view.offset, "row_stride": row_stride_of(view)}
                for name, view in leaf.call.args.items()
            },
        }
        for leaf in planned.leaves()
    ]
    return {"buffers": buffers, "calls": calls}


@dataclass(frozen=True)
class Artefacts:
    """Content of a folder: the manifest, and for each other file its bytes."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


def generate(found: Needs, target: Any, about: Mapping[str, Any], progress: Progress | None = None) -> Artefacts:
    """Compile every kernel of `found` for a parsed target. `about` goes into the manifest (model, ctx, page_size)."""
    from ..backends.tvm.portable import emit, names, targets
    from ..backends.tvm.portable.machine import MACHINES

    machine = MACHINES[str(target.kind.name)]
    files: dict[str, bytes] = {}
    kernels: list[dict[str, Any]] = []
    for done, wanted in enumerate(found.wanted.values()):
        if progress:
            progress("compile", done, len(found.wanted))
        with targets.quiet():
            emitted = emit.emit(wanted.signature, target, wanted.symbol)
        file = wanted.symbol + machine.suffix
        files[file] = emitted.code
        kernels.append(
            {
                "op": wanted.signature.op,
                "symbol": emitted.symbol,
                "file": file,
                "sha256": hashlib.sha256(emitted.code).hexdigest(),
                "tensors": {p.name: _tensor(p.name, wanted.signature) for p in OPS[wanted.signature.op].params
                            if p.name in wanted.signature.tensors},
                "attributes": names.attributes(wanted.signature),
                "arguments": [_argument(parameter) for parameter in emitted.parameters],
                "launch": {"grid": [emitted.grid, 1, 1], "block": [emitted.block, 1, 1]},
                "numerics": asdict(emitted.numerics),
                "programs": wanted.programs,
            }
        )  # fmt: skip
    if progress:
        progress("compile", len(found.wanted), len(found.wanted))
    if found.programs is not None:
        files[PROGRAMS] = (json.dumps(plain({"format": FORMAT, **found.programs})) + "\n").encode()
    manifest = {
        "format": FORMAT,
        "polykern": metadata.version("polykern"),
        "tvm": targets.version(),
        "target": json.loads(str(target)),
        **about,
        "how_to_launch": machine.loader,
        "weights": {name: _layout(name) for name in _formats(found)},
        "programs": PROGRAMS if PROGRAMS in files else None,
        "kernels": kernels,
        "decomposed": list(found.decomposed.values()),
        "refused": list(found.refused.values()),
    }
    return Artefacts(plain(manifest), files)


def generate_binaries(
    config: ModelConfig, target: Any, ctx: int, page_size: int, ops: Sequence[str], about: Mapping[str, Any],
    progress: Progress | None = None,
) -> Artefacts:  # fmt: skip
    """Binaries of the cuda backend for everything that a model's programs launch, in both precisions."""
    from ..backends.cuda import aot

    generator: Any = aot.Generator(target)
    found = Needs()
    for precision in PRECISIONS:
        for bucket in BUCKETS:
            program = build_program(config, **bucket._asdict(), ctx=ctx, page_size=page_size, precision=precision)
            found.add(plan(program, generator, "allow"), by_signature=True)
    if ops:
        found = found.only(ops)
    wanted: dict[str, list[Signature]] = {}
    for one in found.wanted.values():
        wanted.setdefault(one.signature.op, []).append(one.signature)
    report = (lambda done, total: progress("compile", done, total)) if progress else None
    manifest, files = aot.generate(target, wanted, report)
    rest = {"decomposed": list(found.decomposed.values()), "refused": list(found.refused.values())}
    return Artefacts(plain({"polykern": metadata.version("polykern"), **about, **manifest, **rest}), files)


def _tensor(name: str, signature: Signature) -> dict[str, Any]:
    kind, param = signature.tensors[name], OPS[signature.op].param(name)
    return {"role": param.role, "axes": param.axes, "shape": kind.shape, "dtype": kind.dtype}


def _argument(parameter: Any) -> dict[str, Any]:
    """One argument: what is passed, for which tensor; `bytes` of scratch, since no tensor of the call says it."""
    row: dict[str, Any] = {
        "kind": parameter.kind,
        "name": parameter.name,
        "dtype": parameter.dtype,
        "role": parameter.role,
    }
    if parameter.role == "scratch":
        row["shape"] = parameter.shape
    elif parameter.kind == "pointer":
        row |= {"axes": parameter.axes, "shape": parameter.shape}
    return row


def _formats(found: Needs) -> list[str]:
    used = {kind.dtype for wanted in found.wanted.values() for kind in wanted.signature.tensors.values()}
    return [name for name in FORMATS if name in used]


def _layout(name: str) -> dict[str, Any]:
    """A weight format: rows of blocks as in a GGUF file, row after row, no gaps; padded to a multiple of 4 bytes."""
    fmt = FORMATS[name]
    fields = [{"name": f.name, "offset": f.offset, "dtype": f.dtype, "count": f.count} for f in fmt.fields]
    layout = "rows of blocks as in a GGUF file, row after row; the end padded to a multiple of 4 bytes"
    return {"layout": layout, "block_length": fmt.block_length, "block_bytes": fmt.block_bytes, "fields": fields}


class Folder:
    """Where artefacts go. As a context manager: everything is written to a draft, then `write` puts it in its place.

    A new folder appears whole. In one that is there the manifest goes first and comes last, so that a folder with a
    manifest is always complete.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self.path, self.force = path, force
        self._draft: Path | None = None

    def __enter__(self) -> Folder:
        """Everything that can be wrong with the place is found here, before anything is compiled."""
        self._check()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            base = self.path if self.path.is_dir() else self.path.parent
            self._draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=base))
        except OSError as error:
            raise PolykernError(f"{self.path}: cannot be made: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._draft is not None:
            shutil.rmtree(self._draft, ignore_errors=True)

    def _check(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise PolykernError(f"{self.path} is there and is no folder: name another with -o")
        try:
            there = sorted(p.name for p in self.path.iterdir() if p != self._draft) if self.path.is_dir() else []
        except OSError as error:
            raise PolykernError(f"{self.path}: cannot be read: {error.strerror}") from error
        if there and not self.force:
            raise PolykernError(
                f"{self.path} is not empty ({len(there)} entries, {there[0]!r} is one): name another folder, or"
                " --force replaces what an earlier compile wrote"
            )
        foreign = sorted(set(there) - self._own()) if there else []
        if foreign:
            raise PolykernError(
                f"{self.path} holds {foreign[0]!r}, which no earlier compile wrote ({len(foreign)} such entries):"
                " it stays; name another folder"
            )

    def _own(self) -> set[str]:
        """The files that the folder's manifest lists."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            return {MANIFEST, PROGRAMS, *(str(kernel["file"]) for kernel in manifest["kernels"])}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def write(self, artefacts: Artefacts) -> None:
        assert self._draft is not None, "used outside its `with`"
        text = json.dumps(artefacts.manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        files = {**artefacts.files, MANIFEST: text.encode()}
        try:
            for name, content in files.items():
                (self._draft / name).write_bytes(content)
            if self._draft.parent == self.path:
                self._replace(files)
            else:
                self._draft.chmod(0o777 & ~_umask())
                os.rename(self._draft, self.path)
        except OSError as error:
            need = sum(map(len, files.values())) / (1 << 20)
            raise PolykernError(f"{self.path}: cannot be written ({need:.1f} MiB): {error.strerror}") from error

    def _replace(self, files: Mapping[str, bytes]) -> None:
        """Move the draft's files into the folder, the manifest last, instead of those of an earlier compile."""
        assert self._draft is not None
        self._check()  # once more: compiling takes a while
        old = self._own()
        (self.path / MANIFEST).unlink(missing_ok=True)
        for name in sorted(old - {MANIFEST}):
            (self.path / name).unlink(missing_ok=True)
        for name in files:  # the manifest is the last
            os.replace(self._draft / name, self.path / name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
