"""Options that several commands share, and the checks on their values."""

from __future__ import annotations

import os
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.errors import ModelError, UsageError
from ..models import DEFAULT_MODEL

if TYPE_CHECKING:
    from ..settings import Settings

MAX_COUNT = 2**31 - 1  # positions and lengths are int32 on the device
MAX_TEXT_BYTES = 8 << 20  # more than any context holds; keeps `yes | runtime -` from filling the memory


def whole(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """An argparse type: a whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ArgumentTypeError(f"expected a whole number from {low} to {high}, got {_shown(text)}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a finite number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:  # also false for NaN
            raise ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {_shown(text)}")
        return value

    return parse


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def name(text: str) -> str:
    """An argparse type: a name that is not empty."""
    if not text.strip():
        raise ArgumentTypeError("expected a name, got an empty string")
    return text


def completes_files(action: Action) -> None:
    """Have shell completion offer file names for this argument (what shtab.FILE holds, without importing shtab)."""
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]


def add_common(parser: ArgumentParser) -> None:
    """Options of every command."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model(parser: ArgumentParser) -> None:
    action = parser.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, type=name, metavar="MODEL",
        help="a GGUF file, a known name, or hf:OWNER/REPO/FILE.gguf (default: %(default)s)",
    )  # fmt: skip
    completes_files(action)


class _Device(Action):
    """`--device NAME`, in whatever order with `--bitstream FILE`: together they are the device NAME:FILE."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        file = getattr(namespace, "bitstream", None)
        namespace.device = f"{values}:{file}" if file else values


class _Bitstream(Action):
    """See `_Device`."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, "bitstream", None)
        named = (namespace.device or "fpga").removesuffix(f":{before}")
        namespace.device, namespace.bitstream = f"{named}:{values}", values


def add_device(parser: ArgumentParser) -> None:
    """Where to run: shared by everything that opens a backend."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--backend", type=name, metavar="NAME", default=os.environ.get("POLYKERN_BACKEND") or "auto",
        help="auto (the fastest for this model), opencl, reference, or a plug-in's name; see `runtime backends`"
        " (default: $POLYKERN_BACKEND, else auto)",
    )  # fmt: skip
    group.add_argument(
        "--device", type=name, metavar="NAME", default=os.environ.get("POLYKERN_DEVICE") or None, action=_Device,
        help="which device of the backend: its number or part of its name (default: $POLYKERN_DEVICE, else the first)",
    )  # fmt: skip
    completes_files(
        group.add_argument(
            "--bitstream", type=name, metavar="FILE", action=_Bitstream,
            help="what an FPGA is loaded with, .aocx or .xclbin, FILE.json beside it; short for --device NAME:FILE"
            " (NAME: fpga unless --device says otherwise)",
        )
    )  # fmt: skip
    group.add_argument("--threads", type=whole(1, 4096), metavar="N", help="threads of a CPU device (default: all)")


def add_session(parser: ArgumentParser) -> None:
    """Everything a loaded model needs to know."""
    add_model(parser)
    add_device(parser)
    group = parser.add_argument_group("session")
    group.add_argument(
        "--precision", choices=("fast", "exact"), default="fast",
        help="fast: activations may be rounded to int8 per block of 32; exact: float32 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--ctx", type=whole(1), metavar="N", help="tokens the KV cache holds (default: by the model)")
    group.add_argument(
        "--fallback", choices=("error", "warn", "allow"), default="warn",
        help="what to do about ops the backend lacks, which then run on the host (default: %(default)s)",
    )  # fmt: skip


def settings_from(args: Namespace) -> Settings:
    """The Settings that `add_session`'s options describe; fetches a model known by name."""
    from ..models import resolve
    from ..progress import ProgressBars
    from ..settings import Settings

    with ProgressBars() as progress:
        path = resolve(args.model, progress)
    chosen = {key: getattr(args, key) for key in ("backend", "device", "threads", "ctx", "fallback", "precision")}
    return Settings(model=path, **chosen)


def open_session(args: Namespace) -> Any:
    """A loaded Session, with progress bars while it maps, packs and compiles."""
    from ..load import load
    from ..progress import ProgressBars

    settings = settings_from(args)
    with ProgressBars() as progress:
        return load(settings, progress=progress)


def text_argument(value: str, option: str) -> str:
    """The text given as `value`, or read from stdin for "-": valid UTF-8 and not empty, else a UsageError."""
    if value == "-":
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1) if sys.stdin else b""
        return decode(data, "stdin")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} is not valid UTF-8 (character {error.start})") from error
    if not value:
        raise UsageError(f"{option} is empty")
    return value


def decode(data: bytes, source: str) -> str:
    """`data` as text; a UsageError that names `source` if it is empty, too long, or not UTF-8."""
    if not data:
        raise UsageError(f"{source} is empty")
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{source} holds more than {MAX_TEXT_BYTES >> 20} MiB of text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UsageError(f"{source} is not valid UTF-8: byte {byte:#04x} at offset {error.start}") from error


def read_file(path: str) -> bytes:
    """The bytes of a small file a user named; ModelError in one line if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
