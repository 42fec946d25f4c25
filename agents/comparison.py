"""Several training runs as one table: a row per setting, means and spreads over seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = dict[str, Any]
MEASURED = ("accuracy", "nfe", "reward", "episodes", "row_forwards", "minutes")


def read_runs(folders: Iterable[str | Path], evaluated: str) -> list[Run]:
    """Every finished run below ``folders``: the settings that differ between them, its seed and what it measured.

    Args:
        evaluated: which evaluation of the policy counts: ``"greedy"``, ``"sampled"``, or ``"best"`` (more reward).

    Raises:
        ValueError: no finished run there, or a run without such a row.
    """
    paths = sorted({path.parent for folder in folders for path in Path(folder).rglob("results.json")})
    paths = [path for path in paths if (path / "metrics.csv").exists()]
    if not paths:
        raise ValueError(f"runs={[str(f) for f in folders]}: no finished run of scripts/train.py below")
    choices = [choices_of(path) for path in paths]
    names = [n for n in dict.fromkeys(n for c in choices for n in c) if n != "seed"]
    differing = [n for n in names if len({c.get(n, "") for c in choices}) > 1]
    return [
        {**{n: c.get(n, "") for n in differing}, "seed": c.get("seed", ""), **measured(path, evaluated)}
        for path, c in zip(paths, choices, strict=True)
    ]


def choices_of(run: Path) -> dict[str, str]:
    """What the user chose on the command line or in the sweep, ``name -> value``."""
    import yaml

    lines = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text()) or []
    pairs = (line.lstrip("+~").partition("=") for line in lines)
    return {name: value for name, _, value in pairs if not name.startswith("hydra.")}


def measured(run: Path, evaluated: str) -> dict[str, float]:
    """Accuracy, NFE and reward of a run's policy, and what its training took."""
    rows = json.loads((run / "results.json").read_text())
    names = [f"policy({how})" for how in ("greedy", "sampled") if evaluated in (how, "best")]
    chosen = [row for row in rows if row["name"] in names]
    if not chosen:
        raise ValueError(f"evaluated={evaluated!r}: {run} has {', '.join(row['name'] for row in rows)}")
    row = max(chosen, key=lambda row: row["reward"])
    with (run / "metrics.csv").open(newline="") as file:
        rounds = list(csv.DictReader(file))
    total = {name: sum(float(r[name]) for r in rounds) for name in ("episodes", "row_forwards", "seconds")}
    return {
        **{name: row[name] for name in ("accuracy", "nfe", "reward")},
        **{name: total[name] for name in ("episodes", "row_forwards")},
        "minutes": total["seconds"] / 60,
    }


def over_seeds(runs: Sequence[Run]) -> list[Run]:
    """Means over the runs that differ in their seed only, with the standard deviation of accuracy, NFE and reward."""
    settings = [n for n in runs[0] if n not in (*MEASURED, "seed")]
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[n] for n in settings), []).append(run)
    table = []
    for key, members in groups.items():
        row: Run = dict(zip(settings, key, strict=True)) | {"seeds": len(members)}
        for name in MEASURED:
            values = [member[name] for member in members]
            row[name] = float(np.mean(values))
            if name in ("accuracy", "nfe", "reward"):
                row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        table.append(row)
    return sorted(table, key=lambda row: -row["reward"])


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of ``over_seeds`` for people."""

    def spread(name: str, digits: int) -> str:
        deviation = "" if np.isnan(row[f"{name}_sd"]) else f" ± {row[f'{name}_sd']:.{digits}f}"
        return f"{row[name]:.{digits}f}{deviation}"

    settings = {n: str(v) for n, v in row.items() if isinstance(v, str)}
    return settings | {
        "seeds": str(row["seeds"]),
        "accuracy": spread("accuracy", 3),
        "NFE": spread("nfe", 2),
        "reward": spread("reward", 3),
        "episodes": f"{row['episodes']:,.0f}",
        "forwards": f"{row['row_forwards']:,.0f}",
        "minutes": f"{row['minutes']:.1f}",
    }
