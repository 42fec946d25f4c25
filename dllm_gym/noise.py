"""Counter-based random numbers: a draw is a pure function of (key, counter, index).

Neither the order of lanes nor the batch size touches a draw, no generator has to be carried along, and every device
gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


# Increment and multipliers of SplitMix64 (Steele, Lea, Flood 2014), as two's complement int64.
_GAMMA, _MULTIPLY_1, _MULTIPLY_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 in which every input bit moves every output bit."""
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def fold(key: Tensor, counter: Tensor | int) -> Tensor:
    """A new key from ``key`` and ``counter`` (int64, broadcast)."""
    if isinstance(counter, int):
        return mix(mix(key + _GAMMA) + _signed(counter * _GAMMA % (1 << 64)))
    return mix(mix(key + _GAMMA) + counter * _GAMMA)


def uniform(key: Tensor, counter: Tensor | int, n: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        key: int64 [B], one stream per row.
        counter: int64 [B] or one int, the position in the stream (e.g. the step).
        n: how many numbers per row.

    Returns:
        float32 [B, n]; every value is an odd multiple of 2**-24, so neither 0 nor 1.
    """
    return uniform_from(fold(fold(key, counter)[:, None], torch.arange(n, device=key.device)))  # (B, n)


def uniform_from(bits: Tensor) -> Tensor:
    """One uniform number float32 [..] in the open interval (0, 1) from each random int64 [..]."""
    return (_shift(bits, 41).to(torch.float32) * 2 + 1) * 2.0**-24
