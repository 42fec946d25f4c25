"""Rewards: correctness composed with speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym.checks import number
from dllm_gym.noise import uniform

ALPHA = 1 << 40  # the place in an episode's random stream from which its alpha is drawn; no step comes there

Reward = Callable[[Tensor, Tensor, Any], Tensor]  # of score, steps T and L, which an episode counts as its blanks


def _check_alpha(alpha: float | Tensor) -> None:
    if isinstance(alpha, Tensor):
        return  # one per episode, drawn from a range that has been checked
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha!r} is not a speed weight: need a finite number >= 0")


@dataclass(frozen=True)
class _Weighted:
    alpha: float | Tensor = 1.0

    def __post_init__(self):
        _check_alpha(self.alpha)


class Multiplicative(_Weighted):
    """score * ((L - min(T, L) + 1) / L) ** alpha, the main reward of *Learning Unmasking Policies*.

    A wrong answer earns nothing however fast; alpha = 0 is plain correctness. Called with the score float32 [n] in
    [0, 1], the number of steps T int64 [n] (NFE) and L; returns float32 [n]. ``alpha`` may be float64 [n], too, and L
    int64 [n]: with templates it is the number of blanks that an episode began with.

    Raises:
        ValueError: alpha is negative or not finite.
    """

    def __call__(self, score: Tensor, steps: Tensor, length: int | Tensor) -> Tensor:
        # float64: float32 powers differ in the last bit with the batch size, which would tell equal episodes apart
        speed = (length - steps.clamp_max(length) + 1).double() / length
        return (score * speed**self.alpha).float()


class Additive(_Weighted):
    """score - alpha * T / L, the ablation of *Learning Unmasking Policies*: wrong answers gain by speed as well.

    Raises:
        ValueError: alpha is negative or not finite.
    """

    def __call__(self, score: Tensor, steps: Tensor, length: int | Tensor) -> Tensor:
        return (score - self.alpha * steps / length).float()


REWARDS: dict[str, Callable[[Any], Reward]] = {"multiplicative": Multiplicative, "additive": Additive}


@dataclass(frozen=True)
class AlphaRange:
    """Speed weights from which every episode gets one; on a logarithmic scale their place in the range is a knob.

    The *preference* of an alpha is log(alpha / low) / log(high / low), in [0, 1]: 0 asks for quality, 1 for speed.
    """

    low: float
    high: float

    @classmethod
    def of(cls, alpha: Any) -> AlphaRange | None:
        """The range, if ``alpha`` is a pair [low, high]; None if it is a number.

        Raises:
            ValueError: it is a pair without 0 < low < high.
        """
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            return None
        try:
            if isinstance(alpha, str | Mapping):
                raise TypeError
            low, high = (number("alpha", end) for end in alpha)
        except (TypeError, ValueError):
            raise ValueError(f"alpha={alpha!r} is not a speed weight: give a number >= 0, or [low, high]") from None
        if not 0 < low < high < float("inf"):
            raise ValueError(f"alpha={alpha!r} is no range of speed weights: need 0 < low < high, both finite")
        return cls(low, high)

    def preference(self, alpha: Tensor) -> Tensor:
        """Float64 [n] in [0, 1] of alphas float64 [n]."""
        return ((alpha / self.low).log() / math.log(self.high / self.low)).clamp(0, 1)

    def at(self, preference: Any) -> Any:
        """The alpha that has this preference: the inverse of :meth:`preference`."""
        return self.low * (self.high / self.low) ** preference

    def alphas(self, keys: Sequence[int], wanted: Sequence[float | None] | None) -> Tensor:
        """Float64 [n] of episodes with these random streams: those wanted; None (for one or for all) draws it."""
        drawn = self.at(uniform(torch.tensor(keys), ALPHA, 1)[:, 0].double())
        chosen = [None] * len(keys) if wanted is None else wanted
        given = [d if a is None else a for a, d in zip(chosen, drawn.tolist(), strict=True)]
        return torch.tensor(given, dtype=torch.float64)


def make_reward(reward: str | Reward, alpha: float | Tensor) -> Reward:
    """The reward of that name with that alpha (or one per episode); a callable is returned as it is.

    Raises:
        ValueError: no reward of that name, or alpha < 0.
    """
    _check_alpha(alpha)
    if callable(reward):
        return reward
    if not isinstance(reward, str) or reward not in REWARDS:
        raise ValueError(f"reward={reward!r} is not known: choose one of {', '.join(REWARDS)}, or pass a callable")
    return REWARDS[reward](alpha)


class Pay:
    """What episodes are paid: one reward for all, or each by an alpha of its own from a range.

    Args:
        reward: a name or a callable. alpha: a number, or the ends of a range.

    Raises:
        ValueError: as of :func:`make_reward` and :meth:`AlphaRange.of`.
    """

    def __init__(self, reward: str | Reward, alpha: Any):
        self.range = AlphaRange.of(alpha)
        self.name, self.reward = reward, make_reward(reward, alpha if self.range is None else self.range.low)

    def of(self, alpha: np.ndarray, score: np.ndarray, steps: np.ndarray, length: int | Tensor) -> np.ndarray:
        """Float32 [n] for episodes with these alphas, scores, steps and L (one for all, or [n])."""
        reward = self.reward if self.range is None else make_reward(self.name, torch.from_numpy(alpha))
        return reward(torch.from_numpy(score), torch.from_numpy(steps), length).numpy()
