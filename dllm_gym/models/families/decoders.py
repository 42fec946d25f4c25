"""What the families on transformers' decoders share: which configs they take, and how attention is made two-way."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dllm_gym.models.checkpoint import Checkpoint, network_fields, refuse_arithmetic, require, require_fields
from dllm_gym.models.views import View, ViewedDLLM

# Without one of these, transformers' default would take its place silently.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
NETWORKS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def two_way_config(kind: str, raw: dict[str, Any], family: str, known: Collection[str] = ("auto_map",)) -> Any:
    """A configuration of transformers, with attention in both directions, from a raw ``config.json``.

    Args:
        kind: a key of :data:`NETWORKS`.
        family: what messages call it.
        known: fields that change arithmetic, and that the family's loader has taken care of.

    Raises:
        ValueError: the config asks for something else than full attention, says something that is not known, or lacks
            a size.
    """
    refuse_arithmetic(raw, family, known)
    require_fields(raw, *SIZES, "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size")
    if not isinstance(raw.get("rope_parameters"), dict):
        require_fields(raw, "rope_theta")
    require(raw, family, use_sliding_window=False, use_mrope=False, hidden_act="silu")
    layers = set(raw.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(f"config.json: layer_types={sorted(layers)} is not supported for {family} (full_attention is)")
    config = NETWORKS[kind][0].from_dict(network_fields(raw))
    config.is_causal = False
    return config


def view_of(checkpoint: Checkpoint, shift: int, block: int | None) -> View:
    """The family's shift, and its block unless another one is stated."""
    stated = checkpoint.settings.block
    return View(shift, block if stated is None else stated or None)


def decoder(checkpoint: Checkpoint, kind: str, config: Any, view: View, tokenizer: Any, **arguments: Any) -> ViewedDLLM:
    """The dLLM of a checkpoint on the decoder of that kind; ``arguments`` are those of ``Checkpoint.weights``."""
    network = checkpoint.weights(NETWORKS[kind][1], config, **arguments)
    head = network.get_output_embeddings()
    return ViewedDLLM(network.model, head, tokenizer, checkpoint.config, view)
