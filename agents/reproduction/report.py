"""The page and the pictures that scripts/reproduce.py writes: every number in them comes from the runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.fronts import Point
from agents.pictures import COLOURS, MARKERS
from agents.reproduction.claims import (
    CLAIMS,
    LEARNED,
    PAPERS,
    Cell,
    Finding,
    Transfer,
    cells,
    group_by,
    measured,
    quick,
    transfers,
    verdict,
    words,
)
from dllm_gym.runs.files import atomically, read

# Shares of a metrics.csv and what they were in the logs of an independent run of the LUP reference.
WASTE = {"empty_steps": 0.39, "equal_groups": 0.52, "idle_lanes": 0.17}
RULES = (*COLOURS, "#332288", "#882255", "#117733")
LOOKS = {"policy": ("#D55E00", "*", 13), "conditioned": ("#000000", "d", 6)}
RULES_IN_WORDS = {"papers": "the papers'", "every": "every"}
OTHERS = ("#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#999999")  # of controls
NAMES = {"policy": "one policy per alpha", "conditioned": "one policy for all alphas"}


@dataclass
class Training:
    """One training: its labels (``task, env, family, alpha, seed``) and the rounds of its metrics.csv."""

    labels: Mapping[str, Any]
    rounds: list[dict[str, float]]

    def mean(self, metric: str) -> float:
        """The mean over rounds; NaN if no round has it."""
        values = self.column(metric)
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def column(self, metric: str) -> np.ndarray:
        """Float [rounds]; NaN where a round lacks it."""
        return np.array([entry.get(metric, math.nan) for entry in self.rounds])

    @property
    def minutes(self) -> float:
        return float(np.nansum(self.column("seconds"))) / 60


def read_training(folder: Path, labels: Mapping[str, Any]) -> Training:
    """A run's metrics.csv."""
    rounds = csv.DictReader(read(folder / "metrics.csv").splitlines())
    return Training(labels, [{k: float(v) for k, v in row.items() if v} for row in rounds])


@dataclass
class Evidence:
    """All that a page is written from.

    Attributes:
        rows: the table. trainings: every finished training, in the table's order.
        minutes: wall-clock minutes of each session in which the jobs ran. jobs: how many are done, and of how many.
        quick: table and minutes of the quick version, if it was run. notes: claim,
            or ``"transfer"``, -> what is to be said about it.
        settings: the overrides of the jobs, as YAML. title: of the page.
    """

    rows: list[Point]
    trainings: list[Training]
    minutes: list[float]
    jobs: tuple[int, int]
    quick: tuple[list[Point], float] | None
    notes: Mapping[str, str]
    settings: str
    title: str = "Results"

    @property
    def findings(self) -> list[Finding]:
        return measured(cells(self.rows)) + (quick(*self.quick) if self.quick else [])


# Pictures


def draw_front(cell: Cell, path: Path) -> None:
    """Accuracy against NFE: a line per family of heuristics, policies as means over seeds with 95 % intervals, and
    their seeds as small marks."""
    axes, save = canvas(path)
    for i, (family, points) in enumerate(cell.heuristics.items()):
        points = sorted(points, key=lambda point: point["nfe"])
        style = {"color": RULES[i % len(RULES)], "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}
        bars(axes, points, family, **style, linewidth=1, alpha=0.8)
    for i, (who, points) in enumerate(cell.learned.items()):
        colour, marker, size = LOOKS.get(who) or (OTHERS[i % len(OTHERS)], "P", 7)
        for seed in cell.seeds[who]:
            axes.plot(seed["nfe"], seed["accuracy"], marker, color=colour, markersize=size / 2.5, alpha=0.35, zorder=8)
        style = {"color": colour, "marker": marker, "markersize": size, "linewidth": 0 if who == "policy" else 1.4}
        bars(axes, points, NAMES.get(who, words(who)), **style, zorder=9)
    axes.set(xlabel="NFE per answer (lower is faster)", ylabel="accuracy", title=cell.title, ylim=(-0.02, 1.04))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    save()


def bars(axes: Any, points: Sequence[Point], label: str, **style: Any) -> None:
    """Points with their 95 % intervals of accuracy."""
    x, y, low, high = (np.array([p[k] for p in points]) for k in ("nfe", "accuracy", "accuracy_low", "accuracy_high"))
    axes.errorbar(x, y, yerr=(np.maximum(y - low, 0), np.maximum(high - y, 0)), label=label, elinewidth=1, **style)


def draw_curves(trainings: Sequence[Training], title: str, path: Path) -> None:
    """Reward and NFE per round: mean and range over seeds, a colour per alpha."""
    (left, right), save = canvas(path, panels=2)
    by_setting = group_by(({**t.labels, "training": t} for t in trainings), "family", "alpha")
    for i, ((family, alpha), members) in enumerate(by_setting.items()):
        label = f"alpha {alpha:g}" if family == "policy" else NAMES.get(family, words(family))
        colour = LOOKS["conditioned"][0] if family == "conditioned" else COLOURS[i % len(COLOURS)]
        for axes, metric in ((left, "reward"), (right, "nfe")):
            columns = [member["training"].column(metric) for member in members]
            values = np.array([column[: min(map(len, columns))] for column in columns])  # (seeds, rounds)
            rounds = np.arange(1, values.shape[1] + 1)
            axes.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(rounds, values.mean(0), color=colour, label=label, linewidth=1.4)
    left.set(xlabel="round", ylabel="mean reward (each with its own alpha)", title=title)
    right.set(xlabel="round", ylabel="NFE per answer")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, fontsize=8)
    save()


def canvas(path: Path, panels: int = 1) -> tuple[Any, Any]:
    """Axes (one, or an array of several) in the project's style, and the function that writes the picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(8.6 if panels == 1 else 10, 4.6), dpi=150)
    for one in np.atleast_1d(axes):
        one.grid(color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)

    def save() -> None:
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, figure.savefig)
        plt.close(figure)

    return axes, save


# The page


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; all rows have the same entries."""
    if not rows:
        return "Nothing yet.\n"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def claims_section(findings: Sequence[Finding], notes: Mapping[str, str]) -> str:
    """Every claim with its verdict, its measurements, and what is to be said about it."""
    parts = []
    for number, (claim, text) in enumerate(CLAIMS.items(), 1):
        own = [finding for finding in findings if finding.claim == claim]
        every = [finding for finding in own if finding.rules == "every"]
        more = f" (against every heuristic: {verdict(every)})" * bool(every)
        parts.append(f"**{number}. {text}: {verdict([f for f in own if f.rules == 'papers'])}{more}.**\n")
        rows = [
            {
                "where": f.where,
                "who": "any" if f.who == "both" else NAMES.get(f.who, words(f.who)),
                "heuristics": RULES_IN_WORDS[f.rules],
                "measured": f.text,
                "holds": "yes" if f.holds else "no",
            }
            for f in own
        ]
        parts += [table(rows)] if rows else []
        parts += [notes[claim] + "\n"] if notes.get(claim) else []
    return "\n".join(parts)


def policies_table(cell: Cell) -> str:
    """Every policy of a cell beside the best heuristic at its NFE."""
    rows = []
    for who, points in cell.learned.items():
        for p in points:
            best = cell.best_heuristic(p["nfe"]) if cell.heuristics else None
            rows.append(
                {
                    "who": NAMES.get(who, words(who)),
                    "alpha": f"{p['alpha']:g}",
                    "decoding": p["decode"],
                    "accuracy": f"{spread(p, 'accuracy', 3)} ({p['accuracy_low']:.3f}-{p['accuracy_high']:.3f})",
                    "NFE": spread(p, "nfe", 2),
                    "best heuristic there": f"{best.accuracy:.3f} ({best.family})" if best else "",
                    "difference, points": f"{100 * (p['accuracy'] - best.accuracy):+.1f}" if best else "",
                }
            )
    return table(rows)


def spread(point: Point, name: str, digits: int) -> str:
    deviation = point[f"{name}_sd"]
    return f"{point[name]:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def areas_table(cells: Sequence[Cell]) -> str:
    """The area under every front of every cell: linear / linear without the shared first point / logarithmic."""
    names = dict.fromkeys(name for cell in cells for name in (*cell.learned, *cell.heuristics))
    rows = []
    for name in names:
        row = {"who": NAMES.get(name, name)}
        for cell in cells:
            points = {**cell.learned, **cell.heuristics}.get(name)
            kinds: tuple[dict[str, bool], ...] = ({}, {"own": True}, {"log": True})
            row[cell.title] = " / ".join(f"{cell.area(points, **kind):.4f}" for kind in kinds) if points else ""
        rows.append(row)
    return table(rows)


def training_table(trainings: Sequence[Training]) -> str:
    """What training wasted and what it cost, means over rounds and seeds."""
    rows = []
    entries = ({**t.labels, "training": t} for t in trainings)
    for (task, env, family, alpha), members in group_by(entries, "task", "env", "family", "alpha").items():
        runs = [member["training"] for member in members]
        means = {name: float(np.mean([run.mean(name) for run in runs])) for name in WASTE}
        learnt_from = float(np.mean([run.mean("informative") for run in runs]))
        rows.append(
            {
                "where": f"{task}, {words(env)}",
                "who": NAMES.get(family, words(family)),
                "alpha": "all" if alpha is None else f"{alpha:g}",
                **{name.replace("_", " "): f"{100 * value:.1f} %" for name, value in means.items()},
                "equal groups in updates": "" if math.isnan(learnt_from) else f"{100 - 100 * learnt_from:.1f} %",
                "minutes": f"{np.mean([run.minutes for run in runs]):.1f}",
            }
        )
    logs = {name.replace("_", " "): f"{100 * value:.0f} %" for name, value in WASTE.items()}
    last = {"equal groups in updates": logs["equal groups"], "minutes": ""}
    reference = {"where": "GSM8K, LLaDA-8B", "who": "the LUP reference's own logs", "alpha": "0", **logs, **last}
    return table([*rows, reference] if rows else [])


def transfer_table(moves: Sequence[Transfer]) -> str:
    """Where policies came from, where they went, and what they are worth there."""
    rows = []
    for move in moves:
        cell = move.there
        place = cell.title + (f", {words(move.world)}" if move.world else "")
        for who, points in cell.learned.items():
            alphas = {point["alpha"] for point in points}
            native = [p for p in move.native.learned.get(who, []) if p["alpha"] in alphas] if move.native else []
            margins = [(p["accuracy"] - cell.best_heuristic(p["nfe"]).accuracy, p) for p in points if cell.heuristics]
            margin, point = max(margins, key=lambda pair: pair[0], default=(math.nan, points[0]))
            areas = [cell.area(family) for family in cell.heuristics.values()]
            rows.append(
                {
                    "trained on": move.trained_on,
                    "decodes": place,
                    "who": NAMES.get(who, words(who)),
                    "area": f"{cell.area(points):.4f}",
                    "area, trained there": f"{cell.area(native):.4f}" if native else "",
                    "area, best heuristic": f"{max(areas):.4f}" if areas else "",
                    "best margin over the heuristics, points": f"{100 * margin:+.1f} (alpha {point['alpha']:g}, "
                    f"{point['accuracy']:.3f} at NFE {point['nfe']:.2f})"
                    if margins
                    else "",
                }
            )
    return table(rows)


def write_page(evidence: Evidence, path: Path) -> None:
    """The page at ``path`` and its pictures in ``figures`` beside it."""
    parts = []
    for cell in cells(evidence.rows):
        name = f"{cell.task}_{cell.env}.png"
        draw_front(cell, path.parent / "figures" / f"front_{name}")
        parts.append(f"### {cell.title}\n\n![accuracy against NFE](figures/front_{name})\n\n{policies_table(cell)}")
        own = [t for t in evidence.trainings if (t.labels["task"], t.labels["env"]) == (cell.task, cell.env)]
        if own:
            draw_curves(own, cell.title, path.parent / "figures" / f"curves_{name}")
            parts.append(f"![learning curves](figures/curves_{name})\n")
    text = page(evidence, "\n".join(parts))
    atomically(path, lambda file: file.write_text(text))


PAGE = """# {title}

Written by `scripts/reproduce.py` from its table, not by hand.{missing}
{examples} test examples; trainings with seeds {seeds};
{done} jobs in {sessions} session(s), {minutes:.0f} minutes in all
(sessions side by side count one by one).

- Points of policies are means over seeds (± standard deviation over seeds). Intervals are 95 % bootstrap intervals over
  examples, averaged over seeds (the lower end is the exact binomial one where every example is solved).
- Of greedy and sampled decoding the one counts that earned more reward on the *validation* split, mean over seeds.
  That choice does not look at the test split.
- A front joins the points that no other of its family beats by straight lines in NFE. Left of its first point it reads
  0, right of its last one the best accuracy holds. "Best heuristic" at an NFE: the family whose front is highest there.

Overrides of `scripts/train.py` and `scripts/evaluate.py` behind this page (`conf/reproduce.yaml`):

```yaml
{settings}
```

## Claims

The verdicts are those against the papers' heuristics ({papers}).
Each claim is also measured against every heuristic here, the EB-Sampler (eb) and KLASS included.

{claims}
## Fronts

Large marks: means over seeds; small ones: seeds. The bands of the learning curves are the range over seeds.

{fronts}
## Area under the front

The mean accuracy over NFE in [1, L]. First the claim's: the fastest point of all heuristics belongs to every front, for
with everything unmasked at once no rule makes a difference. Then without that shared point: a front is 0 left of its
own first one. Then with it over log NFE, which weighs the fast end as the pictures do.

{areas}
## Training

Means over rounds and seeds: the share of steps that unmask nothing, of groups (of all that were played) whose rewards
are all equal, of lanes that wait for the end of their batch (they are not forwarded, so they cost nothing), and of
groups with equal rewards that are still there in the updates, after others were played in their place
(`agent.max_batches`; 1 is the plain scheme). Minutes are those of the rounds on one thread, beside another job.

{training}
## Transfer

Policies moved, untouched, to what they were not trained on. {transfer_note}

{transfers}"""


def page(evidence: Evidence, fronts: str) -> str:
    """The page; ``fronts`` is its part with the pictures."""
    examples = sorted({row["examples"] for row in evidence.rows if row["split"] == "test"})
    seeds = sorted({row["seed"] for row in evidence.rows if row["kind"] in LEARNED})
    done, jobs = evidence.jobs
    missing = f" **{jobs - done} of {jobs} jobs are not done yet; what follows is what the others show.**" * (
        done < jobs
    )
    return PAGE.format(
        title=evidence.title,
        missing=missing,
        examples=" or ".join(map(str, examples)),
        seeds=", ".join(map(str, seeds)),
        done=done,
        sessions=len(evidence.minutes),
        minutes=sum(evidence.minutes),
        settings=evidence.settings,
        papers=", ".join(PAPERS),
        claims=claims_section(evidence.findings, evidence.notes),
        fronts=fronts,
        areas=areas_table(cells(evidence.rows)),
        training=training_table(evidence.trainings),
        transfer_note=evidence.notes.get("transfer") or "",
        transfers=transfer_table(transfers(evidence.rows)),
    )
