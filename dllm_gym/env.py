"""Where :mod:`dllm_gym.envs.single` was before: the name stays for those who import it."""

from dllm_gym.envs.single import DLLMUnmaskEnv

__all__ = ["DLLMUnmaskEnv"]
