"""Binaries built beforehand: a real one, by the emulator's compiler, run and held to its manifest; and bad ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import fpga_runs
import pytest
from fpga_runs import CONFORMANCE, GOLDEN, TOOL, answer
from polykern.backends.opencl.fpga import bitstream, emulator, programs
from polykern.backends.opencl.fpga.engine import EMULATED, Engine
from polykern.kernels.errors import BackendUnavailable
from polykern.runtime.cli import parse

FORMATS = "Q4_1,Q8_0"  # of the default model


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A binary that the emulator's compiler made."""
    fpga_runs.need_emulator()
    path = tmp_path_factory.mktemp("bitstream") / "kernels.aocx"
    done = fpga_runs.run([*TOOL, "build", "-o", str(path), "--formats", FORMATS])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: {path.stat().st_size} bytes for Q4_1, Q8_0; {path}.json")
    return path


def test_the_manifest_tells_all(built):
    manifest = json.loads(Path(f"{built}.json").read_text())
    assert manifest["format_version"] == bitstream.FORMAT_VERSION
    assert manifest["binary"] == {
        "bytes": built.stat().st_size, "sha256": hashlib.sha256(built.read_bytes()).hexdigest()
    }  # fmt: skip
    assert manifest["platform"] == emulator.PLATFORM
    assert (manifest["formats"], manifest["engine"]) == (["Q4_1", "Q8_0"], vars(EMULATED))
    kernels = {kernel["name"]: kernel["arguments"] for kernel in manifest["kernels"]}
    assert kernels["gemm_q4_1_fast"] == ["int tokens", "int in_features", "int rows"]
    assert kernels["attention_write_f16"][0] == "global float* y"
    assert len(kernels) == len(manifest["kernels"]) == 9 + 2 * 4 + 2 * 10


def test_it_conforms(built):
    """Each op but with the formats that it was built for."""
    names = ["gemm", "attention", "dequantize", "embedding", "rms_norm", "rope", "kv_append", "glu", "argmax"]
    for name, report in answer(CONFORMANCE, f"fpga:{built}", FORMATS, *names).items():
        mutants = [line for line in report["wrong"] if line.startswith("MutantResult")]
        assert report["wrong"] == mutants, name
        assert report["passed"] == report["cases"] > 0, name
        # Of the formats left out one is needed to kill those two.
        assert not mutants or name in ("gemm", "dequantize", "embedding")
        assert all("high_bits_dropped" in line for line in mutants), mutants


def test_the_default_model_answers_as_golden(built):
    found = answer(GOLDEN, f"fpga:{built}", "fast", "8" if fpga_runs.EVERYTHING else "4")
    assert "FPGA Emulation" in found["device"]


def test_the_command_line_says_what_it_runs(built):
    args = ("conformance", "--backend", "opencl", "--op", "add", "--json", "--bitstream", str(built))
    done = fpga_runs.runtime(*args, "--device", "fpga")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), done.stderr
    digest = hashlib.sha256(built.read_bytes()).hexdigest()
    assert found["detail"]["bitstream"] == {"file": str(built), "sha256": digest}


def test_a_kernel_that_lacks_is_refused_by_name(built):
    args = ("--backend", "opencl", "--bitstream", str(built), "--op", "gemm", "--case", "Q6_K-fast-nan")
    done = fpga_runs.runtime("conformance", *args)
    assert done.returncode == 1
    assert (
        "unsupported: gemm Q6_K-fast-nan: fpga.gemm_q6_k_fast: kernels.aocx has no kernel gemm_read_q6_k_fast; it was"
        " built for Q4_1, Q8_0"
    ) in done.stdout


def changed(built: Path, folder: Path, change, name: str = "changed.aocx") -> Path:
    """A copy of a binary whose manifest went through `change`."""
    path = folder / name
    shutil.copy(built, path)
    manifest = json.loads(Path(f"{built}.json").read_text())
    change(manifest)
    Path(f"{path}.json").write_text(json.dumps(manifest))
    return path


def test_a_model_that_does_not_fit_says_which_kernel_and_number(built, tmp_path):
    def smaller(manifest):
        manifest["engine"]["max_in_features"] = 1024

    path = changed(built, tmp_path, smaller)
    done = fpga_runs.runtime(
        "plan", "--backend", "opencl", "--bitstream", str(path), "--fallback", "error", "--ctx", "64"
    )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert "gemm: fpga.gemm_q4_1_fast: in_features 1536 > 1024, which these kernels hold on chip (30x)" in line


# --- bad files, found before OpenCL is asked


@pytest.fixture
def plain(tmp_path) -> Path:
    """A file with a right manifest, as `source` writes it: for what is found without loading it."""
    path = tmp_path / "plain.aocx"
    about = {"platform": "A board's platform", "device": "", "driver": ""}
    bitstream.write(path, b"bits" * 1000, about, ["Q4_1"], Engine())
    return path


def rejected(path: Path) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        bitstream.read(str(path))
    (line,) = str(caught.value).splitlines()
    return line


def test_a_right_one_is_read(plain):
    found = bitstream.read(str(plain))
    assert (found.engine, found.formats, found.platform) == (Engine(), ("Q4_1",), "A board's platform")
    assert found.refusal(programs.gemm_family("Q4_1", "fast")) == ""


def test_files_that_are_not_there(plain, tmp_path):
    missing = tmp_path / "none.xclbin"
    assert rejected(missing) == f"bitstream {missing} cannot be read: No such file or directory"
    assert rejected(tmp_path) == f"bitstream {tmp_path} cannot be read: Is a directory"
    Path(f"{plain}.json").unlink()
    assert rejected(plain).startswith(f"{plain} has no manifest: plain.aocx.json belongs beside it; `python -m ")


def test_a_file_that_is_cut_short_or_damaged(plain):
    content = plain.read_bytes()
    plain.write_bytes(content[:-1])
    assert rejected(plain) == f"{plain} has 3999 bytes, its manifest says 4000: it is cut short, or another file"
    plain.write_bytes(b"B" + content[1:])
    assert rejected(plain).endswith("…: it is damaged, or another file")


def kernel(manifest, name):
    return next(kernel for kernel in manifest["kernels"] if kernel["name"] == name)


CHANGES = {
    "version": (lambda m: m.update(format_version=2), "has format version 2, this polykern reads 1: build"),
    "no_version": (lambda m: m.pop("format_version"), "is not whole: it has no 'format_version'"),
    "no_sha256": (lambda m: m["binary"].pop("sha256"), "is not whole: it has no 'sha256'"),
    "no_kernels": (lambda m: m.pop("kernels"), "is not whole: it has no 'kernels'"),
    "no_channels": (lambda m: m["engine"].pop("channels"), "is not whole: it has no 'channels'"),
    "channels": (lambda m: m["engine"].update(channels=0), "channels is 0, expected a number from 1 to 16777215"),
    "tokens": (lambda m: m["engine"].update(tokens="4"), "tokens is '4', expected a number from 1"),
    "fewer": (
        lambda m: kernel(m, "gemm_read_q4_1_fast")["arguments"].pop(),
        "kernel gemm_read_q4_1_fast takes 9 arguments, this polykern passes 10",
    ),
    "order": (
        lambda m: kernel(m, "gemm_q4_1_fast")["arguments"].reverse(),
        "kernel gemm_q4_1_fast: argument 0 is 'int rows', this polykern passes 'int tokens'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_does_not_fit(plain, tmp_path, name):
    change, text = CHANGES[name]
    said = rejected(changed(plain, tmp_path, change))
    assert text in said
    assert str(tmp_path / "changed.aocx.json") in said


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[]", "is not whole"), ("\udcff", "cannot be read")]
)
def test_a_manifest_that_is_none(plain, text, said):
    Path(f"{plain}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert said in rejected(plain)


# --- bad binaries with manifests that claim them, found by the loader


BAD = """
import json, sys
from polykern.backends.opencl import provider
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.spi import OpenOptions

said = []
for path in sys.argv[1:]:
    try:
        provider.open(OpenOptions(device=f"fpga:{path}"))
        said.append("")
    except BackendUnavailable as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_wrong_binaries(built, tmp_path):
    content = built.read_bytes()
    contents = {
        "short": content[: len(content) // 3],
        "noise": hashlib.sha256(b"").digest() * 1000,
        "half": content[:1000] + hashlib.sha256(b"").digest() * (len(content) // 32),
        "empty": b"",
    }
    paths: list[Path] = []
    for name, binary in contents.items():
        about = {"bytes": len(binary), "sha256": hashlib.sha256(binary).hexdigest()}
        path = changed(built, tmp_path, lambda m, about=about: m.update(binary=about), f"{name}.aocx")
        path.write_bytes(binary)
        paths.append(path)

    def claims_more(manifest):
        manifest["kernels"].append({"name": "fly", "arguments": []})

    def board(manifest):
        manifest["platform"] = "Some board"

    paths += [changed(built, tmp_path, claims_more, "fly.aocx"), changed(built, tmp_path, board, "board.aocx")]
    *wrong, fly = answer(BAD, *map(str, paths[:-1]))
    label = "Intel(R) FPGA Emulation Platform for OpenCL(TM) / Intel(R) FPGA Emulation Device"
    for path, said in zip(paths, wrong, strict=False):
        assert said.startswith(f"{path} is no program for {label}: clCreateProgramWithBinary failed: INVALID_"), said
    assert fly == f"{tmp_path / 'fly.aocx'} has no kernel fly, which its manifest lists"
    (said,) = answer(BAD, str(paths[-1]))
    if "no OpenCL device found" not in said:
        assert said.startswith(f"{paths[-1]} is for Some board, which is not among the OpenCL devices here (")
        assert said.endswith("): install the board's OpenCL runtime, or try --device fpga-emu")


def test_a_board_needs_a_bitstream():
    done = fpga_runs.runtime("conformance", "--backend", "opencl", "--device", "fpga")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert line.endswith(
        "a board runs what was built for it: name the bitstream, --device fpga --bitstream FILE.aocx or FILE.xclbin"
        " (without a board: --device fpga-emu)"
    )


# --- the option, and the tool


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ("--bitstream a.aocx", "fpga:a.aocx"),
        ("--device fpga-emu --bitstream a.aocx", "fpga-emu:a.aocx"),
        ("--bitstream a.aocx --device fpga-emu", "fpga-emu:a.aocx"),
        ("--bitstream a.aocx --bitstream b.xclbin", "fpga:b.xclbin"),
        ("--device fpga:c.aocx", "fpga:c.aocx"),
        ("--device 1", "1"),
    ],
)
def test_the_option_is_part_of_the_device(options, device):
    assert parse(["run", *options.split(), "hello"]).device == device


def test_source_and_manifest_for_a_board(tmp_path):
    """What a board's compiler is given holds all numbers, and its result gets the manifest of that text."""
    text, result = tmp_path / "kernels.cl", tmp_path / "kernels.aocx"
    done = fpga_runs.run([*TOOL, "source", "-o", str(text), "--formats", "Q4_0", "--channels", "16"])
    assert done.returncode == 0, done.stderr
    assert "#define CHANNELS 16\n" in text.read_text()
    assert "#define EMULATED" not in text.read_text()
    assert "#include" not in text.read_text()
    result.write_bytes(b"as if a board's compiler had made it")
    done = fpga_runs.run([*TOOL, "manifest", str(result), "--like", f"{text}.json", "--platform", "A board"])
    assert done.returncode == 0, done.stderr
    found = bitstream.read(str(result))
    assert (found.engine, found.formats, found.platform) == (Engine(channels=16), ("Q4_0",), "A board")


def test_the_tool_names_what_it_does_not_know(tmp_path):
    done = fpga_runs.run([*TOOL, "build", "-o", str(tmp_path / "x"), "--formats", "Q3_Q"])
    assert done.returncode == 2
    assert "no format 'Q3_Q'; there are F32, F16" in done.stderr
    done = fpga_runs.run([*TOOL, "source", "-o", str(tmp_path / "x"), "--channels", "3"])
    assert done.returncode == 2
    assert "expected 1, 2, 4, 8, 16 or 32 memory channels, got '3'" in done.stderr
    done = fpga_runs.run([*TOOL, "source", "-o", str(tmp_path / "none" / "x.cl")])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: [Errno 2] No such file or directory")
    done = fpga_runs.run([*TOOL, "manifest", str(tmp_path / "x"), "--like", __file__])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is no manifest of `source`" in done.stderr
