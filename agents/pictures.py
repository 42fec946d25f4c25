"""The picture of an evaluation: accuracy against NFE, a policy beside the envelope of all rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.fronts import POLICY, Point, decoding, envelope, reached

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, apart for colour-blind eyes; one shape per family as well.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "h", "d")
LEARNED, GREY = "#D55E00", "#555555"


def plot(rows: Sequence[Point], path: Path, title: str) -> None:
    """Draw the rows into a file; how it is stored says the end of its name."""
    import matplotlib.pyplot as plt

    figure = draw(rows, title)
    figure.savefig(path)
    plt.close(figure)


def draw(rows: Sequence[Point], title: str) -> Figure:
    """Accuracy against NFE: the rules' envelope in grey over thin lines of its families, policies in front.

    A policy that was evaluated with several alphas is one curve per decoding, from its fastest point on. Bars are 95 %
    intervals, of the policies and of the points that make the envelope. Rows of several runs are told apart by their
    ``run``, if they have one.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    axes.set(xlabel="NFE per answer (lower is faster)", ylabel="accuracy", title=title, ylim=(-0.02, 1.04))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _curves(axes, rows)
    _rules(axes, rows)
    # Beside the axes: it covers no point, however many families there are.
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def _curves(axes: Axes, rows: Sequence[Point]) -> None:
    """Policies: a star each, joined where they are one policy at several alphas."""
    curves: dict[tuple[Any, str], list[Point]] = {}
    for row in (row for row in rows if row["family"] == POLICY):
        curves.setdefault((row.get("run"), decoding(row) if "alpha=" in row["name"] else row["name"]), []).append(row)
    names: dict[str, int] = {}
    for (_, how), members in curves.items():
        several = len(members) > 1
        label = f"policy({how}), {len(members)} alphas" if several else members[0]["name"]
        names[label] = names.get(label, 0) + 1
        members.sort(key=lambda row: (row["nfe"], row["accuracy"]))
        style: dict[str, Any] = {
            "color": LEARNED,
            "marker": "*",
            "markersize": 9 if several else 15,
            "linewidth": 2 * several,
        }
        if how.startswith("sampled") or "(sampled" in how:
            style |= {"markerfacecolor": "white", "linestyle": "--" if several else ""}
        _points(axes, members, label if names[label] == 1 else None, zorder=9, **style)


def _rules(axes: Axes, rows: Sequence[Point]) -> None:
    """Rules: what all of them reach together, and each family for itself."""
    front = envelope(rows)
    if not front:
        return
    right = max(row["nfe"] for row in rows)
    x = np.unique([*np.geomspace(front[0]["nfe"], right, 200), *(row["nfe"] for row in front)])
    y = [reached(front, nfe) for nfe in x]  # straight over NFE, which the axis shows as its logarithm
    axes.fill_between(x, y, -0.02, color="#EEEEEE", linewidth=0, zorder=0)
    axes.plot(x, y, color=GREY, linewidth=2.2, label="all rules, two mixed", zorder=5)
    _points(axes, front, None, color=GREY, linewidth=0, zorder=5)
    families = dict.fromkeys(row["family"] for row in rows if row["family"] != POLICY)
    for i, family in enumerate(families):
        members = sorted((row for row in rows if row["family"] == family), key=lambda row: row["nfe"])
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 3.5,
        }
        xs, ys = [row["nfe"] for row in members], [row["accuracy"] for row in members]
        axes.plot(xs, ys, label=family, linewidth=0.8, alpha=0.75, zorder=3, **style)


def _points(axes: Axes, rows: Sequence[Point], label: str | None, **style: Any) -> None:
    x, y = [row["nfe"] for row in rows], [row["accuracy"] for row in rows]
    down = [row["accuracy"] - row["accuracy_low"] for row in rows]
    up = [row["accuracy_high"] - row["accuracy"] for row in rows]
    axes.errorbar(x, y, yerr=(np.abs(down), np.abs(up)), label=label, elinewidth=1, **style)
