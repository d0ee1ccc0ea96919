"""`runtime compile`: targets, the folder and its manifest, and whether the artefacts compute what the contract says."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import valid_llama_gguf
from gguf_image import Image
from polykern.backends.tvm.portable.machine import MACHINES
from polykern.kernels.conformance import run
from polykern.kernels.errors import BackendUnavailable, UsageError
from polykern.kernels.op import NUMPY_DTYPES, type_of
from polykern.kernels.ops import OPS
from polykern.kernels.quant import FORMATS, Weight
from polykern.kernels.testdata import random_weight
from polykern.runtime.cli import main
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import load as load_model
from polykern.runtime.settings import Sampling, Settings

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'polykern[tvm]'")

from polykern.backends.tvm.portable import emit, names, targets
from serial_artefacts import SerialBackend, load
from tiny_models import mixed_formats, qwen3, some_biases, tokens

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compile or link what was generated")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(valid_llama_gguf())
    return path


def compiled(model: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """The manifest of `runtime compile -m model -o folder ...`, which must succeed."""
    assert main(["compile", "-m", str(model), "-o", str(folder), *arguments]) == 0
    return json.loads((folder / "manifest.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["compile", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return status, line.removeprefix("runtime: error: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llvm", {"kind": "llvm"}),
        ("llvm -mcpu=znver3", {"kind": "llvm", "mcpu": "znver3"}),
        ("llvm --mcpu=znver4 -mattr=-avx512f,+fma", {"mcpu": "znver4", "mattr": ["-avx512f", "+fma"]}),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1", {"mcpu": "neoverse-n1", "mtriple": "aarch64-linux-gnu"}),
        ('{"kind": "llvm", "mcpu": "znver4"}', {"kind": "llvm", "mcpu": "znver4"}),
        ("cuda", {"kind": "cuda", "arch": "sm_80"}),
        ("cuda -arch=sm_90", {"arch": "sm_90"}),
        ("nvidia/nvidia-a100", {"kind": "cuda", "arch": "sm_80"}),
        ("rocm", {"kind": "rocm", "mcpu": "gfx90a"}),
        ("metal -max_num_threads=64", {"max_num_threads": 64}),
        *((kind, {"kind": kind}) for kind in MACHINES),
    ],
)
def test_targets(text: str, expected: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    target = json.loads(str(targets.parse(text)))
    assert expected.items() <= target.items()
    assert capfd.readouterr().err == ""  # TVM's own remarks about toolkits it does not find


def test_native_is_this_cpu() -> None:
    from tvm.target import codegen

    assert json.loads(str(targets.parse("llvm -mcpu=native")))["mcpu"] == codegen.llvm_get_system_cpu()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "openclx",
            "unknown target 'openclx'; did you mean 'opencl'? known: llvm, c, opencl, cuda, rocm, metal, webgpu",
        ),
        ("vulkan", "unknown target 'vulkan'; known: llvm, c, opencl, cuda, rocm, metal, webgpu"),
        (" ", "unknown target ''; known: llvm,"),
        ("llvm -mcpu=znver33", "--target: LLVM knows no CPU 'znver33' for x86_64-"),
        ("llvm -mpcu=znver3", "--target: llvm has no option 'mpcu'; did you mean 'mcpu'? it has "),
        ("llvm -mtriple=pdp11-linux", "--target: -mtriple=pdp11-linux names no architecture of this LLVM; it has "),
        ("llvm mcpu=znver3", "--target 'llvm mcpu=znver3': 'mcpu=znver3' is no option -name=value; examples: llvm, "),
        ("llvm -mcpu", "--target 'llvm -mcpu': '-mcpu' is no option -name=value"),
        ("llvm -opt-level=x", "--target: opt-level is 'x', expected int"),
        ("llvm '", '--target "llvm \'": No closing quotation'),
        ("{llvm}", "--target is no JSON: "),
        ('{"mcpu": "znver3"}', '--target has no "kind": known: llvm, '),
        ('{"kind": "llvm", "mcpu": 3}', "--target: mcpu is 3, expected a text"),
        ('{"kind": "cuda", "arch": 90}', '--target \'{"kind": "cuda", "arch": 90}\': TVM refuses it: '),
        (
            "nvidia/nvidia-h1000",
            "unknown target tag 'nvidia/nvidia-h1000'; did you mean 'nvidia/nvidia-h100'? TVM has ",
        ),
    ],
)
def test_refused_targets(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        targets.parse(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_cpu_of_another_architecture_names_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"LLVM knows no CPU 'neoverse-n1' for .*another architecture needs -mtriple"):
        targets.parse("llvm -mtriple=x86_64-linux-gnu -mcpu=neoverse-n1")


def test_without_tvm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"needs TVM, which is not installed: pip install 'polykern\[tvm\]'"):
        targets.parse("llvm")


@pytest.mark.parametrize("kind", MACHINES)
def test_manifest(kind: str, model: Path, tmp_path: Path) -> None:
    """Everything that is needed to call a kernel is there, and the same command gives the same bytes."""
    manifest = compiled(model, tmp_path / "a", "--target", kind)
    assert compiled(model, tmp_path / "b", "--target", kind) == manifest
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert manifest["format"] == 1
    assert manifest["target"]["kind"] == kind
    assert manifest["programs"] == "programs.json"
    assert {*files} == {"manifest.json", "programs.json", *(kernel["file"] for kernel in manifest["kernels"])}
    assert manifest["refused"] == []
    assert {"rms_norm_gemm", "rms_norm_gemm_glu"} <= {row["op"] for row in manifest["decomposed"]}
    symbols = {kernel["symbol"] for kernel in manifest["kernels"]}
    programs: set[str] = set()
    for kernel in manifest["kernels"]:
        assert hashlib.sha256(files[kernel["file"]]).hexdigest() == kernel["sha256"]
        assert kernel["file"] == kernel["symbol"] + MACHINES[kind].suffix
        assert kernel["symbol"].encode() in files[kernel["file"]]
        pointers = [a["name"] for a in kernel["arguments"] if a["kind"] == "pointer" and a["role"] != "scratch"]
        assert pointers == [p.name for p in OPS[kernel["op"]].params if p.name in kernel["tensors"]]
        assert kernel["numerics"]["accumulate"] == "f32"
        assert (kernel["launch"]["block"][0] == 1) == (kind in ("c", "llvm"))
        programs |= set(kernel["programs"])
    for row in manifest["decomposed"]:
        assert {part["symbol"] for part in row["into"] if part["op"] in emit.kernels()} <= symbols
    assert programs == {"decode.argmax", "decode.sample", "prefill512.none", "prefill64.none", "prefill8.none"}


def test_scalars_and_pointers_stand_as_in_the_source(model: Path, tmp_path: Path) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", "c")
    for kernel in manifest["kernels"]:
        text = (tmp_path / "a" / kernel["file"]).read_text()
        (parameters,) = re.findall(rf"^void {kernel['symbol']}\((.*)\) {{$", text, re.M)
        found = [parameter.split() for parameter in parameters.split(", ")]
        expected = [
            [f"{a['dtype'].removesuffix('32') if a['dtype'] == 'float32' else a['dtype'] + '_t'}*", a["name"]]
            if a["kind"] == "pointer"
            else ["int64_t", f"{a['name']}_{a['kind']}"]
            for a in kernel["arguments"]
        ]
        assert found == expected
    assert len({tuple(pair) for pair in found}) > 1, "a model that says one thing shows little"


@needs_gcc
@pytest.mark.parametrize("target", ["c", "llvm -mcpu=native", "llvm -mcpu=x86-64"])
def test_a_kernel_runs_from_its_manifest_alone(target: str, model: Path, tmp_path: Path) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", target, "--op", "gemm_add", "--op", "argmax")
    rng = np.random.default_rng(5)
    for kernel in manifest["kernels"]:
        if kernel["op"] != "gemm_add":
            continue
        tensors = {name: tensor for name, tensor in kernel["tensors"].items() if tensor["role"] != "weight"}
        inputs: dict[str, Any] = {
            name: rng.standard_normal(tensor["shape"], dtype=np.float32) for name, tensor in tensors.items()
        }
        weight = kernel["tensors"]["w"]
        inputs["w"] = random_weight(rng, weight["dtype"], *weight["shape"], "normal")
        expected = OPS["gemm_add"].reference(inputs, {})["y"]
        load(tmp_path / "a", kernel)(**{**inputs, "w": np.ascontiguousarray(inputs["w"].data)})
        np.testing.assert_allclose(inputs["y"], expected, rtol=1e-4, atol=1e-4)
    (argmax,) = (kernel for kernel in manifest["kernels"] if kernel["op"] == "argmax")
    x, ids = rng.standard_normal(argmax["tensors"]["x"]["shape"], dtype=np.float32), np.full(1, -1, np.int32)
    load(tmp_path / "a", argmax)(x=x, ids=ids)
    assert ids == x.argmax()


@needs_gcc
@pytest.mark.parametrize("make", [mixed_formats, some_biases, qwen3])
def test_a_model_runs_from_its_artefacts(make: Callable[[], Image], tmp_path: Path) -> None:
    """Decode steps by programs.json, the kernels for C and the file's tensors, against the reference backend."""
    image, model = make(), tmp_path / "tiny.gguf"
    model.write_bytes(image.encode())
    prompt = tokens(image, 5, seed=2)
    with load_model(Settings(model, backend="reference", ctx=32, precision="exact")) as session:
        expected = list(session.generate(prompt, max_tokens=6, sampling=Sampling(suppress=frozenset())))
    assert _continuation(model, tmp_path / "a", "c", 32, prompt, 6) == expected


@needs_gcc
@pytest.mark.slow
def test_the_default_model_runs_from_its_artefacts(default_model: Path, tmp_path: Path, golden: dict[str, Any]) -> None:
    case = golden["greedy"][0]
    expected = case["greedy_ids"][:28]  # then comes an end of text, which golden suppressed
    found = _continuation(default_model, tmp_path / "a", "llvm -mcpu=native", 64, case["prompt_ids"], len(expected))
    assert found == expected


def _continuation(model: Path, folder: Path, target: str, ctx: int, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `prompt`, from the artefacts in `folder`, which is made."""
    manifest = compiled(model, folder, "--target", target, "--ctx", str(ctx))
    document = json.loads((folder / "programs.json").read_text())
    program = document["programs"]["decode.argmax"]
    kernels = {kernel["symbol"]: kernel for kernel in manifest["kernels"]}
    files = [str(folder / kernels[symbol]["file"]) for symbol in {call["symbol"] for call in program["calls"]}]
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", *files, "-o", str(folder / "all.so"), "-lm"], check=True)
    library = ctypes.CDLL(str(folder / "all.so"))
    with GGUFFile.open(model) as gguf:
        memory = {name: _buffer(name, spec, document, gguf) for name, spec in program["buffers"].items()}
        memory["cos_sin"][:] = ModelConfig.from_gguf(gguf).rope.table(ctx).reshape(-1)
    memory["block_table"][:] = np.arange(len(memory["block_table"]))
    found: list[int] = []
    for place in range(len(prompt) + count - 1):
        if place < len(prompt):
            memory["token_ids"][:] = prompt[place]
        for call in program["calls"]:
            _launch(library, kernels[call["symbol"]], call["tensors"], memory)
        if place >= len(prompt) - 1:
            found.append(int(memory["token_ids"][0]))
    return found


def _buffer(name: str, spec: dict[str, Any], document: dict[str, Any], gguf: GGUFFile) -> Any:
    """Memory of a buffer of a program: a weight's bytes as in the file, or zeros."""
    if spec["kind"] != "weight":
        return np.zeros(math.prod(spec["shape"]), NUMPY_DTYPES[spec["dtype"]])
    parts = document["stacked"].get(name, [name])
    if spec["dtype"] in FORMATS:
        return np.concatenate([np.ascontiguousarray(gguf.weight(part).data).reshape(-1) for part in parts])
    return np.concatenate([_vector(gguf, part) for part in parts])


def _vector(gguf: GGUFFile, name: str) -> Any:
    """A bias that the file lacks is zeros, as many as its weight has rows."""
    if name in gguf.tensors:
        return np.array(gguf.array(name), np.float32).reshape(-1)
    return np.zeros(gguf.weight(name.replace(".bias", ".weight")).shape[0], np.float32)


def _launch(library: Any, kernel: dict[str, Any], tensors: dict[str, Any], memory: dict[str, Any]) -> None:
    arguments: list[Any] = []
    for argument in kernel["arguments"]:
        view = tensors[argument["name"]]
        pointer = memory[view["buffer"]].ctypes.data
        value = pointer if argument["kind"] == "pointer" else view[argument["kind"]]
        arguments.append(ctypes.c_void_p(value) if argument["kind"] == "pointer" else ctypes.c_int64(value))
    library[kernel["symbol"]](*arguments)


def test_an_object_is_for_its_cpu(model: Path, tmp_path: Path) -> None:
    """The machine in the ELF header (e_machine), and instructions that only the named CPU has."""
    machines = {"llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1": 183, "llvm -mcpu=znver4": 62, "rocm": 224}
    for number, (target, machine) in enumerate(machines.items()):
        folder = tmp_path / str(number)
        for kernel in compiled(model, folder, "--target", target, "--op", "argmax")["kernels"]:
            assert struct.unpack_from("<H", (folder / kernel["file"]).read_bytes(), 18) == (machine,)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to look at instructions")
@pytest.mark.parametrize(
    ("cpu", "has", "lacks"),
    [("x86-64", "xmm", "ymm"), ("znver3", "vfmadd", "zmm"), ("znver4", "zmm", "no such instruction")],
)
def test_instructions_are_those_of_the_cpu(cpu: str, has: str, lacks: str, model: Path, tmp_path: Path) -> None:
    manifest = compiled(
        model, tmp_path / "a", "--target", f"llvm -mtriple=x86_64-linux-gnu -mcpu={cpu}", "--op", "gemm_add"
    )
    text = "".join(
        subprocess.run(
            ["objdump", "-d", str(tmp_path / "a" / kernel["file"])], capture_output=True, text=True, check=True
        ).stdout
        for kernel in manifest["kernels"]
    )
    assert has in text
    assert lacks not in text


@needs_gcc
def test_c_stands_alone_and_compiles_without_a_warning(model: Path, tmp_path: Path) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", "c")
    for kernel in manifest["kernels"]:
        source = tmp_path / "a" / kernel["file"]
        assert re.findall(r"#include <(.*)>", source.read_text()) == ["math.h", "stdbool.h", "stdint.h", "string.h"]
        subprocess.run(["gcc", "-std=c99", "-Wall", "-Werror", "-O2", "-c", str(source), "-o", "/dev/null"], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_takes_the_cuda_source(model: Path, tmp_path: Path) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", "cuda -arch=sm_80")
    seen: set[str] = set()
    for kernel in manifest["kernels"]:
        if kernel["op"] not in seen:
            seen.add(kernel["op"])
            command = [
                "nvcc",
                "-arch=sm_80",
                "-cubin",
                "-o",
                str(tmp_path / "x.cubin"),
                str(tmp_path / "a" / kernel["file"]),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")


def test_only_some_ops(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", "c", "--op", "rms_norm_gemm", "--op", "argmax")
    assert {kernel["op"] for kernel in manifest["kernels"]} == {"argmax", "rms_norm", "gemm"}
    capsys.readouterr()
    common = ("--target", "c", "-m", str(model), "-o", str(tmp_path / "b"))
    status, line = refused(capsys, *common, "--op", "gemmm")
    assert (status, line.split(";")[0]) == (2, "unknown op 'gemmm'")
    status, line = refused(capsys, *common, "--op", "softcap")
    assert (status, line.split(";")[0]) == (2, "no program of this model calls softcap")
    assert not (tmp_path / "b").exists()


def test_json_is_the_manifest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = compiled(model, tmp_path / "a", "--target", "opencl", "--op", "argmax", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document == {"path": str(tmp_path / "a"), **manifest}


def test_human_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(model, tmp_path / "a", "--target", "webgpu")
    out = capsys.readouterr().out
    assert "rope_kv_append: as rope, rope, kv_append (9 buffers, webgpu has 8 at most)\n" in out
    assert re.search(r"^\d+ kernels for webgpu, .* KiB, in .*/a; .*/a/manifest.json says how to call them$", out, re.M)


def test_a_folder_in_use_stays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a"
    common = ("--target", "c", "-m", str(model), "--op", "argmax", "-o", str(folder))
    folder.mkdir()
    assert main(["compile", *common]) == 0  # an empty folder is nobody's
    capsys.readouterr()
    assert refused(capsys, *common) == (
        1,
        f"{folder} is not empty (2 entries, 'argmax_1x{_vocab(folder)}.c' is one): name another folder, or --force"
        " replaces what an earlier compile wrote",
    )
    assert main(["compile", *common, "--force"]) == 0
    capsys.readouterr()
    (folder / "notes.txt").write_text("mine")
    status, line = refused(capsys, *common, "--force")
    assert (status, line) == (
        1,
        f"{folder} holds 'notes.txt', which no earlier compile wrote (1 such entries): it stays; name another folder",
    )
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # no draft is left


def test_the_current_folder_and_a_link_will_do(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is there is filled, not replaced: it may be somebody's working directory, a mount, a link."""
    (tmp_path / "a").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path / "a")
    common = ["compile", "--target", "c", "-m", str(model), "--op"]
    assert main([*common, "argmax", "-o", "."]) == 0
    assert main([*common, "advance", "-o", str(tmp_path / "link"), "--force"]) == 0
    names_there = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [name.split("_")[0] for name in names_there] == ["advance", "manifest.json"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


def test_nothing_is_left_of_what_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a compile, the earlier one stays as it was."""
    common = ["compile", "--target", "c", "-m", str(model), "--op", "argmax", "-o", str(tmp_path / "a")]
    assert main(common) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for error in (KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device")):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(emit, "emit", fail)
        assert main([*common, "--force"]) != 0
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def _vocab(folder: Path) -> str:
    (kernel,) = json.loads((folder / "manifest.json").read_text())["kernels"]
    return kernel["symbol"].removeprefix("argmax_1x")


def test_places_that_cannot_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--target", "c", "-m", str(model), "--op", "argmax", "-o")
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(capsys, *common, str(file)) == (1, f"{file} is there and is no folder: name another with -o")
    assert refused(capsys, *common, str(file / "a")) == (1, f"{file / 'a'}: cannot be made: File exists")
    assert refused(capsys, *common, "/proc/a")[1].startswith("/proc/a: cannot be made: ")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    status, line = refused(capsys, *common, str(tmp_path / "a"))
    assert status == 1
    assert re.fullmatch(
        re.escape(str(tmp_path / "a")) + r": cannot be written \(0\.0 MiB\): No space left on device", line
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "-o", "x") == (
        2,
        "the following arguments are required: --target (see `runtime compile --help`)",
    )
    assert refused(capsys, "--target", "opncl", "-o", "x")[1].startswith(
        "unknown target 'opncl'; did you mean 'opencl'?"
    )


def test_every_primitive_has_a_kernel() -> None:
    fused = {"rms_norm_gemm", "rms_norm_gemm_glu"}
    assert set(emit.kernels()) == set(OPS) - fused


def test_names_are_identifiers_of_one_kernel_each() -> None:
    seen: dict[str, str] = {}
    for op in OPS.values():
        for case in op.cases:
            inputs = {name: value for name, value in op.make_inputs(case).items() if value is not None}
            signature = op.signature({name: type_of(value) for name, value in inputs.items()}, case.attrs)
            symbol = names.symbol(signature)
            assert re.fullmatch(r"[a-z]\w{3,90}", symbol)
            assert seen.setdefault(symbol, names.identity(signature)) == names.identity(signature)
        if len(op.cases) > 100:
            break  # gemm alone has 506, each with its weight


@needs_gcc
@pytest.mark.parametrize("target", ["c", "llvm -mcpu=native"])
@pytest.mark.parametrize("op", sorted(emit.kernels()))
def test_serial_kernels_conform(op: str, target: str, tmp_path: Path) -> None:
    """Loop nests without threads, over the small profile; the full one is the next test."""
    report = run(SerialBackend(targets.parse(target), tmp_path), ops=[op], profile="small")
    assert report.ok, "\n".join(map(str, report.failures))


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(emit.kernels()))
def test_serial_kernels_conform_in_full(op: str, tmp_path: Path) -> None:
    report = run(SerialBackend(targets.parse("llvm -mcpu=native"), tmp_path), ops=[op])
    summary = report.summary()
    assert report.ok, "\n".join(map(str, [*report.failures, *report.survivors]))
    assert (summary["unsupported"], summary["killed"]) == (0, summary["mutants"])


@needs_gcc
def test_float16_by_integers_is_exact(tmp_path: Path) -> None:
    """Every float16 widened; float32 rounded at and beside every tie between two float16, and where it overflows."""
    backend = SerialBackend(targets.parse("c"), tmp_path)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    weight = Weight(FORMATS["F16"], (256, 256), halves.view(np.uint8).reshape(256, 512))
    got = _run(backend, "dequantize", {"w": weight}, {"y": np.zeros((256, 256), np.float32)})["y"]
    np.testing.assert_array_equal(got.reshape(-1), halves.astype(np.float32))

    positive = np.sort(halves[np.isfinite(halves) & (halves >= 0)].astype(np.float32))
    ties = (positive[1:] + positive[:-1]) / 2
    special = np.array([0, 65504, 65519.9, 65520, 7e4, 1e30, np.inf, np.nan, 1e-40, 2.9e-8, 3e-8], np.float32)
    values = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), special])
    values = np.concatenate([values, -values])
    values = np.append(values, np.zeros(-len(values) % 512, np.float32)).reshape(1, -1, 512)
    pages = np.zeros((1, values.shape[1], 1, 512), np.float16)
    zero = np.zeros(1, np.int32)
    inputs = {"k": values, "v": values, "block_table": zero.reshape(1, 1), "seq_ids": zero, "positions": zero}
    got = _run(backend, "kv_append", inputs, {"k_pages": pages, "v_pages": pages.copy()})["k_pages"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got.reshape(-1), values.astype(np.float16).reshape(-1))


def _run(backend: SerialBackend, op: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """One call on dense tensors; the outputs as they are afterwards."""
    from polykern.kernels.host import dense_stride
    from polykern.kernels.spi import BoundCall, DeviceTensor

    tensors: dict[str, DeviceTensor] = {}
    for name, value in {**inputs, **outputs}.items():
        kind = type_of(value)
        buffer = backend.pack(value) if isinstance(value, Weight) else value.reshape(-1)
        tensors[name] = DeviceTensor(buffer, kind.shape, kind.dtype, 0, dense_stride(kind.shape))
    backend.bind(BoundCall(op, tensors, OPS[op].with_defaults({})))()
    return outputs


@needs_gcc
def test_the_documented_loader_works(tmp_path: Path, default_model: Path) -> None:
    """The commands and the program of the README beside the kernels, as they stand there."""
    text = (Path(emit.__file__).parent / "README.md").read_text()
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    script = tmp_path / "loader.py"
    script.write_text(program)
    line = commands.replace("runtime compile", f"{sys.executable} -m polykern.runtime compile -m {default_model}")
    subprocess.run(["sh", "-ec", f"{line}\n{sys.executable} loader.py"], cwd=tmp_path, check=True)
