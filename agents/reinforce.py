"""REINFORCE: the plain policy gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrl.objectives import PPOLoss

from agents.advantages import leave_one_out_advantage
from agents.algorithm import Algorithm, per_step
from agents.losses import Descent, EpisodeMean, entropy_settings, pack

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


class PolicyGradientLoss(EpisodeMean, PPOLoss):
    """-advantage * ratio: at the parameters that played (ratio 1) its gradient is REINFORCE's.

    Steps are summed within an episode. The papers' mean over an episode's steps would weigh episodes by a length that
    the policy controls, which is no longer the gradient of the expected reward.

    (TorchRL's own ``ReinforceLoss`` insists on a critic.)
    """


class Reinforce(Algorithm):
    """REINFORCE (Williams, 1992) with the leave-one-out mean of the prompt's other episodes as baseline (RLOO).

    With ``agent.group_size=1`` there are no others and no baseline. One gradient step per round: a second one would no
    longer be on the policy that played.

    Args:
        actor: TorchRL actor, trained in place. optimizer: factory, parameters -> optimizer.
        entropy_scale: weight of the entropy bonus; 0 leaves it out.
        descent: further settings of :class:`~agents.losses.Descent` (``scheduler, max_grad_norm, chunk``).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        entropy_scale: float = 0.0,
        **descent: Any,
    ):
        if descent.get("epochs", 1) != 1:
            raise ValueError(f"epochs={descent['epochs']} is not valid: REINFORCE takes one step per round; use ppo")
        loss = PolicyGradientLoss(actor, None, **entropy_settings(entropy_scale, actor), functional=False)
        super().__init__(actor, Descent(loss, optimizer, **descent))

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`."""
        batch = batch.select(*self.actor.in_keys, "action", "action_log_prob", "active")
        batch["advantage"] = per_step(leave_one_out_advantage(reward, group), batch)
        return self.descent.run(pack(batch, summed=True))
