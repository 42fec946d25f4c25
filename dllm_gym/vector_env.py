"""Where :mod:`dllm_gym.envs.vector` was before: the name stays for those who import it."""

from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

__all__ = ["DLLMUnmaskVectorEnv"]
