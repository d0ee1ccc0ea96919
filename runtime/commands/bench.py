"""`runtime bench`: prompt and decode speed, beside the memory bandwidth of the same minutes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from ...kernels.errors import UsageError
from ..output import Output
from .options import add_session, open_session, whole

if TYPE_CHECKING:
    from ..bandwidth import DeviceProbe, ReadProbe
    from ..session import Session

HELP = "Time prompt processing (pp) and decoding (tg); no tokenizer and no sampler in the loop."
EXAMPLE = "runtime bench --backend opencl -p 512 -n 128 -r 5"


def add_arguments(parser: ArgumentParser) -> None:
    add_session(parser)
    group = parser.add_argument_group("tests")
    group.add_argument(
        "-p", "--prompt-tokens", type=whole(0), default=512, metavar="N", help="0: none (default: %(default)s)"
    )
    group.add_argument(
        "-n", "--decode-tokens", type=whole(0), default=128, metavar="N", help="0: none (default: %(default)s)"
    )
    group.add_argument(
        "-r", "--repetitions", type=whole(1, 10000), default=5, metavar="R", help="(default: %(default)s)"
    )


def run(args: Namespace, out: Output) -> int:
    if not args.prompt_tokens and not args.decode_tokens:
        raise UsageError("-p 0 and -n 0 leave nothing to time")
    with open_session(args) as session:
        results = measure(session, args.prompt_tokens, args.decode_tokens, args.repetitions, args.threads)
        document = {
            "results": results,
            "model": session.gguf_path,
            "backend": session.backend.name,
            "device": session.backend.device,
            "choice": session.choice,
            "precision": args.precision,
            "threads": args.threads,
        }
    if args.json:
        from ..machine import provenance

        out.json({**document, **provenance()})
    else:
        show(document, out)
    return 0


def measure(
    session: Session, prompt_tokens: int, decode_tokens: int, repetitions: int, threads: int | None = None
) -> list[dict[str, Any]]:
    """The rows of `results`: one for each test, pp before tg.

    The bandwidth beside them is the host's, or that of a device with memory of its own, as its backend measures it.
    """
    from ..bandwidth import DeviceProbe, ReadProbe
    from ..progress import ProgressBars

    has_own_memory = session.backend.device.detail.get("type", "cpu") != "cpu" and hasattr(session.backend, "peaks")
    probe = DeviceProbe(session.backend) if has_own_memory else ReadProbe(threads)
    probe.sweep()
    probe.all.clear()  # the first one warms up
    with ProgressBars() as bars:

        def between(what: str, done: int, total: int) -> None:
            """`Session.bench` calls this between repetitions, outside its clock: both sides see the same machine."""
            bars(what, done, total)
            probe.sweep()

        found = session.bench(prompt_tokens, decode_tokens, repetitions, between)
    probe.close()
    return [row(test, rates, streamed_bytes(session), probe) for test, rates in found.items()]


def row(test: str, rates: list[float], streamed: int, probe: ReadProbe | DeviceProbe) -> dict[str, Any]:
    """Bandwidth figures are for tg only: a prompt reads the weights once per chunk and is bound by arithmetic."""
    from statistics import median

    tps = median(rates)
    reads = streamed if test.startswith("tg") else None
    gb_per_s = reads * tps / 1e9 if reads else None
    return {
        "test": test,
        "tps_median": tps,
        "tps_all": rates,
        "bytes_per_token": reads,
        "gb_per_s": gb_per_s,
        "read_gb_per_s": probe.gb_per_s,
        "roofline_fraction": gb_per_s / probe.gb_per_s if gb_per_s else None,
    }


def streamed_bytes(session: Session) -> int:
    """Bytes of quantised weights that one decode step has to read, in their file format."""
    from ...kernels.op import signature_bytes
    from ...kernels.ops import OPS

    total = 0
    for call in session.plan.leaves():
        # An embedding looks up one row; everything else that takes a weight reads all of it.
        weights = [p.name for p in OPS[call.signature.op].params if p.role == "weight"]
        if call.signature.op != "embedding":
            total += signature_bytes(call.signature, weights)
    return total


def show(document: dict[str, Any], out: Output) -> None:
    out.line(f"{document['model'].name}, {document['backend']}, {document['device'].name}, {document['precision']}")
    columns = ("test", "tok/s", "least", "most", "MB/token", "GB/s", "read GB/s", "of roofline")
    rows: list[tuple[object, ...]] = []
    for result in document["results"]:
        rates = result["tps_all"]
        speeds = [f"{value:.1f}" for value in (result["tps_median"], min(rates), max(rates))]
        streamed: list[str] = ["", ""]
        if result["bytes_per_token"]:
            streamed = [f"{result['bytes_per_token'] / 1e6:.1f}", f"{result['gb_per_s']:.1f}"]
        fraction = f"{result['roofline_fraction']:.0%}" if result["roofline_fraction"] else ""
        rows.append((result["test"], *speeds, *streamed, f"{result['read_gb_per_s']:.1f}", fraction))
    out.table(columns, rows, right=columns[1:])
