"""Results of a run: one row per case, as a JSON document and as a table."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from polykern.kernels.op import Cost
from polykern.kernels.spi import DeviceInfo

from .cases import BenchCase
from .roofline import Roofline
from .stand import Placed

SCHEMA = 1


@dataclass
class Row:
    """One case on one device. Times are seconds per call; `times` has one entry per round of `calls` calls.

    status    "timed"; "unsupported": refused, with the reason; "failed": wrong or broken, so not timed
    unit      what its sums are made of: "f32", or "int8" or "bf16" where the kernel rounds activations to it
    bound     what the roofline says holds the call back: "read" (memory), or the unit of its arithmetic
    fraction  roofline time / median time; None where the device's limits are unknown. The limits are those measured
              right before and behind the case: `read_gb_per_s`, `peak_gop_per_s`; `measured` says which
    streamed_bytes  what the launches rotate over, so that they read it from where a decode step would
    """

    backend: str
    device: str
    case: str
    op: str
    what: str
    model: str
    tokens: int
    context: int
    shape: str
    signature: str
    status: Literal["timed", "unsupported", "failed"] = "failed"
    reason: str = ""
    kernel: str = ""
    error_ratio: float | None = None
    median_s: float | None = None
    q1_s: float | None = None
    q3_s: float | None = None
    times: list[float] = field(default_factory=list[float])
    calls: int = 0
    unit: str = "f32"
    bytes: int = 0
    flops: int = 0
    gb_per_s: float | None = None
    gop_per_s: float | None = None
    bound: str = ""
    fraction: float | None = None
    streamed_bytes: int = 0
    measured: int = 0
    read_gb_per_s: float | None = None
    peak_gop_per_s: float | None = None

    @classmethod
    def of(cls, backend: str, device: str, case: BenchCase) -> Row:
        return cls(
            backend, device, case.name, case.op, case.what, case.model, case.tokens, case.context, case.shape,
            str(case.signature),
        )  # fmt: skip

    def fill(self, placed: Placed, error_ratio: float, times: Sequence[float], calls: int, measured: int = 0) -> None:
        cost: Cost = placed.cost
        self.status, self.kernel, self.error_ratio = "timed", placed.kernel.name, error_ratio
        self.unit, self.measured = placed.kernel.numerics.activations, measured
        self.times, self.calls, self.median_s = list(times), calls, median(times)
        self.q1_s, _, self.q3_s = quantiles(times, n=4, method="inclusive")
        self.bytes, self.flops, self.streamed_bytes = cost.nbytes, cost.flops, placed.streamed
        self.gb_per_s, self.gop_per_s = cost.nbytes / self.median_s / 1e9, cost.flops / self.median_s / 1e9

    def compare_with(self, roofline: Roofline | None) -> None:
        """Fill in `bound` and `fraction`, once the limits behind it are known as well."""
        if self.median_s is None or roofline is None:
            return
        self.read_gb_per_s, self.peak_gop_per_s = roofline.read, roofline.peaks.get(self.unit, roofline.peaks["f32"])
        least, self.bound = roofline.least_seconds(Cost(self.bytes, self.flops), self.unit)
        self.fraction = least / self.median_s

    @property
    def middle(self) -> tuple[float, float]:
        """The ends of the middle half of the rounds, in seconds per call."""
        return self.q1_s or 0.0, self.q3_s or 0.0

    @property
    def spread(self) -> float:
        """The middle half of the rounds, as a part of the median."""
        low, high = self.middle
        return (high - low) / self.median_s if self.median_s else 0.0


def device_entry(
    backend: str, device: DeviceInfo, roofline: Roofline | None, sweeps: Sequence[float]
) -> dict[str, Any]:
    return {
        "backend": backend,
        "device": device.name,
        "driver": device.driver,
        "detail": dict(device.detail),
        "read_gb_per_s": roofline.read if roofline else None,
        "read_gb_per_s_all": list(sweeps),
        "peak_gop_per_s": roofline.peaks if roofline else {},
    }


def write(path: Path, rows: Iterable[Row], devices: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """The document: `devices` with their limits, `rows`, the options of the run, and where it ran."""
    from polykern.runtime.machine import provenance
    from polykern.runtime.output import plain

    document = {
        "schema": SCHEMA,
        "what": "kernels",
        "options": dict(options),
        **provenance(),
        "devices": list(devices),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # A row a line: small enough to keep in git, and a diff shows cases.
    head = {key: value for key, value in document.items() if key != "rows"}
    lines = ",\n  ".join(json.dumps(rounded(plain(row)), ensure_ascii=False) for row in document["rows"])
    text = json.dumps(plain(head), indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def rounded(value: Any) -> Any:
    """Floats with the six digits that a measured time can have."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote; a ValueError that says what else it is."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON document: {error}") from error
    if not isinstance(document, dict) or document.get("what") != "kernels" or "rows" not in document:
        raise ValueError(f'{path} is no result of `pytest bench`: it has no `"what": "kernels"` and `rows`')
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')!r}, expected {SCHEMA}: run `pytest bench` again")
    fields = set(Row.__dataclass_fields__)
    try:
        document["rows"] = [Row(**{k: v for k, v in row.items() if k in fields}) for row in document["rows"]]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: a row is no row: {error}") from error
    return document


def duration(seconds: float) -> str:
    """Three digits and a unit: "5.03 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            break
    value = seconds * scale
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


COLUMNS = ("op", "in", "shape", "M", "context", "median", "spread", "GB/s", "Gop/s", "bound", "of roofline", "over")
LEFT = ("op", "in", "shape", "bound")


def cells(row: Row) -> tuple[str, ...]:
    """The table's cells of one row, in the order of COLUMNS."""
    first = (row.op, row.what, row.shape, str(row.tokens or ""), str(row.context or ""))
    if row.median_s is None:
        return (*first, row.status)
    numbers = (
        duration(row.median_s),
        f"{row.spread:.0%}",
        rate(row.gb_per_s),
        rate(row.gop_per_s),
        row.bound,
        "" if row.fraction is None else f"{row.fraction:.0%}",
        f"{row.streamed_bytes / 1e6:.0f} MB" if row.streamed_bytes else "",
    )
    return (*first, *numbers)


def limits(entry: Mapping[str, Any]) -> str:
    """What the device could do, in words, for the head of a table or the corner of a plot."""
    if not entry["read_gb_per_s"]:
        return "limits unknown: the backend states none, and the memory is not the host's"
    parts = [f"read {entry['read_gb_per_s']:.1f} GB/s"]
    if sweeps := entry["read_gb_per_s_all"]:
        parts[0] += f" ({min(sweeps):.1f} to {max(sweeps):.1f})"
    parts += [f"{unit} {peak:.0f} Gop/s" for unit, peak in entry["peak_gop_per_s"].items()]
    return ", ".join(parts)


def table(rows: Sequence[Row], *, is_terminal: bool) -> str:
    """The rows as a table, in sections by model and tokens; on a terminal in colour, and cut to its width."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    styles = {"timed": "", "unsupported": "dim", "failed": "red"}
    for model, of_model in itertools.groupby(rows, key=lambda row: row.model):
        drawn.add_row(f"[bold]{model}[/bold]")
        for _, group in itertools.groupby(of_model, key=lambda row: row.tokens):
            for row in group:
                drawn.add_row(*cells(row), style=styles[row.status])
            drawn.add_row()
    width = max(140, shutil.get_terminal_size().columns) if is_terminal else 200
    console = Console(width=width, force_terminal=is_terminal, highlight=False)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
