"""The tensor core of the decision process: lanes, proposals, legality, transition, end of an episode.

One *lane* decodes one completion of L tokens. A step takes an unmask vector per lane, commits the dLLM's proposals at
the chosen legal positions, and asks the dLLM for new proposals where tokens changed. Every rule is applied per lane, so
a lane's tokens do not depend on its company. The faces (:mod:`dllm_gym.envs`) add an API and
no physics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym.checks import whole
from dllm_gym.models import DLLM, Sampling, load_dllm
from dllm_gym.models.batches import download, upload
from dllm_gym.noise import fold, uniform
from dllm_gym.process.config import EMPTY, EnvConfig
from dllm_gym.process.entries import ENTRIES, FLAGS, Entry, Moment
from dllm_gym.process.predictions import Predictions, Request, Work
from dllm_gym.process.rewards import AlphaRange, Reward, make_reward
from dllm_gym.render import END, Frame
from dllm_gym.tasks import make_task

if TYPE_CHECKING:
    from dllm_gym.models.cache import BlockCache

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What one step did to B lanes, on the host.

    Attributes:
        terminated, truncated: bool [B], the episode ended in this step.
        reward, score: float32 [B], 0 where no episode ended.
        nfe: int64 [B], steps of the episode so far.
        example: int64 [B], index of the example in its split.
        alpha: float64 [B], of the episode, where the environment has a range of alphas.
    """

    terminated: np.ndarray
    truncated: np.ndarray
    nfe: np.ndarray
    example: np.ndarray
    alpha: np.ndarray
    reward: np.ndarray = field(init=False)
    score: np.ndarray = field(init=False)

    def __post_init__(self):
        self.reward, self.score = np.zeros((2, len(self.nfe)), np.float32)

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A call in a thread of its own (a pool of threads would not survive a fork of the process)."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


MOST_LANES = 1 << 20  # a lane is a row of tensors: beyond this a typing error, not a batch
ALPHA = 1 << 40  # the place in an episode's random stream from which its alpha is drawn; no step comes there


class Unmasking:
    """B lanes of the unmasking process on a frozen dLLM.

    Args:
        num_lanes: B.
        config: the environment's settings.

    Raises:
        ValueError: a setting is wrong; the message names it, its value and what is valid.

    Attributes:
        tokens: int64 [B, P + L], left-padded prompts and completions; P grows with the longest prompt seen.
        steps: int64 [B], steps of the running episode (its NFE).
        examples: those of the split that are in use; ``dropped`` of them had too long a prompt.
        sizes: L, K, H and d, which the shapes of the observation's entries are made of.
    """

    def __init__(self, num_lanes: int, config: EnvConfig):
        self.B = whole("num_envs", num_lanes, most=MOST_LANES)
        self.alpha_range: AlphaRange | None = AlphaRange.of(config.alpha)
        alpha: Any = config.alpha if self.alpha_range is None else self.alpha_range.low
        self.reward_name, self.reward = config.reward, make_reward(config.reward, alpha)
        self.stop_at_eos, self.lookahead = config.stop_at_eos, config.lookahead
        self.task = make_task(config.task)
        self.L: int = config.gen_length or whole("gen_length", self.task.gen_length)
        self.block_length = config.block_length or self.L
        if self.L % self.block_length:
            raise ValueError(f"block_length={self.block_length} does not divide gen_length={self.L}")
        self.max_steps: int = config.max_episode_steps or self.L
        asked = {each.name: getattr(config, each.name) for each in fields(Sampling) if each.name in FLAGS}
        self.sampling = Sampling(config.top_k, config.temperature, **asked, log_prob=config.kl > 0)
        self.dllm: DLLM = load_dllm(config.model, config.device, config.dtype)
        if config.top_k > self.dllm.vocab_size:
            raise ValueError(f"top_k={config.top_k} exceeds the vocabulary of {self.dllm.vocab_size} tokens")
        self.examples = self._within(self.task.examples(config.split).to_list(), config.max_prompt_length)
        self._check_prompt(max(self.examples, key=lambda example: len(str(self.task.prompt(example)))))
        self._allocate(config)

    def _within(self, examples: list[Any], most: int | None) -> list[Any]:
        """The examples whose prompt has at most ``most`` tokens."""
        self.dropped = 0
        if most is None:
            return examples
        kept = [example for example in examples if len(self.dllm.encode(self.task.prompt(example))) <= most]
        self.dropped = len(examples) - len(kept)
        if not kept:
            raise ValueError(f"max_prompt_length={most}: every prompt of task {self.task.name!r} has more tokens")
        if self.dropped:
            log.warning("max_prompt_length=%d drops %d of %d examples", most, self.dropped, len(examples))
        return kept

    def _allocate(self, config: EnvConfig) -> None:
        B, L, device = self.B, self.L, self.dllm.device
        self.tokens = torch.full((B, L), self.dllm.eos_id, device=device)  # no mask: every lane starts empty
        self.prompts: list[np.ndarray] = [np.zeros(0, np.int64)] * B
        self.example = np.full(B, EMPTY)
        self.running = np.zeros(B, bool)
        self.stale = np.zeros(B, bool)  # lanes whose tokens changed since they were predicted
        self.masked = np.zeros(B, np.int64)  # how many masks a lane has,
        self.unmaskable = np.zeros(B, np.int64)  # how many of them in its active block,
        self.first_mask = np.zeros(B, np.int64)  # and where the first one is
        self.steps: Tensor = torch.zeros(B, dtype=torch.int64, device=device)
        self.key = torch.zeros(B, dtype=torch.int64, device=device)
        self.alpha = np.zeros(B)  # each episode's own, where there is a range of them
        self.preference: Tensor = torch.zeros(B, device=device)
        self.fresh = torch.zeros(B, L, dtype=torch.bool, device=device)  # committed by the last step
        # The largest probability where an action committed a proposal, when it did; 0 elsewhere.
        self.certainty: Tensor | None = torch.zeros(B, L, device=device) if config.committed else None
        self.position = torch.arange(L, device=device)
        self.block = self.position // self.block_length
        self.stop_ids = torch.tensor(sorted(self.dllm.stop_ids), device=device)
        self.predictions = Predictions(
            self.dllm, B, L, sampling=self.sampling, cache=self._make_cache(config.cache), history=config.kl
        )
        self.sizes = {"L": L, "K": self.sampling.top_k, "H": config.kl, "d": self.dllm.hidden_size}
        now = Moment(self, self.mask, self.mask)
        self._asked_for = {entry.name for entry in ENTRIES if entry.value(now) is not None}
        self.completions: list[str | None] = [None] * B
        self.outcome: Outcome | None = None
        self._graded: tuple[Outcome, Future[list[float]] | None] | None = None  # a step, and the grades it waits for
        self._encoded: dict[int, np.ndarray] = {}  # prompts by example

    def _make_cache(self, kind: str) -> BlockCache | None:
        if kind == "none":
            return None
        from dllm_gym.models.cache import BlockCache

        if self.dllm.compiled:
            raise ValueError(f"cache={kind!r}: the windows of a cache are not compiled, load the dLLM without compile")
        return BlockCache(self.dllm, kind, self.B, self.L, self.block_length)

    # ---- state ----

    @property
    def mask(self) -> Tensor:
        """bool [B, L], positions not yet committed."""
        return self.tokens[:, -self.L :] == self.dllm.mask_id

    def legal(self, mask: Tensor) -> Tensor:
        """bool [B, L], masked positions of each lane's active block, the first block that still has masks."""
        active = torch.where(mask, self.block, self.L).amin(1, keepdim=True)  # (B, 1)
        return mask & (self.block == active)

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
        predictions, cache = self.predictions, self.predictions.cache
        tensors = [self.tokens, self.steps, self.key, self.fresh, *predictions.tensors()]
        if predictions.drift is not None:
            tensors += [predictions.drift.kl, predictions.drift.log_prob]
        if self.certainty is not None:
            tensors.append(self.certainty)
        return sum(tensor.nbytes for tensor in tensors) // self.B + (cache.bytes_per_lane if cache is not None else 0)

    @property
    def entries(self) -> list[Entry]:
        """The entries of the observation (not kept: how they are computed cannot be pickled)."""
        return [entry for entry in ENTRIES if entry.name in self._asked_for]

    def observe(self) -> dict[str, Tensor]:
        """The observation of every lane, in fresh tensors (see the environment's docstring)."""
        mask = self.mask
        now = Moment(self, mask, self.legal(mask))
        return {entry.name: entry.show(now) for entry in self.entries}

    # ---- prompts in ----

    def begin(
        self,
        lanes: Iterable[int],
        examples: Iterable[int],
        keys: Iterable[int],
        alphas: Iterable[float | None] | None = None,
    ) -> None:
        """Start episodes: write prompts and L masks into lanes.

        Args:
            lanes: which lanes.
            examples: index of each one's example; EMPTY leaves the lane without an episode.
            keys: each one's random stream (for proposals at a temperature, and an alpha from the range).
            alphas: each one's speed weight, where there is a range of them; None (for one or for all) draws it.
        """
        chosen, index = np.asarray(list(lanes), np.int64), np.asarray(list(examples), np.int64)
        prompts = [self._prompt(i) for i in index]
        self._widen(max(map(len, prompts)))
        rows = np.full((len(chosen), self.tokens.shape[1]), self.dllm.pad_id)  # (n, P + L)
        rows[:, -self.L :] = np.where(index == EMPTY, self.dllm.eos_id, self.dllm.mask_id)[:, None]
        for row, lane, prompt in zip(rows, chosen, prompts, strict=True):
            row[len(row) - self.L - len(prompt) : -self.L] = prompt
            self.prompts[lane] = prompt
        where = upload(chosen, self.tokens.device)
        self.tokens[where] = upload(rows, self.tokens.device)
        key = torch.tensor(list(keys))
        self.key[where] = upload(key.numpy(), self.tokens.device)
        if self.alpha_range is not None:
            drawn = self.alpha_range.at(uniform(key, ALPHA, 1)[:, 0].double()).tolist()
            wanted = drawn if alphas is None else [d if a is None else a for a, d in zip(alphas, drawn, strict=True)]
            self.alpha[chosen] = wanted
            preference = self.alpha_range.preference(torch.tensor(wanted, dtype=torch.float64)).float()
            self.preference[where] = upload(preference.numpy(), self.tokens.device)
        self.example[chosen] = index
        self.steps[where] = 0
        self.fresh[where] = False
        if self.certainty is not None:
            self.certainty[where] = 0
        self.predictions.forget(chosen)
        started = index != EMPTY
        self.running[chosen] = self.stale[chosen] = started
        self.masked[chosen] = np.where(started, self.L, 0)
        self.unmaskable[chosen] = np.where(started, self.block_length, 0)
        self.first_mask[chosen] = 0

    def _prompt(self, index: int) -> np.ndarray:
        """The prompt's tokens int64 [P] of an example; none for an empty lane."""
        if index not in self._encoded:
            tokens = [] if index == EMPTY else self._check_prompt(self.examples[index])
            self._encoded[index] = np.array(tokens, np.int64)
        return self._encoded[index]

    def _check_prompt(self, example) -> list[int]:
        """The prompt's tokens, if prompt and completion fit the model's positions."""
        prompt = self.dllm.encode(self.task.prompt(example))
        if len(prompt) + self.L > self.dllm.max_positions:
            raise ValueError(
                f"a prompt of task {self.task.name!r} has {len(prompt)} tokens: with gen_length={self.L} it exceeds "
                f"the model's {self.dllm.max_positions} positions"
            )
        return prompt

    def _widen(self, prompt_length: int) -> None:
        """Make room for a prompt longer than any before."""
        missing = prompt_length + self.L - self.tokens.shape[1]
        if missing > 0:
            self.tokens = torch.nn.functional.pad(self.tokens, (missing, 0), value=self.dllm.pad_id)

    # ---- the dLLM ----

    def predict(self) -> None:
        """Renew proposals and confidences of the lanes whose tokens changed.

        A lane whose tokens did not change keeps its last prediction, which is exact.
        """
        lanes = np.flatnonzero(self.stale)
        if not len(lanes):
            return
        index = upload(lanes, self.tokens.device)
        tokens = self.tokens[index]
        mask = tokens[:, -self.L :] == self.dllm.mask_id
        request = Request(
            lanes=lanes,
            length=np.array([len(self.prompts[lane]) for lane in lanes]) + self.L,
            tokens=tokens,
            where=mask if self.lookahead else self.legal(mask),
            count=(self.masked if self.lookahead else self.unmaskable)[lanes],
            block=self.first_mask[lanes] // self.block_length,
            key=fold(self.key[index], self.steps[index]),
            prompt=[self.prompts[lane].tobytes() if self.masked[lane] == self.L else None for lane in lanes],
        )
        self.predictions.renew(request)
        self.stale[:] = False

    # ---- a step ----

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
        mask = self.mask
        running = upload(self.running, mask.device)[:, None]
        chosen = action.bool() & self.legal(mask) & running  # a lane that was truncated stays as it is
        completion = torch.where(chosen, self.predictions.proposal, self.tokens[:, -self.L :])
        self.tokens[:, -self.L :] = completion
        self.steps += (mask & running).any(1)
        self.fresh = chosen
        if self.certainty is not None:
            self.certainty = torch.where(chosen, self.predictions.confidence[..., 0], self.certainty)
        left = completion == self.dllm.mask_id
        first = torch.where(left, self.position, self.L).amin(1)
        host = download(
            completion=completion,
            changed=chosen.any(1),
            masked=left.sum(1),
            unmaskable=self.legal(left).sum(1),
            first_mask=first,
            complete=self._complete(completion, first),
            steps=self.steps,
        )
        self.masked, self.unmaskable, self.first_mask = host["masked"], host["unmaskable"], host["first_mask"]
        changed, complete, steps = host["changed"] > 0, host["complete"] > 0, host["steps"]
        terminated = self.running & complete
        truncated = self.running & ~terminated & (steps >= self.max_steps)
        self.stale |= changed & ~complete
        if self.predictions.drift is not None:
            unmoved = np.flatnonzero(self.running & ~terminated & ~changed)
            self.predictions.drift.stay(upload(unmoved, mask.device))
        outcome = Outcome(terminated, truncated, steps, self.example.copy(), self.alpha.copy())
        self._graded = outcome, self._hand_in(np.flatnonzero(outcome.done), host["completion"])
        return outcome.done

    def _complete(self, completion: Tensor, first_mask: Tensor) -> Tensor:
        """bool [B]: nothing is masked, or (``stop_at_eos``) nothing before a token that ends the text."""
        if not self.stop_at_eos:
            return first_mask == self.L
        stops = torch.isin(completion, self.stop_ids)
        return first_mask > torch.where(stops, self.position, self.L - 1).amin(1)

    def _hand_in(self, done: np.ndarray, completions: np.ndarray) -> Future[list[float]] | None:
        """Decode the answers of these lanes and let a thread grade them while the dLLM goes on."""
        if not len(done):
            return None
        texts = [self.dllm.decode(completion) for completion in completions[done].tolist()]
        for lane, text in zip(done, texts, strict=True):
            self.completions[lane] = text
        self.running[done] = False
        return in_background(self.task.grade_all, [self.examples[example] for example in self.example[done]], texts)

    def settle(self) -> Outcome:
        """What the last :meth:`commit` did, rewards included; waits for the graders."""
        assert self._graded is not None, "settle() follows commit()"
        (outcome, grades), self._graded = self._graded, None
        if grades is not None:
            done = np.flatnonzero(outcome.done)
            outcome.score[done] = grades.result()
            scores, steps = torch.from_numpy(outcome.score[done]), torch.from_numpy(outcome.nfe[done])
            outcome.reward[done] = self._reward(outcome.alpha[done])(scores, steps, self.L).numpy()
        self.outcome = outcome
        return outcome

    def _reward(self, alpha: np.ndarray) -> Reward:
        """The reward of episodes with these alphas [n]."""
        return self.reward if self.alpha_range is None else make_reward(self.reward_name, torch.from_numpy(alpha))

    # ---- for people ----

    def frame(self, lane: int) -> Frame:
        """What a picture of one lane needs."""
        index = int(self.example[lane])
        mask = self.mask[lane]
        tokens = torch.where(mask, self.predictions.proposal[lane], self.tokens[lane, -self.L :]).tolist()
        over = self.outcome if self.outcome and self.outcome.done[lane] and not self.running[lane] else None
        return Frame(
            prompt="" if index == EMPTY else str(self.task.prompt(self.examples[index])),
            tokens=[END if t in self.dllm.stop_ids else self.dllm.token_text(t) for t in tokens],
            masked=mask.cpu().numpy(),
            confidence=torch.where(mask, self.predictions.confidence[lane, :, 0], 1.0).cpu().numpy(),
            fresh=self.fresh[lane].cpu().numpy(),
            legal=self.legal(self.mask)[lane].cpu().numpy(),
            step=int(self.steps[lane]),
            score=float(over.score[lane]) if over else None,
            reward=float(over.reward[lane]) if over else None,
        )
