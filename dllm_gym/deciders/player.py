"""A policy that plays: the network, what its logits mean, and how they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_gym.checks import number
from dllm_gym.deciders.distributions import UnmaskDistribution
from dllm_gym.deciders.policy import Policy

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


def make_actor(
    policy: Policy, distribution_class: type[UnmaskDistribution], temperature: float = 1.0
) -> ProbabilisticActor:
    """TorchRL actor for the losses: observation TensorDict -> ``logits``, ``action``, ``action_log_prob``.

    It shares the policy's parameters and samples from torch's global generator; rollouts use ``PolicyDecider``.
    """
    # Imported here: TorchRL takes seconds to import, and acting does not need it.
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import ProbabilisticActor

    return ProbabilisticActor(
        TensorDictModule(policy, in_keys=list(policy.in_keys), out_keys=["logits"]),
        in_keys=["logits", "action_mask"],
        out_keys=["action"],
        distribution_class=distribution_class,
        distribution_kwargs={"temperature": check_temperature(temperature)},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


def check_temperature(temperature: float) -> float:
    """``temperature`` if logits can be divided by it; ValueError otherwise."""
    number("temperature", temperature, above=0)
    return temperature


class PolicyDecider:
    """A policy as a decider: ``decider(observation, noise) -> action``.

    Args:
        policy: the network.
        distribution_class: what its logits mean.
        temperature: divides the logits, > 0.
        greedy: take the distribution's ``deterministic_sample`` and ignore the noise.
        alpha: the speed weight that evaluations ask for, where the environment has a range of them.
    """

    def __init__(
        self,
        policy: Policy,
        distribution_class: type[UnmaskDistribution],
        temperature: float = 1.0,
        greedy: bool = False,
        alpha: float | None = None,
    ):
        self.policy, self.distribution_class, self.alpha = policy, distribution_class, alpha
        self.temperature, self.greedy = check_temperature(temperature), greedy

    @property
    def requires(self) -> dict[str, int]:
        """Settings of the environment that the policy needs."""
        return self.policy.requires

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return self._act(observation, noise)[0]

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action int8 [.., L] and its log-probability float32 [..] (of the greedy action too)."""
        action, distribution = self._act(observation, noise)
        return action, distribution.log_prob(action)

    def distribution(self, observation: Mapping[str, Tensor]) -> UnmaskDistribution:
        """What the policy would draw from, with gradients where they are enabled."""
        logits = self.policy(*self.policy.read(observation))
        return self.distribution_class(logits, observation["action_mask"], self.temperature)

    @torch.no_grad()
    def _act(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, UnmaskDistribution]:
        distribution = self.distribution(observation)
        action = distribution.deterministic_sample if self.greedy else distribution.from_noise(noise)
        return action, distribution

    def __str__(self) -> str:
        how = "greedy" if self.greedy else f"temperature={self.temperature:g}"
        return f"{type(self.policy).__name__}({self.distribution_class.__name__}, {how})"
