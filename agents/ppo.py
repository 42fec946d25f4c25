"""Proximal policy optimisation (PPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torchrl.objectives import ClipPPOLoss

from agents.actor_critic import ActorCritic, make_critic
from agents.grpo import check_clip
from agents.losses import Descent, EpisodeMean
from agents.reinforce import entropy_settings
from dllm_gym.checks import number

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


class PPOLoss(EpisodeMean, ClipPPOLoss):
    """Clipped surrogate, value loss and entropy bonus under the per-episode mean."""


class PPO(ActorCritic):
    """PPO (arXiv 1707.06347) with a critic on the policy's trunk.

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        clip_epsilon: as in :class:`~agents.grpo.GRPO`.
        critic_scale: weight of the value loss. entropy_scale: weight of the entropy bonus.
        gamma, lmbda, normalize: see :class:`~agents.actor_critic.ActorCritic`.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, epochs, max_grad_norm, chunk``).
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        clip_epsilon: float | Sequence[float] = 0.2,
        critic_scale: float = 0.5,
        entropy_scale: float = 0.0,
        gamma: float = 1.0,
        lmbda: float = 0.95,
        normalize: bool = True,
        **descent: Any,
    ):
        if not number("critic_scale", critic_scale, least=0):
            raise ValueError("critic_scale=0 is not valid: advantages need a critic that learns")
        critic = make_critic(actor)
        loss = PPOLoss(
            actor,
            critic,
            clip_epsilon=check_clip(clip_epsilon),
            critic_coeff=critic_scale,
            loss_critic_type="l2",
            **entropy_settings(entropy_scale, actor),
            functional=False,
        )
        super().__init__(
            actor, critic, Descent(loss, optimizer, **descent), gamma=gamma, lmbda=lmbda, normalize=normalize
        )
