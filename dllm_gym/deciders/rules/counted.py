"""Rules that take a number of positions per step, whatever the dLLM thinks of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from dllm_gym.checks import number, whole
from dllm_gym.deciders.rules.base import Observation, Rule, first_k, or_else_one, steps_so_far

REACH, FINE = 4096, 2.0**30  # positions that are looked back at most; the steps of a weight


class PerStep(Rule):
    """Unmask the ``k`` legal positions of the highest score in each step; fewer at the end, so nothing is left over.

    Args:
        k: positions per step, >= 1.
    """

    def __init__(self, k: int = 1):
        self.k = whole("k", k)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        return first_k(self.score(observation, noise), legal, self.k)

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        """Float [.., L]; higher is unmasked first."""
        raise NotImplementedError


class Random(PerStep):
    """``k`` legal positions at random."""

    label = "random"

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return noise


class LeftToRight(PerStep):
    """The ``k`` leftmost legal positions: what an autoregressive model would do."""

    label = "left_to_right"
    draws = False

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise)  # all equal: the leftmost win


class TopK(PerStep):
    """The ``k`` most confident legal positions (low-confidence remasking of LLaDA; UPO's max-confidence at k = 1)."""

    label = "top_k"
    draws = False

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return observation["confidence"][..., 0]


class Margin(PerStep):
    """The ``k`` legal positions with the largest lead of the best token over the second best (UPO)."""

    label = "margin"
    draws = False
    requires = {"margin": 1}

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return self.read(observation, "margin")


class NegativeEntropy(PerStep):
    """The ``k`` legal positions at which the dLLM's distribution has the lowest entropy."""

    label = "entropy"
    draws = False
    requires = {"entropy": 1}

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return -self.read(observation, "entropy")


class LeastConfident(PerStep):
    """The ``k`` least confident legal positions: the control that any "free choices first" has to beat."""

    label = "least_confident"
    draws = False

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return -observation["confidence"][..., 0]


class CertaintyPrior(PerStep):
    """The ``k`` legal positions with the largest c_i d_i: sure, and near to what is already there (arXiv 2509.23094).

    d_i is the density of committed positions around i, smoothed by a Gaussian: the mean over all j of [j is committed]
    with weight exp(-(i - j)^2 / (2 sigma^2)), where everything left of the completion counts as committed and nothing
    right of it does; weights beyond 4 sigma are left out.

    Args:
        sigma: positions, > 0 (d2Cache: about 10).
        k: positions per step, >= 1.
    """

    label = "certainty_prior"
    draws = False

    def __init__(self, sigma: float = 10.0, k: int = 1):
        super().__init__(k)
        self.sigma = number("sigma", sigma, above=0)

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        confidence, committed = observation["confidence"][..., 0], observation["mask"] == 0
        reach = min(math.ceil(4 * self.sigma), REACH)
        known = torch.nn.functional.pad(committed.double(), (reach, 0), value=1)  # (.., reach + L)
        position = torch.arange(committed.shape[-1], device=confidence.device)
        other = torch.arange(known.shape[-1], device=confidence.device) - reach
        away = (position[:, None] - other).double()
        weight = torch.where(away.abs() <= reach, torch.exp(-((away / self.sigma) ** 2) / 2), 0.0)
        # Whole numbers: their sums are exact, so they do not depend on how a batch is added up.
        return confidence.double() * (known @ (weight * FINE).round().mT)


class Growing(Rule):
    """The most confident legal positions: 1 in the first step, ``factor`` times as many in each step after.

    floor(factor ** s) in step s = 0, 1, 2, ... (ascending step size, arXiv 2509.23924, with factor 2).

    Args:
        factor: >= 1.
    """

    label = "growing"
    draws = False

    def __init__(self, factor: float = 2.0):
        self.factor = number("factor", factor, least=1)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        length = legal.shape[-1]
        powers = accumulate(repeat(self.factor, length), lambda power, factor: min(power * factor, length), initial=1.0)
        count = torch.tensor([int(power) for power in powers], device=legal.device)  # (L + 1,)
        step = steps_so_far(observation, length).clamp_max(length)
        return first_k(observation["confidence"][..., 0], legal, count[step])


class Fixed(Rule):
    """A schedule that looks at nothing: position i is committed in step ``steps[i]``, the first step being 0.

    Masked positions whose step has passed are committed, too; where none is due, the next one of the schedule. The
    control that anything which looks at the dLLM has to beat.

    Args:
        steps: L whole numbers >= 0.
    """

    label = "fixed"
    draws = False

    def __init__(self, steps: Sequence[int]):
        if isinstance(steps, str) or not isinstance(steps, Sequence) or not len(steps):
            raise ValueError(f"steps={steps!r}: need a list of whole numbers, one per position, such as [0,0,1,2]")
        self.steps = [whole(f"steps[{i}]", step, least=0) for i, step in enumerate(steps)]

    @classmethod
    def of(cls, *arguments: Any, **named: Any) -> Fixed:
        return cls(arguments, **named)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        length = legal.shape[-1]
        if len(self.steps) != length:
            raise ValueError(
                f"steps={self.steps!r} are those of {len(self.steps)} positions: this completion has {length}"
            )
        due = torch.tensor(self.steps, device=legal.device)  # (L,)
        return or_else_one(legal & (due <= steps_so_far(observation, length)), -due.expand_as(legal).double(), legal)

    def __str__(self) -> str:
        return f"{self.label}({','.join(map(str, self.steps))})"
