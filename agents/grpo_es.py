"""GRPO with expert steering: one episode of every group is a heuristic's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torchrl.modules import ProbabilisticActor

from agents.grpo import GRPO
from agents.imitation import Demonstration, Expert

if TYPE_CHECKING:
    from agents.rollout import Player
    from dllm_gym.deciders.distributions import UnmaskDistribution
    from dllm_gym.deciders.player import PolicyDecider


def mixture_log_prob(log_prob: Tensor, policy_share: Tensor, expert_share: Tensor) -> Tensor:
    """log(policy_share * pi + expert_share): the likelihood of an action that the expert is certain to take (LUP)."""
    return torch.logaddexp(log_prob + policy_share.log(), expert_share.log())


def shares(expert: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of policy and expert in the likelihood of each episode's steps.

    With G episodes of the policy and E of experts in a group an expert's step has the likelihood
    G / (G + E) * pi + 1 / (G + E). The policy's own steps keep pi: what the expert would have done there is another
    action, so the factor G / (G + E) cancels in every ratio.

    Args:
        expert: bool [E], which episodes an expert played. group: int64 [E].

    Returns:
        policy_share, expert_share: float [E].
    """
    size = (group[:, None] == group).sum(-1)
    experts = ((group[:, None] == group) & expert).sum(-1)
    policy_share = torch.where(expert, (size - experts) / size, 1.0)
    return policy_share, torch.where(expert, 1 / size, 0.0)


class Steered(Distribution):
    """The policy's distribution with the mixture likelihood for an expert's steps.

    Args:
        policy_share, expert_share: float [..], see ``shares``; other arguments as the policy's distribution.
        of: the class of the policy's distribution.
    """

    def __init__(
        self,
        logits: Tensor,
        action_mask: Tensor,
        policy_share: Tensor,
        expert_share: Tensor,
        *,
        of: type[UnmaskDistribution],
        temperature: float = 1.0,
    ):
        self.plain = of(logits, action_mask, temperature)
        self.policy_share, self.expert_share = policy_share, expert_share
        super().__init__(self.plain.batch_shape, self.plain.event_shape, validate_args=False)

    def log_prob(self, action: Tensor) -> Tensor:
        """Float32 [..], of ``action`` [.., L]."""
        return mixture_log_prob(self.plain.log_prob(action), self.policy_share, self.expert_share)


def steered(actor: ProbabilisticActor) -> ProbabilisticActor:
    """The actor with ``Steered`` as its distribution; it shares the network."""
    plain = actor[-1]
    entries = ["logits", "action_mask", "policy_share", "expert_share"]
    return ProbabilisticActor(
        actor[0],
        in_keys=entries,
        out_keys=["action"],
        distribution_class=Steered,
        distribution_kwargs={"of": plain.distribution_class, **plain.distribution_kwargs},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


class GRPOWithExpert(GRPO):
    """GRPO with expert steering (LUP, arXiv 2512.09106): the expert's episode counts in the group's mean, and its steps
    are learnt from under the likelihood of the mixture of policy and expert.

    Args:
        expert: who plays one episode per group. LUP: threshold 0.9 in blocks of 32, inside full diffusion.
        settings: those of :class:`~agents.grpo.GRPO`.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        expert: Expert,
        **settings: Any,
    ):
        self.expert, self.requires = expert, getattr(expert, "requires", {})
        super().__init__(steered(actor), optimizer, **settings)
        self.observes = list(actor.in_keys)  # the shares are no observation

    def players(self, policy: PolicyDecider, group_size: int) -> list[tuple[Player, int]]:
        """The policy ``group_size`` times and the expert once."""
        return [(policy, group_size), (Demonstration(self.expert, policy), 1)]

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`GRPO.update`."""
        policy_share, expert_share = (
            share[:, None].expand(batch.shape) for share in shares(batch["expert"][:, 0], group)
        )
        batch = batch.copy()
        batch["policy_share"], batch["expert_share"] = policy_share, expert_share
        batch["action_log_prob"] = mixture_log_prob(batch["action_log_prob"], policy_share, expert_share)
        return super().update(batch, reward, group)
