"""`runtime pull`: fetch a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..output import Output
from .options import name

HELP = "Fetch a model into the cache and check it."
EXAMPLE = "runtime pull smollm2-135m-instruct"


def add_arguments(parser: ArgumentParser) -> None:
    from ..models import KNOWN

    known = ", ".join(KNOWN)
    parser.add_argument(
        "name", type=name, metavar="NAME", help=f"a known name ({known}), hf:OWNER/REPO/FILE.gguf, or a file to check"
    )


def run(args: Namespace, out: Output) -> int:
    from ..models import pull
    from ..progress import ProgressBars

    with ProgressBars() as progress:
        path, sha256 = pull(args.name, progress)
    if args.json:
        out.json({"path": path, "sha256": sha256})
    else:
        out.line(f"{path}\nsha256 {sha256}")
    return 0
