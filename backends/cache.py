"""Compiled kernels on disk, for backends that compile: one file per kernel, safe to share between processes.

A file `<folder>/<key>.bin` is written to a temporary name and renamed:

    magic              8 bytes
    header length      4 bytes, little-endian
    header             JSON: `fields`, what the kernel was made from, and `sha256`, of the payload
    payload            what the compiler gave; empty where that cannot be loaded again: then the entry only says that
                       this source compiles

`<key>` is the SHA-256 of the fields. An entry that is damaged, cut short, of another format or of another kernel is
removed and counts as absent. A folder that cannot be written, or that others could have written to, costs one warning
and the time to compile.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

_MAGIC = b"PKKERNEL"
_UNUSED_S = 90 * 24 * 3600.0  # sources, drivers and compilers change: what nobody has read for so long goes
_warned: set[str] = set()


def cache_root() -> Path:
    """The folder of everything that is kept: `$POLYKERN_CACHE_DIR`, or the user's cache folder."""
    base = os.environ.get("POLYKERN_CACHE_DIR") or platformdirs.user_cache_dir("polykern")
    return Path(base).expanduser().absolute()


def key_of(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()


class KernelCache:
    """The cache in folder `name` of `cache_root()`; `what` names its content in messages ("TVM kernels")."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    @property
    def path(self) -> Path:
        return cache_root() / self.name

    def load(self, fields: Mapping[str, Any]) -> bytes | None:
        """The payload stored for `fields`, None if there is none that can be trusted."""
        folder = self._folder()
        if folder is None:
            return None
        path = folder / f"{key_of(fields)}.bin"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot read the cache of {self.what} ({error}): compiling instead")
            return None
        payload = _parse(content, fields)
        if payload is None:
            self.discard(fields)
        return payload

    def store(self, fields: Mapping[str, Any], payload: bytes) -> None:
        """Keeps `payload` for `fields`; failing to is a warning."""
        folder = self._folder()
        if folder is None:
            return
        _remove_unused(folder)
        header = _canonical({"fields": fields, "sha256": hashlib.sha256(payload).hexdigest()})
        content = _MAGIC + struct.pack("<I", len(header)) + header + payload
        self._write(folder / f"{key_of(fields)}.bin", content)

    def discard(self, fields: Mapping[str, Any]) -> None:
        """Removes what is stored for `fields`, if anything is."""
        folder = self._folder()
        if folder is not None:
            with suppress(OSError):
                (folder / f"{key_of(fields)}.bin").unlink(missing_ok=True)

    def info(self) -> dict[str, Any]:
        """For `runtime doctor`: `path`, number of `entries`, `bytes` of them, and `problem` ("" if usable)."""
        sizes: list[int] = []
        with suppress(OSError):
            sizes = [file.stat().st_size for file in self.path.glob("*.bin")]
        writable = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        problem = _distrust(self.path) or ("" if os.access(writable, os.W_OK) else f"{writable} is not writable")
        return {"path": str(self.path), "entries": len(sizes), "bytes": sum(sizes), "problem": problem}

    def _folder(self) -> Path | None:
        """The folder, made if need be; None if there is none to trust, or none that can be made."""
        problem = _distrust(self.path)
        if not self.path.is_dir():
            try:
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                problem = f"cannot make {self.path} ({error.strerror})"
        if problem:
            self._warn(f"{self.what} are not cached: {problem}. Set POLYKERN_CACHE_DIR to a folder of your own")
            return None
        return self.path

    def _write(self, path: Path, content: bytes) -> None:
        draft = ""
        try:
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(draft, path)
        except OSError as error:
            if draft:
                with suppress(OSError):
                    os.unlink(draft)
            self._warn(
                f"{self.what} are not cached: cannot write to {path.parent} ({error.strerror}). Free space there or set"
                " POLYKERN_CACHE_DIR"
            )

    def _warn(self, message: str) -> None:
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _parse(content: bytes, fields: Mapping[str, Any]) -> bytes | None:
    start = len(_MAGIC) + 4
    if len(content) < start or not content.startswith(_MAGIC):
        return None
    end = start + struct.unpack_from("<I", content, len(_MAGIC))[0]
    payload = content[end:]
    expected = _canonical({"fields": fields, "sha256": hashlib.sha256(payload).hexdigest()})
    return payload if content[start:end] == expected else None


def _distrust(folder: Path) -> str:
    """Kernels in the folder run with the user's rights, so nobody else may have put them there."""
    try:
        status = folder.stat()
    except OSError:
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"others may write to {folder} (mode {status.st_mode & 0o777:o}; chmod 700)"
    return ""


def _remove_unused(folder: Path) -> None:
    with suppress(OSError):
        for file in folder.iterdir():
            status = file.stat()
            if max(status.st_atime, status.st_mtime) < time.time() - _UNUSED_S:
                file.unlink()
