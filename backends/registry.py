"""Which backends there are, and opening one: entry-point group `polykern.backends`, looked at lazily.

Listing reads package metadata only. A plug-in's code runs when its provider is loaded, and whatever goes wrong in it
becomes the reason why that one backend is not available; no plug-in can break another or the host.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, TypeVar, cast

from ..kernels.errors import BackendUnavailable, UsageError
from ..kernels.spi import SPI_VERSION, Backend, DeviceInfo, OpenOptions, Progress, Provider
from .adapters import ADAPTERS, MEMBERS, VERSIONS

GROUP = "polykern.backends"
OWN_DISTRIBUTION = "polykern"
ALLOW_LIST = "POLYKERN_BACKENDS"  # comma-separated names or distributions of plug-ins; empty: none; unset: all
AUTO = "auto"

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A backend as package metadata names it: entry-point name and value ("module:provider"), and the distribution.

    `problem` says why it must not be loaded (its name is taken), or is empty.
    """

    name: str
    value: str
    distribution: str
    problem: str = ""


@dataclass(frozen=True)
class Candidate:
    """A backend that `--backend auto` may take, or one that does not load: then `problem` says why."""

    entry: Entry
    order: int
    provider: Provider | None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def version(self) -> str:
        """Of its distribution, which it names."""
        try:
            return f"{self.entry.distribution} {metadata.version(self.entry.distribution)}"
        except metadata.PackageNotFoundError:
            return self.entry.distribution


@dataclass(frozen=True)
class Probe:
    """What a look at a backend found: its devices, or the reason why there are none."""

    name: str
    devices: tuple[DeviceInfo, ...] = ()
    reason: str = ""


def _installed() -> list[Entry]:
    """Every registered backend, allowed or not: our own first, then plug-ins by name."""
    found: dict[str, list[Entry]] = {}
    for distribution in metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            owner = str(distribution.metadata["Name"])
        except Exception:  # noqa: BLE001 - unreadable metadata of a package that may have nothing to do with us
            continue
        # The first of a name on sys.path is the one that imports would find.
        found.setdefault(re.sub(r"[-_.]+", "-", owner).lower(), _declared(distribution, owner))
    entries = [entry for declared in found.values() for entry in declared]
    return sorted(entries, key=lambda e: (e.distribution != OWN_DISTRIBUTION, e.name, e.distribution, e.value))


def _declared(distribution: metadata.Distribution, owner: str) -> list[Entry]:
    try:
        points = [point for point in distribution.entry_points if point.group == GROUP]
    except Exception as error:  # noqa: BLE001 - the standard library's parser raises TypeError on a line without "="
        return [Entry(owner, "", owner, f"the entry_points.txt of {owner} is malformed: {_one_line(error)}")]
    return [Entry(point.name, point.value, owner) for point in points]


def _settle_name(entries: list[Entry]) -> list[Entry]:
    """A name belongs to one entry: to our own if it is ours, to none if several plug-ins claim it; `auto` is none."""
    if entries[0].name == AUTO:
        problem = f"the name {AUTO!r} means the first backend that opens: register another"
        return [replace(entry, problem=entry.problem or problem) for entry in entries]
    usable = 1 if entries[0].distribution == OWN_DISTRIBUTION or len(entries) == 1 else 0
    owners = ", ".join(entry.distribution for entry in entries)
    problem = f"the name {entries[0].name!r} is claimed by {owners}: uninstall one, or list one in {ALLOW_LIST}"
    return entries[:usable] + [replace(entry, problem=entry.problem or problem) for entry in entries[usable:]]


def _is_allowed(entry: Entry) -> bool:
    listed = os.environ.get(ALLOW_LIST)
    if listed is None or entry.distribution == OWN_DISTRIBUTION:
        return True
    return bool({entry.name, entry.distribution} & {part.strip() for part in listed.split(",")})


def list_backends() -> list[Entry]:
    """The backends on this machine, our own first, then plug-ins by name. Imports nothing of any of them."""
    by_name: dict[str, list[Entry]] = {}
    for entry in _installed():
        if _is_allowed(entry):
            by_name.setdefault(entry.name, []).append(entry)
    return [entry for entries in by_name.values() for entry in _settle_name(entries)]


def _entry(name: str) -> Entry:
    entries = list_backends()
    for entry in entries:
        if entry.name == name:
            return entry
    if any(entry.name == name for entry in _installed()):
        raise UsageError(
            f"backend {name!r} is switched off by {ALLOW_LIST}={os.environ.get(ALLOW_LIST)!r}: add {name} to it"
        )
    known = [AUTO, *dict.fromkeys(entry.name for entry in entries)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise UsageError(f"unknown backend {name!r}{hint} known: {', '.join(known)}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, BackendUnavailable) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _guarded(what: str, action: Callable[[], T]) -> T:
    """Run plug-in code; anything but an interrupt becomes BackendUnavailable. A plug-in may even call sys.exit."""
    try:
        return action()
    except BackendUnavailable as error:
        raise BackendUnavailable(_one_line(error)) from error
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(f"{what} failed: {_one_line(error)}") from error


def _missing(value: Any, members: tuple[str, ...]) -> str:
    """The members that `value` lacks, as text."""
    return _guarded("looking at it", lambda: ", ".join(m for m in members if not hasattr(value, m)))


def load_provider(name: str) -> Provider:
    """The provider registered as `name`, checked for shape and SPI version.

    Raises UsageError for a name nobody registered, BackendUnavailable with the reason for one that does not load.
    """
    return _load(_entry(name))


def _load(entry: Entry) -> Provider:
    if entry.problem:
        raise BackendUnavailable(entry.problem)
    point = metadata.EntryPoint(entry.name, entry.value, GROUP)
    provider: Any = _guarded(f"importing {entry.value}", point.load)
    missing = _missing(provider, ("spi_version", "order", "devices", "open", "describe"))
    if missing:
        raise BackendUnavailable(f"{entry.value} is no Provider: it has no {missing}")
    version, order = provider.spi_version, provider.order
    if version not in VERSIONS:
        older = isinstance(version, int) and version < SPI_VERSION
        way_out = f"upgrade {entry.distribution}" if older else f"upgrade {OWN_DISTRIBUTION}"
        spoken = " and ".join(map(str, VERSIONS))
        raise BackendUnavailable(
            f"{entry.distribution} speaks SPI version {version!r}, this polykern speaks {spoken}: {way_out}"
        )
    if order is not None and not isinstance(order, int):
        raise BackendUnavailable(f"{entry.value} is no Provider: order is {order!r}, expected an int or None")
    return cast("Provider", provider)


def probe(backend: str | Entry) -> Probe:
    """The devices a backend could open, or why it has none. Raises UsageError for an unknown name only."""
    entry = _entry(backend) if isinstance(backend, str) else backend
    try:
        devices = _guarded("listing devices", lambda: tuple(_load(entry).devices()))
    except BackendUnavailable as error:
        return Probe(entry.name, reason=str(error))
    strange = [d for d in devices if not isinstance(d, DeviceInfo)]
    if strange:
        return Probe(entry.name, reason=f"listing devices returned {type(strange[0]).__name__}, expected DeviceInfo")
    return Probe(entry.name, devices, "" if devices else "no device found")


def describe(backend: str | Entry) -> Mapping[str, Any]:
    """A backend's versions, drivers and caches, or {"error": reason}. Raises UsageError for an unknown name only."""
    entry = _entry(backend) if isinstance(backend, str) else backend
    try:
        return _guarded("describe()", lambda: dict(_load(entry).describe()))
    except BackendUnavailable as error:
        return {"error": str(error)}


def open_backend(
    name: str = AUTO, *, device: str | None = None, threads: int | None = None, progress: Progress | None = None
) -> Backend:
    """Open a backend by name, or with "auto" the first, by the providers' `order`, that opens.

    `device` picks one of a provider's devices (its index or part of its name), `threads` limits a CPU device,
    `progress` follows compilation. Raises UsageError for an unknown name and BackendUnavailable, for "auto" with every
    candidate's own reason.
    """
    options = OpenOptions(device, threads, progress)
    if name != AUTO:
        entry = _entry(name)
        try:
            return _open(name, _load(entry), options)
        except BackendUnavailable as error:
            raise BackendUnavailable(f"backend {name!r} is not available: {error}") from error

    return open_first(options).backend


@dataclass(frozen=True)
class Opened:
    """What `open_first` found: the backend, its order, and why each candidate before it was passed over."""

    backend: Backend
    order: int
    passed_over: tuple[str, ...]


def open_first(options: OpenOptions, problems: Mapping[str, str] | None = None) -> Opened:
    """The first candidate that opens; `problems` are those that are known not to, each with its reason."""
    reasons: list[str] = []
    for candidate in candidates():
        problem = candidate.problem or (problems or {}).get(candidate.name)
        if candidate.provider and not problem:
            try:
                backend = _open(candidate.name, candidate.provider, options)
                return Opened(backend, candidate.order, tuple(reasons))
            except BackendUnavailable as error:
                problem = str(error)
        reasons.append(f"{candidate.name}: {problem}")
    raise BackendUnavailable(f"no backend could be opened: {'; '.join(reasons) or 'none is installed'}")


def candidates() -> list[Candidate]:
    """What `--backend auto` may take, by the providers' `order`; those that do not load come first, with order -1.

    Looks at the packages once and opens nothing.
    """
    found: list[Candidate] = []
    for entry in list_backends():
        try:
            provider = _load(entry)
        except BackendUnavailable as error:
            found.append(Candidate(entry, -1, None, str(error)))
            continue
        if provider.order is not None:
            found.append(Candidate(entry, provider.order, provider))
    return sorted(found, key=lambda c: (c.provider is not None, c.order, c.name))


def _open(name: str, provider: Provider, options: OpenOptions) -> Backend:
    backend: Any = _guarded("open()", lambda: provider.open(options))
    version = provider.spi_version
    missing = _missing(backend, MEMBERS[version])
    if missing:
        raise BackendUnavailable(f"open() returned {type(backend).__name__}, which has no {missing}")
    wrong = _guarded("looking at it", lambda: _wrong_value(name, backend))
    if wrong:
        raise BackendUnavailable(f"open() returned {type(backend).__name__}, whose {wrong}")
    return cast("Backend", backend) if version == SPI_VERSION else ADAPTERS[version](backend)


def _wrong_value(name: str, backend: Any) -> str:
    """What everybody relies on and a plug-in can get wrong: messages and reports name a backend as users do."""
    if backend.name != name:
        return f"name is {backend.name!r}, but it is registered as {name!r}"
    if not isinstance(backend.device, DeviceInfo):
        return f"device is {type(backend.device).__name__}, expected DeviceInfo"
    if not isinstance(backend.page_size, int) or backend.page_size < 1:
        return f"page_size is {backend.page_size!r}, expected an int of at least 1"
    return ""
