"""Progress bars on stderr, and only where a person looks at it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def is_watched() -> bool:
    """Whether stderr is a terminal; it may also be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressBars:
    """A kernels.spi.Progress callback: one bar for each `what`; all are gone when the last is full.

    Nothing is drawn, and rich is not even imported, unless stderr is a terminal that can erase a line. A callback that
    outlives its `with` block still works (prefill programs are compiled when the first prompt needs them).

        with ProgressBars() as progress:
            load(settings, progress=progress)
    """

    shown: ClassVar[ProgressBars | None] = None  # whoever draws on the terminal now

    def __init__(self) -> None:
        self.enabled = is_watched() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._bars: RichProgress | None = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.enabled or (total and done >= total and what not in self._tasks):
            return
        bars = self._bars or self._start()
        if what not in self._tasks:
            self._tasks[what] = bars.add_task(what, total=total or None)
        bars.update(self._tasks[what], completed=done, total=total or None)
        if bars.finished:
            self.close()

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        # Not redirecting: `clear` takes the bars away before anything else is written.
        console = Console(stderr=True)
        self._bars = bars = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.clear()
        ProgressBars.shown = self
        bars.start()
        return bars

    def close(self) -> None:
        """Take the bars away; a later call draws new ones."""
        bars, self._bars, self._tasks = self._bars, None, {}
        if bars is not None:
            bars.stop()
        if ProgressBars.shown is self:
            ProgressBars.shown = None

    @classmethod
    def clear(cls) -> None:
        """Take away whatever bars are drawn, so that text can be written."""
        if cls.shown is not None:
            cls.shown.close()
