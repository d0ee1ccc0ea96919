"""Where a command writes: the answer to stdout, everything else to stderr.

While a command runs, file descriptor 1 points at stderr and only `Output` holds the real stdout, because OpenCL
compilers, drivers and plug-ins print to stdout from C; a JSON document must survive that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TextIO

from .progress import ProgressBars

# A log level: more than information, less than a warning. Shown as a plain line on stderr.
NOTE = 25


class Output:
    """The stdout of one command. `note` is for stderr."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        # Text of a model may hold characters that a terminal in another encoding does not have.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Generator[Output]:
        stdout = sys.stdout
        try:
            redirect = stdout.fileno() == 1
        except (AttributeError, OSError, ValueError):  # captured by a test, closed, or None under `>&-`
            redirect = False
        if not redirect:
            with contextlib.nullcontext(stdout) if stdout else open(os.devnull, "w") as stream:
                yield cls(stream)
            return
        stdout.flush()
        own = os.fdopen(os.dup(1), "w", encoding=stdout.encoding, errors="replace")
        saved = os.dup(1)
        os.dup2(2, 1)
        try:
            yield cls(own)
            own.flush()
        finally:
            with contextlib.suppress(OSError):
                stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            with contextlib.suppress(OSError):  # a reader that went away was reported by the flush above
                own.close()

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    def write(self, text: str) -> None:
        """Text of an answer, shown at once."""
        ProgressBars.clear()
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk behind a redirection
            raise OSError(error.errno, error.strerror, "stdout") from error

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def json(self, document: Any) -> None:
        """The one JSON document, on one line."""
        encoding = (getattr(self.stream, "encoding", None) or "ascii").lower().replace("-", "")
        self.line(json.dumps(plain(document), ensure_ascii=encoding != "utf8", allow_nan=False))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
        """A table; columns named in `right` are aligned to the right. Not cut to a width when piped."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        width = None if self.is_terminal else 10_000
        console = Console(file=self.stream, width=width, highlight=False)
        with console.capture() as captured:
            console.print(table)
        self.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")

    @staticmethod
    def note(text: str) -> None:
        """A remark for the person at the terminal, on stderr."""
        ProgressBars.clear()
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: paths become text, numpy numbers Python's, NaN and infinity null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return str(value)


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: names in a hostile file must not steer a terminal."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in joined)


def size_text(nbytes: float) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
