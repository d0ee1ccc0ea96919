"""The kept table of compiled CUDA kernels: of today's sources, within its budget, and what the compilers give again."""

from __future__ import annotations

import json
from typing import Any

import cuda_kernels
import numpy as np
import pytest
from polykern.backends.cuda.aot import parse
from polykern.backends.cuda.compiler import Compiler, compilers

SAMPLED = 4  # of each target's decode kernels; compiling all takes minutes


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(cuda_kernels.RESULT.read_text())


def test_the_table_is_of_these_sources_and_within_budget(document: dict[str, Any]) -> None:
    assert cuda_kernels.problems(document) == []
    assert cuda_kernels.main(["--check"]) == 0
    assert {row["target"] for row in document["kernels"]} == set(cuda_kernels.TARGETS)


def test_a_kernel_over_its_budget_is_named(document: dict[str, Any]) -> None:
    row = next(r for r in document["kernels"] if r["stage"] == "decode" and r["target"] == "cuda:90")
    worse = {**document, "kernels": [{**row, "local_bytes": 8}, {**row, "shared": 1 << 20}]}
    spills, shared = cuda_kernels.problems(worse)
    assert spills == f"cuda:90: {cuda_kernels.label(row)} spills 8 bytes a thread, its budget is 0"
    assert shared.startswith(f"cuda:90: {cuda_kernels.label(row)} takes ")
    assert shared.endswith("bytes of shared memory, there are 232448")
    (stale,) = cuda_kernels.problems({**document, "sources": "others", "kernels": []})
    assert stale == "kernels were changed since: run `make cuda-kernels`"


@pytest.mark.parametrize("target", cuda_kernels.TARGETS)
def test_kernels_compile_to_what_the_table_says(target: str, document: dict[str, Any]) -> None:
    pytest.importorskip("triton", reason="needs the compiler: pip install 'polykern[cuda]'")
    called = cuda_kernels.signatures()
    decode = [spec for spec, (_, stage) in cuda_kernels.specs(target, called).items() if stage == "decode"]
    kept = {cuda_kernels.key(row): row for row in document["kernels"] if row["target"] == target}
    seed = 20261125
    print(f"seed {seed}")
    chosen = [decode[i] for i in np.random.default_rng(seed).choice(len(decode), SAMPLED, replace=False)]
    compiler = Compiler(parse(target))
    binaries = compiler.binaries(chosen)
    compiler.close()
    for spec, binary in zip(chosen, binaries, strict=True):
        row = kept[cuda_kernels.key_of(spec)]
        assert binary.local_bytes == 0, spec.label
        if document["compilers"] == compilers():
            assert binary.about == {name: row[name] for name in binary.about}, spec.label
