"""The default model against golden results, on any backend, device and precision found on this machine.

A greedy continuation may part from the golden one only where that one's two likeliest tokens are nearly tied; after a
parting the texts differ, so nothing more is compared. How near depends on what `precision` allows a kernel to round.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from _pytest.mark import ParameterSet
from polykern.backends import list_backends, probe
from polykern.runtime.session import Session
from polykern.runtime.settings import Sampling

MARGIN = {"exact": 0.01, "fast": 0.25}  # of log-probabilities
MEAN_NLL_DIFFERENCE = {"exact": 0.005, "fast": 0.067}  # per token; 0.067 is llama.cpp's on the same text

SIMULATORS = ("oclgrind", "emulation")  # would take hours

# `null` computes nothing; `reference` and `opencl-tvm` compute the same when they may be fast.
PRECISIONS = {"null": (), "reference": ("exact",), "opencl-tvm": ("exact",)}


def devices() -> list[ParameterSet]:
    """(backend, device) for parametrize: all that compute; one without a device is skipped, with its own reason."""
    found: list[ParameterSet] = []
    for entry in list_backends():
        if not PRECISIONS.get(entry.name, ("exact",)):
            continue
        seen = probe(entry.name)
        if seen.reason:
            skip = pytest.mark.skip(reason=f"{entry.name}: {seen.reason}")
            found.append(pytest.param((entry.name, None), marks=skip, id=entry.name))
        for index, device in enumerate(seen.devices):
            if not any(word in device.name.lower() for word in SIMULATORS):
                name = re.sub(r"\W+", "_", device.name).strip("_")[:24]
                found.append(pytest.param((entry.name, str(index)), id=f"{entry.name}-{index}-{name}"))
    return found


def targets() -> list[ParameterSet]:
    """(backend, device, precision) for parametrize: `devices`, each in every precision it has."""
    found: list[ParameterSet] = []
    for device in devices():
        ((name, index),) = device.values
        found += [
            pytest.param(name, index, precision, marks=device.marks, id=f"{device.id}-{precision}")
            for precision in PRECISIONS.get(name, ("exact", "fast"))
        ]
    return found


def check_greedy(session: Session, golden: dict[str, Any]) -> None:
    """Each prompt's continuation, by the rule above."""
    limit = MARGIN[session.settings.precision]
    endless = Sampling(suppress=frozenset(session.tokenizer.eos_ids))  # golden was made without an end of text
    for case in golden["greedy"]:
        expected = case["greedy_ids"]
        found = list(session.generate(case["prompt_ids"], max_tokens=len(expected), sampling=endless))
        assert len(found) == len(expected)
        for place, (token, right) in enumerate(zip(found, expected, strict=True)):
            if token == right:
                continue
            rivals = dict(zip(case["top5_ids"][place], case["top5_logprobs"][place], strict=True))
            where = f"{case['prompt']!r}, token {place}: {token} for {right}"
            assert token in rivals, f"{where}: not even among the five likeliest {rivals}"
            margin = rivals[right] - rivals[token]
            assert margin < limit, f"{where}: {margin:.3f} less likely, at most {limit} may be lost"
            break


def check_nll(session: Session, golden: dict[str, Any], *, by_step: bool = False) -> None:
    """The text's likelihood, token by token; `by_step` through the decode step, else in chunks."""
    expected = golden["text_nll"]
    found = session.nll(expected["ids"], by_step=by_step)
    difference = float(np.abs(np.array(found) - np.array(expected["nll"])).mean())
    assert len(found) == len(expected["ids"]) - 1
    assert difference <= MEAN_NLL_DIFFERENCE[session.settings.precision], f"mean difference {difference:.5f} per token"
