"""Moments of lanes as pictures need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dllm_gym.process.config import EMPTY
from dllm_gym.render import END, Frame

if TYPE_CHECKING:
    from dllm_gym.process.unmasking import Unmasking


def frame_of(core: Unmasking, lane: int) -> Frame:
    """What a picture of one lane needs."""
    index = int(core.example[lane])
    mask = core.mask
    masked, predicted = mask[lane], core.predictions
    tokens = torch.where(masked, predicted.proposal[lane], core.tokens[lane, -core.L :]).tolist()
    over = core.outcome if core.outcome and core.outcome.done[lane] and not core.running[lane] else None
    return Frame(
        prompt="" if index == EMPTY else str(core.task.prompt(core.examples[index])),
        tokens=[END if t in core.dllm.stop_ids else core.dllm.token_text(t) for t in tokens],
        masked=masked.cpu().numpy(),
        confidence=torch.where(masked, predicted.confidence[lane, :, 0], 1.0).cpu().numpy(),
        fresh=core.fresh[lane].cpu().numpy().copy(),  # the next episode writes into it
        legal=core.active.legal(mask)[lane].cpu().numpy(),
        step=int(core.steps[lane]),
        given=core.L - int(core.blanks[lane]) if index != EMPTY else 0,
        score=float(over.score[lane]) if over else None,
        reward=float(over.reward[lane]) if over else None,
    )
