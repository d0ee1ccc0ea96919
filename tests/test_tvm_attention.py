"""attention on the tvm backend: where splits of the keys end and tiles of the queries begin, and on every CPU level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from polykern.backends.tvm import attention, provider
from polykern.backends.tvm.emit import MANY_ROWS as MANY
from polykern.backends.tvm.target import usable
from polykern.kernels.attention import ATTENTION
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.op import Attrs, Case, type_of
from polykern.kernels.spi import Backend, Kernel, OpenOptions
from polykern.kernels.trial import Trial

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")

FROM = attention.TILED_FROM


def case(name: str, *seqs: tuple[int, int], attrs: Attrs | None = None, **dims: int | str | bool) -> Case:
    return Case(name, {"H": 6, "G": 2, "D": 64, "S": 16, "seqs": seqs, **dims}, attrs or {})


WINDOW = {"window": 33, "softcap": 20.0}
CASES = [
    case("last-of-splits", (90, FROM - 1)),
    case("first-of-tiles", (90, FROM)),
    case("tiles-of-three-sequences", (150, FROM + 11), (40, 40), (9, 1), pad=2, kv="f32", S=5, D=20),
    case("tiles-shuffled-window-softcap", (150, FROM), (40, 40), attrs=WINDOW, H=4, D=16, shuffled=True),
    case("tiles-lost", (FROM + 6, FROM), (20, 7), (20, 7), S=8, D=16, lost=True),
    case("tiles-of-one-token", (FROM, FROM), H=100, G=1, D=16),
    case("tiles-dealt-out", (450, 2 * MANY + 1), (60, 40)),
    case("tiles-dealt-out-of-one-head", (2 * MANY, 2 * MANY), H=5, G=5, D=40, attrs=WINDOW),
    case("splits-in-groups-of-heads", (70, 1), (9, 3), H=12, G=1, D=80),
]


LESSER = [pytest.param(level.name, marks=pytest.mark.slow) for level in usable()[1:]]


@pytest.fixture(scope="module", params=["llvm", *LESSER])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        opened = provider.open(OpenOptions(device=request.param))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def judged(backend: Any, wanted: Case, has_splits: bool) -> None:
    trial = Trial.ask(backend, ATTENTION, wanted)
    assert isinstance(trial.answer, Kernel)
    is_half = {trial.signature.tensors[name].dtype for name in ("k_pages", "v_pages")} == {"f16"}
    name = "split" if has_splits else "amx" if backend.target.amx and is_half else "tiles"
    assert trial.answer.name.startswith(f"tvm.attention_{name}-")
    assert not trial.run(backend, is_repeated=True).reason


@pytest.mark.parametrize("wanted", CASES, ids=lambda c: c.name)
def test_splits_and_tiles(backend: Backend, wanted: Case) -> None:
    judged(backend, wanted, "splits" in wanted.name)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ATTENTION.cases, ids=lambda c: c.name)
def test_tiles_on_every_case(wanted: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's batches are shorter than what tiles are for."""
    monkeypatch.setattr(attention, "TILED_FROM", 1)
    backend = provider.open(OpenOptions())
    judged(backend, wanted, False)
    backend.close()


def test_keys_and_values_may_be_of_two_dtypes(backend: Backend) -> None:
    trial = Trial.ask(backend, ATTENTION, case("splits", (40, 3)))
    wide = {**trial.inputs, "v_pages": trial.inputs["v_pages"].astype(np.float32)}
    signature = ATTENTION.signature({name: type_of(value) for name, value in wide.items()}, {})
    mixed = Trial(ATTENTION, trial.case, wide, signature, trial.answer)
    assert not mixed.run(backend, is_repeated=False).reason
