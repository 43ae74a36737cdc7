"""Draws what compare.py found: how shimmercat and others stand to nginx."""

import matplotlib
from figures import GROUPS, MARKS_EXPLAINED
from matplotlib import pyplot

BASE = "nginx"
OURS = "shimmercat"
COLOURS = {"h2o": "#c8553d", "nghttpd": "#7b5ea7", "caddy": "#3a7ca5"}
MARKS = {"h2o": "D", "nghttpd": "s", "caddy": "o"}
BETTER, WORSE, UNKNOWN = "#0b7a75", "#93c5c1", "#dfe3e8"
INK, FAINT, QUIET = "#22272e", "#d0d7de", "#57606a"
DOTS_PER_INCH = 150
INCHES_WIDE, INCHES_PER_ROW, INCHES_AROUND = 8.2, 0.215, 1.4
#: rows that the name of a group takes
NAME_ROWS = 1.4
#: what is outside stands at the border
LEAST, MOST = 1 / 16, 16


def draw(figures, path, caption):
    """Write a PNG with a bar for each row of `figures` that has both."""
    matplotlib.use("Agg")
    rows = [row for row in figures.rows()
            if figures.times_as_good(row, OURS, BASE)]
    heights = places(rows)
    with pyplot.rc_context({
            "font.family": "DejaVu Sans", "font.size": 8.5,
            "text.color": INK, "xtick.color": QUIET, "ytick.color": INK}):
        tall = INCHES_AROUND + INCHES_PER_ROW * (heights[-1] + 1)
        figure, axes = pyplot.subplots(figsize=(INCHES_WIDE, tall),
                                       layout="constrained")
        draw_bars(axes, figures, rows, heights)
        draw_others(axes, figures, rows, heights)
        dress(axes, rows, heights)
        figure.suptitle("shimmercat beside nginx", fontsize=13,
                        fontweight="bold")
        figure.supxlabel(f"{caption}\n{MARKS_EXPLAINED}", fontsize=7,
                         color=QUIET)
        figure.savefig(path, dpi=DOTS_PER_INCH)
        pyplot.close(figure)


def places(rows):
    """Return the place of each row, counted from above, with room for the
    names of the groups."""
    heights, height, last = [], -1, None
    for row in rows:
        height += 1 + (NAME_ROWS if row.group != last else 0)
        last = row.group
        heights.append(height)
    return heights


def bounded(ratio):
    """Return the ratio, or the border that it lies beyond."""
    return min(max(ratio, LEAST), MOST)


def draw_bars(axes, figures, rows, heights):
    """Draw shimmercat's bars, and in a column beside them their values."""
    for row, height in zip(rows, heights, strict=True):
        ratio = figures.times_as_good(row, OURS, BASE)
        sign = figures.ratio_mark(row, OURS, BASE)
        colour = BETTER if ratio >= 1 else WORSE
        axes.barh(height, bounded(ratio) - 1, left=1, height=0.66, zorder=2,
                  color=UNKNOWN if sign == "~" else colour)
        axes.annotate(f"{sign}{ratio:.2f}", (1.075, height), va="center",
                      xycoords=("axes fraction", "data"), ha="right",
                      fontweight="bold", annotation_clip=False,
                      color=BETTER if colour == BETTER and sign != "~"
                      else QUIET)


def draw_others(axes, figures, rows, heights):
    """Draw a mark for each other server that is known here."""
    for name, mark in MARKS.items():
        ratios = [figures.times_as_good(row, name, BASE) for row in rows]
        known = [(bounded(ratio), height) for ratio, height
                 in zip(ratios, heights, strict=True) if ratio]
        if known:
            axes.scatter(*zip(*known, strict=True), marker=mark, s=20,
                         label=name, color=COLOURS[name], zorder=3,
                         edgecolor="white", linewidth=0.6, clip_on=False)


def dress(axes, rows, heights):
    """Draw scale, names and legend."""
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x:g}×" if x >= 1 else f"1/{1 / x:g}")
    axes.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("times as good as nginx: to the right is better",
                    color=INK)
    axes.set_yticks(heights, [row.name for row in rows])
    axes.tick_params(length=0)
    axes.set_ylim(heights[-1] + 0.7, -0.4)
    axes.spines[:].set_visible(False)
    for group in GROUPS:
        held = [height for row, height in zip(rows, heights, strict=True)
                if row.group == group]
        if held:
            axes.annotate(group, (-0.01, held[0] - 1), va="center",
                          ha="right", xycoords=("axes fraction", "data"),
                          fontweight="bold", annotation_clip=False)
    ours = matplotlib.patches.Patch(color=BETTER, label=OURS)
    axes.legend(handles=[ours, *axes.get_legend_handles_labels()[0]],
                loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4,
                frameon=False)
