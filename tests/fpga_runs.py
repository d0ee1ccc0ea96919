"""Runs on the FPGA emulator, each in a process of its own, which then has no other OpenCL runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EVERYTHING = bool(os.environ.get("POLYKERN_ALL_FPGA"))  # `make fpga`; otherwise a reduced grid
TOOL = [sys.executable, "-m", "polykern.backends.opencl.fpga"]


def run(command: list[str], timeout: float = 590, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("OCL_ICD_VENDORS", "OPENCL_VENDOR_PATH", "CL_CONFIG_", "POLYKERN_DEVICE", "POLYKERN_BACKEND")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {"PYTHONPATH": str(HERE), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def answer(code: str, *args: str, **environment: str) -> Any:
    """What `code` prints as its last line, as JSON."""
    done = run([sys.executable, "-W", "ignore", "-c", code, *args], **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def runtime(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "polykern.runtime", *args], **environment)


@cache
def problem() -> str:
    """Why the emulator cannot be had; fetches it on first use."""
    done = run([*TOOL, "install"])
    return "" if done.returncode == 0 else done.stderr.strip() or f"install ended with {done.returncode}"


def need_emulator() -> None:
    if problem():
        pytest.skip(f"no FPGA emulator: {problem()}")


CONFORMANCE = """
import json, sys
from dataclasses import replace
from polykern.backends.opencl import provider
from polykern.kernels import conformance
from polykern.kernels.ops import OPS
from polykern.kernels.spi import OpenOptions

device, formats, *names = sys.argv[1:]
backend = provider.open(OpenOptions(device=device))
reports = {}
for name in names:
    op = OPS[name]
    if formats:
        kept = [case for case in op.cases if case.dims.get("format", "") in ("", *formats.split(","))]
        op = replace(op, cases=tuple(kept))
    report = conformance.run(backend, ops=[op])
    wrong = [*report.failures, *report.survivors, *report.missing]
    reports[name] = {**report.summary(), "cases": len(op.cases), "wrong": [str(one) for one in wrong]}
print(json.dumps(reports))
"""

GOLDEN = """
import json, sys
from pathlib import Path
import golden_check
from polykern.runtime.load import load
from polykern.runtime.models import DEFAULT_MODEL, resolve
from polykern.runtime.settings import Settings

device, precision, tokens = sys.argv[1:]
golden = json.loads((Path(golden_check.__file__).parent / "golden" / "smollm2-135m-q4_1.json").read_text())
first = golden["greedy"][0]
for name in ("greedy_ids", "top5_ids", "top5_logprobs"):
    first[name] = first[name][: int(tokens)]
settings = Settings(
    model=resolve(DEFAULT_MODEL), backend="opencl", device=device, ctx=64, precision=precision, fallback="error"
)
session = load(settings)
golden_check.check_greedy(session, {"greedy": [first]})
print(json.dumps({"device": session.backend.device.name, "checked": len(first["greedy_ids"])}))
"""
