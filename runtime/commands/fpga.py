"""`runtime fpga estimate`: cycles, area and speed of a model's decode step on an FPGA, from the documented model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from ...kernels.errors import UsageError
from ..fpga.parts import PARTS, Part
from ..fpga.streams import CHANNELS, LANES, STREAMS, WHAT_IF
from ..output import Output
from .options import add_model, completes_files, name, number, whole

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..fpga.estimate import Estimate
    from ..fpga.sweep import Sweep

HELP = "Estimate a decode step on an FPGA: cycles, resources, bandwidth, tokens/s, and what limits them."
EXAMPLE = """
runtime fpga estimate --part kv260
runtime fpga estimate -m model.gguf --part u280 --sweep -o u280.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("estimate",), help="what to do")
    add_model(parser)
    parser.add_argument("--part", choices=tuple(PARTS), default="u280", help="(default: %(default)s)")
    group = parser.add_argument_group("design", "What is not given is chosen: the fastest that fits the part.")
    group.add_argument("--channels", type=int, choices=CHANNELS, help="memory channels of 512 bits")
    group.add_argument("--lanes", type=int, choices=LANES, help="weights per channel and cycle")
    group.add_argument(
        "--freq",
        type=number(10, 500),
        metavar="MHZ",
        help="clock in MHz (default: what such designs reach on the part)",
    )
    group.add_argument(
        "--attention-units", type=whole(1, 1024), metavar="N", help="query heads that are worked on at the same time"
    )
    group.add_argument(
        "--products", choices=("lut", "dsp"), help="what multiplies weights: LUTs, or a DSP block for each"
    )
    group.add_argument("--kv", choices=("f16", "int8"), default="f16", help="numbers in the KV cache (default: f16)")
    group.add_argument(
        "--launch-us", type=number(0, 1e6), default=0.0, metavar="US",
        help="time the host needs to start one call (default: 0, a sequencer on the card runs the step)",
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ctx", type=whole(1), metavar="N", help="tokens in the KV cache (default: 512, or what the model has)"
    )
    group.add_argument(
        "--format", choices=(*STREAMS, *WHAT_IF), metavar="NAME",
        help="what if all matrices were stored so: a GGUF format, or awq-g128 (4 bits, groups of 128)",
    )  # fmt: skip
    group = parser.add_argument_group("search")
    group.add_argument("--sweep", action="store_true", help="show all of the search, the clock being free as well")
    completes_files(
        group.add_argument(
            "-o", "--output", type=name, metavar="FILE", help="draw the sweep: FILE.png and FILE.svg (needs matplotlib)"
        )
    )


def run(args: Namespace, out: Output) -> int:
    from ..fpga.step import Step
    from ..fpga.sweep import grid, sweep

    part = PARTS[args.part]
    if args.channels and args.channels > part.channels:
        raise UsageError(f"--channels is {args.channels}, and {part.name} has {part.channels}")
    if args.output and not args.sweep:
        raise UsageError("-o draws a sweep; add --sweep")
    config, path = _model(args.model)
    if args.ctx and args.ctx > config.context_length:
        raise UsageError(f"--ctx is {args.ctx}, and the model was made for {config.context_length} tokens")
    ctx = args.ctx or min(512, config.context_length)
    step = Step(config, ctx, args.format, 8 if args.kv == "int8" else 16)
    mhz = args.freq or (None if args.sweep else part.mhz)
    points = grid(step, part, args.channels, args.lanes, mhz, args.attention_units, args.products)
    found = sweep(step, part, points, args.launch_us)
    files: list[Any] = []
    if args.output:
        from ..fpga.plot import draw

        files = draw(found, f"{_stem(path)}, context {ctx}", args.output)
    about = {"model": path, "ctx": ctx, "format": args.format, "kv": args.kv, "launch_us": args.launch_us}
    if args.json:
        document = {**found.document(), "files": files} if args.sweep else found.best.document()
        out.json({**about, **document, **_sources(part)})
    elif args.sweep:
        show_sweep(found, about, out)
        for file in files:
            out.line(f"drawn: {file}")
    else:
        show(found.best, about, out)
    return 0


def _model(wanted: str) -> tuple[ModelConfig, Any]:
    from ..config import ModelConfig
    from ..gguf import GGUFFile
    from ..models import resolve
    from ..progress import ProgressBars

    with ProgressBars() as progress:
        path = resolve(wanted, progress)
    with GGUFFile.open(path) as gguf:
        return ModelConfig.from_gguf(gguf), path


def _stem(path: Any) -> str:
    return path.name.removesuffix(".gguf")


def _sources(part: Part) -> dict[str, Any]:
    """Where the numbers come from."""
    from ..fpga.constants import CONSTANTS
    from ..fpga.parts import FILLABLE

    return {"sources": part.sources, "constants": CONSTANTS, "fillable_shares": FILLABLE}


def show(estimate: Estimate, about: dict[str, Any], out: Output) -> None:
    part = estimate.part
    out.line(f"{part.title}: {estimate.configuration}")
    as_if = f", as if in {about['format']}" if about["format"] else ""
    out.line(f"{_stem(about['model'])}{as_if}, one token at context {about['ctx']}, {about['kv']} KV cache")
    out.line()
    out.table(
        ("calls", "op", "first", "limit", "cycles", "memory", "compute", "depth", "share", "MB", "GB/s"),
        [
            (
                call.count, call.op, call.label, call.limit, f"{call.count * call.cycles:,.0f}", f"{call.memory:,.0f}",
                f"{call.compute:,.0f}", f"{call.depth:,.0f}", f"{call.count * call.cycles / estimate.cycles:.1%}",
                f"{call.count * call.nbytes / 1e6:.1f}",
                f"{call.nbytes * estimate.configuration.mhz / call.cycles / 1e3:.1f}",
            )
            for call in estimate.calls
        ],
        right=("calls", "cycles", "memory", "compute", "depth", "share", "MB", "GB/s"),
    )  # fmt: skip
    out.line()
    summary(estimate, out)


def summary(estimate: Estimate, out: Output) -> None:
    from dataclasses import asdict

    from ..fpga.estimate import LIMITS, UNITS

    part, shares = estimate.part, estimate.shares
    out.line(
        f"step: {estimate.cycles:,.0f} cycles, {estimate.seconds * 1e3:.3g} ms: {estimate.tokens_per_s:.4g} tokens/s,"
        f" {estimate.gb_per_s:.1f} GB/s of the part's {part.gb_per_s:.1f} ({estimate.gb_per_s / part.gb_per_s:.0%})"
    )
    out.line(f"limit: {estimate.limit} ({', '.join(f'{limit} {shares[limit]:.0%}' for limit in LIMITS)} of the cycles)")
    memory = ", ".join(f"{what} {nbytes / 2**20:,.0f} MiB" for what, nbytes in estimate.memory.items())
    out.line(f"memory: {memory} of {part.memory_bytes / 2**20:,.0f} MiB")
    out.line()
    used, chip, may = asdict(estimate.used), asdict(part.chip), asdict(part.fillable)
    out.table(
        ("", *estimate.area, "total", "chip", "of chip", "can fill", "of that"),
        [
            (
                UNITS[kind], *(f"{asdict(area)[kind]:,.0f}" for area in estimate.area.values()), f"{used[kind]:,.0f}",
                f"{chip[kind]:,.0f}", f"{used[kind] / chip[kind]:.0%}", f"{may[kind]:,.0f}",
                f"{estimate.fill[kind]:.0%}",
            )
            for kind in used
        ],
        right=(*estimate.area, "total", "chip", "of chip", "can fill", "of that"),
    )  # fmt: skip


def show_sweep(found: Sweep, about: dict[str, Any], out: Output) -> None:
    from ..fpga.estimate import LIMITS

    part = found.part
    as_if = f", as if in {about['format']}" if about["format"] else ""
    out.line(
        f"{_stem(about['model'])}{as_if}, one token at context {about['ctx']}, {about['kv']} KV cache, on {part.title}"
    )
    out.line(f"{len(found.estimates):,} configurations, {found.fitting:,} fit; nothing smaller is as fast as these:")
    out.line()
    columns = ("channels", "lanes", "products", "MHz", "attention", "tokens/s", "full")
    rows = [
        (
            "best" if e == found.best else "",
            e.configuration.channels,
            e.configuration.lanes,
            e.configuration.products,
            f"{e.configuration.mhz:g}",
            e.configuration.attention_units,
            f"{e.tokens_per_s:.4g}",
            f"{e.share:.0%}",
            e.limit,
            *(f"{share:.0%}" for share in e.shares.values()),
        )
        for e in _with_best(found)
    ]
    out.table(("", *columns, "limit", *LIMITS), rows, right=(*columns, *LIMITS))
    out.line()
    out.line(f"best: {found.best.configuration}")
    summary(found.best, out)


def _with_best(found: Sweep) -> list[Estimate]:
    """The frontier, with the best in its place if a faster one of the same size hides it."""
    chosen = [*found.frontier] if found.best in found.frontier else [*found.frontier, found.best]
    return sorted(chosen, key=lambda e: e.share)
