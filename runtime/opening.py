"""Opening the backend that the user chose; for "auto" the fastest, and a word where it came down to its last resort."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..backends import candidates, open_backend, open_first, probe
from ..backends.registry import AUTO
from ..kernels.errors import BackendUnavailable
from ..kernels.spi import LAST_RESORT, Backend, OpenOptions, Progress
from .choice import Choice, Question, Speed, ask, choose, recall
from .config import ModelConfig
from .settings import Settings

logger = logging.getLogger(__name__)

# (settings with a backend's name, environment for its process) -> speed, and the layers it was measured on
Measure = Callable[[Settings, Mapping[str, str]], tuple[Speed, str]]


def open_for_model(
    settings: Settings,
    config: ModelConfig,
    ctx: int,
    *,
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> tuple[Backend, Choice | None]:
    """The backend of `settings`; for "auto" the fastest for this model, with what that was decided on.

    With fewer than two candidates that have a device here, nothing is measured and the choice is None. `measure`
    defaults to that of measure.py.
    """
    if settings.backend != AUTO:
        return _open(settings.backend, settings, progress), None
    able = [c for c in candidates() if c.provider and c.order < LAST_RESORT]
    choice = None
    if len(able) > 1:
        question = ask(settings, config, ctx, [(c.name, c.version) for c in able])
        stale = recall(question)
        if stale and stale.holds and (backend := _as_remembered(stale, settings, progress)):
            return backend, stale
        environment = dict(os.environ)  # before backends set variables of their drivers
        names = [c.name for c in able if not probe(c.entry).reason]
        if len(names) > 1:
            choice = _measured(question, names, replace(settings, ctx=ctx), environment, stale, progress, measure)
    problems: dict[str, str] = {}
    if choice and choice.backend:
        try:
            return _open(choice.backend, settings, progress), choice
        except BackendUnavailable as error:
            problems = {choice.backend: str(error)}
    elif choice:
        problems = {speed.backend: speed.problem for speed in choice.speeds}
    return _first(OpenOptions(settings.device, settings.threads, progress), problems), None


def _measured(
    question: Question,
    names: Sequence[str],
    settings: Settings,
    environment: Mapping[str, str],
    stale: Choice | None,
    progress: Progress | None,
    measure: Measure | None,
) -> Choice:
    from . import measure as default

    def report(done: int) -> None:
        if progress:
            progress("measure backends", done, len(names))

    def speed(name: str) -> tuple[Speed, str]:
        report(names.index(name))
        return (measure or default.measure)(replace(settings, backend=name), environment)

    choice = choose(question, names, speed, stale)
    report(len(names))
    return choice


def open_chosen(
    name: str, *, device: str | None = None, threads: int | None = None, progress: Progress | None = None
) -> Backend:
    """`open_backend`, where there is no model to choose for: "auto" is the first that opens."""
    if name != AUTO:
        return open_backend(name, device=device, threads=threads, progress=progress)
    return _first(OpenOptions(device, threads, progress), {})


def _first(options: OpenOptions, problems: Mapping[str, str]) -> Backend:
    """`open_first`; where only the last resort is left, one warning says why."""
    opened = open_first(options, problems)
    if opened.passed_over and opened.order >= LAST_RESORT:
        logger.warning("auto chose %s, its last resort: %s", opened.backend.name, "; ".join(opened.passed_over))
    return opened.backend


def _open(name: str, settings: Settings, progress: Progress | None) -> Backend:
    return open_backend(name, device=settings.device, threads=settings.threads, progress=progress)


def _as_remembered(choice: Choice, settings: Settings, progress: Progress | None) -> Backend | None:
    """The chosen backend, opened, if it still opens the device it was chosen for."""
    try:
        backend = _open(choice.backend, settings, progress)
    except BackendUnavailable as error:
        logger.debug("auto: %s was chosen on %s and does not open any more: %s", choice.backend, choice.date, error)
        return None
    device = backend.device
    if (device.name, device.driver) == (choice.taken.device, choice.taken.driver):
        logger.debug("auto: %s, as found on %s", choice, choice.date)
        return backend
    logger.debug("auto: %s opens %s (%s) now: measuring again", choice.backend, device.name, device.driver)
    backend.close()
    return None
