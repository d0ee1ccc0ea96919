"""`runtime perplexity`: how well a model predicts a text, teacher-forced."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from typing import Any

from ...kernels.errors import ModelError
from ..output import Output
from .options import MAX_TEXT_BYTES, add_session, completes_files, decode, open_session, read_file

HELP = "Measure negative log-likelihood and perplexity of a text."
EXAMPLE = "runtime perplexity -f README.md"


def add_arguments(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    completes_files(source.add_argument("-f", "--file", metavar="FILE", help="a text file (UTF-8)"))
    completes_files(
        source.add_argument("--ids", metavar="FILE.json", help='token ids: a JSON list, or an object with a list "ids"')
    )
    parser.add_argument(
        "--by-step",
        action="store_true",
        help="one token at a time through the decode step, whose kernels may round differently; slower",
    )
    add_session(parser)


def read_ids(path: str) -> list[int]:
    """Token ids from a JSON file: a list, an object with key "ids", or one whose "text_nll" is such an object."""
    data = read_file(path)
    if len(data) > MAX_TEXT_BYTES:
        raise ModelError(f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    for key in ("text_nll", "ids"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise ModelError(f'{path}: expected a JSON list of token ids, or an object with such a list as "ids"')
    return value


def windows(ids: list[int], size: int) -> list[list[int]]:
    """`ids` cut into runs of at most `size`; a single id at the end predicts nothing and is left out."""
    cut = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [window for window in cut if len(window) > 1]


def tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def run(args: Namespace, out: Output) -> int:
    from ..progress import ProgressBars

    given = read_ids(args.ids) if args.ids else None
    text = decode(read_file(args.file), args.file) if args.file else ""
    session = open_session(args)
    try:
        ids = session.tokenizer.encode(text) if given is None else given
        if len(ids) < 2:
            raise ModelError(f"{args.file or args.ids}: {tokens(len(ids))}; at least 2 are needed to predict one")
        if session.ctx < 2:
            raise ModelError(f"--ctx is {session.ctx}; at least 2 tokens are needed to predict one from the other")
        nll: list[float] = []
        with ProgressBars() as bars:

            def progress(what: str, done: int, _: int) -> None:
                bars(what, len(nll) + done, len(ids))

            for window in windows(ids, session.ctx):
                nll += session.nll(window, by_step=args.by_step, progress=progress)
    finally:
        session.close()
    mean = math.fsum(nll) / len(nll)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if args.json:
        out.json({"nll": nll, "mean_nll": mean, "perplexity": perplexity})
    else:
        out.line(f"{tokens(len(nll))} predicted, mean nll {mean:.5f}, perplexity {perplexity:.4f}")
    return 0
