"""Rewards: correctness composed with speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Reward = Callable[[Tensor, Tensor, int], Tensor]


def _check_alpha(alpha: float) -> None:
    if not isinstance(alpha, int | float) or not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha!r} is not a speed weight: need a finite number >= 0")


@dataclass(frozen=True)
class Multiplicative:
    """score * ((L - min(T, L) + 1) / L) ** alpha, the main reward of *Learning Unmasking Policies*.

    A wrong answer earns nothing however fast; alpha = 0 is plain correctness. Called with the score float32 [n] in
    [0, 1], the number of steps T int64 [n] (NFE) and L; returns float32 [n].

    Raises:
        ValueError: alpha is negative or not finite.
    """

    alpha: float = 1.0

    def __post_init__(self):
        _check_alpha(self.alpha)

    def __call__(self, score: Tensor, steps: Tensor, length: int) -> Tensor:
        # float64: float32 powers differ in the last bit with the batch size, which would tell equal episodes apart
        speed = (length - steps.clamp_max(length) + 1).double() / length
        return (score * speed**self.alpha).float()


@dataclass(frozen=True)
class Additive:
    """score - alpha * T / L, the ablation of *Learning Unmasking Policies*: wrong answers gain by speed as well.

    Raises:
        ValueError: alpha is negative or not finite.
    """

    alpha: float = 1.0

    def __post_init__(self):
        _check_alpha(self.alpha)

    def __call__(self, score: Tensor, steps: Tensor, length: int) -> Tensor:
        return score - self.alpha * steps / length


REWARDS: dict[str, Callable[[float], Reward]] = {"multiplicative": Multiplicative, "additive": Additive}


def make_reward(reward: str | Reward, alpha: float) -> Reward:
    """The reward of that name with that alpha; a callable is returned as it is.

    Raises:
        ValueError: no reward of that name, or alpha < 0.
    """
    _check_alpha(alpha)
    if callable(reward):
        return reward
    if not isinstance(reward, str) or reward not in REWARDS:
        raise ValueError(f"reward={reward!r} is not known: choose one of {', '.join(REWARDS)}, or pass a callable")
    return REWARDS[reward](alpha)
