"""The policy networks: observation -> one logit per position."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_gym.checks import flag, number, whole
from dllm_gym.deciders.policy import Policy, smart_head
from dllm_gym.deciders.rules.base import joint_confidence

_LEAST = 1e-9  # running products below it are alike
_DOUBT = 1e-3  # log-odds see no more certainty than this: they end at +-6.9


class DiTConfidence(Policy):
    """LUP's ``dit_confidence``: one DiT block over the completion, fed only with the dLLM's confidences.

    Reads the whole completion: per position its ``top_k`` largest probabilities; the block is modulated (AdaLN) by the
    time and by whether the position is still masked. At the defaults 331,265 parameters (arXiv 2512.09106).

    *Smart init* (LUP): the AdaLN projection is zero, so the block starts as the identity, and the output bias -2 starts
    at 12 % of the positions per step.

    >>> sum(p.numel() for p in DiTConfidence().parameters())
    331265

    Args:
        width: channels; ffn: hidden channels of the feed-forward part; heads: attention heads.
        top_k: confidences read per position; the observation may hold more. 0: none, which leaves positions, masks and
            the time: the control that shows what a schedule alone can do.
        output_bias: initial logit.
        time_period: longest period of the time embedding (over 2 pi); its frequencies are 1 .. 1 / time_period. The
            default suits t in [0, 1]; LUP's own 1.0 makes all frequencies equal, so the embedding holds two values.
        absolute_positions: also add an embedding of the position to the input. Rotary attention alone (LUP) starts
            blind to position, because the block starts as the identity: equally confident positions then begin with
            equal logits, and only chance tells them apart.
        preference: also read the ``preference`` of an environment with a range of alphas: one network for the whole
            front, whose speed is a knob at decoding time. It is embedded and added as the time is, and stands beside
            the confidences, where it can move a threshold from the start. (None stands for whether there is such a
            range in configurations; a network has to be told.)
        joint: also read :func:`joint_confidence` at every position. From it the entropy-bounded sampler's rule (stop
            when what was taken is unsure enough as a whole) is a threshold; from the confidences alone a network has to
            sort them first, and independent picks cannot tell equals apart.
        odds: weight, >= 0, with which the log-odds of the largest confidence are added to the logits. The policy then
            begins as a soft confidence threshold and learns what to change about it; at 0 (LUP) it begins blind, and
            first has to learn that confidence matters.
        bound: weight, >= 0, with which the logarithm of the running product of confidences, the position's own
            included, is added to the logits. The policy then begins as a soft :class:`~dllm_gym.deciders.rules.Joint`,
            whose p is exp(-output_bias / bound).
        haste: weight, >= 0, with which the preference (0: quality, 1: speed) is added to the logits; needs
            ``preference``. The knob then moves the speed from the start, and with ``odds`` it moves the threshold, with
            ``bound`` the p.
        vocab_size: V, to read the tokens as well (an embedding each): what is committed, and what would be. They carry
            the structure that confidences lack, such as which sum a digit belongs to. 0: not read. (None stands for the
            model's own in configurations; a network has to be told.)
        blocks: how many DiT blocks; LUP has one.
        hidden_size: width of the dLLM's last hidden states (``DLLM.hidden_size``), to read them as well, through a
            linear map to ``width``. With LLaDA-8B's 4096 the network has 855,681 parameters. 0: not read. (None stands
            for the model's own in configurations; a network has to be told.)
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is out of range, or (on call) the observation has fewer than ``top_k`` confidences, or
            hidden states of another width.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        ffn: int = 512,
        heads: int = 2,
        top_k: int = 1,
        output_bias: float = -2.0,
        time_period: float = 0.01,
        absolute_positions: bool = False,
        preference: bool | None = False,
        joint: bool = False,
        odds: float = 0.0,
        bound: float = 0.0,
        haste: float | None = 0.0,
        vocab_size: int | None = 0,
        blocks: int = 1,
        hidden_size: int | None = 0,
        candidates: int | None = None,
    ):
        check_heads("width", width, heads)
        check_counts(ffn=ffn, blocks=blocks)
        if not whole("top_k", top_k, least=0) and not absolute_positions:
            raise ValueError("top_k=0: a network that reads no confidences needs absolute_positions=True")
        vocab_size = whole("vocab_size", vocab_size, least=0)
        hidden_size = whole("hidden_size", hidden_size, least=0)
        number("time_period", time_period, above=0)
        for name, weight in (("odds", odds), ("bound", bound), ("haste", haste)):
            number(name, weight, least=0)
        for name, switch in (("absolute_positions", absolute_positions), ("joint", joint)):
            flag(name, switch)
        preference = flag("preference", preference)
        if haste and not preference:
            raise ValueError(f"haste={haste} weighs the preference: it needs preference=True")
        more = {"action_mask": joint or bound > 0, "tokens": vocab_size > 0, "hidden": hidden_size > 0}
        more["preference"] = preference
        self.reads = (*type(self).reads, *[name for name, wanted in more.items() if wanted])
        super().__init__(candidates=candidates, top_k=top_k, hidden_size=hidden_size, vocab_size=vocab_size)
        self.time_period, self.joint, self.odds, self.bound, self.haste = time_period, joint, odds, bound, haste
        self.input = nn.Linear(top_k + joint + preference, width)
        self.mask_embedding = nn.Embedding(2, width)
        self.time_mlp = _time_mlp(width)
        self.preference_mlp = _time_mlp(width) if preference else None
        self.place = nn.Linear(width, width) if absolute_positions else None
        self.token_embedding = nn.Embedding(vocab_size, width) if vocab_size else None
        self.hidden_input = nn.Linear(hidden_size, width) if hidden_size else None
        self.block = DiTBlock(width, ffn, heads)
        self.deeper = nn.ModuleList(DiTBlock(width, ffn, heads) for _ in range(blocks - 1))
        self.final_norm = nn.LayerNorm(width)
        self.head = smart_head(width, output_bias)

    def trunk(self, *rows: Tensor) -> Tensor:
        seen = dict(zip(self.reads, rows, strict=True))
        x, masked = self._embed(seen), seen["mask"][..., None] != 0  # (B, L, d), (B, L, 1)
        time = sinusoid(seen["time"], x.shape[-1], self.time_period)
        condition = conditions(self.time_mlp, self.mask_embedding, time)
        if self.preference_mlp is not None:
            wish = sinusoid(seen["preference"], x.shape[-1], self.time_period).to(x.dtype)
            condition = condition + self.preference_mlp(wish)[:, None]
        for block in (self.block, *self.deeper):
            x = block(x, condition, masked)
        return self.final_norm(x)

    def _embed(self, seen: Mapping[str, Tensor]) -> Tensor:
        """What stands at each position, [B, L, d]."""
        confidence = seen["confidence"]
        numbers = [confidence[..., : self.top_k]]
        if self.joint:
            numbers.append(joint_confidence(confidence[..., 0], seen["action_mask"] != 0)[..., None])
        if self.preference_mlp is not None:
            numbers.append(seen["preference"][:, None].expand(*confidence.shape[:-1], 1))
        x = self.input(torch.cat(numbers, dim=-1).to(self.head.weight.dtype))
        if self.place is not None:
            x = x + self.place(places(x))
        if self.hidden_input is not None:
            x = x + self.hidden_input(seen["hidden"].to(x.dtype))
        if self.token_embedding is None:
            return x
        try:
            return x + self.token_embedding(seen["tokens"])
        except IndexError:
            raise ValueError(f"vocab_size={self.vocab_size}: the observation has tokens beyond it") from None

    def start(self, seen: Mapping[str, Tensor]) -> Tensor | float:
        start: Tensor | float = 0.0
        if self.odds:
            start = self.odds * log_odds(seen["confidence"])
        if self.bound:
            confidence, legal = seen["confidence"][..., 0].float(), seen["action_mask"] != 0
            product = confidence * joint_confidence(confidence, legal)  # 0 where nothing may be unmasked
            start = start + self.bound * product.clamp_min(_LEAST).log()
        return start + self.haste * seen["preference"].float() if self.haste else start


class DiTHidden(Policy):
    """LUP's ablation ``dit_hidden``: a transformer block as wide as the dLLM, on its last hidden states.

    Reads the hidden states of the whole completion (nothing of the vocabulary): one DiT block whose layer norms are
    modulated (AdaLN) by the time and by whether the position is still masked, then a last layer norm modulated in the
    same way, then the head (arXiv 2512.09106). All modulation starts at zero, so the block starts as the identity.

    >>> sum(p.numel() for p in DiTHidden(hidden_size=128).parameters())
    364033

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``) and of this network.
        ffn: hidden channels of the feed-forward part; heads: attention heads.
        output_bias: initial logit.
        time_period: as in ``DiTConfidence``.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width.
    """

    reads = ("hidden", "mask", "time")

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        ffn: int = 512,
        heads: int = 2,
        output_bias: float = -2.0,
        time_period: float = 0.01,
        candidates: int | None = None,
    ):
        width = check_hidden_size(hidden_size)
        check_heads("hidden_size", width, heads)
        check_counts(ffn=ffn)
        number("time_period", time_period, above=0)
        super().__init__(candidates=candidates, hidden_size=width)
        self.time_period = time_period
        self.mask_embedding = nn.Embedding(2, width)
        self.time_mlp = _time_mlp(width)
        self.block = DiTBlock(width, ffn, heads)
        self.final_norm = nn.LayerNorm(width)
        self.final_modulation = _zero_modulation(width, 2)
        self.head = smart_head(width, output_bias)

    def trunk(self, hidden: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        masked = mask[..., None] != 0  # (B, L, 1)
        condition = conditions(self.time_mlp, self.mask_embedding, sinusoid(time, self.width, self.time_period))
        x = self.block(hidden.to(self.head.weight.dtype), condition, masked)  # (B, L, d)
        shift, scale = by_mask(self.final_modulation(condition), masked).chunk(2, dim=-1)
        return self.final_norm(x) * (1 + scale) + shift


class UPOPolicy(Policy):
    """UPO's policy: a transformer layer on the dLLM's features, joined by its top probabilities, then an MLP.

    Per position the layer's output, the ``top_k`` largest probabilities and two flags (may be unmasked now; still
    masked) go through an MLP with three hidden layers (linear, layer norm, SiLU) to one logit (arXiv 2510.05725: 10
    such features beside the hidden state). It does not read the time. Differences from the authors' network: the layer
    reads the dLLM's last hidden states, not the input of its last block; it starts at random, not as a copy of that
    block; the first flag is 1 at masked positions of the active block only. Theirs is
    :class:`~dllm_gym.deciders.upo.UPOPublished`.

    >>> sum(p.numel() for p in UPOPolicy(hidden_size=128).parameters())
    250241

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``) and of the transformer layer.
        width: channels of the MLP; the authors use hidden_size + top_k + 2.
        ffn: hidden channels of the transformer layer's feed-forward part; heads: its attention heads.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit (without effect on a categorical distribution).
        absolute_positions: also add an embedding of the position to what the MLP reads of the layer.
        odds: weight, >= 0, with which the log-odds of the largest confidence are added to the logits. The policy
            then begins as a soft max-confidence rule.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width or there
            are fewer than ``top_k`` confidences.
    """

    reads = ("hidden", "confidence", "mask", "action_mask")

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        width: int = 128,
        ffn: int = 512,
        heads: int = 2,
        top_k: int = 8,
        output_bias: float = -2.0,
        absolute_positions: bool = False,
        odds: float = 0.0,
        candidates: int | None = None,
    ):
        hidden_size = check_hidden_size(hidden_size)
        check_heads("hidden_size", hidden_size, heads)
        check_counts(width=width, ffn=ffn, top_k=top_k)
        super().__init__(candidates=candidates, top_k=top_k, hidden_size=hidden_size)
        self.odds = number("odds", odds, least=0)
        self.place = nn.Linear(hidden_size, hidden_size) if flag("absolute_positions", absolute_positions) else None
        self.block = TransformerBlock(hidden_size, ffn, heads)
        self.block_norm = nn.LayerNorm(hidden_size)
        sizes = (hidden_size + top_k + 2, width, width, width)
        self.mlp = nn.Sequential(
            *(nn.Sequential(nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU()) for i, o in pairwise(sizes))
        )
        self.head = smart_head(width, output_bias)

    def trunk(self, hidden: Tensor, confidence: Tensor, mask: Tensor, action_mask: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        x = self.block_norm(self.block(hidden.to(dtype)))  # (B, L, d)
        if self.place is not None:
            x = x + self.place(places(x))
        flags = torch.stack([action_mask != 0, mask != 0], dim=-1)  # (B, L, 2)
        return self.mlp(torch.cat([x, flags.to(dtype), confidence[..., : self.top_k].to(dtype)], dim=-1))

    def start(self, seen: Mapping[str, Tensor]) -> Tensor | float:
        return self.odds * log_odds(seen["confidence"]) if self.odds else 0.0


class MLPPolicy(Policy):
    """Each position on its own, without attention: what a policy can do that compares no positions (the floor).

    A learned confidence threshold that may vary with the time: an MLP with two hidden layers on the position's
    ``top_k`` largest probabilities, its mask flag and the time.

    >>> sum(p.numel() for p in MLPPolicy().parameters())
    17153

    Args:
        width: channels.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is out of range, or (on call) the observation has fewer than ``top_k`` confidences.
    """

    def __init__(self, *, width: int = 128, top_k: int = 1, output_bias: float = -2.0, candidates: int | None = None):
        check_counts(width=width, top_k=top_k)
        super().__init__(candidates=candidates, top_k=top_k)
        self.mlp = nn.Sequential(nn.Linear(top_k + 2, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = smart_head(width, output_bias)

    def trunk(self, confidence: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        flag = (mask != 0)[..., None]  # (B, L, 1)
        x = torch.cat([confidence[..., : self.top_k], flag, time[:, None].expand_as(flag)], dim=-1)  # (B, L, K + 2)
        return self.mlp(x.to(self.head.weight.dtype))


def log_odds(confidence: Tensor) -> Tensor:
    """Those of the largest confidence, float32 [.., L] of [.., L, K]."""
    return confidence[..., 0].float().clamp(_DOUBT, 1 - _DOUBT).logit()


def places(x: Tensor) -> Tensor:
    """The embedding of the positions 0 .. L - 1 for x [.., L, d]: [L, d], as x in dtype and device."""
    position = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None]
    return sinusoid(position, x.shape[-1], 10_000.0).to(x.dtype)


def check_counts(**settings: int) -> None:
    for name, value in settings.items():
        whole(name, value)


def check_heads(name: str, width: int, heads: int) -> None:
    if whole(name, width) % (2 * whole("heads", heads)):
        raise ValueError(f"{name}={width} is not valid with heads={heads}: a multiple of 2 * heads is (rotary halves)")


def check_hidden_size(hidden_size: int | None) -> int:
    if hidden_size is None:
        raise ValueError(
            "hidden_size=None is not valid: it is the width of the dLLM's hidden states (the hidden_size of the "
            "environment's model)"
        )
    return hidden_size


class TransformerBlock(nn.Module):
    """Pre-norm transformer block with rotary positions, [B, L, d] to [B, L, d]."""

    def __init__(self, width: int, ffn: int, heads: int, modulation: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.modulation: Any = modulation
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d / heads)
        q, k = rotate(q), rotate(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class DiTBlock(TransformerBlock):
    """Transformer block with AdaLN modulation; starts as the identity."""

    def __init__(self, width: int, ffn: int, heads: int):
        super().__init__(width, ffn, heads, _zero_modulation(width, 6))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, L, d]; condition [B, 2, d] for mask 0 and 1; mask bool [B, L, 1]. Returns [B, L, d]."""
        modulation = by_mask(self.modulation(condition), mask)  # (B, L, 6d)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        x = x + gate_a * self._attend(self.attention_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_f * self.ffn(self.ffn_norm(x) * (1 + scale_f) + shift_f)


def _zero_modulation(width: int, parts: int) -> nn.Sequential:
    """The AdaLN projection of a condition [.., d] to shifts, scales and gates [.., parts * d], at first all zero."""
    projection = nn.Linear(width, parts * width)
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
    return nn.Sequential(nn.SiLU(), projection)


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


def conditions(time_mlp: nn.Module, mask_embedding: nn.Embedding, time: Tensor) -> Tensor:
    """The two conditions of a row, [B, 2, d] for unmasked and masked positions, from its embedded time [B, d]."""
    weight = mask_embedding.weight
    return time_mlp(time.to(weight.dtype))[:, None] + weight


def by_mask(modulation: Tensor, mask: Tensor) -> Tensor:
    """Each position's own modulation [B, L, c], from those of the two conditions [B, 2, c] and mask bool [B, L, 1].

    Projecting the two conditions first and choosing then saves a third of a block's arithmetic.
    """
    unmasked, masked = modulation.chunk(2, dim=1)  # (B, 1, c) each
    return torch.where(mask, masked, unmasked)


def sinusoid(value: Tensor, width: int, period: float) -> Tensor:
    """Embedding float32 [B, width] (cosines, sines) of value [B, 1]; frequencies period ** -(i / half)."""
    half = width // 2
    frequency = period ** -(torch.arange(half, device=value.device, dtype=torch.float32) / half)
    angle = value.float() * frequency  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (RoFormer, halves convention) of x [B, heads, L, d]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency  # (L, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
