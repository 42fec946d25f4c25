"""Qwen2 and Qwen3 turned into dLLMs: A2D (Qwen3-0.6B-diffusion-mdlm, ...), Fast-dLLM v2, SDAR, TraDo, Open-dLLM.

All keep Qwen's weights and arithmetic; they differ in what a position sees and in which position predicts a token,
which their configs mostly do not say:

| | sees | token j is predicted at |
|---|---|---|
| A2D (of the library dLLM) | the whole row; ``block=`` for those trained as BD3LM, whose config is the same | j |
| SDAR (arXiv 2510.06303), TraDo (arXiv 2509.06949) | blocks of 4, unless the config or ``block=`` says another | j |
| Fast-dLLM v2 (arXiv 2509.26328) | blocks of 32 (``bd_size``) | j - 1 |
| a plain ``qwen2`` or ``qwen3``, such as Open-dLLM's | what ``block=`` states | what ``shift=`` states |
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Tokenizer

from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, require, require_fields
from dllm_gym.models.families.decoders import decoder, two_way_config, view_of
from dllm_gym.models.views import View

SDAR_BLOCK = 4  # of the checkpoints without a number in their name
TRAINING = ("auto_map", "block_size")


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``a2d-qwen2`` and ``a2d-qwen3``."""
    kind = "qwen3" if "qwen3" in str(checkpoint.config["model_type"]) else "qwen2"
    config = two_way_config(kind, checkpoint.config, "A2D")
    return without_thoughts(decoder(checkpoint, kind, config, view_of(checkpoint, 0, None), tokenizer(checkpoint)))


def load_plain(checkpoint: Checkpoint) -> DLLM:
    """The loader of plain ``qwen2`` and ``qwen3``: an autoregressive model and a dLLM have the same config.

    Raises:
        ValueError: ``shift`` and ``block`` are not stated, or the config says that it is something else.
    """
    kind, settings = str(checkpoint.config["model_type"]), checkpoint.settings
    config = two_way_config(kind, checkpoint.config, f"a plain {kind}", known=())
    if settings.shift is None or settings.block is None:
        raise ValueError(
            f"model_type={kind!r} does not say how it was made a dLLM: state shift=0 (position j predicts token j) or "
            "shift=1 (the position before does, as in Dream), and block=0 (attention over the whole row) or block=N "
            "(block-causal)"
        )
    view = View(settings.shift, settings.block or None)
    return without_thoughts(decoder(checkpoint, kind, config, view, tokenizer(checkpoint)))


def load_sdar(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``sdar`` and ``sdar_moe``, which TraDo's checkpoints are, too."""
    raw = checkpoint.config
    kind = "qwen3_moe" if raw.get("num_experts") else "qwen3"
    config = two_way_config(kind, raw, "SDAR", known=TRAINING)
    if kind == "qwen3_moe":
        require_fields(raw, "num_experts_per_tok", "norm_topk_prob")
        require(raw, "SDAR", decoder_sparse_step=1, mlp_only_layers=[])
    view = view_of(checkpoint, 0, raw.get("block_size") or SDAR_BLOCK)
    return decoder(checkpoint, kind, config, view, tokenizer(checkpoint))


def load_fast_dllm(checkpoint: Checkpoint) -> DLLM:
    """The loader of ``Fast_dLLM_Qwen``."""
    raw = checkpoint.config
    require_fields(raw, "bd_size")
    config = two_way_config("qwen2", raw, "Fast-dLLM v2", known=("auto_map", "bd_size"))
    return decoder(checkpoint, "qwen2", config, view_of(checkpoint, 1, raw["bd_size"]), tokenizer(checkpoint))


def tokenizer(checkpoint: Checkpoint) -> Any:
    return checkpoint.tokenizer(Qwen2Tokenizer)


def without_thoughts(dllm: DLLM) -> DLLM:
    """Qwen3's template opens an empty chain of thought, as its diffusion checkpoints were trained."""
    dllm.template_options = {"enable_thinking": False}
    return dllm
