"""What a family's hidden states depend on: a shift of the logits, and the blocks that a position sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dllm_gym.models.base import DLLM, positions_of


@dataclass(frozen=True)
class View:
    """What a family's hidden states depend on: a class that overrides ``DLLM.hidden_states`` says it as its attribute
    ``view``, or has no cache.

    Attributes:
        shift: the hidden state at position j - shift predicts token j; 0 or 1.
        block: a position sees its own block of so many positions, counted from the row's first token, and the blocks
            before; None: it sees the whole row.
    """

    shift: int = 0
    block: int | None = None


class ViewedDLLM(DLLM):
    """A dLLM on a decoder of transformers whose logits are shifted, or whose attention is block-causal.

    Args:
        backbone, lm_head, tokenizer, config: as of :class:`~dllm_gym.models.DLLM`; the backbone looks both ways.
        view: which shift and which blocks.
    """

    view = View()

    def __init__(self, backbone: nn.Module, lm_head: nn.Module, tokenizer: Any, config: dict[str, Any], view: View):
        super().__init__(backbone, lm_head, tokenizer, config)
        self.view = view

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        whole_row = self.view.block is None
        hidden = super().hidden_states(tokens, attention_mask) if whole_row else self._by_block(tokens, attention_mask)
        return shifted(hidden, attention_mask) if self.view.shift else hidden

    def _by_block(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Last hidden states [B, T, d] where a position sees its own block and those before."""
        attend = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
        positions = positions_of(attend)
        block = positions // (self.view.block or 1)  # (B, T)
        sees = (block[:, :, None] >= block[:, None, :]) & attend[:, None, :]  # (B, T, T), query by key
        return self.backbone(
            input_ids=tokens, attention_mask=sees[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state


def shifted(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states [B, T, d] of which those at j predict token j, from such that predict token j + 1."""
    moved = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)  # (B, T, d)
    if attention_mask is None:
        return moved
    first = attention_mask & ~pad(attention_mask[:, :-1], (1, 0))  # a row's first token keeps its own, padded or not
    return torch.where(first.to(hidden.device)[..., None], hidden, moved)
