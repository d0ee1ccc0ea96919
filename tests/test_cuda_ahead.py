"""Kernels of the cuda backend compiled without a GPU: `runtime compile --target cuda:90`, the cache, its key."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from polykern.backends.cuda import aot, compiler, op_kernels
from polykern.backends.cuda.compiler import Compiler
from polykern.backends.cuda.launch import KernelSpec, Launch, Sketch, Target, sketch_of
from polykern.backends.cuda.rows import KERNELS
from polykern.kernels.errors import DeviceError
from polykern.kernels.op import Signature, TensorType
from polykern.kernels.ops import OPS
from polykern.runtime.cli import main

pytest.importorskip("triton", reason="needs the compiler: pip install 'polykern[cuda]'")

SIGNATURE = Signature(
    "embedding",
    {"token_ids": TensorType((1,), "i32"), "w": TensorType((123, 64), "Q4_0"), "y": TensorType((1, 64), "f32")},
    {"scale": 1.0},
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(aot.VARIABLE, raising=False)
    aot._binaries.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, whoever asks for a compiler finds none."""

    def remove() -> None:
        for module in (compiler, aot):
            monkeypatch.setattr(module, "compilers", dict)

    return remove


def spec_for(target: Target) -> KernelSpec:
    return KERNELS[0].bind(Sketch(target), sketch_of(SIGNATURE))[0].spec


def ahead(model: str, folder: Path, target: str = "cuda:90") -> dict[str, Any]:
    assert main(["compile", "--target", target, "-m", model, "--op", "embedding", "-o", str(folder)]) == 0
    return json.loads((folder / "manifest.json").read_text())


def test_a_folder_serves_a_machine_without_a_compiler(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: Callable[[], None]
) -> None:
    manifest = ahead(model, tmp_path / "kernels")
    assert manifest["target"] == "cuda:90"
    assert {row["op"] for row in manifest["kernels"]} == {"embedding"}
    for row in manifest["kernels"]:
        assert (tmp_path / "kernels" / row["file"]).read_bytes()[:4] == b"\x7fELF"
        assert row["registers"] > 0
        assert row["local_bytes"] == 0
    spec = compiler.spec_of(manifest["kernels"][0]["spec"])
    no_compiler()
    hopper = Compiler(aot.parse("cuda:90"), "CUDA 12.9")
    with pytest.raises(
        DeviceError,
        match=r"^cannot compile rows_of_weight.* for cuda:90: Triton is not installed, and \$POLYKERN_CUDA_",
    ):
        hopper.binaries([spec])
    monkeypatch.setenv(aot.VARIABLE, str(tmp_path / "kernels"))
    (binary,) = hopper.binaries([spec])
    assert binary.symbol == "rows_of_weight"
    assert aot.describe() == {
        "path": str(tmp_path / "kernels"), "target": "cuda:90", "kernels": len(manifest["kernels"]), "problem": "",
    }  # fmt: skip


def test_a_folder_that_does_not_fit_is_not_used_and_says_why(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = ahead(model, tmp_path / "kernels")
    spec = compiler.spec_of(manifest["kernels"][0]["spec"])
    monkeypatch.setenv(aot.VARIABLE, str(tmp_path / "kernels"))
    with pytest.warns(RuntimeWarning, match=r"are not used: it was compiled for cuda:90, this GPU is cuda:80"):
        assert aot.find(spec, aot.parse("cuda:80")) is None
    code = tmp_path / "kernels" / manifest["kernels"][0]["file"]
    code.write_bytes(code.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"is damaged \(its SHA-256 is another\)"):
        assert aot.find(spec, aot.parse("cuda:90")) is None
    aot._binaries.cache_clear()
    monkeypatch.setattr(aot, "sources", lambda: "others")
    with pytest.warns(RuntimeWarning, match=r"compiled from other sources than these: compile it again"):
        assert aot.find(spec, aot.parse("cuda:90")) is None
    aot._binaries.cache_clear()
    monkeypatch.setenv(aot.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.warns(RuntimeWarning, match=r"are not used: FileNotFoundError"):
        assert aot.find(spec, aot.parse("cuda:90")) is None


def test_a_folder_serves_every_part_of_its_architecture(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: Callable[[], None]
) -> None:
    """How many multiprocessors there are decides which kernels a call takes."""
    signature = attention_signature()
    wanted = {x.spec for part in aot.parts(aot.parse("cuda:90")) for x in launches(signature, part)}
    assert wanted > {x.spec for x in launches(signature, aot.parse("cuda:90"))}
    assert {x.spec for x in aot.Generator(aot.parse("cuda:90")).launches(signature)} == wanted

    manifest = ahead(model, tmp_path / "kernels")
    assert manifest["multiprocessors"] == [132, 114, 78]
    monkeypatch.setenv(aot.VARIABLE, str(tmp_path / "kernels"))
    card = replace(aot.parse("cuda:90"), multiprocessors=131)
    assert aot.fitting(card) == card  # which a compiler serves
    no_compiler()
    for there, planned in ((132, 132), (144, 132), (131, 114), (100, 78), (16, 78)):
        card = replace(aot.parse("cuda:90"), multiprocessors=there)
        assert aot.fitting(card) == replace(card, multiprocessors=planned)


def attention_signature() -> Signature:
    cache = TensorType((128, 8, 32, 128), "f16")
    rows, ids = TensorType((1, 32, 128), "f32"), TensorType((1,), "i32")
    kinds = {
        "q": rows, "k_pages": cache, "v_pages": cache, "block_table": TensorType((1, 128), "i32"), "seq_ids": ids,
        "positions": ids, "y": rows,
    }  # fmt: skip
    return OPS["attention"].signature(kinds, {})


def launches(signature: Signature, target: Target) -> Sequence[Launch]:
    return op_kernels()[signature.op].bind(Sketch(target, every=True), sketch_of(signature))


def test_unknown_architectures_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compile", "--target", "cuda:61", "-o", str(tmp_path / "x")]) == 2
    assert "--target cuda:61: no such architecture; known: cuda:75, cuda:80" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_cache_knows_driver_compiler_and_architecture(
    monkeypatch: pytest.MonkeyPatch, no_compiler: Callable[[], None]
) -> None:
    target = aot.parse("cuda:90")
    spec = spec_for(target)
    first = Compiler(target, "CUDA 12.9")
    (binary,) = first.binaries([spec])
    first.close()

    def never(*_: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler.CompilePool, "ask", never)
    assert Compiler(target, "CUDA 12.9").binaries([spec]) == [binary]
    for other in (
        Compiler(target, "CUDA 13.0"),
        Compiler(aot.parse("cuda:80"), "CUDA 12.9"),
    ):
        with pytest.raises(AssertionError, match="compiled again"):
            other.binaries([spec])
    with pytest.raises(AssertionError, match="compiled again"):
        Compiler(target, "CUDA 12.9").binaries([replace(spec, warps=8)])
    monkeypatch.setattr(compiler, "compilers", lambda: {"triton": "0"})
    with pytest.raises(AssertionError, match="compiled again"):
        Compiler(target, "CUDA 12.9").binaries([spec])


def test_a_kernel_that_does_not_compile_is_one_line() -> None:
    target = aot.parse("cuda:90")
    spec = spec_for(target)
    wrong = replace(spec, constants=tuple((n, 3 if n == "BLOCK_B" else v) for n, v in spec.constants))
    pool = Compiler(target)
    with pytest.raises(DeviceError, match=r"^cannot compile rows_of_weight.* for cuda:90: .*") as caught:
        pool.binaries([wrong])
    assert "\n" not in str(caught.value)
    (right,) = pool.binaries([spec])  # its process works on
    assert right.threads == 32 * spec.warps
    pool.close()


def test_shared_memory_beyond_the_device_is_refused() -> None:
    target = replace(aot.parse("cuda:90"), shared_bytes=-1)
    pool = Compiler(target)
    with pytest.raises(DeviceError, match=r"it takes \d+ bytes of shared memory, a block may have -1"):
        pool.binaries([spec_for(target)])
    pool.close()
