"""Which OpenCL runtimes this machine has, and handing them to the loader.

OpenCL finds its runtimes through `.icd` files: one file per runtime, holding the path of a shared library. Two things
are wrong with what pip installs: the file of Intel's runtime (`intel-opencl-rt`) names a build machine's folder, and
the loader inside PyOpenCL's wheel (ocl-icd) only looks in /etc/OpenCL/vendors. So `prepare` looks for the libraries
itself, writes a folder of correct `.icd` files and names it in `OCL_ICD_VENDORS`, which the loader reads once, at the
first platform query of the process. A user who sets that variable decides alone: nothing is added or removed.

PyPI's `pocl-binary-distribution` is not looked for: its PoCL 3.0 ends the process on kernels with `vload_half16`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .environment import cache_root, prepare_pocl, prepare_pyopencl, temporary_folder

INSTALL = {
    "intel": "pip install 'polykern[cpu]'  (Intel's CPU runtime; x86-64, AMD too)",
    "pocl": "apt install pocl-opencl-icd",
    "oclgrind": "apt install oclgrind  (a checker, slow: used only with --device oclgrind)",
}
INSTALL_ANY = "pip install 'polykern[cpu]' (x86-64, Intel's runtime) or apt install pocl-opencl-icd"

_SYSTEM_FOLDER = Path("/etc/OpenCL/vendors")
_OCLGRIND = (
    "/usr/lib/x86_64-linux-gnu/oclgrind/liboclgrind-rt-icd.so",
    "/usr/lib/aarch64-linux-gnu/oclgrind/liboclgrind-rt-icd.so",
    "/usr/lib/oclgrind/liboclgrind-rt-icd.so",
)
_NAMES = {"libintelocl": "intel", "libpocl": "pocl", "liboclgrind-rt-icd": "oclgrind", "libintelocl_emu": "fpga-emu"}
_PLACEHOLDER = "anaconda1anaconda2anaconda3"  # in the .icd files of Intel's wheels, replaced by conda only
# Which package brings a library that Intel's runtime was linked against.
_PACKAGE_OF = {
    "libimf": "intel-cmplr-lib-rt",
    "libsvml": "intel-cmplr-lib-rt",
    "libirng": "intel-cmplr-lib-rt",
    "libintlc": "intel-cmplr-lib-rt",
    "libtbb": "tbb",
    "libcommon_clang": "intel-opencl-rt",
}
_ours: str | None = None  # the OCL_ICD_VENDORS that `prepare` wrote


@dataclass(frozen=True)
class Runtime:
    """One OpenCL runtime: a library that the loader can open, or `problem`, the reason why it cannot."""

    name: str  # "intel", "pocl", "oclgrind", otherwise the library's name without "lib"
    library: str  # an absolute path; a bare name where the system's .icd file leaves the search to the linker
    source: str  # the package, .icd file or variable that named it
    problem: str = ""


_only: list[Runtime] = []  # what `restrict` was given


def restrict(runtime: Runtime) -> None:
    """Makes `runtime` the only one of this process, for those that do not go together with others. Call it first."""
    _only[:] = [runtime]


def restricted_to() -> str:
    """The name of the only runtime that this process may have, "" if it may have any."""
    return _only[0].name if _only else ""


def prepare(*, include_oclgrind: bool = False) -> list[Runtime]:
    """Points the loader at every usable runtime and returns them. Call it before the first platform query.

    May be called any number of times. `include_oclgrind` adds the checker, and works only before that first query.
    """
    global _ours  # noqa: PLW0603 - the environment it mirrors is as global
    found = find(include_oclgrind=include_oclgrind)
    usable = [runtime for runtime in found if not runtime.problem]
    if not user_choice() and usable:
        _ours = str(_icd_folder(usable))
        os.environ["OCL_ICD_VENDORS"] = _ours
    if any(runtime.name == "pocl" for runtime in usable):
        prepare_pocl()
    prepare_pyopencl()
    return usable


def find(*, include_oclgrind: bool = False) -> list[Runtime]:
    """Every runtime that is installed or named somewhere, the first of each name; broken ones carry a `problem`."""
    chosen = user_choice()
    if _only and not chosen:
        candidates = list(_only)
    elif chosen:
        candidates = _from_icd_path(Path(chosen))
    else:
        candidates = [*_from_pip(), *_from_folder(_SYSTEM_FOLDER)]
        candidates += _from_folder(Path(sys.prefix) / "etc" / "OpenCL" / "vendors")  # conda
        if include_oclgrind:
            candidates += _oclgrind()
    unique: dict[str, Runtime] = {}
    for runtime in candidates:
        # Two copies of one runtime would share symbols and thread pools inside one process: one of each name.
        if runtime.name not in unique or (unique[runtime.name].problem and not runtime.problem):
            unique[runtime.name] = runtime
    return list(unique.values())


def diagnose(runtime: Runtime) -> Runtime:
    """Opens the library as the loader will, which says nothing when it fails; the answer carries the `problem`."""
    if runtime.problem:
        return runtime
    try:
        ctypes.CDLL(runtime.library)
    except OSError as error:
        problem = " ".join(str(error).split())
        package = next((p for library, p in _PACKAGE_OF.items() if problem.startswith(library)), None)
        if package and runtime.name == "intel":
            problem += f" (pip install {package})"
        return replace(runtime, problem=problem)
    return runtime


def describe() -> list[dict[str, object]]:
    """Rows for `runtime doctor`: `name found library source problem install`, the well-known names always there."""
    found = {runtime.name: diagnose(runtime) for runtime in find(include_oclgrind=True)}
    rows: list[dict[str, object]] = []
    for name in [*INSTALL, *(name for name in found if name not in INSTALL)]:
        runtime = found.get(name, Runtime(name, "", "", "not installed"))
        rows.append(
            {
                "name": name,
                "found": not runtime.problem,
                "library": runtime.library,
                "source": runtime.source,
                "problem": runtime.problem,
                "install": INSTALL.get(name, "") if runtime.problem else "",
            }
        )
    return rows


def explain_absence() -> str:
    """Why no device was found: each runtime with its problem, then what to install. One line."""
    chosen = user_choice()
    reasons = [f"{runtime.name} ({runtime.library}): {diagnose(runtime).problem or 'no device'}" for runtime in find()]
    if chosen:
        reasons.insert(0, f"OCL_ICD_VENDORS is set to {chosen}, so only that is used (unset it to search)")
    if not reasons:
        reasons = ["no OpenCL runtime is installed"]
    return "; ".join(reasons) + f". Install one with: {INSTALL_ANY}"


def user_choice() -> str | None:
    """The user's own OCL_ICD_VENDORS (or ocl-icd's older OPENCL_VENDOR_PATH), None if unset or written by us."""
    value = os.environ.get("OCL_ICD_VENDORS") or os.environ.get("OPENCL_VENDOR_PATH")
    return None if value == _ours else value


def _name_of(library: str) -> str:
    stem = Path(library).name.split(".so")[0]
    return _NAMES.get(stem, stem.removeprefix("lib"))


def _from_pip() -> list[Runtime]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution("intel-opencl-rt")
        for file in package.files or []:
            if file.name == "libintelocl.so":
                path = Path(os.path.normpath(str(file.locate())))
                source = f"pip package intel-opencl-rt {package.version}"
                problem = "" if path.exists() else "listed by its package, but the file is gone"
                return [Runtime("intel", str(path), source, problem)]
    path = Path(sys.prefix) / "lib" / "libintelocl.so"
    return [Runtime("intel", str(path), str(path.parent))] if path.exists() else []


def _from_folder(folder: Path) -> list[Runtime]:
    try:
        files = sorted(folder.glob("*.icd"))
    except OSError:
        return []
    return [runtime for file in files if (runtime := _from_icd_file(file)) is not None]


def _from_icd_file(file: Path) -> Runtime | None:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        return Runtime(file.stem, "", str(file), f"cannot read {file}: {error.strerror}")
    library = lines[0].strip()
    if not library or _PLACEHOLDER in library:
        return None
    gone = os.path.isabs(library) and not os.path.exists(library)
    return Runtime(_name_of(library), library, str(file), f"{library} does not exist" if gone else "")


def _from_icd_path(path: Path) -> list[Runtime]:
    """What ocl-icd makes of OCL_ICD_VENDORS: a folder, one .icd file, or a library."""
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".icd":
        runtime = _from_icd_file(path)
        return [] if runtime is None else [runtime]
    return [Runtime(_name_of(str(path)), str(path), "OCL_ICD_VENDORS")]


def _oclgrind() -> list[Runtime]:
    path = next((path for path in _OCLGRIND if os.path.exists(path)), None)
    return [] if path is None else [Runtime("oclgrind", path, "system package oclgrind")]


def _icd_folder(runtimes: list[Runtime]) -> Path:
    """A folder with exactly these runtimes, named by its content, so that processes with other sets do not collide."""
    files = {f"{runtime.name}.icd": runtime.library for runtime in runtimes}
    digest = hashlib.sha256("\n".join(f"{name}={library}" for name, library in sorted(files.items())).encode())
    folder = cache_root() / "icd" / digest.hexdigest()[:16]
    try:
        if _holds(folder, files):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = _write(Path(tempfile.mkdtemp(dir=folder.parent)), files)
        shutil.rmtree(folder, ignore_errors=True)  # present but different: edited or damaged
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft, ignore_errors=True)
        if _holds(folder, files):
            return folder
    except OSError:
        pass  # no cache folder to write to
    return _write(temporary_folder("polykern-icd-"), files)


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, library in files.items():
        (folder / name).write_text(library, encoding="utf-8")
    return folder


def _holds(folder: Path, files: dict[str, str]) -> bool:
    try:
        return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()} == files
    except (OSError, UnicodeDecodeError):
        return False
