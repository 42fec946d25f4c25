"""Advantages: how much better an episode did than what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Reward minus the mean of its group (GRPO).

    Args:
        reward: float [E].
        group: int64 [E], equal for episodes of one prompt; any ids, any order, any group sizes.
        normalize: also divide by the group's standard deviation (of the sample, as in GRPO and UPO); LUP does not.

    Returns:
        advantage: float [E], exactly 0 in groups whose rewards are all equal.
        informative: bool [E], False in those groups.

    Raises:
        ValueError: shapes differ or a reward is not finite.
    """
    same = _same_group(reward, group)  # (E, E)
    mean = torch.where(same, reward, 0).sum(-1) / same.sum(-1)
    highest = torch.where(same, reward, -torch.inf).amax(-1)
    informative = highest > torch.where(same, reward, torch.inf).amin(-1)
    advantage = torch.where(informative, reward - mean, 0)
    if normalize:
        # Scaled to its largest first: rewards may be as small as (1 / L) ** alpha, whose squares are 0 in float32.
        largest = torch.where(same, advantage.abs(), 0).amax(-1)
        advantage = advantage / torch.where(informative, largest, 1)
        variance = torch.where(same, advantage**2, 0).sum(-1) / (same.sum(-1) - 1).clamp_min(1)
        advantage = advantage / torch.where(informative, variance, 1).sqrt()
    return advantage, informative


def leave_one_out_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """Reward minus the mean of the *other* episodes of its group [E]: an unbiased baseline (RLOO, arXiv 2402.14740).

    A group of one has nothing to be compared with: its advantage is the reward itself (plain REINFORCE).

    Raises:
        ValueError: shapes differ or a reward is not finite.
    """
    same = _same_group(reward, group)  # (E, E)
    others = torch.where(same, reward, 0).sum(-1) - reward
    return reward - others / (same.sum(-1) - 1).clamp_min(1)


def generalized_advantage(
    value: Tensor, reward: Tensor, active: Tensor, gamma: float, lmbda: float
) -> tuple[Tensor, Tensor]:
    """GAE(lambda) of episodes that pay once, at their end (arXiv 1506.02438).

    The end is final however it came (a truncated completion is graded as well, and the time is observed): nothing is
    bootstrapped behind it.

    Args:
        value: float [E, T], the critic's; what lies behind an episode's end does not matter.
        reward: float [E]. active: bool [E, T], True up to the end.
        gamma: discount per step. lmbda: 1 is the Monte Carlo return, 0 the one-step difference.

    Returns:
        advantage, value target: float [E, T, 1], 0 where not active.
    """
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    time = torch.arange(active.shape[1], device=active.device)
    end = time == active.sum(1, keepdim=True) - 1  # (E, T), the last step
    value = torch.where(active, value, 0)
    following = torch.where(end, 0, torch.nn.functional.pad(value[:, 1:], (0, 1)))
    paid = torch.where(end, reward[:, None], 0)
    columns = (x[..., None] for x in (value, following, paid, end, end))
    advantage, target = generalized_advantage_estimate(gamma, lmbda, *columns)
    return advantage * active[..., None], target * active[..., None]


def _same_group(reward: Tensor, group: Tensor) -> Tensor:
    """bool [E, E]. Small, and unlike a scatter it lets sums run in a fixed order on every device."""
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(f"reward {tuple(reward.shape)} and group {tuple(group.shape)} must both be [E]")
    if not reward.isfinite().all():
        raise ValueError("a reward is not finite")
    return group[:, None] == group
