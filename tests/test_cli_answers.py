"""What the commands answer, on a tiny model: JSON documents field by field, and text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from polykern.runtime.cli import main
from polykern.runtime.session import Session
from polykern.runtime.tokenizer import Tokenizer
from tiny_llama import valid_llama_gguf

RUNTIME = (sys.executable, "-m", "polykern.runtime")
ON_REFERENCE = ("--backend", "reference", "-m")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """stdout of a command line that must succeed and say nothing on stderr."""
    status = main(arguments)
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    text = answer(capsys, *arguments, "--json")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text)


def test_run_json(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = document(capsys, *ON_REFERENCE, model, "--raw", "-n", "5", "in the world")
    assert list(found) == ["backend", "device", "model", "prompt_ids", "token_ids", "text", "timings", "plan"]
    assert (found["backend"], found["device"], found["model"]) == ("reference", "host", model)
    assert found["prompt_ids"] == document(capsys, "tokenize", "-m", model, "in the world")["ids"]
    assert 1 <= len(found["token_ids"]) <= 5
    assert list(found["timings"]) == ["load_s", "ttft_s", "prefill_tps", "decode_tps"]
    assert all(value >= 0 for value in found["timings"].values())
    assert list(found["plan"]) == ["native", "decomposed", "reference"]
    assert sum(found["plan"].values()) > 0


def test_run_streams_the_same_text(capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = ("run", *ON_REFERENCE, model, "--raw", "-n", "5", "in the world")
    assert answer(capsys, *command) == document(capsys, *command)["text"] + "\n"


def test_run_wraps_the_prompt_in_the_chat_template(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = document(capsys, *ON_REFERENCE, model, "-n", "1", "hello")
    wrapped = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert found["prompt_ids"] == document(capsys, "tokenize", "-m", model, wrapped)["ids"]


def test_sampling_repeats_with_its_seed(capsys: pytest.CaptureFixture[str], model: str) -> None:
    def ids(seed: str) -> list[int]:
        options = ("--raw", "-n", "12", "--temp", "2", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01")
        return document(capsys, *ON_REFERENCE, model, *options, "--seed", seed, "hello")["token_ids"]

    assert ids("1") == ids("1")
    assert ids("1") != ids("2")


def test_ignore_eos_goes_on_to_the_limit(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model never ends by itself, so what it says first is declared an end."""
    command = (*ON_REFERENCE, model, "--raw", "-n", "7", "in the world")
    first = document(capsys, *command)["token_ids"][0]
    ends = property(lambda self: frozenset({2, first}), lambda self, ids: None)
    monkeypatch.setattr(Tokenizer, "eos_ids", ends, raising=False)
    for greedy in ((), ("--temp", "0.1")):
        assert document(capsys, *command, *greedy)["token_ids"] == []
        found = document(capsys, *command, *greedy, "--ignore-eos")["token_ids"]
        assert len(found) == 7
        assert not {2, first} & set(found)


def test_prompt_from_stdin_loses_its_last_newline(model: str) -> None:
    command = [*RUNTIME, *ON_REFERENCE, model, "--raw", "-n", "1", "--json", "-"]
    done = subprocess.run(command, input=b"hello\n\n", capture_output=True, check=True, cwd="/")
    expected = subprocess.run([*RUNTIME, "tokenize", "-m", model, "hello\n"], capture_output=True, check=True, cwd="/")
    assert json.loads(done.stdout)["prompt_ids"] == list(map(int, expected.stdout.split()))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (b"", "stdin is empty"),
        (b"\n", "stdin is empty"),
        (b"ab\xff", "stdin is not valid UTF-8: byte 0xff at offset 2"),
        (b"x" * (8 << 20) + b"x", "stdin holds more than 8 MiB of text"),
    ],
)
def test_stdin_that_is_no_prompt(model: str, given: bytes, text: str) -> None:
    done = subprocess.run([*RUNTIME, "-m", model, "-"], input=given, capture_output=True, check=False, cwd="/")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"runtime: error: {text}\n"


def test_limits_of_the_context(capsys: pytest.CaptureFixture[str], model: str) -> None:
    """The tiny model was made for 256 tokens; one character of "é" takes two."""

    def run(prompt: str, *options: str) -> tuple[int, str]:
        status = main([*ON_REFERENCE, model, "--raw", *options, prompt])
        return status, capsys.readouterr().err.removesuffix("\n")

    assert run("é", "--ctx", "8", "-n", "7") == (0, "")
    assert run("é", "--ctx", "8", "-n", "8") == (
        1,
        "runtime: error: -n 8: 2 tokens of prompt and 8 more need a context of 9, this one holds 8: pass --ctx 9",
    )
    assert run("é", "-n", "300") == (
        1,
        "runtime: error: -n 300: 2 tokens of prompt and 300 more need a context of 301, this one holds 256:"
        " the model was made for 256 at most",
    )
    status, line = run("é" * 128, "-n", "1")
    assert (status, line) == (0, "")
    for options in ((), ("-n", "5")):
        status, line = run("é" * 129, *options)
        assert status == 1
        assert line.startswith("runtime: error: ")
        assert "258" in line
        assert "256" in line
    status, line = run("é", "--ctx", "257")
    assert status == 1
    assert "--ctx is 257, the model's maximum is 256 tokens" in line


def test_bench_json(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = document(capsys, "bench", *ON_REFERENCE, model, "-p", "9", "-n", "4", "-r", "3", "--threads", "1")
    prompt, decode = found["results"]
    fields = ["test", "tps_median", "tps_all", "bytes_per_token", "gb_per_s", "read_gb_per_s", "roofline_fraction"]
    assert list(prompt) == list(decode) == fields
    assert (prompt["test"], decode["test"]) == ("pp9", "tg4")
    assert len(prompt["tps_all"]) == len(decode["tps_all"]) == 3
    assert sorted(decode["tps_all"])[1] == decode["tps_median"]
    # Q8_0, 34 bytes for 32 numbers: per layer Q, K, V, output and three of the feed-forward; the head
    numbers = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128) + 320 * 64
    assert decode["bytes_per_token"] == numbers * 34 // 32
    assert math.isclose(decode["gb_per_s"], decode["bytes_per_token"] * decode["tps_median"] / 1e9)
    assert math.isclose(decode["roofline_fraction"], decode["gb_per_s"] / decode["read_gb_per_s"])
    assert prompt["bytes_per_token"] is prompt["gb_per_s"] is prompt["roofline_fraction"] is None
    for field in ("host", "device", "versions", "commit", "model", "backend"):
        assert field in found


def test_bench_leaves_out_a_test_of_0_tokens(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = document(capsys, "bench", *ON_REFERENCE, model, "-p", "0", "-n", "2", "-r", "1")
    assert [result["test"] for result in found["results"]] == ["tg2"]


def test_perplexity_of_text_and_of_ids(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("in the world and in the other one")
    found = document(capsys, "perplexity", *ON_REFERENCE, model, "-f", str(text))
    assert list(found) == ["nll", "mean_nll", "perplexity"]
    ids = document(capsys, "tokenize", "-m", model, text.read_text())["ids"]
    assert len(found["nll"]) == len(ids) - 1
    assert math.isclose(found["mean_nll"], sum(found["nll"]) / len(found["nll"]))
    assert math.isclose(found["perplexity"], math.exp(found["mean_nll"]))
    for value in (ids, {"ids": ids}, {"text_nll": {"ids": ids, "nll": []}}):
        file = tmp_path / "ids.json"
        file.write_text(json.dumps(value))
        assert document(capsys, "perplexity", *ON_REFERENCE, model, "--ids", str(file)) == found


def test_perplexity_by_step(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    """The same numbers token by token, here to the rounding of NumPy's sums."""
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(list(range(5, 128))))
    command = ("perplexity", *ON_REFERENCE, model, "--ids", str(file))
    chunks, steps = document(capsys, *command), document(capsys, *command, "--by-step")
    assert list(steps) == ["nll", "mean_nll", "perplexity"]
    assert len(steps["nll"]) == 122
    assert steps["nll"] == pytest.approx(chunks["nll"], abs=1e-3)
    # two windows, each from an empty cache
    short = document(capsys, *command, "--by-step", "--ctx", "100")
    assert len(short["nll"]) == 99 + 22
    assert short["nll"][:99] == pytest.approx(steps["nll"][:99], abs=1e-3)


def test_perplexity_goes_through_the_step(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    plain = Session.nll

    def spy(self: Session, ids: list[int], *, by_step: bool = False, **other: Any) -> list[float]:
        asked.append(by_step)
        return plain(self, ids, by_step=by_step, **other)

    monkeypatch.setattr(Session, "nll", spy)
    file = tmp_path / "ids.json"
    file.write_text("[5, 6]")
    assert answer(capsys, "perplexity", *ON_REFERENCE, model, "--ids", str(file)).startswith("1 token predicted,")
    answer(capsys, "perplexity", *ON_REFERENCE, model, "--ids", str(file), "--by-step")
    assert asked == [False, True]


def test_a_context_of_1_predicts_nothing(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[5, 6, 7]")
    command = ("perplexity", *ON_REFERENCE, model, "--ids", str(file), "--ctx")
    assert len(document(capsys, *command, "2")["nll"]) == 1
    assert main([*command, "1"]) == 1
    line = "runtime: error: --ctx is 1; at least 2 tokens are needed to predict one from the other\n"
    assert capsys.readouterr().err == line


def test_perplexity_cuts_a_long_text_into_contexts(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([5, 6, 7] * 3))
    found = document(capsys, "perplexity", *ON_REFERENCE, model, "--ids", str(file), "--ctx", "4")
    assert len(found["nll"]) == 3 + 3  # of 4 + 4 + 1 tokens; the last has nothing to be predicted from


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"nonsense", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100000, "is not JSON: "),
        (b'{"text": "a"}', "expected a JSON list of token ids"),
        (b"[1, true]", "expected a JSON list of token ids"),
        (b"[1, -1]", "expected a JSON list of token ids"),
        (b"[1]", "1 token; at least 2 are needed to predict one"),
        (b"[1, 320]", "320"),
    ],
)
def test_ids_that_are_none(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, content: bytes, problem: str
) -> None:
    file = tmp_path / "ids.json"
    file.write_bytes(content)
    assert main(["perplexity", *ON_REFERENCE, model, "--ids", str(file)]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert problem in line


def test_tokenize(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = document(capsys, "tokenize", "-m", model, "the <|im_end|>")
    assert list(found) == ["ids"]
    assert found["ids"][-1] == 2
    assert answer(capsys, "tokenize", "-m", model, "the <|im_end|>").split() == list(map(str, found["ids"]))
    pieces = answer(capsys, "tokenize", "-m", model, "--pieces", "the <|im_end|>").splitlines()
    assert pieces[0].split() == ["id", "token"]
    assert pieces[-1].split() == ["2", "'<|im_end|>'"]


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    found = {backend["name"]: backend for backend in document(capsys, "backends")}
    assert {"reference", "null", "opencl"} <= found.keys()
    for backend in found.values():
        assert list(backend) == ["name", "available", "reason", "distribution", "devices", "versions"]
        assert backend["available"] == bool(backend["devices"]) == (backend["reason"] is None)
    assert found["reference"]["available"]


def test_plan(capsys: pytest.CaptureFixture[str], model: str) -> None:
    rows = document(capsys, "plan", *ON_REFERENCE, model)
    assert {"label", "op", "how", "kernel", "reason", "bytes", "share", "signature"} <= rows[0].keys()
    assert math.isclose(sum(row["share"] for row in rows), 1)
    whole = answer(capsys, "plan", *ON_REFERENCE, model, "--all").splitlines()
    assert len(whole) == len(rows) + 2
    brief = answer(capsys, "plan", *ON_REFERENCE, model).splitlines()
    assert sum(int(line.split()[0]) for line in brief[2:]) == len(rows)


def test_inspect(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    found = document(capsys, "inspect", model)
    assert found["runnable"] is True
    assert (found["version"], len(found["tensors"])) == (3, 20)
    by_name = {key["name"]: key for key in found["keys"]}
    assert by_name["llama.block_count"]["value"] == 2
    assert by_name["llama.block_count"]["status"] == "used"
    assert by_name["tokenizer.ggml.tokens"]["value"]["length"] == 320
    assert set(found["ignored"]) == {name for name, key in by_name.items() if key["status"] == "ignored"}
    text = answer(capsys, "inspect", model)
    for name in (*by_name, *(tensor["name"] for tensor in found["tensors"])):
        assert name in text
    other = tmp_path / "other.gguf"
    other.write_bytes(valid_llama_gguf(architecture="mamba"))
    found = document(capsys, "inspect", str(other))
    assert found["runnable"] is False
    assert found["problem"].startswith("architecture 'mamba' is not supported")


def test_inspect_takes_a_name_as_other_commands_do(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polykern.runtime.models.resolve", lambda name, progress: {"tiny": model}[name])
    assert document(capsys, "inspect", "tiny")["path"] == model


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("POLYKERN_SECRET_OF_THIS_TEST", "seen")
    found = document(capsys, "doctor")
    machine = ["python", "platform", "cpu", "memory_bytes", "packages", "environment"]
    assert list(found) == [*machine, "opencl_icds", "backends", "cache", "choices", "advice"]
    assert found["environment"]["POLYKERN_SECRET_OF_THIS_TEST"] == "seen"
    assert found["cache"]["path"] == str(tmp_path)
    assert any("runtime pull" in line for line in found["advice"])
    assert "what to do:" in answer(capsys, "doctor")


def test_doctor_survives_a_broken_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("gone")

    for part in ("cpu", "packages", "cache", "opencl_icds", "memory_bytes", "python"):
        monkeypatch.setattr(f"polykern.runtime.doctor.{part}", broken)
    found = document(capsys, "doctor")
    assert found["cpu"] == found["cache"] == {"error": "OSError: gone"}
    assert "what to do:" in answer(capsys, "doctor")


def test_conformance(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "conformance", "--backend", "reference", "--op", "add")
    assert list(found["summary"]) == ["passed", "failed", "unsupported", "mutants", "killed"]
    assert found["summary"]["passed"] == len(found["cases"]) > 0
    assert found["summary"]["killed"] == found["summary"]["mutants"] == len(found["mutants"]) > 0
    assert {"op", "case", "status", "ratio", "kernel", "reason"} <= found["cases"][0].keys()
    text = answer(capsys, "conformance", "--backend", "reference", "--op", "add")
    assert text.splitlines()[-1].endswith("mutants killed: conforms")


def test_conformance_of_a_backend_that_computes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--backend", "null", "--op", "add", "--profile", "small"]) == 1
    text = capsys.readouterr().out
    assert "failed: add " in text
    assert text.splitlines()[-1].endswith("does not conform")


def test_what_libraries_print_stays_off_stdout(model: str) -> None:
    """A driver that writes to file descriptor 1 from C must not get between the answer's lines."""
    code = (
        "import os, sys\nfrom polykern.runtime import cli\nfrom polykern.runtime.commands import tokenize\n"
        "plain = tokenize.run\n"
        "def noisy(args, out):\n"
        "    os.write(1, b'driver banner\\n'); print('python banner')\n    return plain(args, out)\n"
        "cli.COMMANDS['tokenize'].run = noisy\n"
        f"sys.exit(cli.main(['tokenize', '--json', '-m', {model!r}, 'hi']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert list(json.loads(done.stdout)) == ["ids"]
    assert done.stderr == "driver banner\npython banner\n"
