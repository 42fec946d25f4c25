"""Imitation: learn to do what an expert does, step by step (teacher forcing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.algorithm import Algorithm
from agents.losses import Descent, Likelihood, pack

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.rollout import Player
    from dllm_gym.deciders.player import PolicyDecider

IMPOSSIBLE = -1e5  # log-probabilities below it are those of positions that a policy rules out
Expert = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class Demonstration:
    """An expert's decisions, with the likelihood that a policy gives to them.

    Args:
        expert: a heuristic or another decider. policy: whose likelihood is recorded.
    """

    def __init__(self, expert: Expert, policy: PolicyDecider):
        self.expert, self.policy = expert, policy

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The expert's action int8 [.., L] and its log-probability float32 [..] under the policy.

        Raises:
            ValueError: the policy's distribution cannot emit what the expert did.
        """
        action = ((self.expert(observation, noise) != 0) & (observation["action_mask"] != 0)).to(torch.int8)
        distribution = self.policy.distribution(observation)
        log_prob = distribution.log_prob(action)
        if not (log_prob > IMPOSSIBLE).all():
            raise ValueError(
                f"distribution={type(distribution).__name__} never takes the actions of the expert {self.expert}: "
                "ordered and one-position distributions need an expert that unmasks one position per step, such as "
                "top_k(1), the others one that unmasks at least one; and it must stay within the policy's candidates"
            )
        return action, log_prob


class Imitation(Algorithm):
    """Maximum likelihood of an expert's actions on the expert's own trajectories (behaviour cloning).

    Every episode counts, however it ends; :class:`~agents.ontrack.OnTrack` learns from those that end well.


    The trained policy is a warm start for every other algorithm: ``agent.warm_start=<run folder>``.

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        expert: who is imitated; heuristics unmask the same set whoever watches.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, epochs, max_grad_norm, chunk``).
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        expert: Expert,
        **descent: Any,
    ):
        self.expert, self.requires = expert, getattr(expert, "requires", {})
        super().__init__(actor, Descent(Likelihood(actor, "imitation"), optimizer, **descent))

    def players(self, policy: PolicyDecider, group_size: int) -> list[tuple[Player, int]]:
        """The expert alone; more than one episode per prompt only makes sense if it draws at random."""
        return [(Demonstration(self.expert, policy), group_size)]

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`; ``loss`` is minus the log-likelihood per step, rewards play no part."""
        return self.descent.run(pack(batch.select(*self.actor.in_keys, "action", "active")))
