"""What `--backend auto` says when it is left with its last candidate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from polykern.kernels.errors import BackendUnavailable
from polykern.runtime import opening
from polykern.runtime.opening import open_chosen, passed_over
from tiny_llama import valid_llama_gguf

World = Callable[[dict[str, Any]], None]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """world({name: (order, why it does not open)}): the only backends there are; order "broken" does not load."""

    def settle(backends: dict[str, Any]) -> None:
        def load_provider(name: str) -> Any:
            if backends[name][0] == "broken":
                raise BackendUnavailable(backends[name][1])
            return SimpleNamespace(order=backends[name][0])

        def open_backend(name: str, **_: Any) -> Any:
            if name == "auto":
                able = sorted((order, n) for n, (order, reason) in backends.items() if order is not None and not reason)
                name = able[0][1]
            if backends[name][1]:
                raise BackendUnavailable(f"backend {name!r} is not available: {backends[name][1]}")
            return SimpleNamespace(name=name, close=lambda: None)

        monkeypatch.setattr(opening, "list_backends", lambda: [SimpleNamespace(name=name) for name in backends])
        monkeypatch.setattr(opening, "load_provider", load_provider)
        monkeypatch.setattr(opening, "open_backend", open_backend)

    return settle


NO_DRIVER = "no driver: install one"


def test_the_last_resort_comes_with_the_reasons(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world(
        {
            "fast": (10, NO_DRIVER),
            "last": (1000, ""),
            "aside": (None, "is not asked"),
            "plugin": ("broken", "importing it failed"),
            "early": (5, "no card"),
        }
    )
    assert open_chosen("auto").name == "last"
    assert caplog.messages == [
        "auto chose last, its last resort: backend 'plugin' is not available: importing it failed;"
        f" backend 'early' is not available: no card; backend 'fast' is not available: {NO_DRIVER}"
    ]


@pytest.mark.parametrize(
    ("name", "backends"),
    [
        ("last", {"fast": (10, NO_DRIVER), "last": (1000, "")}),  # asked for by name
        ("auto", {"fast": (10, NO_DRIVER), "good": (20, ""), "last": (1000, "")}),  # not the last one
        ("auto", {"last": (1000, "")}),  # there is no other
    ],
)
def test_nothing_to_say(
    world: World, caplog: pytest.LogCaptureFixture, name: str, backends: dict[str, tuple[int, str]]
) -> None:
    world(backends)
    open_chosen(name)
    assert caplog.messages == []


def test_a_candidate_that_opens_after_all(world: World) -> None:
    world({"flaky": (10, ""), "last": (1000, "")})
    assert passed_over("last", None, None) == []


def test_one_line_on_stderr_and_a_clean_document(tmp_path: Path) -> None:
    """Only the reference has a device of that name."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(valid_llama_gguf())
    command = [sys.executable, "-m", "polykern.runtime", "-m", str(model), "--raw", "-n", "2", "--json", "hi"]
    environment = {**os.environ, "POLYKERN_BACKENDS": "", "POLYKERN_DEVICE": "host"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=environment)
    assert json.loads(done.stdout)["backend"] == "reference"
    (line,) = done.stderr.splitlines()
    assert line.startswith("runtime: warning: auto chose reference, its last resort: backend '")
    assert "'host'" in line
