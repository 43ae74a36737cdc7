"""Draws what compare.py found: how shimmercat and others stand to nginx."""

import statistics

import matplotlib
from matplotlib import pyplot

BASE = "nginx"
OURS = "shimmercat"
COLOURS = {"shimmercat": "#0b7a75", "h2o": "#c8553d", "nghttpd": "#7b5ea7",
           "caddy": "#3a7ca5"}
MARKS = {"h2o": "D", "nghttpd": "s", "caddy": "o"}
INK, FAINT = "#22272e", "#d8dee4"
DOTS_PER_INCH = 144
INCHES_WIDE, INCHES_PER_ROW, INCHES_AROUND = 9.6, 0.32, 1.5
#: blank rows between two groups
GAP = 0.7


def places(rows):
    """Return the height of each row, from above, groups apart."""
    heights, height, last = [], 0, rows[0].group
    for row in rows:
        height += GAP if row.group != last else 0
        last = row.group
        heights.append(height)
        height += 1
    return heights


def draw(figures, path, caption):
    """Write a PNG with a bar for each row of `figures` that has both."""
    matplotlib.use("Agg")
    rows = [row for row in figures.rows()
            if figures.times_as_good(row, OURS, BASE)]
    heights = places(rows)
    pyplot.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    tall = INCHES_AROUND + INCHES_PER_ROW * (heights[-1] + 1)
    figure, axes = pyplot.subplots(figsize=(INCHES_WIDE, tall),
                                   layout="constrained")
    bars(axes, figures, rows, heights)
    others(axes, figures, rows, heights)
    dress(axes, rows, heights)
    figure.suptitle("shimmercat beside nginx, more is better",
                    fontsize=13, fontweight="bold")
    figure.supxlabel(caption, fontsize=7.5, color="#57606a")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def bars(axes, figures, rows, heights):
    """Draw shimmercat's bars, from 1 to where it stands."""
    ratios = [figures.times_as_good(row, OURS, BASE) for row in rows]
    axes.barh(heights, [ratio - 1 for ratio in ratios], left=1, height=0.62,
              color=[COLOURS[OURS] if ratio >= 1 else "#8fbfba"
                     for ratio in ratios], label=OURS, zorder=2)
    for row, height, ratio in zip(rows, heights, ratios, strict=True):
        sign = figures.ratio_mark(row, OURS, BASE)
        axes.annotate(f"{sign}{ratio:.2f}", (ratio, height),
                      xytext=(4 if ratio >= 1 else -4, 0),
                      textcoords="offset points", va="center",
                      ha="left" if ratio >= 1 else "right",
                      fontweight="bold", fontsize=8.5, zorder=4)


def others(axes, figures, rows, heights):
    """Draw a mark for each other server that is known here."""
    for name, mark in MARKS.items():
        ratios = [figures.times_as_good(row, name, BASE) for row in rows]
        known = [(ratio, height) for ratio, height
                 in zip(ratios, heights, strict=True) if ratio]
        if known:
            axes.scatter(*zip(*known, strict=True), marker=mark, s=22,
                         label=name, color=COLOURS[name], zorder=3,
                         edgecolor="white", linewidth=0.5)


def dress(axes, rows, heights):
    """Draw scale, names and legend."""
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.margins(x=0.09)
    axes.grid(axis="x", color=FAINT, linewidth=0.8, zorder=0)
    axes.set_yticks(heights, [row.name for row in rows])
    axes.tick_params(length=0)
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    axes.spines[:].set_visible(False)
    for group in dict.fromkeys(row.group for row in rows):
        held = [height for row, height in zip(rows, heights, strict=True)
                if row.group == group]
        axes.axhspan(held[0] - 0.5, held[-1] + 0.5, color="#f4f6f8",
                     zorder=-1)
        axes.annotate(group, (1.01, statistics.mean(held)),
                      xycoords=("axes fraction", "data"), va="center",
                      rotation=-90 if len(held) > 2 else 0, color="#57606a",
                      fontsize=8.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=4,
                frameon=False)
