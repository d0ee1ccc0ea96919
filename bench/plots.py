"""Pictures of a result of `pytest bench`: a roofline, and bars for each op, as PNG and SVG.

    python bench/plots.py bench/results/kernels-opencl.json          beside the file
    python bench/plots.py RESULT.json -o DIR                         elsewhere

One pair of pictures for each device and model in the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernelbench.results import Row, duration, rate, read
from polykern.kernels.ops import OPS

# Colours that everybody tells apart (Okabe and Ito, jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, INK, PALE = "#0072B2", "#D55E00", "#009E73", "#22303C", "#8895A1"
KINDS = {"weights": BLUE, "KV cache": ORANGE, "activations only": GREEN}
MARKERS = "o^sDvP"
MOST = 1.12  # of the roofline: where a bar ends in an arrow. What fits a cache is faster than memory.
SHADES = ("#9CC9E8", "#3E93C9", "#0B4F7D", "#062B45", "#041A2A")

# Where a label may stand beside its point, in points: to the right of it if there is room.
OFFSETS = (
    (8, -3, "left"), (-8, -3, "right"), (6, 7, "left"), (6, -13, "left"), (-6, 7, "right"), (-6, -13, "right"),
    (0, 11, "center"), (0, -17, "center"),
)  # fmt: skip

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "svg.hashsalt": "polykern", "figure.dpi": 150, "savefig.dpi": 150,
    "figure.facecolor": "white",
}  # fmt: skip


def kind_of(row: Row) -> str:
    """What a call reads beside activations, from its op's declaration."""
    op = OPS.get(row.op)
    params = op.params if op else ()
    if any(param.role == "weight" for param in params):
        return "weights"
    return "KV cache" if any("pages" in param.axes for param in params) else "activations only"


def label_of(row: Row) -> str:
    """What tells a row from the others of its op and M: where it stands, its context, or its shape."""
    shape = row.shape.replace("x", "×")
    if row.context:
        return f"context {row.context}"
    return row.what if " " in shape and row.what else shape


def headline(document: Mapping[str, Any], device: Mapping[str, Any], model: str) -> tuple[str, str]:
    """(title, what stands below it): backend and model; device, driver, date, commit."""
    commit = (document.get("commit") or f"polykern {document['versions'].get('polykern', 'unknown')}")[:12]
    host = document["host"]
    where = device["device"] if host["model"] in device["device"] else f"{device['device']} on {host['model']}"
    below = f"{where}, {host['usable']} threads   ·   {document['date'][:10]}   ·   {commit}"
    return f"{device['backend']} kernels in the shapes of the {model} model", below


def titled(figure: Any, title: str, below: str, top: float) -> None:
    """The head of a figure, its upper edge at `top` inches from the top."""
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - top / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, 1 - (top + 0.3) / height, below, fontsize=9, color=PALE, va="top")


def roofline(rows: Sequence[Row], device: Mapping[str, Any], title: str, below: str) -> Any:
    """Arithmetic per byte against speed, under what memory and arithmetic allow."""
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(figsize=(10, 6.6))
    figure.subplots_adjust(left=0.075, right=0.975, top=0.88, bottom=0.09)
    titled(figure, f"Roofline: {title}", below, 0.18)
    timed = [row for row in rows if row.gop_per_s and row.flops]
    x = np.array([row.flops / row.bytes for row in timed])
    y = np.array([row.gop_per_s for row in timed])
    low, high = x.min() / 3, x.max() * 4
    peaks, bandwidth = device["peak_gop_per_s"], device["read_gb_per_s"]
    top = max([y.max(), *peaks.values()])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(y.min() / 2, top * 3))
    axes.grid(which="major", color="#E6EAED", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel="operations per byte", ylabel="Gop/s")
    roof = draw_roof(axes, bandwidth, peaks, low, high) if bandwidth else []
    markers = {tokens: MARKERS[i % len(MARKERS)] for i, tokens in enumerate(sorted({row.tokens for row in timed}))}
    for row, px, py in zip(timed, x, y, strict=True):
        axes.plot(
            px, py, markers[row.tokens], color=KINDS[kind_of(row)], markersize=7.5, alpha=0.85,
            markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
    legend_kinds = [Line2D([], [], marker="o", linestyle="", color=c, markersize=7) for c in KINDS.values()]
    legend_rows = [Line2D([], [], marker=m, linestyle="", color=PALE, markersize=7) for m in markers.values()]
    names = [*KINDS, *(f"M {tokens}" if tokens else "no M" for tokens in markers)]
    axes.legend(
        [*legend_kinds, *legend_rows], names, loc="lower right", ncols=2, frameon=True, framealpha=0.95,
        edgecolor="#E6EAED", borderpad=0.8,
    )  # fmt: skip
    # Calls that take longest first: where labels would overlap, theirs stay.
    order = sorted(range(len(timed)), key=lambda i: -(timed[i].median_s or 0))
    labels = [(x[i], y[i], f"{timed[i].op} {label_of(timed[i])}") for i in order]
    place_labels(axes, labels, [*zip(x, y, strict=True), *roof])
    return figure


def draw_roof(
    axes: Any, bandwidth: float, peaks: Mapping[str, float], low: float, high: float
) -> list[tuple[float, float]]:
    """The limits as lines with their names; points along them, so that no label is put there."""
    import numpy as np

    top = max(peaks.values())
    axes.plot([low, top / bandwidth], [low * bandwidth, top], color=INK, linewidth=1.6)
    for unit, peak in peaks.items():
        axes.plot([peak / bandwidth, high], [peak, peak], color=INK, linewidth=1.6)
        axes.annotate(
            f"{unit}: {peak:.0f} Gop/s",
            (high, peak),
            (-6, 5),
            textcoords="offset points",
            ha="right",
            fontweight="bold",
        )
    # Along the slope, whose angle on screen depends on the scales.
    ends = axes.transData.transform([(low, low * bandwidth), (top / bandwidth, top)])
    angle = np.degrees(np.arctan2(*(ends[1] - ends[0])[::-1]))
    at = low * 1.15
    axes.annotate(
        f"memory: {bandwidth:.1f} GB/s", (at, at * bandwidth), (0, 6), textcoords="offset points", rotation=angle,
        rotation_mode="anchor", fontweight="bold",
    )  # fmt: skip
    along = np.geomspace(low, high, 300)
    return [(px, min(px * bandwidth, peak)) for peak in peaks.values() for px in along]


def place_labels(axes: Any, labels: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]) -> None:
    """Write the labels that fit, each beside its point, over no other point and no other text."""
    figure = axes.get_figure()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    dots = axes.transData.transform(points)
    taken = [text.get_window_extent(renderer).padded(2) for text in axes.texts]
    taken.append(axes.get_legend().get_window_extent(renderer).padded(4))
    inside, written = axes.get_window_extent(renderer), set[str]()
    for px, py, text in labels:
        if text in written:
            continue
        own = tuple(axes.transData.transform((px, py)))
        for dx, dy, align in OFFSETS:
            drawn = axes.annotate(
                text, (px, py), (dx, dy), textcoords="offset points", ha=align, fontsize=7.5, color="#44525E"
            )
            box = drawn.get_window_extent(renderer).padded(1)
            clear = inside.x0 < box.x0 and box.x1 < inside.x1 and not any(box.overlaps(other) for other in taken)
            if clear and not any(box.padded(6).contains(*dot) for dot in dots if tuple(dot) != own):
                taken.append(box)
                written.add(text)
                break
            drawn.remove()


def bars(rows: Sequence[Row], title: str, below: str) -> Any:
    """A panel for each op, a bar for each of its calls: how much of the roofline it reaches, and in what time."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels: dict[str, list[Row]] = {}
    contract = list(OPS)
    for row in sorted(rows, key=lambda row: contract.index(row.op) if row.op in contract else len(contract)):
        panels.setdefault(row.op, []).append(row)
    bar, head, gap, width, columns = 0.21, 0.34, 0.16, 15.0, 3
    heights = {op: head + bar * len(group) + gap for op, group in panels.items()}
    filled: list[list[str]] = [[] for _ in range(columns)]
    for op in panels:  # each goes where there is most room
        min(filled, key=lambda names: sum(heights[name] for name in names)).append(op)
    body = max(sum(heights[name] for name in names) for names in filled)
    top = 0.85
    figure = plt.figure(figsize=(width, body + top + 0.25))
    height = figure.get_size_inches()[1]
    titled(figure, f"Part of the roofline: {title}", below, 0.18)
    tokens = sorted({row.tokens for row in rows if row.tokens})
    shades = {count: SHADES[min(i, len(SHADES) - 1)] for i, count in enumerate(tokens)} | {0: PALE}
    handles = [Patch(color=shades[count], label=f"M {count}") for count in tokens]
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.99, 1 - 0.14 / height), ncols=len(tokens), frameon=False
    )
    figure.text(
        0.985, 1 - 0.5 / height, "dashed: the roofline of that minute", ha="right", va="top", fontsize=8.5, color=PALE
    )
    column = 1 / columns
    for index, names in enumerate(filled):
        edge = height - top
        for op in names:
            group, inches = panels[op], bar * len(panels[op])
            bottom = edge - head - inches
            axes = figure.add_axes((index * column + 0.115, bottom / height, column - 0.125, inches / height))
            draw_panel(axes, op, group, shades)
            edge -= heights[op]
    return figure


def draw_panel(axes: Any, op: str, rows: Sequence[Row], shades: Mapping[int, str]) -> None:
    """Bars up to MOST of the roofline, the figures in columns to their right."""
    for i, row in enumerate(rows):
        place = len(rows) - 1 - i
        axes.text(-0.02, place, label_of(row), ha="right", va="center", fontsize=8)
        if row.median_s is None:
            axes.text(0.02, place, f"{row.status}: {row.reason}"[:70], va="center", fontsize=7.5, color=ORANGE)
            continue
        part = row.fraction or 0.0
        axes.barh(place, min(part, MOST), height=0.74, color=shades[row.tokens])
        if part > MOST:
            axes.plot(MOST, place, ">", color=shades[row.tokens], markersize=7)
        by_memory = row.bound in ("read", "")
        figures = (
            "" if row.fraction is None else f"{part:.0%}",
            duration(row.median_s),
            f"{rate(row.gb_per_s)} GB/s" if by_memory else f"{rate(row.gop_per_s)} Gop/s",
        )
        for text, at in zip(figures, (1.46, 1.86, 2.44), strict=True):
            axes.text(at, place, text, ha="right", va="center", fontsize=8)
    axes.set(xlim=(0, 2.46), ylim=(-0.6, len(rows) - 0.4), yticks=[], xticks=[])
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.spines["bottom"].set_visible(False)
    axes.set_title(op, loc="left", fontsize=10.5, fontweight="bold", pad=4)


def draw(document: Mapping[str, Any], stem: str, folder: Path) -> list[Path]:
    """Write every picture; the files, in order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written: list[Path] = []
    for index, device in enumerate(document["devices"]):
        of_device = [r for r in document["rows"] if (r.backend, r.device) == (device["backend"], device["device"])]
        for model in dict.fromkeys(row.model for row in of_device):
            rows = [row for row in of_device if row.model == model]
            name = f"{stem}-{model}" if len(document["devices"]) == 1 else f"{stem}-{index}-{model}"
            title, below = headline(document, device, model)
            with plt.rc_context(STYLE):
                figures = {"bars": bars(rows, title, below)}
                if any(row.flops and row.gop_per_s for row in rows):
                    figures["roofline"] = roofline(rows, device, title, below)
            for kind, figure in figures.items():
                for suffix in ("png", "svg"):
                    with plt.rc_context(STYLE):
                        path = folder / f"{name}-{kind}.{suffix}"
                        figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
                    written.append(path)
                plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="plots.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="(default: the folder of RESULT)")
    args = parser.parse_args(argv)
    try:
        document = read(args.result)
        folder = args.output or args.result.parent
        folder.mkdir(parents=True, exist_ok=True)
        written = draw(document, args.result.stem, folder)
    except ImportError as error:
        print(f"plots.py: error: {error}: install the extra `bench`: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"plots.py: error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
