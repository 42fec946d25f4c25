"""Unmasking policy optimisation (UPO, arXiv 2510.05725): GRPO over single positions, held near a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.grpo import GRPO, Reference
from agents.losses import Likelihood
from dllm_gym.checks import flag, number, whole
from dllm_gym.deciders.distributions import OnePosition
from dllm_gym.deciders.rules import first_k

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.grpo import LogProb
    from dllm_gym.deciders.policy import Policy


class MaxConfidence(Reference):
    """Realization 1: cross-entropy towards the most confident position, -log pi(argmax confidence).

    The paper starts it from a policy that imitates that rule: ``agent.warm_start=`` a run of ``agent=imitation
    expert=max_confidence distribution=one_position``, or ``agent.imitation.rounds=`` some.

    Args:
        share_ties: equally confident positions share the target, as in the published code; False: the leftmost has it,
            which is the one that the rule takes.
    """

    def __init__(self, share_ties: bool = False):
        self.share_ties = flag("share_ties", share_ties)

    def loss(self, actor: ProbabilisticActor) -> nn.Module:
        return TowardsMaxConfidence(actor, self.share_ties)


class TowardsMaxConfidence(nn.Module):
    """The cross-entropy of the policy with what the max-confidence rule would have done in each step."""

    def __init__(self, actor: ProbabilisticActor, share_ties: bool):
        super().__init__()
        self.actor, self.share_ties = actor, share_ties

    def forward(self, steps: TensorDictBase) -> TensorDict:
        legal = steps["action_mask"] != 0
        confidence = steps["confidence"][..., 0].masked_fill(~legal, -1.0)  # (N, L)
        if self.share_ties:
            best = (confidence == confidence.amax(-1, keepdim=True)) & legal
        else:
            best = first_k(confidence, legal, 1)
        target = best / best.sum(-1, keepdim=True).clamp_min(1)
        log_prob = self.actor.get_dist(steps.select(*self.actor.in_keys)).logits.log_softmax(-1)
        loss = -(target * log_prob).sum(-1)  # (N,)
        return TensorDict({"loss_reference": (loss * steps["weight"]).sum()})


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
        vocab_size: V: a position weighs the sum over all V tokens of exp(p / temperature), as in the published code,
            not exp of its largest p alone. What is observed of p counts as it is, and what is left of its mass as if
            it were spread evenly over the other tokens: exact for ``env.top_k`` = V, and near it for a large V, where
            the tokens that are impossible make up most of the sum. 0: the largest p alone. (None stands for the
            model's own in configurations; a reference has to be told before it is used.)
    """

    def __init__(self, temperature: float = 0.05, vocab_size: int | None = 0):
        self.temperature = number("temperature", temperature, above=0)
        self.vocab_size = None if vocab_size is None else whole("vocab_size", vocab_size, least=0)

    def check(self, policy: Policy) -> None:
        if self.vocab_size is None:
            raise ValueError("reference.vocab_size=None: need the size of the model's vocabulary, or 0")

    def log_prob(self, steps: TensorDictBase) -> Tensor:
        weight = self.log_weight(steps["confidence"])
        return OnePosition(weight, steps["action_mask"]).log_prob(steps["action"])

    def log_weight(self, confidence: Tensor) -> Tensor:
        """Float [.., L] of the largest probabilities [.., L, K]: the logarithm of what each position weighs."""
        if not self.vocab_size:
            return confidence[..., 0] / self.temperature
        seen = (confidence / self.temperature).logsumexp(-1)
        unseen = self.vocab_size - confidence.shape[-1]
        if unseen <= 0:
            return seen
        left = (1 - confidence.sum(-1)).clamp_min(0)
        return torch.logaddexp(seen, left / unseen / self.temperature + math.log(unseen))


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
        super().__init__(
            actor, optimizer, normalize=normalize, summed=True, kl_scale=beta, reference=reference, **settings
        )
        self.observes = list(dict.fromkeys([*actor.in_keys, "confidence"]))
