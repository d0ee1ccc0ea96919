"""What `--backend auto` says when it is left with its last candidate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugins import GOOD, Install
from polykern.runtime.opening import open_chosen
from tiny_llama import valid_llama_gguf

NO_DRIVER = "no driver: install one"


def opens_not(reason: str) -> str:
    return f"    def refuse(self, options):\n        raise BackendUnavailable({reason!r})\n\n    Plugin.open = refuse\n"


@pytest.mark.usefixtures("nothing_else")
def test_the_last_resort_comes_with_the_reasons(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    imports = "    from polykern.kernels.errors import BackendUnavailable\n"
    install("acme-fast", "fast", GOOD.format(order=10) + imports + opens_not(NO_DRIVER), site="a")
    install("acme-aside", "aside", GOOD.format(order=None), site="b")
    install("acme-plugin", "plugin", "raise ValueError('no')", site="c")
    install("acme-early", "early", GOOD.format(order=5) + imports + opens_not("no card"), site="d")
    assert open_chosen("auto").name == "reference"
    (line,) = caplog.messages
    assert line.startswith("auto chose reference, its last resort: plugin: importing ")
    assert line.endswith(f" failed: ValueError: no; early: no card; fast: {NO_DRIVER}")
    caplog.clear()
    open_chosen("reference")  # asked for by name
    install("acme-good", "good", GOOD.format(order=20), site="e")
    assert open_chosen("auto").name == "good"  # not the last one
    assert caplog.messages == []


@pytest.mark.usefixtures("nothing_else")
def test_nothing_to_say_where_there_is_no_other(caplog: pytest.LogCaptureFixture) -> None:
    assert open_chosen("auto").name == "reference"
    assert caplog.messages == []


def test_one_line_on_stderr_and_a_clean_document(tmp_path: Path) -> None:
    """Only the reference has a device of that name."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(valid_llama_gguf())
    command = [sys.executable, "-m", "polykern.runtime", "-m", str(model), "--raw", "-n", "2", "--json", "hi"]
    environment = {**os.environ, "POLYKERN_BACKENDS": "", "POLYKERN_DEVICE": "host"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=environment)
    assert json.loads(done.stdout)["backend"] == "reference"
    (line,) = done.stderr.splitlines()
    assert line.startswith("runtime: warning: auto chose reference, its last resort: ")
    assert "'host'" in line
