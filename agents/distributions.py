"""Distributions over unmask vectors: which of L positions are committed in one step.

All are built as ``Dist(logits [.., L], action_mask [.., L], temperature=1.0)``, compute in float32 whatever the logits'
dtype, and emit int8 actions [.., L] with bits inside ``action_mask`` only. A row without a legal position has one
outcome, the zero action: log-probability 0, entropy 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

_NEVER = torch.finfo(torch.float32).min  # logit of an illegal position: exp gives 0, differences stay finite
_LIMIT = 1e30  # logits are clamped to it, so that infinite ones and sums over positions stay finite
_SMALL = -15.0  # below it log(1 + e^x) = e^x and 1 - exp(-e^x) = e^x to float32 precision


class UnmaskDistribution(Distribution):
    """Base of the distributions over unmask vectors.

    Args:
        logits: [.., L], any floating dtype.
        action_mask: [.., L], 1 or True where a position may be unmasked. Broadcasts against ``logits``.
        temperature: divides the logits; > 0.

    Raises:
        ValueError: a logit is NaN (at any position), or ``temperature`` is not positive.
    """

    arg_constraints: ClassVar[dict] = {
        "logits": constraints.independent(constraints.real, 1),
        "action_mask": constraints.independent(constraints.boolean, 1),
    }
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, action_mask: Tensor, temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} is not valid: it divides the logits and must be > 0")
        logits, legal = torch.broadcast_tensors(logits.float(), action_mask != 0)
        if logits.isnan().any():
            raise ValueError("logits contain NaN: the policy diverged, or its observation was not finite")
        self.action_mask = legal
        self.logits = (logits / temperature).clamp(-_LIMIT, _LIMIT).masked_fill(~legal, _NEVER)  # (.., L)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def from_noise(self, noise: Tensor) -> Tensor:
        """The action int8 [.., L] that uniform ``noise`` [.., L] in (0, 1) selects; exact if the noise is uniform."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """An action int8 [*sample_shape, .., L] from torch's global generator."""
        return self.from_noise(torch.rand(self._extended_shape(sample_shape), device=self.logits.device))

    @property
    def deterministic_sample(self) -> Tensor:
        """The greedy action int8 [.., L]."""
        return self.mode


class MaskedBernoulli(UnmaskDistribution):
    """Independent Bernoulli over the legal positions (LUP's ``bernoulli``); an empty action is possible.

    >>> MaskedBernoulli(torch.tensor([3.0, -3.0, 3.0]), torch.tensor([1, 1, 0])).mode
    tensor([1, 0, 0], dtype=torch.int8)
    """

    @torch.no_grad()
    def from_noise(self, noise: Tensor) -> Tensor:
        return (noise < self.logits.sigmoid()).to(torch.int8)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability float32 [..] of ``action`` [.., L]; bits outside the action mask are ignored."""
        return F.logsigmoid(torch.where(self._picked(action), self.logits, -self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return self._binary_entropy().sum(-1)

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(torch.int8)

    def _picked(self, action: Tensor) -> Tensor:
        return (action != 0) & self.action_mask

    def _binary_entropy(self) -> Tensor:
        distance = self.logits.abs()
        return F.softplus(-distance) + distance * torch.sigmoid(-distance)  # (.., L)

    def _top(self) -> Tensor:
        """bool [.., L]: the legal position of the highest logit, the leftmost of equals."""
        position = torch.arange(self.logits.shape[-1], device=self.logits.device)
        return (position == self.logits.argmax(-1, keepdim=True)) & self.action_mask

    def _above_half_or_top(self) -> Tensor:
        above = self.logits > 0
        return torch.where(above.any(-1, keepdim=True), above, self._top()).to(torch.int8)


class BernoulliArgmax(MaskedBernoulli):
    """Bernoulli whose empty outcome is replaced by the legal position of the highest logit (LUP's evaluation form).

    ``log_prob`` is the likelihood of what is emitted: the one-position action {argmax} is reached by its own draw and
    by the empty one, so P({argmax}) = prod over the *other* positions of (1 - p). The empty action has probability 0.
    """

    @torch.no_grad()
    def from_noise(self, noise: Tensor) -> Tensor:
        drawn = noise < self.logits.sigmoid()
        return torch.where(drawn.any(-1, keepdim=True), drawn, self._top()).to(torch.int8)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability float32 [..] of ``action`` [.., L]; bits outside the action mask are ignored."""
        picked, top = self._picked(action), self._top()
        log_prob = super().log_prob(action).masked_fill(~picked.any(-1), -torch.inf)
        return torch.where((picked == top).all(-1), self._log_others_empty(top), log_prob)

    def entropy(self) -> Tensor:
        # Given that the others are empty (probability R) the argmax is certain: its own entropy counts 1 - R times.
        top = self._top()
        return (self._binary_entropy() * torch.where(top, -torch.expm1(self._log_others_empty(top))[..., None], 1)).sum(
            -1
        )

    @property
    def mode(self) -> Tensor:
        """The most likely action; unlike ``deterministic_sample`` it may be {argmax} although several p exceed 0.5."""
        logits, top = self.logits, self._top()
        best_top = F.softplus(logits.amax(-1))  # log of P({argmax}) / P(no draw)
        best_set = logits.clamp_min(0).sum(-1)  # log of P({p > 0.5}) / P(no draw)
        single = ((logits > 0).sum(-1) <= 1) | (best_top >= best_set)
        return torch.where(single[..., None], top, logits > 0).to(torch.int8)

    @property
    def deterministic_sample(self) -> Tensor:
        """{p > 0.5}, or the argmax if that is empty."""
        return self._above_half_or_top()

    def _log_others_empty(self, top: Tensor) -> Tensor:
        return -F.softplus(self.logits).masked_fill(top, 0).sum(-1)


class ZeroTruncatedBernoulli(MaskedBernoulli):
    """Independent Bernoulli conditioned on at least one pick: no step is wasted, and the likelihood stays exact.

    With p = sigmoid(logits), hazards h = -log(1 - p) = softplus(logits) and Z = P(at least one pick) = 1 - exp(-sum h):
    P(a) = prod p^a (1 - p)^(1 - a) / Z. Z is handled as log(1 - exp(-e^t)) with t the log-sum-exp of log h, relative to
    the row's highest logit: neither probabilities of 1e-30 (or logits of -1000) nor of 1 - 1e-30 lose precision.
    """

    def __init__(self, logits: Tensor, action_mask: Tensor, temperature: float = 1.0):
        super().__init__(logits, action_mask, temperature)
        # Results do not depend on this reference level, so no gradient needs to pass through it.
        self._level = self.logits.detach().amax(-1, keepdim=True).clamp_max(0)  # (.., 1)
        small = self.logits < _SMALL
        log_hazard = torch.where(small, self.logits, F.softplus(self.logits.clamp_min(_SMALL)).log())
        self._log_hazard = log_hazard - self._level  # (.., L), relative to the level

    @torch.no_grad()
    def from_noise(self, noise: Tensor) -> Tensor:
        """Scan from the left: until the first pick with p_i / P(a pick at i or right of it), afterwards with p_i."""
        right = self._log_hazard.flip(-1).logcumsumexp(-1).flip(-1)  # (.., L), summed over i and all right of it
        log_any = self._log_any(right)
        log_later = F.pad(log_any[..., 1:], (0, 1), value=_NEVER)
        pick = (F.logsigmoid(self.logits) - self._level - log_any).exp()
        skip = (F.logsigmoid(-self.logits) + log_later - log_any).exp()
        # Compare with the smaller of pick and skip = 1 - pick, so that rounding of the other never decides: the last
        # legal position has skip = 0 and is certain, an impossible position stays impossible.
        first = torch.where(pick < 0.5, noise < pick, 1 - noise > skip) & self.action_mask
        started = (first.cumsum(-1) - first.long()) > 0  # a pick left of i
        return torch.where(started, noise < self.logits.sigmoid(), first).to(torch.int8)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability float32 [..] of ``action`` [.., L]; bits outside the action mask are ignored."""
        picked = self._picked(action)
        terms = torch.where(picked, F.logsigmoid(self.logits) - self._level, F.logsigmoid(-self.logits))
        surplus = (picked.sum(-1) - 1) * self._level.squeeze(-1)
        log_prob = (terms.sum(-1) + surplus - self._log_z()).masked_fill(~picked.any(-1), -torch.inf)
        return torch.where(self.action_mask.any(-1), log_prob, 0.0)

    def entropy(self) -> Tensor:
        # H = log Z + sum h - sum r x with x the logits and r = p / Z = P(position is picked); equal to
        # log Z + (H_B + P0 log P0) / Z. Where x > 0, h - r x = softplus(-x) + x (1 - r) has no cancellation.
        logits, log_z, level = self.logits, self._log_z()[..., None], self._level
        share = (F.logsigmoid(logits) - level - log_z).exp()  # (.., L), r
        empty = (-F.softplus(logits).sum(-1, keepdim=True)).exp()  # P0
        # 1 - r, needed where x > 0; there Z > 1/2, so the clamp only keeps the unused values finite.
        miss = (torch.sigmoid(-logits) - empty) * (-log_z - level).clamp_max(1).exp()
        positive = logits > 0
        terms = F.softplus(-logits.abs()) + torch.where(positive, logits * miss, -share * (logits - level))
        rest = level * (1 - share.masked_fill(positive, 0).sum(-1, keepdim=True))
        return torch.where(self.action_mask.any(-1), terms.sum(-1) + (rest + log_z).squeeze(-1), 0.0)

    @property
    def mode(self) -> Tensor:
        """{p > 0.5}, or the argmax if that is empty."""
        return self._above_half_or_top()

    def _log_any(self, log_hazard: Tensor) -> Tensor:
        """log(1 - exp(-hazard)), both relative to the level."""
        absolute = log_hazard + self._level
        large = (-torch.expm1(-absolute.clamp_min(_SMALL).exp())).log() - self._level
        return torch.where(absolute < _SMALL, log_hazard, large)

    def _log_z(self) -> Tensor:
        return self._log_any(self._log_hazard.logsumexp(-1, keepdim=True)).squeeze(-1)  # (..)
