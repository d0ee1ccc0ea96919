"""bench/generate_model.py: model files with random weights, and requantised ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from polykern.backends import probe
from polykern.kernels.errors import ModelError, UsageError
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.load import load
from polykern.runtime.models import DEFAULT_MODEL, resolve
from polykern.runtime.settings import Settings
from tiny_llama import valid_llama_gguf

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "generate_model.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_model", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are made; the default model is still read from the user's cache."""
    monkeypatch.setattr(maker, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(maker, "POOL", 1 << 16)
    return tmp_path


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "BF16"])
def test_a_random_model_is_whole_and_sane(maker: ModuleType, folder: Path, fmt: str) -> None:
    path = maker.random_model("tiny", fmt)
    file = GGUFFile.open(path)
    config = ModelConfig.from_gguf(file)
    assert (len(config.layers), config.embedding_length, config.head_dim, config.vocab_size) == (2, 64, 16, 49152)
    for name, (shape, std) in maker.SHAPES["tiny"].tensors().items():
        info = file.tensors[name]
        if not std:
            assert (file.array(name) == 1).all()
            continue
        numbers = file.weight(name).dense()
        assert info.type_name == fmt
        assert numbers.shape == shape
        assert numbers.std() == pytest.approx(std, rel=0.05)
        assert abs(numbers.mean()) < 0.05 * std
        assert len(np.unique(numbers[:32], axis=0)) == min(32, shape[0])
    assert list(folder.rglob("*.part")) == []


def test_a_random_model_answers(maker: ModuleType, folder: Path) -> None:
    seen = probe("opencl")
    if seen.reason:
        pytest.skip(f"opencl: {seen.reason}")
    path = maker.random_model("tiny", "Q4_0")
    with load(Settings(model=path, backend="opencl", ctx=32)) as session:
        ids = session.tokenizer.encode("Once upon a time")
        assert len(list(session.generate(ids, max_tokens=1))) == 1
        logits = session.logits(ids)
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 10


def test_the_same_seed_makes_the_same_file(maker: ModuleType, folder: Path) -> None:
    first = maker.random_model("tiny", "Q4_0", layers=1)
    data = first.read_bytes()
    first.unlink()
    assert maker.random_model("tiny", "Q4_0", layers=1).read_bytes() == data
    other = maker.random_model("tiny", "Q4_0", layers=1, seed=1)
    assert other != first
    assert other.read_bytes() != data


def test_a_larger_vocabulary_is_filled_up(maker: ModuleType, folder: Path) -> None:
    file = GGUFFile.open(maker.random_model("tiny", "Q4_0", vocab=49155))
    assert ModelConfig.from_gguf(file).vocab_size == 49155
    assert list(file.metadata["tokenizer.ggml.tokens"])[-1] == "<|unused_2|>"
    assert len(file.metadata["tokenizer.ggml.token_type"]) == 49155


def test_requantising_stays_near_the_source(maker: ModuleType, folder: Path) -> None:
    """Rounding to 4 bits: each number is within half a step, the step being the largest of its block / 8."""
    source, made = GGUFFile.open(resolve(DEFAULT_MODEL)), GGUFFile.open(maker.requantised(DEFAULT_MODEL, "Q4_0"))
    assert list(made.tensors) == list(source.tensors)
    for name in ("blk.0.attn_q.weight", "blk.29.ffn_down.weight"):
        before, after = source.weight(name).dense(), made.weight(name).dense()
        largest = np.abs(before.reshape(-1, 32)).max(axis=1, keepdims=True)
        error = np.abs(after - before).reshape(-1, 32)
        # The largest becomes -8 steps exactly; one of the other sign may need +8 where the code ends at +7: a step.
        # The scale is rounded to float16, which adds 2^-11 of the number.
        assert (error <= largest / 8 * 1.01).all()
        assert 0.001 < error.mean() / largest.mean() < 1 / 16
    for name in ("token_embd.weight", "blk.3.attn_norm.weight"):
        assert gguf_bytes(made, name) == gguf_bytes(source, name)
    assert made.metadata["tokenizer.ggml.merges"] == source.metadata["tokenizer.ggml.merges"]
    assert made.metadata["general.file_type"] == 2


def gguf_bytes(file: GGUFFile, name: str) -> bytes:
    (tensor,) = (t for t in gguf.GGUFReader(file.path).tensors if t.name == name)
    return tensor.data.tobytes()


def test_requantising_what_is_there_already_changes_nothing(maker: ModuleType, folder: Path) -> None:
    path = maker.random_model("tiny", "Q8_0", layers=1)
    made, source = gguf.GGUFReader(maker.requantised(path, "Q8_0")), gguf.GGUFReader(path)
    for ours, theirs in zip(made.tensors, source.tensors, strict=True):
        assert ours.name == theirs.name
        assert np.array_equal(ours.data, theirs.data)


def test_shapes_that_cannot_be(maker: ModuleType, folder: Path) -> None:
    for changes, message in (
        ({"ff": 100}, "ff is 100, Q4_0 needs a multiple of 32"),
        ({"heads": 5}, "5 heads and 2 kv heads do not divide d_model 64 evenly"),
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"vocab": 100}, "vocab is 100, the tokenizer alone has 49152 tokens"),
    ):
        with pytest.raises(UsageError) as error:
            maker.random_model("tiny", "Q4_0", **changes)
        assert str(error.value) == message
    assert not list(folder.rglob("*.gguf"))


def test_errors_are_one_line(
    maker: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(valid_llama_gguf()[:2000])
    assert maker.main(["requantise", str(broken)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"generate_model: error: {broken}: key tokenizer.ggml.tokens at byte ")
    assert captured.err.count("\n") == 1

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(maker.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ModelError, match=r"tiny-layers1\.Q4_0\.random0\.v1\.gguf: cannot be written: 2 MB needed, 0 MB"
    ):
        maker.random_model("tiny", "Q4_0", layers=1)
    assert not list(folder.rglob("*.part"))
