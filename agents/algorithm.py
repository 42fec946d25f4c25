"""What the training loop needs of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torch import Tensor

from agents.losses import Descent

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.rollout import Player
    from dllm_gym.deciders.player import PolicyDecider


class Algorithm:
    """Learns from rounds of episodes; subclasses define the loss and ``update``.

    Args:
        actor: TorchRL actor (``deciders.make_actor``), trained in place.
        descent: gradient steps along the algorithm's loss.

    Attributes:
        observes: observation entries that rollouts have to record; None: all.
        compares: whether it learns from differences within a group only, so that equal rewards teach it nothing.
        requires: settings of the environment that it needs besides the policy's, as the least value of each.
    """

    compares: bool = False
    requires: Mapping[str, int] = {}

    def __init__(self, actor: ProbabilisticActor, descent: Descent):
        self.actor, self.descent = actor, descent
        self.observes: list[str] | None = list(actor.in_keys)

    def players(self, policy: PolicyDecider, group_size: int) -> list[tuple[Player, int]]:
        """Who plays the round's episodes, and how many of each prompt: by default the policy, ``group_size`` times.

        Raises:
            ValueError: the algorithm compares episodes of one prompt, and there is only one.
        """
        players: list[tuple[Player, int]] = [(policy, group_size)]
        return self.check_group(players)

    def check_group(self, players: list[tuple[Player, int]]) -> list[tuple[Player, int]]:
        """``players`` if they are enough for an algorithm that compares."""
        if self.compares and sum(count for _, count in players) < 2:
            raise ValueError(
                f"{type(self).__name__} compares the episodes of one prompt: agent.group_size must be at least 2"
            )
        return players

    def worth(self, batch: TensorDictBase, reward: Tensor) -> Tensor:
        """What each of E episodes counts when they are compared, float [E]: its reward, unless an algorithm says so."""
        return reward

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """Learn from one round of episodes.

        Args:
            batch: [E, T] with the entries of ``observes``, ``action``, ``action_log_prob`` float, ``active`` bool
                (False behind an episode's end), ``expert`` bool (played by another than the policy) and ``score`` float
                (the episode's; 0 behind its end where another one is longer).
            reward: float [E]. group: int64 [E], equal for episodes of one prompt.

        Returns:
            Metrics, those of ``Descent.run`` among them.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Parameters, optimizer and schedule: all that a later process needs to go on."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.descent.load_state_dict(state)


def per_step(value: Tensor, batch: TensorDictBase) -> Tensor:
    """A value per episode [E] as TorchRL wants advantages: [E, T, 1]."""
    return value[:, None, None].expand(*batch.shape, 1)
