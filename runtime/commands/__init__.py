"""The commands of `runtime`, one module each.

A command is a module with `HELP` (one line), `EXAMPLE` (one or more command lines, shown by `--help`),
`add_arguments(parser)` and `run(args, out) -> exit status`. Modules are imported to build the parser, so whatever is
heavier than the standard library is imported inside `run`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Protocol

from ..output import Output
from . import backends, bench, compile, conformance, doctor, fpga, generate, inspect, perplexity, plan, pull, tokenize


class Command(Protocol):
    @property
    def HELP(self) -> str: ...
    @property
    def EXAMPLE(self) -> str: ...
    def add_arguments(self, parser: ArgumentParser) -> None: ...
    def run(self, args: Namespace, out: Output) -> int: ...


DEFAULT = "run"
COMMANDS: Mapping[str, Command] = {
    DEFAULT: generate,
    "bench": bench,
    "perplexity": perplexity,
    "tokenize": tokenize,
    "backends": backends,
    "plan": plan,
    "inspect": inspect,
    "pull": pull,
    "conformance": conformance,
    "compile": compile,
    "doctor": doctor,
    "fpga": fpga,
}
