"""Renders one chat template, in a process of its own. Run as a script by `chat`; imports nothing of this project.

A chat template is a program that came with a model file. jinja2's sandbox keeps it from Python's internals, but bounds
neither time nor memory: `'x' * 10**9`, nested loops of 100000 rounds or `center(10**9)` are legal expressions. Here the
kernel bounds them: an address-space limit, and an alarm that ends the process wherever it is, in C code too.

Protocol: one JSON object on stdin, {source, variables, seconds, memory_bytes, output_bytes}; one on stdout, {text} or
{error}. Killed by SIGALRM means out of time. `sys.argv[1:]` are the folders to import jinja2 from.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[1:]

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Absent(StrictUndefined):
    """An undefined value: false, empty and equal only to its like, as templates in the wild expect of message fields
    they test (`{% if not message.tool_calls %}`); but writing it out, or using it as anything else, is an error, where
    jinja2's default would leave a hole in the prompt."""

    __slots__ = ()
    __bool__ = Undefined.__bool__
    __eq__ = Undefined.__eq__
    __ne__ = Undefined.__ne__
    __hash__ = Undefined.__hash__
    __iter__ = Undefined.__iter__
    __len__ = Undefined.__len__

    def __contains__(self, item: object) -> bool:
        return False


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model is trained on; for a prompt it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> None:
    raise TemplateError(f"refused the conversation: {message}")


def strftime_now(layout: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(layout)


def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Without the HTML escapes of jinja2's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face's `apply_chat_template` offers: the names and settings that templates are written for.

    https://github.com/huggingface/transformers/blob/5e43e2e892453b405ce6d2cb94387b3a3213f30a/src/transformers/utils/chat_template_utils.py
    """
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag], undefined=Absent
    )
    env.filters["tojson"] = tojson
    offered: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    env.globals.update(offered)
    return env


def render(source: str, variables: dict[str, Any], output_bytes: int) -> str:
    pieces, size = [], 0
    for piece in environment().from_string(source).generate(variables):
        pieces.append(piece)
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > output_bytes:
            raise TemplateError(f"writes more than {output_bytes >> 20} MiB")
    return "".join(pieces)


def limit(seconds: int, memory_bytes: int) -> None:
    """From here on: `memory_bytes` more address space than now, and `seconds` to live."""
    import resource
    import signal

    used = 0
    try:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 256 << 20
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # An ignored or blocked signal would be inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(seconds)


def answer(request: dict[str, Any]) -> dict[str, str]:
    limit(request["seconds"], request["memory_bytes"])
    try:
        return {"text": render(request["source"], request["variables"], request["output_bytes"])}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"needs more than {request['memory_bytes'] >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "calls itself without end, or is nested too deep"}
    except Exception as error:  # noqa: BLE001 - whatever the template provoked becomes one line
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    data = sys.stdin.buffer.read()
    if data:
        reply = answer(json.loads(data))
        sys.stdout.write(json.dumps(reply))
        sys.stdout.flush()
    os._exit(0)  # nothing is left to clean up; saves what the interpreter's own end takes


if __name__ == "__main__":
    main()
