"""An evaluation: every decider on the same examples, accuracy and NFE with confidence intervals, tables and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from agents.fronts import POLICY, Point, around, by_run, decoding, envelope, policy_rewards, reached, sentences
from agents.pictures import plot
from dllm_gym.runs.files import noted, read

if TYPE_CHECKING:  # who reads and draws results needs no torch
    from torch import Tensor

    from agents.generations import Lab
    from agents.rollout import Decider, Results


@dataclass
class Played:
    """One decider's episodes on one split.

    Attributes:
        results: one per seed, over the same examples. alpha: the one that they were paid by, if it is known.
        length: L, or int64 [E] with templates, as the reward knows it. reward_name: the reward that has alphas.
    """

    results: list[Results]
    alpha: float | None
    length: int | Tensor
    reward_name: Any

    def reward(self, alpha: float | None) -> float:
        """The mean reward; at another alpha than the one it was paid by it follows from score and NFE."""
        return float(np.mean([r.reward.double().mean().item() for r in self.paid_by(alpha).results]))

    def paid_by(self, alpha: float | None) -> Played:
        """The same episodes, paid by another alpha."""
        from dllm_gym.process.rewards import make_reward

        if alpha is None or alpha == self.alpha:
            return self
        pay = make_reward(self.reward_name, alpha)
        results = [replace(r, reward=pay(r.score, r.nfe, self.length)) for r in self.results]
        return replace(self, results=results, alpha=alpha)

    def part(self, places: Sequence[int]) -> Played:
        """The episodes at these places among the examples."""
        length = self.length if isinstance(self.length, int) else self.length[list(places)]
        return replace(self, results=[r.part(places) for r in self.results], length=length)


def play(lab: Lab, deciders: Mapping[str, Decider], examples: Sequence[int], seeds: Sequence[int]) -> dict[str, Played]:
    """Every decider on the same examples, once per seed; what the lab knows already is not played again.

    In an environment with a range of alphas a decider that has an ``alpha`` is paid by it, every other one by that in
    the middle of the range.
    """
    core = lab.env.core
    middle = None if core.alpha_range is None else core.alpha_range.at(0.5)
    fixed: Any = core.config.alpha if core.alpha_range is None and isinstance(core.pay.name, str) else None
    length = core.source.lengths(examples)
    played = {}
    for name, decider in deciders.items():
        alpha = getattr(decider, "alpha", None) or middle
        results = [lab.results(name, decider, examples, seed, alpha) for seed in seeds]
        lab.known.forget()  # of one decider the seeds may be equal; another plays otherwise
        played[name] = Played(results, fixed if alpha is None else alpha, length, core.pay.name)
    return played


def evaluate_rows(
    test: Mapping[str, Played], validation: Mapping[str, Played] | None = None, baseline: str | None = None
) -> list[Point]:
    """One row per decider, in order, and what is chosen among them on the validation split.

    Chosen are, by mean reward there: of a policy's decodings (greedy, or sampled at a temperature) one, over all its
    alphas, and of the rules the best one at the alpha of each policy row, which says how that rule does on these
    examples. ``rules_there`` is what the envelope of all rules reaches at a policy row's NFE, and who makes it up.

    Args:
        baseline: a decider, with which the accuracy of every other one is compared (``difference``, ``p_value``).
    """
    rows = [summary(name, played.results) | {"alpha": played.alpha} for name, played in test.items()]
    front = envelope(rows)
    for row in rows:
        row |= {"validation_reward": None, "chosen": None, "best_rule": None, "best_rule_reward": None}
        own = row["family"] == POLICY and bool(front) and row["nfe"] >= front[0]["nfe"]
        row["rules_there"] = around(front, row["nfe"]) if own else None
        row["rules_there_accuracy"] = reached(front, row["nfe"]) if own else None
        row |= {"difference": None, "p_value": None}
        if baseline is not None and row["name"] != baseline:
            row["difference"], row["p_value"] = paired(test[row["name"]].results, test[baseline].results)
    if validation is not None:
        choose(rows, test, validation)
    return rows


def dataset_rows(test: Mapping[str, Played], datasets: Sequence[str], baseline: str | None = None) -> list[Point]:
    """One row per data set of a mixture and decider, as of :func:`evaluate_rows`, with ``dataset``; none if there is
    only one.

    Args:
        datasets: that of each example, in order.
    """
    places = {name: [i for i, own in enumerate(datasets) if own == name] for name in dict.fromkeys(datasets)}
    if len(places) < 2:
        return []
    return [
        {"dataset": dataset, **row}
        for dataset, own in places.items()
        for row in evaluate_rows({name: played.part(own) for name, played in test.items()}, None, baseline)
    ]


def paired(one: Sequence[Results], other: Sequence[Results], flips: int = 9999) -> tuple[float, float]:
    """By how much one decider is more accurate on the same examples, and the p-value of the difference.

    The test is two-sided: how often the difference would be at least as large if on every example (its mean over the
    seeds) the two deciders were exchanged at random; ``flips`` draws, always the same.
    """
    first, second = (np.array([r.score.double().cpu().numpy() for r in results]).mean(0) for results in (one, other))
    difference = first - second
    apart = difference[difference != 0]
    rng = np.random.default_rng(0)
    least = abs(apart.sum()) - 1e-9
    larger = sum(abs((rng.integers(0, 2, len(apart)) * 2 - 1) @ apart) >= least for _ in range(flips))
    return float(difference.mean()), float((1 + larger) / (1 + flips))


def choose(rows: Sequence[Point], test: Mapping[str, Played], validation: Mapping[str, Played]) -> None:
    """Fill in what :func:`evaluate_rows` chooses."""
    rules = [row["name"] for row in rows if row["family"] != POLICY]
    for row in rows:
        row["validation_reward"] = validation[row["name"]].reward(None)
    decoded = set()
    for own in by_run(rows).values():
        by_decoding = policy_rewards(own, "validation_reward")
        decoded.add(max(by_decoding, key=lambda how: by_decoding[how]))

    @cache
    def best_rule(alpha: float | None) -> str | None:
        return max(rules, key=lambda name: validation[name].reward(alpha)) if rules else None

    for row in rows:
        alpha = test[row["name"]].alpha
        best = best_rule(alpha)
        if row["family"] != POLICY:
            row["chosen"] = row["name"] == best
            continue
        row["chosen"] = decoding(row) in decoded
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


def summary(name: str, results: Sequence[Results]) -> Point:
    """Means of one decider's results over examples and seeds, with 95 % bootstrap intervals.

    Args:
        name: of the decider, ``family(setting)``.
        results: one per seed, over the same examples.
    """
    score = np.mean([r.score.cpu().numpy() for r in results], axis=0)  # (E,), seeds of one example belong together
    nfe = np.mean([r.nfe.cpu().numpy() for r in results], axis=0)
    reward = np.mean([r.reward.cpu().numpy() for r in results], axis=0)
    row: Point = {"name": name, "family": name.partition("(")[0]}
    for label, values in (("accuracy", score), ("nfe", nfe)):
        low, high = bootstrap_interval(values)
        row |= {label: float(values.mean()), f"{label}_low": low, f"{label}_high": high}
    row |= {"reward": float(reward.mean()), "examples": len(score), "seeds": len(results)}
    tokens = [r.tokens for r in results if r.tokens is not None]
    committed = np.mean([t.cpu().numpy() for t in tokens], axis=0).mean() if tokens else None
    row["tokens_per_forward"] = None if committed is None else float(committed / nfe.mean())
    for label in ("score", "nfe", "reward"):
        means = [getattr(r, label).double().mean().item() for r in results]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
        row["accuracy_sd" if label == "score" else f"{label}_sd"] = spread
    return row


def bootstrap_interval(values: np.ndarray, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [E]; the same data always give the same ends."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def shown(row: Point) -> dict[str, str]:
    """A row for people."""
    texts = {"dataset": row["dataset"]} if "dataset" in row else {}
    texts |= {
        "decider": row["name"],
        "accuracy": f"{row['accuracy']:.3f}",
        "95 %": f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}",
        "NFE": f"{row['nfe']:.2f}",
        "tok/fwd": number_or_blank(row.get("tokens_per_forward"), 2),
        "reward": f"{row['reward']:.3f}",
    }
    for name in ("accuracy", "reward"):  # over the seeds
        texts[name] += f" ± {row[f'{name}_sd']:.3f}" if row.get(f"{name}_sd") else ""
    if row.get("difference") is not None:
        texts["difference"] = f"{row['difference']:+.3f} (p = {row['p_value']:.2g})"
    return texts


def number_or_blank(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(rows: Sequence[Point], title: str) -> Table:
    """The rows for a terminal, in their order."""
    texts = [shown(row) for row in rows]
    result = Table(title=title)
    names = dict.fromkeys(name for text in texts for name in text)
    for name in names:
        words = name in ("dataset", "decider")
        result.add_column(name, justify="left" if words else "right", no_wrap=words)
    for text in texts:
        result.add_row(*(text.get(name, "") for name in names))
    return result


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of texts as a table in Markdown; a row may lack columns of others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def fronts_shown(fronts: Sequence[Point]) -> list[dict[str, str]]:
    """What is said of whole curves, for people."""
    names = {"aup": "AUP", "area": "area", "area_log": "area over log NFE"}
    digits = {"aup": 1, "area": 3, "area_log": 3}
    return [
        {"front": row["front"], "points": str(row["points"])}
        | {title: number_or_blank(row.get(name), digits[name]) for name, title in names.items()}
        for row in fronts
    ]


def write_csv(rows: Sequence[Point], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(rows: Sequence[Point], path: Path) -> None:
    path.write_text(json.dumps(list(rows), indent=2) + "\n")


def save_report(
    rows: Sequence[Point], folder: Path, title: str, fronts: Sequence[Point] = (), datasets: Sequence[Point] = ()
) -> None:
    """Write results.csv, results.md, results.png, fronts.json and datasets.{csv,json} (where there are any) and, last,
    results.json.

    Each appears whole or not at all. ``fronts``: of :func:`~agents.fronts.front_rows`; ``datasets``: of
    :func:`dataset_rows`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fronts.json", "datasets.csv", "datasets.json"):  # of an evaluation before, which had some
        (folder / name).unlink(missing_ok=True)
    parts = [f"# {title}\n", markdown([shown(row) for row in rows])]
    if fronts:
        parts.append(markdown(fronts_shown(fronts)))
        noted(folder / "fronts.json", partial(write_json, fronts))
    if datasets:
        parts.append(markdown([shown(row) for row in datasets]))
        noted(folder / "datasets.csv", partial(write_csv, datasets))
        noted(folder / "datasets.json", partial(write_json, datasets))
    parts.append("".join(f"- {sentence}\n" for sentence in sentences(rows)))
    noted(folder / "results.csv", partial(write_csv, rows))
    noted(folder / "results.md", lambda path: path.write_text("\n".join(part for part in parts if part)))
    noted(folder / "results.png", lambda path: plot(rows, path, title))
    noted(folder / "results.json", partial(write_json, rows))


def read_points(path: Path, numbers: Sequence[str]) -> list[Point]:
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
