"""Decoding: chunked prefill, replayed steps, the KV cache between prompts, sampling; and the default model against
golden results on every device found here."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain_llama
import pytest
from golden_check import check_greedy, check_nll, targets
from polykern.backends.reference import ReferenceBackend
from polykern.kernels.errors import ModelError, UnsupportedOp, UsageError
from polykern.kernels.op import Signature
from polykern.kernels.spi import Kernel, Unsupported
from polykern.runtime.load import load
from polykern.runtime.session import Session
from polykern.runtime.settings import Sampling, Settings
from polykern.runtime.step import Step
from tiny_llama import llama_image

IMAGE = llama_image(seed=4)
VOCAB = 320


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(IMAGE.encode())
    return path


@pytest.fixture
def session(path: Path) -> Iterator[Session]:
    with load(Settings(path, backend="reference", precision="exact")) as session:
        yield session


def text(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def greedy(session: Session, prompt: list[int], count: int = 6, **options: Any) -> list[int]:
    return list(session.generate(prompt, max_tokens=count, **options))


def test_greedy_decoding_equals_the_plain_implementation(session: Session) -> None:
    prompt = text(5)
    found = greedy(session, prompt, 12)
    sequence = list(prompt)
    for token in found:
        row = np.sort(logits := plain_llama.logits(IMAGE, sequence)[-1])
        assert row[-1] - row[-2] > 0.05, "a near tie: choose another seed"
        assert token == logits.argmax()
        sequence.append(token)
    assert session.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 16, 17, 33, 64, 65, 66, 130])
def test_chunks_and_single_tokens_agree(session: Session, length: int) -> None:
    """The token after a prompt: prefilled in chunks, fed one by one on a growing prefix, and teacher-forced."""
    prompt = text(length)
    in_chunks = greedy(session, prompt, 1)
    session.reset()
    one_by_one = [greedy(session, prompt[: i + 1], 1) for i in range(length)]
    assert one_by_one[-1] == in_chunks
    teacher = session.logits(prompt)
    assert [[row.argmax()] for row in teacher] == one_by_one
    np.testing.assert_allclose(session.logits(prompt, by_step=True), teacher, rtol=0, atol=4e-3)


def test_replayed_steps_equal_teacher_forcing(session: Session) -> None:
    prompt = text(20)
    found = greedy(session, prompt, 40)
    logits = session.logits(prompt + found)
    assert found == logits[19:-1].argmax(axis=1).tolist()


def test_a_shared_prefix_is_not_computed_again(path: Path) -> None:
    with load(Settings(path, backend="null")) as session:

        def launches(prompt: list[int]) -> Counter[str]:
            session.backend.launches.clear()
            list(session.generate(prompt, max_tokens=1))
            shapes = [c.tensors["token_ids"].shape[0] for c in session.backend.launches if c.op == "embedding"]
            return Counter(shapes)

        prompt = text(70)
        assert launches(prompt) == {64: 1, 8: 1, 1: 1}
        assert launches(prompt) == {1: 1}
        assert launches([*prompt, 5, 6, 7]) == {8: 1, 1: 1}
        assert launches(prompt[:10]) == {1: 1}
        assert launches(prompt) == {64: 1, 1: 1}
        session.reset()
        assert launches(prompt) == {64: 1, 8: 1, 1: 1}


@pytest.mark.parametrize("shared", [0, 1, 7, 8, 30, 39, 40])
def test_reuse_equals_a_fresh_start(session: Session, shared: int) -> None:
    first = text(40, seed=1)
    second = first[:shared] + text(12, seed=2)
    greedy(session, first, 9)
    reused = greedy(session, second)
    session.reset()
    assert greedy(session, second) == reused


def test_a_conversation_reuses_its_own_answer(session: Session) -> None:
    prompt = text(12)
    answer = greedy(session, prompt, 7)
    follow_up = prompt + answer + text(4, seed=9)
    reused = greedy(session, follow_up)
    session.reset()
    assert greedy(session, follow_up) == reused


# Ends


def test_stop_ids_end_before_they_are_yielded(session: Session) -> None:
    free = greedy(session, text(5), 12)
    stop = free[4]
    found = greedy(session, text(5), 12, stop_ids={stop, 9999})
    assert found == free[: free.index(stop)]
    assert session.finish_reason == "stop"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_max_tokens(session: Session, count: int) -> None:
    assert len(greedy(session, text(5), count)) == count
    assert session.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "limit", "expected", "reason"),
    [
        (10, None, 7, "context"),
        (10, 7, 7, "length"),
        (10, 8, 7, "context"),
        (16, None, 1, "context"),
        (16, 1, 1, "length"),
    ],
)
def test_a_full_context_ends_the_generation(
    path: Path, prompt: int, limit: int | None, expected: int, reason: str
) -> None:
    """16 tokens fit; the last token found need not."""
    with load(Settings(path, backend="reference", ctx=16)) as session:
        found = list(session.generate(text(prompt), max_tokens=limit))
        assert (len(found), session.finish_reason) == (expected, reason)
    with load(Settings(path, backend="reference", ctx=64)) as session:
        assert greedy(session, text(prompt), expected) == found


@pytest.mark.parametrize("use", ["generate", "nll", "logits"])
def test_a_prompt_must_fit_the_context(path: Path, use: str) -> None:
    with load(Settings(path, backend="reference", ctx=10)) as session:
        call: Any = getattr(session, use)
        what = "the prompt" if use == "generate" else "the text"
        with pytest.raises(ModelError) as error:
            call(text(11))
        assert str(error.value) == f"{what} has 11 tokens, --ctx is 10, the model's maximum is 256"
        assert len(list(call(text(10)))) == {"generate": 1, "nll": 9, "logits": 10}[use]


def test_wrong_prompts(session: Session) -> None:
    cases: list[tuple[list[int], dict[str, Any], str]] = [
        ([], {}, "the prompt is empty: at least one token is needed"),
        ([1, VOCAB], {}, "token 1 of the prompt is 320, outside the vocabulary (0 to 319)"),
        ([-1], {}, "token 0 of the prompt is -1, outside the vocabulary (0 to 319)"),
        ([1], {"max_tokens": -1}, "max_tokens is -1, expected at least 0"),
    ]
    for prompt, options, message in cases:
        with pytest.raises(UsageError) as error:
            session.generate(prompt, **options)
        assert str(error.value) == message


def test_abandoned_generations_leave_the_session_usable(session: Session) -> None:
    expected = greedy(session, text(9), 8)
    session.reset()
    for _ in range(2):
        running = session.generate(text(9), max_tokens=8)
        assert [next(running), next(running)] == expected[:2]
        running.close()
        assert session.finish_reason is None
    for token in session.generate(text(9)):
        if token == expected[3]:
            break
    assert greedy(session, text(9), 8) == expected


@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_an_interrupt_inside_a_run_leaves_the_cache_true(
    session: Session, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Ctrl-C in the first or second chunk, the first or a later step."""
    prompt = text(80)
    expected = greedy(session, prompt, 5)
    session.reset()
    runs = itertools.count()
    run = Step.run

    def interrupted(step: Step) -> None:
        run(step)
        if next(runs) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(session, prompt, 5)
    assert greedy(session, prompt, 5) == expected


@pytest.mark.parametrize("use", ["generate", "generate_created_before", "nll", "reset"])
def test_a_generation_cannot_go_on_after_another_use(session: Session, use: str) -> None:
    other = session.generate(text(6), max_tokens=5)
    first = session.generate(text(5), max_tokens=5)
    next(first)
    if use == "generate":
        next(other := session.generate(text(6), max_tokens=5))
    elif use == "generate_created_before":
        next(other)
    elif use == "nll":
        session.nll(text(4))
    else:
        session.reset()
    with pytest.raises(UsageError, match="the session was used for something else; this generation cannot go on"):
        next(first)
    if use.startswith("generate"):
        assert len(list(other)) == 4


# Sampling


def test_sampling_is_reproducible_by_its_seed(session: Session) -> None:
    def drawn(seed: int) -> list[int]:
        return greedy(session, text(5), 20, sampling=Sampling(temperature=1.5, seed=seed))

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first
    assert drawn(2**32 - 1) == drawn(2**32 - 1)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0, seed=5), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0, min_p=1.0)]
)
def test_sampling_that_leaves_one_token(session: Session, sampling: Sampling) -> None:
    assert greedy(session, text(5), 8, sampling=sampling) == greedy(session, text(5), 8)


def test_draws_follow_the_distribution(session: Session) -> None:
    """300 first tokens: each frequency within 4.5 standard deviations, nothing outside the six likeliest."""
    prompt, draws = text(5), 300
    logits = session.logits(prompt)[-1].astype(np.float64) / 2.0
    kept = np.argsort(logits)[-6:]
    p = np.exp(logits[kept] - logits[kept].max())
    p /= p.sum()
    found = Counter(greedy(session, prompt, 1, sampling=Sampling(2.0, top_k=6, seed=seed))[0] for seed in range(draws))
    assert set(found) <= set(kept.tolist())
    for token, share in zip(kept.tolist(), p, strict=True):
        assert abs(found[token] - draws * share) < 4.5 * (draws * share * (1 - share)) ** 0.5 + 1


# Likelihood, figures


@pytest.mark.parametrize("length", [1, 2, 64, 65, 100])
def test_nll(session: Session, length: int) -> None:
    ids = text(length)
    found = session.nll(ids)
    assert len(found) == length - 1
    for place, row in enumerate(plain_llama.logits(IMAGE, ids)[:-1]):
        total = math.log(np.exp(row - row.max()).sum()) + row.max()
        assert found[place] == pytest.approx(total - row[ids[place + 1]], abs=4e-3)


def test_timings(session: Session) -> None:
    loaded = session.timings["load_s"]
    assert set(session.timings) == {"load_s", "ttft_s", "prefill_tps", "decode_tps"}
    assert loaded > 0 == session.timings["decode_tps"]
    greedy(session, text(20), 5)
    assert all(value > 0 for value in session.timings.values())
    assert session.timings["load_s"] > loaded, "compiling the prefill program counts as loading"
    greedy(session, text(20), 1)
    assert session.timings["decode_tps"] == 0


def test_bench(path: Path) -> None:
    with load(Settings(path, backend="null", ctx=40)) as session:
        calls: list[tuple[str, int, int]] = []
        found = session.bench(40, 12, 3, lambda *call: calls.append(call))
        assert {name: len(rates) for name, rates in found.items()} == {"pp40": 3, "tg12": 3}
        assert all(rate > 0 for rates in found.values() for rate in rates)
        assert calls == [(name, done, 4) for name in ("pp40", "tg12") for done in range(5)]
        rows = Counter(c.tensors["token_ids"].shape[0] for c in session.backend.launches if c.op == "embedding")
        assert rows == {64: 4, 1: 4 + 4 * 12}  # 39 tokens in one chunk, the last in a decode step
        assert set(session.bench(0, 1, 1)) == {"tg1"}
        assert set(session.bench(1, 0, 1)) == {"pp1"}
        with pytest.raises(ModelError, match="prompt length 41 does not fit the context: --ctx is 40"):
            session.bench(41, 1, 1)
        with pytest.raises(ModelError, match="decode length 41 does not fit the context: --ctx is 40"):
            session.bench(1, 41, 1)


# Backends that lack something


def refusing(patch: pytest.MonkeyPatch, *ops: str, only_chunks: bool = False) -> None:
    """Have the reference backend refuse these ops (with `only_chunks`, for more than one row)."""
    supports = ReferenceBackend.supports

    def refuse(self: ReferenceBackend, signature: Signature) -> Kernel | Unsupported:
        rows = next(iter(signature.tensors.values())).shape[0]
        if signature.op in ops and not (only_chunks and rows == 1):
            return Unsupported(signature.op, "left out")
        return supports(self, signature)

    patch.setattr(ReferenceBackend, "supports", refuse)


FUSED = ("rms_norm_gemm", "gemm_add", "rms_norm_gemm_glu", "rope_kv_append")


@pytest.mark.parametrize(
    ("ops", "only_chunks", "counts"),
    [
        ((), False, {"native": 16, "decomposed": 0, "reference": 0}),
        (FUSED, False, {"native": 5, "decomposed": 11, "reference": 0}),
        (("attention", "argmax"), False, {"native": 13, "decomposed": 0, "reference": 3}),
        ((*FUSED, "gemm"), False, {"native": 5, "decomposed": 2, "reference": 9}),
        ((*FUSED, "gemm", "embedding"), True, {"native": 16, "decomposed": 0, "reference": 0}),
    ],
    ids=["all_native", "no_fused", "no_attention", "no_gemm", "no_gemm_in_chunks"],
)
def test_what_a_backend_lacks_costs_speed_only(
    session: Session,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ops: tuple[str, ...],
    only_chunks: bool,
    counts: dict[str, int],
) -> None:
    """With `no_gemm_in_chunks` the host needs weights only after the decode step has packed them for the device."""
    expected = greedy(session, text(30), 6)
    refusing(monkeypatch, *ops, only_chunks=only_chunks)
    with load(Settings(path, backend="reference", precision="exact", fallback="allow")) as other:
        assert other.plan.counts() == counts
        assert greedy(other, text(30), 6) == expected
        np.testing.assert_allclose(other.logits(text(30)), session.logits(text(30)), rtol=0, atol=1e-4)


def test_fallback_error_refuses_before_the_first_token(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(path, backend="reference", fallback="error")
    with monkeypatch.context() as patch:
        refusing(patch, "attention")
        with pytest.raises(UnsupportedOp, match=r"^reference refuses 2 of 16 calls of decode.argmax .*left out"):
            load(settings)
    with monkeypatch.context() as patch:
        refusing(patch, "attention", only_chunks=True)
        with load(settings) as session, pytest.raises(UnsupportedOp, match=r"calls of prefill8.none .*left out"):
            next(session.generate(text(5)))


def test_everything_runs_on_null(path: Path) -> None:
    with load(Settings(path, backend="null")) as session:
        assert session.plan.counts() == {"native": 16, "decomposed": 0, "reference": 0}
        assert greedy(session, text(5), 3) == [0, 0, 0]
        assert greedy(session, text(5), 3, sampling=Sampling(1.0)) == [0, 0, 0]
        assert session.nll(text(4)) == pytest.approx([math.log(VOCAB)] * 3)
        assert sum(row["share"] for row in session.plan.rows()) == pytest.approx(1)


# The default model


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device", "precision"), targets())
def test_golden(backend: str, device: str | None, precision: Any, default_model: Path, golden: dict[str, Any]) -> None:
    with load(Settings(default_model, backend=backend, device=device, ctx=1024, precision=precision)) as session:
        check_greedy(session, golden)
        check_nll(session, golden)
        if backend not in ("reference", "opencl-tvm"):  # where a step takes long, and is the same computation
            check_nll(session, golden, by_step=True)
