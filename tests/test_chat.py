"""Chat templates: what the ones in the wild need, and what hostile ones cannot do."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from polykern.kernels.errors import ModelError, ModelFormatError, PolykernError, UsageError
from polykern.runtime import chat
from polykern.runtime.chat import CHATML, ChatTemplate, Conversation, Delta, Renderer
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.tokenizer import Tokenizer
from vocabularies import byte_level

HI = [{"role": "user", "content": "hi"}]
START_SECONDS = 5  # what a busy machine may take to start Python and import jinja2; 0.1 on an idle one


def render(source: str, messages: list[dict[str, str]] = HI, **options: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


def refusal(source: str, messages: list[dict[str, str]] = HI) -> str:
    """The error that `source` ends in, which must be one line of printable text within the time allowed."""
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        render(source, messages)
    assert time.monotonic() - started < chat.MAX_SECONDS + START_SECONDS
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("model: chat template: ")
    assert message.endswith("; use --raw to do without it")
    return message.removeprefix("model: chat template: ").removesuffix("; use --raw to do without it")


# What templates need


def test_the_default_model(default_model: Path, golden: dict[str, Any]) -> None:
    prompt = next(case["prompt"] for case in golden["greedy"] if case["prompt"].startswith("<|im_start|>"))
    with GGUFFile.open(default_model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, file.path)
        template = ChatTemplate.from_metadata(file.metadata, tokenizer, file.path)
    assert template.render([{"role": "user", "content": "Why is the sky blue?"}]) == prompt
    assert template.bos_token == "<|im_start|>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hi</s>"),
        ("{% for m in messages %}\n    {{ m.role }}\n{% endfor %}\n", "    user\n"),
        ("{%- if tools %}T{% endif %}{% if tools is not none %}N{% endif %}{% if documents %}D{% endif %}.", "."),
        ("{% if not messages[0].tool_calls %}none{% endif %}", "none"),
        ("{{ 'yes' if messages[0].reasoning is string else 'no' }}", "no"),
        ("{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}", "on"),
        ("{% if name is defined %}{% else %}-{% endif %}{% if name == 'x' %}x{% endif %}", "-"),
        ("{% for call in messages[0].tool_calls %}x{% endfor %}{{ messages[0].x|length }}", "0"),
        ("{% if 'x' in messages[0].tool_calls %}x{% endif %}.", "."),
        ("{{ name|default('none') }}", "none"),
        ("{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
         "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% for i in range(4) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ {'b': '<é>', 'a': [1]}|tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'a': 1}|tojson(indent=4) }}", '{\n    "a": 1\n}'),
        ("{{ messages[0].content.strip().split('</think>')[-1].lstrip('\\n') }}", "hi"),
        ("{{ (messages|selectattr('role', 'equalto', 'user')|list)|length }}{{ messages[::-1][0].content }}", "1hi"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{{ messages|map(attribute='content')|join(',') }}", "hi"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}", "[a]"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_generation_prompt_and_text_of_any_kind() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }} é 😀 \0 <b> \ud800"}]
    assert render(CHATML, messages) == f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, messages, add_generation_prompt=False).endswith("<|im_end|>\n")
    assert render(CHATML, []) == "<|im_start|>assistant\n"
    assert render("") == ""


def test_one_template_renders_many_times() -> None:
    template = ChatTemplate("{{ messages|length }}", bos_token="", eos_token="")
    assert [template.render(HI * n) for n in (0, 1, 5)] == ["0", "1", "5"]


# What they may not do


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ nothing + 'x' }}", "'nothing' is undefined"),
        ("{{ messages[0].a.b }}", "'dict object' has no attribute 'a'"),
        ("{{ messages[7].role }}", "list object has no element 7"),
        ("{{ raise_exception('only \x1b[31musers\n here') }}", "refused the conversation: only [31musers here"),
        ("{{ raise_exception('x' * 1000) }}", "refused the conversation: " + "x" * 274),
        ("a\n{% if %}", "line 2: Expected an expression, got 'end of statement block'"),
        ("{% nonsense %}", "line 1: Encountered unknown tag 'nonsense'."),
        ("{% generation %}", "line 1: Unexpected end of template."),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
        ("{% import 'os' as os %}", "no loader for this environment specified"),
        ("{% extends 'x' %}", "no loader for this environment specified"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe."),
        ("{{ lipsum.__globals__ }}", "access to attribute '__globals__' of 'function' object is unsafe."),
        ("{{ raise_exception.__globals__ }}", "access to attribute '__globals__' of 'function' object is unsafe."),
        ("{{ ''|attr('__class__') }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ ('{0.__class__}'|attr('format'))(1) }}", "access to attribute '__class__' of 'int' object is unsafe."),
        ("{{ '{0.__class__}'.format(1) }}", "access to attribute '__class__' of 'int' object is unsafe."),
        ("{{ '{x.__class__}'.format_map({'x': 1}) }}", "access to attribute '__class__' of 'int' object is unsafe."),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{% for i in range(100001) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end, or is nested too deep"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself without end"),
        ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "nested too deep"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deep"),
        ("{{ " + "not " * 50000 + "1 }}", "nested too deep"),
        ("{{ 'x' * 10**9 }}", "needs more than 200 MiB of memory"),
        ("{% set n = 1000 %}{{ [1] * (n * n * n) }}", "needs more than 200 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "needs more than 200 MiB of memory"),
        ("{{ '{:1000000000d}'.format(1) }}", "needs more than 200 MiB of memory"),
        ("{{ '%*d' % (1000000000, 1) }}", "needs more than 200 MiB of memory"),
        ("{{ 'x'.center(10**9) }}", "needs more than 200 MiB of memory"),
        ("{{ 'x'|center(10**9) }}", "needs more than 200 MiB of memory"),
        ("{{ 'x\ny'|indent(10**9) }}", "needs more than 200 MiB of memory"),
        ("{{ range(9)|batch(10**9, 'x')|list }}", "needs more than 200 MiB of memory"),
        ("{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}", "needs more than 200 MiB of memory"),
        ("{{ (['x' * 10**6] * 10**4)|join }}", "needs more than 200 MiB of memory"),
        ("{{ [1]|tojson(indent=10**9) }}", "needs more than 200 MiB of memory"),
        ("{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "200 MiB"),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 4 MiB"),
    ],
)  # fmt: skip
def test_refused(source: str, problem: str) -> None:
    assert problem in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('a ' * 20000000)|wordwrap(1) }}",
        "{{ 'x'|list|slice(10**9)|list }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_endless(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    problem = refusal(source)
    assert problem in ("takes more than 1 s", "needs more than 200 MiB of memory")


def test_limits_hold_in_any_process() -> None:
    """The time limit as it is, with an inherited SIGALRM that is ignored, and the memory of both processes."""
    script = """
import resource, signal, time
from polykern.kernels.errors import ModelError
from polykern.runtime.chat import ChatTemplate
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
for source in ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**9 }}",
               "{% set n=namespace(s=[1]) %}{% for i in range(64) %}{% set n.s=n.s+n.s %}{% endfor %}"):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        ChatTemplate(source, bos_token="", eos_token="").render([])
    except ModelError as error:
        print(error)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 300 << 10
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert [line.split(": ")[2].split(";")[0] for line in done.stdout.splitlines()] == [
        "takes more than 5 s",
        "needs more than 200 MiB of memory",
        "needs more than 200 MiB of memory",
    ]


def test_the_longest_template() -> None:
    assert render("{#" + "x" * (chat.MAX_TEMPLATE_BYTES - 5) + "#}.") == "."
    with pytest.raises(ModelError, match=f"has {chat.MAX_TEMPLATE_BYTES + 1} bytes, at most {chat.MAX_TEMPLATE_BYTES}"):
        render("{#" + "x" * (chat.MAX_TEMPLATE_BYTES - 4) + "#}.")


def test_the_longest_prompt() -> None:
    fits = [{"role": "user", "content": "é" * (chat.MAX_OUTPUT_BYTES // 2)}]
    assert render("{{ messages[0].content }}", fits) == fits[0]["content"]
    assert refusal("{{ messages[0].content }}!", fits) == "writes more than 4 MiB"


# Processes


def test_a_process_that_dies_is_reported_and_replaced() -> None:
    template = ChatTemplate("{{ messages|length }}", bos_token="", eos_token="", path="m.gguf")
    assert template._ready is not None
    template._ready.process.kill()
    template._ready.process.wait()
    with pytest.raises(ModelError, match=r"m\.gguf: chat template: its process ended with status -9; use --raw"):
        template.render(HI)
    assert template.render(HI) == "1"


def test_no_process_is_left_behind() -> None:
    templates = [ChatTemplate("", bos_token="", eos_token="") for _ in range(3)]
    processes = [template._ready.process for template in templates if template._ready]
    templates[0].close()
    templates[0].close()
    templates[1].render(HI)
    del templates
    gc.collect()
    assert len(processes) == 3
    assert all(process.returncode is not None for process in processes)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(
        PolykernError, match=r"^/no/such/python: cannot be started to .*: No such file or directory; use"
    ):
        ChatTemplate("", bos_token="", eos_token="")


def test_interrupted_while_rendering() -> None:
    template = ChatTemplate("{% for i in range(10**5) %}" * 2 + "{% endfor %}" * 2, bos_token="", eos_token="")
    assert template._ready is not None
    process = template._ready.process
    started = time.monotonic()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        template.render(HI)
    assert time.monotonic() - started < 4
    assert process.returncode is not None


def test_a_renderer_started_ahead() -> None:
    """It renders the first time; one that nobody used ends with its last reference."""
    renderer, unused = Renderer(), Renderer()
    template = ChatTemplate("{{ messages|length }}", bos_token="", eos_token="", renderer=renderer)
    assert template.render(HI) == "1"
    assert renderer.process.returncode == 0
    assert template.render(HI) == "1"
    process = unused.process
    assert process.poll() is None
    del unused
    gc.collect()
    assert process.returncode is not None


def test_jinja2_stays_out_of_this_process() -> None:
    script = "import sys, polykern.runtime.chat as c; c.ChatTemplate('x', bos_token='', eos_token='').render([])"
    done = subprocess.run(
        [sys.executable, "-c", script + "; print('jinja2' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# Models


def test_a_model_without_a_template() -> None:
    chatml = Tokenizer.from_metadata(byte_level(), "m.gguf")
    assert ChatTemplate.from_metadata({}, chatml, "m.gguf").render(HI).startswith("<|im_start|>user\nhi<|im_end|>")
    tokens = [token.replace("im_", "my_") for token in byte_level()["tokenizer.ggml.tokens"]]
    without = Tokenizer.from_metadata(byte_level(tokens=tokens), "m.gguf")
    with pytest.raises(ModelError, match=r"m\.gguf: the model has no chat template; use --raw to continue the prompt"):
        ChatTemplate.from_metadata({}, without, "m.gguf")


def test_the_template_of_a_model() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(bos_token_id=None), "m.gguf")
    metadata = {"tokenizer.chat_template": "[{{ bos_token }}{{ eos_token }}]"}
    assert ChatTemplate.from_metadata(metadata, tokenizer, "m.gguf").render(HI) == "[<|im_end|>]"
    with pytest.raises(ModelFormatError, match=r"m\.gguf: tokenizer\.chat_template: expected str, found int"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 3}, tokenizer, "m.gguf")


# Conversations


def chatml() -> ChatTemplate:
    return ChatTemplate(CHATML, bos_token="", eos_token="<|im_end|>")


def test_only_what_is_new_is_rendered() -> None:
    conversation = Conversation(chatml(), system="Be brief.")
    cache = ""
    for turn, (question, reply) in enumerate([("a?", "b"), ("c?", " d \n"), ("e?", "")]):
        conversation.append("user", question)
        delta = conversation.render_delta()
        assert delta.reset == (turn == 0)
        assert delta.text.startswith("<|im_start|>system\nBe brief." if turn == 0 else "<|im_end|>\n<|im_start|>user\n")
        cache += delta.text + reply
        conversation.append("assistant", reply)
    assert conversation.render_delta().reset is False
    conversation.append("user", "f?")
    conversation.append("user", "g?")
    conversation.render_delta()
    assert conversation.render_delta() == Delta("", reset=False)
    whole = chatml().render(conversation.messages)
    assert whole.startswith(cache)


def test_a_template_that_rewrites_earlier_parts() -> None:
    trims = CHATML.replace("message.content", "message.content|trim")
    conversation = Conversation(ChatTemplate(trims, bos_token="", eos_token=""))
    conversation.append("user", "a?")
    first = conversation.render_delta()
    conversation.append("assistant", " b ")
    conversation.append("user", "c?")
    second = conversation.render_delta()
    assert second.reset
    assert second.text.startswith(first.text + "b<|im_end|>")
    conversation.append("assistant", "d")
    conversation.append("user", "e?")
    assert not conversation.render_delta().reset


def test_what_the_cache_does_not_hold() -> None:
    conversation = Conversation(chatml())
    conversation.append("user", "a?")
    conversation.append("assistant", "said elsewhere")
    conversation.append("user", "b?")
    assert conversation.render_delta() == Delta(chatml().render(conversation.messages), reset=True)
    conversation.append("assistant", "c")
    conversation.append("assistant", "d")
    assert not conversation.render_delta().reset
    conversation.forget()
    assert conversation.render_delta().reset


def test_roles() -> None:
    with pytest.raises(UsageError, match="role 'tool' is not one of system, user, assistant"):
        Conversation(chatml()).append("tool", "x")


def test_a_question_taken_back() -> None:
    """After a refusal the conversation goes on as if it had not been asked."""
    source = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    template = ChatTemplate(source + "[{{ m.content }}]{% endfor %}", bos_token="", eos_token="", path="m.gguf")
    conversation = Conversation(template)
    conversation.append("user", "one")
    assert conversation.render_delta() == Delta("[one]", reset=True)
    conversation.append("assistant", "two")
    conversation.append("user", "no")
    with pytest.raises(ModelError, match="refused the conversation: not that"):
        conversation.render_delta()
    conversation.withdraw()
    conversation.append("user", "three")
    assert conversation.render_delta() == Delta("[one][two][three]", reset=True)
