"""What stands before the tensor data of a GGUF file: a strict, bounded parser for files nobody vouches for.

Every count, length and offset is compared with the file's size, as a Python int, before anything is allocated or
indexed with it. What does not fit is a ModelFormatError with file, field and byte offset.

Where the format's text (docs/gguf.md of ggml-org/ggml at 01f0d4d) and its C++ reader (ggml/src/gguf.cpp of
ggml-org/llama.cpp at 067d44f) disagree or are silent, the last column holds:

    what                                specification        C++ reader             here
    version                             3                    2, 3                   2 and 3 (same layout); little-endian
    alignment                           multiple of 8        power of two           u32, power of two, at most 1 MiB
    key                                 lower_snake_case     not empty              1 to 65535 printable ASCII, no space
    duplicate key or tensor name        -                    rejected               rejected
    string                              UTF-8                any bytes, 1 GiB       UTF-8
    all names and strings together      -                    -                      at most 64 MiB
    bool                                0 or 1               any byte               0 or 1
    array of arrays                     allowed              rejected               rejected
    strings in arrays                   -                    2^30 in each           at most 2097152 in the file
    keys; tensors                       -                    -                      at most 16384 of each
    bytes before the tensor data        -                    -                      at most 128 MiB
    tensor name                         at most 64 bytes     at most 63             1 to 63 bytes, printable, not a path
    dimensions                          at most 4            0 to 4                 1 to 4
    a dimension of 0                    -                    accepted               accepted; such a tensor has no use
    number of elements                  -                    below 2^63             below 2^63, a 0 counted as 1
    tensor data                         aligned              in order, no gaps      in order, no gaps, no overlap
    padding before the tensor data      zeros                any bytes              zeros (else a record was left over)
    padding between and after tensors   zeros                any bytes; required    any bytes; may lack after the last
    bytes after the last tensor         -                    accepted               accepted, counted: `trailing_bytes`
    header of a file without its data   -                    accepted on request    rejected
    one part of a split model           -                    -                      rejected, with the way to merge it
    tensor type without a QuantFormat   -                    accepted               accepted; refused when it is read
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..kernels.errors import ModelFormatError
from ..kernels.quant import BY_GGUF_TYPE, QuantFormat

MAX_HEADER_BYTES = 128 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 63
MAX_RECORDS = 1 << 14
MAX_ARRAY_STRINGS = 1 << 21
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4

HEADER_BYTES = 24
_SMALLEST_KEY = 8 + 1 + 4 + 1  # length, one character, type, one byte of value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # length, one character, dimension count, one dimension, type, offset

# gguf_metadata_value_type -> its name here and its code in `struct` and numpy.
_SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"), 6: ("f32", "f"),
    7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

# ggml_type ids that were withdrawn from the format (docs/gguf.md, as above).
_REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip

# What people hand over in place of a GGUF file, by its first bytes.
_LOOKS_LIKE = (
    (b"FUGG", "a big-endian file, which is not supported"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint: convert it to GGUF"),
    (b"\x80\x02", "a Python pickle: convert it to GGUF"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"<", "a web page saved in place of the model: download it again"),
    (b"tjgg", "a GGML file from before GGUF: convert it"),
)

MetadataValue: TypeAlias = "int | float | bool | str | list[str] | NDArray[Any]"


@dataclass(frozen=True)
class TensorInfo:
    """One record of the tensor table.

    `shape` is in numpy order, [out_features, in_features] for a matrix (GGUF stores it reversed); `offset` is the
    byte of the file where `nbytes` bytes of data start, `record_offset` where the record itself stands. `format` is
    None for a type that this project has no QuantFormat for.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    format: QuantFormat | None
    offset: int
    nbytes: int
    record_offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Header:
    """Everything before the tensor data. Keys and tensors are in file order; `key_offsets` are those of the records.

    Arrays of numbers in `metadata` are read-only views of the file; `metadata_types` says "u32", "str", "array[str]"…
    """

    version: int = 3
    alignment: int = 32
    metadata: dict[str, MetadataValue] = field(default_factory=dict[str, MetadataValue])
    metadata_types: dict[str, str] = field(default_factory=dict[str, str])
    key_offsets: dict[str, int] = field(default_factory=dict[str, int])
    tensors: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    data_offset: int = 0
    trailing_bytes: int = 0


def check_start(path: str, start: bytes, size: int) -> None:
    """Refuse, by its first bytes and its size, a file that is no GGUF file at all."""
    if size == 0:
        raise ModelFormatError(path, "file", None, "is empty")
    if not start.startswith(b"GGUF"[:size]):
        guess = next((what for magic, what in _LOOKS_LIKE if start.startswith(magic)), None)
        if guess is None and start[8:9] == b"{":
            guess = "a safetensors file: convert it to GGUF"
        problem = f"not a GGUF file: starts with {start[:4]!r}, expected b'GGUF'"
        raise ModelFormatError(path, "header magic", 0, problem + (f"; it looks like {guess}" if guess else ""))
    if size < HEADER_BYTES:
        raise ModelFormatError(
            path, "header", 0, f"takes {HEADER_BYTES} bytes, the file has {size}: truncated download?"
        )


def read_header(path: str, data: mmap.mmap) -> Header:
    """Parse and check all of the file but the values of its tensors."""
    parser = _Parser(path, data)
    n_tensors, n_kv = parser.counts()
    parser.keys(n_kv)
    parser.tensor_table(n_tensors)
    return parser.header


class _Parser:
    """A cursor over the mapped file: `pos` moves only past bytes that were checked to be there."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.pos = 0
        self.text_bytes = self.array_strings = 0
        self.header = Header()

    def fail(self, name: str, offset: int | None, problem: str) -> NoReturn:
        raise ModelFormatError(self.path, name, offset, problem)

    def take(self, count: int, name: str) -> int:
        """Move past `count` bytes; the offset of the first."""
        start, left = self.pos, self.size - self.pos
        if count > left:
            self.fail(name, start, f"takes {count} bytes, the file has {left} left: malformed, or a truncated download")
        if start + count > MAX_HEADER_BYTES:
            self.fail(name, start, f"{count} bytes would exceed the limit of {MAX_HEADER_BYTES} before the tensor data")
        self.pos = start + count
        return start

    def number(self, code: str, name: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), name))[0]

    def text(self, name: str, limit: int = MAX_TEXT_BYTES) -> str:
        """The string at the cursor, of at most `limit` bytes."""
        length = self.number("Q", name)
        start = self.take(length, name)
        if length > limit:
            self.fail(name, start, f"is {length} bytes long, the limit is {limit}")
        self.count_text(length, name, start)
        try:
            return self.data[start : self.pos].decode()
        except UnicodeDecodeError as error:
            self.fail(name, start + error.start, "is not UTF-8")

    def count_text(self, nbytes: int, name: str, at: int) -> None:
        self.text_bytes += nbytes
        if self.text_bytes > MAX_TEXT_BYTES:
            self.fail(name, at, f"brings names and strings to {self.text_bytes} bytes, the limit is {MAX_TEXT_BYTES}")

    def counts(self) -> tuple[int, int]:
        self.pos = 4
        version = self.number("I", "header version")
        if version & 0xFFFF == 0 and version:
            self.fail("header version", 4, f"is {version:#010x}: a big-endian file, which is not supported")
        if version not in (2, 3):
            self.fail("header version", 4, f"is {version}, supported are 2 and 3")
        self.header.version = version
        n_tensors, n_kv = self.number("Q", "header tensor count"), self.number("Q", "header key count")
        for name, offset, count, smallest in (
            ("header tensor count", 8, n_tensors, _SMALLEST_TENSOR),
            ("header key count", 16, n_kv, _SMALLEST_KEY),
        ):
            if count > MAX_RECORDS:
                self.fail(name, offset, f"is {count}, the limit is {MAX_RECORDS}")
            if count > (fit := (self.size - HEADER_BYTES) // smallest):
                self.fail(name, offset, f"is {count}, the file has room for {fit}: malformed, or a truncated download")
        return n_tensors, n_kv

    def keys(self, count: int) -> None:
        header = self.header
        for index in range(count):
            start = self.pos
            key = self.text(f"key #{index}", MAX_KEY_BYTES)
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                self.fail(f"key #{index}", start, f"its name {_short(key)} is not printable ASCII without spaces")
            name = f"key {key if len(key) <= 100 else key[:100] + '...'}"
            if key in header.metadata:
                self.fail(name, start, f"occurs twice, first at byte {header.key_offsets[key]}")
            header.key_offsets[key] = start
            header.metadata_types[key], header.metadata[key] = self.value(name)
        self.reserved_keys()

    def value(self, name: str) -> tuple[str, MetadataValue]:
        """The type's name and the value at the cursor."""
        at = self.pos
        kind = self.number("I", name)
        if kind == _STRING:
            return "str", self.text(name)
        if kind == _ARRAY:
            return self.array(name)
        if kind not in _SCALARS:
            self.fail(name, at, f"has unknown value type {kind}")
        type_name, code = _SCALARS[kind]
        at = self.pos
        value = self.number("B" if kind == _BOOL else code, name)
        if kind == _BOOL:
            if value > 1:
                self.fail(name, at, f"is a bool stored as {value}, expected 0 or 1")
            value = bool(value)
        return type_name, value

    def array(self, name: str) -> tuple[str, MetadataValue]:
        at = self.pos
        kind, length = self.number("I", name), self.number("Q", name)
        if kind == _ARRAY:
            self.fail(name, at, "is an array of arrays, which is not supported")
        if kind == _STRING:
            return "array[str]", self.strings(name, length)
        if kind not in _SCALARS:
            self.fail(name, at, f"is an array of unknown value type {kind}")
        type_name, code = _SCALARS[kind]
        dtype = np.dtype("<" + code)
        start = self.take(length * dtype.itemsize, name)
        if length == 0:
            return f"array[{type_name}]", np.empty(0, dtype)
        values = np.frombuffer(self.data, dtype, length, start)
        if kind == _BOOL and (largest := int(values.view(np.uint8).max())) > 1:
            self.fail(name, start, f"holds a bool stored as {largest}, expected 0 or 1")
        return f"array[{type_name}]", values

    def strings(self, name: str, count: int) -> list[str]:
        """`count` strings. This loop decides how fast a model opens: a vocabulary of 49152 has 98052 of them."""
        at, left = self.pos - 8, self.size - self.pos
        if count > left // 8:
            self.fail(
                name, at, f"has {count} strings, the file has {left} bytes left: malformed, or a truncated download"
            )
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS:
            self.fail(
                name, at, f"brings the strings in arrays to {self.array_strings}, the limit is {MAX_ARRAY_STRINGS}"
            )
        data, record = self.data, self.pos
        end = min(self.size, MAX_HEADER_BYTES, record + 8 * count + MAX_TEXT_BYTES - self.text_bytes)
        length_at = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = record + 8
                if start > end:
                    break
                stop = start + length_at(data, record)[0]
                if stop > end:
                    break
                found.append(data[start:stop].decode())
                record = stop
        except UnicodeDecodeError:
            pass
        self.count_text(record - self.pos - 8 * len(found), name, at)
        self.pos = record
        while len(found) < count:  # the string that ended the loop: text() says what is wrong with it
            found.append(self.text(f"{name}, string {len(found)}"))
        return found

    def reserved_keys(self) -> None:
        """The keys that say how the file itself is laid out."""
        header = self.header
        alignment = header.metadata.get("general.alignment", header.alignment)
        found = header.metadata_types.get("general.alignment", "u32")
        at = header.key_offsets.get("general.alignment")
        if found != "u32" or not isinstance(alignment, int):
            self.fail("key general.alignment", at, f"is of type {found}, expected u32")
        if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
            self.fail("key general.alignment", at, f"is {alignment}, expected a power of two up to {MAX_ALIGNMENT}")
        header.alignment = alignment
        parts, at = header.metadata.get("split.count", 1), header.key_offsets.get("split.count")
        if not isinstance(parts, int):
            self.fail("key split.count", at, f"is of type {header.metadata_types['split.count']}, expected u16")
        if parts > 1:
            self.fail(
                "key split.count",
                at,
                f"is {parts}: one part of a split model, which is not supported: merge the parts with"
                " `llama-gguf-split --merge FIRST_PART OUT.gguf`",
            )

    def tensor_table(self, count: int) -> None:
        infos: dict[str, TensorInfo] = {}
        end, before = 0, "the start of the data"
        for index in range(count):
            info = self.tensor(index)
            name, at = f"tensor {info.name}", self.pos - 8
            if info.name in infos:
                self.fail(name, info.record_offset, f"occurs twice, first at byte {infos[info.name].record_offset}")
            if info.offset % self.header.alignment:
                self.fail(
                    name, at, f"data offset {info.offset} is not a multiple of the alignment {self.header.alignment}"
                )
            if info.offset != end:
                what = "overlaps" if info.offset < end else "leaves a gap after"
                self.fail(name, at, f"data offset {info.offset} {what} {before}, expected {end}")
            infos[info.name] = info
            end, before = self.aligned(info.offset + info.nbytes), name
        self.place(infos)

    def tensor(self, index: int) -> TensorInfo:
        """The record at the cursor, its `offset` still counted from the start of the tensor data."""
        record = self.pos
        text = self.text(f"tensor #{index}", MAX_TENSOR_NAME_BYTES)
        if not text or not text.isprintable() or "/" in text or "\\" in text:
            self.fail(f"tensor #{index}", record, f"its name {_short(text)} is empty, unprintable or a path")
        name, at = f"tensor {text}", self.pos
        n_dims = self.number("I", name)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(name, at, f"has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        at = self.pos
        dims = [self.number("Q", name) for _ in range(n_dims)]
        shape = tuple(reversed(dims))
        if (elements := math.prod(d or 1 for d in dims)) >= 2**63:
            self.fail(name, at, f"has shape {list(shape)}: {elements} elements, the limit is 2^63 - 1")
        at = self.pos
        type_id = self.number("I", name)
        fmt = BY_GGUF_TYPE.get(type_id)
        type_name, block_length, block_bytes = (
            (fmt.name, fmt.block_length, fmt.block_bytes) if fmt else self.foreign_type(name, at, type_id)
        )
        if dims[0] % block_length:
            self.fail(name, at, f"has rows of {dims[0]} numbers, not whole {type_name} blocks of {block_length}")
        nbytes = math.prod(dims) // block_length * block_bytes
        return TensorInfo(text, shape, type_id, type_name, fmt, self.number("Q", name), nbytes, record)

    def foreign_type(self, name: str, at: int, type_id: int) -> tuple[str, int, int]:
        """Name, numbers and bytes per block of a ggml type that has no QuantFormat."""
        if type_id in _REMOVED_TYPES:
            removed = _REMOVED_TYPES[type_id]
            self.fail(name, at, f"is of type {type_id} ({removed}), since removed from GGUF: convert the model again")
        # Imported here because it takes 0.1 s and only files with such types need it. Pyright finds our own gguf.py.
        from gguf.constants import GGML_QUANT_SIZES  # pyright: ignore[reportMissingImports]

        known = next((known for known in GGML_QUANT_SIZES if known == type_id), None)
        if known is None:
            self.fail(name, at, f"is of unknown type {type_id}")
        return known.name, *GGML_QUANT_SIZES[known]

    def place(self, infos: dict[str, TensorInfo]) -> None:
        """Check that the tensors lie within the file and make their offsets count from its start."""
        header, table_end = self.header, self.pos
        start = header.data_offset = self.aligned(table_end)
        if infos and start > self.size:
            self.fail(
                "tensor data", table_end, f"starts at byte {start}, the file has {self.size}: truncated download?"
            )
        if self.data[table_end:start].strip(b"\0"):
            self.fail(
                "tensor data", table_end, f"padding up to byte {start} is not zero: more records than were counted?"
            )
        end = start
        for info in infos.values():
            header.tensors[info.name] = placed = replace(info, offset=start + info.offset)
            end = max(end, placed.offset + placed.nbytes)
        for info in header.tensors.values():
            if (tensor_end := info.offset + info.nbytes) > self.size:
                self.fail(
                    f"tensor {info.name}",
                    info.offset,
                    f"ends at byte {tensor_end}, the file has {self.size} ({end - self.size} are missing in all):"
                    " malformed, or a truncated download",
                )
        header.trailing_bytes = max(0, self.size - self.aligned(end))

    def aligned(self, offset: int) -> int:
        return -(-offset // self.header.alignment) * self.header.alignment


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")
