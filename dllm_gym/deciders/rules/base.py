"""What rules are made of: the base class, and orders of positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Observation = Mapping[str, Tensor]

KL_MOST = 100.0  # nats: what the environment shows of larger divergences, and before there is one


def first_k(score: Tensor, legal: Tensor, k: int | Tensor) -> Tensor:
    """bool [.., L]: the ``k`` legal positions of the highest score (all where fewer are legal), leftmost of equals.

    ``k``: one number, or int64 [.., 1] with a number per row.
    """
    order = best_first(score, legal)
    within = torch.arange(order.shape[-1], device=order.device) < k
    return torch.zeros_like(legal).scatter(-1, order, within.expand_as(order)) & legal


def best_first(score: Tensor, legal: Tensor) -> Tensor:
    """int64 [.., L]: positions by falling score, the leftmost of equals first, those that are not legal last."""
    return score.masked_fill(~legal, -torch.inf).sort(dim=-1, descending=True, stable=True).indices


def or_else_one(chosen: Tensor, score: Tensor, legal: Tensor) -> Tensor:
    """bool [.., L]: ``chosen``, and in rows where it is empty the legal position of the highest score."""
    return torch.where(chosen.any(-1, keepdim=True), chosen, first_k(score, legal, 1))


def joint_confidence(confidence: Tensor, legal: Tensor) -> Tensor:
    """The chance that everything surer than a position is right, were positions independent.

    At position i the product of c_j over the legal j with c_j > c_i, and over those left of i with c_j = c_i; in log
    space what the entropy-bounded sampler (arXiv 2505.24857) bounds, with -log c in place of the entropy.

    Args:
        confidence: c, float [.., L]. legal: bool [.., L], what may be unmasked now.

    Returns:
        Float [.., L] in [0, 1]; 0 where nothing may be unmasked.
    """
    value, order = confidence.masked_fill(~legal, 0).sort(dim=-1, descending=True, stable=True)
    before = torch.cat([torch.ones_like(value[..., :1]), value[..., :-1]], dim=-1).cumprod(-1)
    return torch.zeros_like(before).scatter(-1, order, before).masked_fill(~legal, 0)


def steps_so_far(observation: Observation, length: int) -> Tensor:
    """int64 [.., 1]: how many steps the episode has had (``time`` is steps / L)."""
    return (observation["time"] * length).round().long()


def draws(decider: Any) -> bool:
    """Whether a decider may read the noise: unless its own class says ``draws = False``, which is not inherited."""
    return bool(decider.draws) if "draws" in vars(type(decider)) else True


class Rule:
    """Base of the rules: a subclass says what it chooses among the legal positions.

    Attributes:
        label: what ``str(rule)`` begins with, and by what :func:`~dllm_gym.deciders.rules.naming.make_rule` finds it.
    """

    label: ClassVar[str] = ""

    @classmethod
    def of(cls, *arguments: Any, **named: Any) -> Rule:
        """The rule with the arguments that stand in its name."""
        return cls(*arguments, **named)

    @property
    def requires(self) -> dict[str, int]:
        """Settings that the environment must have, at least; empty if any environment will do."""
        return {}

    def __call__(self, observation: Observation, noise: Tensor) -> Tensor:
        """Decide.

        Args:
            observation: of the environment, entries [.., L] and more.
            noise: float32 [.., L] in (0, 1), for rules that draw.

        Returns:
            int8 [.., L], 1 = unmask.

        Raises:
            ValueError: the observation lacks something of ``requires``.
        """
        legal = observation["action_mask"] != 0
        return self.choose(observation, noise, legal).to(torch.int8)

    def __str__(self) -> str:
        """``label(arguments)``; a rule that does not keep them under their names writes this itself."""
        names = inspect.signature(type(self)).parameters
        if not self.label or not all(hasattr(self, name) for name in names):
            return super().__str__()
        return f"{self.label}({', '.join(str(getattr(self, name)) for name in names)})"

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        """bool [.., L] within ``legal`` (bool [.., L])."""
        raise NotImplementedError

    def read(self, observation: Observation, name: str) -> Tensor:
        """An entry that the environment only has on request."""
        entry = observation.get(name)
        if entry is None:
            raise ValueError(
                f"{self} reads {name!r}, which this observation lacks: "
                f"build the environment with {name}={self.requires[name]}"
            )
        return entry
