"""The OpenCL FPGA kernels on Intel's emulator: conformance, the default model, channels as on a board, refusals.

Formats are a few unless POLYKERN_ALL_FPGA is set (`make fpga`): each takes seconds to compile.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import fpga_runs
import numpy as np
import pytest
from fpga_runs import CONFORMANCE, EVERYTHING, GOLDEN, answer
from hls_pack import row_beats
from polykern.backends.opencl import fpga
from polykern.backends.opencl.fpga import emulator, programs
from polykern.backends.opencl.fpga.engine import BEAT_BYTES, EMULATED, LAYOUTS, Engine, pack
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.ops import OPS
from polykern.kernels.quant import FORMATS, Weight
from polykern.kernels.testdata import random_weight

# All but the fused ones, which plans take apart.
OPS_HERE = [name for name, op in OPS.items() if op.decompose is None]
# Three headers (hls/README.md), both widths, and one without blocks: enough to kill every mutant.
FORMATS_HERE = "" if EVERYTHING else "Q4_1,Q4_K,Q6_K,F16"


@pytest.fixture(scope="module")
def reports():
    fpga_runs.need_emulator()
    return answer(CONFORMANCE, "fpga-emu", FORMATS_HERE, *OPS_HERE)


@pytest.mark.parametrize("op", OPS_HERE)
def test_conforms(reports, op):
    report = reports[op]
    assert report["wrong"] == []
    assert report["passed"] == report["cases"] > 0
    assert report["killed"] == report["mutants"] >= 3


def test_the_command_line_opens_it():
    fpga_runs.need_emulator()
    done = fpga_runs.runtime("conformance", "--backend", "opencl", "--device", "fpga-emu", "--op", "add", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), done.stderr
    assert found["device"] == "Intel(R) FPGA Emulation Platform for OpenCL(TM) / Intel(R) FPGA Emulation Device"
    assert found["detail"]["engine"] == vars(EMULATED)


@pytest.mark.parametrize("precision", ["fast", "exact"] if EVERYTHING else ["fast"])
def test_the_default_model_answers_as_golden(precision):
    """Without a call on the host: `fallback` is "error"."""
    fpga_runs.need_emulator()
    found = answer(GOLDEN, "fpga-emu", precision, "8")
    assert (found["checked"], "FPGA Emulation" in found["device"]) == (8, True)


# --- channels


ENGINES = """
import json
from dataclasses import replace
from polykern.backends.opencl import device
from polykern.backends.opencl.fpga import FpgaBackend, emulator
from polykern.backends.opencl.fpga.engine import EMULATED, Engine
from polykern.kernels import conformance
from polykern.kernels.ops import OPS

emulator.prepare()
opened = device.open_device("fpga-emu")
failures, passed = [], 0

def check(backend, name, keep):
    global passed
    op = OPS[name]
    report = conformance.run(backend, ops=[replace(op, cases=tuple(filter(keep, op.cases)), mutants=())])
    passed += report.summary()["passed"]
    failures.extend(map(str, [*report.failures, *report.missing]))

for channels, tokens in ((1, 1), (8, 3)):
    backend = FpgaBackend(opened, engine=replace(EMULATED, channels=channels, tokens=tokens, max_in_features=4096))
    check(backend, "gemm", lambda case: case.name.startswith("Q4_1-fast") and case.dims["N"] < 8000)
    check(backend, "embedding", lambda case: case.dims["format"] == "Q4_1")
    check(backend, "dequantize", lambda case: case.dims["format"] == "Q4_1")
board = FpgaBackend(opened, engine=replace(Engine(), emulated=True), is_sequential=False)
check(board, "gemm", lambda case: case.name in ("Q4_1-fast-5x123x32", "Q4_1-fast-33x20x64", "Q4_1-fast-bias-7"))
check(board, "attention", lambda case: case.name in ("decode-ragged", "prefill-chunk", "lost"))
check(board, "dequantize", lambda case: case.name == "Q4_1-5x96")
print(json.dumps({"passed": passed, "failures": failures}))
"""


def test_other_numbers_of_channels_and_kernels_that_run_at_once():
    """The last few with channels as short as a board's, so that each kernel waits for the others again and again."""
    fpga_runs.need_emulator()
    found = answer(ENGINES)
    assert found["failures"] == []
    assert found["passed"] == 2 * (22 + 4 + 6) + 7


@pytest.mark.parametrize("family", programs.families(FORMATS), ids=lambda family: family.label)
def test_structure_is_what_a_board_takes(family):
    """Each channel is written by one kernel and read by another, and each kernel is a single work-item."""
    text = re.sub(r"\bNAME\((\w+)\)", rf"\1_{family.suffix}", family.body())
    functions = dict(re.findall(r"^(?:SINGLE __kernel|inline) \w+ (\w+)(.*?\n}\n)", text, re.DOTALL | re.MULTILINE))
    kernels = {name: functions[name] for name in family.kernels()}
    assert text.count("__kernel") == text.count("SINGLE __kernel") == len(kernels)
    helpers = {name: body for name, body in functions.items() if name not in kernels}
    for name, body in kernels.items():  # with what it calls
        kernels[name] = body + "".join(helpers[helper] for helper in helpers if f"{helper}(" in body)
    channels = re.findall(r"^channel \w+ (\w+)", text, re.MULTILINE)
    for channel in channels:
        users = [
            [name for name, body in kernels.items() if re.search(rf"\b{verb}_channel_intel\({channel}\b", body)]
            for verb in ("write", "read")
        ]
        assert [len(names) for names in users] == [1, 1], f"{channel}: {users}"
        assert users[0] != users[1], channel
    assert family.file not in ("gemm", "attention", "dequantize") or len(channels) >= 2


def test_no_kernel_is_there_twice():
    names = [name for family in programs.families(FORMATS) for name in family.kernels()]
    assert len(names) == len(set(names)) > 100


# --- the engine's bits


BITS = """
import json, sys
import numpy as np
import test_fpga_emulator as here
from hls_model import engine
from polykern.backends.opencl import provider
from polykern.kernels.op import TensorType
from polykern.kernels.spi import BoundCall, DeviceTensor, OpenOptions

backend = provider.open(OpenOptions(device="fpga-emu"))
different = {}
for name in sys.argv[1:]:
    weight, x = here.bits_case(name)
    shape = (x.shape[0], weight.shape[0])
    buffers = {"x": backend.alloc(TensorType(x.shape, "f32")), "y": backend.alloc(TensorType(shape, "f32"))}
    backend.write(buffers["x"], x)
    tensors = {
        "x": DeviceTensor(buffers["x"], x.shape, "f32", 0, x.shape[1]),
        "w": DeviceTensor(backend.pack(weight), weight.shape, name),
        "y": DeviceTensor(buffers["y"], shape, "f32", 0, shape[1]),
    }
    backend.bind(BoundCall("gemm", tensors, {"precision": "fast"}))()
    y = backend.read(buffers["y"], TensorType(shape, "f32"))
    assert 0.1 < np.abs(y).mean() < np.inf
    different[name] = int(np.sum(y.view(np.uint32) != engine(weight, x).view(np.uint32)))
print(json.dumps(different))
"""


def bits_case(name: str) -> tuple[Weight, np.ndarray]:
    """5 rows: one with a block of zeros, one with a number far larger than its neighbours."""
    rng = np.random.default_rng(5)
    features = 2304 if FORMATS[name].block_length == 256 else 1440
    x = rng.standard_normal((5, features), dtype=np.float32)
    x[1, 64:96] = 0
    x[2, 40] = 300.0
    return random_weight(rng, name, 37, features, "normal"), x


def test_bits_are_those_of_the_engine():
    """The model is the one that the C++ of hls/ equals bit for bit."""
    fpga_runs.need_emulator()
    names = [name for name, fmt in FORMATS.items() if not fmt.is_float and (EVERYTHING or name in FORMATS_HERE)]
    assert answer(BITS, *names) == dict.fromkeys(names, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_beats_are_those_of_the_engine(name):
    """Packed as for the C++ of hls/, in whole beats and not, rows dealt round robin and behind them zeros."""
    block = FORMATS[name].block_length
    for features in (block, 3 * block, 9 * max(block, 32)):
        weight = random_weight(np.random.default_rng(1), name, 5, features, "normal")
        packed = pack(weight, Engine(channels=2))
        assert packed.shape == (2, 3, LAYOUTS[name].row_beats(features), BEAT_BYTES)
        rows = packed.swapaxes(0, 1).reshape(6, -1, BEAT_BYTES)
        assert np.array_equal(rows[:5], row_beats(weight))
        assert not rows[5].any()


# --- refusals


REFUSALS = """
import json
from polykern.backends.opencl import provider
from polykern.kernels.op import Signature, TensorType
from polykern.kernels.ops import OPS
from polykern.kernels.spi import OpenOptions

backend = provider.open(OpenOptions(device="fpga-emu"))

def ask(op, attrs=None, **tensors):
    types = {name: TensorType(tuple(shape), dtype) for name, (dtype, *shape) in tensors.items()}
    answer = backend.supports(OPS[op].signature(types, attrs or {}))
    return getattr(answer, "reason", "")

def attention(heads, kv_heads, dim, pages=4):
    return ask("attention", q=("f32", 1, heads, dim), k_pages=("f16", pages, kv_heads, 16, dim),
               v_pages=("f16", pages, kv_heads, 16, dim), block_table=("i32", 1, pages), seq_ids=("i32", 1),
               positions=("i32", 1))

print(json.dumps([
    ask("gemm", {"precision": "fast"}, x=("f32", 1, 16384), w=("Q4_1", 8, 16384)),
    ask("gemm", {"precision": "fast"}, x=("f32", 1, 15360), w=("Q4_1", 8, 15360)),
    attention(2, 2, 257), attention(2, 2, 256), attention(34, 2, 64), attention(32, 2, 64),
    attention(2, 2, 64, 513), attention(2, 2, 64, 512),
    ask("dequantize", w=("F32", 2, 262145)), ask("dequantize", w=("F32", 2, 262144)),
    ask("gemm_add", x=("f32", 1, 32), w=("Q4_0", 1, 32), y=("f32", 1, 1)),
]))
"""


def test_refusals_say_the_number():
    fpga_runs.need_emulator()
    assert answer(REFUSALS) == [
        "fpga.gemm_q4_1_fast: in_features 16384 > 15360, which these kernels hold on chip", "",
        "fpga.attention_f16: head_dim 257 > 256, which these kernels hold on chip", "",
        "fpga.attention_f16: query heads per KV head 17 > 16, which these kernels hold on chip", "",
        "fpga.attention_f16: 8208 keys of head_dim 64 takes 65664 words of 512 bits > 65536, which an emulated channel"
        " holds", "",
        "fpga.dequantize_f32: a row takes 16385 words of 512 bits > 16384, which an emulated channel holds", "",
        "no OpenCL kernel for gemm_add yet",
    ]  # fmt: skip


# --- having the emulator


def test_device_names():
    assert fpga.parse("fpga-emu") == ("fpga-emu", "")
    assert fpga.parse(" FPGA:a:b.aocx") == ("fpga", "a:b.aocx")
    assert fpga.parse("fpga-emu:k.aocx") == ("fpga-emu", "k.aocx")
    for other in (None, "", "0", "intel", "an fpga", "fpga-emulator"):
        assert fpga.parse(other) == ("", "")


def test_offline_is_one_line(tmp_path):
    done = fpga_runs.runtime(
        "conformance", "--backend", "opencl", "--device", "fpga-emu", "--op", "add",
        POLYKERN_CACHE_DIR=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="",
    )  # fmt: skip
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert "the FPGA emulator could not be fetched: pip says of intel-opencl-rt==2023.2.4: " in line
    assert line.endswith(
        "it is needed once (308 MB): run `make fpga-emulator` with a connection, or copy"
        f" {tmp_path}/opencl/fpga-emulator-2023.2.4 from a machine that has it"
    )
    assert not list((tmp_path / "opencl").glob("*.part"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("OCL_ICD_VENDORS", raising=False)
    return tmp_path


def test_other_machines_are_refused(empty_cache, monkeypatch):
    monkeypatch.setattr(emulator.platform, "machine", lambda: "aarch64")
    with pytest.raises(BackendUnavailable, match=f"is for Linux on x86-64, this is {sys.platform} on aarch64"):
        emulator.install()


def test_a_full_disk_is_said_before_anything_is_fetched(empty_cache, monkeypatch):
    monkeypatch.setattr(emulator.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(
        BackendUnavailable, match=r"needs 850 MB, .* has 10 MB free: free some, or set POLYKERN_CACHE_DIR"
    ):
        emulator.install()


def test_a_changed_wheel_is_refused(empty_cache, monkeypatch):
    def download(requirement, stage, *_):
        (stage / "intel.whl").write_bytes(b"something else")
        return stage / "intel.whl"

    monkeypatch.setattr(emulator.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(emulator, "_download", download)
    with pytest.raises(BackendUnavailable, match=r"intel\.whl has sha256 [0-9a-f]{64}, expected acf4845b55b4"):
        emulator.install()
    assert not emulator.library().exists()


def test_a_chosen_folder_of_drivers_wins(empty_cache, monkeypatch):
    monkeypatch.setenv("OCL_ICD_VENDORS", "/etc/OpenCL/vendors")
    with pytest.raises(BackendUnavailable, match="OCL_ICD_VENDORS is set to /etc/OpenCL/vendors, so only that is used"):
        emulator.prepare()


def test_a_damaged_emulator_is_named(empty_cache):
    emulator.folder().mkdir(parents=True)
    emulator.library().write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable) as caught:
        emulator.prepare()
    assert str(caught.value).startswith(f"the FPGA emulator does not load: {emulator.library()}: ")
    assert str(caught.value).endswith(f"; to fetch it again, remove {emulator.folder()}")


OTHERS_FIRST = """
import json
from polykern.backends.opencl import provider
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.spi import OpenOptions

said = []
try:
    provider.devices()
    provider.open(OpenOptions(device="fpga-emu"))
except BackendUnavailable as error:
    said.append(str(error))
print(json.dumps(said))
"""


def test_other_runtimes_of_the_process_are_in_the_way():
    fpga_runs.need_emulator()
    (said,) = answer(OTHERS_FIRST)
    if said.startswith("no OpenCL device found"):
        pytest.skip(f"needs another OpenCL runtime: {said}")
    assert said == (
        "this process has used other OpenCL runtimes, beside which the FPGA emulator cannot be loaded: open it first"
        " (--backend opencl, not auto), or in a process of its own"
    )


EMULATOR_FIRST = """
import json
from polykern.backends.opencl import provider
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.spi import OpenOptions

provider.open(OpenOptions(device="fpga-emu"))
try:
    provider.open(OpenOptions(device="intel"))
except BackendUnavailable as error:
    print(json.dumps(str(error)))
"""


def test_the_emulator_is_alone_in_its_process():
    fpga_runs.need_emulator()
    said = answer(EMULATOR_FIRST)
    assert said.startswith(
        "OpenCL runtime 'intel' is not in use here (this process was opened for fpga-emu alone); the"
    )


# --- faults


# What a slip of the pen would do: (file, right, wrong), and the op that has to notice.
FAULTS = {
    "partial_sum_overwritten": ("gemm.cl", "i < PARTIALS ? v :", "i < 2 * PARTIALS ? v :", "gemm"),
    "minimum_of_first_block": ("gemm.cl", "sum[BLOCKS * i + j]) * f[j].m", "sum[BLOCKS * i]) * f[j].m", "gemm"),
    "step_of_first_block": ("gemm.cl", "row->step[BLOCKS * i + j];", "row->step[BLOCKS * i];", "gemm"),
    "nan_is_zero": ("gemm.cl", "1e-36f ? top / 127.0f : 0.0f) : NAN", "1e-36f ? top / 127.0f : 0.0f) : 0.0f", "gemm"),
    "bias_of_channel": ("gemm.cl", "bias[bias_offset + r]", "bias[bias_offset + r / CHANNELS]", "gemm"),
    "slab_from_first": ("gemm.cl", "channel_rows + first) * row_beats", "channel_rows) * row_beats", "gemm"),
    "six_bits_cut": ("formats.h", "high = header->words[4 * super + (bit + 11) / 32]", "high = low", "dequantize"),
    "half_scale": ("formats.h", "f.sub[l / 16]) * f.d", "f.sub[0]) * f.d", "dequantize"),
    "rows_in_order": ("dequantize.cl", "(r % CHANNELS) * channel_rows + r / CHANNELS)", "r)", "dequantize"),
    "not_rescaled": ("attention.cl", "mass[h] * kept + weight", "mass[h] + weight", "attention"),
    "value_is_key": ("attention.cl", "weight * value[i].lanes[l]", "weight * key[i].lanes[l]", "attention"),
    "group_ignored": ("attention.cl", "(g * group + h) * head_dim", "(g + h) * head_dim", "attention"),
    "window_wide": ("attention.cl", "position - window + 1 : 0", "position - window : 0", "attention"),
}  # fmt: skip

FAULTY = """
import json, sys
from dataclasses import replace
from polykern.backends.opencl import provider
from polykern.backends.opencl.fpga import programs
from polykern.kernels import conformance
from polykern.kernels.errors import DeviceError
from polykern.kernels.ops import OPS
from polykern.kernels.spi import OpenOptions

plain, failed = programs._read, {}
for fault, (file, right, wrong, name) in json.loads(sys.argv[1]).items():
    assert right in plain(file), fault
    programs._read = lambda other: plain(other).replace(right, wrong) if other == file else plain(other)
    backend = provider.open(OpenOptions(device="fpga-emu"))
    kept = [case for case in OPS[name].cases if case.dims.get("format", "Q4_K") in ("Q4_K", "Q6_K", "Q4_0")]
    kept = [case for case in kept if not case.name.startswith(("Q6_K-exact", "Q4_K-exact", "Q4_0-exact"))]
    report = conformance.run(backend, ops=[replace(OPS[name], cases=tuple(kept), mutants=())])
    assert not any("compile" in case.reason for case in report.failures), report.failures[0]
    failed[fault] = report.summary()["failed"]
print(json.dumps(failed))
"""


@pytest.mark.skipif(not EVERYTHING, reason="compiles kernels for half a minute: `make fpga`")
def test_planted_faults_are_found():
    fpga_runs.need_emulator()
    failed = answer(FAULTY, json.dumps(FAULTS))
    assert {fault for fault, count in failed.items() if not count} == set()
