"""Self-Aware Scheduling (SAS): GRPO whose reward is what the dLLM itself gives to a right answer along the path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.advantages import group_advantage
from agents.grpo import GRPO
from dllm_gym.checks import flag

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


def path_log_prob(batch: TensorDictBase) -> Tensor:
    """float32 [E, T]: log-likelihood of the true tokens that each step commits, given those committed before; 0 behind
    an episode's end. The last step of one that is cut is counted as if it had committed all that it left masked: else
    nothing would be likelier than to commit nothing."""
    active = batch["active"]  # (E, T)
    last = active & ~torch.cat([active[:, 1:], torch.zeros_like(active[:, :1])], 1)
    picked = (batch["action"] != 0) & (batch["action_mask"] != 0) & active[..., None]
    counted = picked | ((batch["mask"] != 0) & last[..., None])
    return torch.where(counted, batch["true_log_prob"], 0.0).sum(-1)


class SAS(GRPO):
    """GRPO with the self-aware reward: a step that commits position i earns log p(x_i | what stands), x a right answer.

    After *Scheduling Thoughts: Learning the Order of Thought in Diffusion Language Models* (Xu, Liu, Agrawal, Chen and
    Huang, arXiv 2606.23567). The sum over a path is log p(x | order), whose mean over data bounds how far what is
    decoded in that order is from the data; a step's reward is dense, needs no grader, and the dLLM stays frozen.
    Episodes are teacher-forced: whatever order the policy draws, the true tokens are committed (``Task.gold``, with EOS
    behind it). The environment's own reward plays no part.

    What could be read of the paper does not say, and is chosen here: ``to_go`` and the settings of GRPO. Its second
    stage, which fine-tunes the dLLM along learned paths, is left out: the dLLM is frozen here. The paper decodes one
    position per step (``distribution=one_position``); with sets of positions a step earns the sum over its set, and
    what an episode that is cut leaves masked counts as committed by its last step.

    Args:
        actor, optimizer, settings: as of :class:`~agents.grpo.GRPO`.
        to_go: a step's advantage is what is earned from it on, less its group's mean from the same step on; False: the
            whole path's in every step.

    Raises:
        ValueError: a setting is out of range.
    """

    requires = {"teacher_forcing": 1, "lookahead": 1}  # of what is left masked, in whichever block

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        to_go: bool = True,
        **settings: Any,
    ):
        self.to_go = flag("to_go", to_go)
        super().__init__(actor, optimizer, **settings)
        self.observes = list(dict.fromkeys([*actor.in_keys, "mask", "action_mask", "true_log_prob"]))

    def worth(self, batch: TensorDictBase, reward: Tensor) -> Tensor:
        """float32 [E]: the log-likelihood of the right answer along each path."""
        return path_log_prob(batch).sum(-1)

    def advantages(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`GRPO.advantages`."""
        if not self.to_go:
            return super().advantages(batch, reward, group)
        earned = path_log_prob(batch)  # (E, T)
        left = earned.flip(1).cumsum(1).flip(1)
        columns = [group_advantage(column, group, self.normalize) for column in left.unbind(1)]
        advantage, informative = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))  # (E, T)
        return advantage[..., None], informative.any(1)

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`GRPO.update`; ``log_likelihood`` is the mean of a right answer's along the paths, in nats."""
        worth = self.worth(batch, reward)
        return {**super().update(batch, worth, group), "log_likelihood": float(worth.mean())}
