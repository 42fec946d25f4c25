"""The blocks of B completions: how they lie, which one is active, and when one is left with masks in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which positions of a completion are decoded together.

    Attributes:
        length: BL. from_prompt: blocks are counted from the prompt's first token, not from the completion's.
        most_steps: that a block is active; then it is over, masks or not (LUP's published code: BL). None: any number.
    """

    length: int
    from_prompt: bool = False
    most_steps: int | None = None

    def before(self, prompt: np.ndarray) -> np.ndarray:
        """int64 [n]: how many positions of the completion's first block lie in prompts of so many tokens."""
        return prompt % self.length if self.from_prompt else np.zeros_like(prompt)

    def of(self, prompt: np.ndarray, length: int) -> np.ndarray:
        """int64 [n, L]: the block of every position, after prompts of so many tokens."""
        return (self.before(prompt)[:, None] + np.arange(length)) // self.length


class ActiveBlocks:
    """In each of B lanes the block whose positions may be unmasked: they are decoded from left to right.

    Args:
        lanes: B. length: L. most_steps: as of ``Blocks``. device: where everything lives.

    Attributes:
        of: int64 [B, L], the block of each position.
        closed: int64 [B], the blocks before this one are over. spent: int64 [B], steps taken in the active block.
    """

    def __init__(self, lanes: int, length: int, most_steps: int | None, device: torch.device):
        self.none, self.most_steps = length, most_steps
        self.of = torch.zeros(lanes, length, dtype=torch.int64, device=device)
        self.closed, self.spent = torch.zeros(2, lanes, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        """What is kept per lane, [B, ...] each."""
        return [self.of, self.closed, self.spent]

    def begin(self, lanes: Tensor, of: Tensor) -> None:
        """New episodes begin in these lanes, with blocks ``of`` [b, L]."""
        self.of[lanes] = of
        self.closed[lanes] = self.spent[lanes] = 0

    def block(self, mask: Tensor, lanes: Tensor | None = None) -> Tensor:
        """int64 [B], the first block with masks that is not over; L where there is none.

        ``mask`` bool [B, L] is of all lanes, or of those in ``lanes`` (int64 [B]).
        """
        of, closed = (self.of, self.closed) if lanes is None else (self.of[lanes], self.closed[lanes])
        return torch.where(mask & (of >= closed[:, None]), of, self.none).amin(1)

    def legal(self, mask: Tensor, lanes: Tensor | None = None) -> Tensor:
        """bool [B, L], masked positions of the active blocks."""
        of = self.of if lanes is None else self.of[lanes]
        return mask & (of == self.block(mask, lanes)[:, None])

    def step(self, active: Tensor, masked: Tensor, running: Tensor) -> Tensor:
        """Count a step in the blocks that were ``active`` (int64 [B]), and close those that have had all of theirs.

        Args:
            masked: bool [B, L], what is masked after it. running: bool [B], lanes that took it.

        Returns:
            bool [B], the block was left with masks in it.
        """
        self.spent = torch.where(self.block(masked) == active, self.spent + 1, 0)
        if self.most_steps is None:
            return torch.zeros_like(running)
        left = running & (self.spent >= self.most_steps)
        self.closed = torch.where(left, active + 1, self.closed)
        self.spent = torch.where(left, 0, self.spent)
        return left
