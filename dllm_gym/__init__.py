"""dllm_gym: the decoding of a frozen masked-diffusion language model as a reinforcement-learning environment."""

import os
import sys
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    from dllm_gym.decode import Decoder

__version__ = "0.1.0"
__all__ = ["Decoder", "__version__"]

register(
    id="DLLMUnmask-v0",
    entry_point="dllm_gym.envs.single:DLLMUnmaskEnv",
    vector_entry_point="dllm_gym.envs.vector:DLLMUnmaskVectorEnv",
)


def _compute_alone() -> None:
    """In a forked process: torch with one thread.

    A fork copies one thread only. OpenMP still counts on the others that it started before, and waits for them for
    ever at the first operation that is large enough to be shared (PyTorch issue 17199). torch's own DataLoader sets one
    thread in its workers, too; forked workers are one per core anyway.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_alone)


def __getattr__(name: str) -> Any:
    """``Decoder``, imported when it is asked for: it takes seconds."""
    if name != "Decoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dllm_gym.decode import Decoder

    return Decoder
