"""Products of many rows on the tvm backend: AMX tiles, slices of columns, and rows shared out among threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from polykern.backends.tvm import amx, emit, provider
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.op import Case
from polykern.kernels.ops import OPS
from polykern.kernels.spi import Backend, Kernel, OpenOptions
from polykern.kernels.trial import Trial

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")

MANY = emit.MANY_ROWS
FAST = {"precision": "fast"}


@pytest.fixture(scope="module", params=["amx", "avx512vnni"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        opened = provider.open(OpenOptions(device=request.param, threads=2))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def case(fmt: str, t: int, n: int, k: int, **attrs: Any) -> Case:
    return Case(f"{fmt}-{t}x{n}x{k}", {"T": t, "N": n, "K": k, "format": fmt}, FAST | attrs)


GEMM = [
    case("Q4_1", 2 * MANY, 40, 64),  # each thread has rows of its own
    case("Q4_1", 2 * MANY - 1, 40, 64),  # a part of the weight
    case("Q4_0", 2 * MANY + 123, 5, 96),  # the last of what is dealt out is short
    case("Q8_0", 17, 123, amx.SLICE),  # a slice
    case("Q8_0", 17, 123, amx.SLICE + 32),  # two, of 10 and 9 blocks
    case("Q5_0", 65, 33, 2 * amx.SLICE + 32),
    case("Q5_1", 2 * MANY + 1, 33, amx.SLICE + 32),
    case("BF16", 2 * MANY, 65, amx.SLICE + 64),
]


@pytest.mark.parametrize("wanted", GEMM, ids=lambda c: c.name)
@pytest.mark.parametrize("op", ["gemm", "gemm_add", "rms_norm_gemm"])
def test_products(backend: Any, op: str, wanted: Case) -> None:
    judged(backend, op, wanted)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "wanted", [case("Q4_1", 2 * MANY + 33, 40, amx.SLICE + 32), case("Q8_0", 16, 17, 64)], ids=lambda c: c.name
)
def test_gate_and_up(backend: Any, wanted: Case, kind: str) -> None:
    judged(backend, "rms_norm_gemm_glu", Case(wanted.name, wanted.dims, {**wanted.attrs, "kind": kind}))


def test_rows_and_weight_shared_out_among_four_threads() -> None:
    try:
        opened = provider.open(OpenOptions(device="amx", threads=4))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    wanted = case("Q4_1", 2 * MANY + 5, 123, 64)
    assert amx.row_parts(wanted.dims["T"], 4) == 2
    judged(opened, "gemm_add", wanted)
    opened.close()
    assert [amx.row_parts(rows, 12) for rows in (1, 2 * MANY - 1, 3 * MANY, 5 * MANY, 12 * MANY)] == [1, 1, 3, 4, 12]


def judged(backend: Any, op: str, wanted: Case) -> None:
    trial = Trial.ask(backend, OPS[op], wanted)
    assert isinstance(trial.answer, Kernel)
    assert ("bf16" in trial.answer.name) == backend.target.amx
    assert not trial.run(backend, is_repeated=True).reason


@pytest.mark.parametrize("bits", [0x7FFF, 0xFFFF, 0x7C01, 0xFE01])
def test_a_scale_that_is_not_a_number_makes_its_row_so(backend: Any, bits: int) -> None:
    """Rounding must not carry a NaN's payload over into a zero."""
    trial = Trial.ask(backend, OPS["gemm"], case("Q4_1", 32, 3, 32))
    trial.inputs["w"].data[1, :2] = np.array([bits], np.uint16).view(np.uint8)
    assert np.isnan(trial.expected["y"][:, 1]).all()
    assert not trial.run(backend, is_repeated=False).reason
