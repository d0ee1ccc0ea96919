"""Every op of the contract, every case, on every device found on this machine; no mutant alive, and nothing unsupported
but the fused ops that a backend leaves to their decomposition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from golden_check import devices
from polykern.backends import open_backend
from polykern.kernels.conformance import run
from polykern.kernels.ops import OPS
from polykern.kernels.spi import Backend

pytestmark = pytest.mark.slow

TAKEN_APART = {"opencl-tvm": ("rms_norm_gemm", "rms_norm_gemm_glu")}


@pytest.fixture(scope="module", params=devices())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One open device for all ops, so that a program is built once."""
    name, device = request.param
    opened = open_backend(name, device=device)
    yield opened
    opened.close()


@pytest.mark.parametrize("op", OPS)
def test_conforms(backend: Backend, op: str) -> None:
    report = run(backend, ops=[op])
    summary = report.summary()
    if op in TAKEN_APART.get(backend.name, ()):
        assert summary["unsupported"] == len(OPS[op].cases)
        return
    assert report.ok, "\n".join(str(problem) for problem in [*report.failures, *report.survivors, *report.missing])
    assert summary["passed"] == len(OPS[op].cases)
    assert summary["unsupported"] == summary["failed"] == 0
    assert summary["killed"] == summary["mutants"] >= 3
