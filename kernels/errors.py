"""Every error a user can meet, as one tree.

PolykernError                  a named problem: one line, exit status 1
├── UsageError                 the command line or an argument is wrong: exit status 2
├── ContractError              a call breaks the contract of its op (shapes, dtypes, attributes)
├── BackendUnavailable         a backend cannot be opened here; the message says why and what to install
├── UnsupportedOp              a backend refused a call that nothing may replace (`--fallback error`)
├── DeviceError                the device or its driver failed; carries the vendor's error name
├── ModelFormatError           a model file is malformed: path, field and byte offset
├── ModelError                 a well-formed model that cannot be run: missing tensor, architecture, context
└── DoesNotFit                 a model or a design needs more than the named hardware has; the message says by how much

A message names the thing, the number and the way out, on one line. `runtime --debug` adds the traceback.
"""

from __future__ import annotations


class PolykernError(Exception):
    """Base of every error that is reported as one line. `exit_status` is what `runtime` exits with."""

    exit_status = 1


class UsageError(PolykernError):
    """A wrong argument; found before any work is done."""

    exit_status = 2


class ContractError(PolykernError):
    """A call whose tensors or attributes do not fit the op it names."""


class BackendUnavailable(PolykernError):
    """A backend that cannot be opened on this machine."""


class UnsupportedOp(PolykernError):
    """A call that the backend refused and the fallback policy does not let anything else run."""


class DeviceError(PolykernError):
    """A failure reported by a device, its driver or its compiler."""


class ModelFormatError(PolykernError):
    """A malformed model file.

    `path` names the file, `field` the header field or tensor, `offset` the byte the reader stood at (None if the
    whole file is meant).
    """

    def __init__(self, path: str, field: str, offset: int | None, problem: str) -> None:
        self.path, self.field, self.offset, self.problem = path, field, offset, problem
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{path}: {field}{where}: {problem}")


class ModelError(PolykernError):
    """A readable model that this runtime cannot run."""


class DoesNotFit(PolykernError):
    """A model or a design that needs more than the named hardware has."""
