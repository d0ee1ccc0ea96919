"""bench/peers: the comparison with other systems, with stand-ins for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from polykern.kernels.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"

# The peer that is right is our own reference; the others go wrong, each in its own way.
STAND_INS = {
    "right": "",
    "wrong": "    def greedy(self, ids, count): return [0] * count",
    "dying": "    def greedy(self, ids, count): import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "late": "    def decode(self, ids, count): raise RuntimeError('out of\\nmemory')",
    "hanging": "    def greedy(self, ids, count): import time; time.sleep(60)",
    "noisy": "    def about(self): import os; os.write(1, b'banner\\n'); return {'version': 'noisy 1'}",
    "lacking": "    import not_installed_anywhere",
    "leaving": "    import sys; sys.exit('no licence')",
}


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    sys.path.insert(0, str(PEERS))
    try:
        import run  # type: ignore[import-not-found]

        yield run
    finally:
        sys.path.remove(str(PEERS))
        for name in ("run", "child", "table"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(run: ModuleType) -> Path:
    return run.make("random", "tiny", "--format", "Q8_0", "--layers", "1")


@pytest.fixture
def stand_ins(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / f"{name}_side.py").write_text(
            "from ours import Side as Ours\n\n"
            "class Side(Ours):\n"
            "    def __init__(self, **options): super().__init__(**options, backend='reference')\n"
            f"{body}\n"
        )
        monkeypatch.setitem(run.PEERS, name, run.Peer(f"{name}_side", f"the-{name}-peer"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def compare(run: ModuleType, model: Path, out: Path, *more: str) -> int:
    return run.main(["--model", str(model), "-r", "2", "-t", "1", "--judge", "reference", "-o", str(out), *more])


@pytest.mark.usefixtures("stand_ins")
def test_a_comparison(
    run: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.Child.__init__, "__defaults__", (20,))
    out = tmp_path / "results" / "peers.json"
    names = "reference,nonesuch,right@one,noisy:Q4_0,wrong,dying,late,hanging,lacking,leaving"
    assert compare(run, model, out, "--tests", "pp5,tg3,tg2@d7", "--sides", names) == 0
    document = json.loads(out.read_text())
    captured = capsys.readouterr()

    assert [side["name"] for side in document["sides"]] == ["reference", "right@one", "noisy:Q4_0"]
    assert [side["peer"] for side in document["sides"]] == [False, True, True]
    for side in document["sides"]:
        assert side["regret"] < run.REGRET
        assert [row["test"] for row in side["results"]] == ["pp5", "tg3", "tg2@d7"]
        for row in side["results"]:
            assert len(row["tps_all"]) == 2
            assert min(row["tps_all"]) > 0
            assert ("roofline_fraction" in row) == row["test"].startswith("tg")
    ours, _, noisy = document["sides"]
    assert noisy["file"].endswith(".as.Q4_0.v1.gguf")
    assert noisy["file_bytes"] < ours["file_bytes"]
    # keys and values of one layer, 2 heads of 16 float16 numbers, 5.5 tokens more on average
    assert ours["results"][2]["bytes_per_token"] - ours["results"][1]["bytes_per_token"] == 2 * 2 * 16 * 2 * 6.5
    for key in ("threads", "host", "versions", "commit", "date", "read_gb_per_s", "others_cpu_share"):
        assert key in document

    reasons = document["left_out"]
    assert reasons.pop("nonesuch").startswith("unknown backend 'nonesuch'; known: ")
    assert reasons.pop("wrong").endswith(" nats less likely than the best (allowed: 0.1); not timed")
    assert reasons == {
        "dying": "killed by SIGSEGV in greedy",
        "late": "RuntimeError: out of",
        "hanging": "no answer in 20 s in greedy",
        "lacking": f"the-lacking-peer is not installed in {sys.executable}: {run.INSTALL}",
        "leaving": "exit status 1 while loading: no licence",
    }
    for name in reasons:
        assert f"{name}: left out: {reasons[name]}\n" in captured.err
    assert "1.00×" not in captured.out.splitlines()[0]
    assert captured.out.count("reference is") == 3


@pytest.mark.usefixtures("stand_ins")
def test_an_idle_side_stands_still(run: ModuleType, model: Path) -> None:
    child = run.start("right", model, 1, 64, {})
    try:
        assert child.ask("prompt", ids=[1, 2, 3]) > 0
        state = Path(f"/proc/{child._process.pid}/stat")
        if not state.exists():
            pytest.skip("needs /proc")
        until = time.monotonic() + 5  # a signal takes a moment
        while state.read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert state.read_text().rpartition(")")[2].split()[0] == "T"  # stopped
        assert child.ask("decode", ids=[1], count=2) > 0
    finally:
        child.close()
    assert child._process.returncode == 0


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.skipif(sys.platform != "linux", reason="the signal that ends it is Linux'")
def test_no_side_outlives_a_run_that_was_killed(model: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(PEERS)!r}); from child import Child\n"
        f"options = dict(model={str(model)!r}, threads=1, ctx=64, backend='reference')\n"
        "print(Child('ours', options, sys.executable)._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=120)
    assert parent.returncode == -9
    child, until = Path(f"/proc/{int(parent.stdout)}/stat"), time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_asked_for_wrongly(
    run: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "no.json"
    for arguments, status, message in (
        (["--tests", "pp0"], 2, "no test 'pp0': expected pp512, tg128 or tg32@d4096"),
        (["--tests", "pp8@d8"], 2, "no test 'pp8@d8': expected pp512, tg128 or tg32@d4096"),
        (["--repetitions", "0"], 2, "--repetitions and --threads must be at least 1"),
        (["--tests", "tg600"], 1, f"{model}: the tests need a context of 601, the model's maximum is 512"),
        (["--model", "random:nosuch"], 1, "generate_model.py random nosuch --format Q4_0: exit status 2"),
        (["--judge", "nosuch", "--sides", "reference", "--tests", "tg1"], 1, "nosuch cannot judge: unknown backend"),
    ):
        assert compare(run, model, out, *arguments) == status
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"peers: error: {message}")
    assert not out.exists()
    assert run.pythons(["/a", "openvino=/b"]) == {"": "/a", "openvino": "/b"}
    with pytest.raises(run.SideFailed, match=r"^/no/python: No such file or directory$"):
        run.start("llama.cpp@b:Q4_0", model, 1, 64, {"": sys.executable, "llama.cpp@b": "/no/python"})
    with pytest.raises(UsageError):
        run.Test.parse("tg")


def document(**changes: Any) -> dict[str, Any]:
    def side(name: str, peer: bool, speeds: list[float]) -> dict[str, Any]:
        rows = [{"test": "pp512", "tps_all": [10 * s for s in speeds]}, {"test": "tg128", "tps_all": speeds}]
        return {"name": name, "peer": peer, "results": rows}

    made = {
        "model": {"file": "m.gguf"},
        "threads": 2,
        "tests": ["pp512", "tg128"],
        "sides": [side("tvm", False, [60.0, 40.0, 50.0]), side("opencl", False, [30.0, 30.0, 30.0]),
                  side("llama.cpp:Q4_0", True, [20.0, 20.0, 25.0])],
        "read_gb_per_s": 24.25,
        "host": {"model": "A CPU", "flags": ["avx2", "amx_int8"]},
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
    }  # fmt: skip
    return {**made, **changes}


def test_the_table_of_the_readme(run: ModuleType) -> None:
    """Behind a peer's speed: the fastest of ours against it, the median of the rounds' ratios (3, 2, 2)."""
    import table  # type: ignore[import-not-found]

    assert table.markdown(document()).splitlines() == [
        "| `m.gguf`, tok/s | pp512 | tg128 |",
        "|---|---:|---:|",
        "| **polykern tvm** | 500 (400–600) | 50.0 (40.0–60.0) |",
        "| **polykern opencl** | 300 (300–300) | 30.0 (30.0–30.0) |",
        "| llama.cpp, file requantised to Q4_0 | 200 (200–250), 2.00× | 20.0 (20.0–25.0), 2.00× |",
        "",
        "A CPU with AMX, 2 threads, memory read at 24.2 GB/s in the same run; 2026-01-02, commit 0123456789ab.  ",
    ]
    readme = f"before {table.BEGIN}\nold\n{table.END} after"
    made = table.with_tables(readme, {"a": document(), "b": document(threads=4)})
    assert made.startswith(f"before {table.BEGIN}\n\n| `m.gguf`")
    assert made.endswith(f"0123456789ab.  \n{table.END} after")
    assert "A CPU with AMX, 4 threads" in made


def test_the_comparison_in_the_readme_is_up_to_date(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    import table  # type: ignore[import-not-found]

    if not table.documents():
        pytest.skip("no peers-*.json is kept in bench/results yet")
    assert table.main(["--check"]) == 0, capsys.readouterr().err
