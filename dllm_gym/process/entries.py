"""The observation: one table of its entries, which the spaces, the specs and what is shown all follow.

A new entry is a line here, the setting that asks for it in :class:`~dllm_gym.process.config.EnvConfig`, and the place
where it is computed; what the dLLM's distribution says is computed by
:meth:`~dllm_gym.models.vocabulary.Vocabulary.read`, and named in its ``Sampling`` and ``Prediction``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_gym.models.vocabulary import LOG_LEAST
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.predictions import KL_MOST, Predictions

if TYPE_CHECKING:
    from dllm_gym.process.unmasking import Unmasking


@dataclass(frozen=True)
class Moment:
    """What entries are read from. ``mask``, ``legal``: bool [B, L], what is masked and what may be unmasked now."""

    core: Unmasking
    mask: Tensor
    legal: Tensor

    @property
    def said(self) -> Predictions:
        return self.core.predictions

    def tokens(self) -> Tensor | None:
        """int64 [B, L]: what is committed or would be; masks where nothing was predicted. None: not asked for."""
        if not self.core.shows_tokens:
            return None
        seen = self.mask if self.core.lookahead else self.legal
        return torch.where(seen, self.said.proposal, self.core.tokens[:, -self.core.L :])


@dataclass(frozen=True)
class Entry:
    """One entry of the observation.

    Attributes:
        name: its key.
        shape: in one lane, as numbers and names of sizes (``Unmasking.sizes``).
        value: of all lanes at a moment, [B, *shape]; None where the entry was not asked for.
        high: the largest value, or what gives it; its opposite bound is ``low``.
        committed: what a committed position reads (in its first channel, if it has several: the others read 0); None:
            the value is shown as it is.
        setting: of the environment: switches the entry on, or says how much of it is seen. None: always the same.
        dtype: int8 for bits, int64 for tokens, else float32.
    """

    name: str
    shape: tuple[int | str, ...]
    value: Callable[[Moment], Tensor | None]
    high: float | Callable[[Unmasking], float] = 1.0
    low: float = 0.0
    committed: float | None = None
    setting: str | None = None
    dtype: torch.dtype = torch.float32

    def size(self, core: Unmasking) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(core.sizes[side] if isinstance(side, str) else side for side in self.shape)

    def most(self, core: Unmasking) -> float:
        return self.high(core) if callable(self.high) else self.high

    def show(self, now: Moment) -> Tensor:
        """The value as it is observed, in a fresh tensor."""
        value = self.value(now)
        assert value is not None, f"{self.name} was not asked for"
        if self.committed is None:
            return value.clone()
        seen = now.mask if now.core.lookahead else now.legal
        committed: Tensor = _led_by(self.committed, value.shape[-1] if value.ndim > 2 else 1, value.device)
        if now.core.committed_confidence and self.name == "confidence":
            committed = value
        spread = (...,) + (None,) * (value.ndim - 2)  # (B, L) or (B, L, K)
        return torch.where(seen[spread], value, torch.where(now.mask[spread], 0.0, committed))


@cache
def _led_by(value: float, channels: int, device: torch.device) -> Tensor:
    """float32 [channels]: the value, then zeros."""
    return value * torch.eye(1, channels, device=device)[0]


BITS = torch.int8
ENTRIES = (
    Entry("confidence", ("L", "K"), lambda now: now.said.confidence, committed=1.0, setting="top_k"),
    Entry("mask", ("L",), lambda now: now.mask.to(BITS), dtype=BITS),
    Entry("action_mask", ("L",), lambda now: now.legal.to(BITS), dtype=BITS),
    Entry("time", (1,), lambda now: (now.core.steps / now.core.L)[:, None], high=lambda core: core.max_steps / core.L),
    # Its maximum is below log V: the mask is excluded.
    Entry(
        "entropy",
        ("L",),
        lambda now: now.said.measures.get("entropy"),
        high=lambda core: math.log(core.dllm.vocab_size),
        committed=0.0,
        setting="entropy",
    ),
    Entry("margin", ("L",), lambda now: now.said.measures.get("margin"), committed=1.0, setting="margin"),
    Entry(
        "kl",
        ("L", "H"),
        lambda now: None if now.said.drift is None else now.said.drift.kl,
        high=KL_MOST,
        committed=0.0,
        setting="kl",
    ),
    Entry(
        "preference",
        (1,),
        lambda now: None if now.core.alpha_range is None else now.core.preference[:, None],
        setting="alpha",
    ),
    Entry(
        "true_log_prob",
        ("L",),
        lambda now: now.said.measures.get("true_log_prob"),
        high=0.0,
        low=LOG_LEAST,
        committed=0.0,
        setting="teacher_forcing",
    ),
    Entry(
        "true_margin",
        ("L",),
        lambda now: now.said.measures.get("true_margin"),
        low=-1.0,
        committed=1.0,
        setting="teacher_forcing",
    ),
    Entry("committed", ("L",), lambda now: now.core.certainty, setting="committed"),
    Entry(
        "tokens",
        ("L",),
        lambda now: now.tokens(),
        high=lambda core: core.dllm.vocab_size - 1,
        setting="tokens",
        dtype=torch.int64,
    ),
    Entry("hidden", ("L", "d"), lambda now: now.said.hidden, math.inf, -math.inf, setting="hidden"),
    Entry("block_input", ("L", "d"), lambda now: now.said.block_input, math.inf, -math.inf, setting="block_input"),
)


def _settings(kind: type) -> tuple[str, ...]:
    """The settings of that type; a range of alphas is not asked for by whoever decides."""
    named = (e.setting for e in ENTRIES if e.setting and type(getattr(EnvConfig, e.setting)) is kind)
    return tuple(dict.fromkeys(named))


COUNTS, FLAGS = _settings(int), _settings(bool)  # the larger one serves whoever asks for less
