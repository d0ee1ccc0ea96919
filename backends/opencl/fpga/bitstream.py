"""Program binaries built beforehand, each with a manifest that says what is in it: FILE and FILE.json.

    format_version   1
    binary           bytes and sha256 of FILE
    platform, device, driver   what it is for, as OpenCL names them
    formats          weight formats that it has kernels for
    engine           the numbers its kernels were compiled with (engine.Engine): channels, tile sizes, depths
    kernels          name and arguments of each, in order

What does not fit is said before anything is launched: arguments when it is opened, and by `FpgaBackend.supports` what a
plan needs and a kernel lacks.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....kernels.errors import BackendUnavailable
from ....kernels.quant import FORMATS
from . import programs
from .engine import Engine
from .programs import Family

if TYPE_CHECKING:
    from ..device import OpenedDevice

FORMAT_VERSION = 1
TRIAL_S = 300.0


@dataclass(frozen=True)
class Bitstream:
    """A binary and its manifest, as read and checked."""

    path: Path
    binary: bytes
    sha256: str
    platform: str
    formats: tuple[str, ...]
    engine: Engine
    kernels: Mapping[str, tuple[str, ...]]

    def refusal(self, family: Family) -> str:
        """Why the kernels of `family` cannot be used; empty if they can."""
        missing = [name for name in family.kernels() if name not in self.kernels]
        formats = ", ".join(self.formats)
        return f"{self.path.name} has no kernel {missing[0]}; it was built for {formats}" if missing else ""

    def load(self, opened: OpenedDevice) -> Any:
        """The program on a device, its kernels compared with the manifest. Raises BackendUnavailable."""
        import pyopencl as cl

        _try_in_child(self.path, opened)
        try:
            program = cl.Program(opened.context, [opened.device], [self.binary]).build()
            kernels = {kernel.function_name: kernel.num_args for kernel in program.all_kernels()}
        except cl.Error as error:
            raise BackendUnavailable(f"{self.path} is no program for {opened.info.label}: {_first(error)}") from error
        for name, arguments in self.kernels.items():
            if name not in kernels:
                raise BackendUnavailable(f"{self.path} has no kernel {name}, which its manifest lists")
            if kernels[name] != len(arguments):
                raise BackendUnavailable(
                    f"{self.path}: kernel {name} takes {kernels[name]} arguments, its manifest lists {len(arguments)}"
                )
        return program


def manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read(file: str) -> Bitstream:
    """The bitstream `file` with its manifest. Raises BackendUnavailable in one line for whatever is wrong with them."""
    path = Path(file).expanduser()
    try:
        binary = path.read_bytes()
    except OSError as error:
        raise BackendUnavailable(f"bitstream {path} cannot be read: {error.strerror or error}") from error
    described = manifest_path(path)
    try:
        manifest = json.loads(described.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BackendUnavailable(
            f"{path} has no manifest: {described.name} belongs beside it; `python -m polykern.backends.opencl.fpga`"
            " writes it (build, manifest)"
        ) from None
    except (OSError, ValueError) as error:
        raise BackendUnavailable(f"manifest {described} cannot be read: {error}") from error
    try:
        found = _parse(path, binary, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise BackendUnavailable(f"manifest {described} is not whole: {_lack(error)}") from error
    _check_arguments(described, found.kernels)
    return found


def _lack(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _parse(path: Path, binary: bytes, manifest: Any) -> Bitstream:
    described = manifest_path(path)
    if manifest["format_version"] != FORMAT_VERSION:
        raise BackendUnavailable(
            f"manifest {described} has format version {manifest['format_version']}, this polykern reads"
            f" {FORMAT_VERSION}: build the bitstream again"
        )
    about = manifest["binary"]
    if len(binary) != about["bytes"]:
        raise BackendUnavailable(
            f"{path} has {len(binary)} bytes, its manifest says {about['bytes']}: it is cut short, or another file"
        )
    digest = hashlib.sha256(binary).hexdigest()
    if digest != about["sha256"]:
        raise BackendUnavailable(
            f"{path} has sha256 {digest[:16]}…, its manifest says {str(about['sha256'])[:16]}…: it is damaged, or"
            " another file"
        )
    kernels = {str(kernel["name"]): tuple(map(str, kernel["arguments"])) for kernel in manifest["kernels"]}
    formats = tuple(map(str, manifest["formats"]))
    return Bitstream(
        path, binary, digest, str(manifest["platform"]), formats, _engine(described, manifest["engine"]), kernels
    )


def _engine(described: Path, numbers: Mapping[str, Any]) -> Engine:
    wanted = {field.name for field in fields(Engine)}
    for name in sorted(wanted):
        number = numbers[name]
        if name == "emulated" and isinstance(number, bool):
            continue
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**24:
            raise BackendUnavailable(
                f"manifest {described}: {name} is {number!r}, expected a number from 1 to {2**24 - 1}"
            )
    return Engine(**{name: numbers[name] for name in wanted})


def _check_arguments(described: Path, kernels: Mapping[str, Sequence[str]]) -> None:
    """That every kernel we know takes what we pass, in our order; others are nobody's business."""
    for family in programs.families(FORMATS):
        for name, ours in family.kernels().items():
            theirs = kernels.get(name, ours)
            if len(theirs) != len(ours):
                raise BackendUnavailable(
                    f"manifest {described}: kernel {name} takes {len(theirs)} arguments, this polykern passes"
                    f" {len(ours)}"
                )
            for place, (has, passes) in enumerate(zip(theirs, ours, strict=True)):
                if has != passes:
                    raise BackendUnavailable(
                        f"manifest {described}: kernel {name}: argument {place} is {has!r}, this polykern passes"
                        f" {passes!r}"
                    )


def write(path: Path, binary: bytes, about: Mapping[str, Any], formats: Iterable[str], engine: Engine) -> Path:
    """Writes a binary and its manifest; `about` has platform, device and driver. The path of the manifest."""
    path.write_bytes(binary)
    return write_manifest(path, about, formats, engine)


def write_manifest(path: Path, about: Mapping[str, Any], formats: Iterable[str], engine: Engine) -> Path:
    """Describes the binary at `path`, which holds the families of `formats` compiled with `engine`'s numbers."""
    binary, formats = path.read_bytes(), list(formats)
    manifest = {
        "format_version": FORMAT_VERSION,
        "binary": {"bytes": len(binary), "sha256": hashlib.sha256(binary).hexdigest()},
        **{name: about[name] for name in ("platform", "device", "driver")},
        "formats": formats,
        "engine": asdict(engine),
        "kernels": [
            {"name": name, "arguments": list(arguments)}
            for family in programs.families(formats)
            for name, arguments in family.kernels().items()
        ],
    }
    described = manifest_path(path)
    described.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return described


def build(opened: OpenedDevice, formats: Iterable[str], engine: Engine) -> bytes:
    """The binary of all kernels for `formats`, compiled by the device's own compiler."""
    import pyopencl as cl

    formats = list(formats)
    text = programs.source(programs.families(formats))
    program = opened.build_many({"fpga.bitstream": (text, engine.options())})["fpga.bitstream"]
    binaries: Any = program.get_info(cl.program_info.BINARIES)
    return bytes(binaries[0])


# Some loaders end the process over a binary that is not theirs: the first try is not in ours.
_TRIAL = """
import sys, warnings
import pyopencl as cl
warnings.simplefilter("ignore")
path, platform, name = sys.argv[1:]
devices = [d for p in cl.get_platforms() if p.name.strip() == platform for d in p.get_devices()]
device = next(d for d in devices if d.name.strip() == name)
try:
    cl.Program(cl.Context([device]), [device], [open(path, "rb").read()]).build().all_kernels()
except cl.Error as error:
    sys.exit("said " + str(error).strip().splitlines()[0])
"""


def _try_in_child(path: Path, opened: OpenedDevice) -> None:
    info = opened.info
    command = [sys.executable, "-c", _TRIAL, str(path.absolute()), info.platform, info.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        raise BackendUnavailable(
            f"{path} is no program for {info.label}: loading it took more than {TRIAL_S:g} s"
        ) from None
    if done.returncode:
        said = next((line[5:] for line in done.stderr.splitlines() if line.startswith("said ")), "")
        how = said or f"its loader ended with status {done.returncode}"
        raise BackendUnavailable(f"{path} is no program for {info.label}: {how}")


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
