"""`runtime tokenize`: text to token ids."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..output import Output
from .options import add_model, text_argument

HELP = "Show the token ids of a text."
EXAMPLE = 'runtime tokenize "Hello world"'


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the text, or - to read it from stdin")
    add_model(parser)
    parser.add_argument("--pieces", action="store_true", help="one line for each token, with its text")


def run(args: Namespace, out: Output) -> int:
    from ..gguf import GGUFFile
    from ..models import resolve
    from ..progress import ProgressBars
    from ..tokenizer import Tokenizer

    text = text_argument(args.text, "TEXT")
    with ProgressBars() as progress:
        path = resolve(args.model, progress)
    with GGUFFile.open(path) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata, str(path))
    ids = tokenizer.encode(text)
    if args.json:
        out.json({"ids": ids})
    elif args.pieces:
        out.table(("id", "token"), [(i, repr(tokenizer.token_text(i))) for i in ids], right=("id",))
    else:
        out.line(" ".join(map(str, ids)))
    return 0
