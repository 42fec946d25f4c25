"""Advantages: how much better an episode did than what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus the mean of its group, not divided by the standard deviation (LUP's GRPO).

    Args:
        reward: float [E].
        group: int64 [E], equal for episodes of one prompt; any ids, any order, any group sizes.

    Returns:
        advantage: float [E], exactly 0 in groups whose rewards are all equal.
        informative: bool [E], False in those groups.

    Raises:
        ValueError: shapes differ or a reward is not finite.
    """
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(f"reward {tuple(reward.shape)} and group {tuple(group.shape)} must both be [E]")
    if not reward.isfinite().all():
        raise ValueError("a reward is not finite")
    # An [E, E] comparison is small, and unlike a scatter it sums in a fixed order on every device.
    same = group[:, None] == group  # (E, E)
    mean = torch.where(same, reward, 0).sum(-1) / same.sum(-1)
    highest = torch.where(same, reward, -torch.inf).amax(-1)
    informative = highest > torch.where(same, reward, torch.inf).amin(-1)
    return torch.where(informative, reward - mean, 0), informative
