"""Fixtures every test may use: the default model, golden results, tiny models, plug-ins."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf_image import Image, save
from plugins import Install
from tiny_llama import valid_llama_gguf

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Ids, log-probabilities and NLL of the default model from independent implementations."""
    return json.loads((HERE / "golden" / "smollm2-135m-q4_1.json").read_text())


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file, fetched into the user cache if need be."""
    from polykern.runtime.models import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama: 2 layers, 320 tokens, Q8_0, made for a context of 256."""
    return str(save(tmp_path_factory.mktemp("model"), valid_llama_gguf()))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Image | bytes], Path]:
    """Write an image or bytes to a file; its path."""
    return partial(save, tmp_path)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(distribution, name, code): a package on sys.path that registers a backend, as pip would leave it.

    `code` finds the name it is registered as in NAME.
    """
    monkeypatch.delenv("POLYKERN_BACKENDS", raising=False)

    def install(distribution: str, name: str, code: str, *, metadata: str | None = None, site: str = "site") -> None:
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{distribution.replace('-', '_')}"
        folder = tmp_path / site
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(f"NAME = {name!r}\n" + textwrap.dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        entry = f"[polykern.backends]\n{name} = {module}:provider\n" if metadata is None else metadata
        (info / "entry_points.txt").write_text(entry)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    for module in [m for m in sys.modules if m.startswith(f"plugin_{tmp_path.name.replace('-', '_')}_")]:
        del sys.modules[module]


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of our own backends only the reference can be had."""
    from polykern.backends import registry

    plain = registry.list_backends
    monkeypatch.setattr(
        registry, "list_backends", lambda: [e for e in plain() if e.name == "reference" or e.distribution != "polykern"]
    )
