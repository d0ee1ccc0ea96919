"""Intel's FPGA emulation platform, fetched into a folder of its own.

The last of Intel's OpenCL runtimes on PyPI that brings the emulator is three years older than its CPU runtime of today,
and both have libraries of the same names: in one process, or one environment, they would clash. So three wheels are
downloaded by the user's own pip, which keeps index, proxy and offline settings, and the libraries that the emulator
needs are unpacked from them; nothing is installed. The process then offers the OpenCL loader this runtime only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ....kernels.errors import BackendUnavailable
from ....kernels.spi import Progress
from .. import runtimes
from ..environment import cache_root

PLATFORM = "Intel(R) FPGA Emulation Platform for OpenCL(TM)"
VERSION = "2023.2.4"
LOCK_WAIT_S = 900  # another process may be fetching it over a slow line
CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A wheel, and how the names of the files that are kept of it begin."""

    requirement: str
    sha256: str
    nbytes: int
    kept: tuple[str, ...]


WHEELS = (
    Wheel(
        f"intel-opencl-rt=={VERSION}",
        "acf4845b55b4de8b3b752791e3d241673892792bf54ebe5ab105f2ac562ea511",
        233524558,
        ("libintelocl_emu.so", "libcommon_clang.so", "cl.fpga_emu.cfg", "clbltfn", "cllibrary", "__ocl_svml_"),
    ),
    Wheel(
        "intel-cmplr-lib-rt==2024.0.3",
        "3ccb03bceeb89dcf8b4daaad29c0e612a838404e036a2cacf9bc1216149b7fc6",
        69187207,
        ("libimf.so", "libsvml.so", "libirng.so", "libintlc.so.5"),
    ),
    Wheel(
        "tbb==2021.11.0",
        "28a95e924a84dd201d9ea1b51cd89de259a866bafa0a29618f0e61339dd8f71c",
        5374924,
        ("libtbb.so.12", "libtbbmalloc.so.2"),
    ),
)
KEPT_TWICE = (".so.2024", ".so.12.", ".so.2.")  # copies of a library under its full version
DISK_BYTES = 850_000_000  # wheels and what is kept of them, while it is unpacked


def folder() -> Path:
    return cache_root() / f"fpga-emulator-{VERSION}"


def library() -> Path:
    return folder() / "libintelocl_emu.so"


def describe() -> dict[str, object]:
    """For `runtime doctor`."""
    there = library().exists()
    return {"found": there, "folder": str(folder()), "install": "" if there else "make fpga-emulator, or first use"}


def prepare(progress: Progress | None = None) -> None:
    """Fetches the emulator if need be, and makes it the only OpenCL runtime of this process.

    Raises BackendUnavailable where it cannot be had, or if this process has used other runtimes.
    """
    chosen = runtimes.user_choice()
    if chosen and all(runtime.name != "fpga-emu" for runtime in runtimes.find()):
        raise BackendUnavailable(
            f"OCL_ICD_VENDORS is set to {chosen}, so only that is used: unset it for the FPGA emulator"
        )
    install(progress)
    runtime = runtimes.Runtime("fpga-emu", str(library()), f"{folder()}, unpacked from pip packages")
    problem = runtimes.diagnose(runtime).problem  # which the OpenCL loader would not tell
    if problem:
        raise BackendUnavailable(f"the FPGA emulator does not load: {problem}; to fetch it again, remove {folder()}")
    runtimes.restrict(runtime)


def install(progress: Progress | None = None) -> Path:
    """The folder of the emulator's libraries, fetched if it is not there yet. One process at a time."""
    from filelock import FileLock, Timeout

    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise BackendUnavailable(
            f"the FPGA emulator is for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
        )
    if library().exists():
        return folder()
    try:
        folder().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder().with_name(f"{folder().name}.lock"), timeout=LOCK_WAIT_S):
            if not library().exists():  # another process may have fetched it while this one waited
                _install(folder().with_name(f"{folder().name}.part"), progress)
    except Timeout as error:
        raise BackendUnavailable(
            f"another process has been fetching the FPGA emulator for {LOCK_WAIT_S} s; is it stuck?"
        ) from error
    except OSError as error:
        raise BackendUnavailable(
            f"the FPGA emulator cannot be kept in {folder()}: {error.strerror or error}; set POLYKERN_CACHE_DIR to"
            " another folder"
        ) from error
    return folder()


def _install(stage: Path, progress: Progress | None) -> None:
    free = shutil.disk_usage(stage.parent).free
    if free < DISK_BYTES:
        raise BackendUnavailable(
            f"the FPGA emulator needs {DISK_BYTES / 1e6:.0f} MB, {stage.parent} has {free / 1e6:.0f} MB free: free"
            " some, or set POLYKERN_CACHE_DIR to another folder"
        )
    shutil.rmtree(stage, ignore_errors=True)  # of an earlier process that was killed
    stage.mkdir()
    try:
        _fetch(stage, progress)
        shutil.rmtree(folder(), ignore_errors=True)
        (stage / "kept").rename(folder())
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fetch(stage: Path, progress: Progress | None) -> None:
    total, done = sum(wheel.nbytes for wheel in WHEELS), 0
    (stage / "kept").mkdir()
    for wheel in WHEELS:
        path = _download(wheel.requirement, stage, progress, done, total)
        found = _sha256(path)
        if found != wheel.sha256:
            raise BackendUnavailable(
                f"the FPGA emulator: {path.name} has sha256 {found}, expected {wheel.sha256}: the package index or a"
                " proxy changed it"
            )
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.rsplit("/", 1)[-1]
                if (
                    "/data/lib/" in member.filename
                    and name.startswith(wheel.kept)
                    and not any(k in name for k in KEPT_TWICE)
                ):
                    with archive.open(member) as source, (stage / "kept" / name).open("wb") as target:
                        shutil.copyfileobj(source, target, CHUNK)
        path.unlink()
        done += wheel.nbytes
    if progress:
        progress("fetch the FPGA emulator", total, total)


def _download(requirement: str, stage: Path, progress: Progress | None, before: int, total: int) -> Path:
    """Has pip put the wheel of `requirement` into `stage`."""
    if importlib.util.find_spec("pip") is None:
        raise BackendUnavailable(
            f"fetching the FPGA emulator needs pip in {sys.prefix}: run `{sys.executable} -m ensurepip`"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar", "off",
        "--no-input", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries", "2", "-d", str(stage),
        requirement,
    ]  # fmt: skip
    log = stage / "pip.log"
    environment = {**os.environ, "TMPDIR": str(stage)}  # where pip's file grows, which is the progress
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment)
        try:
            while process.poll() is None:
                if progress:
                    progress("fetch the FPGA emulator", min(total - 1, before + max(_sizes(stage), default=0)), total)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "it gave no reason")
        raise BackendUnavailable(
            f"the FPGA emulator could not be fetched: pip says of {requirement}: {told.removeprefix('ERROR: ')[:200]};"
            f" it is needed once ({total / 1e6:.0f} MB): run `make fpga-emulator` with a connection, or copy {folder()}"
            " from a machine that has it"
        )
    return next(stage.glob("*.whl"))


def _sizes(stage: Path) -> Iterator[int]:
    for path in stage.rglob("*.whl"):
        with contextlib.suppress(OSError):
            yield path.stat().st_size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
