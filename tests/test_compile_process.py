"""Compilers as child processes (backends/compile_process.py): a child that is gone, and one that crashes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from polykern.backends.compile_process import CompileFailed, CompilePool

CHILD = """
import os
from polykern.backends.compile_process import serve

def build(request):
    if "status" in request:
        print("out of registers", flush=True)
        os._exit(request["status"])
    if "wrong" in request:
        raise ValueError(request["wrong"])
    return {"pid": os.getpid()}, request["text"].encode()

serve(build)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompilePool]:
    (tmp_path / "fake_compiler.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    opened = CompilePool("fake_compiler")
    yield opened
    opened.close()


def test_a_child_serves_again(pool: CompilePool) -> None:
    (first, text), (second, _) = (pool.ask("gemm", {"text": "code"}) for _ in range(2))
    assert text == b"code"
    assert first["pid"] == second["pid"]


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_child_that_ended_meanwhile_is_replaced(pool: CompilePool, is_seen: bool) -> None:
    """It ends after some seconds without work, perhaps between being asked and answering."""
    first, _ = pool.ask("gemm", {"text": "code"})
    os.kill(first["pid"], 9)
    if is_seen:
        pool._idle[0]._process.wait()
    second, text = pool.ask("gemm", {"text": "more"})
    assert text == b"more"
    assert first["pid"] != second["pid"]


def test_a_compiler_that_crashes_is_one_line(pool: CompilePool) -> None:
    for _ in range(2):  # also one that has served before
        with pytest.raises(CompileFailed, match=r"^gemm: its compiler ended out of registers$"):
            pool.ask("gemm", {"status": 3})
        pool.ask("gemm", {"text": "code"})


def test_a_refusal_leaves_the_child(pool: CompilePool) -> None:
    first, _ = pool.ask("gemm", {"text": "code"})
    with pytest.raises(CompileFailed, match=r"^gemm: ValueError: no such format$"):
        pool.ask("gemm", {"wrong": "no such format"})
    assert pool.ask("gemm", {"text": "code"})[0] == first | {"nbytes": 4}
