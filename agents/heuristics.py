"""Hand-made rules, the baselines: deciders ``(observation, noise [.., L]) -> action int8 [.., L]``.

Every rule decides per row from that row alone, picks legal positions only, picks at least one where one is legal, and
breaks ties by the lowest position. ``str(rule)`` is its name in tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def first_k(score: Tensor, legal: Tensor, k: int) -> Tensor:
    """bool [.., L]: the ``k`` legal positions of the highest score (all where fewer are legal), leftmost of equals."""
    order = score.masked_fill(~legal, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(legal).scatter(-1, order[..., :k], True)
    return chosen & legal


class PerStep:
    """Unmask the ``k`` legal positions of the highest score in each step; fewer at the end, so nothing is left over.

    Args:
        k: positions per step, >= 1.
    """

    label: str

    def __init__(self, k: int = 1):
        if k < 1 or k != int(k):
            raise ValueError(f"k={k} is not valid for {self.label}: positions per step, an integer >= 1")
        self.k = int(k)

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        legal = observation["action_mask"] != 0
        return first_k(self.score(observation, noise), legal, self.k).to(torch.int8)

    def __str__(self) -> str:
        return f"{self.label}({self.k})"

    def score(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Float [.., L]; higher is unmasked first."""
        raise NotImplementedError


class Random(PerStep):
    """``k`` legal positions at random."""

    label = "random"

    def score(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return noise


class TopK(PerStep):
    """The ``k`` most confident legal positions (low-confidence remasking of LLaDA; UPO's max-confidence at k = 1)."""

    label = "top_k"

    def score(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return observation["confidence"][..., 0]


class Margin(PerStep):
    """The ``k`` legal positions with the largest lead of the best token over the second best (UPO).

    Raises:
        ValueError: on call, if the observation has only one confidence per position.
    """

    label = "margin"

    def score(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        confidence = observation["confidence"]  # (.., L, K)
        if confidence.shape[-1] < 2:
            raise ValueError("margin compares two confidences but the environment's top_k=1: use top_k >= 2")
        return confidence[..., 0] - confidence[..., 1]


class Threshold:
    """All legal positions whose confidence reaches the threshold, else the most confident one (Fast-dLLM, LUP).

    The fallback is per row: a row in which nothing reaches the threshold moves on, whatever its neighbours do.

    Args:
        threshold: in [0, 1].
    """

    def __init__(self, threshold: float = 0.9):
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not valid: a probability in [0, 1]")
        self.threshold = threshold

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        legal, confidence = observation["action_mask"] != 0, observation["confidence"][..., 0]  # (.., L)
        reached = legal & (confidence >= self.threshold)
        fallback = first_k(confidence, legal, 1)
        return torch.where(reached.any(-1, keepdim=True), reached, fallback).to(torch.int8)

    def __str__(self) -> str:
        return f"threshold({self.threshold!r})"
