"""Which instructions kernels are compiled for: levels of CPUs, each with its integer dot product.

A level names an LLVM CPU rather than the host's own, so that a kernel compiled on one machine of a level is right on
all of them, and each level can be compiled anywhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# How `dot` (dot.py) multiplies and adds four bytes: vpdpbusd on 512 or 256 bits, vpmaddubsw + vpmaddwd, NEON's sdot, or
# plain vector code.
VNNI512, VNNI256, MADDUBS, SDOT, PLAIN = "avx512vnni", "avxvnni", "avx2", "neon-dot", "plain"

# To use AMX tiles a process asks Linux (Documentation/arch/x86/xstate.rst).
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18
_SYS_ARCH_PRCTL = 158


@dataclass(frozen=True)
class HostTarget:
    """A level: `flags` are what /proc/cpuinfo must show (x86 `flags`, ARM `Features`), `features` LLVM's -mattr."""

    name: str
    mcpu: str
    dot: str
    flags: frozenset[str]
    machine: str = "x86_64"
    features: tuple[str, ...] = ()
    amx: bool = False

    def missing(self, flags: frozenset[str]) -> list[str]:
        return sorted(self.flags - flags)


_AVX2 = {"avx2", "fma", "f16c", "bmi2"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"}

_WHOLE = ("-prefer-256-bit",)  # else LLVM moves vectors of these CPUs in halves

# Best first, per machine. LLVM's icelake-server also has VBMI and more, which no kernel here asks for by name, so the
# level is cascadelake: all of avx512vnni and nothing else.
LEVELS = (
    HostTarget(
        "amx",
        "sapphirerapids",
        VNNI512,
        frozenset(_AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}),
        features=_WHOLE,
        amx=True,
    ),
    HostTarget("avx512vnni", "cascadelake", VNNI512, frozenset(_AVX512), features=_WHOLE),
    HostTarget("avxvnni", "alderlake", VNNI256, frozenset(_AVX2 | {"avx_vnni"})),
    HostTarget("avx2", "haswell", MADDUBS, frozenset(_AVX2)),
    HostTarget("sse2", "x86-64", PLAIN, frozenset({"sse2"})),
    HostTarget("neon-dot", "generic", SDOT, frozenset({"asimd", "asimddp"}), "aarch64", ("+neon", "+dotprod")),
    HostTarget("neon", "generic", PLAIN, frozenset({"asimd"}), "aarch64", ("+neon",)),
)
BY_NAME = {level.name: level for level in LEVELS}

# What else `-mcpu=` may say: LLVM's names of CPUs (those of the installed LLVM: tests/test_tvm.py), by the best level
# that they can run.
_CPUS = {
    "amx": "sapphirerapids emeraldrapids graniterapids graniterapids-d diamondrapids",
    "avx512vnni": "cascadelake cooperlake icelake-client icelake-server rocketlake tigerlake znver4 znver5",
    "avxvnni": "alderlake raptorlake meteorlake gracemont arrowlake arrowlake-s lunarlake pantherlake sierraforest "
    "grandridge clearwaterforest",
    "avx2": "haswell broadwell skylake skylake-avx512 cannonlake x86-64-v3 x86-64-v4 znver1 znver2 znver3",
    "sse2": "x86-64 x86-64-v2 nehalem westmere sandybridge ivybridge",
    "neon-dot": "neoverse-n1 neoverse-n2 neoverse-v1 neoverse-v2 cortex-a76 cortex-a78 cortex-x1 ampere1",
    "neon": "cortex-a53 cortex-a57 cortex-a72 cortex-a73",
}
LEVEL_OF_CPU = {cpu: BY_NAME[level] for level, cpus in _CPUS.items() for cpu in cpus.split()}


@cache
def host_flags() -> frozenset[str]:
    """The instruction sets of this CPU as Linux names them; empty where nothing says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return frozenset()
    found = [line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0].split()) if found else frozenset()


@cache
def host_name() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def tiles_are_permitted() -> bool:
    """Ask Linux, once, to let this process use tiles."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def usable() -> list[HostTarget]:
    """The levels that this machine can run, best first."""
    machine, flags = platform.machine().lower().replace("amd64", "x86_64"), host_flags()
    able = [level for level in LEVELS if level.machine == machine and not level.missing(flags)]
    return [level for level in able if not level.amx or tiles_are_permitted()]


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
