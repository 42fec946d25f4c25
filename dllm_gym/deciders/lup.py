"""The networks of *Learning Unmasking Policies* (arXiv 2512.09106) as its authors published them, oddities included.

They differ from :class:`~dllm_gym.deciders.networks.DiTConfidence` and ``DiTHidden`` in arithmetic, not in idea: what
modulates a block is a linear map of the condition without an activation before it, and every scale and gate in it
counts as (1 + value), so that a block starts as an ordinary random one instead of as the identity; layers start as
PyTorch makes them; rotary positions turn even with odd channels; the time embedding is rounded to bfloat16. Published
checkpoints are read by ``from_lup``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dllm_gym.checks import flag, number, whole
from dllm_gym.deciders.networks import (
    by_mask,
    check_counts,
    check_heads,
    check_hidden_size,
    conditions,
    rotate,
    sinusoid,
)
from dllm_gym.deciders.policy import Policy

# The authors' name of a part -> ours; {} is the number of a block or layer. The last six are LLaDA's blocks.
NAMES = {
    "time_mlp.{}": "time_mlp.{}",
    "mask_embedding": "mask_embedding",
    "output_proj": "head",
    "confidence_proj": "input",
    "final_norm": "final_norm",
    "norms.{}": "norms.{}",
    "ada_linears.{}": "modulations.{}",
    "transformer_blocks.{}.ada_conditioning": "blocks.{}.modulation",
    "transformer_blocks.{}.q_proj": "blocks.{}.q",
    "transformer_blocks.{}.k_proj": "blocks.{}.k",
    "transformer_blocks.{}.v_proj": "blocks.{}.v",
    "transformer_blocks.{}.out_proj": "blocks.{}.out",
    "transformer_blocks.{}.norm1": "blocks.{}.attention_norm",
    "transformer_blocks.{}.norm2": "blocks.{}.ffn_norm",
    "transformer_blocks.{}.linear1": "blocks.{}.ffn.0",
    "transformer_blocks.{}.linear2": "blocks.{}.ffn.2",
    "transformer_blocks.{}.attn_norm": "blocks.{}.attention_norm",
    "transformer_blocks.{}.attn_out": "blocks.{}.out",
    "transformer_blocks.{}.ff_norm": "blocks.{}.ffn_norm",
    "transformer_blocks.{}.ff_proj": "blocks.{}.gate",
    "transformer_blocks.{}.up_proj": "blocks.{}.up",
    "transformer_blocks.{}.ff_out": "blocks.{}.down",
}
HEAD = "base_policy."  # what the authors' names begin with; a wrapped model's have something before it
FREQUENCIES = "transformer_blocks.0.inv_freq"  # a buffer there, [channels of a head / 2], of every block
ROTARY_BASE = 10_000.0


def renamed(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights of a published checkpoint under our names, in float32, and its rotary frequencies if it has some.

    Raises:
        ValueError: there is no published policy in it, or something that none has.
    """
    before = {name.partition(HEAD)[0] for name in stored if HEAD in name}
    if len(before) != 1:
        raise ValueError(f"its names do not begin with {HEAD!r}, such as {sorted(stored)[:3]}")
    prefix = before.pop() + HEAD
    theirs = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    frequencies = theirs.get(FREQUENCIES)
    weights = {}
    for name, value in theirs.items():
        if name.endswith(".inv_freq"):
            continue
        part, _, kind = name.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+", part)
        general = re.sub(r"(?<=\.)\d+", "{}", part)
        if general not in NAMES:
            raise ValueError(f"{prefix}{name} is no part of a published policy")
        weights[f"{NAMES[general].format(*numbers)}.{kind}"] = value.float()
    return weights, frequencies


def heads_of(weights: Mapping[str, Tensor], frequencies: Tensor) -> int:
    """How many attention heads there are, from their rotary frequencies [channels of a head / 2].

    Raises:
        ValueError: they are not those of this network.
    """
    half = len(frequencies)
    expected = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float32) / half)
    if not torch.allclose(frequencies.float(), expected, rtol=1e-2):  # they may have been rounded to bfloat16
        raise ValueError(f"the rotary frequencies {FREQUENCIES} are not those of the base {ROTARY_BASE:g}")
    return weights["head.weight"].shape[1] // (2 * half)


def active(legal: Tensor, length: int) -> Tensor:
    """int64 [B, length]: the positions of each row's active block, from ``legal`` bool [B, L].

    Raises:
        ValueError: the environment's blocks are others.
    """
    first = legal.int().argmax(1, keepdim=True) // length * length  # (B, 1)
    at = first + torch.arange(length, device=legal.device)
    inside = at.amax() < legal.shape[1] and bool(legal.sum() == picked(legal, at).sum())
    if legal.shape[1] % length or not inside:
        raise ValueError(f"block_length={length}: legal positions lie outside of one block of that length")
    return at


def picked(value: Tensor, at: Tensor) -> Tensor:
    """Of ``value`` [B, L, ..] the positions ``at`` int64 [B, S], [B, S, ..]."""
    return value[torch.arange(len(at), device=at.device)[:, None], at]


class Published(Policy):
    """What both published networks share: the condition, the positions that are seen, and reading a checkpoint.

    A family writes ``look``, and ``sizes``.

    Args:
        width: channels.
        num_blocks, time_embed_dim, time_period, full_context, block_length: see the families.
        settings: those of ``Policy``.
    """

    def __init__(
        self,
        width: int,
        num_blocks: int,
        time_embed_dim: int,
        time_period: float,
        full_context: bool,
        block_length: int | None,
        **settings: Any,
    ):
        check_counts(num_blocks=num_blocks)
        whole("time_embed_dim", time_embed_dim, least=2)
        self.time_embed_dim, self.time_period = time_embed_dim, number("time_period", time_period, above=0)
        block_length = None if block_length is None else whole("block_length", block_length)
        self.sees = None if flag("full_context", full_context) else block_length  # None: the whole completion
        if self.sees is not None:
            self.reads = (*type(self).reads, "action_mask")
        super().__init__(**settings)
        self.time_mlp = nn.Sequential(nn.Linear(time_embed_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.mask_embedding = nn.Embedding(2, width)

    def look(self, seen: Mapping[str, Tensor], condition: Tensor) -> Tensor:
        """Features [B, S, width] of the S positions that are seen.

        Args:
            seen: the entries ``reads`` of these positions, [B, S, ..].
            condition: [B, 2, width], of unmasked and of masked positions.
        """
        raise NotImplementedError

    def trunk(self, *rows: Tensor) -> Tensor:
        seen = dict(zip(self.reads, rows, strict=True))
        condition = self._condition(seen.pop("time"))
        if self.sees is None:
            return self.look(seen, condition)
        at = active(seen["action_mask"] != 0, self.sees)  # (B, BL)
        x = self.look({name: picked(value, at) for name, value in seen.items()}, condition)
        return x.new_zeros(*seen["mask"].shape, x.shape[-1]).scatter(1, at[..., None].expand_as(x), x)

    def _condition(self, time: Tensor) -> Tensor:
        odd = self.time_embed_dim % 2
        embedded = F.pad(sinusoid(time, self.time_embed_dim - odd, self.time_period), (0, odd))
        return conditions(self.time_mlp, self.mask_embedding, embedded.bfloat16())

    @classmethod
    def sizes(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The settings that follow from weights under our names."""
        blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        return {"num_blocks": len(blocks), "time_embed_dim": weights["time_mlp.0.weight"].shape[1]}

    @classmethod
    def from_lup(cls, path: str | Path, **settings: Any) -> Self:
        """The network in a checkpoint of the authors' code (``checkpoint-1000/model.safetensors``), on the CPU.

        Args:
            path: the file or its folder. All weights have to be there, and none that the network lacks.
            settings: of the constructor, those that weights do not tell: ``time_period``, ``full_context`` and so on.

        Raises:
            ValueError: there is no such file, or it does not hold this network.
        """
        file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
        try:
            weights, frequencies = renamed(load_file(file))
            sizes = cls.sizes(weights) | ({} if frequencies is None else {"heads": heads_of(weights, frequencies)})
            policy = cls(**sizes | settings)
            policy.load_state_dict(weights, strict=True)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} does not hold the weights of a published {cls.__name__}: {reason}") from error
        return policy


class DiTConfidenceLUP(Published):
    """LUP's ``dit_confidence`` to the letter, for published checkpoints and for runs like the authors'.

    Reads of every position its ``top_k`` largest probabilities and whether it is masked, and the time.
    :class:`~dllm_gym.deciders.networks.DiTConfidence` is the same idea with a start at the identity.

    >>> sum(p.numel() for p in DiTConfidenceLUP().parameters())
    331265

    Args:
        width: channels; ffn: hidden channels of the feed-forward part; heads: attention heads.
        top_k: confidences read per position; the observation may hold more.
        num_blocks: DiT blocks. dropout: after attention and in the feed-forward part.
        time_embed_dim: channels of the time embedding.
        time_period: its longest period (over 2 pi); at the published 1.0 it holds two different values.
        output_bias: initial logit; every modulation then starts at zero. None: everything starts at random.
        full_context: the network sees the whole completion; False: the active block alone.
        block_length: BL of the environment, for ``full_context=False``; None: L.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is out of range, or (on call) the observation has fewer than ``top_k`` confidences or
            blocks of another length.
    """

    reads = ("confidence", "mask", "time")

    def __init__(
        self,
        *,
        width: int = 128,
        ffn: int = 512,
        heads: int = 2,
        top_k: int = 1,
        num_blocks: int = 1,
        dropout: float = 0.0,
        time_embed_dim: int = 128,
        time_period: float = 1.0,
        output_bias: float | None = -2.0,
        full_context: bool = True,
        block_length: int | None = None,
        candidates: int | None = None,
    ):
        check_heads("width", width, heads)
        check_counts(ffn=ffn, top_k=top_k)
        number("dropout", dropout, least=0, most=1)
        condition = (num_blocks, time_embed_dim, time_period, full_context, block_length)
        super().__init__(width, *condition, candidates=candidates, top_k=top_k)
        self.input = nn.Linear(top_k, width)
        blocks = [ModulatedBlock(width, ffn, heads, dropout) for _ in range(num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(width)
        self.head = published_head([block.modulation for block in blocks], output_bias)

    def look(self, seen: Mapping[str, Tensor], condition: Tensor) -> Tensor:
        x = self.input(seen["confidence"][..., : self.top_k].to(self.head.weight.dtype))
        masked = seen["mask"][..., None] != 0  # (B, S, 1)
        for block in self.blocks:
            x = block(x, condition, masked)
        return self.final_norm(x)

    @classmethod
    def sizes(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        width, top_k = weights["input.weight"].shape
        return {**super().sizes(weights), "width": width, "top_k": top_k, "ffn": len(weights["blocks.0.ffn.0.bias"])}


class DiTHiddenLUP(Published):
    """LUP's ablation ``dit_hidden`` to the letter: the dLLM's own kind of block between modulated layer norms.

    Reads the dLLM's last hidden states. Blocks are built like the dLLM's (RMS norms, SwiGLU, no biases), and start at
    random as PyTorch makes them; before each, and behind the last, there is a layer norm modulated by time and mask.
    On LLaDA-8B these are 302.6M parameters.

    >>> own = {"heads": 32, "kv_heads": 32, "ffn": 12_288, "rope_theta": 5e5, "norm_eps": 1e-5}
    >>> with torch.device("meta"):
    ...     round(sum(p.numel() for p in DiTHiddenLUP(hidden_size=4096, own_block=own).parameters()) / 1e6, 1)
    302.6

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``).
        own_block: what its blocks are built of, as ``dllm_gym.models.base.own_block`` tells it: ``heads``,
            ``kv_heads``, ``ffn``, ``rope_theta``, ``norm_eps``.
        num_blocks, time_embed_dim, time_period, output_bias, full_context, block_length: as in ``DiTConfidenceLUP``.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width or the
            observation has blocks of another length.
    """

    reads = ("hidden", "mask", "time")

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        own_block: Mapping[str, float] | None = None,
        num_blocks: int = 1,
        time_embed_dim: int = 128,
        time_period: float = 1.0,
        output_bias: float | None = -2.0,
        full_context: bool = True,
        block_length: int | None = None,
        candidates: int | None = None,
    ):
        width = check_hidden_size(hidden_size)
        own = check_own_block(width, own_block)
        condition = (num_blocks, time_embed_dim, time_period, full_context, block_length)
        super().__init__(width, *condition, candidates=candidates, hidden_size=width)
        self.blocks = nn.ModuleList(LlamaBlock(width, **own) for _ in range(num_blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_blocks + 1))
        modulations = [nn.Linear(width, 2 * width) for _ in range(num_blocks + 1)]
        self.modulations = nn.ModuleList(modulations)
        self.head = published_head(modulations, output_bias)

    def look(self, seen: Mapping[str, Tensor], condition: Tensor) -> Tensor:
        x, masked = seen["hidden"].to(self.head.weight.dtype), seen["mask"][..., None] != 0
        for block, norm, modulation in zip([*self.blocks, nn.Identity()], self.norms, self.modulations, strict=True):
            scale, shift = by_mask(modulation(condition), masked).chunk(2, dim=-1)
            x = block(norm(x) * (1 + scale) + shift)
        return x

    @classmethod
    def sizes(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().sizes(weights), "hidden_size": weights["head.weight"].shape[1]}


def published_head(modulations: Sequence[nn.Linear], output_bias: float | None) -> nn.Linear:
    """The layer from features to logits, as PyTorch makes it.

    With ``output_bias`` comes the *smart init* of the network: that bias, and all ``modulations`` at zero.
    """
    head = nn.Linear(modulations[0].in_features, 1)
    if output_bias is not None:
        nn.init.constant_(head.bias, number("output_bias", output_bias))
        for parameter in nn.ModuleList(modulations).parameters():
            nn.init.zeros_(parameter)
    return head


class ModulatedBlock(nn.Module):
    """LUP's DiT block, [B, S, d] to [B, S, d]: every scale and gate is (1 + value)."""

    def __init__(self, width: int, ffn: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, d]; condition [B, 2, d] for mask 0 and 1; mask bool [B, S, 1]."""
        modulation = by_mask(self.modulation(condition), mask)  # (B, S, 6 d)
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = modulation.chunk(6, dim=-1)
        x = x + self.dropout(self._attend(self.attention_norm(x) * (1 + scale_a) + shift_a) * (1 + gate_a))
        up, activation, down = self.ffn
        inner = self.dropout(activation(up(self.ffn_norm(x) * (1 + scale_f) + shift_f)))
        return x + self.dropout(down(inner) * (1 + gate_f))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        # Even with odd channels are halves in another order, which is the same for queries and keys.
        q, k = (rotate(torch.cat([part[..., ::2], part[..., 1::2]], dim=-1), ROTARY_BASE) for part in (q, k))
        dropout = self.dropout.p if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(-2))


class LlamaBlock(nn.Module):
    """A block as LLaDA's (Llama's, looking both ways), [B, S, d] to [B, S, d].

    Args:
        width: d. heads, kv_heads: attention heads, of queries and of keys. ffn: hidden channels of the SwiGLU.
        rope_theta: base of the rotary positions. norm_eps: of the RMS norms.
    """

    def __init__(self, width: int, *, heads: int, kv_heads: int, ffn: int, rope_theta: float, norm_eps: float):
        super().__init__()
        self.rope_theta, self.size = rope_theta, width // heads
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=norm_eps) for _ in range(2))
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv_heads * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


OWN_BLOCK = ("heads", "kv_heads", "ffn", "rope_theta", "norm_eps")


def check_own_block(width: int, own: Mapping[str, float] | None) -> dict[str, Any]:
    """The settings of ``LlamaBlock`` for this width."""
    if not isinstance(own, Mapping) or set(own) != set(OWN_BLOCK):
        raise ValueError(
            f"own_block={own!r} is not valid: need {', '.join(OWN_BLOCK)} (dllm_gym.models.base.own_block of the model)"
        )
    check_heads("hidden_size", width, int(own["heads"]))
    for name in ("heads", "kv_heads", "ffn"):
        whole(f"own_block.{name}", own[name])
    for name in ("rope_theta", "norm_eps"):
        number(f"own_block.{name}", own[name], above=0)
    if own["heads"] % own["kv_heads"]:
        raise ValueError(f"own_block.kv_heads={own['kv_heads']}: need a divisor of heads={own['heads']}")
    return dict(own)
