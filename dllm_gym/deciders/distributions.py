"""Distributions over unmask vectors: which of L positions are committed in one step.

All are built as ``Dist(logits [.., L], action_mask [.., L], temperature=1.0)``, compute in float32 whatever the logits'
dtype, and emit integer actions [.., L] (int8; int16 ranks if ``ordered``), non-zero inside ``action_mask`` only. A row
without a legal position has one outcome, the zero action: log-probability 0, entropy 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

_NEVER = torch.finfo(torch.float32).min  # logit of an illegal position: exp gives 0, differences stay finite
_LIMIT = 1e30  # logits are clamped to it, so that infinite ones and sums over positions stay finite
_COLDEST, _HOTTEST = 1e-20, 1e20  # beyond them float32 draws what it draws there, but for infinite quotients
_SMALL = -15.0  # below it log(1 + e^x) = e^x and 1 - exp(-e^x) = e^x to float32 precision


def refuse_nan(logits: Tensor) -> None:
    """Raises ValueError on a CPU; on another device the host does not wait, and the next transfer raises."""
    message = "logits contain NaN: the policy diverged, or its observation was not finite"
    if logits.device.type != "cpu":
        torch._assert_async(~logits.isnan().any(), message)
    elif logits.isnan().any():
        raise ValueError(message)


class UnmaskDistribution(Distribution):
    """Base of the distributions over unmask vectors.

    Attributes:
        ordered: whether an action holds ranks (0 = not picked, 1 = first pick, ..) instead of bits.
        fixed_steps: whether an episode takes as many steps as it has masks, whatever is picked.

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
    ordered: ClassVar[bool] = False
    fixed_steps: ClassVar[bool] = False

    def __init__(self, logits: Tensor, action_mask: Tensor, temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} is not valid: it divides the logits and must be > 0")
        logits, legal = torch.broadcast_tensors(logits.float(), action_mask != 0)
        refuse_nan(logits)
        self.action_mask = legal
        quotient = logits / min(max(temperature, _COLDEST), _HOTTEST)
        self.logits = quotient.clamp(-_LIMIT, _LIMIT).masked_fill(~legal, _NEVER)  # (.., L)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def from_noise(self, noise: Tensor) -> Tensor:
        """The action [.., L] selected by ``noise`` float32 [.., L] in (0, 1); an exact draw if that is uniform."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """An action [*sample_shape, .., L] from torch's global generator."""
        return self.from_noise(torch.rand(self._extended_shape(sample_shape), device=self.logits.device))

    @property
    def deterministic_sample(self) -> Tensor:
        """The greedy action [.., L]."""
        return self.mode

    def _picked(self, action: Tensor) -> Tensor:
        return (action != 0) & self.action_mask

    def _top(self) -> Tensor:
        """bool [.., L]: the legal position of the highest logit, the leftmost of equals."""
        return self._one_hot(self.logits.argmax(-1, keepdim=True))

    def _one_hot(self, index: Tensor) -> Tensor:
        """bool [.., L]: where position = ``index`` [.., 1] and legal."""
        return (torch.arange(self.logits.shape[-1], device=index.device) == index) & self.action_mask

    def _log_arrivals(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Log of exponential draws E [.., L], and of the arrival times E / e^logit on a clock of the fastest's rate.

        The position that arrives first is a draw from softmax(logits), and the order of arrival one from Plackett-Luce.
        """
        noise = noise.float().clamp(2.0**-25, 1 - 2.0**-24)  # torch.rand may return 0
        log_unit = (-torch.log1p(-noise)).log()
        return log_unit, log_unit - (self.logits - self.logits.amax(-1, keepdim=True))


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

    def _binary_entropy(self) -> Tensor:
        distance = self.logits.abs()
        return F.softplus(-distance) + distance * torch.sigmoid(-distance)  # (.., L)

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


class OnePosition(UnmaskDistribution):
    """Exactly one legal position, from softmax(logits / temperature) (UPO, arXiv 2510.05725).

    >>> OnePosition(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 0])).mode
    tensor([0, 1, 0], dtype=torch.int8)
    """

    fixed_steps: ClassVar[bool] = True

    @torch.no_grad()
    def from_noise(self, noise: Tensor) -> Tensor:
        """The position int8 [.., L] that arrives first in an exponential race (equal to the Gumbel-max draw)."""
        _, log_arrival = self._log_arrivals(noise)
        return self._one_hot(log_arrival.argmin(-1, keepdim=True)).to(torch.int8)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability float32 [..] of ``action`` [.., L]; bits outside the action mask are ignored.

        -inf for none or several positions.
        """
        picked = self._picked(action)
        log_prob = torch.where(picked, self.logits.log_softmax(-1), 0.0).sum(-1)
        return torch.where(self.action_mask.any(-1), log_prob.masked_fill(picked.sum(-1) != 1, -torch.inf), 0.0)

    def entropy(self) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)  # where p = 0, log p is finite
        return torch.where(self.action_mask.any(-1), entropy, 0.0)

    @property
    def mode(self) -> Tensor:
        return self._top().to(torch.int8)


class DynamicPlackettLuce(UnmaskDistribution):
    """Positions one after the other until a STOP item comes up (LUP's ``dpls``, arXiv 2512.09106).

    The first pick is from softmax(logits) over the legal positions. Each further one is from the softmax over the legal
    positions that are left and STOP, whose logit is 0 (at any temperature). STOP, or nothing left, ends the draw. An
    action holds ranks, int16 [.., L]: 0 = not picked, 1 = first pick, 2 = second, ..

    ``entropy`` has no closed form and raises NotImplementedError; TorchRL's losses then estimate its value from samples
    (such an estimate has no useful gradient: it does not follow how the probability of the samples changes).

    Precision: float32 resolves a logit of size x to 1e-7 x, so beyond 1e5 differences below 0.01 are lost. Noise has 23
    or 24 bits: draws follow the likelihood up to an absolute error of about 1e-7 times the number of legal positions.

    Raises:
        ValueError: as the base, or more than 32,767 positions (ranks are int16).

    >>> DynamicPlackettLuce(torch.tensor([1.0, -2.0, 3.0, 9.0]), torch.tensor([1, 1, 1, 0])).mode
    tensor([2, 0, 1, 0], dtype=torch.int16)
    """

    support = constraints.independent(constraints.nonnegative_integer, 1)
    ordered: ClassVar[bool] = True

    def __init__(self, logits: Tensor, action_mask: Tensor, temperature: float = 1.0):
        super().__init__(logits, action_mask, temperature)
        length, most = self.logits.shape[-1], torch.iinfo(torch.int16).max
        if length > most:
            raise ValueError(f"logits of {length} positions are not valid: ranks are int16, at most {most} positions")

    @torch.no_grad()
    def from_noise(self, noise: Tensor) -> Tensor:
        """Ranks int16 [.., L] from one uniform per position, STOP's share included.

        Let position i arrive at time t_i = E_i / r_i with E_i standard exponential and r_i = e^logit. The order of
        arrival is Plackett-Luce, and the winner is from softmax(logits). With R the sum of all rates, the time t of the
        first arrival is exponential with rate R and independent of who wins; the later waiting times t_i - t are fresh
        exponentials with rates r_i, independent of both (no memory). So R t is a standard exponential that nothing else
        depends on: it is STOP's own waiting time after the first pick, rate e^0 = 1. Position i is hence picked if
        t_i - t < R t, or log t_i < log t + log(1 + R).
        """
        top = self.logits.amax(-1, keepdim=True)
        log_unit, log_arrival = self._log_arrivals(noise)  # on a clock of rate e^top
        excess = (self.logits - top).logsumexp(-1, keepdim=True)  # log R = top + excess
        # Where top > 0 STOP is compared on the plain clock, so that logits near STOP's keep their digits next to a huge
        # one: log t + log(1 + R) = (log t + top) + excess + log(1 + 1 / R).
        patience = torch.where(top > 0, excess + F.softplus(-top - excess), F.softplus(top + excess))
        before_stop = log_unit - (self.logits - top.clamp_max(0)) < log_arrival.amin(-1, keepdim=True) + patience
        return self._ranks(log_arrival, (before_stop & self.action_mask).sum(-1, keepdim=True))

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability float32 [..] of the ranks ``action`` [.., L], any integer dtype; illegal ones are ignored.

        -inf where the other non-zero ranks are not 1..m in some order, or where a pick was possible and m = 0.
        """
        ranks, logits, legal = torch.broadcast_tensors(action.long(), self.logits, self.action_mask)
        unpicked = (ranks == 0) | ~legal
        key, order = ranks.masked_fill(unpicked, torch.iinfo(torch.int64).max).sort(dim=-1, stable=True)
        picks = (~unpicked).sum(-1, keepdim=True)  # (.., 1), m
        index = torch.arange(key.shape[-1], device=key.device)
        x = logits.gather(-1, order)
        left = x.flip(-1).logcumsumexp(-1).flip(-1)  # (.., L), log of the summed rates before pick index + 1
        first = x.log_softmax(-1)[..., 0]  # = x - left, which would lose the digits of logits like -1e6
        # Against STOP: picks 2..m, then STOP itself at index m (log 1 if nothing legal is left there).
        later = torch.where(index < picks, x, 0.0) - F.softplus(left)
        log_prob = first + later.masked_fill((index == 0) | (index > picks), 0.0).sum(-1)
        valid = ((key == index + 1) | (index >= picks)).all(-1) & (picks > 0).squeeze(-1)
        return torch.where(legal.any(-1), log_prob.masked_fill(~valid, -torch.inf), 0.0)

    @property
    def mode(self) -> Tensor:
        """The greedy path: the highest logit, then all legal logits > 0 (each likelier than STOP), highest first.

        Of equals the leftmost comes first. It is the most likely outcome of every draw in turn, not necessarily the
        most likely action.
        """
        above = (self.logits > 0).sum(-1, keepdim=True)
        return self._ranks(-self.logits, above)

    def _ranks(self, key: Tensor, picks: Tensor) -> Tensor:
        """Ranks int16 [.., L] of the ``picks`` [.., 1] (at least one) lowest keys [.., L] of legal positions."""
        rank = key.argsort(dim=-1, stable=True).argsort(-1) + 1
        return torch.where((rank <= picks.clamp_min(1)) & self.action_mask, rank, 0).to(torch.int16)
