"""`runtime inspect`: what a GGUF file holds, and what this runtime would not use of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from ...kernels.errors import ModelError, ModelFormatError
from ..output import Output, one_line, size_text
from .options import completes_files, name

if TYPE_CHECKING:
    from ..gguf import GGUFFile

HELP = "Show a GGUF file: header, every key, tensors, what is ignored and whether it can be run."
EXAMPLE = "runtime inspect model.gguf"
SHOWN = 8  # elements of an array


def add_arguments(parser: ArgumentParser) -> None:
    completes_files(
        parser.add_argument("file", type=name, metavar="FILE", help="a GGUF file, or a model's name as for -m")
    )


def run(args: Namespace, out: Output) -> int:
    from ..gguf import GGUFFile
    from ..models import resolve
    from ..progress import ProgressBars

    with ProgressBars() as progress:
        path = resolve(args.file, progress)
    with GGUFFile.open(path) as gguf:
        document = describe(gguf)
    if args.json:
        out.json(document)
    else:
        show(document, out)
    return 0


def describe(gguf: GGUFFile) -> dict[str, Any]:
    """The JSON document. ModelFormatError for a malformed file; `problem` says why a sound one cannot be run."""
    problem = why_not_runnable(gguf)
    unused = set(gguf.unconsumed()) if problem is None else set[str]()

    def status(kind: str, name: str) -> str:
        if problem is not None:
            return "not read"
        if name in gguf.ignored:
            return "ignored"
        return "unused" if f"{kind} {name}" in unused else "used"

    keys = [
        {
            "name": key,
            "type": gguf.metadata_types[key],
            "value": shortened(value),
            "offset": gguf.key_offsets[key],
            "status": status("key", key),
        }
        for key, value in gguf.metadata.items()
    ]
    tensors = [
        {
            "name": tensor.name,
            "shape": tensor.shape,
            "type": tensor.type_name,
            "offset": tensor.offset,
            "nbytes": tensor.nbytes,
            "status": status("tensor", tensor.name),
        }
        for tensor in gguf.tensors.values()
    ]
    return {
        "path": gguf.path,
        "file_size": gguf.file_size,
        "version": gguf.version,
        "alignment": gguf.alignment,
        "data_offset": gguf.data_offset,
        "trailing_bytes": gguf.trailing_bytes,
        "parameters": sum(tensor.size for tensor in gguf.tensors.values()),
        "runnable": problem is None,
        "problem": problem,
        "keys": keys,
        "tensors": tensors,
        "ignored": gguf.ignored if problem is None else {},
    }


def why_not_runnable(gguf: GGUFFile) -> str | None:
    """What keeps this runtime from running a well-formed file, found as loading it would."""
    from ..config import ModelConfig
    from ..tokenizer import Tokenizer

    try:
        ModelConfig.from_gguf(gguf)
        Tokenizer.from_metadata(gguf.metadata, gguf.path)
    except ModelFormatError:
        raise
    except ModelError as error:
        return str(error).removeprefix(f"{gguf.path}: ")
    return None


def shortened(value: Any) -> Any:
    """`value`, or length and first elements of a long array."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return value
    items = value.tolist() if hasattr(value, "tolist") else list(value)
    return items if len(items) <= SHOWN else {"length": len(items), "first": items[:SHOWN]}


def show(document: dict[str, Any], out: Output) -> None:
    out.line(f"{document['path']}: GGUF version {document['version']}, {size_text(document['file_size'])}")
    out.line(
        f"{len(document['keys'])} keys, {len(document['tensors'])} tensors with {document['parameters']:,} numbers,"
        f" data from byte {document['data_offset']}, alignment {document['alignment']}"
    )
    if document["trailing_bytes"]:
        out.line(f"{document['trailing_bytes']} bytes after the last tensor")
    out.line("runnable" if document["runnable"] else f"not runnable: {one_line(document['problem'])}")
    out.line()
    out.table(
        ("key", "type", "value", "use"),
        [(k["name"], k["type"], _text(k["value"]), _use(k, document)) for k in document["keys"]],
    )
    out.line()
    out.table(
        ("tensor", "shape", "type", "bytes", "offset", "use"),
        [
            (t["name"], "×".join(map(str, t["shape"])), t["type"], t["nbytes"], t["offset"], _use(t, document))
            for t in document["tensors"]
        ],
        right=("bytes", "offset"),
    )


def _use(record: dict[str, Any], document: dict[str, Any]) -> str:
    return document["ignored"].get(record["name"]) or record["status"]


def _text(value: Any) -> str:
    """A value on one short line; strings are quoted so that nothing in them reaches the terminal as it is."""
    if isinstance(value, dict):
        inner = ", ".join(_text(item) for item in value["first"])
        return f"[{inner}, …] ({value['length']})"
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    return f"{value:g}" if isinstance(value, float) else str(value)
