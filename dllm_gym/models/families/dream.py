"""The Dream family (Dream-7B, Dream-Coder, DiffuCoder) on transformers' own Qwen2 classes.

Dream (arXiv 2508.15487) is a Qwen2 whose attention looks both ways and whose logits are shifted: those for token j come
from position j - 1, as in the autoregressive model that it was initialised from. Dream-Coder (arXiv 2509.01142) and
DiffuCoder (arXiv 2506.20639) have the same code and the same ``model_type``.
"""

from __future__ import annotations

from transformers import Qwen2Tokenizer

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint
from dllm_gym.models.families.decoders import decoder, two_way_config
from dllm_gym.models.views import View


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``Dream``."""
    config = two_way_config("qwen2", checkpoint.config, "Dream")
    return decoder(checkpoint, "qwen2", config, View(shift=1), checkpoint.tokenizer(Qwen2Tokenizer))
