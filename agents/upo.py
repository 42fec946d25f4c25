"""Unmasking policy optimisation (UPO, arXiv 2510.05725): GRPO over single positions, held near a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.grpo import GRPO, Reference
from agents.losses import Likelihood
from dllm_gym.checks import number
from dllm_gym.deciders.distributions import OnePosition
from dllm_gym.deciders.rules import first_k

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.grpo import LogProb
    from dllm_gym.deciders.policy import Policy


class MaxConfidence(Reference):
    """Realization 1: cross-entropy towards the most confident position, -log pi(argmax confidence).

    The paper starts it from a policy that imitates that rule: ``agent.warm_start=`` a run of ``agent=imitation
    expert=max_confidence distribution=one_position``.
    """

    def loss(self, actor: ProbabilisticActor) -> nn.Module:
        return TowardsMaxConfidence(actor)


class TowardsMaxConfidence(nn.Module):
    """The likelihood loss of what the max-confidence rule would have done in each step."""

    def __init__(self, actor: ProbabilisticActor):
        super().__init__()
        self.likelihood = Likelihood(actor, "reference")

    def forward(self, steps: TensorDictBase) -> TensorDict:
        legal = steps["action_mask"] != 0
        target = first_k(steps["confidence"][..., 0], legal, 1).to(torch.int8)  # (N, L)
        return self.likelihood(steps.copy().set("action", target))


class Divergence(Reference):
    """KL divergence of the policy's trajectories from a reference's, by its score-function gradient.

    With log pi and log ref summed over an episode's steps, the gradient is that of
    clamp(pi / pi_old, 0.5, 2) * (1 + log pi - log ref) * log pi with everything before the last factor held fixed.
    """

    def log_prob(self, steps: TensorDictBase) -> Tensor:
        """Float [N], of the actions under the reference."""
        raise NotImplementedError

    def loss(self, actor: ProbabilisticActor) -> nn.Module:
        return Likelihood(actor, "reference", coefficient="divergence")

    def renew(self, steps: TensorDictBase, actor: ProbabilisticActor, log_prob: LogProb) -> None:
        columns = torch.stack([log_prob(actor), steps["action_log_prob"], self.log_prob(steps)], -1)  # (N, 3)
        episodes = int(steps["episode"].max()) + 1
        sums = columns.new_zeros(episodes, 3).index_add_(0, steps["episode"], columns)  # (E, 3)
        now, old, reference = sums.unbind(-1)
        coefficient = (now - old).exp().clamp(0.5, 2) * (1 + now - reference)  # (E,)
        steps["divergence"] = -coefficient[steps["episode"]]  # the likelihood loss is minus log pi


class Softmax(Divergence):
    """Realization 2: softmax of the confidences over the legal positions.

    Args:
        temperature: of the softmax; 0.05 in the paper.
    """

    def __init__(self, temperature: float = 0.05):
        self.temperature = number("temperature", temperature, above=0)

    def log_prob(self, steps: TensorDictBase) -> Tensor:
        return OnePosition(steps["confidence"][..., 0], steps["action_mask"], self.temperature).log_prob(
            steps["action"]
        )


class TopK(Divergence):
    """Realization 3: uniform over the K most confident legal positions, the only ones that the policy may choose.

    Args:
        k: K; 5 in the paper. The policy needs ``candidates`` = K (``policy.candidates=5``).
    """

    def __init__(self, k: int = 5):
        if k < 2:
            raise ValueError(f"k={k} is not valid for the top-K reference: positions to choose among, >= 2")
        self.k = k

    def check(self, policy: Policy) -> None:
        if policy.candidates != self.k:
            raise ValueError(
                f"the top-K reference with k={self.k} is uniform over the policy's own candidates, "
                f"but policy.candidates={policy.candidates}: set policy.candidates={self.k}"
            )

    def log_prob(self, steps: TensorDictBase) -> Tensor:
        return -(steps["action_mask"] != 0).sum(-1).clamp(1, self.k).log()


class UPO(GRPO):
    """GRPO over single positions, with ratios summed over an episode's steps, plus ``beta`` times a reference.

    Args:
        actor: TorchRL actor over ``OnePosition``, trained in place. optimizer: factory, parameters -> optimizer.
        reference: one of the paper's realizations: :class:`MaxConfidence`, :class:`Softmax` or :class:`TopK`.
        beta: weight of the reference; 1e-4 in the paper.
        normalize, settings: those of :class:`~agents.grpo.GRPO`; the paper takes 16 epochs.

    Raises:
        ValueError: a setting is out of range, or the policy or its distribution does not fit.
    """

    summed = True

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        reference: Reference,
        beta: float = 1e-4,
        normalize: bool = True,
        **settings: Any,
    ):
        if not issubclass(actor[-1].distribution_class, OnePosition):
            raise ValueError("UPO chooses one position per step: use distribution=one_position")
        number("beta", beta, least=0)
        reference.check(actor[0].module)
        super().__init__(actor, optimizer, normalize=normalize, kl_scale=beta, reference=reference, **settings)
        self.observes = list(dict.fromkeys([*actor.in_keys, "confidence"]))
