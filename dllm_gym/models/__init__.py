"""Frozen dLLMs behind one interface."""

from dllm_gym.models.base import DLLM, Prediction, Sampling
from dllm_gym.models.load import load_dllm, register

__all__ = ["DLLM", "Prediction", "Sampling", "load_dllm", "register"]
