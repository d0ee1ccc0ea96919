"""The machine and the software on it, as a result that is kept has to name them."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .bandwidth import usable_processors

PACKAGES = (
    "polykern", "numpy", "ml_dtypes", "gguf", "tokenizers", "jinja2", "rich", "platformdirs", "filelock", "shtab",
    "pyopencl", "intel-opencl-rt", "intel-cmplr-lib-rt", "apache-tvm", "torch", "triton", "cupy-cuda12x",
    "huggingface_hub", "pip",
)  # fmt: skip
# Features that decide which kernels are fast: x86 integer dot products and wide vectors, ARM's counterparts.
FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

ICD_FOLDERS = ("/etc/OpenCL/vendors", "/usr/share/OpenCL/vendors")


def provenance() -> dict[str, Any]:
    """What stands beside every figure: machine, versions, commit of the source tree (None when installed), time."""
    return {
        "host": {"machine": platform.machine(), "system": platform.platform(), "memory_bytes": memory_bytes(), **cpu()},
        "versions": {"python": platform.python_version()} | {k: v for k, v in packages().items() if v},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit this code was run from, with "+changes" if files were changed since; None outside a checkout."""
    tree = Path(__file__).resolve().parent.parent
    if not (tree / ".git").exists():
        return None
    git = ["git", "-C", str(tree)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def packages() -> dict[str, str | None]:
    """Installed version of each package that matters here, None for those that are not."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def cpu() -> dict[str, Any]:
    """Model, the processors this process may use, and the features in FLAGS that it has."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "usable": usable_processors(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def drivers() -> dict[str, str]:
    """The system's driver files, and what tells one version from another: found without loading any of them."""
    found: dict[str, str] = {}
    for icd in sorted(icd for folder in ICD_FOLDERS for icd in Path(folder).glob("*.icd")):
        library = Path(icd.read_text(errors="replace").strip())
        stamp = library.stat().st_mtime_ns if library.is_absolute() and library.exists() else icd.stat().st_mtime_ns
        found[str(icd)] = f"{library} {stamp}"
    for version in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            found[version] = Path(version).read_text(errors="replace").splitlines()[0]
    return found


def load() -> float:
    """Processes that wanted to run in the last minute, per processor; 0 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return 0.0


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
