"""Builds and runs the RTL simulation: Icarus Verilog, or Verilator, which is fast and takes half a minute to build."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from polykern.runtime.fpga.cycles import Element
from rtl_model import Group, Played, read_output

RTL = Path(__file__).resolve().parents[1] / "hls" / "rtl"
SOURCES = sorted(path for path in RTL.glob("*.v") if path.name != "gemv_pe_tb.v")
BENCH = RTL / "gemv_pe_tb.v"


def need(*tools: str) -> None:
    """Skip a test that needs a tool that is not here."""
    for tool in tools:
        if shutil.which(tool) is None:
            package = {"vvp": "iverilog"}.get(tool, tool)
            pytest.skip(f"no {tool} on PATH: apt-get install {package}")


def need_verilator() -> None:
    """Skip a test that needs Verilator 5: versions before cannot run a test bench, and name warnings otherwise."""
    need("verilator")
    version = run("verilator", "--version").split()[1]
    if int(version.split(".")[0]) < 5:
        pytest.skip(f"verilator is {version}, and 5 or later is needed (Debian 12, Ubuntu 24.04)")


def run(*command: str | Path, timeout: float = 300) -> str:
    """Standard output; a failure shows what the tool said."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def parameters(element: Element) -> dict[str, int]:
    return {
        "WEIGHT_BITS": element.bits,
        "LANES": element.lanes,
        "HAS_MIN": int(element.minimum),
        "USE_DSP": int(element.dsp),
    }


class Simulator:
    """The processing element of one Element, built once in `folder`; `play` runs groups through it."""

    def __init__(
        self,
        element: Element,
        folder: Path,
        tool: str = "iverilog",
        sources: Sequence[Path] = SOURCES,
        **others: int,
    ) -> None:
        self.element, self.folder = element, folder
        settings = {**parameters(element), **others}
        folder.mkdir(parents=True, exist_ok=True)
        if tool == "iverilog":
            built = folder / "gemv_pe_tb.vvp"
            options = [f"-Pgemv_pe_tb.{name}={value}" for name, value in settings.items()]
            run("iverilog", "-g2005", "-s", "gemv_pe_tb", *options, "-o", built, BENCH, *sources)
            self.command: list[str | Path] = ["vvp", "-n", built]
        else:
            options = [f"-G{name}={value}" for name, value in settings.items()]
            run(
                "verilator", "--binary", "--timing", "-Wno-fatal", "-O3", "--top-module", "gemv_pe_tb",
                "--Mdir", folder, *options, BENCH, *sources,
            )  # fmt: skip
            self.command = [folder / "Vgemv_pe_tb"]

    def play(self, groups: Sequence[Group]) -> list[Played]:
        noise = np.random.default_rng(7)
        stimulus, response = self.folder / "input.txt", self.folder / "output.txt"
        stimulus.write_text("".join(group.text(noise) for group in groups))
        run(*self.command, f"+input={stimulus}", f"+output={response}")
        return read_output(response.read_text())
