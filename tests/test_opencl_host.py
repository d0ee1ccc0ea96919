"""The OpenCL host layer: finding runtimes, choosing and opening devices, the program cache, the compile process."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from polykern.backends import cache as kernel_cache
from polykern.backends.opencl import cache, compiler, device, environment, program, runtimes
from polykern.kernels.errors import BackendUnavailable, DeviceError

SCALE = """
__kernel void scale(__global const float* x, __global float* y) {
    size_t i = get_global_id(0);
    y[i] = x[i] * FACTOR;
}
"""
OPTIONS = ["-DFACTOR=3.0f"]
FIELDS = {"format": 1, "source": "00" * 32, "options": ["-DA"], "device": "a device"}


@pytest.fixture(scope="session", autouse=True)
def _devices(tmp_path_factory):
    """Starts OpenCL with its files in a temporary folder, unless another test module has started it already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYKERN_CACHE_DIR", str(tmp_path_factory.mktemp("opencl")))
        with contextlib.suppress(BackendUnavailable):  # the tests that need a device say so
            device.list_devices()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_warned", set())
    return tmp_path / "cache" / "opencl"


@pytest.fixture(params=["intel", "pocl"])
def opened(request):
    try:
        return device.open_device(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def any_opened():
    try:
        return device.open_device()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh process, without OpenCL variables but those given."""
    ours = ("OCL_ICD_VENDORS", "OPENCL_VENDOR_PATH", "POCL_", "CL_CONFIG_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {k: v for k, v in environment.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )


def run_scale(opened: device.OpenedDevice, built, factor: float) -> None:
    """Runs the kernel `scale` on 123 numbers and asserts its result."""
    import pyopencl as cl

    x = np.random.default_rng(0).standard_normal(123).astype(np.float32)
    flags = cl.mem_flags
    source = cl.Buffer(opened.context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=x)
    target = cl.Buffer(opened.context, flags.WRITE_ONLY, x.nbytes)
    kernel = cl.Kernel(built, "scale")
    kernel.set_args(source, target)
    cl.enqueue_nd_range_kernel(opened.queue, kernel, (123,), None)
    y = np.empty_like(x)
    cl.enqueue_copy(opened.queue, y, target)
    assert np.array_equal(y, x * np.float32(factor))


def forbid_child(monkeypatch) -> None:
    def spawn():
        raise AssertionError("a compile process was started")

    monkeypatch.setattr(compiler, "_child_command", spawn)


def mock_child(monkeypatch, code: str) -> None:
    """Replaces the compile process by a mock that runs `code`."""
    monkeypatch.setattr(compiler, "_child_command", lambda: [sys.executable, "-c", code])


# --- finding runtimes


def test_import_loads_no_vendor_library():
    modules = "device, program, runtimes, compiler, compile_child"
    code = f"import sys; from polykern.backends.opencl import {modules}; print('pyopencl' in sys.modules)"
    result = run_python(code)
    assert (result.stdout.strip(), result.returncode) == ("False", 0), result.stderr


def test_prepare_names_libraries_that_exist_and_is_idempotent(cache_folder):
    code = (
        "import json, os; from polykern.backends.opencl import runtimes;"
        "a = runtimes.prepare(); v = os.environ.get('OCL_ICD_VENDORS');"
        "assert runtimes.prepare() == a and os.environ.get('OCL_ICD_VENDORS') == v;"
        "print(json.dumps([v, [r.library for r in a], [r.name for r in a]]))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    folder, libraries, names = json.loads(result.stdout)
    if not libraries:
        pytest.skip("no OpenCL runtime is installed here")
    assert "oclgrind" not in names
    assert Path(folder).parent == cache_folder / "icd"
    assert sorted(file.read_text() for file in Path(folder).iterdir()) == sorted(libraries)
    assert all(os.path.exists(library) for library in libraries if os.path.isabs(library))
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["content", "extra file", "missing file"])
def test_a_damaged_icd_folder_is_written_again(damage, cache_folder):
    found = [runtimes.Runtime("a", "/x/liba.so", ""), runtimes.Runtime("b", "libb.so.1", "")]
    folder = runtimes._icd_folder(found)
    if damage == "content":
        (folder / "a.icd").write_text("/elsewhere.so")
    elif damage == "extra file":
        (folder / "c.icd").write_text("/elsewhere.so")
    else:
        (folder / "b.icd").unlink()
    assert runtimes._icd_folder(found) == folder
    assert {f.name: f.read_text() for f in folder.iterdir()} == {"a.icd": "/x/liba.so", "b.icd": "libb.so.1"}


def test_icd_folder_without_a_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "file"))
    folder = runtimes._icd_folder([runtimes.Runtime("a", "/x/liba.so", "")])
    assert (folder / "a.icd").read_text() == "/x/liba.so"


def test_a_folder_of_the_user_is_respected(tmp_path):
    pocl = next((r for r in runtimes.find() if r.name == "pocl" and not r.problem), None)
    if pocl is None:
        pytest.skip("PoCL is not installed here")
    (tmp_path / "only.icd").write_text(pocl.library + "\n")
    code = (
        "import os; from polykern.backends.opencl import device;"
        "print({d.runtime for d in device.list_devices()}, os.environ['OCL_ICD_VENDORS'])"
    )
    result = run_python(code, OCL_ICD_VENDORS=str(tmp_path))
    assert result.stdout.strip() == f"{{'pocl'}} {tmp_path}", result.stderr


def test_stale_placeholder_and_double_icd_files(tmp_path, monkeypatch):
    library = tmp_path / "libintelocl.so.1"
    library.touch()
    for name, content in {
        "a.icd": "/gone/libintelocl.so",
        "b.icd": str(library),
        "c.icd": str(library),
        "d.icd": "/opt/anaconda1anaconda2anaconda3/lib/libother.so",
        "e.icd": "",
        "f.icd": "/gone/libvendor.so",
    }.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    intel, vendor = runtimes.find()
    assert (intel.name, intel.library, intel.problem) == ("intel", str(library), "")
    assert (vendor.name, vendor.problem) == ("vendor", "/gone/libvendor.so does not exist")
    assert runtimes.prepare() == [intel]


def test_a_library_that_does_not_load_has_a_reason(tmp_path, monkeypatch):
    text = tmp_path / "libvendor.so"
    text.write_text("not a library")
    assert "libvendor.so" in runtimes.diagnose(runtimes.Runtime("vendor", str(text), "")).problem

    def mock_loader(path):
        raise OSError("libimf.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(runtimes.ctypes, "CDLL", mock_loader)
    problem = runtimes.diagnose(runtimes.Runtime("intel", "/x/libintelocl.so", "")).problem
    assert problem.endswith("No such file or directory (pip install intel-cmplr-lib-rt)")


def test_describe_has_a_row_for_each_known_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    rows = {row["name"]: row for row in runtimes.describe()}
    assert set(rows) == {"intel", "pocl", "oclgrind"}
    assert not any(row["found"] for row in rows.values())
    assert "pip install 'polykern[cpu]'" in rows["intel"]["install"]
    assert rows["pocl"]["install"] == "apt install pocl-opencl-icd"


def test_no_runtime_at_all(tmp_path):
    code = (
        "from polykern.backends.opencl import device\nfrom polykern.kernels.errors import BackendUnavailable\n"
        "try: device.open_device()\nexcept BackendUnavailable as error: print(error)"
    )
    result = run_python(code, OCL_ICD_VENDORS=str(tmp_path))
    assert result.stdout.strip() == (
        f"no OpenCL device found: OCL_ICD_VENDORS is set to {tmp_path}, so only that is used (unset it to search). "
        "Install one with: pip install 'polykern[cpu]' (x86-64, Intel's runtime) or apt install pocl-opencl-icd"
    ), result.stderr


def test_without_pyopencl():
    code = (
        "import sys; sys.modules['pyopencl'] = None\n"
        "from polykern.backends.opencl import device\nfrom polykern.kernels.errors import BackendUnavailable\n"
        "try: device.open_device()\nexcept BackendUnavailable as error: print(error)"
    )
    result = run_python(code)
    assert result.stdout.startswith("OpenCL needs PyOpenCL ("), result.stderr
    assert result.stdout.strip().endswith("pip install 'polykern[opencl]'")


@pytest.mark.parametrize("name", ["intel", "pocl"])
def test_without_any_folder_to_write_to(name, tmp_path):
    """PoCL by itself would report no device, and PyOpenCL would fail at the first kernel."""
    if not any(r.name == name and not r.problem for r in runtimes.find()):
        pytest.skip(f"{name} is not installed here")
    (tmp_path / "file").touch()  # permissions would not stop root
    code = (
        f"from polykern.backends.opencl import device\nopened = device.open_device({name!r})\n"
        f"built = opened.build_many({{'scale.cl': ({SCALE!r}, {OPTIONS!r})}})['scale.cl']\n"
        "import pyopencl as cl\nprint(cl.Kernel(built, 'scale').num_args)"
    )
    nowhere = str(tmp_path / "file")
    result = run_python(code, POLYKERN_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert result.stdout.strip() == "2", result.stderr
    assert result.stderr.count("Warning: ") == 1


def test_oclgrind_only_when_asked_for():
    if not any(r.name == "oclgrind" for r in runtimes.find(include_oclgrind=True)):
        pytest.skip("Oclgrind is not installed here (apt install oclgrind)")
    code = (
        "from polykern.backends.opencl import device\nfrom polykern.kernels.errors import BackendUnavailable\n"
        "opened = device.open_device({!r})\nprint(opened.info.runtime)\n"
        "try: print(device.open_device('oclgrind').info.runtime)\nexcept BackendUnavailable as error: print(error)"
    )
    first, second = run_python(code.format("oclgrind")).stdout.splitlines()
    assert (first, second) == ("oclgrind", "oclgrind")
    lines = run_python(code.format(None)).stdout.splitlines()
    assert lines[0] != "oclgrind"
    assert "this process used OpenCL before it was asked for" in lines[1]


# --- choosing


def fake(index: int, runtime: str, platform: str, name: str, kind: str = "cpu") -> device.DeviceInfo:
    return device.DeviceInfo(
        index, runtime, platform, "OpenCL 3.0", name, "A Vendor", "1.0", "OpenCL C 3.0", kind, 2, 1 << 30, frozenset()
    )


DEVICES = [
    fake(0, "", "Vendor CL", "Turbo 9000", "gpu"),
    fake(1, "", "Vendor CL", "Turbo 9100", "gpu"),
    fake(2, "intel", "Intel(R) OpenCL", "AMD EPYC"),
    fake(3, "pocl", "Portable Computing Language", "pthread-AMD EPYC"),
]


@pytest.mark.parametrize(
    ("spec", "index"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        (" 3 ", 3),
        ("intel", 2),
        ("POCL", 3),
        ("portable", 3),
        ("Turbo", 0),
        ("9100", 1),  # no such index
        ("turbo 9100", 1),
        ("pthread", 3),
        ("cpu", 2),
        ("GPU", 0),
    ],
)
def test_choose(spec, index):
    assert device.choose(spec, DEVICES).index == index


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("fpga", "no OpenCL device matches 'fpga'; there are: 0: Vendor CL / Turbo 9000 (gpu, 2 units); 1: "),
        ("4", "no OpenCL device matches '4'; there are: 0: "),
        ("91", "no OpenCL device matches '91'; there are: 0: "),
        ("-1", "no OpenCL device matches '-1'; there are: 0: "),
        ("amd", "'amd' means several OpenCL devices (2, 3): use an index; there are: 0: "),
        ("oclgrind", "OpenCL runtime 'oclgrind' is not in use here ("),
    ],
)
def test_choose_refuses(spec, text):
    with pytest.raises(BackendUnavailable) as caught:
        device.choose(spec, DEVICES)
    assert text in str(caught.value)
    assert "3: Portable Computing Language / pthread-AMD EPYC (cpu, 2 units)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choose_from_nothing():
    with pytest.raises(BackendUnavailable, match=r"no OpenCL device found\. Install a runtime with: pip install"):
        device.choose(None, [])


def test_order_is_gpu_intel_pocl_others_oclgrind():
    others = [
        fake(0, "oclgrind", "Oclgrind", "Oclgrind Simulator"),
        fake(0, "", "FPGA", "board", "accelerator"),
        *reversed(DEVICES),
    ]
    ordered = sorted(others, key=device._rank)
    assert [d.name for d in ordered] == [
        *("Turbo 9000", "Turbo 9100", "AMD EPYC", "pthread-AMD EPYC", "board", "Oclgrind Simulator")
    ]


def test_listed_devices_are_numbered_and_complete(any_opened):
    devices = device.list_devices()
    assert [d.index for d in devices] == list(range(len(devices)))
    for info in devices:
        assert info.name
        assert info.driver
        assert info.compute_units > 0
        assert info.memory_bytes > 0
        assert info.type in ("cpu", "gpu", "accelerator", "custom")


# --- opening


def test_open_device(opened):
    import pyopencl as cl

    assert opened.context.devices == [opened.device]
    assert not opened.queue.properties & cl.command_queue_properties.OUT_OF_ORDER_EXEC_MODE_ENABLE
    assert 1 <= opened.threads <= opened.info.compute_units
    opened.close()


@pytest.mark.parametrize("name", ["intel", "pocl"])
def test_one_thread_uses_one_processor(name):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may run on one processor only")
    if not any(r.name == name and not r.problem for r in runtimes.find()):
        pytest.skip(f"{name} is not installed here")
    code = f"""
import time, warnings
import numpy as np
from polykern.backends.opencl import device
opened = device.open_device({name!r}, 1)
import pyopencl as cl
source = "__kernel void f(__global float* y, int n) {{ float a = get_global_id(0); for (int i = 0; i < n; i++)" \\
    "a = a * 0.999f + 1.5f; y[get_global_id(0)] = a; }}"
built = opened.build_many({{"spin.cl": (source, [])}})["spin.cl"]
kernel, y = cl.Kernel(built, "f"), cl.Buffer(opened.context, cl.mem_flags.READ_WRITE, 4 * 16384)
cpu, wall = time.process_time(), time.perf_counter()
kernel.set_args(y, np.int32(20000))
cl.enqueue_nd_range_kernel(opened.queue, kernel, (16384,), (64,))
opened.queue.finish()
print(opened.threads, (time.process_time() - cpu) / (time.perf_counter() - wall))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    threads, ratio = result.stdout.split()
    assert threads == "1"
    assert float(ratio) < 1.2  # 1.9 or more with two threads; other load on the machine only lowers it


def test_threads_that_do_not_fit(opened):
    processors = len(os.sched_getaffinity(0))
    with pytest.raises(BackendUnavailable, match="cannot use 0 threads: give at least 1"):
        device.open_device(opened.info.runtime, 0)
    message = f"cannot use {processors + 1} threads: this process may run on {processors} processors"
    with pytest.raises(BackendUnavailable, match=message):
        device.open_device(opened.info.runtime, processors + 1)
    assert device.open_device(opened.info.runtime, opened.threads).threads == opened.threads
    if opened.threads > 1:
        with pytest.raises(BackendUnavailable, match=f"already runs with {opened.threads} in this process"):
            device.open_device(opened.info.runtime, opened.threads - 1)


def test_named_errors(any_opened):
    import pyopencl as cl

    with (
        pytest.raises(DeviceError, match=r"^OpenCL CL_INVALID_BUFFER_SIZE \(-61\) in allocating nothing$"),
        device.named_errors("allocating nothing"),
    ):
        cl.Buffer(any_opened.context, cl.mem_flags.READ_WRITE, 0)


# --- building


def test_build_runs_and_is_cached(opened, monkeypatch, cache_folder):
    steps: list[tuple[str, int, int]] = []
    programs = {"three.cl": (SCALE, OPTIONS), "five.cl": (SCALE, ["-DFACTOR=5.0f"])}
    expected = [("three.cl", 1, 2), ("five.cl", 2, 2)]
    built = opened.build_many(programs, lambda *step: steps.append(step))
    assert steps == expected
    assert cache.cache_info()["entries"] == 2
    assert stat.S_IMODE((cache_folder / "programs").stat().st_mode) == 0o700
    forbid_child(monkeypatch)
    steps.clear()
    again = opened.build_many(programs, lambda *step: steps.append(step))
    assert steps == expected
    for result in (built, again):
        run_scale(opened, result["three.cl"], 3)
        run_scale(opened, result["five.cl"], 5)


def test_one_child_builds_all_that_is_missing(any_opened, monkeypatch):
    starts = []
    command = compiler._child_command
    monkeypatch.setattr(compiler, "_child_command", lambda: starts.append(1) or command())
    program.build(any_opened, "k2", SCALE, ["-DFACTOR=2.0f"])
    built = any_opened.build_many({f"k{i}": (SCALE, [f"-DFACTOR={i}.0f"]) for i in (1, 2, 3)})
    assert len(starts) == 2
    assert list(built) == ["k1", "k2", "k3"]
    for i in (1, 2, 3):
        run_scale(any_opened, built[f"k{i}"], i)


def test_nothing_to_build(any_opened, monkeypatch):
    forbid_child(monkeypatch)
    assert any_opened.build_many({}) == {}


@pytest.mark.parametrize("field", ["driver", "name", "platform_version", "opencl_c"])
def test_key_depends_on_the_device(any_opened, field):
    other = replace(any_opened.info, **{field: "another"})
    assert program._fields(other, SCALE, []) != program._fields(any_opened.info, SCALE, [])


def test_key_depends_on_source_options_and_compiler_variables(any_opened, monkeypatch):
    info = any_opened.info
    plain = program._fields(info, SCALE, [])
    assert program._fields(info, SCALE + " ", []) != plain
    assert program._fields(info, SCALE, ["-DA"]) != plain
    monkeypatch.setenv("POCL_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("CL_CONFIG_CPU_TBB_NUM_WORKERS", "1")
    assert program._fields(info, SCALE, []) == plain
    monkeypatch.setenv("CL_CONFIG_CPU_TARGET_ARCH", "corei7")
    assert program._fields(info, SCALE, []) != plain


@pytest.mark.parametrize("free", [environment.POCL_BYTES, environment.POCL_BYTES - 1])
def test_pocl_keeps_off_a_full_disk(free, monkeypatch, cache_folder):
    monkeypatch.delenv("POCL_CACHE_DIR", raising=False)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    environment.prepare_pocl()
    kept = os.environ.pop("POCL_CACHE_DIR")
    assert (kept == str(cache_folder / "pocl")) == (free == environment.POCL_BYTES)


def test_a_foreign_entry_is_not_used(opened, cache_folder):
    opened.build_many({"five.cl": (SCALE, ["-DFACTOR=5.0f"])})
    (five,) = (cache_folder / "programs").glob("*.bin")
    three = cache_folder / "programs" / f"{cache.key_of(program._fields(opened.info, SCALE, OPTIONS))}.bin"
    three.write_bytes(five.read_bytes())
    run_scale(opened, opened.build_many({"three.cl": (SCALE, OPTIONS)})["three.cl"], 3)
    assert three.read_bytes() != five.read_bytes()


def test_a_binary_that_the_driver_refuses_is_built_again(opened, cache_folder):
    fields = program._fields(opened.info, SCALE, OPTIONS)
    cache.PROGRAMS.store(fields, b"not a binary of any device")
    run_scale(opened, program.build(opened, "scale.cl", SCALE, OPTIONS), 3)
    assert cache.PROGRAMS.load(fields) != b"not a binary of any device"


def test_a_device_that_cannot_load_its_binaries(any_opened, monkeypatch):
    """With a mock in place of the driver's clCreateProgramWithBinary."""
    monkeypatch.setattr(program, "_from_binary", lambda *arguments: None)
    run_scale(any_opened, program.build(any_opened, "scale.cl", SCALE, OPTIONS), 3)
    assert cache.PROGRAMS.load(program._fields(any_opened.info, SCALE, OPTIONS)) == b""
    forbid_child(monkeypatch)
    run_scale(any_opened, program.build(any_opened, "scale.cl", SCALE, OPTIONS), 3)


@pytest.mark.parametrize("folder", ["a file", "no space"])
def test_without_a_writable_cache(any_opened, tmp_path, monkeypatch, folder):
    if folder == "a file":  # permissions would not stop root
        (tmp_path / "file").touch()
        monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "file"))
    else:

        def mock_full_disk(**arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kernel_cache.tempfile, "mkstemp", mock_full_disk)
    with pytest.warns(RuntimeWarning, match="OpenCL programs are not cached") as caught:
        built = any_opened.build_many({"3.cl": (SCALE, OPTIONS), "5.cl": (SCALE, ["-DFACTOR=5.0f"])})
    assert len(caught) == 1
    run_scale(any_opened, built["3.cl"], 3)
    run_scale(any_opened, built["5.cl"], 5)


def test_compile_error(opened, cache_folder):
    source = "__kernel void broken(__global float* x) { x[0] = no_such_name; }\n"
    with pytest.raises(DeviceError) as caught:
        opened.build_many({"good.cl": (SCALE, OPTIONS), "broken.cl": (source, [])})
    message = str(caught.value)
    (log,) = (cache_folder / "logs").glob("broken.cl-*.log")
    assert message.startswith(f"{opened.info.label}: broken.cl does not compile: ")
    assert "no_such_name" in message
    assert message.endswith(f"(full log: {log})")
    assert "\n" not in message
    assert "no_such_name" in log.read_text()
    assert cache.cache_info()["entries"] == 1  # what compiled before stays


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "import os, sys; print('LLVM ERROR: Cannot select', file=sys.stderr, flush=True); os.abort()",
            "the OpenCL compiler died of SIGABRT on scale.cl; its last words: LLVM ERROR: Cannot select (all ",
        ),
        (
            "import sys; sys.exit('LLVM ERROR: IO failure on output stream: No space left on device')",
            "); free some space, or set POLYKERN_CACHE_DIR to a folder on another disk",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the OpenCL compiler died of SIGSEGV on scale.cl"),
        ("raise SystemExit('no pyopencl')", "process ended with status 1 on scale.cl; its last words: no pyopencl"),
        ('print(\'{"start": "other.cl"}\')', "process ended with status 0 on other.cl"),
        ("print('noise'); print('[1]'); print('{')", "process ended with status 0 on scale.cl"),
    ],
)
def test_a_compiler_that_dies_costs_a_message(any_opened, monkeypatch, code, text):
    mock_child(monkeypatch, code)
    with pytest.raises(DeviceError) as caught:
        any_opened.build_many({"scale.cl": (SCALE, OPTIONS), "other.cl": (SCALE, ["-DFACTOR=5.0f"])})
    assert str(caught.value).startswith(f"{any_opened.info.label}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cache.cache_info()["entries"] == 0


def test_a_real_crash_of_the_compiler(opened):
    """No mock: both runtimes' clang overflows its stack on an expression this deep."""
    source = "__kernel void deep(__global float* y) { y[0] = " + "+".join(["y[1]"] * 100_000) + "; }"
    with pytest.raises(DeviceError, match=r"the OpenCL compiler died of SIG[A-Z]+ on deep\.cl"):
        program.build(opened, "deep.cl", source)
    run_scale(opened, program.build(opened, "scale.cl", SCALE, OPTIONS), 3)


def is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_compiler_that_hangs_is_ended(any_opened, monkeypatch, tmp_path):
    """The mock starts a process of its own, as compilers start linkers; both must be gone."""
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); time.sleep(600)"
    )
    mock_child(monkeypatch, code)
    monkeypatch.setattr(compiler, "TIMEOUT_S", 5.0)
    with pytest.raises(DeviceError, match=r"the OpenCL compiler did not finish scale\.cl within 5 s"):
        program.build(any_opened, "scale.cl", SCALE, OPTIONS)
    deadline = time.monotonic() + 30  # a killed process may still wait for its turn to die
    while alive := [pid for pid in pids.read_text().split() if is_running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def test_a_compile_process_that_cannot_start(any_opened, monkeypatch):
    monkeypatch.setattr(compiler, "_child_command", lambda: ["/no/such/python"])
    with pytest.raises(DeviceError, match="cannot start the OpenCL compile process"):
        program.build(any_opened, "scale.cl", SCALE, OPTIONS)


def test_two_processes_share_a_cache(any_opened, cache_folder):
    code = (
        "from polykern.backends.opencl import device\nopened = device.open_device()\n"
        f"built = opened.build_many({{str(i): ({SCALE!r}, [f'-DFACTOR={{i}}.0f']) for i in range(1, 4)}})\n"
        "print(len(built))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["3", "3"]
    assert cache.cache_info()["entries"] == 3
    assert not list((cache_folder / "programs").glob(".draft-*"))
    run_scale(any_opened, program.build(any_opened, "2", SCALE, ["-DFACTOR=2.0f"]), 2)


# --- the cache file


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 5])
def test_cache_round_trip(payload):
    assert cache.PROGRAMS.load(FIELDS) is None
    cache.PROGRAMS.store(FIELDS, payload)
    assert cache.PROGRAMS.load(FIELDS) == payload
    assert cache.PROGRAMS.load(FIELDS | {"device": "another"}) is None


def test_every_damage_to_an_entry_is_noticed(cache_folder):
    payload = b"binary"
    cache.PROGRAMS.store(FIELDS, payload)
    (path,) = (cache_folder / "programs").glob("*.bin")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"\0"]
    for i in range(len(whole)):
        damaged.append(whole[:i] + bytes([whole[i] ^ int(rng.integers(1, 256))]) + whole[i + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert cache.PROGRAMS.load(FIELDS) is None
        assert not path.exists()
    path.write_bytes(whole)
    assert cache.PROGRAMS.load(FIELDS) == payload


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_not_trusted(cache_folder, mode):
    cache.PROGRAMS.store(FIELDS, b"binary")
    (cache_folder / "programs").chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to .* chmod 700"):
        assert cache.PROGRAMS.load(FIELDS) is None
    assert "others may write" in cache.cache_info()["problem"]


def test_entries_that_nobody_reads_are_removed(cache_folder):
    cache.PROGRAMS.store(FIELDS, b"old")
    (old,) = (cache_folder / "programs").glob("*.bin")
    age = kernel_cache._UNUSED_S
    os.utime(old, (time.time() - age + 600, time.time() - 2 * age))  # last read, last written
    cache.PROGRAMS.store(FIELDS | {"device": "another"}, b"new")
    assert cache.PROGRAMS.load(FIELDS) == b"old"
    os.utime(old, (time.time() - age - 600, time.time() - 2 * age))
    cache.PROGRAMS.store(FIELDS | {"device": "another"}, b"new")
    assert not old.exists()
    assert cache.PROGRAMS.load(FIELDS | {"device": "another"}) == b"new"


def test_cache_info_and_clear(cache_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cache_info() == {"path": str(cache_folder), "entries": 0, "bytes": 0, "problem": ""}
        cache.PROGRAMS.store(FIELDS, b"binary")
        cache.PROGRAMS.store(FIELDS | {"device": "another"}, b"binary")
        assert cache.save_log("odd name/../x.cl", FIELDS, "text").parent == cache_folder / "logs"
        info = cache.cache_info()
        assert (info["entries"], info["bytes"] > 100) == (2, True)
        assert cache.clear() == 2
        assert cache.cache_info()["entries"] == 0
        assert not (cache_folder / "logs").exists()
