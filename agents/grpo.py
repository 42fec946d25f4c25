"""Group-relative policy optimisation (GRPO) over unmasking steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.advantages import group_advantage
from agents.algorithm import Algorithm, per_step
from agents.losses import Descent, GRPOLoss, ReferenceKL, Regularized, check_clip, in_chunks, log_likelihood, pack
from dllm_gym.checks import flag, number

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from dllm_gym.deciders.policy import Policy

    LogProb = Callable[[ProbabilisticActor], Tensor]


class Reference:
    """What a policy is held near: a loss beside the clipped objective."""

    def check(self, policy: Policy) -> None:
        """ValueError if the policy cannot be regularised this way."""

    def loss(self, actor: ProbabilisticActor) -> nn.Module:
        """Module of packed steps -> its ``loss_*``."""
        raise NotImplementedError

    def renew(self, steps: TensorDictBase, actor: ProbabilisticActor, log_prob: LogProb) -> None:
        """Prepare a gradient step of ``actor``; ``log_prob`` gives that of the actions, float [N], under any actor."""


class Beginning(Reference):
    """The policy as it is when training begins, after a warm start if there is one; by the KL divergence from it."""

    def __init__(self, actor: ProbabilisticActor):
        self.actor = copy.deepcopy(actor).requires_grad_(False)

    def loss(self, actor: ProbabilisticActor) -> nn.Module:
        return ReferenceKL(actor)

    def renew(self, steps: TensorDictBase, actor: ProbabilisticActor, log_prob: LogProb) -> None:
        if "reference_log_prob" not in steps:  # the same in every step of a round
            steps["reference_log_prob"] = log_prob(self.actor)


class GRPO(Algorithm):
    """GRPO as in LUP (arXiv 2512.09106): a step's action is its "token", no critic; the other options are off there.

    Args:
        actor: TorchRL actor (``deciders.make_actor``), trained in place.
        optimizer: factory, parameters -> optimizer. LUP: AdamW, lr 3e-5, betas (0.9, 0.99), weight decay 0.1.
        clip_epsilon: ratios count within [1 - epsilon, 1 + epsilon]; in (0, 1). A pair (low, high) bounds the two
            sides apart ("clip-higher", DAPO, arXiv 2503.14476); low in (0, 1), high > 0.
        normalize: divide the advantage by the group's standard deviation (DeepSeekMath's GRPO, arXiv 2402.03300).
        summed: an episode's loss is the sum over its steps, the policy gradient itself. LUP takes their mean, which
            weighs the steps of short episodes more (the length bias of GRPO, arXiv 2503.20783).
        kl_scale: weight of the reference; 0 leaves it out.
        reference: None: :class:`Beginning`, the actor as it is given here.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, epochs, max_grad_norm, chunk``).

    Raises:
        ValueError: a setting is out of range.
    """

    compares = True

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        clip_epsilon: float | Sequence[float] = 0.5,
        normalize: bool = False,
        summed: bool = False,
        kl_scale: float = 0.0,
        reference: Reference | None = None,
        **descent: Any,
    ):
        number("kl_scale", kl_scale, least=0)
        self.normalize, self.summed = flag("normalize", normalize), flag("summed", summed)
        self.reference = (reference or Beginning(actor)) if kl_scale else None
        loss: nn.Module = GRPOLoss(
            actor, None, clip_epsilon=check_clip(clip_epsilon), entropy_bonus=False, functional=False
        )
        if self.reference is not None:
            loss = Regularized(loss, self.reference.loss(actor), kl_scale)
        if isinstance(self.reference, Beginning):
            loss.reference = self.reference.actor  # a part of the loss, so that it is stored with it
        super().__init__(actor, Descent(loss, optimizer, **descent))

    def advantages(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The advantage of every step, float [E, T, 1], and bool [E]: of episodes that are told apart from others of
        their group."""
        advantage, informative = group_advantage(reward, group, self.normalize)
        return per_step(advantage, batch), informative

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`; ``informative`` is the share of episodes in groups with different rewards.

        If no group is informative nothing is learnt, and the metrics of a gradient step are absent.
        """
        advantage, informative = self.advantages(batch, reward, group)
        batch = batch.select(*self.actor.in_keys, *(self.observes or ()), "action", "action_log_prob", "active")
        batch["advantage"] = advantage
        batch["episode"] = torch.arange(len(reward), device=reward.device)[:, None].expand(batch.shape)
        # Without a reference a group whose rewards are all equal has no gradient: its steps need no forward.
        steps = pack(batch, keep=None if self.reference else informative, summed=self.summed)
        return {
            **self.descent.run(steps, self._renew),
            "informative": float(informative.float().sum()) / max(len(informative), 1),
        }

    def _renew(self, steps: TensorDictBase) -> None:
        def log_prob(actor: ProbabilisticActor) -> Tensor:
            return in_chunks(lambda part: log_likelihood(actor, part), steps, self.descent.chunk)

        if self.reference:
            self.reference.renew(steps, self.actor, log_prob)
