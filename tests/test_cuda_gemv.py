"""backends/cuda/gemv_dp4a.cu on a CPU (cuda_host.py): the contract's cases of every op it serves, larger ones, numbers
that are none; what is not offered; and that NVRTC compiles it without spills."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_host
import numpy as np
import pytest
from cuda_host import SANITIZE, TARGET, HostCudaDevice, compiler
from polykern.backends import cuda
from polykern.backends.cuda import gemv
from polykern.backends.cuda.launch import Launch, Sketch, Target, sketch_of
from polykern.kernels import conformance
from polykern.kernels.op import Case, Op, Signature, TensorType
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import BoundCall, DeviceInfo, DeviceTensor
from polykern.kernels.testdata import activations, random_weight

pytest.importorskip("triton", reason="needs Triton's interpreter: pip install 'polykern[cuda]'")

PRODUCTS = ("gemm", "gemm_add", "rms_norm_gemm", "rms_norm_gemm_glu")
QUANTISED = [name for name, fmt in FORMATS.items() if not fmt.is_float]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs g++ to compile CUDA C++ for a CPU")


def served(op: Op) -> Op:
    """With those of its cases that there are candidates for."""
    cases = [case for case in op.cases if gemv.is_offered(TARGET, case_signature(op, case))]
    return dataclasses.replace(op, cases=tuple(cases))


def check(op: Op, device: HostCudaDevice, blind: set[str] | None = None) -> None:
    """All cases pass, and all mutants die but those that are `blind`ed out."""
    report = conformance.run(cuda.CudaBackend(DeviceInfo("fibers"), device), ops=[op])
    assert not report.failures, report.failures[0]
    assert report.summary()["passed"] == len(op.cases) > 0
    assert {mutant.mutant for mutant in report.survivors} <= (blind or set())


@needs_compiler
@pytest.mark.parametrize("name", PRODUCTS)
def test_conformance(name: str, tmp_path: Path) -> None:
    # Activations are closer to each other than int8 to the truth: test_integers_are_exact tells them apart.
    check(served(OPS[name]), HostCudaDevice(tmp_path), {"always_silu"})


@needs_compiler
def test_long_rows_and_more_rows_than_warps(tmp_path: Path) -> None:
    attrs = {"precision": "fast"}
    cases = [
        Case(f"{f}-{t}x9x7680", {"T": t, "N": 9, "K": 7680, "format": f}, attrs) for f in QUANTISED for t in (1, 3)
    ]
    cases += [Case(f"{f}-{t}x999", {"T": t, "N": 999, "K": 256, "format": f}, attrs) for f in QUANTISED for t in (2, 8)]
    check(dataclasses.replace(OPS["gemm"], cases=tuple(cases), mutants=()), HostCudaDevice(tmp_path))


def whole_numbers(case: Case) -> dict[str, Any]:
    """x of integers up to 127 and a norm that changes no bit of them but for its factor."""
    rng, d = np.random.default_rng(case.seed), case.dims
    x = activations(rng, d["T"], d["K"], "integer")
    weights = {name: random_weight(rng, d["format"], d["N"], d["K"], "normal") for name in ("w_gate", "w_up")}
    return {"x": x, "weight": np.zeros(d["K"], np.float32), **weights}


@needs_compiler
def test_integers_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged like float32, with the norm before and the GLU behind."""
    found = cuda.op_kernels()["rms_norm_gemm_glu"]
    strict = dataclasses.replace(found, numerics=lambda t, s: dataclasses.replace(gemv.numerics(s), activations="f32"))
    monkeypatch.setattr(cuda, "op_kernels", lambda: {strict.op: strict})
    cases = [
        Case(f"{f}-{kind}-{t}", {"T": t, "N": 35, "K": 512, "format": f}, {**attrs, "kind": kind})
        for attrs in ({"precision": "fast", "weight_offset": 1.0},)
        for f in QUANTISED
        for kind in ("silu", "gelu_tanh", "gelu_erf")
        for t in (1, 3)
    ]
    mutants = tuple(m for m in OPS["rms_norm_gemm_glu"].mutants if m.name in ("always_silu", "gate_and_up_swapped"))
    op = dataclasses.replace(OPS["rms_norm_gemm_glu"], cases=tuple(cases), make_inputs=whole_numbers, mutants=mutants)
    check(op, HostCudaDevice(tmp_path))


def product(folder: Path, x: Array, weight: Weight, **options: Any) -> Array:
    """x @ weight.T by one of the candidates."""
    backend = cuda.CudaBackend(DeviceInfo("fibers"), HostCudaDevice(folder, **options))
    kinds = {"x": TensorType(x.shape, "f32"), "y": TensorType((x.shape[0], weight.shape[0]), "f32")}
    tensors = {n: DeviceTensor(backend.alloc(kind), kind.shape, "f32", 0, kind.shape[1]) for n, kind in kinds.items()}
    backend.write(tensors["x"].buffer, x)
    tensors["w"] = DeviceTensor(backend.pack(weight), weight.shape, weight.format.name)
    backend.bind(BoundCall("gemm", tensors, {"precision": "fast"}))()
    return backend.read(tensors["y"].buffer, kinds["y"])


@needs_compiler
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_numbers_that_are_none_stay_in_their_row(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    x, weight = activations(rng, 4, 512, "normal"), random_weight(rng, name, 33, 512, "normal")
    x[0, 40], x[2, 511] = np.inf, np.nan
    x[3] *= 1e-38  # too small for the inverse of a step
    y = product(tmp_path, x, weight)
    assert not np.isfinite(y[0]).any()
    assert np.isnan(y[2]).all()
    assert np.abs(y[3]).max() < 1e-30
    np.testing.assert_allclose(y[1], x[1] @ weight.dense(np.float32).T, atol=0.05 * np.abs(y[1]).max())


@needs_compiler
@pytest.mark.parametrize(
    ("line", "changed", "told"),
    [
        ("  __syncthreads();", "", "the result is wrong"),
        ("  __syncthreads();", "  if (threadIdx.x) __syncthreads();", "threads wait for others that do not come"),
        ("quants[t * halves + place] =", "quants[t * halves + place + blocks] =", "written behind shared memory"),
    ],
)
def test_the_stand_in_tells(
    line: str, changed: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would not do, or not always."""
    source = (cuda_host.FOLDER / "gemv_dp4a.cu").read_text()
    assert line in source
    (tmp_path / "gemv_dp4a.cu").write_text(source.replace(line, changed))
    monkeypatch.setattr(cuda_host, "FOLDER", tmp_path)
    rng = np.random.default_rng(5)
    x, weight = activations(rng, 1, 2048, "normal"), random_weight(rng, "Q4_0", 40, 2048, "normal")
    expected = x @ weight.dense(np.float32).T
    with pytest.raises((RuntimeError, AssertionError)) as raised:
        assert np.allclose(product(tmp_path, x, weight), expected, atol=0.05 * np.abs(expected).max()), told
    assert told in str(raised.value)


@needs_compiler
def test_nothing_outside_is_touched(tmp_path: Path) -> None:
    """Under GCC's sanitizers, each spec compiled as NVRTC compiles it; in a process that loads them first."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    code = "import pathlib, sys, test_cuda_gemv as t; t.run_sanitized(pathlib.Path(sys.argv[1])); print('ok')"
    environment = {
        **os.environ, "LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "ok", (done.stdout + done.stderr)[-3000:]


def run_sanitized(folder: Path) -> None:
    for rows, name, columns in ((3, "Q6_K", 768), (1, "Q5_K", 2304), (2, "Q8_0", 96)):
        rng = np.random.default_rng(3)
        x, weight = activations(rng, rows, columns, "normal"), random_weight(rng, name, 37, columns, "normal")
        y = product(folder, x, weight, exact=True, flags=SANITIZE)
        expected = x @ weight.dense(np.float32).T
        np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


def gemm(rows: int = 1, columns: int = 4096, fmt: str = "Q4_0", features: int = 4096, **attrs: Any) -> Signature:
    tensors = {"x": (rows, columns), "y": (rows, features)}
    found = {name: TensorType(shape, "f32") for name, shape in tensors.items()}
    found["w"] = TensorType((features, columns), fmt)
    return OPS["gemm"].signature(found, {"precision": "fast", **attrs})


def offered(target: Target, signature: Signature) -> list[list[Launch]]:
    found = gemv.candidates(Sketch(target), sketch_of(signature))
    assert bool(found) == gemv.is_offered(target, signature)
    return found


def test_offered_for_few_rows_of_quantised_weights_on_nvidia_only() -> None:
    h100 = Target("cuda", "90", 132, 227 << 10)
    assert offered(h100, gemm())
    assert offered(Target("cuda", "100", 148, 227 << 10), gemm(8))
    assert not offered(h100, gemm(9))
    assert not offered(h100, gemm(precision="exact"))
    assert not offered(h100, gemm(fmt="F16"))
    assert not offered(Target("hip", "gfx942", 304, 64 << 10), gemm())
    assert not offered(Target("interpret", "", 1, 1 << 30), gemm())
    assert not offered(Target("cuda", "61", 20, 48 << 10), gemm())


def test_not_offered_where_x_does_not_fit() -> None:
    t4, longest = Target("cuda", "75", 40, 64 << 10), 52352
    assert offered(t4, gemm(1, longest))
    assert not offered(t4, gemm(1, longest + 32))
    for (launch,) in offered(t4, gemm(4, 11008)):
        assert 48 << 10 < launch.shared <= t4.shared_bytes
        assert launch.grid == (40,)  # one block fits at a time


def test_short_weights_are_spread_over_all_multiprocessors() -> None:
    h100 = Target("cuda", "90", 132, 227 << 10)
    for features in (576, 1024, 2048, 4096):
        launch = offered(h100, gemm(features=features))[0][0]
        assert launch.grid[0] >= min(120, features // 8), features
    assert offered(h100, gemm(features=128256))[0][0].grid == (264,)


def test_nvrtc_compiles_it_without_spills() -> None:
    pytest.importorskip("cupy", reason="needs NVRTC: pip install 'polykern[cuda]'")
    from polykern.backends.cuda.compile_child import cubin_usage
    from polykern.backends.cuda.nvrtc import compile_cubin
    from polykern.kernels.errors import BackendUnavailable

    for number, name in enumerate(QUANTISED):
        rows, arch = (1, 2, 8)[number % 3], ("75", "80", "90", "100")[number % 4]
        spec = offered(Target("cuda", arch, 80, 64 << 10), gemm(rows, 1024, name))[0][0].spec
        try:
            usage = cubin_usage(compile_cubin(spec, arch))
        except BackendUnavailable as error:
            pytest.skip(str(error))
        assert usage["local_bytes"] == 0, (name, rows, arch, usage)
        assert usage["registers"] * spec.warps * 32 <= 65536


def test_what_nvrtc_says_is_one_line() -> None:
    pytest.importorskip("cupy", reason="needs NVRTC: pip install 'polykern[cuda]'")
    from polykern.backends.cuda.nvrtc import compile_cubin
    from polykern.kernels.errors import BackendUnavailable, DeviceError

    spec = offered(Target("cuda", "90", 132, 227 << 10), gemm())[0][0].spec
    broken = dataclasses.replace(spec, constants=tuple((n, v) for n, v in spec.constants if n != "W_ROWS"))
    try:
        with pytest.raises(DeviceError) as raised:
            compile_cubin(broken, "90")
        with pytest.raises(DeviceError, match="for sm_12: nvrtc: error: invalid value for --gpu-architecture"):
            compile_cubin(spec, "12")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("NVRTC cannot compile gemv_dp4a.cu for sm_90: gemv_dp4a.cu(")
    assert 'identifier "W_ROWS" is undefined' in str(raised.value)
