"""Several training runs and evaluations as one table: a row per setting, means and spreads over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation import read_points
from agents.fronts import POLICY, by_run, decoding
from agents.runs.strangers import Allowed, read_config, read_overrides
from dllm_gym.runs.files import read

MEASURED = ("accuracy", "nfe", "reward", "episodes", "row_forwards", "minutes")
# Settings that change how fast a run is or what is written about it, not what it learns.
ASIDE: tuple[str, ...] = ("seed", "resume", "device", "threads", "checkpoint_every", "checkpoint_minutes")
ASIDE += ("checkpoints", "trust", "heuristics", "logger")


@dataclass
class Run:
    """A finished run, or a policy or the best rule of an evaluation.

    Attributes:
        folder: where it lies. seed: its seed; of an evaluation, which has some of its own, 0.
        config: its resolved configuration without what does not change its outcome.
        choices: what was chosen on its command line, ``name -> value``, without the same.
        measured: the entries of ``MEASURED``; NaN for what an evaluation does not know of a training.
    """

    folder: Path
    seed: int
    config: dict[str, Any]
    choices: dict[str, str]
    measured: dict[str, float]


def read_runs(folders: Iterable[str | Path], evaluated: str, allowed: Allowed | None = None) -> list[Run]:
    """Every finished run of scripts/train.py below ``folders``, and what every evaluation there has evaluated.

    Args:
        allowed: what their configurations may name.
        evaluated: which evaluation of the policy counts: ``"greedy"``, ``"sampled"``, or ``"best"``: the one of more
            reward, on the validation split where the run has that.

    Raises:
        ValueError: no finished run there, one is damaged or may not be read, or ``evaluated`` is none of these.
    """
    if evaluated not in ("greedy", "sampled", "best"):
        raise ValueError(f"evaluated={evaluated!r} is not valid: greedy, sampled or best")
    paths = sorted({path.parent for folder in folders for path in Path(folder).rglob("results.json")})
    paths = [path for path in paths if (path / "config.yaml").exists()]
    if not paths:
        raise ValueError(f"runs={[str(f) for f in folders]}: no finished run of scripts/train.py or evaluate.py below")
    allowed = allowed or Allowed()
    return [
        run
        for path in paths
        for run in (
            [read_run(path, evaluated, allowed)]
            if (path / "metrics.csv").exists()
            else read_evaluation(path, evaluated, allowed)
        )
    ]


def read_run(folder: Path, evaluated: str, allowed: Allowed) -> Run:
    config, choices = read_settings(folder, allowed)
    seed = config.get("seed")
    if not isinstance(seed, int):
        raise ValueError(f"{folder / 'config.yaml'} has no seed: it is of no run of scripts/train.py")
    outcome = {name: value for name, value in config.items() if name not in ASIDE}
    return Run(folder, seed, outcome, choices, measure(folder, evaluated))


def read_evaluation(folder: Path, evaluated: str, allowed: Allowed) -> list[Run]:
    """The policies of an evaluation, and its best rule by reward (on validation, if it has chosen one there)."""
    path = folder / "results.json"
    config, choices = read_settings(folder, allowed)
    outcome = {name: value for name, value in config.items() if name not in ASIDE}
    rows = read_points(path, ("accuracy", "nfe", "reward"))
    found = {}
    for run, own in by_run(rows).items():
        found[f"{POLICY}({run})" if run else POLICY] = played_best(own, evaluated, path)
    if rules := [row for row in rows if row["family"] != POLICY]:
        best = max(rules, key=lambda row: (bool(row.get("chosen")), row["reward"]))
        found[best["name"]] = best
    nothing = dict.fromkeys(("episodes", "row_forwards", "minutes"), math.nan)
    return [
        Run(
            folder,
            0,
            {**outcome, "decider": name},
            {**choices, "decider": name},
            {**{each: row[each] for each in ("accuracy", "nfe", "reward")}, **nothing},
        )
        for name, row in found.items()
    ]


def read_settings(folder: Path, allowed: Allowed) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of a folder, and what of it was chosen on the command line."""
    config = read_config(folder / "config.yaml")
    allowed.check(config, folder / "config.yaml")
    read(folder / "config.yaml")  # is what its manifest says
    overrides = folder / ".hydra" / "overrides.yaml"
    lines = read_overrides(overrides) if overrides.exists() else []
    pairs = (line.lstrip("+~").partition("=") for line in lines)
    return config, {name: value for name, _, value in pairs if name.partition(".")[0] not in ASIDE}


def measure(folder: Path, evaluated: str) -> dict[str, float]:
    """Accuracy, NFE and reward of a run's policy, and what its training took."""
    path = folder / "results.json"
    row = played_best(read_points(path, ("accuracy", "nfe", "reward")), evaluated, path)
    total = totals(folder / "metrics.csv", ("episodes", "row_forwards", "seconds"))
    return {
        **{name: row[name] for name in ("accuracy", "nfe", "reward")},
        **{name: total[name] for name in ("episodes", "row_forwards")},
        "minutes": total["seconds"] / 60,
    }


def played_best(rows: Sequence[dict[str, Any]], evaluated: str, path: Path) -> dict[str, float]:
    """A policy's accuracy, NFE and reward as it was ``evaluated``; ``path``: where the rows are from."""
    by_decoding: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["name"].startswith(f"{POLICY}(")):
        by_decoding.setdefault(decoding(row), []).append(row)
    wanted = ("greedy", "sampled") if evaluated == "best" else (evaluated,)
    played = [own for name, own in by_decoding.items() if name.startswith(wanted)]
    if not played:
        raise ValueError(f"{path} holds no policy({' or '.join(wanted)}), which evaluated={evaluated} asks for")
    means = []
    for own in played:
        column = "reward" if own[0].get("validation_reward") is None else "validation_reward"
        means.append({**mean_of(own), "won": sum(row[column] for row in own) / len(own)})
    return max(means, key=lambda row: row["won"])


def totals(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Sums over the rounds of a metrics.csv."""
    text = read(path)
    try:
        rounds = list(csv.DictReader(io.StringIO(text), strict=True))
        return {name: sum(float(r[name]) for r in rounds) for name in names}
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it lacks a number for {', '.join(names)} ({error})") from error


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row, or the mean over the alphas that a policy was evaluated with."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("accuracy", "nfe", "reward")}


@dataclass
class OverSeeds:
    """Runs that differ in their seed only.

    Attributes:
        label: the choices in which the rows of the table differ. seeds: how many different ones.
        mean, deviation: of the entries of ``MEASURED`` over the seeds (standard deviation; NaN for one seed).
    """

    label: dict[str, str]
    seeds: int
    mean: dict[str, float]
    deviation: dict[str, float]


def over_seeds(runs: Sequence[Run]) -> list[OverSeeds]:
    """One row per configuration, more reward first where all were paid by the same reward.

    Raises:
        ValueError: one configuration was run twice with the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    labels = label([members[0] for members in groups.values()])
    rows = [summarise(members, text) for members, text in zip(groups.values(), labels, strict=True)]
    comparable = len({json.dumps(run.config["reward"], sort_keys=True) for run in runs}) == 1
    return sorted(rows, key=lambda row: -row.mean["reward"]) if comparable else rows


def label(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The choices that tell one run per configuration apart; their folders as well where choices do not suffice."""
    names = dict.fromkeys(name for run in runs for name in run.choices)
    differing = [name for name in names if len({run.choices.get(name) for run in runs}) > 1]
    labels = [{name: run.choices.get(name, "") for name in differing} for run in runs]
    if len({tuple(text.values()) for text in labels}) < len(labels):
        labels = [{**text, "run": run.folder.name} for text, run in zip(labels, runs, strict=True)]
    return labels


def summarise(runs: Sequence[Run], text: dict[str, str]) -> OverSeeds:
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = sorted(str(run.folder) for run in runs if seeds.count(run.seed) > 1)
        raise ValueError(f"the same configuration and seed twice: {', '.join(twice)}; name the runs one by one")
    columns = {name: [run.measured[name] for run in runs] for name in MEASURED}
    deviation = {name: float(np.std(c, ddof=1)) if len(c) > 1 else float("nan") for name, c in columns.items()}
    return OverSeeds(text, len(seeds), {name: float(np.mean(c)) for name, c in columns.items()}, deviation)


def as_numbers(row: OverSeeds) -> dict[str, Any]:
    """A row for a file."""
    spread = {f"{name}_sd": row.deviation[name] for name in ("accuracy", "nfe", "reward")}
    return {**row.label, "seeds": row.seeds, **{f"mean_{n}": v for n, v in row.mean.items()}, **spread}


def as_text(row: OverSeeds) -> dict[str, str]:
    """A row for people."""

    def spread(name: str, digits: int) -> str:
        deviation = "" if np.isnan(row.deviation[name]) else f" ± {row.deviation[name]:.{digits}f}"
        return f"{row.mean[name]:.{digits}f}{deviation}"

    def count(name: str, form: str = ",.0f") -> str:
        return "" if np.isnan(row.mean[name]) else f"{row.mean[name]:{form}}"

    return row.label | {
        "seeds": str(row.seeds),
        "accuracy": spread("accuracy", 3),
        "NFE": spread("nfe", 2),
        "mean reward": spread("reward", 3),
        "episodes": count("episodes"),
        "forwards": count("row_forwards"),
        "minutes": count("minutes", ",.1f"),
    }
