"""What an evaluation says: accuracy and NFE with confidence intervals, fronts, tables, files and the picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from agents.runs.files import noted, read

if TYPE_CHECKING:  # who reads and draws results needs no torch
    from agents.rollout import Decider, Results
    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

Row = dict[str, Any]  # one decider on one split: the columns of the table


def evaluate_rows(
    env: DLLMUnmaskVectorEnv, deciders: Mapping[str, Decider], examples: Sequence[int], seeds: Sequence[int]
) -> list[Row]:
    """One row per decider, in order: each is evaluated on the same examples, once per seed.

    In an environment with a range of alphas a decider that has an ``alpha`` is paid by it, every other one by that in
    the middle of the range.
    """
    from agents.rollout import evaluate

    middle = None if env.core.alpha_range is None else env.core.alpha_range.at(0.5)
    rows = []
    for name, decider in deciders.items():
        alpha = getattr(decider, "alpha", None) or middle
        rows.append(summary(name, [evaluate(env, decider, examples, seed, alpha) for seed in seeds]))
    return rows


def summary(name: str, results: Sequence[Results]) -> Row:
    """Means of one decider's results over examples and seeds, with 95 % bootstrap intervals.

    Args:
        name: of the decider, ``family(setting)``.
        results: one per seed, over the same examples.
    """
    score = np.mean([r.score.cpu().numpy() for r in results], axis=0)  # (E,), seeds of one example belong together
    nfe = np.mean([r.nfe.cpu().numpy() for r in results], axis=0)
    reward = np.mean([r.reward.cpu().numpy() for r in results], axis=0)
    row: Row = {"name": name, "family": name.partition("(")[0]}
    for label, values in (("accuracy", score), ("nfe", nfe)):
        low, high = bootstrap_interval(values)
        row |= {label: float(values.mean()), f"{label}_low": low, f"{label}_high": high}
    return row | {"reward": float(reward.mean()), "examples": len(score), "seeds": len(results)}


def bootstrap_interval(values: np.ndarray, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [E]; the same data always give the same ends."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def accuracy_at(rows: Sequence[Row], nfe: float) -> float:
    """The accuracy that a family of rows reaches at ``nfe``, linear between neighbours in NFE.

    Outside the family's range its nearest end counts.
    """
    ordered = sorted(rows, key=lambda row: row["nfe"])
    return float(np.interp(nfe, [row["nfe"] for row in ordered], [row["accuracy"] for row in ordered]))


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal, fastest first within their families."""
    result = Table(title=title)
    result.add_column("decider")
    for column in ("accuracy", "95 %", "NFE", "reward"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            row["name"],
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}",
            f"{row['nfe']:.2f}",
            f"{row['reward']:.3f}",
        )
    return result


def comparison(rows: Sequence[Row], family: str = "threshold", policy: str = "policy") -> list[str]:
    """A sentence per policy row: its accuracy beside that of ``family``, interpolated at the policy's NFE."""
    reference = [row for row in rows if row["family"] == family]
    if not reference:
        return []
    sentences = []
    for row in (row for row in rows if row["family"] == policy):
        other = accuracy_at(reference, row["nfe"])
        sentences.append(
            f"{row['name']}: {row['accuracy']:.3f} at NFE {row['nfe']:.2f}; {family} at that NFE: {other:.3f} "
            f"({100 * (row['accuracy'] - other):+.1f} points)"
        )
    return sentences


def save_report(rows: Sequence[Row], folder: Path, title: str) -> None:
    """Write results.csv, results.png and, last, results.json; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    noted(folder / "results.csv", write_csv)
    noted(folder / "results.png", lambda path: plot(rows, path, title))
    noted(folder / "results.json", lambda path: path.write_text(json.dumps(list(rows), indent=2) + "\n"))


def read_rows(path: Path, numbers: Sequence[str]) -> list[Row]:
    """The rows of a results.json; every one has a ``name`` and these ``numbers``.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    try:
        rows = json.loads(read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no results: it is no list of rows")
    for row in rows:
        for name in numbers:
            if isinstance(row.get(name), bool) or not isinstance(row.get(name), int | float):
                raise ValueError(f"{path} holds no results: {name}={row.get(name)!r} in a row is no number")
        if not isinstance(row.get("name"), str):
            raise ValueError(f"{path} holds no results: a row has no name")
    return rows


# Okabe and Ito's palette, apart for colour-blind eyes; one shape per family as well.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "h", "d")


def plot(rows: Sequence[Row], path: Path, title: str, policy: str = "policy") -> None:
    """Accuracy against NFE: a line per family of heuristics, stars for policies, 95 % intervals as bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150)
    families = [f for f in dict.fromkeys(row["family"] for row in rows) if f != policy]
    for i, family in enumerate(families):
        members = sorted((row for row in rows if row["family"] == family), key=lambda row: row["nfe"])
        _points(
            axes,
            members,
            family,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
        )
    for row, face in zip((r for r in rows if r["family"] == policy), ("#D55E00", "#FFFFFF") * len(rows), strict=False):
        _points(
            axes,
            [row],
            row["name"],
            color="#D55E00",
            marker="*",
            markersize=15,
            markerfacecolor=face,
            linewidth=0,
            zorder=9,
        )
    axes.set(xlabel="NFE per answer (lower is faster)", ylabel="accuracy", title=title, ylim=(-0.02, 1.04))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _points(axes, rows: Sequence[Row], label: str, **style: Any) -> None:
    x, y = [row["nfe"] for row in rows], [row["accuracy"] for row in rows]
    down = [row["accuracy"] - row["accuracy_low"] for row in rows]
    up = [row["accuracy_high"] - row["accuracy"] for row in rows]
    axes.errorbar(x, y, yerr=(np.abs(down), np.abs(up)), label=label, elinewidth=1, **style)
