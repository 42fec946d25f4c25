"""Masked language models as dLLMs: BERT, RoBERTa, ModernBERT, ... and their chat versions fine-tuned for diffusion.

transformers' own classes are used as they are. Architectures differ in how they treat padding and positions, so every
model shows once, when it is loaded, that padding does not change its answer and that it looks both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from dllm_gym.models.base import DLLM, positions_of
from dllm_gym.models.checkpoint import Checkpoint
from dllm_gym.prompt import Chat

# Weights of pre-training heads, and buffers of old files, that predicting a masked token does not use.
UNUSED = r"(^|\.)(pooler|seq_relationship)\.|\.position_ids$"
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

    def _hidden(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
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
        alone = dllm._hidden(row, None).float()
        padded = dllm._hidden(torch.nn.functional.pad(row, (3, 0), value=dllm.pad_id), attend)[:, 3:].float()
        other = dllm._hidden(torch.cat([row[:, :-1], row[:, :1]], 1), None).float()
    tolerance = 1e-3 if dllm.dtype == torch.float32 else 0.05  # half precision adds in another order
    if (padded - alone).norm() > tolerance * alone.norm():
        raise ValueError("padding changes what this architecture predicts: it is not supported")
    if torch.equal(alone[:, 0], other[:, 0]):
        raise ValueError("a token's prediction does not depend on what follows it: this is no two-way model")


def load(checkpoint: Checkpoint) -> DLLM:
    """The loader of every ``model_type`` for which transformers has a masked language model."""
    raw = checkpoint.config
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(
        {name: value for name, value in raw.items() if name not in ("auto_map", "transformers_version")}
    )
    if config.is_encoder_decoder:
        raise ValueError(f"model_type={raw['model_type']!r} is an encoder-decoder: only encoders are supported")
    network = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    attention = "sdpa" if network._supports_sdpa else "eager"
    model = checkpoint.weights(network, config, unused=UNUSED, attn_implementation=attention)
    dllm = MaskedLM(model, checkpoint.tokenizer(), raw)
    refuse_if_unfit(dllm)
    return dllm
