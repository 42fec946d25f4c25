"""The network of *Improving Discrete Diffusion Unmasking Policies* (UPO, arXiv 2510.05725) as it was published."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dllm_gym.checks import whole
from dllm_gym.deciders.lup import LlamaBlock, check_own_block
from dllm_gym.deciders.networks import check_counts, check_hidden_size
from dllm_gym.deciders.policy import Policy

# Of transformers' Llama block -> of ours; all of them are weights without a bias.
NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


class UPOPublished(Policy):
    """UPO's published network: the dLLM's last block again, on what that block reads, joined by its top probabilities.

    ``adopt`` makes the block a copy of the dLLM's; it is trained on. Behind a new RMS norm its output, two flags (in
    the active block; masked there) and the ``top_k`` largest probabilities go through an MLP as wide as they are
    together: three times linear, layer norm and SiLU, then one logit, none of the linear layers with a bias. It does
    not read the time. One difference is left: the block attends to the completion alone, the authors' to the prompt as
    well (of which the block's input, computed with the prompt in sight, holds what the layers below took from it).

    >>> own = {"heads": 32, "kv_heads": 32, "ffn": 12_288, "rope_theta": 5e5, "norm_eps": 1e-5}
    >>> with torch.device("meta"):
    ...     round(sum(p.numel() for p in UPOPublished(hidden_size=4096, own_block=own).parameters()) / 1e6, 1)
    268.7

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``).
        own_block: what its blocks are built of, as ``dllm_gym.models.base.own_block`` tells it.
        top_k: confidences read per position; the observation may hold more.
        block_length: BL of the environment; None: L.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width.
    """

    reads = ("block_input", "confidence", "mask", "action_mask")
    states = "block_input"

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        own_block: Mapping[str, float] | None = None,
        top_k: int = 8,
        block_length: int | None = None,
        candidates: int | None = None,
    ):
        hidden_size = check_hidden_size(hidden_size)
        own: dict[str, Any] = check_own_block(hidden_size, own_block)
        check_counts(top_k=top_k)
        super().__init__(candidates=candidates, top_k=top_k, hidden_size=hidden_size)
        self.block_length = None if block_length is None else whole("block_length", block_length)
        self.block = LlamaBlock(hidden_size, **own)
        self.block_norm = nn.RMSNorm(hidden_size, eps=own["norm_eps"])
        width = hidden_size + top_k + 2
        sizes = pairwise([width] * 4)
        layers = (nn.Sequential(nn.Linear(i, o, bias=False), nn.LayerNorm(o), nn.SiLU()) for i, o in sizes)
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1, bias=False)

    def adopt(self, block: nn.Module) -> None:
        """Make the block a copy of a dLLM's (``dllm_gym.models.base.last_block``)."""
        stored = block.state_dict()
        self.block.load_state_dict({f"{ours}.weight": stored[f"{theirs}.weight"] for theirs, ours in NAMES.items()})

    def trunk(self, block_input: Tensor, confidence: Tensor, mask: Tensor, action_mask: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        x = self.block_norm(self.block(block_input.to(dtype)))  # (B, L, d)
        here = self._active(action_mask != 0)  # (B, L)
        flags = torch.stack([here, here & (mask != 0)], dim=-1)  # (B, L, 2)
        return self.mlp(torch.cat([x, flags.to(dtype), confidence[..., : self.top_k].to(dtype)], dim=-1))

    def _active(self, legal: Tensor) -> Tensor:
        """bool [B, L]: the positions of each row's active block, committed ones included."""
        length = self.block_length or legal.shape[1]
        block = torch.arange(legal.shape[1], device=legal.device) // length
        return block == legal.int().argmax(1, keepdim=True) // length
