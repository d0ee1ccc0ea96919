"""attention of the cuda backend in Triton's interpreter: where tiles end, parts begin, and sequences mix in a tile."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from polykern.backends.cuda import provider
from polykern.kernels.attention import ATTENTION
from polykern.kernels.op import Attrs, Case, type_of
from polykern.kernels.spi import Backend, Kernel, OpenOptions
from polykern.kernels.trial import Trial

pytest.importorskip("triton", reason="Triton is not installed: pip install 'polykern[cuda]'")


def case(name: str, *seqs: tuple[int, int], attrs: Attrs | None = None, **dims: float | str | bool) -> Case:
    return Case(name, {"H": 6, "G": 2, "D": 16, "S": 16, "seqs": seqs, **dims}, attrs or {})


CASES = [
    case("tiles-of-three-sequences", (90, 80), (70, 60), (30, 1), pad=4, H=8, S=5, D=20),
    case("tiles-shuffled", (90, 80), (70, 60), (30, 1), pad=4, H=8, shuffled=True),
    case("tiles-lost-shuffled-window", (120, 59), (120, 70), attrs={"window": 9}, S=8, lost=True, shuffled=True, pad=1),
    case("tiles-of-more-heads-than-rows", (40, 4), (70, 3), H=150, G=1),
    case("tiles-f32-wide", (40, 30), (170, 13), D=256, kv="f32"),
    case("parts-of-a-chunk", (400, 2), (150, 9), attrs={"softcap": 30.0}, S=1, q=30.0),
    case("parts-empty", (700, 1), (1, 1), (64, 1), (65, 1)),
    case("parts-of-a-window", (700, 1), (300, 1), attrs={"window": 130}, D=80),
    case("parts-of-many-heads", (140, 1), (70, 1), H=64, G=1, kv="f32"),
    case("large-queries", (700, 1), (300, 5), q=1e6),
    case("small-queries", (700, 1), (300, 5), q=1e-30),
]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    opened = provider.open(OpenOptions(device="interpret"))
    yield opened
    opened.close()


@pytest.mark.parametrize("wanted", CASES, ids=lambda c: c.name)
def test_tiles_and_parts(backend: Backend, wanted: Case) -> None:
    trial = Trial.ask(backend, ATTENTION, wanted)
    assert isinstance(trial.answer, Kernel)
    assert not trial.run(backend, is_repeated=True).reason


@pytest.mark.parametrize("wide", ["k_pages", "v_pages"])
@pytest.mark.parametrize("seqs", [((40, 9), (70, 3)), ((40, 1), (370, 1))], ids=["prefill", "decode"])
def test_keys_and_values_of_two_types(backend: Backend, seqs: tuple[tuple[int, int], ...], wide: str) -> None:
    trial = Trial.ask(backend, ATTENTION, case("two-types", *seqs))
    assert isinstance(trial.answer, Kernel)
    mixed = {**trial.inputs, wide: trial.inputs[wide].astype(np.float32)}
    signature = ATTENTION.signature({name: type_of(value) for name, value in mixed.items()}, {})
    assert not Trial(ATTENTION, trial.case, mixed, signature, trial.answer).run(backend, is_repeated=False).reason
