"""The tensor core of the decision process: lanes, proposals, legality, transition, end of an episode.

One *lane* decodes one completion of L tokens. A step takes an unmask vector per lane, commits the dLLM's proposals at
the chosen legal positions, and asks the dLLM for new proposals where tokens changed. Every rule is applied per lane, so
a lane's tokens do not depend on its company. The faces (:mod:`dllm_gym.envs`) add an API and
no physics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dllm_gym.checks import whole
from dllm_gym.models import DLLM, Sampling, load_dllm
from dllm_gym.models.batches import upload
from dllm_gym.models.views import View
from dllm_gym.process.blocks import Blocks
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.entries import ENTRIES, FLAGS, Entry, Moment
from dllm_gym.process.frames import frame_of
from dllm_gym.process.grading import Grading, Outcome
from dllm_gym.process.predictions import Predictions, Work
from dllm_gym.process.rewards import AlphaRange, Pay
from dllm_gym.process.starts import Starts
from dllm_gym.process.state import State
from dllm_gym.render import Frame
from dllm_gym.tasks import make_task

if TYPE_CHECKING:
    from dllm_gym.models.cache import BlockCache

MOST_LANES = 1 << 20  # a lane is a row of tensors: beyond this a typing error, not a batch


def make_cache(kind: str, lanes: State) -> BlockCache | None:
    """The cache of that kind for these lanes."""
    if kind == "none":
        return None
    from dllm_gym.models.cache import BlockCache

    if lanes.dllm.compiled:
        raise ValueError(f"cache={kind!r}: the windows of a cache are not compiled, load the dLLM without compile")
    return BlockCache(lanes.dllm, kind, lanes.B, lanes.L, lanes.blocks.length, from_prompt=lanes.blocks.from_prompt)


def blocks_of(config: EnvConfig, dllm: DLLM, length: int) -> Blocks:
    """The blocks of completions of L tokens; ValueError for such as do not fit."""
    most = config.steps_per_block
    if config.block_length is None:
        return Blocks(length, most_steps=most)
    own = "completion" if getattr(dllm, "view", View()).block is None else "prompt"
    if (config.block_origin or own) == "prompt":
        return Blocks(config.block_length, from_prompt=True, most_steps=most)
    if length % config.block_length:
        raise ValueError(f"block_length={config.block_length} does not divide gen_length={length}")
    return Blocks(config.block_length, most_steps=most)


class Unmasking(State):
    """B lanes of the unmasking process on a frozen dLLM.

    Args:
        num_lanes: B.
        config: the environment's settings.

    Raises:
        ValueError: a setting is wrong; the message names it, its value and what is valid.

    Attributes:
        examples: those of the split that are in use; ``dropped`` of them had too long a prompt.
        completions: the text of every lane's last finished episode. outcome: of the last step that was settled.
        config: as given. sizes: L, K, H and d, which the shapes of the observation's entries are made of.
    """

    def __init__(self, num_lanes: int, config: EnvConfig):
        B = whole("num_envs", num_lanes, most=MOST_LANES)
        self.config = config
        self.pay = Pay(config.reward, config.alpha)
        self.alpha_range: AlphaRange | None = self.pay.range
        self.stop_at_eos, self.lookahead, forced = config.stop_at_eos, config.lookahead, config.teacher_forcing
        self.task = make_task(config.task)
        L = config.gen_length or whole("gen_length", self.task.gen_length)
        self.max_steps: int = config.max_episode_steps or L
        asked = {each.name: getattr(config, each.name) for each in fields(Sampling) if each.name in FLAGS}
        self.shows_tokens = config.tokens
        self.sampling = Sampling(config.top_k, config.temperature, **asked, log_prob=config.kl > 0, truth=forced)
        dllm = load_dllm(config.model or self.task.dllm, config.device, config.dtype)
        blocks = blocks_of(config, dllm, L)
        if config.top_k > dllm.vocab_size:
            raise ValueError(f"top_k={config.top_k} exceeds the vocabulary of {dllm.vocab_size} tokens")
        self.source = Starts(self.task, dllm, L, config)
        self.examples, self.dropped = self.source.examples, self.source.dropped
        super().__init__(dllm, B, L, blocks, certainty=config.committed, forced=forced)
        self.committed_confidence = config.committed_confidence
        self.alpha = np.zeros(B)  # each episode's own, where there is a range of them
        self.preference: Tensor = torch.zeros(B, device=dllm.device)
        cache = make_cache(config.cache, self)
        self.predictions = Predictions(
            dllm, B, L, sampling=self.sampling, cache=cache, history=config.kl, block_input=config.block_input
        )
        self.sizes = {"L": L, "K": self.sampling.top_k, "H": config.kl, "d": dllm.hidden_size}
        now = Moment(self, self.mask, self.mask)
        self._asked_for = {entry.name for entry in ENTRIES if entry.value(now) is not None}
        self.completions: list[str | None] = [None] * B
        self.grading = Grading(self.task)
        self.outcome: Outcome | None = None

    @property
    def work(self) -> Work:
        """What the dLLM computed since construction."""
        return self.predictions.work

    @property
    def row_forwards(self) -> int:
        """Rows that the dLLM computed since construction."""
        return self.work.rows

    @property
    def bytes_per_lane(self) -> int:
        """What a lane's state takes on the device: tokens, predictions, what is kept for the next step."""
        return sum(tensor.nbytes for tensor in self.tensors()) // self.B + self.predictions.bytes_per_lane

    @property
    def entries(self) -> list[Entry]:
        """The entries of the observation (not kept: how they are computed cannot be pickled)."""
        return [entry for entry in ENTRIES if entry.name in self._asked_for]

    def observe(self) -> dict[str, Tensor]:
        """The observation of every lane, in fresh tensors (see the environment's docstring)."""
        mask = self.mask
        now = Moment(self, mask, self.active.legal(mask))
        return {entry.name: entry.show(now) for entry in self.entries}

    def begin(
        self,
        lanes: Iterable[int],
        examples: Iterable[int],
        keys: Iterable[int],
        alphas: Iterable[float | None] | None = None,
    ) -> None:
        """Start episodes: write prompts and completions, masked at their blanks, into lanes.

        Args:
            lanes: which lanes.
            examples: index of each one's example; EMPTY leaves the lane without an episode.
            keys: each one's random stream (for proposals at a temperature, and an alpha from the range).
            alphas: each one's speed weight, where there is a range of them; None (for one or for all) draws it.
        """
        chosen, index, keys = np.asarray(list(lanes), np.int64), np.asarray(list(examples), np.int64), list(keys)
        self.put(chosen, index, [self.source[i] for i in index.tolist()], keys)
        if self.alpha_range is not None:
            alpha = self.alpha_range.alphas(keys, None if alphas is None else list(alphas))
            self.alpha[chosen] = alpha.numpy()
            preference = upload(self.alpha_range.preference(alpha).float().numpy(), self.tokens.device)
            self.preference[upload(chosen, self.tokens.device)] = preference
        self.predictions.forget(chosen)

    def predict(self) -> None:
        """Renew proposals and confidences of the lanes whose tokens changed.

        A lane whose tokens did not change keeps its last prediction, which is exact.
        """
        lanes = np.flatnonzero(self.stale)
        if len(lanes):
            self.predictions.renew(self.request(lanes, self.lookahead, self.committed_confidence))
            self.stale[:] = False

    def commit(self, action: Tensor) -> np.ndarray:
        """Commit the proposals at chosen legal positions; answers that are complete go to the graders.

        Args:
            action: bool or integer [B, L]; non-zero unmasks, illegal bits are ignored. A lane that unmasks nothing has
                spent a step; a lane without a running episode does nothing.

        Returns:
            bool [B], the lanes whose episode ended; :meth:`settle` has their rewards.
        """
        if (self.stale & self.running).any():
            self.predict()  # the prediction was broken off
        host = self.move(action, self.predictions, self.stop_at_eos)
        changed, complete = host["changed"] > 0, host["complete"] > 0
        terminated = self.running & complete
        truncated = self.running & ~terminated & ((host["steps"] >= self.max_steps) | (self.unmaskable == 0))
        if not self.lookahead or self.predictions.cache is not None:
            changed |= host["left"] > 0  # of the next block nothing has been predicted, or not by what stands now
        self.stale |= changed & ~complete
        self.predictions.stay(np.flatnonzero(self.running & ~terminated & ~changed))
        outcome = Outcome(terminated, truncated, host["steps"], self.example.copy(), self.alpha.copy())
        done = np.flatnonzero(outcome.done)
        texts = [self.dllm.decode(completion) for completion in host["completion"][done].tolist()]
        for lane, text in zip(done, texts, strict=True):
            self.completions[lane] = text
        self.running[done] = False
        self.grading.hand_in(outcome, [self.examples[example] for example in self.example[done]], texts)
        return outcome.done

    def settle(self) -> Outcome:
        """What the last :meth:`commit` did, rewards included; waits for the graders."""
        self.outcome = outcome = self.grading.settle()
        done = outcome.done
        if done.any():
            length = self.source.lengths(outcome.example[done])
            outcome.reward[done] = self.pay.of(outcome.alpha[done], outcome.score[done], outcome.nfe[done], length)
        return outcome

    def frame(self, lane: int) -> Frame:
        """What a picture of one lane needs."""
        return frame_of(self, lane)
