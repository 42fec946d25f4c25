"""Llamas turned into dLLMs: A2D-Llama, Stable-DiffCoder, iLLaDA; and Nemotron-Labs-Diffusion on Ministral.

All predict without a shift. Stable-DiffCoder (a plain ``llama`` by its ``model_type``) sees blocks of 4, as its own
generation does unless told otherwise; the others see the whole row.

Nemotron-Labs-Diffusion (arXiv 2607.05722) has three ways of decoding in one checkpoint. This is the forward of its
``dlm_paradigm: bidirectional``. Its own ``generate`` encodes the prompt and finished blocks with causal attention by
default and takes each block's first token from the autoregressive head; that is not an unmasking process, and not here.

iLLaDA (arXiv 2606.25331) is described by its paper and its model card: LLaDA's backbone with grouped keys and tied
embeddings, in a config with Llama's names of sizes. Weights under other names than Llama's would be refused.
"""

from __future__ import annotations

import inspect

import transformers
from transformers.models.ministral3.modeling_ministral3 import Ministral3Attention

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, require, require_fields
from dllm_gym.models.families.decoders import decoder, two_way_config, view_of
from dllm_gym.models.views import View

DIFFCODER_BLOCK = 4
NEMOTRON_KNOWN = ("auto_map", "block_size", "dlm_paradigm", "dlm_loss_weight", "rope_parameters")
NEMOTRON_NAMES = {r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."}


def load_a2d(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``a2d-llama``; Llama 3's scaled rotation is transformers' own."""
    raw = checkpoint.config
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    llama3 = scaling.get("rope_type", scaling.get("type")) == "llama3"
    config = two_way_config("llama", raw, "A2D", ("auto_map", *(("rope_scaling", "rope_parameters") if llama3 else ())))
    return decoder(checkpoint, "llama", config, view_of(checkpoint, 0, None), checkpoint.tokenizer())


def load_illada(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``illada``."""
    require(checkpoint.config, "iLLaDA", attention_bias=False, mlp_bias=False)
    config = two_way_config("llama", checkpoint.config, "iLLaDA")
    return decoder(checkpoint, "llama", config, View(), checkpoint.tokenizer())


def load_diffcoder(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``StableDiffcoderForCausalLM``."""
    config = two_way_config("llama", checkpoint.config, "Stable-DiffCoder", known=("auto_map", "block_size"))
    view = view_of(checkpoint, 0, checkpoint.config.get("block_size") or DIFFCODER_BLOCK)
    return decoder(checkpoint, "llama", config, view, checkpoint.tokenizer())


def load_nemotron(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``nemotron_labs_diffusion``."""
    raw, name = checkpoint.config, "Nemotron-Labs-Diffusion"
    require_fields(raw, "head_dim", "rope_parameters")
    require(raw, name, attention_bias=False, mlp_bias=False, sliding_window=None, dlm_paradigm="bidirectional")
    config = two_way_config("ministral3", raw, name, NEMOTRON_KNOWN)
    # Before 5.4 the scale of a query came from its place in the batch's padded rows instead of its position.
    if "position_ids" not in inspect.signature(Ministral3Attention.forward).parameters:
        raise ValueError(
            "Nemotron-Labs-Diffusion needs transformers 5.4 or newer, which scales attention by a token's position; "
            f"this is {transformers.__version__}, where a padded row would not give the same as alone"
        )
    view = view_of(checkpoint, 0, None)
    return decoder(checkpoint, "ministral3", config, view, checkpoint.tokenizer(), key_mapping=NEMOTRON_NAMES)
