"""python -m polykern.backends.opencl.fpga: the emulator, and binaries for `--bitstream`.

install                     fetch the emulator into the cache
build -o FILE               compile the kernels on the emulator: FILE and FILE.json
source -o FILE.cl           the kernels as one text for a board's compiler, and FILE.cl.json
manifest FILE --like J      FILE.json for a bitstream built from such a text, J being its FILE.cl.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....kernels.errors import PolykernError, UsageError
from ....kernels.quant import FORMATS
from . import bitstream, emulator, programs
from .engine import EMULATED, Engine

BOARD = {"platform": "Intel(R) FPGA SDK for OpenCL(TM)", "device": "", "driver": ""}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m polykern.backends.opencl.fpga", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("install").set_defaults(run=_install)
    for name, run in (("build", _build), ("source", _source)):
        sub = commands.add_parser(name)
        sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
        sub.add_argument("--formats", type=_formats, default=list(FORMATS), metavar="Q4_1,F16", help="default: all")
        sub.add_argument(
            "--channels", type=_channels, default=EMULATED.channels, help="memory channels (default: %(default)s)"
        )
        sub.set_defaults(run=run)
    sub = commands.add_parser("manifest")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--like", type=Path, required=True, metavar="FILE.cl.json")
    sub.add_argument("--platform", default=BOARD["platform"], help="as OpenCL names it (default: %(default)s)")
    sub.set_defaults(run=_manifest)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (PolykernError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    return names


def _channels(text: str) -> int:
    if text not in ("1", "2", "4", "8", "16", "32"):
        raise argparse.ArgumentTypeError(f"expected 1, 2, 4, 8, 16 or 32 memory channels, got {text!r}")
    return int(text)


def _report(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)


def _install(args: argparse.Namespace) -> int:
    print(emulator.install(_report))
    return 0


def _build(args: argparse.Namespace) -> int:
    from .. import device

    emulator.prepare(_report)
    opened = device.open_device("fpga-emu")
    engine = replace(EMULATED, channels=args.channels)
    binary = bitstream.build(opened, args.formats, engine)
    info = opened.info
    about = {"platform": info.platform, "device": info.name, "driver": info.driver}
    described = bitstream.write(args.output, binary, about, args.formats, engine)
    print(f"{args.output}: {len(binary)} bytes for {', '.join(args.formats)}; {described}")
    return 0


def _source(args: argparse.Namespace) -> int:
    engine = Engine(channels=args.channels)
    numbers = [option[2:].replace("=", " ") for option in engine.options() if option.startswith("-D")]
    head = "".join(f"#define {number}\n" for number in numbers)
    text = head + programs.source(programs.families(args.formats))
    described = bitstream.write(args.output, text.encode(), BOARD, args.formats, engine)
    print(f"{args.output}: {len(text)} bytes for {', '.join(args.formats)}; {described}")
    return 0


def _manifest(args: argparse.Namespace) -> int:
    try:
        like: dict[str, Any] = json.loads(args.like.read_text(encoding="utf-8"))
        formats, engine = _formats(",".join(like["formats"])), Engine(**like["engine"])
        about = {"device": like["device"], "driver": like["driver"], "platform": args.platform}
    except (ValueError, KeyError, TypeError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{args.like} is no manifest of `source`: {error}") from error
    print(bitstream.write_manifest(args.file, about, formats, engine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
