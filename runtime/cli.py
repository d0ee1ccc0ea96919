"""The console script `runtime`: parser, default command, and what an error looks like.

Exit status: 0 done, 1 a named error (one line on stderr), 2 wrong usage, 130 interrupted, 141 the reader of stdout
went away.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

from ..kernels.errors import PolykernError, UsageError
from .commands import COMMANDS, DEFAULT
from .commands.options import add_common
from .output import NOTE, Output, one_line
from .progress import ProgressBars

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
READER_GONE = 141  # 128 + SIGPIPE

DESCRIPTION = "Run a language model through a backend chosen when it is loaded."
EPILOG = """\
`run` is the default command: `runtime "Why is the sky blue?"`. `runtime COMMAND --help` has the options and an example.

environment:
  POLYKERN_BACKEND    default of --backend
  POLYKERN_DEVICE     default of --device
  POLYKERN_CACHE_DIR  where models and compiled kernels are kept
  POLYKERN_BACKENDS   plug-ins that may be loaded, comma-separated (unset: all)

exit status: 0 done, 1 an error, named in one line on stderr, 2 wrong usage, 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors, so that they take one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"polykern {version('polykern')}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        import shtab

        print(shtab.complete(parser, shell=values))
        parser.exit()


def build_parser() -> Parser:
    """The parser of `runtime` with a subparser for each command."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("runtime", description=DESCRIPTION, epilog=EPILOG, **layout)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), metavar="SHELL",
        help="print a completion script for bash, zsh or tcsh",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        examples = "".join(f"\n  {line}" for line in command.EXAMPLE.strip().splitlines())
        sub = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=f"example:{examples}\n", **layout
        )
        command.add_arguments(sub)
        add_common(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return parser


def _takes_value() -> set[str]:
    """Option strings, of any command, that are followed by a value."""
    found: set[str] = set()
    for command in COMMANDS.values():
        sub = Parser(add_help=False)
        command.add_arguments(sub)
        for option, action in sub._option_string_actions.items():  # no public way to ask
            if action.nargs != 0:
                found.add(option)
    return found


def command_first(arguments: Sequence[str]) -> list[str]:
    """`arguments` with their command in front: found behind leading options, or the default command."""
    takes_value, skip = _takes_value(), False
    for place, argument in enumerate(arguments):
        if skip:
            skip = False
        elif argument == "--":
            break
        elif place == 0 and argument.split("=")[0] in ("-h", "--help", "--version", "--print-completion"):
            return list(arguments)
        elif argument.startswith("-") and argument != "-" and " " not in argument:
            skip = argument in takes_value
        elif argument in COMMANDS:
            return [argument, *arguments[:place], *arguments[place + 1 :]]
        else:
            break
    return [DEFAULT, *arguments]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of one command line. Raises UsageError, with what `--help` to look at."""
    args, unknown = build_parser().parse_known_args(command_first(arguments))
    if unknown:
        unquoted = args.parser.prog.endswith(f" {DEFAULT}") and not any(word.startswith("-") for word in unknown)
        hint = "; put a prompt of several words in quotes" if unquoted else ""
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = parse(arguments)
        with remarks(debug), Output.open() as out:
            status = args.run(args, out)
    except SystemExit as stop:  # --help and --version
        status = stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        _report("", debug)
        return INTERRUPTED
    except BrokenPipeError:
        status = READER_GONE
    except PolykernError as error:
        status = _report(f"error: {error}", debug, error.exit_status)
    except MemoryError as error:
        status = _report(f"error: out of memory{f': {error}' if str(error) else ''}", debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        status = _report(f"error: {where}{error.strerror or error}", debug)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line, not a traceback
        problem = f"{type(error).__name__}: {error}"
        status = _report(f"internal error: {problem}; rerun with --debug and report it", debug)
    return _flush(status)


def _report(problem: str, debug: bool, status: int = 1) -> int:
    ProgressBars.clear()
    with contextlib.suppress(OSError):
        if debug:
            import traceback

            traceback.print_exc()
        print(f"runtime: {one_line(problem)}" if problem else "", file=sys.stderr, flush=True)
    return status


class _Remark(logging.Handler):
    """A log record as one line on stderr, like errors."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == NOTE else f"{record.levelname.lower()}: "
        Output.note(f"runtime: {level}{one_line(record.getMessage())}")


@contextlib.contextmanager
def remarks(debug: bool) -> Generator[None]:
    """Show what our own code logs and warns of; with `debug` everything, also the warnings of libraries."""
    handler, logger = _Remark(), logging.getLogger("polykern")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else NOTE)
    logger.addHandler(handler)
    logger.propagate = False
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"polykern\.")
        warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _flush(status: int) -> int:
    """Flush stdout now: at interpreter exit a reader that went away would print a message of Python's own."""
    if sys.stdout is None:
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE if isinstance(error, BrokenPipeError) else _report(f"error: stdout: {error.strerror}", False)
    return status
