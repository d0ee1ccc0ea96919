"""Compiled OpenCL programs on disk.

One file per program, `programs/<key>.bin` under `environment.cache_root()`, written to a temporary name and renamed, so
that processes can share the folder:

    magic              8 bytes
    header length      4 bytes, little-endian
    header             JSON: `fields`, what the program was made from, and `sha256`, of the payload
    payload            the device's binary; empty where the device cannot load its own binaries: then the entry
                       only says that this source compiles

`<key>` is the SHA-256 of the fields. An entry that is damaged, cut short, of another format or of another program is
removed and counts as absent. A folder that cannot be written, or that others could have written to, costs one warning
and the time to compile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .environment import cache_root

FORMAT = 1
_MAGIC = b"PKCLBIN\n"
_UNUSED_S = 90 * 24 * 3600.0  # sources, drivers and compilers change: what nobody has read for so long goes
_warned: set[str] = set()


def key_of(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()


def load(fields: Mapping[str, Any]) -> bytes | None:
    """The payload stored for `fields`, None if there is none that can be trusted."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{key_of(fields)}.bin"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"cannot read the OpenCL program cache ({error}): compiling instead")
        return None
    payload = _parse(content, fields)
    if payload is None:
        discard(fields)
    return payload


def store(fields: Mapping[str, Any], payload: bytes) -> None:
    """Keeps `payload` for `fields`; failing to is a warning."""
    folder = _folder()
    if folder is None:
        return
    _remove_unused(folder)
    header = _canonical({"fields": fields, "sha256": hashlib.sha256(payload).hexdigest()})
    content = _MAGIC + struct.pack("<I", len(header)) + header + payload
    _write(folder / f"{key_of(fields)}.bin", content)


def discard(fields: Mapping[str, Any]) -> None:
    folder = _folder()
    if folder is not None:
        with suppress(OSError):
            (folder / f"{key_of(fields)}.bin").unlink(missing_ok=True)


def save_log(label: str, fields: Mapping[str, Any], text: str) -> Path | None:
    """Keeps a build log, `logs/<label>-<start of the key>.log`; None if it cannot be kept."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", label)[:80]
    path = cache_root() / "logs" / f"{name}-{key_of(fields)[:12]}.log"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text, encoding="utf-8", errors="replace")
        return path
    return None


def cache_info() -> dict[str, Any]:
    """For `runtime doctor`: `path`, number of `entries`, `bytes` of them, and `problem` ("" if usable)."""
    root = cache_root()
    sizes: list[int] = []
    with suppress(OSError):
        sizes = [file.stat().st_size for file in (root / "programs").glob("*.bin")]
    writable = next(folder for folder in (root / "programs", *(root / "programs").parents) if folder.exists())
    problem = _distrust(root / "programs") or ("" if os.access(writable, os.W_OK) else f"{writable} is not writable")
    return {"path": str(root), "entries": len(sizes), "bytes": sum(sizes), "problem": problem}


def clear() -> int:
    """Removes all programs and logs, PoCL's unpacked copies too, and returns how many programs that were.

    Not while something runs on PoCL: it opens a kernel's file when the kernel is first launched.
    """
    entries = cache_info()["entries"]
    for name in ("programs", "logs", "pocl"):
        shutil.rmtree(cache_root() / name, ignore_errors=True)
    return entries


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


def _folder() -> Path | None:
    """The folder of programs, made if need be; None if there is none to trust, or none that can be made."""
    folder = cache_root() / "programs"
    problem = _distrust(folder)
    if not folder.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            problem = f"cannot make {folder} ({error.strerror})"
    if problem:
        _warn(f"OpenCL programs are not cached: {problem}. Set POLYKERN_CACHE_DIR to a folder of your own")
        return None
    return folder


def _distrust(folder: Path) -> str:
    """Programs in the folder run with the user's rights, so nobody else may have put them there."""
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


def _write(path: Path, content: bytes) -> None:
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
        _warn(f"OpenCL programs are not cached: cannot write to {path.parent} ({error.strerror})")


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
