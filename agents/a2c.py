"""Advantage actor-critic (A2C)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torchrl.objectives import A2CLoss as TorchRLA2CLoss

from agents.actor_critic import ActorCritic, make_critic
from agents.losses import Descent, EpisodeMean
from agents.reinforce import entropy_settings
from dllm_gym.checks import number

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


class A2CLoss(EpisodeMean, TorchRLA2CLoss):
    """-advantage * log-likelihood, value loss and entropy bonus under the per-episode mean."""


class A2C(ActorCritic):
    """A2C (arXiv 1602.01783, synchronous) with a critic on the policy's trunk; one gradient step per round.

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        critic_scale: weight of the value loss. entropy_scale: weight of the entropy bonus.
        gamma, lmbda, normalize: see :class:`~agents.actor_critic.ActorCritic`.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, max_grad_norm, chunk``).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        critic_scale: float = 0.5,
        entropy_scale: float = 0.0,
        gamma: float = 1.0,
        lmbda: float = 1.0,
        normalize: bool = False,
        **descent: Any,
    ):
        if descent.get("epochs", 1) != 1:
            raise ValueError(f"epochs={descent['epochs']} is not valid: A2C takes one step per round; use ppo")
        if not number("critic_scale", critic_scale, least=0):
            raise ValueError("critic_scale=0 is not valid: advantages need a critic that learns")
        critic = make_critic(actor)
        loss = A2CLoss(
            actor,
            critic,
            critic_coeff=critic_scale,
            loss_critic_type="l2",
            **entropy_settings(entropy_scale, actor),
            functional=False,
        )
        super().__init__(
            actor, critic, Descent(loss, optimizer, **descent), gamma=gamma, lmbda=lmbda, normalize=normalize
        )
