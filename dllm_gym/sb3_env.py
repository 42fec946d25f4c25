"""Where :mod:`dllm_gym.envs.sb3` was before: the name stays for those who import it."""

from dllm_gym.envs.sb3 import DLLMUnmaskSB3VecEnv

__all__ = ["DLLMUnmaskSB3VecEnv"]
