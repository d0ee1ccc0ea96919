"""Plug-ins as source code, for the fixture `install`."""

from __future__ import annotations

from collections.abc import Callable

Install = Callable[..., None]  # install(distribution, name, code, *, metadata=None, site="site")

# A backend that opens, and computes nothing.
GOOD = """
    from polykern.backends.null import NullProvider

    class Plugin(NullProvider):
        order = {order}

        def open(self, options):
            backend = NullProvider.open(self, options)
            backend.name = NAME
            return backend

    provider = Plugin()
"""
