"""Writes any GGUF file, valid or not: `Image` writes what it is told, so a test can say exactly which field lies."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VALUE_TYPES = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9, "u64": 10,
    "i64": 11, "f64": 12,
}  # fmt: skip
CODES = dict(zip(VALUE_TYPES, "BbHhIif?__Qqd", strict=True))
F32, I8, I64 = 0, 24, 27  # ggml types


def u32(number: int) -> bytes:
    return struct.pack("<I", number & 0xFFFFFFFF)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number & 0xFFFFFFFFFFFFFFFF)


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data) if length is None else length) + data


def value(kind: str, content: Any) -> bytes:
    """A value without its type; `kind` as in GGUFFile.metadata_types: "u32", "str", "array[str]"…"""
    if kind.startswith("array["):
        element = kind[6:-1]
        return u32(VALUE_TYPES[element]) + u64(len(content)) + b"".join(value(element, item) for item in content)
    return string(content) if kind == "str" else struct.pack("<" + CODES[kind], content)


@dataclass
class Key:
    name: str | bytes
    kind: str
    content: Any
    type_id: int | None = None  # instead of that of `kind`
    raw: bytes | None = None  # instead of the packed `content`
    name_length: int | None = None  # instead of the true one

    def encode(self) -> bytes:
        type_id = VALUE_TYPES[self.kind.split("[")[0]] if self.type_id is None else self.type_id
        packed = value(self.kind, self.content) if self.raw is None else self.raw
        return string(self.name, self.name_length) + u32(type_id) + packed


@dataclass
class Tensor:
    """`dims` in GGUF order, the row length first. `offset` instead of the next aligned one."""

    name: str | bytes
    dims: Sequence[int]
    type_id: int
    data: bytes = b""
    offset: int | None = None
    n_dims: int | None = None

    def encode(self, offset: int) -> bytes:
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        dims = b"".join(u64(d) for d in self.dims)
        return string(self.name) + u32(n_dims) + dims + u32(self.type_id) + u64(offset)


@dataclass
class Image:
    """A GGUF file. `alignment` lays it out; declare it too, with a key general.alignment, if it is not 32."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    padding: bytes = b"\0"

    def encode(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        head = self.magic + u32(self.version) + u64(n_tensors) + u64(n_keys) + b"".join(k.encode() for k in self.keys)
        data = b""
        for tensor in self.tensors:
            head += tensor.encode(len(data) if tensor.offset is None else tensor.offset)
            data += self.padded(tensor.data)
        return self.padded(head) + data

    def padded(self, data: bytes) -> bytes:
        return data + self.padding * (-len(data) % self.alignment)


def save(folder: Path, content: Image | bytes) -> Path:
    """Write `content` to a file in `folder`."""
    path = folder / "model.gguf"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
