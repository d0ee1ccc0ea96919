"""Backends: how ops run on a device. Importing this, and listing what is there, imports no vendor library."""

from .registry import Entry, Probe, describe, list_backends, load_provider, open_backend, probe

__all__ = ["Entry", "Probe", "describe", "list_backends", "load_provider", "open_backend", "probe"]
