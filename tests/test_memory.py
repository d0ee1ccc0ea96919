"""Memory: weights once, the file given back while they are packed, and refusal before the machine runs out."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_image import F32, Image, Tensor
from polykern.backends import candidates, probe
from polykern.backends.null import NullBackend
from polykern.kernels.errors import ModelError
from polykern.kernels.spi import LAST_RESORT
from polykern.runtime import memory
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import load
from polykern.runtime.memory import MIB, PackingGuard, bytes_per_token, host_memory
from polykern.runtime.settings import Settings

Write = Callable[[Image | bytes], Path]

REAL = [c.name for c in candidates() if c.provider and c.order < LAST_RESORT and c.entry.distribution == "polykern"]
# What Python, NumPy and the driver may take; Intel's OpenCL runtime and all else took 240 MB before the first weight.
LIBRARIES = 450_000_000


def require(backend: str) -> None:
    if reason := probe(backend).reason:
        pytest.skip(f"no {backend} here: {reason}")


@pytest.mark.parametrize("backend", REAL)
def test_peak_of_an_answer(backend: str, default_model: Path) -> None:
    """At most 1.15 times the file, the KV cache, and LIBRARIES; VmHWM is the most the process ever had."""
    require(backend)
    code = (
        "import sys\nfrom polykern.runtime.cli import main\n"
        f"status = main(['--backend', {backend!r}, '-m', {str(default_model)!r}, '-n', '2', '--json', 'Hello'])\n"
        "print(open('/proc/self/status').read(), file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak, "no VmHWM in /proc/self/status"
    gguf = GGUFFile.open(default_model)
    cache = 4096 * bytes_per_token(ModelConfig.from_gguf(gguf))
    assert int(peak[1]) * 1024 <= 1.15 * gguf.file_size + cache + LIBRARIES


def resident(path: Path) -> int:
    """Bytes of the mapped file `path` that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_release_gives_the_pages_back_and_keeps_the_view(write: Write) -> None:
    rows = np.arange(1 << 20, dtype="<f4")
    path = write(Image(tensors=[Tensor(name, (1 << 20,), F32, (rows + i).tobytes()) for i, name in enumerate("ab")]))
    gguf = GGUFFile.open(path)
    a, b = gguf.array("a"), gguf.array("b")
    assert a.sum() < b.sum()
    assert resident(path) >= 8 * MIB
    gguf.release(["a"])
    assert 0 < resident(path) < 5 * MIB  # a file may be mapped in pages of 2 MiB, which go as a whole
    gguf.release()
    assert resident(path) < MIB
    np.testing.assert_array_equal(a, rows)
    np.testing.assert_array_equal(b, rows + 1)


def test_each_weight_leaves_when_the_device_has_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tied (the embedding is the head) and stacked ones (Q, K and V), each once; then the whole file."""
    log: list[str] = []
    pack, release = NullBackend.pack, GGUFFile.release

    def packed(self: NullBackend, weight: object) -> object:
        log.append("pack")
        return pack(self, weight)  # type: ignore[arg-type]

    def released(self: GGUFFile, names: list[str] | None = None) -> None:
        log.append(" ".join(names) if names else "all")
        release(self, names)

    monkeypatch.setattr(NullBackend, "pack", packed)
    monkeypatch.setattr(GGUFFile, "release", released)
    with load(Settings(model, backend="null")) as session:
        session.bench(9, 0, 1)
        config = session.config
    assert log[-1] == "all"
    given = [name for line in log if line not in ("pack", "all") for name in line.split()]
    assert sorted(given) == sorted(config.tensors)
    for before, line in itertools.pairwise(log):
        assert before != "pack" or line.endswith(".weight")
    assert "blk.0.attn_q.weight blk.0.attn_k.weight blk.0.attn_v.weight" in log


@pytest.mark.parametrize("backend", [*REAL, "reference"])
def test_a_model_too_large_is_refused_while_it_is_packed(
    backend: str, default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its layout takes: found out from how this process grows."""
    require(backend)
    monkeypatch.setattr(memory, "GUARD_AFTER_BYTES", 8 * MIB)
    monkeypatch.setattr(memory, "GUARD_SLACK_BYTES", 0)
    for check in ("check_memory", "check_host_share"):
        monkeypatch.setattr(f"polykern.runtime.load.{check}", lambda *_: None)
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * MIB)
    with pytest.raises(ModelError) as error:
        load(Settings(default_model, backend=backend))
    assert re.fullmatch(
        rf"{re.escape(str(default_model))}: \d+ of 92 MiB of weights are loaded, the rest would take \d+ MiB, this"
        r" machine has 2 MiB left: take a smaller model, or a --backend that keeps weights packed \(`runtime backends`"
        r" lists them\)",
        str(error.value),
    )


def test_the_context_has_to_fit_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 1024 MiB packed as they are; what is left holds the other half and 100 MiB of cache."""
    grown = 0
    monkeypatch.setattr(memory, "anonymous_memory", lambda: grown)
    monkeypatch.setattr(memory, "host_memory", lambda: 612 * MIB)
    for ctx, fits in ((100, True), (101, False)):
        grown = 0
        guard = PackingGuard(1024 * MIB, "m.gguf", ctx, MIB)
        guard.hand_out(512 * MIB)
        grown = (512 + 256) * MIB
        if fits:
            guard.hand_out(512 * MIB)
            continue
        with pytest.raises(ModelError) as error:
            guard.hand_out(512 * MIB)
        assert str(error.value) == (
            "m.gguf: 512 of 1024 MiB of weights are loaded, the rest and --ctx 101 would take 613 MiB, this machine has"
            " 612 MiB left: --ctx 100 fits"
        )
    grown = 0  # on a card with memory of its own
    guard = PackingGuard(1024 * MIB, "m.gguf", 101, MIB)
    guard.hand_out(512 * MIB)
    guard.hand_out(512 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_with_less(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of the limits around the process counts; pages of files are given back before anybody is killed."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    cached = "total_inactive_file" if version == 1 else "inactive_file"
    for group, most in (("a", 40 * MIB), ("a/b", 60 * MIB), ("a/b/c", "max" if version == 2 else 1 << 62)):
        (root / group).mkdir(parents=True)
        (root / group / limit).write_text(f"{most}\n")
        (root / group / used).write_text(f"{30 * MIB}\n")
        (root / group / "memory.stat").write_text(f"anon 1\n{cached} {2 * MIB}\n")
    own = tmp_path / "cgroup"
    own.write_text("4:cpu:/x\n3:memory:/a/b/c\n" if version == 1 else "0::/a/b/c\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", own)
    assert host_memory() == 12 * MIB
    own.write_text("3:memory:/elsewhere/outside\n" if version == 1 else "0::/elsewhere\n")
    assert host_memory() > 12 * MIB
    own.unlink()
    assert host_memory() > 12 * MIB
    assert host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
