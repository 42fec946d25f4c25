"""The Dream family (Dream-7B, DiffuCoder) on transformers' own Qwen2 classes.

Dream (arXiv 2508.15487) is a Qwen2 whose attention looks both ways and whose logits are shifted: those for token j come
from position j - 1, as in the autoregressive model that it was initialised from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from dllm_gym.models.base import DLLM
from dllm_gym.models.cache import View
from dllm_gym.models.checkpoint import Checkpoint
from dllm_gym.models.families.qwen import two_way_config


class DreamDLLM(DLLM):
    view = View(shift=1)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = super().hidden_states(tokens, attention_mask)
        shifted = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)  # (B, T, d)
        if attention_mask is None:
            return shifted
        first = attention_mask & ~pad(
            attention_mask[:, :-1], (1, 0)
        )  # a row's first token keeps its own, padded or not
        return torch.where(first.to(hidden.device)[..., None], hidden, shifted)


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``Dream``."""
    network = checkpoint.weights(Qwen2ForCausalLM, two_way_config("qwen2", checkpoint.config, "Dream"))
    return DreamDLLM(network.model, network.lm_head, checkpoint.tokenizer(Qwen2Tokenizer), checkpoint.config)
