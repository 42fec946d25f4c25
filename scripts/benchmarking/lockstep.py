"""The plain loop: decoding in batches with none of the environment's savings, as the yardstick.

Written from the description of how LUP (arXiv 2512.09106) decodes. The rows of a batch step through the blocks
together: one that has finished its block waits for the slowest. Every step computes all rows in full, left-padded to
the longest prompt, applies the head to every position, those of the prompt too, and takes a softmax and the top K over
the whole vocabulary. Nothing is kept from one step to the next.

What a row decides is the environment's: its own steps and random draws, the same observation. In float32 on a CPU its
tokens and NFE are those of :func:`agents.rollout.evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.rollout import Decider
from dllm_gym.models import DLLM
from dllm_gym.noise import fold, uniform
from dllm_gym.process.unmasking import Unmasking


@dataclass
class Decoded:
    """How E rows ended.

    Attributes:
        tokens: int64 [E, L]. completions: E texts. score: float32 [E]. nfe: int64 [E], steps with something to unmask.
        row_forwards: rows that were computed. waiting: share of them with nothing to unmask.
        padding: share of the tokens in them that is padding.
        empty_steps: share of the steps with something to unmask that unmasked nothing.
    """

    tokens: Tensor
    completions: list[str]
    score: Tensor
    nfe: Tensor
    row_forwards: int
    waiting: float
    padding: float
    empty_steps: float


def lockstep(
    core: Unmasking, decider: Decider, examples: Sequence[int], seed: int = 0, episodes: Sequence[int] | None = None
) -> Decoded:
    """Decode ``examples`` in batches of as many rows as ``core`` has lanes, and grade them.

    Args:
        core: whose model, task and settings to use; its lanes are left alone.
        decider: reads no more of an observation than confidences, masks and the time.
        examples: indices of the split's examples, one per episode. seed: of all draws.
        episodes: places in ``examples`` of those that are decoded, in this order; None: all.

    Raises:
        ValueError: the settings ask for tokens drawn at a temperature.
    """
    if core.sampling.temperature > 0:
        raise ValueError(f"temperature={core.sampling.temperature}: the plain loop takes the most likely tokens only")
    chosen = range(len(examples)) if episodes is None else episodes
    batches = []
    for start in range(0, len(chosen), core.B):
        rows = torch.as_tensor(chosen[start : start + core.B], device=core.dllm.device)
        streams = fold(torch.full_like(rows, seed), rows)
        batches.append(Batch(core, [examples[i] for i in rows.tolist()], streams))
        batches[-1].decode(decider)
    tokens, nfe = torch.cat([batch.completion for batch in batches]), torch.cat([batch.steps for batch in batches])
    texts = [core.dllm.decode(completion) for completion in tokens.tolist()]
    score = core.task.grade_all([core.examples[examples[i]] for i in chosen], texts)
    steps, rows = int(nfe.sum()), sum(batch.forwards * len(batch.tokens) for batch in batches)
    computed = sum(batch.forwards * batch.tokens.numel() for batch in batches)
    return Decoded(
        tokens,
        texts,
        torch.tensor(score, device=nfe.device),
        nfe,
        row_forwards=rows,
        waiting=1 - steps / rows,
        padding=sum(batch.forwards * batch.padding for batch in batches) / computed,
        empty_steps=sum(int(batch.empty) for batch in batches) / steps,
    )


class Batch:
    """B rows that move through the blocks together.

    Args:
        core: as for :func:`lockstep`. examples: index of each row's example. streams: int64 [B], each row's draws.

    Attributes:
        tokens: int64 [B, P + L]; completion: their last L. steps: int64 [B], each row's NFE so far.
        padding: how many of the tokens are padding.
        forwards: of the batch, so far. empty: steps of rows so far that unmasked nothing.
    """

    def __init__(self, core: Unmasking, examples: Sequence[int], streams: Tensor):
        self.core, self.dllm, self.streams = core, core.dllm, streams
        starts = [core.source[i] for i in examples]
        self.tokens, self.attention_mask = left_padded(self.dllm, [start.prompt.tolist() for start in starts], core.L)
        self.tokens[:, -core.L :] = torch.tensor(np.stack([start.completion for start in starts]))
        self.completion = self.tokens[:, -core.L :]  # (B, L), a view
        prompts = np.array([len(start.prompt) for start in starts])
        self.block = torch.as_tensor(core.blocks.of(prompts, core.L), device=self.tokens.device)
        self.steps = torch.zeros_like(streams)
        self.padding = 0 if self.attention_mask is None else int((~self.attention_mask).sum())
        self.forwards, self.empty = 0, torch.zeros((), dtype=torch.int64, device=streams.device)

    def decode(self, decider: Decider) -> None:
        for block in range(int(self.block.max()) + 1):
            while (legal := self.legal(block)).any():  # until the slowest row is done
                self.step(decider, legal)

    def legal(self, block: int) -> Tensor:
        """bool [B, L]: what may be unmasked while the batch is in this block."""
        mask = self.completion == self.dllm.mask_id
        return mask & (self.block == block) & (self.steps < self.core.max_steps)[:, None]

    def step(self, decider: Decider, legal: Tensor) -> None:
        proposal, confidence = predict_everything(self.dllm, self.tokens, self.attention_mask, self.core.sampling.top_k)
        self.forwards += 1
        observation = self.observe(confidence[:, -self.core.L :], legal)
        action = decider(observation, uniform(self.streams, self.steps, self.core.L))
        chosen = action.bool() & legal
        self.completion.copy_(torch.where(chosen, proposal[:, -self.core.L :], self.completion))
        moving = legal.any(1)  # a waiting row's clock stands still
        self.empty += (moving & ~chosen.any(1)).sum()
        self.steps += moving

    def observe(self, confidence: Tensor, legal: Tensor) -> dict[str, Tensor]:
        """What the decider sees, given confidences [B, L, K] at every position."""
        mask = self.completion == self.dllm.mask_id
        if not self.core.lookahead:
            confidence = confidence * legal[..., None]
        committed = torch.eye(1, confidence.shape[-1], device=mask.device)  # 1, then 0s
        return {
            "confidence": torch.where(mask[..., None], confidence, committed),
            "mask": mask.to(torch.int8),
            "action_mask": legal.to(torch.int8),
            "time": (self.steps / self.core.L)[:, None],
        }


def left_padded(dllm: DLLM, prompts: Sequence[list[int]], masks: int) -> tuple[Tensor, Tensor | None]:
    """Prompts followed by ``masks`` masks: tokens int64 [B, P + L], and the attention mask (None without padding)."""
    longest = max(map(len, prompts))
    rows = [[dllm.pad_id] * (longest - len(prompt)) + prompt + [dllm.mask_id] * masks for prompt in prompts]
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=dllm.device)
    tokens = torch.tensor(rows, device=dllm.device)
    if not padding.any():
        return tokens, None
    return tokens, torch.arange(tokens.shape[1], device=dllm.device) >= padding[:, None]


@torch.no_grad()
def predict_everything(dllm: DLLM, tokens: Tensor, attention_mask: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Most likely token int64 [B, T] and the K largest probabilities float32 [B, T, K] of every position."""
    logits = dllm.lm_head(dllm.encode_rows(tokens, attention_mask)).float()  # (B, T, V)
    logits[..., list(dllm.forbidden_ids)] = -torch.inf
    return logits.argmax(-1), logits.softmax(-1).topk(top_k).values
