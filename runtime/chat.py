"""Conversations as prompts: the model's chat template, rendered safely, and what of a conversation is new.

The template is untrusted code, so it runs in a process of its own that the kernel limits (`template_worker`). That
process, a `Renderer`, can be started before the model is loaded and imports jinja2 meanwhile: rendering then takes 7 ms
instead of 120 (on an AMD EPYC). After a reply the next one is started ahead in the same way.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..kernels.errors import ModelError, ModelFormatError, PolykernError, UsageError
from .tokenizer import Tokenizer

MAX_TEMPLATE_BYTES = 256 << 10
MAX_OUTPUT_BYTES = 4 << 20
MAX_MEMORY_BYTES = 200 << 20
MAX_SECONDS = 5
_START_SECONDS = 30  # for Python and jinja2 to be read from a cold disk

# https://github.com/openai/openai-python/blob/120d225b91a8453e15240a49fb1c6794d8119326/chatml.md; used where a model
# brings no template but has these tokens.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message: TypeAlias = dict[str, str]


class Renderer:
    """A process that can render one template, ready about 0.1 s after it was started. It ends with this object.

    Raises PolykernError where no process can be started.
    """

    def __init__(self) -> None:
        self.process = _start()
        self._end = weakref.finalize(self, _discard, self.process)

    def close(self) -> None:
        self._end()


class ChatTemplate:
    """A jinja2 chat template.

    It may use at most MAX_SECONDS, MAX_MEMORY_BYTES and MAX_OUTPUT_BYTES; going beyond, like any error of its own, is a
    ModelError. Undefined values are false and empty, but writing one out is an error. `path` is for error messages;
    `renderer` is one that was started ahead.
    """

    def __init__(
        self, source: str, *, bos_token: str, eos_token: str, path: str = "model", renderer: Renderer | None = None
    ) -> None:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise ModelError(f"{path}: the chat template has {size} bytes, at most {MAX_TEMPLATE_BYTES}; use --raw")
        self.source, self.bos_token, self.eos_token, self.path = source, bos_token, eos_token, path
        self._ready = renderer
        self.prepare()

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, path: str, renderer: Renderer | None = None
    ) -> ChatTemplate:
        """The template that the GGUF file `path` brings; ChatML where it brings none but has ChatML's tokens.

        Raises ModelError where there is neither.
        """
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            if tokenizer.token_id("<|im_start|>") is None or tokenizer.token_id("<|im_end|>") is None:
                raise ModelError(f"{path}: the model has no chat template; use --raw to continue the prompt as it is")
            source = CHATML
        if not isinstance(source, str):
            raise ModelFormatError(
                path, "tokenizer.chat_template", None, f"expected str, found {type(source).__name__}"
            )
        bos, eos = (
            "" if token_id is None else tokenizer.token_text(token_id)
            for token_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos_token=bos, eos_token=eos, path=path, renderer=renderer)

    def prepare(self) -> None:
        """Starts the process for the next `render` ahead of time, if it is not waiting yet."""
        self._ready = self._ready or Renderer()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`, each with "role" and "content"; `add_generation_prompt` opens the reply."""
        request = {
            "source": self.source,
            "variables": {
                "messages": list(messages),
                "add_generation_prompt": add_generation_prompt,
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "tools": None,
                "documents": None,
            },
            "seconds": MAX_SECONDS,
            "memory_bytes": MAX_MEMORY_BYTES,
            "output_bytes": MAX_OUTPUT_BYTES,
        }
        renderer, self._ready = self._ready or Renderer(), None
        process = renderer.process
        try:
            reply, _ = process.communicate(json.dumps(request).encode(), timeout=_START_SECONDS + MAX_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise self._error(f"its process did not start within {_START_SECONDS} s") from error
        finally:
            renderer.close()
        if process.returncode == -signal.SIGALRM:
            raise self._error(f"takes more than {MAX_SECONDS} s")
        if process.returncode != 0 or not reply:
            raise self._error(f"its process ended with status {process.returncode}")
        answer: dict[str, str] = json.loads(reply)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends a process that was started ahead."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None

    def _error(self, problem: str) -> ModelError:
        # The text may come from the template: keep it to one line without escape sequences.
        shown = "".join(char if char.isprintable() else " " for char in problem[:300])
        return ModelError(f"{self.path}: chat template: {' '.join(shown.split())}; use --raw to do without it")


def _start() -> subprocess.Popen[bytes]:
    # Isolated (-I) and without site (-S): nothing in the user's environment can get between us and jinja2, and it
    # starts faster. A session of its own, so that Ctrl-C at the terminal is ours to handle.
    origins = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {str(Path(spec.origin).parents[1]) for spec in origins if spec and spec.origin}
    worker = Path(__file__).with_name("template_worker.py")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(worker), *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise PolykernError(
            f"{sys.executable}: cannot be started to render the chat template: {error.strerror}; use --raw"
        ) from error


def _discard(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


@dataclass(frozen=True)
class Delta:
    """What to feed next: `tokenizer.encode(delta.text, continuation=not delta.reset)`.

    `reset`: the cache holds nothing of use; empty it first, `text` is the whole prompt.
    """

    text: str
    reset: bool


class Conversation:
    """A growing list of messages, and which part of its prompt a KV cache holds already.

        conversation.append("user", line)
        delta = conversation.render_delta()   # feed it, generate a reply
        conversation.append("assistant", reply)

    The cache is taken to hold every delta and every reply. Where the template writes an earlier part differently now
    (it trims replies, or drops their reasoning), the next delta is the whole prompt again.
    """

    def __init__(self, template: ChatTemplate, system: str | None = None) -> None:
        self.template = template
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.forget()

    def append(self, role: str, content: str) -> None:
        """Adds a message. A reply ("assistant") is as it was generated, without its end token."""
        if role not in ("system", "user", "assistant"):
            raise UsageError(f"role {role[:64]!r} is not one of system, user, assistant")
        if role == "assistant":
            if self._rendered == len(self.messages):
                self._cached += content
            self._rendered = -1
            self.template.prepare()
        self.messages.append({"role": role, "content": content})

    def withdraw(self) -> None:
        """Takes the last message back: it got no reply. The cache is not relied on afterwards."""
        self.messages.pop()
        self.forget()

    def render_delta(self) -> Delta:
        """What must be added to the cache before the next reply can be generated."""
        prompt = self.template.render(self.messages)
        kept = len(self._cached) if self._cached and prompt.startswith(self._cached) else 0
        self._cached, self._rendered = prompt, len(self.messages)
        return Delta(prompt[kept:], reset=kept == 0)

    def forget(self) -> None:
        """To be called when the cache was lost, or holds something else than was rendered and appended."""
        self._cached, self._rendered = "", -1
