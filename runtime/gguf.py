"""GGUF model files: what a model says about itself, and its tensors as views of the memory-mapped file.

`GGUFFile.open` checks the whole structure first (policy and limits: `gguf_header`) and raises nothing but
ModelFormatError. Values are checked when they are asked for: the type and range of a key by `get`, NaN and infinity in
a tensor by `check_finite`.

A file that another process truncates while it is mapped ends this process with SIGBUS. The size is compared again
after mapping and before each tensor is handed out, which narrows that window but cannot close it.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NoReturn, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ..kernels.errors import ModelError, ModelFormatError
from ..kernels.quant import FORMATS, QuantFormat, Weight
from .gguf_header import HEADER_BYTES, Header, TensorInfo, check_start, read_header

T = TypeVar("T", int, float, bool, str)
D = TypeVar("D")

_KINDS: dict[type, tuple[str, tuple[str, ...]]] = {
    int: ("an integer", ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")),
    float: ("a float", ("f32", "f64")),
    bool: ("a bool", ("bool",)),
    str: ("a string", ("str",)),
}
_REQUIRED: Any = object()

# Unsigned dtype and exponent bits of the float types in a block: all of them set means NaN or infinity.
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_CHUNK_BLOCKS = 1 << 20  # blocks that check_finite looks at together


class GGUFFile:
    """An open model file: metadata, tensor table, and views of the tensors; remembers what was asked for.

    `metadata` maps keys to values in file order (arrays of numbers are read-only numpy views), `metadata_types` to
    "u32", "str", "array[str]" and so on. Use `get` and `get_array` rather than `metadata` where a key is needed: they
    check its type and mark it as consumed, as `weight` and `array` do for tensors. `unconsumed` then lists what the
    caller never asked for and did not `ignore`.
    """

    def __init__(self, path: str, mapped: mmap.mmap, header: Header) -> None:
        self.path = path
        self.file_size = len(mapped)
        self.version, self.alignment = header.version, header.alignment
        self.data_offset, self.trailing_bytes = header.data_offset, header.trailing_bytes
        self.metadata, self.metadata_types = header.metadata, header.metadata_types
        self.key_offsets = header.key_offsets
        self.tensors: dict[str, TensorInfo] = header.tensors
        self.ignored: dict[str, str] = {}
        self._consumed = {"general.alignment", "split.no", "split.count", "split.tensors.count"}
        self._mapped: mmap.mmap | None = mapped

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map and check the file at `path`; ModelFormatError if it is not one we can read."""
        shown = _printable(os.fspath(path)) or "''"
        try:
            # Opening a FIFO for reading would wait for a writer.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ModelFormatError(shown, "file", None, f"cannot be opened: {_reason(error)}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise ModelFormatError(shown, "file", None, f"is {kind}: name a .gguf file")
            check_start(shown, os.read(fd, HEADER_BYTES), status.st_size)
            mapped = mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file shrank since fstat
            raise ModelFormatError(shown, "file", None, f"cannot be read: {_reason(error)}") from error
        finally:
            os.close(fd)
        opened = cls(shown, mapped, read_header(shown, mapped))
        opened.check_unchanged()
        return opened

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping. Arrays already handed out stay valid: it is unmapped with the last of them."""
        self._mapped = None

    def check_unchanged(self) -> mmap.mmap:
        """The mapping, after making sure that the file still has the size it was opened with."""
        if self._mapped is None:
            raise ModelError(f"{self.path}: the model file was already closed")
        if (size := self._mapped.size()) != self.file_size:
            self._fail("file", None, f"changed from {self.file_size} to {size} bytes while it was open")
        return self._mapped

    # Metadata

    @overload
    def get(self, key: str, kind: type[T], *, low: float = ..., high: float = ...) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D, *, low: float = ..., high: float = ...) -> T | D: ...
    def get(
        self, key: str, kind: type[Any], default: Any = _REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> Any:
        """The value of `key` as an int, float, bool or str, or `default` where the file has no such key.

        An int may be stored in any integer type, a float in f32 or f64. A number outside [low, high], or a float that
        is not finite, is refused.
        """
        value = self._value(key, kind, default)
        if key in self.metadata and kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
            bounds = (f"at least {low}" if low > -math.inf else "", f"at most {high}" if high < math.inf else "")
            expected = " and ".join(filter(None, bounds)) or "a finite number"
            self._fail(f"key {key}", self.key_offsets[key], f"is {value}, expected {expected}")
        return value

    @overload
    def get_array(self, key: str, kind: type[str]) -> list[str]: ...
    @overload
    def get_array(self, key: str, kind: type[str], default: D) -> list[str] | D: ...
    @overload
    def get_array(self, key: str, kind: type[int] | type[float] | type[bool]) -> NDArray[Any]: ...
    @overload
    def get_array(self, key: str, kind: type[int] | type[float] | type[bool], default: D) -> NDArray[Any] | D: ...
    def get_array(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The array `key` of strings (a list) or numbers (a read-only 1-D array of the stored dtype)."""
        return self._value(key, kind, default, array=True)

    def _value(self, key: str, kind: type[Any], default: Any, array: bool = False) -> Any:
        noun, allowed = _KINDS[kind]
        expected = f"an array with {noun} in each place" if array else noun
        if key not in self.metadata:
            if default is _REQUIRED:
                raise ModelError(f"{self.path}: key {key} is missing, expected {expected}")
            return default
        found = self.metadata_types[key]
        if found not in ([f"array[{name}]" for name in allowed] if array else allowed):
            self._fail(f"key {key}", self.key_offsets[key], f"expected {expected}, found {found}")
        self._consumed.add(key)
        return self.metadata[key]

    # Tensors

    def tensor(self, name: str) -> TensorInfo:
        """The record of tensor `name`; ModelError if there is none."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: tensor {name} is missing; the file has {len(self.tensors)} tensors")
        return self.tensors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of tensor `name`: a read-only uint8 [nbytes] view of the file."""
        info = self.tensor(name)
        mapped = self.check_unchanged()
        return np.frombuffer(mapped, np.uint8, info.nbytes, info.offset) if info.nbytes else np.empty(0, np.uint8)

    def weight(self, name: str) -> Weight:
        """The matrix `name` [out_features, in_features] as stored, without a copy."""
        info = self.tensor(name)
        if len(info.shape) != 2:
            self._fail(f"tensor {name}", info.record_offset, f"expected a matrix, found shape {list(info.shape)}")
        return self._matrix(info)

    def array(self, name: str) -> NDArray[np.float32]:
        """Tensor `name` of any shape as float32, dequantised; a view of the file where it is stored as F32."""
        info = self.tensor(name)
        dense = self._matrix(info).dense(np.float32).reshape(info.shape)
        return np.require(dense, requirements="A")  # general.alignment may be less than 4

    def _matrix(self, info: TensorInfo) -> Weight:
        """Tensor `info` with all dimensions but the last taken together as rows."""
        fmt = self._format(info)
        rows, columns = info.size // info.shape[-1], info.shape[-1]
        data = self.raw(info.name).reshape(rows, fmt.row_bytes(columns))
        self._consumed.add(info.name)
        return Weight(fmt, (rows, columns), data)

    def _format(self, info: TensorInfo) -> QuantFormat:
        if info.size == 0:
            self._fail(f"tensor {info.name}", info.record_offset, f"is empty: shape {list(info.shape)}")
        if info.format is None:
            raise ModelError(
                f"{self.path}: tensor {info.name} is stored as {info.type_name}, which is not supported:"
                f" requantise the model to one of {' '.join(FORMATS)}"
            )
        return info.format

    def check_finite(self, name: str) -> None:
        """Refuse tensor `name` if a block scale or minimum (in a float format: a value) is NaN or infinite.

        Reads only those fields. Of a type without a QuantFormat nothing is known that could be checked.
        """
        info = self.tensor(name)
        fmt = info.format
        if fmt is None or info.size == 0:
            return
        blocks = info.nbytes // fmt.block_bytes
        for field in fmt.fields:
            if not fmt.is_float and field.kind not in ("scale", "min"):
                continue
            dtype, exponent = _EXPONENTS[fmt.name if fmt.is_float else "F16"]
            for first in range(0, blocks, _CHUNK_BLOCKS):
                count = min(_CHUNK_BLOCKS, blocks - first)
                start = info.offset + first * fmt.block_bytes + field.offset
                bits = np.ndarray((count,), dtype, self.check_unchanged(), start, (fmt.block_bytes,))
                bad = (bits & exponent) == exponent
                if bad.any():
                    place = int(bad.argmax())
                    what = f"value {first + place}" if fmt.is_float else f"field {field.name} of block {first + place}"
                    self._fail(f"tensor {name}", start + place * fmt.block_bytes, f"{what} is NaN or infinite")

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give the memory that these tensors (None: all of the file) take up back, where the system can.

        Only the pages go, not the views: who looks at one again has it read from the file once more.
        """
        mapped = self.check_unchanged()
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        if names is None:
            mapped.madvise(mmap.MADV_DONTNEED)
            return
        for info in map(self.tensor, names):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE  # a page shared with a neighbour is read again, too
            if info.nbytes:
                mapped.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    # What was used

    def ignore(self, pattern: str, reason: str) -> None:
        """Declare that the keys and tensors whose name matches the shell-style `pattern` are knowingly not used."""
        for name in (*self.metadata, *self.tensors):
            if fnmatchcase(name, pattern):
                self.ignored.setdefault(name, reason)

    def unconsumed(self) -> list[str]:
        """What was neither asked for nor ignored, in file order: "key …" and "tensor …"."""
        done = self._consumed | self.ignored.keys()
        return [f"key {k}" for k in self.metadata if k not in done] + [
            f"tensor {t}" for t in self.tensors if t not in done
        ]

    def _fail(self, field: str, offset: int | None, problem: str) -> NoReturn:
        raise ModelFormatError(self.path, field, offset, problem)


def _printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped: a message is one line, whatever the path."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _reason(error: Exception) -> str:
    """What the system says, without the path that the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
