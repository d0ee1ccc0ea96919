"""The OpenCL kernels under Oclgrind, an interpreter that watches every access: none may be reported.

The conformance suite sees what a kernel does around its tensors, which it puts into larger, filled buffers. This sees
accesses outside of whole buffers (packed weights, scratch, local and private memory), memory that is read before it is
written, and races. Each run is a process of its own: Oclgrind reads its variables when it starts and reports on stderr.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from polykern.kernels.ops import OPS, small_cases

CHECKS = {
    "OCLGRIND_CHECK_API": "1",
    "OCLGRIND_DATA_RACES": "1",
    "OCLGRIND_UNIFORM_WRITES": "1",  # also races of equal values
    "OCLGRIND_UNINITIALIZED": "1",
}
# What CHECK_API makes of PyOpenCL trying out which queries a device knows, and looking up an attribute of a program.
PROBES = re.compile(
    r"\nOclgrind - OpenCL runtime error detected\n\tFunction: "
    r"(clGet\w+Info\n\tError:    CL_INVALID_VALUE\n\tFor argument 'param_name'"
    r"|clCreateKernel\n\tError:    CL_INVALID_KERNEL_NAME\n\tKernel '_\w+' not found)\n\n"
)

OPEN = """
from polykern.backends.opencl import provider
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.spi import OpenOptions

try:
    provider.open(OpenOptions(device="oclgrind"))
except BackendUnavailable as error:
    print(error)
"""

CONFORMANCE = """
import json, sys
from polykern.backends.opencl import provider
from polykern.kernels import conformance
from polykern.kernels.ops import OPS, case_signature, small_cases
from polykern.kernels.spi import OpenOptions

op = OPS[sys.argv[1]]
backend = provider.open(OpenOptions(device="oclgrind"))
if sys.argv[2] == "one backend":
    rows = conformance.run(backend, ops=[op], profile="small").rows()
else:
    backend.prepare([case_signature(op, case) for case in small_cases(op)])  # one compile process for all
    rows = []
    for case in small_cases(op):
        backend = provider.open(OpenOptions(device="oclgrind"))
        rows += conformance.run(backend, ops=[op], profile="small", case=case.name).rows()
        backend.close()
print(json.dumps(rows))
"""

# One fault each, in a kernel (x, y, i): x holds 16 ones, y 16 floats that nobody has written, i is 0 .. 15.
FAULTS = {
    "reads_outside": ("y[i] = x[i + 1];", "Invalid read of size 4 at global memory address"),
    "writes_outside": ("y[i + 1] = x[i];", "Invalid write of size 4 at global memory address"),
    "writes_outside_local": (
        "__local float z[4]; z[i] = x[i]; barrier(CLK_LOCAL_MEM_FENCE); y[i] = z[i];",
        "Invalid write of size 4 at local memory address",
    ),
    "races": ("y[0] = x[i] + i;", "Write-write data race at global memory address"),
    "races_with_equal_values": ("y[0] = x[i];", "Write-write data race at global memory address"),
    "races_with_a_reader": ("y[i] = x[0]; if (i == 9) x[0] = 2;", "Read-write data race at global memory address"),
    "copies_unwritten": ("x[i] = y[i];", "Uninitialized value written to global memory address"),
    "copies_unwritten_private": (
        "float z[2]; z[0] = x[i]; y[i] = z[i & 1];",
        "Uninitialized value written to global memory address",
    ),
    "branches_on_unwritten": ("if (y[i] > 0) x[i] = 2;", "Controlflow depends on uninitialized value"),
    "indexes_by_unwritten": (
        "x[(int)y[i] & 7] = 2;",
        "Uninitialized address used to write to global memory address",
    ),
}
FAULTLESS = {"faultless": "y[i] = x[i];"}
# Each kernel once, and a launch whose work-groups of 3 do not divide 16 work-items.
CONTROLS = """
import json, sys
import numpy as np
from polykern.backends.opencl import provider
from polykern.kernels.op import TensorType
from polykern.kernels.spi import OpenOptions

backend = provider.open(OpenOptions(device="oclgrind"))
import pyopencl as cl

head = "__kernel void %s(__global float *x, __global float *y) { const int i = get_global_id(0); %s }"
bodies = json.loads(sys.argv[1])
source = "\\n".join(head % item for item in bodies.items())
built = backend.opened.build_many({"controls": (source, ["-cl-std=CL1.2"])})["controls"]
for name in bodies:
    x, y = (backend.alloc(TensorType((16,), "f32")) for _ in "xy")
    backend.write(x, np.ones(16, np.float32))
    kernel = cl.Kernel(built, name)
    kernel.set_args(x, y)
    cl.enqueue_nd_range_kernel(backend.opened.queue, kernel, (16,), (1,))
    backend.synchronize()
try:
    cl.enqueue_nd_range_kernel(backend.opened.queue, kernel, (16,), (3,))
except cl.LogicError:
    print("refused")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for compiled kernels that all runs share."""
    path = str(tmp_path_factory.mktemp("oclgrind"))
    stdout, _ = run_checked(path, OPEN)
    if stdout:
        pytest.skip(f"no Oclgrind: {stdout.strip()}")
    return path


def run_checked(folder: str, code: str, *args: str) -> tuple[str, str]:
    """Stdout of `code` run under Oclgrind's checks, and its reports: all of stderr but PyOpenCL's probes."""
    others = ("OCLGRIND_", "OCL_ICD_VENDORS", "OPENCL_VENDOR_PATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    env |= CHECKS | {"POLYKERN_CACHE_DIR": folder}
    command = [sys.executable, "-W", "ignore", "-c", code, *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout, PROBES.sub("", result.stderr).strip()


def assert_clean(folder: str, op: str, backends: str) -> None:
    stdout, reports = run_checked(folder, CONFORMANCE, op, backends)
    assert not reports, reports[:4000]
    rows = json.loads(stdout)
    assert [row["case"] for row in rows] == [case.name for case in small_cases(OPS[op])]
    assert [row for row in rows if row["status"] != "passed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_case_is_reported(folder, op):
    """A backend for each case: its scratch memory is as unwritten as in the first step of a process."""
    assert_clean(folder, op, "many backends")


def test_one_backend_runs_many_cases_without_a_report(folder):
    """As `runtime conformance` does: buffers are released, and their addresses used again."""
    assert_clean(folder, "gemm", "one backend")


@pytest.fixture(scope="module")
def control_reports(folder):
    bodies = FAULTLESS | {name: body for name, (body, _) in FAULTS.items()}
    stdout, reports = run_checked(folder, CONTROLS, json.dumps(bodies))
    assert stdout == "refused\n"
    return reports


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_kernel_is_reported(control_reports, name):
    assert re.search(rf"{FAULTS[name][1]}.*\n\tKernel: {name}\n", control_reports), control_reports


def test_a_faultless_kernel_is_not_reported(control_reports):
    assert "Kernel: faultless" not in control_reports


def test_a_faulty_call_is_reported(control_reports):
    assert "Oclgrind - OpenCL runtime error detected\n\tFunction: clEnqueueNDRangeKernel\n" in control_reports
