"""The tvm backend: instructions of each level, devices, its cache and compiler, one call a step."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polykern.backends import open_backend, probe
from polykern.kernels.conformance import run
from polykern.kernels.errors import BackendUnavailable, ContractError, DeviceError
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.spi import BoundCall, DeviceTensor

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")

from polykern.backends.tvm import compiler, driver, gemm, target
from polykern.backends.tvm.emit import Emitter

# Level -> the instruction of its dot product, as assembly has it.
EXPECTED = {
    "amx": "vpdpbusd.*%zmm",
    "avx512vnni": "vpdpbusd.*%zmm",
    "avxvnni": "vpdpbusd.*%ymm",
    "avx2": "vpmaddubsw.*%ymm",
    "sse2": "pmull|pmuludq|pmaddwd",
    "neon-dot": "sdot",
    "neon": "mla|mul",
}
BETTER = {"avxvnni": "%zmm", "avx2": "vpdpbusd", "sse2": "vpmaddubsw|vpdpbusd|%ymm", "neon": "sdot"}


def assembly(level: str, emit: Callable[..., None] = gemm.gemm, **options: Any) -> str:
    return driver.lower(emit, options, "kernel", target.BY_NAME[level]).inspect_source("s")


@pytest.mark.parametrize("fmt", ["Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("level", EXPECTED)
def test_every_level_uses_its_dot_product(level: str, fmt: str) -> None:
    import re

    code = assembly(level, fmt=fmt, int8=True, fine=False, rows=1, kind="", add=False, bias=False)
    assert re.search(EXPECTED[level], code), f"{level} does not use {EXPECTED[level]}"
    if level in BETTER:
        assert not re.search(BETTER[level], code), f"{level} uses instructions that it need not have"


def test_long_prompts_use_tiles_on_amx() -> None:
    assert "tdpbf16ps" in assembly("amx", gemm.gemm_bf16, fmt="Q4_1", kind="", add=False, bias=False)


@pytest.mark.parametrize("level", [level.name for level in target.usable()])
def test_every_level_that_this_cpu_has_is_right(level: str) -> None:
    backend = open_backend("tvm", device=f"llvm -mcpu={level}")
    assert backend.device.name.startswith(f"llvm {level} / ")
    for fmt in ("Q4_0", "Q8_0", "Q6_K"):
        for name in ("fast-5x123x", "fast-extreme", "fast-nan", "fast-integer-17", "exact-1x5x"):
            case = next(c.name for c in OPS["gemm"].cases if c.name.startswith(f"{fmt}-{name}"))
            report = run(backend, ops=["gemm"], case=case)
            assert report.ok, report.failures
    backend.close()


@pytest.mark.skipif(target.usable()[0].machine != "x86_64", reason="the levels of x86 on x86")
def test_a_cpu_by_llvms_name() -> None:
    names = [level.name for level in target.usable()]
    for cpu, level in (("znver4", "avx512vnni"), ("haswell", "avx2"), ("x86-64", "sse2"), ("native", names[0])):
        if level in names:
            assert open_backend("tvm", device=f"llvm -mcpu={cpu}").device.name.startswith(f"llvm {level} / ")
    with pytest.raises(BackendUnavailable, match=r"llvm -mcpu=neoverse-n1: this CPU, .*, is no aarch64; try "):
        open_backend("tvm", device="llvm -mcpu=neoverse-n1")


def test_llvm_knows_the_cpus_by_name() -> None:
    tvm = pytest.importorskip("tvm")
    for machine, level in (("x86_64", "sse2"), ("aarch64", "neon")):
        known = {cpu for cpu, found in target.LEVEL_OF_CPU.items() if found.machine == target.BY_NAME[level].machine}
        kind = tvm.target.Target({"kind": "llvm", "mtriple": f"{machine}-unknown-linux-gnu"})
        assert known <= set(tvm.target.codegen.llvm_get_cpu_archlist(kind)), machine


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("cuda", "no device 'cuda': this backend runs on the CPU; `runtime compile --target cuda` generates kernels"),
        ("llvm -mcpu=z80", "no device 'llvm -mcpu=z80': this CPU is `llvm`, or `llvm -mcpu=LEVEL` with one of "),
        ("7", "no device '7': this CPU is `llvm`"),
        ("c", "no device 'c': this backend runs on the CPU"),
    ],
)
def test_a_device_that_is_not_there(device: str, text: str) -> None:
    with pytest.raises(BackendUnavailable) as error:
        open_backend("tvm", device=device)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(target.usable()[0].machine != "x86_64", reason="the levels of x86 on x86")
def test_a_cpu_without_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "host_flags", lambda: frozenset({"sse2"}))
    monkeypatch.setattr("polykern.backends.tvm.host_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(BackendUnavailable, match=r"lacks avx2, bmi2, f16c, fma; try sse2"):
        open_backend("tvm", device="llvm -mcpu=avx2")
    assert open_backend("tvm").device.name.startswith("llvm sse2")


@pytest.mark.parametrize("name", ["tvm", "tvm_ffi_orcjit"])
def test_without_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    assert probe("tvm").reason == f"no module {name}: pip install 'polykern[tvm]'"


# The cache and the compiler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path))
    return tmp_path / "tvm"


def passes(op: str = "add") -> bool:
    backend = open_backend("tvm")
    report = run(backend, ops=[op], case=OPS[op].cases[0].name)
    backend.close()
    return report.ok


def test_a_second_start_compiles_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes()
    assert list(cache.glob("*.bin"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a compiler was started"))
    assert passes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_cache_entry_that_cannot_be_trusted_is_made_anew(cache: Path, damage: str) -> None:
    assert passes()
    assert passes("glu")
    files = sorted(cache.glob("*.bin"))
    contents = [file.read_bytes() for file in files]
    for i, file in enumerate(files):
        data = bytearray(contents[i])
        if damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "flipped":
            data[-9] ^= 1
        elif damage == "empty":
            data = bytearray()
        else:
            data = bytearray(contents[i - 1])
        file.write_bytes(data)
    before = {file: file.read_bytes() for file in files}
    assert passes()
    assert passes("glu")
    assert all(file.read_bytes() != before[file] for file in files)


def test_another_compiler_or_source_is_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    level = target.BY_NAME["sse2"]
    fields = compiler._fields(level, "gemm")
    monkeypatch.setattr(compiler.metadata, "version", lambda _: "99")
    assert compiler._fields(level, "gemm") != fields
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "_sources", lambda: "changed")
    assert compiler._fields(level, "gemm") != fields


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("polykern.backends.cache.os.replace", full)
    with pytest.warns(RuntimeWarning, match=r"TVM kernels are not cached: .*No space left on device"):
        assert passes()


def fails(k: Emitter) -> None:
    raise ValueError("this kernel\ncannot be written")


def dies(k: Emitter) -> None:
    import os

    os._exit(3)


@pytest.mark.parametrize(("emit", "text"), [(fails, "ValueError: cannot be written"), (dies, "its compiler ended")])
def test_a_kernel_that_does_not_compile(cache: Path, emit: Callable[[Emitter], None], text: str) -> None:
    from polykern.backends.tvm.launch import spec

    made = compiler.Compiler(target.usable()[0])
    with pytest.raises(DeviceError) as error:
        made.kernels([spec(emit)])
    assert str(error.value).startswith(f"tvm cannot compile {emit.__name__} for {target.usable()[0].name}: {text}")
    assert "\n" not in str(error.value)
    made.close()


# Launches


@pytest.fixture
def backend() -> Iterator[Any]:
    opened = open_backend("tvm")
    yield opened
    opened.close()


def bound_add(backend: Any) -> tuple[Any, Any]:
    case = OPS["add"].cases[0]
    inputs = OPS["add"].make_inputs(case)
    tensors: dict[str, DeviceTensor] = {}
    for name, kind in case_signature(OPS["add"], case).tensors.items():
        buffer = backend.alloc(kind)
        backend.write(buffer, inputs[name])
        tensors[name] = DeviceTensor(buffer, kind.shape, kind.dtype, 0, kind.shape[1])
    return backend.bind(BoundCall("add", tensors, {})), (inputs, tensors["x"])


def test_a_step_is_one_call(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, (inputs, x) = bound_add(backend)
    from polykern.backends.tvm import library

    calls: list[int] = []
    load = library.load

    def counted(objects: Any) -> Any:
        entry = load(objects)
        return lambda tape, count, workers: (calls.append(count), entry(tape, count, workers))

    monkeypatch.setattr(library, "load", counted)
    step = backend.capture([launch] * 100)
    step()
    assert calls == [100]
    expected = inputs["x"].copy()
    for _ in range(100):
        expected += inputs["y"]
    np.testing.assert_array_equal(backend.read(x.buffer, x.type), expected)


def test_a_step_of_nothing_and_of_anothers_launches(backend: Any) -> None:
    backend.capture([])()
    with pytest.raises(ContractError, match=r"can only hold what its bind\(\) returned"):
        backend.capture([lambda: None])


def test_a_tensor_outside_its_buffer(backend: Any) -> None:
    case = OPS["add"].cases[0]
    kinds = case_signature(OPS["add"], case).tensors
    tensors = {n: DeviceTensor(backend.alloc(k), k.shape, k.dtype, 1, k.shape[1]) for n, k in kinds.items()}
    with pytest.raises(ContractError, match="does not fit a buffer of"):
        backend.bind(BoundCall("add", tensors, {}))
