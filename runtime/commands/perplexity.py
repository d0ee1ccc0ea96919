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


def run(args: Namespace, out: Output) -> int:
    from ..progress import ProgressBars

    given = read_ids(args.ids) if args.ids else None
    text = decode(read_file(args.file), args.file) if args.file else ""
    session = open_session(args)
    try:
        ids = session.tokenizer.encode(text) if given is None else given
        if len(ids) < 2:
            raise ModelError(f"{args.file or args.ids}: {len(ids)} tokens; at least 2 are needed to predict one")
        nll: list[float] = []
        with ProgressBars() as progress:
            for window in windows(ids, session.ctx):
                progress("perplexity", len(nll), len(ids))
                nll += session.nll(window)
    finally:
        session.close()
    mean = math.fsum(nll) / len(nll)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if args.json:
        out.json({"nll": nll, "mean_nll": mean, "perplexity": perplexity})
    else:
        out.line(f"{len(nll)} tokens predicted, mean nll {mean:.5f}, perplexity {perplexity:.4f}")
    return 0
