"""Fronts of accuracy over NFE, and what they say about a policy beside the best of all rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # one decider on one split: the columns of the table
POLICY = "policy"  # the family of what was learned; every other one is of rules


def pareto(points: Iterable[Row]) -> list[Row]:
    """The points that no other point beats: NFE and accuracy both rise strictly from one to the next."""
    front: list[Row] = []
    for point in sorted(points, key=lambda p: (p["nfe"], -p["accuracy"])):
        if not front or point["accuracy"] > front[-1]["accuracy"]:
            front.append(point)
    return front


def reached(front: Sequence[Row], nfe: float) -> float:
    """The accuracy of a front at ``nfe``: linear between its points, that of the last one behind it.

    Left of the first point, where nothing is that fast, it is 0.
    """
    if not front or nfe < front[0]["nfe"]:
        return 0.0
    return float(np.interp(nfe, [p["nfe"] for p in front], [p["accuracy"] for p in front]))


def needed(front: Sequence[Row], accuracy: float) -> float:
    """The least NFE at which a front reaches ``accuracy``; infinity if it never does."""
    if not front or front[-1]["accuracy"] < accuracy:
        return math.inf
    return float(np.interp(accuracy, [p["accuracy"] for p in front], [p["nfe"] for p in front]))


def area(front: Sequence[Row], length: float, log: bool = False) -> float:
    """The mean accuracy of a front over NFE in [1, L]: the area below it divided by L - 1.

    Args:
        length: L. log: mean over log NFE instead, which weighs the fast end as the figures show it.
    """
    total = 0.0
    for one, two in zip(front, [*front[1:], {**front[-1], "nfe": length}] if front else [], strict=True):
        (x0, y0), (x1, y1) = ((p["nfe"], p["accuracy"]) for p in (one, two))
        if x1 > x0:
            slope = (y1 - y0) / (x1 - x0)
            # The line y0 + slope (x - x0), integrated over dx or over d log x = dx / x.
            total += (y0 - slope * x0) * math.log(x1 / x0) + slope * (x1 - x0) if log else (x1 - x0) * (y0 + y1) / 2
    return total / (math.log(length) if log else length - 1)


def envelope(rows: Iterable[Row]) -> list[Row]:
    """What all rules reach together, whatever their family and setting: the concave hull of their front.

    Between two of its points lies what a mixture of the two reaches, one for some prompts and the other for the rest.
    So a further rule never lowers it.
    """
    hull: list[Row] = []
    for point in pareto(row for row in rows if row["family"] != POLICY):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def slope(one: Row, other: Row) -> float:
    """The accuracy that an NFE more brings on the way from one point to another."""
    return (other["accuracy"] - one["accuracy"]) / (other["nfe"] - one["nfe"])


def learned(rows: Iterable[Row]) -> list[Row]:
    """The policy's rows; of greedy and sampled those that validation chose, where there was one."""
    own = [row for row in rows if row["family"] == POLICY]
    return [row for row in own if row.get("chosen")] or own


def decoding(row: Row) -> str:
    """``greedy`` or ``sampled``, of a policy's row."""
    return row["name"].removeprefix(POLICY).strip("()").partition(",")[0]


def policy_rewards(rows: Iterable[Row], column: str = "reward") -> dict[str, float]:
    """Mean reward of the policy's rows, greedy and sampled: over alphas, if there are several."""
    found: dict[str, list[float]] = {}
    for row in (row for row in rows if row["family"] == POLICY):
        found.setdefault(decoding(row), []).append(row[column])
    return {how: sum(rewards) / len(rewards) for how, rewards in found.items()}


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows say in words: each policy row beside the envelope of all rules, and beside the best rule by reward.

    Both the rule and the policy's decoding are those that earned most on the validation split, where there was one.
    """
    front = envelope(rows)
    policy = learned(rows)
    if policy and policy[0].get("chosen"):
        yield f"decoding of the policy, chosen on validation: {decoding(policy[0])}"
    for row in policy if front else []:
        yield f"{row['name']}: {row['accuracy']:.3f} at NFE {row['nfe']:.2f}; {beside(front, row)}"
    for row in policy:
        if row.get("best_rule") is not None:
            yield (
                f"best rule by reward on validation: {row['best_rule']}: reward {row['best_rule_reward']:.3f}; "
                f"{row['name']}: {row['reward']:.3f}"
            )
    for row in [] if policy else [row for row in rows if row.get("chosen")]:
        yield (
            f"best rule by reward on validation: {row['name']}: reward {row['reward']:.3f}, {row['accuracy']:.3f} at "
            f"NFE {row['nfe']:.2f}"
        )


def beside(front: Sequence[Row], row: Row) -> str:
    """What the rules' envelope reaches at a row's NFE, and what it needs for the row's accuracy."""
    nfe, accuracy = row["nfe"], row["accuracy"]
    if nfe < front[0]["nfe"]:
        first = front[0]
        there = f"no rule is that fast (the fastest, {first['name']}: {first['accuracy']:.3f} at {first['nfe']:.2f})"
    else:
        best = reached(front, nfe)
        there = f"the best rules there ({around(front, nfe)}): {best:.3f} ({100 * (accuracy - best):+.1f} points)"
    cost = needed(front, accuracy)
    if math.isinf(cost):
        return f"{there}; no rule reaches that accuracy ({front[-1]['name']} comes to {front[-1]['accuracy']:.3f})"
    return f"{there}; NFE of the rules at that accuracy: {cost:.2f} ({nfe / cost:.2f}x)"


def around(front: Sequence[Row], nfe: float) -> str:
    """The point of a front that lies at ``nfe``, or the two between which it lies."""
    below = [point for point in front if point["nfe"] <= nfe]
    above = front[len(below) :]
    if not above or below[-1]["nfe"] == nfe:
        return below[-1]["name"]
    return f"{below[-1]['name']} mixed with {above[0]['name']}"
