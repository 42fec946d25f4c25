"""What Gymnasium is told of observations and actions, and the check of an action."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, MultiBinary
from torch import Tensor

from dllm_gym.process.entries import BITS, Entry
from dllm_gym.process.unmasking import Unmasking


def observation_space(core: Unmasking) -> Dict:
    """The space of one lane's observation."""
    return Dict({entry.name: space(entry, core) for entry in core.entries})


def space(entry: Entry, core: Unmasking) -> gym.Space:
    """The space of one lane's entry."""
    shape = entry.size(core)
    if entry.dtype is BITS:
        return MultiBinary(shape[0])
    return Box(entry.low, entry.most(core), shape, np.int64 if entry.dtype is torch.int64 else np.float32)


def check_action(action: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``action`` as a tensor on ``device``.

    Raises:
        ValueError: it has another shape, or it is not made of integers or bools (floats pass if they are 0 or 1, as
            Stable-Baselines3 sends them).
    """
    try:
        action = torch.as_tensor(action)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"action={action!r}: need integers or bools of shape {shape} (1 = unmask)") from None
    if tuple(action.shape) != shape:
        raise ValueError(f"action of shape {tuple(action.shape)}: need {shape}")
    if action.is_complex() or (action.is_floating_point() and not torch.isin(action, action.new_tensor([0, 1])).all()):
        raise ValueError(f"action of dtype {action.dtype}: need integers or bools (1 = unmask)")
    return action.to(device)
