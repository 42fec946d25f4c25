"""Rules that look at where positions lie: blocks, runs, neighbourhoods, distances."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_gym.checks import number, whole
from dllm_gym.deciders.rules.base import Observation, Rule, best_first, draws, first_k, or_else_one


class Blockwise(Rule):
    """A rule that is shown one block at a time: of the legal positions those in the first block that has any.

    Blocks are counted from the start of the completion: position i lies in block i // ``block_length``. In an
    environment with that ``block_length`` this changes nothing; under full diffusion it gives the semi-autoregressive
    variant of a rule, like LUP's expert ``Blockwise(Threshold(0.9), 32)`` (arXiv 2512.09106).

    Args:
        rule: chooses within the block (any decider that has ``requires`` will do).
        block_length: positions per block, >= 1.
    """

    label = "blockwise"

    def __init__(self, rule: Rule, block_length: int = 32):
        self.rule, self.block_length = rule, whole("block_length", block_length)

    @property
    def requires(self) -> dict[str, int]:
        return self.rule.requires

    @property
    def draws(self) -> bool:
        return draws(self.rule)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        length = legal.shape[-1]
        block = torch.arange(length, device=legal.device) // self.block_length  # (L,)
        active = torch.where(legal, block, length).amin(-1, keepdim=True)  # (.., 1)
        shown = (legal & (block == active)).to(torch.int8)
        return self.rule({**observation, "action_mask": shown}, noise) != 0


class Hierarchical(Rule):
    """The best position of every run of masks, so that far ones go together (dInfer's hierarchical decoding).

    Of every run of adjacent legal positions the most confident one, if its confidence is above ``low``; all whose
    confidence is above ``high``; and the most confident of all.

    Args:
        high, low: in [0, 1], low <= high (dInfer: 0.9 and 0.4).
    """

    label = "hier"
    draws = False

    def __init__(self, high: float = 0.9, low: float = 0.4):
        self.high = number("high", high, least=0, most=1)
        self.low = number("low", low, least=0, most=self.high)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        length = legal.shape[-1]
        begins = legal & ~torch.nn.functional.pad(legal[..., :-1], (1, 0))
        run = begins.cumsum(-1)  # (.., L): 1, 2, .. where legal
        rank = torch.empty_like(run).scatter(
            -1, best_first(confidence, legal), torch.arange(length, device=run.device).expand_as(run)
        )
        run = (run - 1).clamp_min(0)
        first = torch.full_like(run, length).scatter_reduce(-1, run, rank.masked_fill(~legal, length), "amin")
        best = legal & (rank == first.gather(-1, run))
        sure = (best & (confidence > self.low)) | (legal & (confidence > self.high))
        return sure | first_k(confidence, legal, 1)


class LocalLeap(Rule):
    """All legal positions that are confident, and those near to one of them that are nearly so, else the best one.

    Anchors: confidence > ``anchor``. Within ``radius`` positions of an anchor confidence >= ``relaxed`` is enough
    (arXiv 2510.07081).

    Args:
        anchor, relaxed: in [0, 1], relaxed <= anchor.
        radius: positions, >= 1.
    """

    label = "local_leap"
    draws = False

    def __init__(self, anchor: float = 0.9, radius: int = 4, relaxed: float = 0.75):
        self.anchor = number("anchor", anchor, least=0, most=1)
        self.radius = whole("radius", radius)
        self.relaxed = number("relaxed", relaxed, least=0, most=self.anchor)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        anchors = legal & (confidence > self.anchor)
        length = legal.shape[-1]
        position = torch.arange(length, device=legal.device)
        upto = torch.nn.functional.pad(anchors.cumsum(-1), (1, 0))  # (.., L + 1): anchors left of a position
        left, right = (position - self.radius).clamp_min(0), (position + self.radius + 1).clamp_max(length)
        near = upto[..., right] > upto[..., left]
        return or_else_one(anchors | (legal & near & (confidence >= self.relaxed)), confidence, legal)


class Spaced(Rule):
    """Of what a rule picks, the most confident first, those that lie apart from all that were kept before.

    Neighbours depend on each other most; kept are those at least ``gap`` positions from every kept one (the spacing of
    DUS, arXiv 2506.19037, for any rule).

    Args:
        rule: picks (any decider that has ``requires`` will do).
        gap: positions, >= 1; 1 keeps everything.
    """

    label = "spaced"

    def __init__(self, rule: Rule, gap: int = 2):
        self.rule, self.gap = rule, whole("gap", gap)

    @property
    def requires(self) -> dict[str, int]:
        return self.rule.requires

    @property
    def draws(self) -> bool:
        return draws(self.rule)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        picked = (self.rule(observation, noise) != 0) & legal
        position = torch.arange(legal.shape[-1], device=legal.device)
        order = best_first(observation["confidence"][..., 0], picked)
        kept = torch.zeros_like(legal)
        for i in range(int(picked.sum(-1).amax())):
            at = order[..., i : i + 1]  # (.., 1)
            close = (kept & ((position - at).abs() < self.gap)).any(-1, keepdim=True)
            kept |= (position == at) & picked & ~close
        return kept
