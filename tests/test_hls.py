"""The kernels of hls/ in C simulation: every case of the contract, mutants, sanitizers, FIFOs that are too shallow.

`make -C hls csim` sets POLYKERN_HLS_FULL: all cases in engines of other sizes too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hls_build
import numpy as np
import pytest
import rtl_model
from hls_device import OPS, HlsDevice
from hls_model import engine
from hls_pack import HEADERS, layout, quants, row_beats
from polykern.kernels.conformance import Report, run
from polykern.kernels.op import Signature, TensorType
from polykern.kernels.ops import OPS as CONTRACT
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import BoundCall, DeviceTensor, Unsupported
from polykern.kernels.testdata import random_weight

HERE = Path(__file__).parent
FULL = bool(os.environ.get("POLYKERN_HLS_FULL"))
pytestmark = pytest.mark.skipif(bool(hls_build.problem()), reason=hls_build.problem() or "it can be compiled")


@pytest.fixture(scope="module", autouse=True)
def headers() -> Path:
    """Fetched once; without a network and a cache of them nothing can be compiled."""
    try:
        return hls_build.headers()
    except hls_build.HeadersUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def device(headers: Path) -> HlsDevice:
    return HlsDevice(hls_build.library())


@pytest.fixture(scope="module")
def sanitized(headers: Path) -> Path:
    return hls_build.library(sanitize=True)


def check(op: str, report: Report) -> None:
    """Every case passes, every mutant dies, nothing is refused."""
    assert report.ok, "\n".join(str(problem) for problem in [*report.failures, *report.survivors, *report.missing])
    summary = report.summary()
    assert summary["passed"] == len(CONTRACT[op].cases)
    assert summary["killed"] == summary["mutants"] == len(CONTRACT[op].mutants)


@pytest.mark.parametrize("op", OPS)
def test_conforms(device: HlsDevice, op: str) -> None:
    check(op, run(device, ops=[op]))


@pytest.mark.skipif(not FULL, reason="other sizes of the engine: make -C hls csim")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 3), (32, 2, 8)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_conforms_in_other_sizes(op: str, sizes: tuple[int, int, int]) -> None:
    channels, tokens, heads = sizes
    library = hls_build.library(f"-DCHANNELS={channels} -DTOKENS={tokens} -DHEAD_LANES={heads}")
    check(op, run(HlsDevice(library), ops=[op]))


def child(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """hls_device.py, or `code`, in a process that has the sanitizers' runtimes."""
    command = [sys.executable, *(["-c", textwrap.dedent(code)] if code else [str(HERE / "hls_device.py")]), *arguments]
    # Python itself leaks at exit, and libraries are loaded behind its allocator: only leaks are not looked for.
    environment = {"LD_PRELOAD": hls_build.sanitizer_runtimes(), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=HERE, timeout=550, check=False
    )


@pytest.mark.parametrize("op", OPS)
def test_conforms_under_sanitizers(sanitized: Path, op: str) -> None:
    done = child(str(sanitized), op)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)[op]
    assert not found["problems"]
    summary, contract = found["summary"], CONTRACT[op]
    assert summary["passed"] == len(contract.cases)
    assert summary["killed"] == summary["mutants"] == len(contract.mutants)


def test_sanitizers_see_a_read_out_of_bounds(sanitized: Path) -> None:
    """One row more than there is, so that the reader of a channel leaves its weights."""
    code = f"""
        from pathlib import Path
        import numpy as np
        from hls_device import HlsDevice
        from polykern.kernels.op import TensorType
        from polykern.kernels.quant import Weight
        from polykern.kernels.spi import BoundCall, DeviceTensor
        device = HlsDevice(Path({str(sanitized)!r}))
        packed = device.pack(Weight.from_array(np.ones((4, 16), np.float32)))
        y = DeviceTensor(device.alloc(TensorType((5, 16), "f32")), (5, 16), "f32", 0, 16)
        device.bind(BoundCall("dequantize", {{"w": DeviceTensor(packed, (5, 16), "F32"), "y": y}}, {{}}))()
    """
    done = child(code=code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "read_weights" in done.stderr


# -- the engine


def gemm(device: HlsDevice, weight: Weight, x: Array, bias: Array | None, precision: str = "fast") -> Array:
    """x @ weight.T + bias on the device."""

    def place(array: Array) -> DeviceTensor:
        kind = TensorType(array.shape, "f32")
        tensor = DeviceTensor(device.alloc(kind), array.shape, "f32", 0, math.prod(array.shape[1:]))
        device.write(tensor.buffer, array)
        return tensor

    y = place(np.full((len(x), weight.shape[0]), np.nan, np.float32))
    tensors = {"x": place(x), "w": DeviceTensor(device.pack(weight), weight.shape, weight.format.name), "y": y}
    if bias is not None:
        tensors["bias"] = place(bias)
    device.bind(BoundCall("gemm", tensors, {"precision": precision}))()
    return device.read(y.buffer, y.type)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("name", HEADERS)
def test_the_engine_computes_what_the_readme_says(device: HlsDevice, name: str, tokens: int) -> None:
    """Bit for bit, rows of one beat, of some, and of more than there are partial sums."""
    rng = np.random.default_rng(5)
    for blocks in (1, 3, 8, 40):
        in_features = blocks * FORMATS[name].block_length
        weight = random_weight(rng, name, 11, in_features, "normal")
        x = rng.standard_normal((tokens, in_features), dtype=np.float32)
        x[0, :32] *= 1e-38  # too small for a step
        bias = rng.standard_normal(11, dtype=np.float32) if blocks % 2 else None
        found, expected = gemm(device, weight, x, bias), engine(weight, x, bias)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), blocks


@pytest.mark.parametrize("name", rtl_model.FORMATS)
def test_the_rtl_reads_the_same_beats(name: str) -> None:
    rng = np.random.default_rng(6)
    for blocks in (1, 5, 32, 45):
        weight = random_weight(rng, name, 3, blocks * 32, "normal")
        rtl = [bytes.fromhex(line)[::-1] for line in rtl_model.beats_of(rtl_model.blocks_of(weight))]
        assert b"".join(rtl) == row_beats(weight).tobytes(), blocks


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_stays_in_its_row(device: HlsDevice, value: float) -> None:
    weight = random_weight(np.random.default_rng(7), "Q4_K", 9, 256, "normal")
    x = np.ones((3, 256), np.float32)
    x[1, 77] = value
    found = gemm(device, weight, x, None)
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[0], engine(weight, x[:1])[0])
    assert np.array_equal(found[2], found[0])


@pytest.mark.parametrize("source", sorted(path.name for path in hls_build.HLS.glob("*.cpp")))
def test_what_vitis_would_see(headers: Path, source: str) -> None:
    """Once macros are gone: every pointer of the kernel is a port, each channel has one, processes are calls, and
    nothing is used that has no hardware."""
    command = ["g++", "-std=c++14", "-E", "-P", "-D__VITIS_HLS__", "-DCHANNELS=8", "-DWEIGHT_BITS=4", "-DKV_BITS=16"]
    command += ["-Icsim", "-I.", "-isystem", str(headers), source]
    done = subprocess.run(command, cwd=hls_build.HLS, capture_output=True, text=True, check=True)
    start = done.stdout.rindex('extern "C" void')
    kernel, ports = done.stdout[start:], re.findall(r"#pragma HLS interface m_axi port=(\w+)", done.stdout[start:])
    arguments = kernel[: kernel.index("{")]
    assert re.findall(r"\*\s*(\w+)", arguments) == ports
    assert [port for port in ports if re.fullmatch(r"w\d+", port)] == [f"w{c}" for c in range(8)] * ("w0" in ports)
    assert "#pragma HLS dataflow" in kernel
    assert "region" not in kernel
    text = re.sub(r"//.*", "", (hls_build.HLS / source).read_text())
    assert not re.search(r"\b(std::|new|delete|malloc|throw|virtual|try)\b", text)
    labels = re.findall(r"^ *([A-Z_]+):$", text, re.M)
    assert labels
    assert all(re.search(rf"^ *{label}:\n *(for|while|do)\b", text, re.M) for label in labels)


# -- FIFOs


@pytest.mark.parametrize(
    ("fifos", "depth", "op", "case", "message"),
    [
        # a row of 2048 numbers is 128 words: they wait for their norm
        (("waiting",), 64, "rms_norm", "2x2048", "process fork_rows waits on full FIFO waiting depth 64"),
        # values wait for the softmax of a block of 16 keys, which in pages of 1 are 16 runs
        (
            ("value_runs", "value_cuts", "value_beats", "values"),
            1,
            "attention",
            "page-size-1",
            "process plan waits on full FIFO value_runs depth 1",
        ),
    ],
    ids=["rms_norm", "attention"],
)
def test_a_shallow_fifo_is_a_deadlock(
    device: HlsDevice, fifos: tuple[str, ...], depth: int, op: str, case: str, message: str
) -> None:
    for fifo in fifos:
        device.set_depth(fifo, depth)
    try:
        (result,) = run(device, ops=[op], case=case).cases
    finally:
        for fifo in fifos:
            device.set_depth(fifo, 0)
    assert result.status == "failed"
    assert "deadlock: process " in result.reason
    assert message in result.reason
    assert "waits on empty FIFO " in result.reason
    (again,) = run(device, ops=[op], case=case).cases  # the next call is not harmed
    assert again.status == "passed"


@pytest.mark.parametrize("op", ["gemm", "dequantize", "rope", "glu"])
def test_no_depth_is_needed_where_nothing_waits(device: HlsDevice, op: str) -> None:
    """Every FIFO one word deep: slow in hardware, never stuck."""
    text = "".join(path.read_text() for path in hls_build.HLS.glob("*.cpp"))
    fifos = set(re.findall(r"FIFOS?\(\w+, (\w+),", text))
    assert len(fifos) > 20
    try:
        for fifo in fifos:
            device.set_depth(fifo, 1)
        report = run(device, ops=[op], profile="small")
    finally:
        for fifo in fifos:
            device.set_depth(fifo, 0)
    assert report.summary()["passed"] == len(report.cases), report.failures


# -- constants and packing


def test_constants_are_the_contracts(device: HlsDevice) -> None:
    assert len(device.formats) == len(FORMATS)
    for row, fmt in zip(device.formats, FORMATS.values(), strict=True):
        assert (row.group_length, row.block_length) == (fmt.group_length, fmt.block_length), fmt.name
        assert row.bits == (8 * fmt.block_bytes if fmt.is_float else 4 if fmt.bits == 4 else 8), fmt.name
        for in_features in (1, 2, 3, 5, 8, 9, 123, 128):
            count = in_features * fmt.block_length
            beats = device.library.csim_row_beats(device.format_ids[fmt.name], count)
            assert beats == layout(fmt.name, count)[2], (fmt.name, count)


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [("Q4_0", 4.5), ("Q4_1", 5), ("Q4_K", 4.5), ("Q8_0", 8.5), ("Q5_1", 9), ("Q5_K", 8.5), ("Q6_K", 9), ("F16", 16)],
)
def test_bits_per_weight_are_those_of_the_readme(name: str, bits_per_weight: float) -> None:
    assert layout(name, 4096)[2] * 512 / 4096 == bits_per_weight


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if not fmt.is_float])
def test_quants_are_all_there_are(name: str) -> None:
    """From the lowest to the highest that the bits allow."""
    fmt = FORMATS[name]
    weight = random_weight(np.random.default_rng(3), name, 64, 4 * fmt.block_length, "normal")
    low = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128, "Q6_K": -32}.get(name, 0)
    found = quants(weight)
    assert (found.min(), found.max()) == (low, low + 2**fmt.bits - 1)


# -- refusals


def signature(op: str, attrs: dict[str, Any] | None = None, **tensors: tuple[tuple[int, ...], str]) -> Signature:
    kinds = {name: TensorType(shape, dtype) for name, (shape, dtype) in tensors.items()}
    return CONTRACT[op].signature(kinds, attrs or {})


def attention(head_dim: int, kv: tuple[str, str]) -> Signature:
    pages = (4, 1, 16, head_dim)
    ids = dict.fromkeys(("seq_ids", "positions"), ((1,), "i32"))
    cache = {"k_pages": (pages, kv[0]), "v_pages": (pages, kv[1]), "block_table": ((1, 4), "i32")}
    return signature("attention", q=((1, 1, head_dim), "f32"), **cache, **ids)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            signature("gemm", x=((1, 32800), "f32"), w=((1, 32800), "Q4_0")),
            "in_features 32800 > 32768: x is held on chip",
        ),
        (attention(272, ("f16", "f16")), "head_dim 272 > 256: a head's sums are held on chip"),
        (attention(64, ("f16", "f32")), "keys in f16 and values in f32: a kernel is built for one of them"),
        (
            signature("rms_norm", x=((1, 16385), "f32"), weight=((16385,), "f32")),
            "features 16385 > 16384: a row waits in a FIFO for its norm",
        ),
        (
            signature("rope", x=((1, 1, 258), "f32"), cos_sin=((9, 258), "f32"), positions=((1,), "i32")),
            "head_dim 258 > 256: a head is turned on chip",
        ),
        (signature("softcap", x=((1, 4), "f32")), f"no HLS kernel for softcap; there are {', '.join(OPS)}"),
    ],
    ids=lambda value: value.op if isinstance(value, Signature) else "",
)
def test_refuses_before_a_launch(device: HlsDevice, asked: Signature, reason: str) -> None:
    assert device.supports(asked) == Unsupported(asked.op, reason)


# -- make


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    unset = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "XILINX_VITIS")
    environment = {n: v for n, v in os.environ.items() if n not in unset}
    if path is not None:
        environment["PATH"] = path
    command = ["make", "-s", "-C", str(hls_build.HLS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(shutil.which("v++") is not None, reason="Vitis is installed")
def test_xclbin_without_vitis() -> None:
    done = make("xclbin")
    assert done.returncode
    assert done.stderr.splitlines()[0] == (
        "v++ is not here: make xclbin needs Vitis 2022.2 or later (source its settings64.sh); make csim needs none"
    )


def test_xclbin_for_an_unknown_board() -> None:
    done = make("xclbin", "PLATFORM=vck190")
    assert done.returncode
    assert done.stderr.splitlines()[0] == "PLATFORM=vck190: there are u280, u50 and kv260"


@pytest.mark.parametrize(
    ("board", "platform", "last_channel"),
    [
        ("u280", "xilinx_u280_gen3x16_xdma_1_202211_1", "gemm_int4_1.w15:HBM[15]"),
        ("u50", "xilinx_u50_gen3x16_xdma_5_202210_1", "gemm_int4_1.w15:HBM[15]"),
        ("kv260", "xilinx_kv260_base_202420_1", "gemm_int4_1.w3:HP3"),
    ],
)
def test_xclbin_calls_vitis(tmp_path: Path, board: str, platform: str, last_channel: str) -> None:
    """A v++ that only writes its command line: each kernel is compiled, all are linked, one bitstream is there."""
    tool = tmp_path / "bin" / "v++"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/log\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = make("xclbin", f"PLATFORM={board}", f"BUILD={tmp_path}/build", path=path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    compiled, linked = [line for line in lines if " -c " in line], [line for line in lines if " -l " in line]
    assert all(f"-t hw --platform {platform} " in line for line in lines)
    assert [line.split(" -k ")[1].split()[0] for line in compiled] == [
        "gemm_int4",
        "attention_f16",
        "rms_norm",
        "rope",
        "glu",
    ]
    assert len(linked) == 1
    assert f"--connectivity.sp {last_channel}" in linked[0]
    assert (tmp_path / "build" / f"{board}-hw" / "polykern.xclbin").exists()
