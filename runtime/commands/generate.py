"""`runtime run`, the default command: an answer to a prompt, or a conversation."""

from __future__ import annotations

import contextlib
import importlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...kernels.errors import ModelError, PolykernError, UsageError
from ..output import Output, one_line
from ..progress import is_watched
from .options import add_session, number, open_session, text_argument, whole

if TYPE_CHECKING:
    from ..chat import Conversation, Renderer
    from ..session import Session
    from ..settings import Sampling

HELP = "Answer a prompt; without one, hold a conversation."
EXAMPLE = """\
runtime --backend opencl "Why is the sky blue?"
echo "Once upon a time" | runtime run --raw -n 64 -"""
DEFAULT_TOKENS = 512  # a small model may never stop by itself
INTERRUPTED = 130


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; - reads stdin; none: a conversation")
    add_session(parser)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n", "--max-tokens", type=whole(1), metavar="N", help=f"stop after N tokens (default: {DEFAULT_TOKENS})"
    )
    group.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    group.add_argument(
        "--temp", type=number(0, 1000), default=0.0, metavar="T", help="0: the likeliest token (default: 0)"
    )
    group.add_argument("--top-k", type=whole(0, 1 << 24), default=0, metavar="K", help="keep the K likeliest; 0: all")
    group.add_argument(
        "--top-p", type=number(1e-9, 1), default=1.0, metavar="P", help="keep the likeliest that sum to P; 1: all"
    )
    group.add_argument(
        "--min-p", type=number(0, 1), default=0.0, metavar="P", help="keep those with P times the top's probability"
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        help="never choose an end-of-text token: go on until -n or the context ends",
    )
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="S", help="same seed, same text")


def run(args: Namespace, out: Output) -> int:
    if args.prompt is None:
        return chat(args, out)
    prompt = text_argument(args.prompt, "PROMPT")
    if args.prompt == "-":
        prompt = prompt.removesuffix("\n")  # what `echo` and editors add is not part of the prompt
        if not prompt:
            raise UsageError("stdin is empty")
    renderer = None if args.raw else start_renderer()
    with open_session(args) as session:
        text = prompt if renderer is None else as_question(prompt, session, renderer)
        prompt_ids = session.tokenizer.encode(text)
        check_room(args.max_tokens, prompt_ids, session)
        reply = Reply(session, prompt_ids, args.max_tokens or DEFAULT_TOKENS, sampling_from(args, session))
        if args.json:
            reply.run()
            out.json(document(session, reply))
        else:
            reply.run(out.write)
            out.line()
            report(session, reply, defaulted=args.max_tokens is None)
    return INTERRUPTED if reply.interrupted else 0


def sampling_from(args: Namespace, session: Session) -> Sampling:
    from ..settings import Sampling

    suppress = session.tokenizer.eos_ids if args.ignore_eos else ()
    return Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.seed, frozenset(suppress))


def start_renderer() -> Renderer:
    """What will render the chat template, started before the model is loaded so that nobody waits for it."""
    from ..chat import Renderer

    return Renderer()


def as_question(prompt: str, session: Session, renderer: Renderer) -> str:
    """`prompt` as the one message of a conversation, in the model's own chat format."""
    conversation = new_conversation(session, renderer=renderer)
    conversation.append("user", prompt)
    try:
        return conversation.render_delta().text
    finally:
        conversation.template.close()


def new_conversation(session: Session, system: str | None = None, renderer: Renderer | None = None) -> Conversation:
    from ..chat import ChatTemplate, Conversation

    template = ChatTemplate.from_metadata(session.metadata, session.tokenizer, str(session.gguf_path), renderer)
    return Conversation(template, system)


def check_room(max_tokens: int | None, prompt_ids: list[int], session: Session) -> None:
    """An explicit -n must fit the context; a ModelError with the numbers if it does not."""
    # The last token is never fed back, so it needs no place in the cache.
    needed = len(prompt_ids) + (max_tokens or 1) - 1
    if max_tokens is None or needed <= session.ctx or len(prompt_ids) > session.ctx:  # a long prompt has its own line
        return
    trained = session.config.context_length
    way_out = f"pass --ctx {needed}" if needed <= trained else f"the model was made for {trained} at most"
    raise ModelError(
        f"-n {max_tokens}: {len(prompt_ids)} tokens of prompt and {max_tokens} more need a context of {needed},"
        f" this one holds {session.ctx}: {way_out}"
    )


class Reply:
    """A reply: `run` generates it; what there is of it stands in `token_ids` and `text` at any time."""

    def __init__(self, session: Session, prompt_ids: list[int], max_tokens: int, sampling: Sampling) -> None:
        self.session, self.prompt_ids, self.max_tokens, self.sampling = session, prompt_ids, max_tokens, sampling
        self.token_ids: list[int] = []
        self.text = ""
        self.interrupted = False

    def run(self, show: Callable[[str], object] | None = None) -> None:
        """Generate, handing pieces of text to `show`, never half a character. Ctrl-C ends it and is remembered."""
        try:
            for piece in self._pieces():
                self.text += piece
                if show:
                    show(piece)
        except KeyboardInterrupt:
            self.interrupted = True

    def _pieces(self) -> Iterator[str]:
        from ..stream import TextStream

        stream = TextStream(self.session.tokenizer)
        tokens = self.session.generate(
            self.prompt_ids,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_ids=self.session.tokenizer.eos_ids,
        )
        for token_id in tokens:
            self.token_ids.append(token_id)
            yield stream.push(token_id)
        yield stream.finish()


def document(session: Session, reply: Reply) -> dict[str, Any]:
    return {
        "backend": session.backend.name,
        "device": session.backend.device.name,
        "model": session.gguf_path,
        "prompt_ids": reply.prompt_ids,
        "token_ids": reply.token_ids,
        "text": reply.text,
        "timings": session.timings,
        "plan": session.plan.counts(),
    }


def report(session: Session, reply: Reply, defaulted: bool = False) -> None:
    """On a terminal, a last line on stderr: where it ran, how fast, and why it ended if not by itself."""
    if not is_watched():
        return
    times = session.timings
    parts = [
        f"{session.backend.name}, {session.backend.device.name}",
        f"{len(reply.prompt_ids)} tokens in, {len(reply.token_ids)} out",
        f"first after {times['ttft_s']:.2f} s",
    ]
    if times["decode_tps"]:
        parts.append(f"{times['decode_tps']:.1f} tok/s")
    if session.finish_reason == "length" and defaulted:
        parts.append(f"stopped after {reply.max_tokens} tokens, -n changes that")
    elif session.finish_reason == "context":
        parts.append(f"stopped: the context of {session.ctx} tokens is full, --ctx changes that")
    Output.note(f"[{'; '.join(parts)}]")


CHAT_HELP = """\
/help          this list
/reset         forget the conversation
/system TEXT   start over with TEXT as the system message
/exit          leave (or Ctrl-D); Ctrl-C stops a reply"""


def chat(args: Namespace, out: Output) -> int:
    """Turn by turn; what earlier turns left in the KV cache is not computed again."""
    if args.json or args.raw:
        raise UsageError(f"{'--json' if args.json else '--raw'} needs a PROMPT")
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("no PROMPT, and stdin is no terminal for a conversation: give a PROMPT, or - to read stdin")
    renderer = start_renderer()
    with open_session(args) as session:
        conversation, ids = new_conversation(session, renderer=renderer), list[int]()
        Output.note(f"{session.backend.name}, {session.backend.device.name}; /help lists the commands")
        while (line := read_line()) is not None:
            command, _, rest = line.partition(" ")
            if command == "/exit":
                break
            if command == "/help":
                Output.note(CHAT_HELP)
            elif command in ("/reset", "/system"):
                conversation, ids = new_conversation(session, rest.strip() or None), []
            elif command.startswith("/"):
                Output.note(f"unknown command {command}; /help lists them")
            elif line:
                ids = take_turn(line, conversation, ids, session, args, out)
    return 0


def read_line() -> str | None:
    """The next line of the user; None at the end of input."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            line = input("> ").strip()
            line.encode()  # depending on the locale, bytes that are no UTF-8 come as lone surrogates instead
            return line
        except EOFError:
            Output.note("")
            return None
        except UnicodeError:
            Output.note("that was not valid UTF-8; once more:")


def take_turn(
    line: str, conversation: Conversation, ids: list[int], session: Session, args: Namespace, out: Output
) -> list[int]:
    """One question and its answer; returns the ids of the whole conversation, as they stand in the KV cache.

    A question that cannot be asked is named on stderr, and as if it had not been asked.
    """
    conversation.append("user", line)
    try:
        delta = conversation.render_delta()
        added = session.tokenizer.encode(delta.text, continuation=not delta.reset)
        prompt_ids = added if delta.reset else ids + added
        if len(prompt_ids) > session.ctx:
            raise ModelError(
                f"the conversation has {len(prompt_ids)} tokens, the context {session.ctx}: /reset, or use --ctx"
            )
    except PolykernError as error:
        Output.note(one_line(str(error)))
        conversation.withdraw()
        return []
    reply = Reply(session, prompt_ids, args.max_tokens or DEFAULT_TOKENS, sampling_from(args, session))
    reply.run(out.write)
    out.line()
    report(session, reply, defaulted=args.max_tokens is None)
    conversation.append("assistant", reply.text)
    return prompt_ids + reply.token_ids
