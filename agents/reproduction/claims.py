"""What the runs of scripts/reproduce.py show: one tidy table, fronts, areas, and the papers' claims with verdicts.

A *point* is a row with ``nfe`` and ``accuracy``; the *front* of a family of points are those that no other point of the
family beats, joined by straight lines in NFE. Left of its first point a front reads 0 (the family is never that fast),
right of its last one the best accuracy holds (who may take more forwards need not).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation import read_points
from agents.fronts import Point, area, envelope, needed, pareto, reached
from dllm_gym.runs.files import atomically

LABELS = ("task", "env", "world", "trained_on", "kind", "family", "setting", "alpha", "seed", "decode", "split")
MEASURED = ("accuracy", "accuracy_low", "accuracy_high", "nfe", "nfe_low", "nfe_high", "reward")
COLUMNS = (*LABELS, "length", *MEASURED, "examples")
TEXTS = {"task", "env", "world", "trained_on", "kind", "family", "setting", "decode", "split"}
LEARNED = ("policy", "conditioned")  # one policy per alpha; one that is told its alpha
# Families of heuristics that the claims are about (those of LUP and Fast-dLLM); they are also measured against all.
PAPERS = ("random", "top_k", "margin", "entropy", "threshold", "factor")
POLICY = re.compile(r"policy\((greedy|sampled)(?:, alpha=([^)]+))?\)")  # the name of a policy's row

# The table


def read_results(folder: Path, labels: Mapping[str, Any]) -> list[Point]:
    """The rows of a run's results.json, as rows of the table.

    Args:
        labels: of the run; entries of ``LABELS`` and ``length`` (L). What a row's name says (family and setting of a
            heuristic; decoding and, where the policy is told it, alpha) is added.
    """
    rows = []
    for result in read_points(folder / "results.json", (*MEASURED, "examples")):
        row = {**dict.fromkeys(COLUMNS), **{name: result[name] for name in (*MEASURED, "examples")}, **labels}
        if policy := POLICY.fullmatch(result["name"]):
            row["decode"], row["alpha"] = policy[1], float(policy[2] or labels["alpha"])
        else:  # its reward would be that of an alpha which it knows nothing of
            family, _, setting = result["name"].removesuffix(")").partition("(")
            row |= {"family": family, "setting": setting, "alpha": None, "reward": None}
        rows.append(row)
    return rows


def write_table(rows: Sequence[Point], path: Path) -> None:
    """The table as CSV, in the order of ``rows``; numbers to six decimals, blank where something does not apply."""

    def write(file: Path) -> None:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    atomically(path, write)


def read_table(path: Path) -> list[Point]:
    """What :func:`write_table` wrote."""

    def value(name: str, text: str) -> Any:
        if name in TEXTS or not text:
            return text or None
        return int(text) if name in ("seed", "examples", "length") else float(text)

    with path.open(newline="") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def group_by(rows: Iterable[Point], *names: str) -> dict[tuple, list[Point]]:
    """Rows that agree in the columns ``names``, groups and rows in the order of their first appearance."""
    groups: dict[tuple, list[Point]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def over_seeds(rows: Iterable[Point]) -> list[Point]:
    """Means of rows that differ in their seed only.

    Ends of intervals are averaged as well: the seeds share their examples, so the interval of the mean over seeds is at
    most as wide as that. ``accuracy_sd``, ``nfe_sd`` are the standard deviations over the ``seeds`` (NaN of one).
    """
    result = []
    for members in group_by(rows, *(name for name in LABELS if name != "seed")).values():
        values = {name: [row[name] for row in members] for name in MEASURED}
        mean = {name: None if None in v else float(np.mean(v)) for name, v in values.items()}
        spread = {
            f"{n}_sd": float(np.std(values[n], ddof=1)) if len(members) > 1 else math.nan for n in ("accuracy", "nfe")
        }
        result.append({**members[0], **mean, **spread, "seed": None, "seeds": len(members)})
    return result


def better_decoding(rows: Sequence[Point]) -> list[Point]:
    """The test rows, of every policy those of one decoding: of greedy and sampled the one with more mean reward over
    the seeds on the *validation* split of what the policy was trained on."""
    names = ("trained_on", "env", "family", "alpha")
    best = {
        key: max(group_by(members, "decode").items(), key=lambda item: np.mean([row["reward"] for row in item[1]]))[0][
            0
        ]
        for key, members in group_by((row for row in rows if row["split"] == "validation"), *names).items()
    }
    test = [row for row in rows if row["split"] == "test"]
    return [row for row in test if row["kind"] == "heuristic" or row["decode"] == best[tuple(row[n] for n in names)]]


# Fronts


@dataclass(frozen=True)
class Best:
    """The best heuristic at an NFE: its family, its accuracy there, and the lower end of its interval."""

    family: str
    accuracy: float
    low: float


@dataclass
class Cell:
    """What was measured in one task and env.

    Attributes:
        length: L.
        heuristics: family -> all its points. learned: ``"policy"``, ``"conditioned"`` and controls -> a point per
            alpha, rising.
        seeds: the same per seed, unaveraged.
    """

    task: str
    env: str
    length: float
    heuristics: dict[str, list[Point]] = field(default_factory=dict)
    learned: dict[str, list[Point]] = field(default_factory=dict)
    seeds: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.task}, {words(self.env)}"

    @property
    def full_diffusion(self) -> bool:
        return self.env == "full_diffusion"

    def alone(self, who: str) -> list[list[Point]]:
        """The points of every training seed for itself; none where they were not kept."""
        return list(group_by(self.seeds.get(who, []), "seed").values())

    def against(self, families: Collection[str]) -> Cell:
        """The same with these families of heuristics only."""
        return replace(self, heuristics={name: self.heuristics[name] for name in self.heuristics if name in families})

    def best_heuristic(self, nfe: float) -> Best:
        """Of all families the one whose front is highest at ``nfe``."""
        fronts = {family: pareto(points) for family, points in self.heuristics.items()}
        family = max(fronts, key=lambda name: reached(fronts[name], nfe))
        lower = [{**point, "accuracy": lower_end(point)} for point in fronts[family]]
        return Best(family, reached(fronts[family], nfe), reached(lower, nfe))

    def area(self, points: Sequence[Point], log: bool = False, own: bool = False) -> float:
        """The area below the front of ``points``; see :func:`area`.

        The fastest point of all heuristics belongs to every front: with everything unmasked at once no rule and no
        policy makes a difference. With ``own`` it does not: the front is 0 left of its own first point.
        """
        every = [point for family in self.heuristics.values() for point in family]
        start = [] if own or not every else [min(every, key=lambda p: (p["nfe"], -p["accuracy"]))]
        return area(pareto([*points, *start]), self.length, log)


def lower_end(point: Point) -> float:
    """Of a point's 95 % interval; of the exact binomial one where all are solved (a bootstrap has no width there)."""
    return point["accuracy_low"] if point["accuracy"] < 1 else 0.025 ** (1 / point["examples"])


def words(name: str) -> str:
    """A setting as the page writes it."""
    return name.replace("semi_autoregressive", "semi-autoregressive").replace("_", " ")


def cells(rows: Sequence[Point]) -> list[Cell]:
    """The cells of a table, in its order: heuristics, and policies where they were trained."""
    chosen = [row for row in better_decoding(rows) if row["world"] is None and row["kind"] != "transfer"]
    return [cell_of(members) for members in group_by(chosen, "task", "env").values()]


def cell_of(rows: Sequence[Point]) -> Cell:
    """Test rows of one task and env as a cell."""
    cell = Cell(rows[0]["task"], rows[0]["env"], rows[0]["length"])
    for (family,), points in group_by(rows, "family").items():
        if points[0]["kind"] != "heuristic":
            cell.learned[family] = sorted(over_seeds(points), key=lambda row: row["alpha"])
            cell.seeds[family] = points
        else:
            cell.heuristics[family] = points
    return cell


@dataclass
class Transfer:
    """Policies that were trained in one place and decode in another.

    Attributes:
        trained_on: the task they come from. world: the variant of the task that they decode; None: the task itself.
        there: heuristics of that place, and as ``learned`` the policies that moved there.
        native: those that were trained there, if any were.
    """

    trained_on: str
    world: str | None
    there: Cell
    native: Cell | None


def transfers(rows: Sequence[Point]) -> list[Transfer]:
    """Every move of a table, in its order."""
    chosen, native = better_decoding(rows), {(cell.task, cell.env): cell for cell in cells(rows)}
    result = []
    moved = group_by((row for row in chosen if row["kind"] == "transfer"), "trained_on", "task", "env", "world")
    for (trained_on, task, env, world), members in moved.items():
        place = [
            r for r in chosen if r["kind"] == "heuristic" and (r["task"], r["env"], r["world"]) == (task, env, world)
        ]
        at_home = native.get((task, env)) if world is None else None
        result.append(Transfer(trained_on, world, cell_of([*place, *members]), at_home))
    return result


# Claims


@dataclass(frozen=True)
class Finding:
    """One claim measured in one place.

    Attributes:
        claim: a key of ``CLAIMS``. where: task and env. who: ``"policy"``, ``"conditioned"``, or both.
        holds: the verdict. text: the measurement as a sentence. numbers: the same for machines.
        rules: the heuristics it was measured against: ``"papers"`` or ``"every"``.
    """

    claim: str
    where: str
    who: str
    holds: bool
    text: str
    numbers: dict[str, float]
    rules: str = "papers"


def fast(cell: Cell) -> list[Finding]:
    """At NFE <= 0.7 x that of threshold 0.9: 10 points more than the best heuristic at the same NFE."""
    threshold = next((p for p in cell.heuristics.get("threshold", []) if p["setting"] == "0.9"), None)
    if threshold is None or not cell.full_diffusion:
        return []
    limit, found = 0.7 * threshold["nfe"], []
    for who, points in cell.learned.items():
        margins = [(p["accuracy"] - cell.best_heuristic(p["nfe"]).accuracy, p) for p in points if p["nfe"] <= limit]
        if not margins:
            fastest = min(p["nfe"] for p in points)
            text = f"the fastest policy takes {fastest:.2f} NFE, the limit is {limit:.2f}"
            found.append(Finding("fast", cell.title, who, False, text, {"limit": limit, "nfe": fastest}))
            continue
        margin, point = max(margins, key=lambda pair: pair[0])
        other = cell.best_heuristic(point["nfe"])
        text = (
            f"{point['accuracy']:.3f} at NFE {point['nfe']:.2f} (alpha {point['alpha']:g}; limit {limit:.2f}), "
            f"{other.family} there {other.accuracy:.3f}: {100 * margin:+.1f} points; "
            f"{sum(m >= 0.1 for m, _ in margins)} of {len(margins)} alphas within the limit reach +10"
        )
        numbers = {"limit": limit, "nfe": point["nfe"], "accuracy": point["accuracy"], "margin": margin}
        found.append(Finding("fast", cell.title, who, margin >= 0.1, text, numbers))
    return found


def quality(cell: Cell) -> list[Finding]:
    """At the best heuristic's accuracy minus 1 point: no more NFE than that heuristic (the fastest of equals)."""
    if not cell.full_diffusion or not cell.heuristics:
        return []
    best = max((p for ps in cell.heuristics.values() for p in ps), key=lambda p: (p["accuracy"], -p["nfe"]))
    target = best["accuracy"] - 0.01
    anyone = min(needed(pareto(points), target) for points in cell.heuristics.values())
    found = []
    for who, points in cell.learned.items():
        nfe = needed(pareto(points), target)
        most = max(p["accuracy"] for p in points)
        reach = f"reaches {target:.3f} at NFE {nfe:.2f}" if nfe < math.inf else f"stays below {target:.3f} ({most:.3f})"
        alone = [needed(pareto(points), target) for points in cell.alone(who)]
        if len(alone) > 1:
            reach += f" (seeds alone: {', '.join(f'{x:.2f}' if x < math.inf else 'never' for x in alone)})"
        text = (
            f"{reach}; {best['family']}({best['setting']}) has {best['accuracy']:.3f} at "
            f"NFE {best['nfe']:.2f}; the first heuristic reaches {target:.3f} at NFE {anyone:.2f}"
        )
        numbers = {"target": target, "nfe": nfe, "best_nfe": best["nfe"], "first_nfe": anyone}
        found.append(Finding("quality", cell.title, who, nfe <= best["nfe"], text, numbers))
    return found


def blocks(cell: Cell) -> list[Finding]:
    """Semi-autoregressively, from the learned front's first point on: nowhere below the heuristics' interval."""
    if cell.full_diffusion or not cell.heuristics:
        return []
    found = []
    for who, points in cell.learned.items():
        front = pareto(points)
        knots = {p["nfe"] for ps in (front, *map(pareto, cell.heuristics.values())) for p in ps}
        gaps = [(reached(front, x) - cell.best_heuristic(x).low, x) for x in sorted(knots) if x >= front[0]["nfe"]]
        gap, nfe = min(gaps)
        fastest = min(p["nfe"] for ps in cell.heuristics.values() for p in ps)
        text = (
            f"from NFE {front[0]['nfe']:.2f} (heuristics: from {fastest:.2f}) to {cell.length:g}; lowest above the "
            f"lower end of the best heuristic's interval at NFE {nfe:.2f}: {100 * gap:+.2f} points"
        )
        numbers = {"gap": gap, "nfe": nfe, "from": front[0]["nfe"]}
        found.append(Finding("blocks", cell.title, who, gap >= 0, text, numbers))
    return found


def whole_front(cell: Cell) -> list[Finding]:
    """The conditioned policy's area: 0.98 of the separate ones' union, above every heuristic family's; monotone."""
    if not set(LEARNED) <= set(cell.learned) or not cell.heuristics:
        return []
    policy, conditioned = (cell.learned[who] for who in LEARNED)
    families = {family: cell.area(points) for family, points in cell.heuristics.items()}
    best = max(families, key=lambda name: families[name])
    own, union, rule = cell.area(conditioned), cell.area(policy), families[best]
    same = cell.area([p for p in conditioned if p["alpha"] in {q["alpha"] for q in policy}])
    strict = [cell.area(points, own=True) for points in (conditioned, policy, cell.heuristics[best])]
    monotone, by_seed = falls(conditioned), cell.alone("conditioned")
    alone = ", ".join(f"{cell.area(points):.4f}" for points in by_seed)
    text = (
        f"area {own:.4f} with {len(conditioned)} alphas (seeds alone: {alone}), union of {len(policy)} separate ones "
        f"{union:.4f} (ratio {own / union:.3f}; with their alphas only {same / union:.3f}), best heuristic {best} "
        f"{rule:.4f} (without the shared first point {' / '.join(f'{a:.4f}' for a in strict)}); NFE "
        f"{'falls' if monotone else 'does not always fall'} as alpha rises ({sum(map(falls, by_seed))} of "
        f"{len(by_seed)} seeds)"
    )
    numbers = {"area": own, "union": union, "ratio": own / union, "heuristic": rule, "monotone": float(monotone)}
    holds = own >= 0.98 * union and own > rule and monotone
    return [Finding("whole_front", cell.title, "conditioned", holds, text, numbers)]


def knob(cell: Cell) -> list[Finding]:
    """The conditioned policy's area against that of all rules together, mixtures included; monotone in every seed."""
    conditioned = cell.learned.get("conditioned", [])
    rules = cell.area(envelope(point for family in cell.heuristics.values() for point in family))
    if not conditioned or not rules:
        return []
    seeds = cell.alone("conditioned")
    ratio, alone = cell.area(conditioned) / rules, [cell.area(points) / rules for points in seeds]
    monotone = sum(map(falls, seeds))
    text = (
        f"{ratio:.3f}x the area under the rules' envelope ({rules:.4f}; seeds alone: "
        f"{', '.join(f'{one:.3f}' for one in alone)}); NFE falls as alpha rises in {monotone} of {len(seeds)} seeds"
    )
    numbers = {"ratio": ratio, "envelope": rules, "monotone": float(monotone)}
    holds = ratio >= 1 and monotone == len(seeds) > 0
    return [Finding("knob", cell.title, "conditioned", holds, text, numbers)]


def lead(cell: Cell) -> list[Finding]:
    """Full diffusion, the fast half of the conditioned policy's points: 25 points above the rules' envelope."""
    points = sorted(cell.learned.get("conditioned", []), key=lambda point: point["nfe"])
    front = envelope(point for family in cell.heuristics.values() for point in family)
    if not points or not front or not cell.full_diffusion:
        return []
    half = [p for p in points[: math.ceil(len(points) / 2)] if p["nfe"] >= front[0]["nfe"]]
    if not half:  # no rule that was played is that fast: nothing to compare with
        return []
    margins = [point["accuracy"] - reached(front, point["nfe"]) for point in half]
    alone = [
        max((p["accuracy"] - reached(front, p["nfe"]) for p in seed if p["nfe"] >= front[0]["nfe"]), default=math.nan)
        for seed in cell.alone("conditioned")
    ]
    best = max(range(len(half)), key=lambda i: margins[i])
    point = half[best]
    text = (
        f"{point['accuracy']:.3f} at NFE {point['nfe']:.2f} (alpha {point['alpha']:g}), the envelope there "
        f"{point['accuracy'] - margins[best]:.3f}: {100 * margins[best]:+.1f} points; least in the fast half "
        f"{100 * min(margins):+.1f}; best of each seed alone: {', '.join(f'{100 * a:+.1f}' for a in alone)}"
    )
    numbers = {"margin": margins[best], "least": min(margins), "nfe": point["nfe"]}
    return [Finding("lead", cell.title, "conditioned", margins[best] >= 0.25, text, numbers)]


def order(cell: Cell) -> list[Finding]:
    """One position per step: 20 points above max-confidence, 5 above every rule that takes one position per step."""
    slowest = max((p["nfe"] for points in cell.heuristics.values() for p in points), default=0.0)
    single = [p for points in cell.heuristics.values() for p in points if p["nfe"] == slowest]
    confident = next((p for p in cell.heuristics.get("top_k", []) if p["setting"] == "1"), None)
    found = []
    for who, points in cell.learned.items():
        mine = [point for point in points if point["alpha"] == 0 and point["nfe"] == slowest]
        if not mine or confident is None:
            continue
        best = max(single, key=lambda point: point["accuracy"])
        margins = [mine[0]["accuracy"] - other["accuracy"] for other in (confident, best)]
        alone = ", ".join(f"{seed['accuracy']:.3f}" for seed in cell.seeds[who])
        text = (
            f"{mine[0]['accuracy']:.3f} (seeds: {alone}); max-confidence {confident['accuracy']:.3f} "
            f"({100 * margins[0]:+.1f} points), the best rule of one position per step {best['family']}"
            f"({best['setting']}) {best['accuracy']:.3f} ({100 * margins[1]:+.1f})"
        )
        holds = margins[0] >= 0.2 and margins[1] >= 0.05
        numbers = {"accuracy": mine[0]["accuracy"], "over_confidence": margins[0], "over_rules": margins[1]}
        found.append(Finding("order", cell.title, who, holds, text, numbers))
    return found


def falls(points: Sequence[Point]) -> bool:
    """Whether NFE falls, nowhere rising, as alpha rises."""
    nfe = [point["nfe"] for point in sorted(points, key=lambda p: p["alpha"])]
    return all(b <= a for a, b in zip(nfe, nfe[1:], strict=False)) and nfe[-1] < nfe[0]


def quick(rows: Sequence[Point], minutes: float) -> list[Finding]:
    """A figure 1 whose learned policies are above the heuristics in the fast regime, within 15 minutes."""
    found = []
    for cell in cells(rows):
        margins = [finding.numbers["margin"] for finding in fast(cell.against(PAPERS)) if "margin" in finding.numbers]
        best = max(margins, default=-math.inf)
        text = f"{minutes:.1f} minutes; in the fast regime " + (
            f"{100 * best:+.1f} points over the best heuristic" if margins else "no policy"
        )
        numbers = {"minutes": minutes, "margin": best}
        found.append(Finding("quick", cell.title, "both", minutes <= 15 and best > 0, text, numbers))
    return found


MEASURES: tuple[Callable[[Cell], list[Finding]], ...] = (fast, quality, blocks, whole_front, knob, lead, order)
CLAIMS = {
    "fast": "Full diffusion, fast regime: at no more than 0.7 x the NFE of threshold 0.9, a learned policy is 10 "
    "points more accurate than the best heuristic at the same NFE, on every task",
    "quality": "Full diffusion, quality regime: at the accuracy of the best heuristic minus 1 point, a learned policy "
    "needs no more NFE than that heuristic",
    "blocks": "Semi-autoregressively: inside the heuristics' 95 % interval or above, over the whole range",
    "whole_front": "The area under the front of the alpha-conditioned policy is at least 0.98 of that of the union of "
    "the separately trained ones, and above every heuristic family's; more speed asked, fewer NFE",
    "knob": "The area under the front of the policy for all alphas is at least that under the envelope of all rules, "
    "mixtures of two included; more speed asked, fewer NFE in every seed",
    "lead": "Full diffusion, the fast half of the policy for all alphas: somewhere 25 points above what all rules "
    "reach together at the same NFE (their envelope, mixtures of two rules included)",
    "order": "One position per step, learned from 0/1 reward alone (UPO): 20 points above max-confidence, and 5 above "
    "every rule that takes one position per step",
    "quick": "`experiment=quick` gives a recognisable version of figure 1 in 15 minutes on two cores",
}


def measured(places: Iterable[Cell]) -> list[Finding]:
    """Every claim in every place: against the papers' heuristics, and, where there are more, against every one."""
    found = []
    for cell in places:
        found += [finding for measure in MEASURES for finding in measure(cell.against(PAPERS))]
        if set(cell.heuristics) - set(PAPERS):
            found += [replace(finding, rules="every") for measure in MEASURES for finding in measure(cell)]
    return found


def verdict(findings: Sequence[Finding]) -> str:
    """The findings of one claim in a word: it holds in a place if one way of learning makes it hold there."""
    places: dict[str, bool] = {}
    for finding in findings:
        places[finding.where] = places.get(finding.where, False) or finding.holds
    if not places:
        return "not measured"
    if all(places.values()):
        return "holds"
    good = [place for place, holds in places.items() if holds]
    return f"holds for {'; '.join(good)} only" if good else "does not hold"
