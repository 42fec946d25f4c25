"""Advantage actor-critic (A2C)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from agents.ppo import PPO

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


class A2C(PPO):
    """A2C (arXiv 1602.01783, synchronous): PPO with one gradient step per round.

    At the parameters that played every ratio is 1: nothing is clipped, and the gradient is that of
    -advantage * log-likelihood (arXiv 2205.09123).

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        lmbda, normalize, settings: those of :class:`~agents.ppo.PPO`.

    Raises:
        ValueError: a setting is out of range, or ``epochs`` is not 1.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        lmbda: float = 1.0,
        normalize: bool = False,
        **settings: Any,
    ):
        if settings.get("epochs", 1) != 1:
            raise ValueError(f"epochs={settings['epochs']} is not valid: A2C takes one step per round; use ppo")
        super().__init__(actor, optimizer, lmbda=lmbda, normalize=normalize, **settings)
