"""TVM's kernels on the devices of `opencl`; the whole suite on every device is test_device_conformance.py (slow)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from golden_check import devices
from polykern.backends import load_provider, open_backend, probe
from polykern.backends.tvm.portable import emit, names, targets
from polykern.kernels.conformance import run
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.spi import Backend, Kernel, Unsupported

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")


@pytest.fixture(scope="module", params=[p for p in devices() if "opencl-tvm" in str(p.id)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, device = request.param
    opened = open_backend(name, device=device)
    yield opened
    opened.close()


@pytest.mark.parametrize("op", ["gemm_add", "attention", "rms_norm", "kv_append", "argmax"])
def test_conforms_in_small(backend: Backend, op: str) -> None:
    report = run(backend, ops=[op], profile="small")
    assert report.ok, "\n".join(map(str, report.failures))


def test_kernels_say_whose_they_are(backend: Backend) -> None:
    signature = case_signature(OPS["add"], OPS["add"].cases[0])
    answer = backend.supports(signature)
    assert isinstance(answer, Kernel)
    assert answer.name == f"opencl-tvm.{names.symbol(signature)}"


@pytest.mark.parametrize("op", sorted(set(OPS) - set(emit.kernels())))
def test_fused_ops_without_a_kernel_are_refused_with_the_reason(backend: Backend, op: str) -> None:
    signature = case_signature(OPS[op], OPS[op].cases[0])
    assert backend.supports(signature) == Unsupported(op, f"no {op} kernel of its own")


def test_nobody_gets_it_by_accident() -> None:
    assert load_provider("opencl-tvm").order is None


def test_without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert probe("opencl-tvm").reason == "needs TVM, which is not installed: pip install 'polykern[tvm]'"
    assert load_provider("opencl-tvm").describe()["tvm"] == "not installed"
