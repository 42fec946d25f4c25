"""The decision process in tensors: lanes and their transition, the dLLM's predictions, rewards, settings."""

from dllm_gym.process.config import EnvConfig
from dllm_gym.process.grading import Outcome
from dllm_gym.process.rewards import Additive, AlphaRange, Multiplicative, Reward, make_reward
from dllm_gym.process.unmasking import Unmasking

__all__ = ["Additive", "AlphaRange", "EnvConfig", "Multiplicative", "Outcome", "Reward", "Unmasking", "make_reward"]
