"""Other ways to run the same model file, interleaved with ours in one run.

    python bench/peers/run.py                                  the default model, all sides that are installed
    python bench/peers/run.py --model random:smollm2-1.7b --tests pp512,tg64 --sides opencl,llama.cpp
    python bench/peers/run.py --tests pp512,tg128,tg32@d4096 --python /path/to/peers/bin/python

A side is a backend of ours (tvm, opencl), or llama.cpp, openvino, torch-bf16, torch-f32; `:FORMAT` behind it gives it
the file requantised (llama.cpp:Q4_0, its fastest), and `@LABEL` before that tells builds of one peer apart (--sides
llama.cpp,llama.cpp@gcc --python llama.cpp@gcc=/other/bin/python). A test is ppN, a prompt of N random ids into an empty
cache; tgN, N decode steps from an empty cache; or tgN@dM, the same behind M ids.

Before anything is timed, each side continues three texts, and our `exact` kernels say for the same file how much less
likely its tokens are than the likeliest. Then rounds go through tests and sides, in an order that turns from round to
round; each side is a process of its own, stopped while another computes; the first round warms up. Between them memory
is read, for the bandwidth that decoding could have had.

Peers are optional; they may live in another environment (--python):

    python3 -m venv peers && CC=clang CXX=clang++ CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install '.[peers]'

llama-cpp-python is compiled then. On CPUs with AMX do not use GCC before 13.3 for it: the result crashes in the first
prompt, because that compiler drops the stores to the tile configuration (llama.cpp pull request 26954); without clang,
CXXFLAGS='-fno-dse -fno-tree-dse' helps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from child import Child, SideFailed
from polykern.kernels.errors import ModelError, PolykernError, UsageError
from polykern.runtime.bandwidth import ReadProbe, usable_processors
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.machine import provenance
from polykern.runtime.models import DEFAULT_MODEL, resolve
from polykern.runtime.progress import ProgressBars
from table import show

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
INSTALL = "pip install '.[peers]' there, or name another environment with --python (see --help)"
TEXTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):\n")
CONTINUED = 16
# Nats. Sound sides were below 0.01 (bench/results/peers-*.json). One that computes something else chooses tokens that
# are less likely by several; with random weights too: the largest of 49152 normal logits is 4.2 deviations up.
REGRET = 0.1


@dataclass(frozen=True)
class Peer:
    """Somebody else's system: the file beside this one that drives it, and its options."""

    module: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)


PEERS = {
    "llama.cpp": Peer("llamacpp", "llama-cpp-python"),
    "openvino": Peer("genai", "openvino-genai"),
    "torch-bf16": Peer("hftorch", "torch and transformers", {"dtype": "bfloat16"}),
    "torch-f32": Peer("hftorch", "torch and transformers", {"dtype": "float32"}),
}
DEFAULT_SIDES = "tvm,opencl,llama.cpp,llama.cpp:Q4_0,openvino:Q4_0,torch-bf16"


@dataclass(frozen=True)
class Test:
    """kind "pp" or "tg", tokens that count, depth: tokens in the cache before them."""

    name: str
    kind: str
    tokens: int
    depth: int = 0

    @classmethod
    def parse(cls, text: str) -> Test:
        found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?:@d([1-9]\d*))?", text)
        if not found or (found[1] == "pp" and found[3]):
            raise UsageError(f"no test {text!r}: expected pp512, tg128 or tg32@d4096")
        return cls(text, found[1], int(found[2]), int(found[3] or 0))

    def ids(self, vocab: int, seed: tuple[int, ...]) -> list[int]:
        length = self.tokens if self.kind == "pp" else max(1, self.depth)
        return np.random.default_rng(seed).integers(0, vocab, length).tolist()

    def run(self, child: Child, ids: list[int]) -> float:
        """Tokens per second."""
        if self.kind == "pp":
            return self.tokens / child.ask("prompt", ids=ids)
        return self.tokens / child.ask("decode", ids=ids, count=self.tokens)


@dataclass
class Side:
    """One column of the comparison while it is measured."""

    name: str
    path: Path
    child: Child
    regret: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def peer(self) -> bool:
        return kind_of(self.name) in PEERS


def model_file(model: str) -> Path:
    """A GGUF file, a name that `runtime -m` knows, or random:SHAPE[:FORMAT]."""
    if not model.startswith("random:"):
        return resolve(model)
    shape, _, fmt = model.removeprefix("random:").partition(":")
    return make("random", shape, "--format", fmt or "Q4_0")


def make(*arguments: str) -> Path:
    """What bench/generate_model.py makes; its bars and its errors go to stderr as they are."""
    command = [sys.executable, str(ROOT / "bench" / "generate_model.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ModelError(f"generate_model.py {' '.join(arguments)}: exit status {done.returncode}")
    return Path(done.stdout.strip())


def pythons(given: Sequence[str]) -> dict[str, str]:
    """--python [SIDE=]PATH: side -> interpreter; "" is for every other peer."""
    found: dict[str, str] = {}
    for text in given:
        side, separator, path = text.partition("=")
        found[side if separator else ""] = path if separator else text
    return found


def start(name: str, path: Path, threads: int, ctx: int, interpreters: Mapping[str, str]) -> Child:
    """Load `path` on the side called `name`. Raises SideFailed with what to do about it."""
    kind, build = kind_of(name), name.partition(":")[0]
    options = {"model": str(path), "threads": threads, "ctx": ctx}
    if kind not in PEERS:
        return Child("ours", {**options, "backend": kind}, sys.executable)
    peer = PEERS[kind]
    python = next((interpreters[key] for key in (build, kind, "") if key in interpreters), sys.executable)
    try:
        return Child(peer.module, {**options, **peer.options}, python)
    except SideFailed as error:
        if error.missing:
            raise SideFailed(f"{peer.package} is not installed in {python}: {INSTALL}") from error
        raise


def check(side: Side, judge: Child) -> None:
    """Fill in `side.regret`. Raises SideFailed where the side does not compute this model."""
    found: list[float] = []
    for ids in judge.ask("tokenize", texts=TEXTS):
        chosen = side.child.ask("greedy", ids=ids, count=CONTINUED)
        found += judge.ask("regrets", ids=ids, chosen=chosen)
    side.regret = fmean(found)
    if not side.regret <= REGRET:
        raise SideFailed(
            f"its tokens are {side.regret:.2f} nats less likely than the best (allowed: {REGRET}); not timed"
        )


@contextmanager
def sides(
    names: Sequence[str], model: Path, args: argparse.Namespace, ctx: int, left_out: dict[str, str]
) -> Iterator[list[Side]]:
    """The sides that could be opened and that compute the model; the reasons of the others go into `left_out`."""
    interpreters = pythons(args.python)
    files = {fmt: make("requantise", str(model), "--format", fmt) if fmt else model for fmt in map(suffix, names)}
    with ExitStack() as stack:
        found: list[Side] = []
        for fmt, path in files.items():
            judging = {"threads": args.threads, "ctx": 512, "backend": args.judge, "precision": "exact"}
            try:
                judge = Child("ours", {"model": str(path), **judging}, sys.executable)
            except SideFailed as error:
                raise SideFailed(f"{args.judge} cannot judge: {error}; name another backend with --judge") from error
            try:
                for name in (n for n in names if suffix(n) == fmt):
                    try:
                        side = Side(name, path, start(name, path, args.threads, ctx, interpreters))
                        stack.callback(side.child.close)
                        check(side, judge)
                        found.append(side)
                    except SideFailed as error:
                        leave_out(left_out, name, error)
            finally:
                judge.close()
        yield sorted(found, key=lambda side: names.index(side.name))


def suffix(name: str) -> str:
    return name.partition(":")[2]


def kind_of(name: str) -> str:
    """KIND[@LABEL][:FORMAT] -> KIND."""
    return re.split("[@:]", name, maxsplit=1)[0]


def measure(
    found: list[Side],
    tests: Sequence[Test],
    vocab: int,
    repetitions: int,
    threads: int,
    left_out: dict[str, str],
    bars: ProgressBars,
) -> dict[str, Any]:
    """Fill in the rates of each side: a first round that does not count, then `repetitions`. What else was seen.

    A side that fails on the way leaves `found` for `left_out`.
    """
    probe = ReadProbe(threads)
    probe.sweep()
    probe.all.clear()
    started, busy, ours = time.perf_counter(), busy_seconds(), cpu_seconds(found)
    done, total = 0, (repetitions + 1) * len(tests)
    for number in range(repetitions + 1):
        for test in tests:
            bars("compare", done, total)
            done += 1
            probe.sweep()
            ids = test.ids(vocab, (number, test.tokens, test.depth))
            turn = number % len(found)
            for side in found[turn:] + found[:turn]:
                try:
                    rate = test.run(side.child, ids)
                except SideFailed as error:
                    leave_out(left_out, side.name, error)
                    found.remove(side)
                    continue
                if number:
                    side.rates.setdefault(test.name, []).append(rate)
            if not found:
                raise UsageError(f"no side is left: {'; '.join(left_out.values())}")
    bars("compare", total, total)
    probe.close()
    available = (time.perf_counter() - started) * (os.cpu_count() or 1)
    others = None if busy is None else max(0.0, (busy_seconds() or 0) - busy - (cpu_seconds(found) - ours)) / available
    return {
        "read_gb_per_s": probe.gb_per_s,
        "read_gb_per_s_all": probe.all,
        "others_cpu_share": others,  # should be near 0
    }


def leave_out(left_out: dict[str, str], name: str, error: SideFailed) -> None:
    left_out[name] = str(error)
    ProgressBars.clear()
    print(f"{name}: left out: {error}", file=sys.stderr)


def busy_seconds() -> float | None:
    """Processor time that everything on this machine has used."""
    try:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(found: Sequence[Side]) -> float:
    return sum(os.times()[:4]) + sum(side.child.cpu_seconds() for side in found)


def streamed_bytes(path: Path, test: Test, bytes_per_weight: float | None) -> int:
    """Bytes that one decode step has to read: the weights as the side holds them, and keys and values (float16)."""
    file = GGUFFile.open(path)
    config = ModelConfig.from_gguf(file)
    looked_up = {"token_embd.weight"} - {config.head}
    read = [tensor for name, tensor in file.tensors.items() if name in config.tensors and name not in looked_up]
    weights = sum(tensor.size * bytes_per_weight if bytes_per_weight else tensor.nbytes for tensor in read)
    kv = sum(2 * layer.kv_heads * config.head_dim * 2 for layer in config.layers)
    return int(weights + kv * (test.depth + test.tokens / 2))


def result(side: Side, test: Test, read_gb_per_s: float) -> dict[str, Any]:
    rates = side.rates[test.name]
    row: dict[str, Any] = {"test": test.name, "tps_median": median(rates), "tps_all": rates}
    if test.kind == "tg":
        streamed = streamed_bytes(side.path, test, side.child.about.get("weight_bytes"))
        gb_per_s = streamed * row["tps_median"] / 1e9
        row |= {"bytes_per_token": streamed, "gb_per_s": gb_per_s, "roofline_fraction": gb_per_s / read_gb_per_s}
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "-m", default=DEFAULT_MODEL, help="file, name, or random:SHAPE[:FORMAT]")
    parser.add_argument("--tests", default="pp512,tg128", help="(default: %(default)s)")
    parser.add_argument("--sides", default=DEFAULT_SIDES, help="(default: %(default)s)")
    parser.add_argument("--repetitions", "-r", type=int, default=5, metavar="R", help="rounds (default: %(default)s)")
    parser.add_argument("--threads", "-t", type=int, default=usable_processors(), help="(default: %(default)s)")
    parser.add_argument("--python", action="append", default=[], metavar="[SIDE=]PATH", help="interpreter of the peers")
    parser.add_argument("--judge", default="opencl", metavar="BACKEND", help="checks the others (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="where the JSON document goes")
    args = parser.parse_args(argv)
    try:
        document = compare(args)
    except (PolykernError, SideFailed) as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        return 130
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document) + "\n")
    show(document)
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison, as the document that is kept."""
    tests, names = [Test.parse(text) for text in args.tests.split(",")], args.sides.split(",")
    if min(args.repetitions, args.threads) < 1:
        raise UsageError("--repetitions and --threads must be at least 1")
    model = model_file(args.model)
    config = ModelConfig.from_gguf(GGUFFile.open(model))
    # One more: the step that ends a prompt keeps its token too. 64 hold a text of the check and what follows it.
    ctx = max(64, *(test.tokens + test.depth + 1 for test in tests))
    if ctx > config.context_length:
        raise ModelError(f"{model}: the tests need a context of {ctx}, the model's maximum is {config.context_length}")
    left_out: dict[str, str] = {}
    with ProgressBars() as bars, sides(names, model, args, ctx, left_out) as found:
        if not found:
            raise UsageError(f"none of the sides {', '.join(names)} can be timed")
        seen = measure(found, tests, config.vocab_size, args.repetitions, args.threads, left_out, bars)
        return {
            "kind": "peers",
            "model": {"name": args.model, "file": model.name, "file_bytes": model.stat().st_size},
            "threads": args.threads,
            "tests": [test.name for test in tests],
            "sides": [
                {
                    "name": side.name,
                    "peer": side.peer,
                    "file": side.path.name,
                    "file_bytes": side.path.stat().st_size,
                    "regret": side.regret,
                    **side.child.about,
                    "results": [result(side, test, seen["read_gb_per_s"]) for test in tests],
                }
                for side in found
            ],
            "left_out": left_out,
            **seen,
            **provenance(),
        }


if __name__ == "__main__":
    sys.exit(main())
