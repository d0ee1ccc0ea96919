"""Every op on every device in the shapes of real models: right first, then timed. Options: bench/conftest.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kernelbench.results import Row
from kernelbench.stand import FEWEST_ROUNDS, Refused
from polykern.kernels.errors import PolykernError

if TYPE_CHECKING:
    from conftest import Bench
    from kernelbench.cases import BenchCase


def test_kernel(bench: Bench, case: BenchCase, benchmark: Any, request: pytest.FixtureRequest) -> None:
    row = Row.of(bench.backend.name, bench.backend.device.name, case)
    bench.rows.append(row)
    bench.enter(case.model)
    try:
        placed = bench.stand.place(case)
        error_ratio = placed.check()
        measured = bench.meter.measure()
        one_round, calls, rounds = placed.rounds(request.config.getoption("--budget"))
        benchmark.group = f"{row.device} {case.model}"
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=int(rounds > FEWEST_ROUNDS))
    except Refused as refusal:
        row.status, row.reason = "unsupported", str(refusal)
        pytest.skip(row.reason)
    except PolykernError as error:
        row.reason = str(error)
        pytest.fail(row.reason, pytrace=False)
    except Exception as error:
        row.reason = f"{type(error).__name__}: {error}"
        raise
    if benchmark.stats is None:  # --benchmark-disable
        row.status, row.reason = "unsupported", "checked, but timing is switched off"
        return
    # What pytest-benchmark calls an iteration is here a launch: one round has many, without a call of Python for each.
    metadata = benchmark.stats
    metadata.iterations = calls
    metadata.stats.data[:] = [seconds / calls for seconds in metadata.stats.data]
    row.fill(placed, error_ratio, metadata.stats.data, calls, measured)
    benchmark.extra_info.update(bytes=row.bytes, flops=row.flops, gb_per_s=row.gb_per_s, gop_per_s=row.gop_per_s)
