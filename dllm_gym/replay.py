"""A page on which decoders race on the same prompts: one file that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllm_gym.render import Frame, grid_columns

MOST = 4  # decoders side by side
METRICS = ("reward", "accuracy", "nfe")  # of a learning curve
POINTS = 200  # of a learning curve that are drawn
TEMPLATE = Path(__file__).with_name("replay.html")


def page(
    deciders: Sequence[str],
    races: Sequence[Sequence[Sequence[Frame]]],
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> str:
    """The page as HTML.

    Args:
        deciders: what each is called; at most :data:`MOST`.
        races: per prompt and decider the frames of one episode, the last one with its score.
        curves: of the deciders that were trained, by their names: the rounds of the training, each with ``round`` and
            :data:`METRICS`; of which some are no finite number are left out.

    Raises:
        ValueError: there is nothing to show, too much, or not one episode per prompt and decider.
    """
    if not 1 <= len(deciders) <= MOST or not races or any(len(race) != len(deciders) for race in races):
        raise ValueError(f"need 1 to {MOST} deciders, and an episode of each for every prompt")
    data = {
        "deciders": list(deciders),
        "columns": grid_columns(len(races[0][0][0].tokens)),
        "prompts": [{"prompt": race[0][0].prompt, "runs": [_run(frames) for frames in race]} for race in races],
        "curves": [_curve(name, known) for name, rounds in (curves or {}).items() if (known := _finite(rounds))],
    }
    # Within a script element "</script>" and "<!--" would be read as HTML.
    return TEMPLATE.read_text(encoding="utf-8").replace("$data", json.dumps(data).replace("<", "\\u003c"))


def _run(frames: Sequence[Frame]) -> dict[str, Any]:
    blanks = len(frames[0].tokens) - frames[0].given
    return {"frames": [_moment(frame) for frame in frames], "score": frames[-1].score, "blanks": blanks}


def _finite(rounds: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Those that a curve can go through; JSON knows no other numbers."""
    return [one for one in rounds if all(math.isfinite(one[metric]) for metric in METRICS)]


def _curve(name: str, rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """At most :data:`POINTS` rounds, evenly spread, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rounds) - 1, POINTS).round().astype(int)).tolist()
    numbers = {metric: [round(float(rounds[i][metric]), 4) for i in places] for metric in METRICS}
    return {"name": name, "round": [int(rounds[i]["round"]) for i in places], **numbers}


def _moment(frame: Frame) -> dict[str, Any]:
    """Plain data; confidences in whole percent, rounded down."""
    return {
        "tokens": list(frame.tokens),
        "masked": frame.masked.astype(int).tolist(),
        "confidence": (100 * np.nan_to_num(frame.confidence)).astype(int).tolist(),
        "fresh": np.flatnonzero(frame.fresh).tolist(),
        "legal": np.flatnonzero(frame.legal).tolist(),
    }
