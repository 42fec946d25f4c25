"""Group-relative policy optimisation (GRPO) over unmasking steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from agents.advantages import group_advantage
from agents.losses import Descent, GRPOLoss, pack

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


class GRPO:
    """GRPO as in LUP (arXiv 2512.09106): a step's action is its "token", no KL term, no critic.

    Args:
        actor: TorchRL actor (``policies.make_actor``), trained in place.
        optimizer: factory, parameters -> optimizer. LUP: AdamW, lr 3e-5, betas (0.9, 0.99), weight decay 0.1.
        scheduler: factory, optimizer -> scheduler, stepped once per ``update``; None keeps the rate constant.
        epochs: gradient steps per batch of episodes.
        clip_epsilon: ratios count within [1 - epsilon, 1 + epsilon]; in (0, 1).
        max_grad_norm: the gradient is scaled down to this norm.
        chunk: most steps in one forward (bounds memory only), or None.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        epochs: int = 2,
        clip_epsilon: float = 0.5,
        max_grad_norm: float = 0.2,
        chunk: int | None = None,
    ):
        if epochs < 1:
            raise ValueError(f"epochs={epochs} is not valid: gradient steps per batch, >= 1")
        if not 0 < clip_epsilon < 1:
            raise ValueError(f"clip_epsilon={clip_epsilon} is not valid: it must be in (0, 1)")
        self.epochs = epochs
        self.reads = [*actor.in_keys, "action", "action_log_prob", "active"]
        loss = GRPOLoss(actor, None, clip_epsilon=clip_epsilon, entropy_bonus=False, functional=False)
        self.descent = Descent(loss, optimizer, scheduler, max_grad_norm, chunk)

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """Learn from one batch of episodes.

        Args:
            batch: [E, T] with the observation, ``action``, ``action_log_prob`` and ``active`` bool.
            reward: float [E].
            group: int64 [E], the prompt's group.

        Returns:
            Metrics of the last gradient step (``loss``, ``clip_fraction``, ``kl_approx``, ``max_ratio``, ``grad_norm``,
            ..), ``informative`` (share of episodes in groups with different rewards), ``gradient_steps`` and
            ``learning_rate``. If no group is informative nothing is learnt: ``gradient_steps`` is 0 and the metrics of
            a gradient step are absent.
        """
        if len(group.unique()) == len(group):
            raise ValueError("GRPO compares the episodes of one prompt: agent.group_size must be at least 2")
        advantage, informative = group_advantage(reward, group)
        batch = batch.select(*self.reads)
        batch["advantage"] = advantage[:, None, None].expand(*batch.shape, 1)  # (E, T, 1)
        steps = pack(batch, keep=informative)
        epochs = self.epochs if len(steps) else 0
        metrics: dict[str, float] = {}
        for _ in range(epochs):
            metrics = self.descent.step(steps)
        metrics["informative"] = float(informative.float().mean())
        metrics["gradient_steps"] = float(epochs)
        metrics["learning_rate"] = self.descent.end_round()
        return metrics

    def state_dict(self) -> dict:
        """Actor, optimizer and schedule: all that a later process needs to go on."""
        return self.descent.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.descent.load_state_dict(state)
