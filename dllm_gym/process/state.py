"""The state of B lanes, and how it begins and moves: tokens on the device, and beside them what the host knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dllm_gym.models import DLLM
from dllm_gym.models.batches import download, upload
from dllm_gym.noise import fold
from dllm_gym.process.blocks import ActiveBlocks, Blocks
from dllm_gym.process.config import EMPTY
from dllm_gym.process.predictions import Predictions, Request
from dllm_gym.process.starts import Start


class State:
    """B rows of tokens, each on its way from blanks to an answer.

    Args:
        dllm: whose tokens. lanes: B. length: L. blocks: decoded together. certainty: keep it. forced: write the truth.

    Attributes:
        tokens: int64 [B, P + L], left-padded prompts and completions; P grows with the longest prompt seen.
        starts: what each lane's episode began with. example: int64 [B], index in the split; EMPTY: it has no episode.
        steps: int64 [B], steps of the running episode (its NFE). key: int64 [B], its random stream.
        fresh: bool [B, L], committed by the last step. certainty: float32 [B, L], the largest probability where an
            action committed a proposal, when it did, 0 elsewhere; None where nobody asks for it.
        truth: int64 [B, L], right completions; None unless they are forced.
        completion: int64 [B, L], the completions as the host knows them.
        revisits: states are expected to come again, in other episodes: evaluations, where many decide alike.
        running: bool [B], the episode goes on. stale: bool [B], tokens changed since they were predicted.
        blanks: int64 [B], how many positions were masked at the start; masked: how many still are; unmaskable: how
            many of them in the active block; first_mask: the position of the first one in a block that is not over.
            whole: bool [B], no block was left with masks.
    """

    def __init__(self, dllm: DLLM, lanes: int, length: int, blocks: Blocks, *, certainty: bool, forced: bool):
        self.dllm, self.B, self.L, self.blocks = dllm, lanes, length, blocks
        device = dllm.device
        self.tokens = torch.full((lanes, length), dllm.eos_id, device=device)  # no mask: every lane starts empty
        self.starts = [Start.of([], [dllm.eos_id] * length, dllm.mask_id)] * lanes
        self.example = np.full(lanes, EMPTY)
        self.completion = np.full((lanes, length), dllm.eos_id)
        self.revisits = False
        self.running, self.stale = np.zeros((2, lanes), bool)
        self.whole = np.ones(lanes, bool)
        self.blanks, self.masked, self.unmaskable, self.first_mask = np.zeros((4, lanes), np.int64)
        self.steps: Tensor = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.key = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.fresh = torch.zeros(lanes, length, dtype=torch.bool, device=device)
        self.certainty: Tensor | None = torch.zeros(lanes, length, device=device) if certainty else None
        self.truth: Tensor | None = torch.full((lanes, length), dllm.eos_id, device=device) if forced else None
        self.position = torch.arange(length, device=device)
        self.active = ActiveBlocks(lanes, length, blocks.most_steps, device)
        self.stop_ids = torch.tensor(sorted(dllm.stop_ids), device=device)

    @property
    def mask(self) -> Tensor:
        """bool [B, L], positions not yet committed."""
        return self.tokens[:, -self.L :] == self.dllm.mask_id

    @property
    def block_length(self) -> int:
        """BL"""
        return self.blocks.length

    @property
    def prompts(self) -> list[np.ndarray]:
        """Each lane's prompt int64 [.]."""
        return [start.prompt for start in self.starts]

    def put(self, lanes: np.ndarray, examples: np.ndarray, starts: Sequence[Start], keys: Sequence[int]) -> None:
        """Write the starts of episodes into lanes."""
        self.tokens = widened(self.tokens, max(len(start.prompt) for start in starts) + self.L, self.dllm.pad_id)
        rows = np.full((len(lanes), self.tokens.shape[1]), self.dllm.pad_id)  # (n, P + L)
        for row, lane, start in zip(rows, lanes, starts, strict=True):
            row[len(row) - self.L - len(start.prompt) :] = start.row
            self.starts[lane] = start
        where = upload(lanes, self.tokens.device)
        self.tokens[where] = upload(rows, self.tokens.device)
        self.key[where] = upload(np.array(keys, np.int64), self.tokens.device)
        self.steps[where] = 0
        self.fresh[where] = False
        if self.certainty is not None:
            self.certainty[where] = 0
        if self.truth is not None:
            self.truth[where] = upload(np.array([start.truth for start in starts]), self.tokens.device)
        self.example[lanes] = examples
        self.running[lanes] = self.stale[lanes] = examples != EMPTY
        self.whole[lanes] = True
        self.completion[lanes] = [start.completion for start in starts]
        masked = np.stack([start.blanks for start in starts])  # (n, L)
        first = masked.argmax(1)
        block = self.blocks.of(np.array([len(start.prompt) for start in starts]), self.L)  # (n, L)
        self.active.begin(where, upload(block, self.tokens.device))
        inside = block == np.take_along_axis(block, first[:, None], 1)
        self.blanks[lanes] = self.masked[lanes] = masked.sum(1)
        self.unmaskable[lanes] = (masked & inside).sum(1)
        self.first_mask[lanes] = first

    def tensors(self) -> list[Tensor]:
        """What is kept per lane on the device, [B, ...] each."""
        optional = [each for each in (self.certainty, self.truth) if each is not None]
        return [self.tokens, self.steps, self.key, self.fresh, *self.active.tensors(), *optional]

    def request(self, lanes: np.ndarray, lookahead: bool, committed: bool) -> Request:
        """What to ask of the dLLM about some lanes: all their masked positions, or the legal ones only; and those that
        are committed, or not."""
        index = upload(lanes, self.tokens.device)
        tokens = self.tokens[index]
        mask = tokens[:, -self.L :] == self.dllm.mask_id
        where, count = (mask, self.masked) if lookahead else (self.active.legal(mask, index), self.unmaskable)
        if committed:
            where, count = where | ~mask, count + self.L - self.masked
        told = self.whole | lookahead if self.revisits else (self.masked == self.blanks) & self.whole
        prompt = np.array([len(self.starts[lane].prompt) for lane in lanes])
        return Request(
            lanes=lanes,
            length=prompt + self.L,
            tokens=tokens,
            where=where,
            count=count[lanes],
            block=(self.blocks.before(prompt) + np.minimum(self.first_mask[lanes], self.L - 1)) // self.block_length,
            key=fold(self.key[index], self.steps[index]),
            truth=None if self.truth is None else self.truth[index],
            row=[self.starts[lane].with_completion(self.completion[lane]) if told[lane] else None for lane in lanes],
        )

    def move(self, action: Tensor, said: Predictions, stop_at_eos: bool) -> dict[str, np.ndarray]:
        """Commit what was proposed (or the truth) at the chosen legal positions of running lanes; count what is left.

        Returns:
            ``completion`` int64 [B, L], ``steps`` int64 [B], and int64 [B] that are 1 where so: ``changed``, a token
            was committed; ``left``, a block was left with masks; ``complete``, nothing is left to decode.
        """
        mask = self.mask
        active = self.active.block(mask)
        running = upload(self.running, mask.device)[:, None]
        legal = mask & (self.active.of == active[:, None])
        chosen = action.bool() & legal & running  # a lane that was truncated stays as it is
        committed = said.proposal if self.truth is None else self.truth
        completion = torch.where(chosen, committed, self.tokens[:, -self.L :])
        self.tokens[:, -self.L :] = completion
        self.steps += (mask & running).any(1)
        self.fresh = chosen
        if self.certainty is not None:
            self.certainty = torch.where(chosen, said.confidence[..., 0], self.certainty)
        masked = completion == self.dllm.mask_id
        left = self.active.step(active, masked, running[:, 0])
        unmaskable = self.active.legal(masked)
        first = torch.where(masked, self.position, self.L).amin(1)
        host = download(
            completion=completion,
            changed=chosen.any(1),
            masked=masked.sum(1),
            unmaskable=unmaskable.sum(1),
            first_mask=torch.where(unmaskable, self.position, self.L).amin(1),
            left=left,
            complete=completed(completion, first, self.stop_ids if stop_at_eos else None),
            steps=self.steps,
        )
        self.completion = host["completion"]
        self.masked, self.unmaskable, self.first_mask = host["masked"], host["unmaskable"], host["first_mask"]
        self.whole &= host["left"] == 0
        return host


def widened(tokens: Tensor, width: int, pad_id: int) -> Tensor:
    """Tokens [B, W] padded on the left where they are narrower than ``width``."""
    missing = width - tokens.shape[1]
    return torch.nn.functional.pad(tokens, (missing, 0), value=pad_id) if missing > 0 else tokens


def completed(completion: Tensor, first_mask: Tensor, stop_ids: Tensor | None) -> Tensor:
    """bool [B]: nothing of [B, L] is masked, or (with ``stop_ids``) nothing before a token that ends the text."""
    length = completion.shape[1]
    if stop_ids is None:
        return first_mask == length
    stops = torch.isin(completion, stop_ids)
    return first_mask > torch.where(stops, torch.arange(length, device=stops.device), length - 1).amin(1)
