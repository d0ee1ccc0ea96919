"""The default model through the cuda backend's kernels, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden_check import check_greedy
from polykern.runtime.load import load
from polykern.runtime.settings import Settings

pytest.importorskip("triton", reason="needs Triton's interpreter: pip install 'polykern[cuda]'")

TOKENS = 3  # ten seconds each


@pytest.mark.slow
def test_the_default_model_answers_as_golden(default_model: Path, golden: dict[str, Any]) -> None:
    settings = Settings(model=str(default_model), backend="cuda", device="interpret", ctx=64, fallback="error")
    case = golden["greedy"][1]
    with load(settings) as session:
        check_greedy(session, {"greedy": [{**case, "greedy_ids": case["greedy_ids"][:TOKENS]}]})
