"""Which kernels there are, as text: the files of hls/opencl, once for each format where they read weights.

A program is a few families. The emulator compiles each family for itself, when a model needs it; a bitstream holds
all that it was built with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ....kernels.glu import KINDS
from ....kernels.quant import FORMATS

# Beside backends/ in the repository, and beside it in an installed polykern too.
SOURCES = Path(__file__).parents[3] / "hls" / "opencl"
GLU_KINDS = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Family:
    """The kernels of a file for one format ("Q4_1", or "F16" and "F32" for pages) and precision; "" where it has none.

    `suffix` is what their names end in.
    """

    file: str
    format: str = ""
    fast: bool = False

    @property
    def suffix(self) -> str:
        precision = {"gemm": "_fast" if self.fast else "_exact"}.get(self.file, "")
        return f"{self.format.lower()}{precision}"

    @property
    def label(self) -> str:
        """Names the kernels in plans and error messages."""
        return f"fpga.{self.file}{'_' if self.suffix else ''}{self.suffix}"

    def body(self) -> str:
        """What comes behind engine.h."""
        names = [*(["formats.h"] if self.file in ("gemm", "dequantize") else []), f"{self.file}.cl"]
        text = "".join(_read(name) for name in names)
        defines = {
            "SUFFIX": self.suffix,
            "FORMAT": self.format,
            "FAST": int(self.fast),
            "HALF_PAGES": int(self.format == "F16"),
        }
        head = "".join(f"#undef {name}\n#define {name} {value}\n" for name, value in defines.items())
        return head + text if self.suffix else text

    def kernels(self) -> Mapping[str, Sequence[str]]:
        """Kernel -> its arguments, as "long x_offset" or "global float* y"."""
        text = re.sub(r"\bNAME\((\w+)\)", rf"\1_{self.suffix}", self.body())
        found = re.findall(r"__kernel\s+void\s+(\w+)\s*\(([^)]*)\)", text)
        return {name: tuple(_argument(part) for part in arguments.split(",")) for name, arguments in found}


def source(families: Iterable[Family]) -> str:
    """The whole text of a program."""
    kinds = "".join(f"#define {kind.upper()} {number}\n" for kind, number in GLU_KINDS.items())
    return kinds + _read("engine.h") + "".join(family.body() for family in families)


def families(formats: Iterable[str]) -> list[Family]:
    """All that a model with weights in `formats` may need."""
    found = [Family(file) for file in ("rms_norm", "rope", "pointwise", "sample")]
    found += [Family("attention", pages) for pages in ("F16", "F32")]
    for name in formats:
        found += [gemm_family(name, "exact"), Family("dequantize", name)]
        if not FORMATS[name].is_float:
            found.append(gemm_family(name, "fast"))
    return found


def gemm_family(fmt: str, precision: str) -> Family:
    """Float weights are multiplied by float activations, whatever the precision."""
    return Family("gemm", fmt, precision == "fast" and not FORMATS[fmt].is_float)


@cache
def _read(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")


def _argument(text: str) -> str:
    words = [word for word in text.replace("*", " * ").split() if word not in ("const", "restrict")]
    return " ".join(words).replace("__global", "global").replace(" *", "*")
