"""Hand-made rules, the baselines: deciders ``(observation, noise [.., L]) -> action int8 [.., L]``.

Every rule decides per row from that row alone, picks legal positions only, picks at least one where one is legal, and
breaks ties by the lowest position. ``str(rule)`` is its name in tables, ``rule.requires`` the settings of the
environment without which it cannot decide.

=================  ====================  ==========================================================================
rule               reads                 source
=================  ====================  ==========================================================================
`Random`           the noise             random order of LLaDA, arXiv 2502.09992
`LeftToRight`      nothing               the order of an autoregressive model: the control
`TopK`             confidence            low-confidence remasking of LLaDA; max-confidence of UPO, arXiv 2510.05725
`Margin`           margin                UPO's margin; Kim et al., arXiv 2502.06768
`NegativeEntropy`  entropy               UPO's negative entropy
`Threshold`        confidence            Fast-dLLM, arXiv 2505.22618; LUP, arXiv 2512.09106
`Factor`           confidence            Fast-dLLM's factor rule
`EntropyBounded`   entropy, confidence   EB-Sampler, arXiv 2505.24857
`Klass`            kl, confidence        KLASS, arXiv 2511.05664
`Blockwise`        what its rule reads   LUP's expert: threshold 0.9 in blocks of 32 under full diffusion
=================  ====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_gym.checks import number, whole

Observation = Mapping[str, Tensor]

KL_MOST = 100.0  # nats: what the environment shows of larger divergences, and before there is one


def first_k(score: Tensor, legal: Tensor, k: int) -> Tensor:
    """bool [.., L]: the ``k`` legal positions of the highest score (all where fewer are legal), leftmost of equals."""
    order = best_first(score, legal)
    chosen = torch.zeros_like(legal).scatter(-1, order[..., :k], True)
    return chosen & legal


def best_first(score: Tensor, legal: Tensor) -> Tensor:
    """int64 [.., L]: positions by falling score, the leftmost of equals first, those that are not legal last."""
    return score.masked_fill(~legal, -torch.inf).sort(dim=-1, descending=True, stable=True).indices


def or_else_one(chosen: Tensor, score: Tensor, legal: Tensor) -> Tensor:
    """bool [.., L]: ``chosen``, and in rows where it is empty the legal position of the highest score."""
    return torch.where(chosen.any(-1, keepdim=True), chosen, first_k(score, legal, 1))


class Rule:
    """Base of the rules: a subclass says what it chooses among the legal positions."""

    @property
    def requires(self) -> dict[str, int]:
        """Settings that the environment must have, at least; empty if any environment will do."""
        return {}

    def __call__(self, observation: Observation, noise: Tensor) -> Tensor:
        """Decide.

        Args:
            observation: of the environment, entries [.., L] and more.
            noise: float32 [.., L] in (0, 1), for rules that draw.

        Returns:
            int8 [.., L], 1 = unmask.

        Raises:
            ValueError: the observation lacks something of ``requires``.
        """
        legal = observation["action_mask"] != 0
        return self.choose(observation, noise, legal).to(torch.int8)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        """bool [.., L] within ``legal`` (bool [.., L])."""
        raise NotImplementedError

    def read(self, observation: Observation, name: str) -> Tensor:
        """An entry that the environment only has on request."""
        entry = observation.get(name)
        if entry is None:
            raise ValueError(
                f"{self} reads {name!r}, which this observation lacks: "
                f"build the environment with {name}={self.requires[name]}"
            )
        return entry


class PerStep(Rule):
    """Unmask the ``k`` legal positions of the highest score in each step; fewer at the end, so nothing is left over.

    Args:
        k: positions per step, >= 1.
    """

    label: str

    def __init__(self, k: int = 1):
        self.k = whole("k", k)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        return first_k(self.score(observation, noise), legal, self.k)

    def __str__(self) -> str:
        return f"{self.label}({self.k})"

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        """Float [.., L]; higher is unmasked first."""
        raise NotImplementedError


class Random(PerStep):
    """``k`` legal positions at random."""

    label = "random"

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return noise


class LeftToRight(PerStep):
    """The ``k`` leftmost legal positions: what an autoregressive model would do."""

    label = "left_to_right"

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise)  # all equal: the leftmost win


class TopK(PerStep):
    """The ``k`` most confident legal positions (low-confidence remasking of LLaDA; UPO's max-confidence at k = 1)."""

    label = "top_k"

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return observation["confidence"][..., 0]


class Margin(PerStep):
    """The ``k`` legal positions with the largest lead of the best token over the second best (UPO)."""

    label = "margin"

    @property
    def requires(self) -> dict[str, int]:
        return {"margin": 1}

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return self.read(observation, "margin")


class NegativeEntropy(PerStep):
    """The ``k`` legal positions at which the dLLM's distribution has the lowest entropy."""

    label = "entropy"

    @property
    def requires(self) -> dict[str, int]:
        return {"entropy": 1}

    def score(self, observation: Observation, noise: Tensor) -> Tensor:
        return -self.read(observation, "entropy")


class Threshold(Rule):
    """All legal positions whose confidence reaches the threshold, else the most confident one (Fast-dLLM, LUP).

    The fallback is per row: a row in which nothing reaches the threshold moves on, whatever its neighbours do.

    Args:
        threshold: in [0, 1].
    """

    def __init__(self, threshold: float = 0.9):
        number("threshold", threshold, least=0, most=1)
        self.threshold = threshold

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]  # (.., L)
        return or_else_one(legal & (confidence >= self.threshold), confidence, legal)

    def __str__(self) -> str:
        return f"threshold({self.threshold!r})"


class Factor(Rule):
    """The n most confident legal positions, with the largest n whose weakest one still allows n at once.

    With legal confidences c_1 >= c_2 >= ..., n is the largest number with (n + 1) (1 - c_n) < factor, and at least 1
    (Fast-dLLM, arXiv 2505.22618). The published code differs from this formula of the paper in two corners: it
    accepts equality, and where n is all or all but one of the positions it takes all.

    Args:
        factor: > 0; higher is faster.
    """

    def __init__(self, factor: float = 1.0):
        self.factor = number("factor", factor, above=0)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        order = best_first(confidence, legal)
        n = torch.arange(1, order.shape[-1] + 1, device=order.device)
        # The left side grows with n, so the n that satisfy it are a prefix of the order.
        allowed = (n + 1) * (1 - confidence.gather(-1, order)) < self.factor  # (.., L)
        return or_else_one(torch.zeros_like(legal).scatter(-1, order, allowed) & legal, confidence, legal)

    def __str__(self) -> str:
        return f"factor({self.factor!r})"


class EntropyBounded(Rule):
    """As many positions, the most confident first, as keep the entropy that is decided blindly within a bound.

    The longest prefix U of the legal positions with sum_U H - max_U H <= gamma, an upper bound of what the positions of
    U may tell about each other (EB-Sampler, arXiv 2505.24857). The paper orders by an error proxy of one's choice; here
    by falling confidence. One position alone always stays within the bound.

    Args:
        gamma: nats, >= 0; higher is faster.
    """

    def __init__(self, gamma: float = 0.1):
        self.gamma = number("gamma", gamma, least=0)

    @property
    def requires(self) -> dict[str, int]:
        return {"entropy": 1}

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        order = best_first(observation["confidence"][..., 0], legal)
        entropy = self.read(observation, "entropy").gather(-1, order)  # (.., L), legal positions first
        within = entropy.cumsum(-1) - entropy.cummax(-1).values <= self.gamma
        return torch.zeros_like(legal).scatter(-1, order, within) & legal

    def __str__(self) -> str:
        return f"eb({self.gamma!r})"


class Klass(Rule):
    """All legal positions that are confident and have been stable, else the most confident one (KLASS).

    Confident: confidence > ``confidence``. Stable: each of the last ``history`` steps moved the distribution by a
    divergence KL(p_t || p_{t-1}) < ``kl``; before that many steps nothing is stable. (arXiv 2511.05664. The fallback is
    one position, as in the published runs for LLaDA, which are given as many steps as tokens.)

    The defaults are those of the published code; its script for LLaDA on GSM8K has 0.6, 0.015 and 2.

    Args:
        confidence: in [0, 1].
        kl: nats, > 0 and at most the largest divergence that is observed (KL_MOST).
        history: how many steps, >= 1.
    """

    def __init__(self, confidence: float = 0.9, kl: float = 0.01, history: int = 2):
        number("confidence", confidence, least=0, most=1)
        number("kl", kl, above=0, most=KL_MOST)
        self.confidence, self.kl, self.history = confidence, kl, whole("history", history)

    @property
    def requires(self) -> dict[str, int]:
        return {"kl": self.history}

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        drift = self.read(observation, "kl")  # (.., L, H), newest first
        if drift.shape[-1] < self.history:
            raise ValueError(
                f"{self} looks back {self.history} steps but this observation has {drift.shape[-1]}: "
                f"build the environment with kl={self.history} or more"
            )
        confidence = observation["confidence"][..., 0]
        stable = (drift[..., : self.history] < self.kl).all(-1)
        return or_else_one(legal & stable & (confidence > self.confidence), confidence, legal)

    def __str__(self) -> str:
        history = "" if self.history == 2 else f", {self.history}"
        return f"klass({self.confidence!r}, {self.kl!r}{history})"


class Blockwise(Rule):
    """A rule that is shown one block at a time: of the legal positions those in the first block that has any.

    Blocks are counted from the start of the completion: position i lies in block i // ``block_length``. In an
    environment with that ``block_length`` this changes nothing; under full diffusion it gives the semi-autoregressive
    variant of a rule, like LUP's expert ``Blockwise(Threshold(0.9), 32)`` (arXiv 2512.09106).

    Args:
        rule: chooses within the block (any decider that has ``requires`` will do).
        block_length: positions per block, >= 1.
    """

    def __init__(self, rule: Rule, block_length: int = 32):
        self.rule, self.block_length = rule, whole("block_length", block_length)

    @property
    def requires(self) -> dict[str, int]:
        return self.rule.requires

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        length = legal.shape[-1]
        block = torch.arange(length, device=legal.device) // self.block_length  # (L,)
        active = torch.where(legal, block, length).amin(-1, keepdim=True)  # (.., 1)
        shown = (legal & (block == active)).to(torch.int8)
        return self.rule({**observation, "action_mask": shown}, noise) != 0

    def __str__(self) -> str:
        return f"blockwise({self.rule}, {self.block_length})"
