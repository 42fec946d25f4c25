"""The LLaDA family (LLaDA-8B, LLaDA-1.5, the shipped ``tiny``) on transformers' own Llama classes.

LLaDA (arXiv 2502.09992) is a Llama whose attention looks both ways: with ``is_causal=False`` transformers'
``LlamaForCausalLM`` gives the published model's logits, so no remote code is run.

In half precision LLaDA's own code rotates queries and keys in float32, transformers in the dtype of the weights: the
logits then differ by less than half precision differs from float32. ``rope_float32=True`` does as LLaDA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_gym.models.attention import ATTENTION
from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, refuse_arithmetic, require, require_fields

# LLaDA's name of a weight -> Llama's.
NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "model.transformer.blocks.{}.ff_norm": "model.layers.{}.post_attention_layernorm",
    "model.transformer.blocks.{}.q_proj": "model.layers.{}.self_attn.q_proj",
    "model.transformer.blocks.{}.k_proj": "model.layers.{}.self_attn.k_proj",
    "model.transformer.blocks.{}.v_proj": "model.layers.{}.self_attn.v_proj",
    "model.transformer.blocks.{}.attn_out": "model.layers.{}.self_attn.o_proj",
    "model.transformer.blocks.{}.ff_proj": "model.layers.{}.mlp.gate_proj",
    "model.transformer.blocks.{}.up_proj": "model.layers.{}.mlp.up_proj",
    "model.transformer.blocks.{}.ff_out": "model.layers.{}.mlp.down_proj",
}


def key_mapping(names: Mapping[str, str]) -> dict[str, str]:
    """``names`` as the regular expressions and replacements that ``from_pretrained(key_mapping=...)`` takes."""
    return {
        "^" + re.escape(old).replace(r"\{\}", r"(\d+)") + r"\.": new.replace("{}", r"\1") + "."
        for old, new in names.items()
    }


# What the mapping to Llama assumes; a LLaDA-style config that says otherwise is another architecture.
REQUIRED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "clip_qkv": None,
    "multi_query_attention": False,
}
SIZES = ("n_heads", "d_model", "mlp_hidden_size", "n_layers", "max_sequence_length", "rms_norm_eps", "rope_theta")


def llama_config(raw: dict[str, Any]) -> LlamaConfig:
    """The Llama configuration equivalent to LLaDA's raw ``config.json``.

    Raises:
        ValueError: the config asks for something that Llama does not compute, or lacks a size.
    """
    refuse_arithmetic(raw, "LLaDA", ("auto_map",))
    require(raw, "LLaDA", **REQUIRED)
    require_fields(raw, *SIZES, *([] if raw.get("embedding_size") else ["vocab_size"]))
    if raw["d_model"] % raw["n_heads"]:
        raise ValueError(f"config.json: d_model={raw['d_model']} is no multiple of n_heads={raw['n_heads']}")
    config = LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw["mlp_hidden_size"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
        tie_word_embeddings=raw.get("weight_tying", False),
        attention_bias=raw.get("include_qkv_bias", False),
        bos_token_id=None,
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
    )
    config.is_causal = False
    return config


def llada_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama state dict under LLaDA's own names, for writing checkpoints in LLaDA's format."""
    to_llada = key_mapping({llama: llada for llada, llama in NAMES.items()})
    renamed = {}
    for key, value in state.items():
        (name,) = {re.sub(old, new, key) for old, new in to_llada.items() if re.match(old, key)}
        renamed[name] = value.contiguous()
    return renamed


class Float32Rope(nn.Module):
    """cos and sin in float32: the rotation, which multiplies them with half-precision queries, is then float32 too."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rope(hidden[..., :1].float(), position_ids)  # of the hidden states only dtype and device count


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``llada``."""
    rope_float32 = checkpoint.settings.rope_float32
    arguments = {"attn_implementation": ATTENTION} if rope_float32 else {}
    network = checkpoint.weights(
        LlamaForCausalLM, llama_config(checkpoint.config), key_mapping=key_mapping(NAMES), **arguments
    )
    if rope_float32:
        network.model.rotary_emb = Float32Rope(network.model.rotary_emb)
    return DLLM(network.model, network.lm_head, checkpoint.tokenizer(), checkpoint.config)
