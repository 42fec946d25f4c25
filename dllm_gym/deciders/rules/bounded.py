"""Rules that take as many positions as are sure enough: one by one, or all of them together."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_gym.checks import number, whole
from dllm_gym.deciders.rules.base import KL_MOST, Observation, Rule, best_first, first_k, joint_confidence, or_else_one


class Threshold(Rule):
    """All legal positions whose confidence reaches the threshold, else the most confident one (Fast-dLLM, LUP).

    The fallback is per row: a row in which nothing reaches the threshold moves on, whatever its neighbours do.

    Args:
        threshold: in [0, 1].
    """

    label = "threshold"
    draws = False

    def __init__(self, threshold: float = 0.9):
        number("threshold", threshold, least=0, most=1)
        self.threshold = threshold

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]  # (.., L)
        return or_else_one(legal & (confidence >= self.threshold), confidence, legal)


class Factor(Rule):
    """The n most confident legal positions, with the largest n whose weakest one still allows n at once.

    With legal confidences c_1 >= c_2 >= ..., n is the largest number with (n + 1) (1 - c_n) < factor, and at least 1
    (Fast-dLLM, arXiv 2505.22618). The published code differs from this formula of the paper in two corners: it
    accepts equality, and where n is all or all but one of the positions it takes all.

    Args:
        factor: > 0; higher is faster.
    """

    label = "factor"
    draws = False

    def __init__(self, factor: float = 1.0):
        self.factor = number("factor", factor, above=0)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        order = best_first(confidence, legal)
        n = torch.arange(1, order.shape[-1] + 1, device=order.device)
        # The left side grows with n, so the n that satisfy it are a prefix of the order.
        allowed = (n + 1) * (1 - confidence.gather(-1, order)) < self.factor  # (.., L)
        return or_else_one(torch.zeros_like(legal).scatter(-1, order, allowed) & legal, confidence, legal)


class EntropyBounded(Rule):
    """As many positions, the most confident first, as keep the entropy that is decided blindly within a bound.

    The longest prefix U of the legal positions with sum_U H - max_U H <= gamma, an upper bound of what the positions of
    U may tell about each other (EB-Sampler, arXiv 2505.24857). The paper orders by an error proxy of one's choice; here
    by falling confidence. One position alone always stays within the bound.

    Args:
        gamma: nats, >= 0; higher is faster.
    """

    label = "eb"
    draws = False
    requires = {"entropy": 1}

    def __init__(self, gamma: float = 0.1):
        self.gamma = number("gamma", gamma, least=0)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        order = best_first(observation["confidence"][..., 0], legal)
        entropy = self.read(observation, "entropy").gather(-1, order)  # (.., L), legal positions first
        within = entropy.cumsum(-1) - entropy.cummax(-1).values <= self.gamma
        return torch.zeros_like(legal).scatter(-1, order, within) & legal


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

    label = "klass"
    draws = False

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
        return f"{self.label}({self.confidence!r}, {self.kl!r}{history})"


class Joint(Rule):
    """The most confident first, as many as are right together with probability ``p``, else the most confident one.

    The longest prefix of the legal positions, by falling confidence, whose confidences multiply to at least ``p``: what
    the entropy-bounded sampler (arXiv 2505.24857) does, with -log c in place of the entropy.

    Args:
        p: in [0, 1]; lower is faster.
    """

    label = "joint"
    draws = False

    def __init__(self, p: float = 0.5):
        self.p = number("p", p, least=0, most=1)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        return or_else_one(legal & (self.joint(confidence, legal) >= self.p), confidence, legal)

    def joint(self, confidence: Tensor, legal: Tensor) -> Tensor:
        """Float [.., L]: the chance of the prefix that ends with a position, falling along the order."""
        return joint_confidence(confidence, legal) * confidence


class JointButOne(Joint):
    """:class:`Joint` without the least sure of its members, the last one: one doubt per step is free.

    The longest prefix of which all but the last position multiply to at least ``p``: the threshold on what a policy
    reads with ``joint``. The bound sum - max of the entropy-bounded sampler leaves out one member, too.

    Args:
        p: in [0, 1]; lower is faster.
    """

    label = "joint_but_one"
    draws = False

    def joint(self, confidence: Tensor, legal: Tensor) -> Tensor:
        return joint_confidence(confidence, legal)


class EntropyThreshold(Rule):
    """All legal positions whose entropy is at most ``entropy``, else that of the lowest (d3LLM: 0.4 to 0.5).

    Args:
        entropy: nats, >= 0; higher is faster.
    """

    label = "entropy_threshold"
    draws = False
    requires = {"entropy": 1}

    def __init__(self, entropy: float = 0.5):
        self.entropy = number("entropy", entropy, least=0)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        entropy = self.read(observation, "entropy")
        return or_else_one(legal & (entropy <= self.entropy), -entropy, legal)


class MarginThreshold(Rule):
    """All legal positions whose best token leads the second best by ``margin``, else that of the largest lead.

    Per position what Prophet (arXiv 2508.19982) asks of all of them on average before it commits everything.

    Args:
        margin: in [0, 1]; lower is faster.
    """

    label = "margin_threshold"
    draws = False
    requires = {"margin": 1}

    def __init__(self, margin: float = 0.5):
        self.margin = number("margin", margin, least=0, most=1)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        margin = self.read(observation, "margin")
        return or_else_one(legal & (margin >= self.margin), margin, legal)


class Saber(Rule):
    """All legal positions that are surer than the committed ones were on average, at least ``n`` (arXiv 2510.18165).

    The threshold is the mean, over all tokens committed so far, of the confidence with which each was committed; 1
    before there is one. (Saber's other half masks committed tokens again, which is no action here.)

    Args:
        n: positions per step at least, >= 1 (Saber: 2).
    """

    label = "saber"
    draws = False
    requires = {"committed": 1}

    def __init__(self, n: int = 2):
        self.n = whole("n", n)

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0]
        committed = self.read(observation, "committed").double()  # sums of float32 that do not depend on their order
        count = (committed > 0).sum(-1, keepdim=True)
        mean = torch.where(count > 0, committed.sum(-1, keepdim=True) / count.clamp_min(1), 1.0)
        return (legal & (confidence > mean)) | first_k(confidence, legal, self.n)
