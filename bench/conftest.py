"""`pytest bench`: options, the devices and cases they choose, and what is told at the end. See bench/README.md."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kernelbench import results
from kernelbench.cases import CONTEXTS, MODELS, TOKENS, BenchCase, build_cases, known
from kernelbench.results import Row
from kernelbench.roofline import Meter
from kernelbench.stand import Stand
from polykern.backends import list_backends, open_backend, probe
from polykern.kernels.errors import BackendUnavailable, UsageError
from polykern.kernels.spi import Backend

LAST = Path(__file__).parent / "results" / "kernels-last.json"
# Not timed unless asked for: one computes nothing, the other is the definition.
ON_REQUEST = ("null", "reference")


@dataclass
class Bench:
    """An open device with everything that its cases need; `rows` are in the order in which they ran."""

    backend: Backend
    cases: list[BenchCase]
    stand: Stand
    meter: Meter
    rows: list[Row] = field(default_factory=list[Row])
    model: str = ""

    def enter(self, model: str) -> None:
        """Weights of the model before are of no more use."""
        if model != self.model:
            self.stand.release()
            self.model = model


BENCHES = pytest.StashKey[list[Bench]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "kernel benchmarks (lists are comma-separated)")
    group.addoption("--backend", metavar="NAMES", help="backends (default: all that open, but for null and reference)")
    group.addoption("--device", metavar="NAME", help="a device by number or part of its name (default: every device)")
    group.addoption("--op", metavar="NAMES", help="ops of the contract (default: all)")
    group.addoption("--model", metavar="NAMES", help=f"whose shapes: {', '.join(MODELS)} (default: all)")
    group.addoption("--tokens", metavar="NUMBERS", help=f"rows per call (default: {','.join(map(str, TOKENS))})")
    group.addoption("--context", metavar="NUMBERS", help=f"keys (default: {','.join(map(str, CONTEXTS))})")
    group.addoption("--format", metavar="NAME", help="this weight format instead of the models' own")
    group.addoption("--precision", choices=("fast", "exact"), default="fast", help="(default: fast)")
    group.addoption("--budget", type=float, default=0.2, metavar="SECONDS", help="timing of a case (default: 0.2)")
    group.addoption("--json", metavar="FILE", help="where the results go (default: bench/results/kernels-last.json)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Its table has no bandwidth and no roofline; --benchmark-verbose brings it back.
    config.option.benchmark_quiet = True
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("kernels are timed one after another: leave out -n")


def names(config: pytest.Config, option: str) -> list[str] | None:
    text = config.getoption(option)
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise pytest.UsageError(f"{option} is empty: leave it out, or name something")
    return parts


def numbers(config: pytest.Config, option: str, default: Sequence[int]) -> list[int]:
    parts = names(config, option)
    if parts is None:
        return list(default)
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= 1 << 20:
            raise pytest.UsageError(f"{option} is {part!r}, expected whole numbers from 1 to {1 << 20}")
    return sorted({int(part) for part in parts})


def pytest_sessionstart(session: pytest.Session) -> None:
    """Opens the devices that the options choose, with their cases."""
    try:
        benches = list(open_benches(session.config))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    session.config.stash[BENCHES] = benches
    if not any(bench.cases for bench in benches):
        raise pytest.UsageError("no case left: the models call none of these ops at so many tokens")


def open_benches(config: pytest.Config) -> Iterator[Bench]:
    if config.getoption("--budget") <= 0:
        raise UsageError(f"--budget is {config.getoption('--budget'):g}, expected seconds above 0")
    choice = {
        "models": names(config, "--model") or list(MODELS),
        "tokens": numbers(config, "--tokens", TOKENS),
        "contexts": numbers(config, "--context", CONTEXTS),
        "ops": names(config, "--op"),
        "weight_format": config.getoption("--format"),
        "precision": config.getoption("--precision"),
    }
    build_cases(16, **choice)  # wrong names are told before any device is opened
    asked = names(config, "--backend")
    registered = [entry.name for entry in list_backends()]
    chosen = [known("backend", n, registered) for n in asked or [n for n in registered if n not in ON_REQUEST]]
    found, reasons = 0, []
    for name in chosen:
        try:
            for backend in open_devices(name, config.getoption("--device")):
                found += 1
                cases = build_cases(backend.page_size, **choice)
                yield Bench(backend, cases, Stand(backend), Meter(backend))
        except BackendUnavailable as error:
            if asked:
                raise UsageError(str(error)) from error
            reasons.append(str(error))
    if not found:
        raise UsageError(f"nothing to time: {'; '.join(reasons) or 'no backend is installed'}")


def open_devices(name: str, device: str | None) -> Iterator[Backend]:
    """One backend on the device that is asked for, or on each that it has."""
    if device is not None:
        yield open_backend(name, device=device)
        return
    seen = probe(name)
    if not seen.devices:
        raise BackendUnavailable(f"backend {name!r} is not available: {seen.reason}")
    for index in range(len(seen.devices)):
        yield open_backend(name, device=str(index))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per device and case, all cases of a device together."""
    if "case" in metafunc.fixturenames:
        pairs = [
            pytest.param(bench, case, id=f"{bench.backend.name}:{index}-{case.name}")
            for index, bench in enumerate(metafunc.config.stash[BENCHES])
            for case in bench.cases
        ]
        metafunc.parametrize(("bench", "case"), pairs)


def pytest_collection_finish(session: pytest.Session) -> None:
    """On a terminal one line says what runs now, instead of a row of dots."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.isatty and session.config.get_verbosity() == 0:
        session.config.pluginmanager.register(Progress(reporter, len(session.items)))


class Progress:
    def __init__(self, reporter: Any, total: int) -> None:
        self.reporter, self.total, self.done = reporter, total, 0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.done += 1
        case = nodeid.partition("[")[2].removesuffix("]")
        self.reporter.rewrite(f"{self.done}/{self.total} {case}"[: shutil.get_terminal_size().columns - 1], erase=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", "") if report.when == "call" or report.outcome == "skipped" else None


def finish(config: pytest.Config) -> list[dict[str, Any]]:
    """The limits of each device, now that all is measured, and every row's part of them."""
    devices: list[dict[str, Any]] = []
    for bench in config.stash.get(BENCHES, []):
        for row in bench.rows:
            row.compare_with(bench.meter.roofline(row.measured))
        if bench.rows:
            limits = bench.meter.roofline(), bench.meter.sweeps
            devices.append(results.device_entry(bench.backend.name, bench.backend.device, *limits))
    return devices


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Results are kept also of a run that was interrupted."""
    benches = session.config.stash.get(BENCHES, [])
    rows = [row for bench in benches for row in bench.rows]
    if rows:
        devices = finish(session.config)
        option = session.config.getoption
        used = (
            "--backend",
            "--device",
            "--op",
            "--model",
            "--tokens",
            "--context",
            "--format",
            "--precision",
            "--budget",
        )
        path = Path(option("--json") or LAST)
        options = {name.lstrip("-"): option(name) for name in used if option(name) is not None}
        try:
            results.write(path, rows, devices, options)
        except OSError as error:
            raise pytest.UsageError(f"cannot write {path}: {error.strerror or error}") from error
    for bench in benches:
        bench.meter.close()
        bench.stand.release()
        bench.backend.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A table for each device and model, and where the document is."""
    benches = [bench for bench in config.stash.get(BENCHES, []) if bench.rows]
    for bench, entry in zip(benches, finish(config), strict=True):
        terminalreporter.write_sep("=", f"{entry['backend']}, {entry['device']}")
        terminalreporter.write_line(f"limits measured in this run: {results.limits(entry)}")
        terminalreporter.write("\n" + results.table(bench.rows, is_terminal=terminalreporter.isatty))
    if benches:
        terminalreporter.write_line(f"results: {config.getoption('--json') or LAST}")
