"""Qwen2 and Qwen3 turned into dLLMs (Qwen3-0.6B-diffusion-mdlm, Qwen2.5-Coder-0.5B-diffusion-mdlm).

The adaptation keeps Qwen's weights and arithmetic; attention looks both ways and position j predicts token j, without a
shift. The mask token is in the tokenizer. Checkpoints trained for block diffusion (BD3LM) carry the same config.json:
they load, and are then read with full attention, which they were not trained for.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, network_fields, require, require_fields

# Without one of these, transformers' default would take its place silently.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
NETWORKS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


class QwenDLLM(DLLM):
    """Qwen3's template opens an empty chain of thought, as its diffusion checkpoints were trained."""

    template_options = {"enable_thinking": False}


def two_way_config(kind: str, raw: dict[str, Any], family: str) -> Any:
    """A Qwen configuration, with attention in both directions, from a raw ``config.json``.

    Raises:
        ValueError: the config asks for something else than full attention, or lacks a size.
    """
    require_fields(raw, *SIZES)
    if not isinstance(raw.get("rope_parameters"), dict):
        require_fields(raw, "rope_theta")
    require(raw, family, use_sliding_window=False, use_mrope=False, hidden_act="silu")
    layers = set(raw.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(f"config.json: layer_types={sorted(layers)} is not supported for {family} (full_attention is)")
    config = NETWORKS[kind][0].from_dict(network_fields(raw))
    config.is_causal = False
    return config


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``a2d-qwen2``, ``a2d-qwen3`` and of plain Qwen configs whose tokenizer has a mask token."""
    raw = checkpoint.config
    kind = "qwen3" if "qwen3" in str(raw["model_type"]) else "qwen2"
    network = checkpoint.weights(NETWORKS[kind][1], two_way_config(kind, raw, "Qwen"))
    return QwenDLLM(network.model, network.lm_head, checkpoint.tokenizer(Qwen2Tokenizer), raw)
