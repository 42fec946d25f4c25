"""Where :mod:`dllm_gym.envs.torchrl` was before: the name stays for those who import it."""

from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

__all__ = ["DLLMUnmaskTorchRLEnv"]
