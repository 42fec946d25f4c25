"""LLaDA2 (LLaDA2.0-mini, LLaDA2.0-flash) on transformers' Glm4Moe classes.

A mixture-of-experts model that is block-causal: a token sees its own block of 32 positions, in both directions, and
the blocks before it. Blocks are counted from the beginning of the prompt, as the environment counts
its own for such models. LLaDA2's own sampler rounds a sequence up to whole blocks with masks; here the sequence ends
with the completion, which matters to its last block only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, refuse_arithmetic, require, require_fields
from dllm_gym.models.families.decoders import view_of
from dllm_gym.models.views import ViewedDLLM

BLOCK = 32  # the length that the checkpoints were trained with; their configs do not say it
NEEDED = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
    "norm_topk_prob": True,
    "norm_head": False,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
}
# Glm4Moe's name of a size -> LLaDA2's.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "first_k_dense_replace": "first_k_dense_replace",
}
# LLaDA2's name of a part -> Glm4Moe's.
NAMES = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}


def glm_config(raw: Mapping[str, Any]) -> Glm4MoeConfig:
    """The Glm4Moe configuration equivalent to LLaDA2's raw ``config.json``.

    Raises:
        ValueError: the config asks for something that Glm4Moe does not compute, or lacks a size.
    """
    refuse_arithmetic(raw, "LLaDA2", ("auto_map", "block_size"))
    require_fields(raw, *SIZES.values(), "rope_theta", "partial_rotary_factor")
    require(dict(raw), "LLaDA2", **NEEDED)
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    return Glm4MoeConfig(
        **{glm: raw[llada] for glm, llada in SIZES.items()},
        rope_parameters={**rope, "partial_rotary_factor": raw["partial_rotary_factor"]},
        use_qk_norm=raw.get("use_qk_norm", True),
        attention_bias=raw.get("use_qkv_bias", False),
        norm_topk_prob=True,
        num_mtp_layers=0,
    )


def glm_weights(stored: Mapping[str, Tensor], raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """LLaDA2's weights under Glm4Moe's names, the fused query_key_value matrices in three.

    Raises:
        ValueError: two weights get the same name.
    """
    heads, kv_heads, size = (raw[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        for llada, glm in NAMES.items():
            name = name.replace(llada, glm)
        fused = re.fullmatch(r"(.*)\.attention\.query_key_value\.(weight|bias)", name)
        renamed = {name: value}
        if fused is not None:
            parts = zip("qkv", value.split([heads * size, kv_heads * size, kv_heads * size]), strict=True)
            renamed = {f"{fused[1]}.self_attn.{n}_proj.{fused[2]}": part.contiguous() for n, part in parts}
        for new in renamed.keys() & weights.keys():
            raise ValueError(f"two weights for {new}")
        weights |= renamed
    return weights


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``llada2_moe``."""
    raw = checkpoint.config
    config = glm_config(raw)
    weights = glm_weights(checkpoint.stored(), raw)
    network = checkpoint.weights(Glm4MoeForCausalLM, config, state_dict=weights, attn_implementation="sdpa")
    view = view_of(checkpoint, 0, raw.get("block_size") or BLOCK)
    return ViewedDLLM(network.model, network.lm_head, checkpoint.tokenizer(), raw, view)
