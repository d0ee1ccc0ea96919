"""Opening the backend that the user chose, and saying so where "auto" came down to its last candidate."""

from __future__ import annotations

import logging

from ..backends import list_backends, load_provider, open_backend
from ..backends.registry import AUTO
from ..kernels.errors import BackendUnavailable
from ..kernels.spi import Backend, Progress

logger = logging.getLogger(__name__)


def open_chosen(
    name: str, *, device: str | None = None, threads: int | None = None, progress: Progress | None = None
) -> Backend:
    """`open_backend`, with one warning where "auto" is left with its last candidate: why each other did not open."""
    backend = open_backend(name, device=device, threads=threads, progress=progress)
    if name == AUTO and (reasons := passed_over(backend.name, device, threads)):
        logger.warning("auto chose %s, its last resort: %s", backend.name, "; ".join(reasons))
    return backend


def passed_over(opened: str, device: str | None, threads: int | None) -> list[str]:
    """If `opened` is the last candidate of "auto", why each of the others does not open; else nothing.

    They are asked once more, which only a machine without anything better has to wait for.
    """
    candidates: list[tuple[int, str]] = []
    for name in dict.fromkeys(entry.name for entry in list_backends()):
        try:
            order = load_provider(name).order
        except BackendUnavailable:
            order = -1  # nobody knows; it is not behind the last
        if order is not None:
            candidates.append((order, name))
    others = [name for _, name in sorted(candidates)]
    if not others or others.pop() != opened:
        return []
    reasons: list[str] = []
    for name in others:
        try:
            open_backend(name, device=device, threads=threads).close()
        except BackendUnavailable as error:
            reasons.append(str(error))
    return reasons
