"""Backends: how ops run on a device. Importing this, and listing what is there, imports no vendor library."""

from .registry import (
    Candidate,
    Entry,
    Opened,
    Probe,
    candidates,
    describe,
    list_backends,
    load_provider,
    open_backend,
    open_first,
    probe,
)

__all__ = [
    "Candidate", "Entry", "Opened", "Probe", "candidates", "describe", "list_backends", "load_provider", "open_backend",
    "open_first", "probe",
]  # fmt: skip
