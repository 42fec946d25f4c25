"""From hidden states to proposals and confidences, without ever holding a number per position and token.

The head is applied to slices of the vocabulary; what the slices say about the whole distribution (logsumexp, largest
probabilities, entropy) is put together afterwards, so memory does not grow with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dllm_gym.noise import fold, uniform_from

SLICE = {"cpu": 2048, "cuda": 16384}  # tokens of the vocabulary that are looked at at a time; a CPU's stay in its cache
LOG_LEAST = -100.0  # log-probabilities of the truth end here; exp gives about the smallest number that float32 holds
HOTTEST = 1e30  # beyond it every token that may be proposed is as likely as any other, in float32
PART = 1 << 25  # numbers that one slice, or a reduction over the vocabulary, may hold (128 MiB)


@dataclass(frozen=True)
class Prediction:
    """What a dLLM says about n masked positions.

    Attributes:
        token: int64 [n], the proposed tokens.
        confidence: float32 [n, K], the K largest probabilities, descending.
        hidden: [n, d] last hidden states in the model's dtype.
        entropy: float32 [n], Shannon entropy of the distribution in nats.
        margin: float32 [n], the largest probability minus the second largest.
        log_prob: float32 [n, V], the whole distribution; -inf for a token that is never proposed.
        true_log_prob: float32 [n], the log-probability of the true token, at least LOG_LEAST.
        true_margin: float32 [n], its probability minus the largest of the others.

    What was not asked for (see :class:`Sampling`) is None.
    """

    token: Tensor
    confidence: Tensor
    hidden: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    log_prob: Tensor | None = None
    true_log_prob: Tensor | None = None
    true_margin: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How proposals are drawn from a dLLM's logits.

    Attributes:
        top_k: K, how many probabilities to return.
        temperature: 0 proposes the most likely token; otherwise argmax(logits / temperature + Gumbel noise), which is
            the most likely token, too, where rounding takes the noise. The confidences are those of the untempered
            distribution in any case.
        hidden, entropy, margin, log_prob: what else to return. Like the confidences, they describe the untempered
            distribution. ``log_prob`` is the only one whose memory grows with the vocabulary.
        truth: return ``true_log_prob`` and ``true_margin`` as well, of tokens that are given with the positions.
    """

    top_k: int = 1
    temperature: float = 0.0
    hidden: bool = False
    entropy: bool = False
    margin: bool = False
    log_prob: bool = False
    truth: bool = False

    @property
    def measures(self) -> list[str]:
        """Which numbers per position are asked for beside the confidences."""
        asked = [name for name in ("entropy", "margin") if getattr(self, name)]
        return asked + (["true_log_prob", "true_margin"] if self.truth else [])


@dataclass
class Slices:
    """What each slice of the vocabulary says about n positions; lists with an entry per slice."""

    largest: list[Tensor] = field(default_factory=list)  # (n, k) its largest logits
    mass: list[Tensor] = field(default_factory=list)  # (n,) its logsumexp minus its largest logit
    score: list[Tensor] = field(default_factory=list)  # (n,) of its best candidate for a proposal
    token: list[Tensor] = field(default_factory=list)  # (n,) that candidate
    spread: list[Tensor] = field(default_factory=list)  # (n,) its largest logit minus its mean logit
    logits: list[Tensor] = field(default_factory=list)  # (n, slice), kept for log_prob only
    true: list[Tensor] = field(default_factory=list)  # (n,) the true token's logit, -inf in all slices but its own


class Vocabulary:
    """The head of a dLLM.

    Args:
        head: maps hidden states [n, d] to logits [n, V].
        size: V.
        forbidden: ids that are never proposed and have no probability.
    """

    def __init__(self, head: nn.Module, size: int, forbidden: Sequence[int]):
        self.head, self.size, self.forbidden = head, size, forbidden
        self._never: dict[tuple[int, int], Tensor] = {}  # those in a slice, counted from its start

    @property
    def sliced(self) -> bool:
        """Whether the head is read slice by slice.

        A subclass of Linear may store its weight in another form (quantised), hooks may bring it from another device or
        change what it gives: such heads are applied as a whole.
        """
        hooked = self.head._forward_hooks or self.head._forward_pre_hooks or hasattr(self.head, "_hf_hook")
        return type(self.head) is nn.Linear and not hooked

    def read(
        self, hidden: Tensor, sampling: Sampling, stream: Tensor | None = None, truth: Tensor | None = None
    ) -> Prediction:
        """Predict n positions.

        Args:
            hidden: [n, d] last hidden states.
            stream: int64 [n], a random stream per position; needed with a temperature.
            truth: int64 [n], the true tokens; needed where they are asked about.

        Raises:
            ValueError: a temperature without streams, a question about true tokens without these, or logits that are
                not finite (on a CPU; on another device the host does not wait, and the next transfer raises).
        """
        if sampling.temperature > 0 and stream is None:
            raise ValueError(f"temperature={sampling.temperature} draws tokens at random: pass key, one stream per row")
        if sampling.truth and truth is None:
            raise ValueError("truth=True asks how likely the true tokens are: pass them")
        width = slice_width(hidden.device) if self.sliced else self.size
        rows = max(1, PART // min(width, self.size))
        streams, truths = (repeat(None) if x is None else x.split(rows) for x in (stream, truth))
        pieces = [self._read(*piece, sampling) for piece in zip(hidden.split(rows), streams, truths, strict=False)]
        columns: dict[str, Any] = {}
        for name in Prediction.__dataclass_fields__:
            column = [getattr(piece, name) for piece in pieces]
            columns[name] = None if column[0] is None else torch.cat(column)
        refuse_nan(columns["confidence"], hidden.dtype)
        return Prediction(**columns)

    def _read(self, hidden: Tensor, stream: Tensor | None, truth: Tensor | None, sampling: Sampling) -> Prediction:
        slices = Slices()
        k = max(sampling.top_k, 2 if sampling.margin or sampling.truth else 1)
        for start, logits in self._slices(hidden):
            value, index = self._candidates(logits, start, stream, sampling.temperature).max(-1)
            slices.score.append(value)
            slices.token.append(index + start)
            if sampling.truth and truth is not None:
                slices.true.append(_logit_of(logits, truth - start))
            few = min(k, logits.shape[-1])
            greedy = few == 1 and sampling.temperature == 0
            _look(slices, logits, value[:, None] if greedy else logits.topk(few, -1).values, sampling)
        # max and argmax take the first of equals, so the lowest token wins, within and among slices.
        best = torch.stack(slices.score).argmax(0, keepdim=True)  # (1, n)
        largest = torch.cat(slices.largest, -1).topk(k, -1).values  # (n, k)
        # Counted from the largest logit everywhere, so that rounding does not depend on how large the logits are.
        offset = torch.stack([logits[:, 0] for logits in slices.largest]) - largest[:, 0]  # (S, n)
        masses = torch.stack(slices.mass) + offset
        mass = masses.logsumexp(0)  # (n,)
        probability = (largest - largest[:, :1] - mass[:, None]).exp()  # (n, k)
        entropy = mass + _spread(slices, offset, masses - mass) if sampling.entropy else None  # rounding is clamped
        return Prediction(
            torch.stack(slices.token).gather(0, best)[0],
            probability[:, : sampling.top_k],
            hidden=hidden if sampling.hidden else None,
            entropy=entropy.clamp(0, math.log(self.size)) if entropy is not None else None,
            margin=probability[:, 0] - probability[:, 1] if sampling.margin else None,
            log_prob=torch.cat(slices.logits, -1) - (largest[:, 0] + mass)[:, None] if sampling.log_prob else None,
            **(_about_truth(torch.stack(slices.true).amax(0), largest, mass) if sampling.truth else {}),
        )

    def _slices(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits float32 [n, c] of slice after slice, each with its first token."""
        head, sliced = cast(Any, self.head), self.sliced
        width = slice_width(hidden.device) if sliced else self.size
        for start in range(0, self.size, width):
            if sliced:
                here = slice(start, start + width)
                logits = linear(hidden, head.weight[here], None if head.bias is None else head.bias[here]).float()
            else:
                logits = head(hidden).to(hidden.device, torch.float32, copy=True)  # the head may lie elsewhere
            yield start, logits.index_fill_(1, self._forbidden_in(start, logits), -torch.inf)

    def _forbidden_in(self, start: int, logits: Tensor) -> Tensor:
        """int64 [m], the forbidden tokens among those of ``logits`` [n, c], counted from ``start``."""
        place = (start, logits.shape[-1])
        if place not in self._never or self._never[place].device != logits.device:
            here = [token - start for token in self.forbidden if start <= token < start + logits.shape[-1]]
            self._never[place] = torch.tensor(here, dtype=torch.int64, device=logits.device)
        return self._never[place]

    def _candidates(self, logits: Tensor, start: int, stream: Tensor | None, temperature: float) -> Tensor:
        """Scores [n, c] whose largest is the proposal: logits + temperature * Gumbel noise, or the logits."""
        if stream is None or temperature == 0:
            return logits
        token = torch.arange(start, start + logits.shape[-1], device=logits.device)
        u = uniform_from(fold(fold(stream, 0)[:, None], token))  # (n, c), the same in any slicing
        noise = -(-u.log()).log()
        if temperature <= 1:  # the same order; a quotient by a tiny temperature would be infinite for every token
            return logits + temperature * noise
        return logits / min(temperature, HOTTEST) + noise


def refuse_nan(confidence: Tensor, dtype: torch.dtype) -> None:
    """Probabilities are numbers unless the network has overflowed."""
    message = f"the dLLM's logits are not finite in {dtype}: load it in bfloat16 or float32"
    if confidence.device.type != "cpu":
        torch._assert_async(~confidence.isnan().any(), message)
    elif np.isnan(confidence.detach().numpy()).any():
        raise ValueError(message)


def slice_width(device: torch.device) -> int:
    """Tokens in a slice of the vocabulary on a device."""
    return SLICE.get(device.type, SLICE["cuda"])


def _look(slices: Slices, logits: Tensor, largest: Tensor, sampling: Sampling) -> None:
    """Add to ``slices`` what logits [n, c] with these largest ones [n, k] say; the logits are used up."""
    if sampling.log_prob:
        slices.logits.append(logits.clone())
    away = logits.sub_(largest[:, :1].clamp_min(torch.finfo().min))  # (n, c), at most 0; -inf where it is forbidden
    slices.largest.append(largest)
    if not sampling.entropy:
        slices.mass.append(away.exp_().sum(-1).log())
        return
    weight = away.exp()
    total = weight.sum(-1)
    slices.mass.append(total.log())
    spread = -(weight * away.masked_fill_(weight == 0, 0)).sum(-1) / total
    slices.spread.append(spread.nan_to_num(0))  # of a slice of nothing but forbidden tokens


def _logit_of(logits: Tensor, token: Tensor) -> Tensor:
    """float32 [n], of logits [n, c] that of each row's token int64 [n], which counts from the slice; -inf outside."""
    inside = (token >= 0) & (token < logits.shape[-1])
    found = logits.gather(1, token.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return found.masked_fill(~inside, -torch.inf)


def _about_truth(true: Tensor, largest: Tensor, mass: Tensor) -> dict[str, Tensor]:
    """Log-probability and margin of the true tokens, by their logits [n], the largest ones [n, k >= 2], descending, and
    the logsumexp [n] of all counted from the largest."""
    log_prob = true - largest[:, 0] - mass  # (n,)
    other = torch.where(true == largest[:, 0], largest[:, 1], largest[:, 0])
    margin = log_prob.exp() - (other - largest[:, 0] - mass).exp()
    return {"true_log_prob": log_prob.clamp(LOG_LEAST, 0), "true_margin": margin}


def _spread(slices: Slices, offset: Tensor, log_share: Tensor) -> Tensor:
    """float32 [n], the largest logit minus the mean logit: entropy less log Z.

    Args:
        offset, log_share: [S, n], each slice's largest logit minus that of all, and its log-probability.
    """
    return (log_share.exp() * (torch.stack(slices.spread) - offset).masked_fill(log_share == -torch.inf, 0)).sum(0)


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [n, ...], the first one [n, V], in pieces of rows: a copy of a piece is small beside the whole."""
    rows = max(1, PART // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) float32 [n] in nats of distributions given as log-probabilities [n, V].

    What p excludes counts 0; what q excludes and p does not makes it infinite.
    """
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1).clamp_min_(0)  # rounding may end below 0
