"""An evaluation: every decider on the same examples, accuracy and NFE with confidence intervals, tables and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from agents.fronts import POLICY, Row, decoding, envelope, policy_rewards, reached
from agents.pictures import plot
from dllm_gym.runs.files import noted, read

if TYPE_CHECKING:  # who reads and draws results needs no torch
    from torch import Tensor

    from agents.rollout import Decider, Results
    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


@dataclass
class Played:
    """One decider's episodes on one split.

    Attributes:
        results: one per seed, over the same examples. alpha: the one that they were paid by, if it was chosen.
        length: L, or int64 [E] with templates, as the reward knows it. reward_name: the reward that has alphas.
    """

    results: list[Results]
    alpha: float | None
    length: int | Tensor
    reward_name: Any

    def reward(self, alpha: float | None) -> float:
        """The mean reward; at another alpha than the one it was paid by it follows from score and NFE."""
        from dllm_gym.process.rewards import make_reward

        if alpha is None or alpha == self.alpha:
            rewards = [r.reward for r in self.results]
        else:
            paid = make_reward(self.reward_name, alpha)
            rewards = [paid(r.score, r.nfe, self.length) for r in self.results]
        return float(np.mean([r.double().mean().item() for r in rewards]))


def play(
    env: DLLMUnmaskVectorEnv, deciders: Mapping[str, Decider], examples: Sequence[int], seeds: Sequence[int]
) -> dict[str, Played]:
    """Every decider on the same examples, once per seed.

    In an environment with a range of alphas a decider that has an ``alpha`` is paid by it, every other one by that in
    the middle of the range.
    """
    from agents.rollout import evaluate

    core = env.core
    middle = None if core.alpha_range is None else core.alpha_range.at(0.5)
    length = core.source.lengths(examples)
    length = length if isinstance(length, int) else length.to(env.device)
    played = {}
    for name, decider in deciders.items():
        alpha = getattr(decider, "alpha", None) or middle
        results = [evaluate(env, decider, examples, seed, alpha) for seed in seeds]
        played[name] = Played(results, alpha, length, core.pay.name)
    return played


def evaluate_rows(test: Mapping[str, Played], validation: Mapping[str, Played] | None = None) -> list[Row]:
    """One row per decider, in order, and what is chosen among them on the validation split.

    Chosen are, by mean reward there: of a policy's greedy and sampled decoding one (over all its alphas), and of the
    rules the best one at the alpha of each policy row, which says how that rule does on these examples.
    """
    rows = [summary(name, played.results) for name, played in test.items()]
    for row in rows:
        row |= {"validation_reward": None, "chosen": None, "best_rule": None, "best_rule_reward": None}
    if validation is not None:
        choose(rows, test, validation)
    return rows


def choose(rows: Sequence[Row], test: Mapping[str, Played], validation: Mapping[str, Played]) -> None:
    """Fill in what :func:`evaluate_rows` chooses."""
    rules = [row["name"] for row in rows if row["family"] != POLICY]
    for row in rows:
        row["validation_reward"] = validation[row["name"]].reward(None)
    by_decoding = policy_rewards(rows, "validation_reward")
    decoded = max(by_decoding, key=lambda how: by_decoding[how]) if by_decoding else None

    @cache
    def best_rule(alpha: float | None) -> str | None:
        return max(rules, key=lambda name: validation[name].reward(alpha)) if rules else None

    for row in rows:
        alpha = test[row["name"]].alpha
        best = best_rule(alpha)
        if row["family"] != POLICY:
            row["chosen"] = row["name"] == best
            continue
        row["chosen"] = decoding(row) == decoded
        row["best_rule"], row["best_rule_reward"] = best, None if best is None else test[best].reward(alpha)


def near(played: Mapping[str, Played], within: float) -> list[str]:
    """What is worth playing on: a policy's better decoding by mean reward, and the rules near the rules' envelope.

    Args:
        played: every decider on the validation split. within: how far below the envelope in accuracy is near.
    """
    rows = evaluate_rows(played, played)
    front = envelope(rows)
    best = {row["best_rule"] for row in rows} | {row["name"] for row in rows if row["chosen"]}
    return [
        row["name"]
        for row in rows
        if row["name"] in best or (row["family"] != POLICY and row["accuracy"] >= reached(front, row["nfe"]) - within)
    ]


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
