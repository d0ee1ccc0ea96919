"""The picture of a sweep: speed against how full the part is, what limits a design, the frontier, the chosen one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...kernels.errors import UsageError
from .estimate import LIMITS, UNITS, Estimate, Limit
from .sweep import Sweep

# Colours that everybody tells apart (Okabe and Ito, jfly.uni-koeln.de/color).
COLOURS: dict[Limit, str] = {"memory": "#0072B2", "compute": "#D55E00", "depth": "#009E73"}
NAMES: dict[Limit, str] = {"memory": "memory bandwidth", "compute": "compute", "depth": "pipeline depth"}
INK, PALE, GRID, GOLD = "#22303C", "#8895A1", "#E6EAED", "#E69F00"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "svg.hashsalt": "polykern", "savefig.dpi": 150, "figure.facecolor": "white",
}  # fmt: skip
SUFFIXES = (".png", ".svg")


def draw(sweep: Sweep, subject: str, output: str) -> list[Path]:
    """Write `output` as PNG and as SVG (its suffix does not matter); the two files. UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("-o needs matplotlib: pip install 'polykern[bench]', or leave -o out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stem = Path(output)
    stem = stem.with_suffix("") if stem.suffix in SUFFIXES else stem
    if not stem.parent.is_dir():
        raise UsageError(f"-o: no folder {stem.parent}")
    files = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    with plt.rc_context(STYLE):
        figure = picture(sweep, subject)
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
    return files


def ceiling(sweep: Sweep) -> float:
    """Tokens/s if memory did nothing but stream the bytes of a step, at the rate that was measured for it."""
    return sweep.part.gb_per_s * sweep.part.efficiency * 1e9 / sweep.best.nbytes


def picture(sweep: Sweep, subject: str) -> Any:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(10.5, 7.6))
    figure.subplots_adjust(left=0.075, right=0.97, top=0.735, bottom=0.078)
    title = f"{subject} on {sweep.part.title}"
    figure.text(0.02, 0.968, title, fontsize=min(15.0, 1100 / len(title)), fontweight="bold", va="top")
    figure.text(
        0.02, 0.92,
        f"Estimated decode speed of {len(sweep.estimates):,} designs of the engine, against the part they take up",
        color=PALE, va="top",
    )  # fmt: skip
    widest = max(e.share for e in sweep.estimates)
    right = min(widest, 1.25) * 1.03 if widest > 1 else 1.03
    roof = ceiling(sweep)
    top = max(roof, *(e.tokens_per_s for e in sweep.estimates)) * 1.2
    low = min(e.tokens_per_s for e in sweep.frontier) / 1.8  # what is slower than the smallest design is of no interest
    axes.set(yscale="log", xlim=(0, right), ylim=(low, top), ylabel="tokens per second")
    axes.set_xlabel(
        "how full the part is: the fullest of LUT, FF, DSP, BRAM and URAM, of what can be placed and routed"
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_minor))
    axes.tick_params(axis="y", which="minor", labelsize=7.5, labelcolor=PALE)
    axes.grid(which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhspan(roof, top, color="#F3F5F7", zorder=0)
    axes.axhline(roof, color=INK, linewidth=1.2)
    axes.annotate(
        f"memory does not bring more: {roof:,.4g} tokens/s at {sweep.part.gb_per_s * sweep.part.efficiency:,.4g} GB/s",
        (0.012 * right, roof), (0, 5), textcoords="offset points", fontweight="bold", fontsize=9,
    )  # fmt: skip
    if right > 1.04:
        axes.axvspan(1, right, color="#FBEDE6", zorder=0)
        axes.text(1.008, low * 1.08, "does not fit", color=COLOURS["compute"], fontweight="bold", va="bottom")
    for limit in LIMITS:
        for fits, alpha in ((True, 0.62), (False, 0.16)):
            chosen = [e for e in sweep.estimates if e.limit == limit and (e.share <= 1) == fits]
            axes.scatter(
                [e.share for e in chosen], [e.tokens_per_s for e in chosen], s=20, color=COLOURS[limit], alpha=alpha,
                linewidths=0.4, edgecolors="white", label=NAMES[limit] if fits else None,
            )  # fmt: skip
    x = [e.share for e in sweep.frontier]
    y = [e.tokens_per_s for e in sweep.frontier]
    axes.step([*x, 1.0], [*y, y[-1]], where="post", color=INK, linewidth=1.4, label="nothing smaller is as fast")
    axes.scatter(x, y, s=38, c=[COLOURS[e.limit] for e in sweep.frontier], edgecolors=INK, linewidths=1.1, zorder=4)
    _mark(figure, axes, sweep.best)
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.975, 0.885), frameon=False, fontsize=9,
        title="limited by", alignment="left", markerscale=1.4,
    )  # fmt: skip
    legend.get_title().set_fontweight("bold")
    return figure


def _minor(y: float, _: Any) -> str:
    """2 and 5 of each decade."""
    digit = f"{y:e}"[0]
    return f"{y:,.0f}" if digit in "25" and y >= 1 else ""


def _mark(figure: Any, axes: Any, best: Estimate) -> None:
    """The chosen design: a star where it is, and its numbers above the picture."""
    at = best.configuration
    fullest = max(best.fill, key=lambda kind: best.fill[kind])
    star = {"color": GOLD, "markeredgecolor": INK, "markeredgewidth": 1}
    axes.plot(best.share, best.tokens_per_s, "*", markersize=20, zorder=5, **star)
    filled = ",  ".join(f"{UNITS[kind]} {best.fill[kind]:.0%}" for kind in best.fill)
    lines = (
        str(at).replace(" x ", " × "),
        f"{best.gb_per_s:,.3g} GB/s, {best.gb_per_s / best.part.gb_per_s:.0%} of the data sheet's;"
        f" {NAMES[best.limit]} for {best.shares[best.limit]:.0%} of the time",
        f"filled: {filled}  ({UNITS[fullest]} first)",
    )
    figure.text(
        0.032, 0.858, f"★  {best.tokens_per_s:,.4g} tokens/s", fontsize=13, fontweight="bold", va="center",
        bbox={"boxstyle": "round,pad=0.45", "facecolor": "#FFF3D6", "edgecolor": GOLD},
    )  # fmt: skip
    figure.text(0.03, 0.829, "\n".join(lines), fontsize=9, linespacing=1.5, va="top")
