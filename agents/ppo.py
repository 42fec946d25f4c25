"""Proximal policy optimisation (PPO), with a critic on the policy's own trunk and advantages by GAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrl.objectives import ClipPPOLoss

from agents.advantages import generalized_advantage
from agents.algorithm import Algorithm
from agents.losses import Descent, EpisodeMean, check_clip, entropy_settings, in_chunks, pack
from dllm_gym.checks import flag, number

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from dllm_gym.deciders.policy import Policy


class Critic(nn.Module):
    """State value on a policy's trunk: the mean of its features over the completion, then a small network.

    Args:
        policy: its ``features`` are shared, not copied; its ``head`` is not used.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy
        self.value = nn.Sequential(nn.Linear(policy.width, policy.width), nn.GELU(), nn.Linear(policy.width, 1))
        self.value.to(policy.head.weight)

    def forward(self, *observation: Tensor) -> Tensor:
        """Value float32 [.., 1] of the observation entries that the policy reads."""
        return self.value(self.policy.features(*observation).mean(-2)).float()


def make_critic(actor: ProbabilisticActor) -> TensorDictModule:
    """The critic of an actor made by ``deciders.make_actor``: observation TensorDict -> ``state_value``."""
    policy = actor[0].module
    return TensorDictModule(Critic(policy), in_keys=list(policy.in_keys), out_keys=["state_value"])


class PPOLoss(EpisodeMean, ClipPPOLoss):
    """Clipped surrogate, value loss and entropy bonus under the per-episode mean."""


class PPO(Algorithm):
    """PPO (arXiv 1707.06347): advantages and value targets from the critic, then gradient steps.

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        clip_epsilon: as in :class:`~agents.grpo.GRPO`.
        critic_scale: weight of the value loss. entropy_scale: weight of the entropy bonus.
        gamma: discount per step, in [0, 1]; at 1 only the reward function says what time costs.
        lmbda: of GAE, in [0, 1].
        normalize: shift and scale the advantages of a round to mean 0 and standard deviation 1.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, epochs, max_grad_norm, chunk``).

    Raises:
        ValueError: a setting is out of range.
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
        self.gamma, self.lmbda = number("gamma", gamma, least=0, most=1), number("lmbda", lmbda, least=0, most=1)
        self.normalize = flag("normalize", normalize)
        self.critic = make_critic(actor)
        loss = PPOLoss(
            actor,
            self.critic,
            clip_epsilon=check_clip(clip_epsilon),
            critic_coeff=critic_scale,
            loss_critic_type="l2",
            **entropy_settings(entropy_scale, actor),
            functional=False,
        )
        super().__init__(actor, Descent(loss, optimizer, **descent))

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`; ``explained_variance`` is the share of the returns' that the critic foresaw."""
        active = batch["active"]  # (E, T)
        batch = batch.select(*self.actor.in_keys, "action", "action_log_prob", "active")
        value = reward.new_zeros(active.shape)
        value[active] = in_chunks(self._value, batch.exclude("active")[active], self.descent.chunk)
        advantage, target = generalized_advantage(value, reward, active, self.gamma, self.lmbda)
        spread = float(target[active].var(correction=0))
        surprise = float(advantage[active].var(correction=0)) / spread if spread else float("nan")
        if self.normalize:
            seen = advantage[active]
            advantage = (advantage - seen.mean()) / (seen.std(correction=0) + 1e-8)
        batch = batch.set("advantage", advantage).set("value_target", target)
        return {**self.descent.run(pack(batch)), "explained_variance": 1 - surprise}

    def _value(self, steps: TensorDictBase) -> Tensor:
        return self.critic(steps.select(*self.critic.in_keys))["state_value"].squeeze(-1)  # (N,)
