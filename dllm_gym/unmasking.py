"""The tensor core of the decision process: lanes, proposals, legality, transition, end of an episode.

One *lane* decodes one completion of L tokens. A step takes an unmask vector per lane, commits the dLLM's proposals at
the chosen legal positions, and asks the dLLM for new proposals where tokens changed. Every rule is applied per lane, so
a lane's tokens do not depend on its company. The faces (:mod:`~dllm_gym.env`, :mod:`~dllm_gym.vector_env`,
:mod:`~dllm_gym.torchrl_env`) add an API and no physics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym.dealer import EMPTY
from dllm_gym.models import DLLM, Prediction, Sampling, load_dllm
from dllm_gym.models.base import kl_divergence, parts
from dllm_gym.noise import fold
from dllm_gym.render import END, Frame
from dllm_gym.rewards import Reward, make_reward
from dllm_gym.tasks import Task, make_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnvConfig:
    """The settings that all three faces share.

    Attributes:
        model: ``"tiny"``, a checkpoint folder, a hub id or a :class:`~dllm_gym.models.DLLM`.
        task: name of a task or a :class:`~dllm_gym.tasks.Task`.
        split: the task's split that prompts come from.
        gen_length: L, tokens of a completion; the task's own length by default.
        max_prompt_length: leave out examples whose prompt, template included, has more tokens; None keeps all.
        block_length: BL, must divide L; only the first block with masks may be unmasked. L (full diffusion) by default.
        top_k: K, how many of the largest probabilities are observed per position.
        temperature: of the proposed tokens; 0 is greedy.
        reward: ``"multiplicative"``, ``"additive"`` or a callable (score, steps, L) -> reward.
        alpha: weight of speed in the reward, >= 0.
        max_episode_steps: truncate after this many steps; L by default.
        hidden: observe the dLLM's last hidden states, too (those of the last prediction).
        entropy: observe the entropy of the dLLM's distributions, too.
        margin: observe how far the best token leads the second best, too.
        kl: H, how many of the last steps to observe by how much they moved the dLLM's distributions; 0 is none. It
            keeps a distribution per position: num_envs * L * V * 4 bytes on the device (V: the vocabulary).
        device, dtype: of the dLLM (CPU and float32 by default); observations live on the same device, confidences are
            float32.
    """

    model: str | DLLM = "tiny"
    task: str | Task = "sudoku"
    split: str = "train"
    gen_length: int | None = None
    max_prompt_length: int | None = None
    block_length: int | None = None
    top_k: int = 1
    temperature: float = 0.0
    reward: str | Reward = "multiplicative"
    alpha: float = 1.0
    max_episode_steps: int | None = None
    hidden: bool = False
    entropy: bool = False
    margin: bool = False
    kl: int = 0
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> EnvConfig:
        """The configuration with these settings; TypeError for a name that is none."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise TypeError(f"{name!r} is no argument of DLLMUnmask-v0: choose from {', '.join(known)}")
        return cls(**settings)


@dataclass
class Outcome:
    """What one step did to B lanes, on the host.

    Attributes:
        terminated, truncated: bool [B], the episode ended in this step.
        reward, score: float32 [B], 0 where no episode ended.
        nfe: int64 [B], steps of the episode so far.
        example: int64 [B], index of the example in its split.
    """

    terminated: np.ndarray
    truncated: np.ndarray
    reward: np.ndarray
    score: np.ndarray
    nfe: np.ndarray
    example: np.ndarray

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


def default(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def positive(name: str, value: int, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``; a ValueError that names the setting otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r}: need a whole number of at least {least}")
    return int(value)


def switch(name: str, value: bool) -> bool:
    """``value`` if it is a bool (or 0 or 1); a ValueError that names the setting otherwise."""
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise ValueError(f"{name}={value!r}: need True or False")
    return bool(value)


# What a committed position reads in the optional observation entries.
COMMITTED = {"entropy": 0.0, "margin": 1.0, "kl": 0.0}


class Drift:
    """By how much each of the last H steps of an episode moved the dLLM's distributions (KLASS, arXiv 2511.05664).

    Args:
        lanes: B. length: L. vocabulary: V. history: H. device: where everything lives.

    Attributes:
        kl: float32 [B, L, H], KL(p_t || p_{t-1}) in nats, newest first; +inf where there was no prediction before.
        log_prob: float32 [B * L, V], the last distribution of every position, -inf before an episode's first.
    """

    def __init__(self, lanes: int, length: int, vocabulary: int, history: int, device: torch.device):
        self.length = length
        self.kl = torch.full((lanes, length, history), torch.inf, device=device)
        self.log_prob = torch.full((lanes * length, vocabulary), -torch.inf, device=device)

    def forget(self, lanes: Tensor) -> None:
        """New episodes begin: the divergence of a first prediction from -inf is +inf."""
        self.kl[lanes] = torch.inf
        self.log_prob[self._rows(lanes)] = -torch.inf

    def stay(self, lanes: Tensor) -> None:
        """A step that left the distributions of these lanes as they were."""
        self._shift(lanes, torch.zeros_like(self.kl[lanes, :, 0]))

    def move(self, lanes: Tensor, where: Tensor, log_prob: Tensor) -> None:
        """New distributions [n, V] at the positions ``where`` (bool [b, L], n in all) of b lanes."""
        divergence = []
        for new, rows in parts(log_prob, self._rows(lanes)[where]):
            divergence.append(kl_divergence(new, self.log_prob[rows]))
            self.log_prob[rows] = new
        self._shift(lanes, torch.zeros_like(self.kl[lanes, :, 0]).masked_scatter(where, torch.cat(divergence)))

    def _rows(self, lanes: Tensor) -> Tensor:
        """Rows [b, L] of ``log_prob`` that belong to these lanes."""
        return lanes[:, None] * self.length + torch.arange(self.length, device=lanes.device)

    def _shift(self, lanes: Tensor, newest: Tensor) -> None:
        self.kl[lanes] = torch.cat([newest[..., None], self.kl[lanes][..., :-1]], dim=-1)


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
    """

    def __init__(self, num_lanes: int, config: EnvConfig):
        self.B = positive("num_envs", num_lanes)
        self.reward = make_reward(config.reward, config.alpha)
        self.task = make_task(config.task)
        self.L = positive("gen_length", default(config.gen_length, self.task.gen_length))
        self.block_length = positive("block_length", default(config.block_length, self.L))
        if self.L % self.block_length:
            raise ValueError(f"block_length={self.block_length} does not divide gen_length={self.L}")
        self.max_steps = positive("max_episode_steps", default(config.max_episode_steps, self.L))
        if not isinstance(config.temperature, int | float) or not 0 <= config.temperature < float("inf"):
            raise ValueError(f"temperature={config.temperature!r}: need a finite number >= 0")
        self.sampling = Sampling(
            positive("top_k", config.top_k),
            float(config.temperature),
            hidden=switch("hidden", config.hidden),
            entropy=switch("entropy", config.entropy),
            margin=switch("margin", config.margin),
            log_prob=positive("kl", config.kl, least=0) > 0,
        )
        self.dllm = load_dllm(config.model, config.device, config.dtype)
        if self.sampling.top_k > self.dllm.vocab_size:
            raise ValueError(f"top_k={config.top_k} exceeds the vocabulary of {self.dllm.vocab_size} tokens")
        self.examples = self._within(self.task.examples(config.split).to_list(), config.max_prompt_length)
        self._check_prompt(max(self.examples, key=lambda example: len(str(self.task.prompt(example)))))
        self._allocate(config.kl)

    def _within(self, examples: list[Any], most: int | None) -> list[Any]:
        """The examples whose prompt has at most ``most`` tokens."""
        self.dropped = 0
        if most is None:
            return examples
        positive("max_prompt_length", most)
        kept = [example for example in examples if len(self.dllm.encode(self.task.prompt(example))) <= most]
        self.dropped = len(examples) - len(kept)
        if not kept:
            raise ValueError(f"max_prompt_length={most}: every prompt of task {self.task.name!r} has more tokens")
        if self.dropped:
            log.warning("max_prompt_length=%d drops %d of %d examples", most, self.dropped, len(examples))
        return kept

    def _allocate(self, history: int) -> None:
        B, L, device = self.B, self.L, self.dllm.device
        self.tokens = torch.full((B, L), self.dllm.eos_id, device=device)  # no mask: every lane starts empty
        self.prompt_length = np.zeros(B, np.int64)
        self.example = np.full(B, EMPTY)
        self.running = np.zeros(B, bool)
        self.steps = torch.zeros(B, dtype=torch.int64, device=device)
        self.key = torch.zeros(B, dtype=torch.int64, device=device)
        self.proposal = torch.zeros(B, L, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(B, L, self.sampling.top_k, device=device)
        self.hidden = torch.zeros(B, L, self.dllm.hidden_size, device=device) if self.sampling.hidden else None
        measures = [name for name in ("entropy", "margin") if getattr(self.sampling, name)]
        self.measures = {name: torch.zeros(B, L, device=device) for name in measures}
        self.drift = Drift(B, L, self.dllm.vocab_size, history, device) if history else None
        self.fresh = torch.zeros(B, L, dtype=torch.bool, device=device)  # committed by the last step
        self.stale = np.zeros(B, bool)  # lanes whose tokens changed since they were predicted
        self.block = torch.arange(L, device=device) // self.block_length
        committed = torch.zeros(self.sampling.top_k, device=device)
        committed[0] = 1.0
        self.committed_confidence = committed  # what a committed position reads
        self.completions: list[str | None] = [None] * B
        self.outcome: Outcome | None = None
        self.row_forwards = 0  # rows the dLLM has computed since construction
        self.lane_steps = 0  # steps of lanes with an episode since construction

    # ---- state ----

    @property
    def mask(self) -> Tensor:
        """bool [B, L], positions not yet committed."""
        return self.tokens[:, -self.L :] == self.dllm.mask_id

    def legal(self, mask: Tensor) -> Tensor:
        """bool [B, L], masked positions of each lane's active block, the first block that still has masks."""
        active = torch.where(mask, self.block, self.L).amin(1, keepdim=True)  # (B, 1)
        return mask & (self.block == active)

    def observe(self) -> dict[str, Tensor]:
        """The observation of every lane, in fresh tensors (see the environment's docstring)."""
        mask = self.mask
        observation = {
            "confidence": torch.where(mask[..., None], self.confidence, self.committed_confidence),  # (B, L, K)
            "mask": mask.to(torch.int8),  # (B, L)
            "action_mask": self.legal(mask).to(torch.int8),  # (B, L)
            "time": (self.steps / self.L)[:, None],  # (B, 1)
        }
        for name, value in self.measures.items():
            observation[name] = torch.where(mask, value, COMMITTED[name])  # (B, L)
        if self.drift is not None:
            observation["kl"] = torch.where(mask[..., None], self.drift.kl, COMMITTED["kl"])  # (B, L, H)
        if self.hidden is not None:
            observation["hidden"] = self.hidden.clone()  # (B, L, d)
        return observation

    # ---- prompts in ----

    def place(self, lanes: Iterable[int], examples: Iterable[int], keys: Iterable[int]) -> None:
        """Start episodes: write prompts and L masks into lanes.

        Args:
            lanes: which lanes.
            examples: index of each one's example; EMPTY leaves the lane without an episode.
            keys: each one's random stream (for proposals at a temperature).
        """
        chosen, index = np.asarray(list(lanes), np.int64), np.asarray(list(examples), np.int64)
        prompts = [[] if i == EMPTY else self._check_prompt(self.examples[i]) for i in index]
        self._widen(max(map(len, prompts)))
        rows = torch.full((len(chosen), self.tokens.shape[1]), self.dllm.pad_id)  # (n, P + L)
        for row, i, prompt in zip(rows, index, prompts, strict=True):
            row[-self.L :] = self.dllm.eos_id if i == EMPTY else self.dllm.mask_id
            row[len(row) - self.L - len(prompt) : -self.L] = torch.tensor(prompt, dtype=torch.int64)
        where = torch.as_tensor(chosen, device=self.tokens.device)
        self.tokens[where] = rows.to(self.tokens.device)
        self.key[where] = torch.tensor(list(keys), dtype=torch.int64, device=self.tokens.device)
        self.prompt_length[chosen] = [len(prompt) for prompt in prompts]
        self.example[chosen] = index
        self.steps[where] = 0
        self.fresh[where] = False
        if self.drift is not None:
            self.drift.forget(where)
        self.running[chosen] = self.stale[chosen] = self.example[chosen] != EMPTY

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
        """Renew proposals and confidences of the lanes whose tokens changed: one forward of just those lanes.

        A lane whose tokens did not change keeps its last prediction, which is exact.
        """
        lanes = np.flatnonzero(self.stale)
        if not len(lanes):
            return
        index = torch.as_tensor(lanes, device=self.tokens.device)
        width = int(self.prompt_length[lanes].max()) + self.L
        tokens = self.tokens[index, -width:]  # (b, P + L)
        padding = width - self.L - self.prompt_length[lanes]  # (b,)
        attention_mask = None
        if padding.any():
            start = torch.as_tensor(padding, device=self.tokens.device)
            attention_mask = torch.arange(width, device=self.tokens.device) >= start[:, None]
        mask = tokens[:, -self.L :] == self.dllm.mask_id
        rows = torch.zeros_like(tokens, dtype=torch.bool)
        rows[:, -self.L :] = mask | self.sampling.hidden  # hidden states are wanted at every completion position
        step_key = self._step_key(index)
        prediction = self.dllm.predict(tokens, attention_mask, rows, self.sampling, step_key)
        self._note(index, rows[:, -self.L :], prediction)
        self.stale[:] = False
        self.row_forwards += len(lanes)

    def _note(self, index: Tensor, where: Tensor, prediction: Prediction) -> None:
        """Take over what was predicted at the positions ``where`` (bool [b, L]) of the lanes ``index``."""
        self.proposal[index] = self.proposal[index].masked_scatter(where, prediction.token)
        self.confidence[index] = self.confidence[index].masked_scatter(where[..., None], prediction.confidence)
        for name, value in self.measures.items():
            value[index] = value[index].masked_scatter(where, getattr(prediction, name))
        if prediction.log_prob is not None and self.drift is not None:
            self.drift.move(index, where, prediction.log_prob)
        if prediction.hidden is not None and self.hidden is not None:
            self.hidden[index] = prediction.hidden.float().view(*where.shape, -1)

    def _step_key(self, index: Tensor) -> Tensor | None:
        return fold(self.key[index], self.steps[index]) if self.sampling.temperature > 0 else None

    # ---- a step ----

    def act(self, action: Tensor) -> Outcome:
        """Commit the proposals at chosen legal positions, and settle the lanes that are done.

        Args:
            action: bool or integer [B, L]; non-zero unmasks, illegal bits are ignored. A lane that unmasks nothing has
                spent a step; a lane without a running episode does nothing.
        """
        mask = self.mask
        running = torch.as_tensor(self.running, device=mask.device)[:, None]
        chosen = action.bool() & self.legal(mask) & running  # a lane that was truncated stays as it is
        completion = torch.where(chosen, self.proposal, self.tokens[:, -self.L :])
        self.tokens[:, -self.L :] = completion
        self.steps += (mask & running).any(1)
        self.fresh = chosen
        left = (completion == self.dllm.mask_id).any(1)
        facts = torch.stack([chosen.any(1).long(), left.long(), self.steps]).cpu().numpy()  # one transfer to the host
        changed, left, steps = facts[0] > 0, facts[1] > 0, facts[2]
        terminated = self.running & ~left
        truncated = self.running & left & (steps >= self.max_steps)
        self.stale |= changed & left
        if self.drift is not None:
            unmoved = np.flatnonzero(self.running & left & ~changed)
            self.drift.stay(torch.as_tensor(unmoved, device=mask.device))
        self.lane_steps += int(self.running.sum())
        return self._settle(terminated, truncated, steps)

    def _settle(self, terminated: np.ndarray, truncated: np.ndarray, steps: np.ndarray) -> Outcome:
        """Decode, grade and reward the lanes that are done."""
        done = np.flatnonzero(terminated | truncated)
        score = np.zeros(self.B, np.float32)
        reward = np.zeros(self.B, np.float32)
        if len(done):
            tokens = self.tokens[torch.as_tensor(done, device=self.tokens.device), -self.L :].tolist()
            texts = [self.dllm.decode(completion) for completion in tokens]
            score[done] = self.task.grade_all([self.examples[self.example[lane]] for lane in done], texts)
            for lane, text in zip(done, texts, strict=True):
                self.completions[lane] = text
            reward[done] = self.reward(torch.from_numpy(score[done]), torch.from_numpy(steps[done]), self.L).numpy()
            self.running[done] = False
        self.outcome = Outcome(terminated, truncated, reward, score, steps, self.example.copy())
        return self.outcome

    # ---- for people ----

    def frame(self, lane: int) -> Frame:
        """What a picture of one lane needs."""
        index = int(self.example[lane])
        mask = self.mask[lane]
        tokens = torch.where(mask, self.proposal[lane], self.tokens[lane, -self.L :]).tolist()
        over = self.outcome if self.outcome and self.outcome.done[lane] and not self.running[lane] else None
        return Frame(
            prompt="" if index == EMPTY else str(self.task.prompt(self.examples[index])),
            tokens=[END if t in self.dllm.stop_ids else self.dllm.token_text(t) for t in tokens],
            masked=mask.cpu().numpy(),
            confidence=torch.where(mask, self.confidence[lane, :, 0], 1.0).cpu().numpy(),
            fresh=self.fresh[lane].cpu().numpy(),
            legal=self.legal(self.mask)[lane].cpu().numpy(),
            step=int(self.steps[lane]),
            score=float(over.score[lane]) if over else None,
            reward=float(over.reward[lane]) if over else None,
        )
