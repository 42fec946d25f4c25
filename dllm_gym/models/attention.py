"""The one attention that dllm_gym adds to transformers', through its public interface for attentions.

It is transformers' own scaled dot-product attention and differs in two places: a forward that is given ``lanes``
attends to the keys and values that these keep (:mod:`dllm_gym.models.cache`), and queries and keys that come in float32
(LLaDA's rotation) are rounded to the dtype of the values. With neither it computes what ``sdpa`` computes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_lanes"  # its name in transformers; what begins with "sdpa" takes sdpa's masks


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lanes: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention of one layer; ``lanes`` is what a model's forward was given under that name.

    ``lanes.update(key, value, layer)`` stores new keys and values, each [c, heads, q, size], and returns those that are
    attended to, each [c, heads, K, size].
    """
    key = key.to(value.dtype)
    if lanes is not None:
        key, value = lanes.update(key, value, module.layer_idx)
    return sdpa_attention_forward(module, query.to(value.dtype), key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
