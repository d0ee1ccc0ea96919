"""Which backend `--backend auto` takes for a model on this machine: the fastest, found out once and remembered.

Every candidate that has a device here answers the same short test in a process of its own (`measure`), on the first
layers of the model and its head. The one that needs the least time for TYPICAL is taken. Its name is kept in
`choices/<key>.json` of the cache folder; the key is the SHA-256 of all that could change the answer (`Question`), so
nothing has to be invalidated, and a file appears there by one rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .config import ModelConfig
from .machine import cpu, drivers, load, packages
from .models import cache_dir
from .output import NOTE
from .settings import Settings

FORMAT = 1

# Tokens in and out of the exchange whose time decides. Decoding is the slower of the two everywhere, so it dominates.
TYPICAL = (256, 256)

# Speeds closer than this are equal, and the provider's order decides: a choice that flips with the noise helps nobody.
TIE = 0.03

# Load per processor from which on a measurement is provisional: one side may have met more of the others' work. Of two
# drivers that ran alike on a quiet machine, one seemed 3.5 times as fast as the other at a load of 4.
BUSY = 1.5

KEPT_FILES = 64  # choices that are remembered; the oldest go first
LOCK_WAIT_S = 120  # another start may be measuring; two at once would measure each other

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """What one candidate did: tokens per second, estimated for the whole model; or the problem that kept it from it."""

    backend: str
    device: str = ""
    driver: str = ""
    decode_tps: float = 0.0
    prompt_tps: float = 0.0
    problem: str = ""

    @property
    def seconds(self) -> float:
        """For TYPICAL."""
        return TYPICAL[0] / self.prompt_tps + TYPICAL[1] / self.decode_tps


@dataclass(frozen=True)
class Choice:
    """The speeds of all candidates in their order, and the backend that was taken for them."""

    backend: str
    speeds: tuple[Speed, ...]
    layers: str  # "30 of 30": how many of the model's layers were measured
    date: str
    busy: bool = False  # measured while others were at work: once they are not, it is measured again

    @property
    def holds(self) -> bool:
        return not self.busy or is_busy()

    @property
    def taken(self) -> Speed:
        return next(speed for speed in self.speeds if speed.backend == self.backend)

    def __str__(self) -> str:
        """tvm, 310 tok/s decode, 2100 prompt (opencl 180, 900; acme: no device found)"""
        taken, others = self.taken, [speed for speed in self.speeds if speed.backend != self.backend]
        measured, of = self.layers.split(" of ")
        about = "" if measured == of else f", estimated from {self.layers} layers"
        rest = [
            f"{s.backend}: {s.problem}" if s.problem else f"{s.backend} {s.decode_tps:.0f}, {s.prompt_tps:.0f}"
            for s in others
        ]
        shown = f" ({'; '.join(rest)})" if rest else ""
        return f"{self.backend}, {taken.decode_tps:.0f} tok/s decode, {taken.prompt_tps:.0f} prompt{about}{shown}"


@dataclass(frozen=True)
class Question:
    """All that the answer depends on. What asking a driver would cost too much for (0.2 s and 160 MB for OpenCL) is
    told by package versions and driver files; the device of the chosen backend is compared when it is opened."""

    model: str
    machine: dict[str, Any]
    packages: dict[str, str | None]
    drivers: dict[str, str]
    candidates: list[list[str]]
    sources: str
    device: str | None
    threads: int | None
    precision: str
    ctx: int

    @property
    def fields(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()
        return folder() / f"{digest[:32]}.json"


def is_busy() -> bool:
    return load() > BUSY


def ask(settings: Settings, config: ModelConfig, ctx: int, candidates: Sequence[tuple[str, str]]) -> Question:
    """`candidates`: (name, "distribution version") of each backend that could be chosen, in order."""
    shapes = {name: (kind.shape, kind.dtype) for name, kind in config.tensors.items()}
    model = (config.architecture.name, config.head_dim, config.layers, sorted(shapes.items()))
    return Question(
        model=hashlib.sha256(repr(model).encode()).hexdigest(),
        machine=cpu(),
        packages=packages(),
        drivers=drivers(),
        candidates=[list(candidate) for candidate in candidates],
        sources=_sources(),
        device=settings.device,
        threads=settings.threads,
        precision=settings.precision,
        ctx=1 << (ctx - 1).bit_length(),  # up to the next power of two: what plans depend on changes no faster
    )


def _sources() -> str:
    """Tells apart the states of a checkout, which all have the same version."""
    digest, here = hashlib.sha256(), Path(__file__).parent.parent
    for package in ("kernels", "backends"):
        for path in sorted((here / package).rglob("*.*")):
            if path.suffix != ".pyc":
                status = path.stat()
                digest.update(f"{path.relative_to(here)} {status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()


def folder() -> Path:
    return cache_dir().expanduser() / "choices"


def choose(
    question: Question,
    names: Sequence[str],
    measure: Callable[[str], tuple[Speed, str]],
    stale: Choice | None = None,
) -> Choice:
    """Measure the candidates `names` one after the other and take the fastest; remembers it and says so.

    `measure` gives a candidate's speed and the layers it was measured on. Another process that is at it is waited for;
    `stale` is a remembered choice that no longer holds. A `backend` of "" means that no candidate could be measured.
    """
    with ExitStack() as stack:
        _lock(stack)
        if (known := recall(question)) and known != stale and known.holds:
            return known
        speeds: list[Speed] = []
        busy = is_busy()
        layers = ""
        for name in names:
            speed, measured_layers = measure(name)
            speeds.append(speed)
            layers = layers or measured_layers
        able = [speed for speed in speeds if not speed.problem]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if not able:
            return Choice("", tuple(speeds), layers, now)
        least = min(speed.seconds for speed in able)
        chosen = next(speed.backend for speed in able if speed.seconds <= least * (1 + TIE))
        choice = Choice(chosen, tuple(speeds), layers, now, busy)
        problem = _remember(question, choice)
        until = " until the machine is less busy" if busy else ""
        kept = f"not remembered: {problem}" if problem else f"remembered in {question.path}{until}"
        logger.log(NOTE, "auto chose %s, %s", choice, kept)
        return choice


def recall(question: Question) -> Choice | None:
    """What was chosen before; None if nothing was, or the file cannot be relied on, which is a warning."""
    path = question.path
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("asked") != json.loads(json.dumps(question.fields)):
            raise ValueError("it answers another question")
        return _choice(document)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s): measuring backends again", path, error.strerror)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        logger.warning("%s is damaged (%s): measuring backends again", path, reason or type(error).__name__)
    return None


def _choice(document: dict[str, Any]) -> Choice:
    """ValueError, TypeError or KeyError for anything that `_remember` would not have written."""
    speeds = tuple(Speed(**row) for row in document["speeds"])
    choice = Choice(document["chosen"], speeds, document["layers"], document["date"], document["busy"])
    for speed in speeds:
        for field in fields(Speed):
            expected = float if field.name.endswith("tps") else str
            if type(getattr(speed, field.name)) is not expected:
                raise ValueError(f"{field.name} is no {expected.__name__}")
    if type(choice.busy) is not bool:
        raise ValueError("busy is no bool")
    if not any(s.backend == choice.backend and not s.problem and s.decode_tps > 0 < s.prompt_tps for s in speeds):
        raise ValueError("the chosen backend was not measured")
    str(choice)  # fails where `layers` is not what it should be
    return choice


def _remember(question: Question, choice: Choice) -> str:
    """Why it could not be kept, or ""."""
    document = {
        "asked": question.fields,
        "chosen": choice.backend,
        "speeds": [asdict(speed) for speed in choice.speeds],
        "layers": choice.layers,
        "date": choice.date,
        "busy": choice.busy,
    }
    draft = ""
    try:
        handle, draft = tempfile.mkstemp(dir=folder(), prefix=".draft-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        os.replace(draft, question.path)
        by_age = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            os.unlink(draft)
        return f"{folder()}: {error.strerror}; set POLYKERN_CACHE_DIR to a folder that can be written"
    return ""


def _lock(stack: ExitStack) -> None:
    """Until `stack` ends. Without a folder, or when somebody else takes too long, everybody measures for himself."""
    from filelock import FileLock, Timeout

    with suppress(OSError, Timeout):
        folder().mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(folder() / "measuring.lock", timeout=LOCK_WAIT_S))


def remembered() -> list[dict[str, Any]]:
    """Every choice in the cache, JSON-able, the newest first; for `runtime doctor`."""
    found: list[dict[str, Any]] = []
    for path in folder().glob("*.json"):
        row: dict[str, Any] = {"file": str(path), "date": "", "chose": "damaged: it will be measured again"}
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
            document = json.loads(path.read_bytes())
            choice = _choice(document)
            asked = {name: document["asked"][name] for name in ("device", "threads", "precision", "ctx")}
            row |= {"date": choice.date, "chose": str(choice), **asked, "speeds": document["speeds"]}
        found.append(row)
    return sorted(found, key=lambda row: row["date"], reverse=True)


def forget() -> int:
    """Remove all choices: the next start of each model measures again. How many there were; raises OSError."""
    paths = list(folder().glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)
