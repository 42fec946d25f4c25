"""Fronts of accuracy over NFE, and what they say about a policy beside the best of all rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Point = dict[str, Any]  # one decider on one split, accuracy by NFE: the columns of its row of the table
POLICY = "policy"  # the family of what was learned; every other one is of rules


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats: NFE and accuracy both rise strictly from one to the next."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p["nfe"], -p["accuracy"])):
        if not front or point["accuracy"] > front[-1]["accuracy"]:
            front.append(point)
    return front


def reached(front: Sequence[Point], nfe: float) -> float:
    """The accuracy of a front at ``nfe``: linear between its points, that of the last one behind it.

    Left of the first point, where nothing is that fast, it is 0.
    """
    if not front or nfe < front[0]["nfe"]:
        return 0.0
    return float(np.interp(nfe, [p["nfe"] for p in front], [p["accuracy"] for p in front]))


def needed(front: Sequence[Point], accuracy: float) -> float:
    """The least NFE at which a front reaches ``accuracy``; infinity if it never does."""
    if not front or front[-1]["accuracy"] < accuracy:
        return math.inf
    return float(np.interp(accuracy, [p["accuracy"] for p in front], [p["nfe"] for p in front]))


def area(front: Sequence[Point], length: float, log: bool = False) -> float:
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


def aup(points: Iterable[Point], most: float, alpha: float = 3.0) -> float:
    """Accuracy under parallelism, the score of the public leaderboard of dLLMs (d3LLM, aup_utils.py).

    rho_1 y_1 + the sum of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2, with rho the tokens per forward,
    y the accuracy in %, W(y) = min(exp(-alpha (1 - y / y_max)), 1), over points with y >= y_1 - 5.

    Args:
        points: with ``tokens_per_forward``. most: the largest accuracy that anybody reaches, in [0, 1]: y_max / 100.
    """
    curve = sorted((p["tokens_per_forward"], 100 * p["accuracy"]) for p in points)
    if not curve or most <= 0:
        return 0.0
    curve = [(rho, y) for rho, y in curve if y >= curve[0][1] - 5]
    weighed = [(rho, y * min(math.exp(-alpha * (1 - y / (100 * most))), 1)) for rho, y in curve]
    steps = zip(weighed, weighed[1:], strict=False)
    return curve[0][0] * curve[0][1] + sum((r1 - r0) * (y0 + y1) / 2 for (r0, y0), (r1, y1) in steps)


def front_rows(rows: Sequence[Point], length: float) -> list[Point]:
    """What is said of whole curves: of all rules together, of every family of them, of every decoding of a policy.

    Returns:
        Rows of ``front``, ``points`` (of its front), ``aup``, ``area`` and ``area_log`` (see :func:`area`).
    """
    curves: dict[str, list[Point]] = {}
    for row in rows:
        if row["family"] == POLICY:
            curves.setdefault(f"{POLICY}({decoding(row)})", []).append(row)
        else:
            curves.setdefault("all rules", []).append(row)
            curves.setdefault(row["family"], []).append(row)
    most = max(row["accuracy"] for row in rows)
    found = []
    for name, own in curves.items():
        front = pareto(own)
        score = None if any(row.get("tokens_per_forward") is None for row in own) else aup(front, most)
        sizes = {"area": area(front, length), "area_log": area(front, length, log=True)} if length > 1 else {}
        found.append({"front": name, "points": len(front), "aup": score, **sizes})
    return found


def envelope(rows: Iterable[Point]) -> list[Point]:
    """What all rules reach together, whatever their family and setting: the concave hull of their front.

    Between two of its points lies what a mixture of the two reaches, one for some prompts and the other for the rest.
    So a further rule never lowers it.
    """
    hull: list[Point] = []
    for point in pareto(row for row in rows if row["family"] != POLICY):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def slope(one: Point, other: Point) -> float:
    """The accuracy that an NFE more brings on the way from one point to another."""
    return (other["accuracy"] - one["accuracy"]) / (other["nfe"] - one["nfe"])


def learned(rows: Iterable[Point]) -> list[Point]:
    """The policy's rows; of greedy and sampled those that validation chose, where there was one."""
    own = [row for row in rows if row["family"] == POLICY]
    return [row for row in own if row.get("chosen")] or own


def decoding(row: Point) -> str:
    """Of a policy's row all but its alpha: ``greedy`` or ``sampled``, and where there are several, of which run, and at
    which temperature."""
    return ", ".join(part for part in _parts(row) if not part.startswith("alpha="))


def by_run(rows: Iterable[Point]) -> dict[str, list[Point]]:
    """The policies' rows by the run that they are of, if several were evaluated together (else "")."""
    found: dict[str, list[Point]] = {}
    for row in (row for row in rows if row["family"] == POLICY):
        run = next((part for part in _parts(row) if part.startswith("run=")), "")
        found.setdefault(run.removeprefix("run="), []).append(row)
    return found


def _parts(row: Point) -> list[str]:
    return row["name"].removeprefix(POLICY).removeprefix("(").removesuffix(")").split(", ")


def policy_rewards(rows: Iterable[Point], column: str = "reward") -> dict[str, float]:
    """Mean reward of the policy's rows by decoding: over alphas, if there are several."""
    found: dict[str, list[float]] = {}
    for row in (row for row in rows if row["family"] == POLICY):
        found.setdefault(decoding(row), []).append(row[column])
    return {how: sum(rewards) / len(rewards) for how, rewards in found.items()}


def sentences(rows: Sequence[Point]) -> Iterator[str]:
    """What the rows say in words: each policy row beside the envelope of all rules, and beside the best rule by reward.

    Both the rule and the policy's decoding are those that earned most on the validation split, where there was one.
    """
    front = envelope(rows)
    policy = learned(rows)
    if policy and policy[0].get("chosen"):
        chosen = dict.fromkeys(decoding(row) for row in policy)
        yield f"decoding of the policy, chosen on validation: {'; '.join(chosen)}"
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


def beside(front: Sequence[Point], row: Point) -> str:
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


def around(front: Sequence[Point], nfe: float) -> str:
    """The point of a front that lies at ``nfe``, or the two between which it lies."""
    below = [point for point in front if point["nfe"] <= nfe]
    above = front[len(below) :]
    if not above or below[-1]["nfe"] == nfe:
        return below[-1]["name"]
    return f"{below[-1]['name']} mixed with {above[0]['name']}"
