"""Model files for benchmarks: random weights in the shape of a real model, or a model requantised.

    python bench/generate_model.py random smollm2-1.7b --format Q4_0       965 MB, made in half a minute
    python bench/generate_model.py random llama-3.1-8b --format Q8_0 --layers 4
    python bench/generate_model.py requantise smollm2-135m-instruct --format Q4_0

The path of the file goes to stdout. It lies in the user's cache (POLYKERN_CACHE_DIR) and is not made again.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray
from polykern.kernels.errors import ModelError, PolykernError, UsageError
from polykern.kernels.spi import Progress
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.models import DEFAULT_MODEL, cache_dir, pull
from polykern.runtime.progress import ProgressBars

VERSION = 1  # part of the file name: whoever changes what is written makes other files
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")  # what gguf.quants.quantize can write
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}  # general.file_type
POOL = 1 << 22
CHUNK_BYTES = 1 << 24
# llama-quantize keeps these at 6 or 8 bits in a 4-bit model; here they stay what they are in the source.
KEPT = ("token_embd.weight", "output.weight")

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """A decoder of the architecture `llama`. `tied`: the head is the embedding."""

    layers: int
    d_model: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True
    context: int = 8192
    rope_base: float = 10000.0

    def tensors(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Name -> (shape, standard deviation of its numbers; 0: all ones), in the order of the file.

        1 / sqrt(K) keeps the size of what goes through a matrix with K columns. The two that add to the residual stream
        are smaller by sqrt(2 layers), as in GPT-2, so that it does not grow with depth.
        """
        d, kv, into_d = self.d_model, self.d_model // self.heads * self.kv_heads, 1 / math.sqrt(self.d_model)
        residual = 1 / math.sqrt(2 * self.layers)
        found: dict[str, tuple[tuple[int, ...], float]] = {"token_embd.weight": ((self.vocab, d), into_d)}
        for i in range(self.layers):
            found |= {
                f"blk.{i}.attn_norm.weight": ((d,), 0),
                f"blk.{i}.attn_q.weight": ((d, d), into_d),
                f"blk.{i}.attn_k.weight": ((kv, d), into_d),
                f"blk.{i}.attn_v.weight": ((kv, d), into_d),
                f"blk.{i}.attn_output.weight": ((d, d), into_d * residual),
                f"blk.{i}.ffn_norm.weight": ((d,), 0),
                f"blk.{i}.ffn_gate.weight": ((self.ff, d), into_d),
                f"blk.{i}.ffn_up.weight": ((self.ff, d), into_d),
                f"blk.{i}.ffn_down.weight": ((d, self.ff), residual / math.sqrt(self.ff)),
            }
        found["output_norm.weight"] = ((d,), 0)
        if not self.tied:
            found["output.weight"] = ((self.vocab, d), into_d)
        return found

    def check(self, fmt: str) -> None:
        """Raise UsageError unless such a model can be, with its matrices in `fmt`."""
        for name, size in vars(self).items():
            if size < 1 and name != "tied":
                raise UsageError(f"{name} is {size}, expected at least 1")
        block = block_size(fmt)[0]
        for name, size in (("d_model", self.d_model), ("ff", self.ff)):
            if size % block:
                raise UsageError(f"{name} is {size}, {fmt} needs a multiple of {block}")
        if self.d_model % self.heads or self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} heads and {self.kv_heads} kv heads do not divide d_model {self.d_model} evenly"
            )


# Sizes as in the config.json of each model on the Hugging Face hub.
SHAPES = {
    "tiny": Shape(layers=2, d_model=64, ff=96, heads=4, kv_heads=2, vocab=49152, context=512),
    "smollm2-135m": Shape(layers=30, d_model=576, ff=1536, heads=9, kv_heads=3, vocab=49152, rope_base=1e5),
    "smollm2-1.7b": Shape(layers=24, d_model=2048, ff=8192, heads=32, kv_heads=32, vocab=49152, rope_base=1.3e5),
    "llama-3.2-1b": Shape(layers=16, d_model=2048, ff=8192, heads=32, kv_heads=8, vocab=128256, rope_base=5e5),
    "llama-3.1-8b": Shape(
        layers=32, d_model=4096, ff=14336, heads=32, kv_heads=8, vocab=128256, tied=False, rope_base=5e5
    ),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its format, shape (rows, columns), and its bytes, made chunk by chunk."""

    name: str
    fmt: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        block, size = block_size(self.fmt)
        return math.prod(self.shape) // block * size


@dataclass
class Stream:
    """What GGUFWriter.write_tensor_data asks of an array: its size and `tofile`. No tensor is ever whole in memory."""

    tensor: Tensor
    wrote: Callable[[int], None]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def tofile(self, file: BinaryIO) -> None:
        for chunk in self.tensor.chunks():
            file.write(np.ascontiguousarray(chunk).data)
            self.wrote(chunk.nbytes)


def random_model(shape_name: str, fmt: str, *, seed: int = 0, progress: Progress | None = None, **changes: int) -> Path:
    """The file of a model with random weights in a shape of SHAPES (`changes` to it: layers=4), made if need be.

    All matrices are in `fmt`, norms are 1. Numbers are normal with the spread that `Shape.tensors` gives, and really
    quantised, so that scales and quants are distributed as in a trained model's file. To be quick, a tensor draws its
    blocks at random from a pool of 2^22 numbers. The tokenizer is the default model's; where the shape has more tokens,
    unused ones follow. Raises UsageError for a shape that cannot be, ModelError where the file cannot be written.
    """
    if shape_name not in SHAPES:
        raise UsageError(f"no shape {shape_name!r}; there is {', '.join(SHAPES)}")
    shape = replace(SHAPES[shape_name], **changes)
    shape.check(fmt)
    name = "-".join([shape_name, *(f"{key}{value}" for key, value in sorted(changes.items()))])
    target = cached(f"{name}.{fmt}.random{seed}")
    if target.exists():
        return target
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name(f"{name} with random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.d_model // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    add_tokenizer(writer, gguf.GGUFReader(pull(DEFAULT_MODEL, progress)[0]), shape.vocab)
    pools = {std: random_blocks(fmt, std, seed) for _, std in shape.tensors().values() if std}
    tensors: list[Tensor] = []
    for tensor, (size, std) in shape.tensors().items():
        if std:
            chunks = partial(
                drawn, pools[std], math.prod(size) // block_size(fmt)[0], (seed, zlib.crc32(tensor.encode()))
            )
            tensors.append(Tensor(tensor, fmt, size, chunks))
        else:
            tensors.append(Tensor(tensor, "F32", size, partial(iter, (np.ones(size, np.float32),))))
    write(target, writer, fmt, tensors, progress)
    return target


def random_blocks(fmt: str, std: float, seed: int) -> Array:
    """uint8 [blocks, bytes of a block]: POOL normal numbers, quantised."""
    numbers = np.random.default_rng(seed).normal(0, std, POOL).astype(np.float32)
    return quantised(numbers.reshape(-1, block_size(fmt)[0]), fmt)


def drawn(pool: Array, count: int, seed: tuple[int, ...]) -> Iterator[Array]:
    """`count` blocks of the pool, at random."""
    rng = np.random.default_rng(seed)
    step = CHUNK_BYTES // pool.shape[1]
    for start in range(0, count, step):
        yield pool[rng.integers(0, len(pool), min(step, count - start), np.int32)]


def requantised(model: str | Path, fmt: str, *, progress: Progress | None = None) -> Path:
    """The file of `model` with its matrices in `fmt`, made if need be.

    What llama-quantize keeps at 6 or 8 bits in a model of 4 (the embedding and the head) stays as it is in the source,
    and so do norms, biases and matrices whose rows are not whole blocks. For a source in Q4_1 with an embedding in
    Q8_0 (the default model), the tensors are the same bytes that llama-quantize writes.
    """
    path, digest = pull(model, progress)
    target = cached(f"{path.stem}.{digest[:12]}.as.{fmt}")
    if target.exists():
        return target
    source = read(path)
    architecture = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(None, architecture)
    ours = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, value in source.fields.items():
        if not key.startswith(ours):
            writer.add_key_value(
                key, value.contents(), value.types[0], value.types[1] if len(value.types) > 1 else None
            )
    tensors: list[Tensor] = []
    for tensor in source.tensors:
        shape, old = tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name
        is_matrix = tensor.name.endswith(".weight") and len(shape) == 2 and tensor.name not in KEPT
        if is_matrix and old != fmt and shape[1] % block_size(fmt)[0] == 0:
            tensors.append(Tensor(tensor.name, fmt, shape, partial(converted, tensor, fmt)))
        else:
            tensors.append(Tensor(tensor.name, old, shape, partial(iter, (tensor.data,))))
    write(target, writer, fmt, tensors, progress)
    return target


def converted(tensor: gguf.ReaderTensor, fmt: str) -> Iterator[Array]:
    rows = tensor.data.reshape(int(tensor.shape[1]), -1)
    step = max(1, CHUNK_BYTES // (4 * int(tensor.shape[0])))
    for start in range(0, len(rows), step):
        numbers = gguf.quants.dequantize(rows[start : start + step], tensor.tensor_type)
        yield quantised(numbers.astype(np.float32, copy=False), fmt)


def quantised(rows: Array, fmt: str) -> Array:
    """float32 [rows, columns] -> uint8 [rows, bytes of a row]."""
    found = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[fmt])
    return np.ascontiguousarray(found).view(np.uint8).reshape(len(rows), -1)


def block_size(fmt: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[fmt]]


def cached(stem: str) -> Path:
    return cache_dir() / "models" / "made" / f"{stem}.v{VERSION}.gguf"


def read(path: Path) -> gguf.GGUFReader:
    GGUFFile.open(path)  # the package's reader trusts what it reads; ours does not
    return gguf.GGUFReader(path)


def add_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, vocab: int) -> None:
    """The source's tokenizer, its vocabulary filled up with unused tokens."""
    known = len(source.fields["tokenizer.ggml.tokens"].data)
    if vocab < known:
        raise UsageError(f"vocab is {vocab}, the tokenizer alone has {known} tokens")
    for key, value in source.fields.items():
        if not key.startswith("tokenizer."):
            continue
        content = value.contents()
        if key == "tokenizer.ggml.tokens":
            content += [f"<|unused_{i}|>" for i in range(vocab - known)]
        elif key == "tokenizer.ggml.token_type":
            content += [int(gguf.TokenType.UNUSED)] * (vocab - known)
        writer.add_key_value(key, content, value.types[0], value.types[1] if len(value.types) > 1 else None)


def write(
    target: Path, writer: gguf.GGUFWriter, fmt: str, tensors: Sequence[Tensor], progress: Progress | None
) -> None:
    """Header and tensors into a file that gets its name when it is whole."""
    if fmt in FILE_TYPES:
        writer.add_file_type(FILE_TYPES[fmt])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, gguf.GGMLQuantizationType[tensor.fmt]
        )
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(f"write {target.name}", done, total)

    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < total:
            raise OSError(errno.ENOSPC, f"{total / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(Stream(tensor, wrote))  # type: ignore[arg-type]
            writer.close()
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"{target}: cannot be written: {error.strerror or error}; set POLYKERN_CACHE_DIR to another folder"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    random = commands.add_parser("random", help="random weights in the shape of a real model")
    random.add_argument("shape", choices=SHAPES)
    random.add_argument("--format", choices=FORMATS, default="Q4_0")
    random.add_argument("--seed", type=int, default=0)
    for dimension in ("layers", "d_model", "ff", "heads", "kv_heads", "vocab", "context"):
        random.add_argument(f"--{dimension.replace('_', '-')}", type=int, metavar="N", help="instead of the shape's")
    again = commands.add_parser("requantise", help="an existing model with its matrices in another format")
    again.add_argument("model", help="a GGUF file, or a name that `runtime -m` knows")
    again.add_argument("--format", choices=FORMATS, default="Q4_0")
    args = vars(parser.parse_args(argv))
    fmt, command = args.pop("format"), args.pop("command")
    try:
        with ProgressBars() as progress:
            if command == "requantise":
                path = requantised(args["model"], fmt, progress=progress)
            else:
                changes = {key: value for key, value in args.items() if value is not None}
                path = random_model(changes.pop("shape"), fmt, progress=progress, **changes)
    except PolykernError as error:
        print(f"generate_model: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
