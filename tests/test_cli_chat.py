"""Conversations and interrupts: `runtime` with a terminal in front of it, on a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from gguf_image import Image, Key
from polykern.runtime.chat import ChatTemplate, Conversation
from polykern.runtime.cli import main
from polykern.runtime.commands.generate import take_turn
from polykern.runtime.load import load
from polykern.runtime.output import Output
from polykern.runtime.settings import Settings
from tiny_llama import llama_image
from vocabularies import sentencepiece

RUNTIME = (sys.executable, "-m", "polykern.runtime")
ON_REFERENCE = ("--backend", "reference", "-m")


class Terminal:
    """`runtime` with a terminal as stdin: type lines, read what it says."""

    def __init__(self, *arguments: str) -> None:
        self.controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*RUNTIME, *arguments],
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"},
        )
        os.close(terminal)
        self.said = ""

    def type(self, line: str | bytes) -> None:
        os.write(self.controller, line.encode() if isinstance(line, str) else line)

    def until(self, text: str, count: int = 1, seconds: float = 60) -> None:
        """Read on until `text` was said `count` times."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while self.said.count(text) < count:
            assert time.monotonic() < end, self.said
            if select.select([self.process.stdout], [], [], 1)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, self.said
                self.said += data.decode()

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.controller)


def test_chat(model: str) -> None:
    terminal = Terminal(*ON_REFERENCE, model, "-n", "3")
    terminal.until("> ")
    for turn, line in enumerate(("/help", "hello", "and you", "/what", "/reset", "/system be brief", "hello"), start=2):
        terminal.type(line + "\n")
        terminal.until("> ", turn)
    terminal.type("x" * 300 + "\n")
    terminal.until("tokens, the context 256: /reset, or use --ctx")
    terminal.type("/exit\n")
    assert terminal.close() == 0
    assert "/reset" in terminal.said
    assert "unknown command /what" in terminal.said
    assert "Traceback" not in terminal.said


def picky_model(path: Path) -> str:
    """Its template refuses the question "no"."""
    image = llama_image()
    (key,) = [key for key in image.keys if key.name == "tokenizer.chat_template"]
    refusal = "{% if messages[-1].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    key.content = refusal + key.content
    path.write_bytes(image.encode())
    return str(path)


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(tmp_path: Path) -> None:
    terminal = Terminal(*ON_REFERENCE, picky_model(tmp_path / "picky.gguf"), "-n", "3")
    terminal.until("> ")
    terminal.type("no\n")
    terminal.until("chat template: refused the conversation: not that; use --raw to do without it")
    terminal.until("> ", 2)
    terminal.type(b"caf\xff\n")
    terminal.until("that was not valid UTF-8; once more:")
    terminal.type("hello\n")
    terminal.until("> ", 4)
    terminal.type("/exit\n")
    assert terminal.close() == 0
    assert terminal.said.count("refused") == 1  # the question was taken back


def turn_options(**other: Any) -> Namespace:
    known = {"max_tokens": 3, "temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "ignore_eos": False}
    return Namespace(**{**known, **other})


def sentencepiece_model(path: Path) -> str:
    pieces = ["▁the", "▁", "the", "us", "er", "user", "▁user", *(f"~{n}" for n in range(53))]
    keys = sentencepiece(pieces, bos_token_id=1, eos_token_id=2, add_bos_token=True)
    kinds = {"tokens": "array[str]", "token_type": "array[i32]", "scores": "array[f32]", "model": "str"}
    image = llama_image(vocab=len(keys["tokenizer.ggml.tokens"]))
    kept = [key for key in image.keys if not str(key.name).startswith("tokenizer.")]
    for name, content in keys.items():
        kind = kinds.get(name.removeprefix("tokenizer.ggml."), "bool" if isinstance(content, bool) else "u32")
        kept.append(Key(name, kind, content if isinstance(content, str | bool | int) else list(content)))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    path.write_bytes(Image([*kept, Key("tokenizer.chat_template", "str", template)], image.tensors).encode())
    return str(path)


def test_a_second_turn_goes_on_from_the_first(tmp_path: Path) -> None:
    """SentencePiece vocabularies put a space, and Llama models a first token, before a text that begins: only once."""
    out = Output(io.StringIO())
    with load(Settings(sentencepiece_model(tmp_path / "sp.gguf"), backend="reference")) as session:
        template = ChatTemplate.from_metadata(session.metadata, session.tokenizer, "sp.gguf")
        conversation = Conversation(template)
        first = take_turn("the user", conversation, [], session, turn_options(), out)
        assert first[0] == 1
        second = take_turn("the", conversation, first, session, turn_options(), out)
        assert second[: len(first)] == first
        added = second[len(first) :]
        assert 1 not in added
        text = session.tokenizer.decode(added, continuation=True)
        assert text.startswith("\nuser: the\nassistant: ")


def test_a_long_question_is_taken_back(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(io.StringIO())
    with load(Settings(model, backend="reference")) as session:
        conversation = Conversation(ChatTemplate.from_metadata(session.metadata, session.tokenizer, "m.gguf"))
        ids = take_turn("hello", conversation, [], session, turn_options(), out)
        before = list(conversation.messages)
        assert take_turn("x" * 300, conversation, ids, session, turn_options(), out) == []
        assert conversation.messages == before
        assert capsys.readouterr().err.endswith("tokens, the context 256: /reset, or use --ctx\n")
        again = take_turn("and you", conversation, [], session, turn_options(), out)
        assert again[: len(ids)] == ids
        assert len(conversation.messages) == 4


def test_a_dumb_terminal_gets_no_bars(model: str) -> None:
    """Bars that cannot be erased would leave blank lines before the answer."""
    controller, stderr = pty.openpty()
    command = [*RUNTIME, *ON_REFERENCE, model, "--raw", "-n", "3", "in the world"]
    environment = {**os.environ, "TERM": "dumb"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, check=True, cwd="/", env=environment)
    os.close(stderr)
    said = b""
    with contextlib.suppress(OSError):  # EIO: how a pseudo-terminal ends
        while data := os.read(controller, 65536):
            said += data
    os.close(controller)
    assert done.stdout.endswith(b"\n")
    (line,) = said.decode().splitlines()
    assert line.startswith("[reference, host; ")


def test_chat_ends_with_its_input(model: str) -> None:
    terminal = Terminal(*ON_REFERENCE, model)
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_interrupt_at_the_prompt_of_a_chat(model: str) -> None:
    terminal = Terminal(*ON_REFERENCE, model)
    terminal.until("> ")
    for _ in range(10):  # again and again: Python may miss one between writing the prompt and waiting for the line
        terminal.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(5)
            break
    assert terminal.close() == 130
    assert "Traceback" not in terminal.said


def test_chat_has_no_json(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main([*ON_REFERENCE, model, "--json"]) == 2
    assert capsys.readouterr().err == "runtime: error: --json needs a PROMPT\n"
    assert main([*ON_REFERENCE, model, "--raw"]) == 2
    assert capsys.readouterr().err == "runtime: error: --raw needs a PROMPT\n"


# A reply that takes its time: each token of the tiny model is held back, and announced on stderr.
SLOW = """
import sys, time
from polykern.runtime import cli, session
plain = session.Session.generate
def slow(self, *args, **kwargs):
    for token in plain(self, *args, **kwargs):
        yield token
        print("token", file=sys.stderr, flush=True)
        time.sleep(0.5)
session.Session.generate = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_interrupt_while_modules_are_imported() -> None:
    code = (
        "import sys\nfrom polykern.runtime.__main__ import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'polykern.runtime.commands': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_interrupt_keeps_what_was_said(capsys: pytest.CaptureFixture[str], model: str, json_flag: tuple[str]) -> None:
    command = [*ON_REFERENCE, model, "--raw", "-n", "200", "in the world"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command, *json_flag], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    )
    assert process.stderr is not None
    assert process.stderr.readline() == b"token\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    text = out.decode()
    if json_flag:
        assert 1 <= len(json.loads(text)["token_ids"]) < 200
    else:
        assert main(command) == 0
        whole = capsys.readouterr().out
        assert text.endswith("\n")
        assert whole.startswith(text.removesuffix("\n"))
