"""Masked language models as dLLMs: BERT, RoBERTa, ModernBERT, ... and their chat versions fine-tuned for diffusion.

transformers' own classes are used as they are. Architectures differ in how they treat padding and positions, so every
model shows once, when it is loaded, that padding does not change its answer and that it looks both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from dllm_gym.models.base import DLLM, positions_of
from dllm_gym.models.checkpoint import Checkpoint, network_fields, require_fields
from dllm_gym.prompt import Chat

# Weights of pre-training heads, and buffers of old files, that predicting a masked token does not use.
UNUSED = r"(^|\.)(pooler|seq_relationship)\.|\.position_ids$"
# What architectures call the sizes and functions that shape the answer, but not the weights or not them alone. Those
# that an architecture has must be in its config.json.
FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "norm_eps",
    "local_attention",
)
END_OF_ANSWER = "[/Answer]"  # closes the reply in the template of the diffusion-tuned BERTs; text, not a token


class Given(nn.Module):
    """An encoder that answers with the hidden states it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class Head(nn.Module):
    """Hidden states [n, d] to logits [n, V]: the masked language model without its encoder, transforms included."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        setattr(model, model.base_model_prefix, Given())
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(inputs_embeds=hidden[None]).logits[0]


class MaskedLM(DLLM):
    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: dict[str, Any]):
        encoder = model.base_model
        table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self._first_position = 0 if padding is None else padding + 1  # RoBERTa counts from there
        super().__init__(encoder, Head(model), tokenizer, config)
        self.max_positions -= self._first_position

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        attend = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
        positions = positions_of(attend) + self._first_position
        return self.backbone(
            input_ids=tokens, attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state  # (B, T, d)

    def encode(self, prompt: str | Chat) -> list[int]:
        """As every dLLM; without a template the text follows [CLS], as in pre-training."""
        tokens = super().encode(prompt)
        start = self.tokenizer.cls_token_id
        return tokens if start is None or self.tokenizer.chat_template else [start, *tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        text = super().decode(tokens)
        return text.partition(END_OF_ANSWER)[0] if END_OF_ANSWER in (self.tokenizer.chat_template or "") else text


def refuse_if_unfit(dllm: MaskedLM) -> None:
    """A trial of six tokens: one row alone, the same row padded, and the same row with another end.

    Raises:
        ValueError: padding changes the hidden states, or what follows a token does not.
    """
    allowed = [token for token in range(dllm.vocab_size) if token not in (dllm.pad_id, dllm.mask_id)]
    row = torch.tensor([allowed[1:6] + [dllm.mask_id]], device=dllm.device)
    attend = torch.ones(1, 9, dtype=torch.bool, device=dllm.device)
    attend[:, :3] = False
    with torch.no_grad():
        alone = dllm.hidden_states(row, None).float()
        padded = dllm.hidden_states(torch.nn.functional.pad(row, (3, 0), value=dllm.pad_id), attend)[:, 3:].float()
        other = dllm.hidden_states(torch.cat([row[:, :-1], row[:, :1]], 1), None).float()
    tolerance = 1e-3 if dllm.dtype == torch.float32 else 0.05  # half precision adds in another order
    if (padded - alone).norm() > tolerance * alone.norm():
        raise ValueError("padding changes what this architecture predicts: it is not supported")
    if torch.equal(alone[:, 0], other[:, 0]):
        raise ValueError("a token's prediction does not depend on what follows it: this is no two-way model")


def refuse_defaults(raw: Mapping[str, Any], kind: type[PreTrainedConfig]) -> None:
    """Raises ValueError when a default of the configuration class would stand for what ``config.json`` lacks."""
    fields = inspect.signature(kind).parameters
    for field in FIELDS:
        own = kind.attribute_map.get(field, field)  # DistilBERT's hidden_size is called dim
        if own in fields and raw.get(field) is None:
            require_fields(raw, own)
    if raw["model_type"] == "modernbert":
        if raw.get("layer_types") is None:
            require_fields(raw, "global_attn_every_n_layers")
        if not isinstance(raw.get("rope_parameters"), dict):
            require_fields(raw, "global_rope_theta", "local_rope_theta")


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of every ``model_type`` for which transformers has a masked language model."""
    raw = checkpoint.config
    kind = CONFIG_MAPPING[raw["model_type"]]
    if raw.get("is_encoder_decoder", kind().is_encoder_decoder):
        raise ValueError(f"model_type={raw['model_type']!r} is an encoder-decoder: only encoders are supported")
    refuse_defaults(raw, kind)
    config = kind.from_dict(network_fields(raw))
    network = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    attention = "sdpa" if network._supports_sdpa else "eager"
    model = checkpoint.weights(network, config, unused=UNUSED, attn_implementation=attention)
    dllm = MaskedLM(model, checkpoint.tokenizer(), raw)
    refuse_if_unfit(dllm)
    return dllm
