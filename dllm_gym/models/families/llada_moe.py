"""LLaDA-MoE (LLaDA-MoE-7B-A1B, arXiv 2509.24389) on transformers' Qwen3Moe classes.

A mixture of experts whose attention looks both ways, with a norm per head of queries and keys; the weights of the
chosen experts are those of the softmax over all, not normalised. On the hub its ``model_type`` is ``llada``, which is
another architecture: its ``architectures`` tell them apart.
"""

from __future__ import annotations

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, require, require_fields
from dllm_gym.models.families.decoders import decoder, two_way_config
from dllm_gym.models.views import View

NEEDED = {
    "qk_layernorm": True,
    "attention_bias": False,
    "clip_qkv": None,
    "shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "router_num_group": None,
    "router_topk_group": None,
    "routed_scaling_factor": 1,
    "norm_topk_prob": False,
    "partial_rotary_factor": 1,
}


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``LLaDAMoEModelLM``."""
    raw = checkpoint.config
    require(raw, "LLaDA-MoE", **NEEDED)
    require_fields(raw, "expert_intermediate_size", "num_experts", "num_experts_per_tok")
    layers = raw.get("moe_layer_freq")
    if layers is not None and set(layers if isinstance(layers, list) else [layers]) != {1}:
        raise ValueError(f"config.json: moe_layer_freq={layers!r} is not supported for LLaDA-MoE (need 1 everywhere)")
    renamed = raw | {"moe_intermediate_size": raw["expert_intermediate_size"], "norm_topk_prob": False}
    config = two_way_config("qwen3_moe", renamed, "LLaDA-MoE")
    return decoder(checkpoint, "qwen3_moe", config, View(), checkpoint.tokenizer())
