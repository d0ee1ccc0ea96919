"""Fixtures every test may use: the default model, golden results, backends found on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
