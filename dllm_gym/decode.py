"""Decoding of one's own prompts with a rule or a policy: what environments do, for who only wants the text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dllm_gym.checks import choice, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.deciders.manner import Manner
from dllm_gym.deciders.player import Decider, PolicyDecider, make_decider
from dllm_gym.deciders.policy import Policy
from dllm_gym.envs.episodes import Step, play
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import DLLM, load_dllm
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.entries import COUNTS, FLAGS
from dllm_gym.process.starts import completion_of
from dllm_gym.process.unmasking import MOST_LANES
from dllm_gym.prompt import Chat, Prompt
from dllm_gym.tasks import Task
from dllm_gym.tasks.base import Example

log = logging.getLogger(__name__)

ELSEWHERE = ("model", "task", "split", "reward", "alpha", "device", "dtype")  # of EnvConfig, but not of its env
SETTINGS = [each.name for each in fields(EnvConfig) if each.name not in ELSEWHERE]
SPLIT = "test"  # of a task of prompts; it has no other
GAP = "░"  # shown for a token that is not committed yet


class Prompts(Task):
    """Prompts of one's own as a task, which grades nothing."""

    name = "prompts"

    def __init__(self, prompts: Sequence[Prompt], gen_length: int):
        self.prompts, self.gen_length = prompts, gen_length

    def examples(self, split: str) -> Dataset:
        return Dataset.from_dict({"index": range(len(self.prompts))})

    def prompt(self, example: Example) -> str | Chat:
        return self.prompts[example["index"]].prompt

    def template(self, example: Example) -> Sequence[str | int] | None:
        return self.prompts[example["index"]].given

    def grade(self, example: Example, completion: str) -> float:
        return 0.0


@dataclass(frozen=True)
class Commit:
    """What one step of one prompt's decoding committed.

    Attributes:
        step: how-manieth it is, from 1. positions: those committed, 0 to L - 1; tokens: their ids; confidence: how sure
            the dLLM was of each. text: the completion as it stands, with :data:`GAP` for every token that is missing.
    """

    step: int
    positions: list[int]
    tokens: list[int]
    confidence: list[float]
    text: str


@dataclass
class Decoded:
    """What became of one prompt.

    Attributes:
        index: its place among the prompts.
        text: the completion up to its end. tokens: int64 [L], the mask where nothing was committed.
        order: the positions that every step committed, step by step. nfe: forwards of the dLLM (its steps).
        seconds: from the forward that it began with to its end, with others decoded beside it.
    """

    index: int
    tokens: np.ndarray
    order: list[list[int]] = field(default_factory=list)
    text: str = ""
    nfe: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one forward committed, on average."""
        return sum(map(len, self.order)) / max(self.nfe, 1)

    def commit(self, positions: np.ndarray, tokens: np.ndarray) -> None:
        """Note what a step did."""
        self.tokens[positions] = tokens
        self.order.append(positions.tolist())

    def shown(self, dllm: DLLM) -> str:
        """The text with gaps, as far as it goes: up to the first end behind which nothing is wanted."""
        tokens = self.tokens.tolist()
        end = next((i for i, token in enumerate(tokens) if token in dllm.stop_ids), len(tokens))
        parts: list[str] = []
        start = 0
        for i in (*np.flatnonzero(self.tokens[:end] == dllm.mask_id).tolist(), end):
            parts.append(dllm.decode(tokens[start:i]))
            start = i + 1
        return GAP.join(parts)


class Decoder:
    """A frozen dLLM that decodes with a rule or a policy. It is an environment without a task: with the same settings
    every prompt gets the same tokens in as many forwards, in whatever company.

    >>> decoder = Decoder("tiny", policy="threshold(0.9)", gen_length=48)
    >>> result = decoder(["1+2=".ljust(16)])[0]
    >>> result.nfe == len(result.order) and result.tokens_per_forward > 1
    True

    Args:
        model: of the dLLM, as of :func:`~dllm_gym.models.load_dllm`; None: the one that the policy was trained on, or
            ``"tiny"``.
        policy: a rule by its name, a shipped policy, a saved folder, a run folder, a hub id, or an object; see
            :func:`~dllm_gym.deciders.player.make_decider`.
        gen_length, block_length, temperature, stop_at_eos, cache, and others as ``env``: settings of the environment,
            see :class:`~dllm_gym.process.config.EnvConfig`. None: what the policy was trained with, else the
            environment's own; without either, ``gen_length`` has to be given.
        distribution, policy_temperature, greedy, alpha: how a policy is played, in place of what it says itself:
            ``alpha`` is the speed weight of one that reads a preference.
        batch_size: prompts that are decoded side by side; one that is done makes room for the next.
        seed: of whatever is drawn; a prompt's draws depend on it and on its place among the prompts.
        device, dtype: of the dLLM.

    Raises:
        ValueError: a setting is wrong, there is no such model or policy, or the policy cannot read this dLLM. What a
            policy was trained with and is not the same here is logged as one warning.

    Attributes:
        dllm: the dLLM. decider: who decides. env: the settings of the environment.
    """

    def __init__(
        self,
        model: str | Path | DLLM | None = None,
        policy: str | Path | Policy | Decider = "threshold(0.9)",
        *,
        gen_length: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        stop_at_eos: bool | None = None,
        cache: str | None = None,
        distribution: str | None = None,
        policy_temperature: float | None = None,
        greedy: bool | None = None,
        alpha: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **env: Any,
    ):
        self.batch_size = whole("batch_size", batch_size, most=MOST_LANES)
        self.seed = check_seed("seed", seed)
        how = {"distribution": distribution, "temperature": policy_temperature, "greedy": greedy, "alpha": alpha}
        self.decider = make_decider(policy, **how)
        settings: dict[str, Any] = {"gen_length": gen_length, "block_length": block_length, "temperature": temperature}
        settings |= {"stop_at_eos": stop_at_eos, "cache": cache, **env}
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(f"Decoder got an unexpected keyword argument {name!r}")
        self.env = self._settings({name: value for name, value in settings.items() if value is not None})
        self.dllm = self._load(model, device, dtype)
        if isinstance(self.decider, PolicyDecider):
            self.decider.policy.to(self.dllm.device).eval()
        self._refuse_misfits()
        self._empty([Prompt("")])  # what is wrong with a setting is said now

    @cached_property
    def manner(self) -> Manner | None:
        """What the policy says about itself; None for a rule."""
        return getattr(getattr(self.decider, "policy", None), "manner", None)

    def _settings(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Of the environment: those chosen, else the policy's."""
        own = dict(self.manner.env) if self.manner else {}
        for name in own:
            choice("a setting of the policy's environment", name, SETTINGS)
        if "gen_length" in chosen and own.get("block_length") == own.get("gen_length"):
            own.pop("block_length", None)  # full diffusion is full diffusion at any length
        settings = {**own, **chosen}
        if "gen_length" not in settings:
            raise ValueError("gen_length=None: say how many tokens a completion has, the policy does not say so")
        return settings

    def _load(self, model: Any, device: Any, dtype: Any) -> DLLM:
        trained = {"model": "tiny", **(self.manner.model if self.manner else {})}
        options = trained if model is None else {"model": model}
        try:
            return load_dllm(**{**options, "device": device, **({} if dtype is None else {"dtype": dtype})})
        except TypeError as error:  # of what a policy says of its dLLM
            raise ValueError(f"the policy's dLLM, {trained}: {error}") from None

    def _refuse_misfits(self) -> None:
        """ValueError for a policy that cannot read this dLLM; a warning for one that was trained otherwise."""
        policy = getattr(self.decider, "policy", None)
        for size in ("vocab_size", "hidden_size"):
            known, here = getattr(policy, size, 0), getattr(self.dllm, size)
            if known not in (0, here):
                raise ValueError(f"{size}={known}: the policy reads another dLLM than this one, which has {here}")
        if self.manner is None:
            return
        trained = {"family": self.manner.family, "vocab_size": self.manner.vocab_size, **self.manner.env}
        here = {"family": self.dllm.config.get("model_type"), "vocab_size": self.dllm.vocab_size, **self.env}
        here.setdefault("block_length", here["gen_length"])
        trained.pop("stop_at_eos", None)  # an episode goes through the same states, it only ends elsewhere
        other = [f"{n}={v} (here {here[n]})" for n, v in trained.items() if v is not None and here[n] != v]
        if other:
            log.warning(
                "this %s was trained with %s: it may decide worse here", type(policy).__name__, ", ".join(other)
            )

    def _empty(self, prompts: Sequence[Prompt]) -> DLLMUnmaskVectorEnv:
        """An environment with these prompts as its examples."""
        needs = {name: int(least) for name, least in getattr(self.decider, "requires", {}).items()}
        asked: dict[str, Any] = {name: needs[name] for name in (*COUNTS, *FLAGS) if name in needs}
        if self.manner and getattr(self.decider, "alpha", None) is not None:
            asked["alpha"] = self.manner.alpha
        lanes, task = min(self.batch_size, len(prompts)), Prompts(prompts, self.env["gen_length"])
        return DLLMUnmaskVectorEnv(lanes, model=self.dllm, task=task, split=SPLIT, **self.env, **asked)

    def __call__(self, prompts: Sequence[Any]) -> list[Decoded]:
        """Decode prompts: texts, lists of turns, or :class:`~dllm_gym.prompt.Prompt` with what is given of the
        completion. The results come in the order of the prompts.

        Raises:
            ValueError: a prompt is none, or does not fit the dLLM; says which.
        """
        return sorted(self.as_they_end(prompts), key=lambda result: result.index)

    def as_they_end(self, prompts: Sequence[Any]) -> Iterator[Decoded]:
        """The same, each result as soon as it is there."""
        for _, ended in self._play(prompts):
            yield from ended

    def stream(self, prompt: Any) -> Iterator[Commit]:
        """Decode one prompt; what every step commits, as soon as it has."""
        for (commit,), _ in self._play([prompt]):
            yield commit

    def _play(self, prompts: Any) -> Iterator[tuple[list[Commit], list[Decoded]]]:
        """Step by step what is committed (of a single prompt) and what has ended."""
        if isinstance(prompts, str | Chat | Prompt) or not isinstance(prompts, Sequence):
            raise ValueError(f"prompts={prompts!r}: need a list of prompts, such as ['...']")
        if not prompts:
            return
        game = Game(self._empty(checked(prompts, self.dllm, self.env["gen_length"])), self.decider)
        alpha = getattr(self.decider, "alpha", None)
        every = range(len(prompts))
        for ended in play(game.env, game.decide, every, self.seed, None if alpha is None else [alpha] * len(every)):
            yield game.commits, [game.end(lane, ended.episode) for lane in ended.lanes.tolist()]


def checked(prompts: Sequence[Any], dllm: DLLM, length: int) -> list[Prompt]:
    """All as prompts, each of which can be written in the dLLM's tokens; ValueError says which cannot."""
    found: list[Prompt] = []
    for i, prompt in enumerate(prompts):
        try:
            found.append(Prompt.of(prompt))
            dllm.encode(found[i].prompt)
            completion_of(Prompts(found, length), {"index": i}, dllm, length)
        except ValueError as error:
            raise ValueError(f"prompts[{i}]: {error}") from None
    return found


class Game:
    """Prompts on their way through an environment, and what is noted of them.

    Attributes:
        commits: what the last step committed, if there is only one prompt.
    """

    def __init__(self, env: DLLMUnmaskVectorEnv, decider: Decider):
        self.env, self.decider = env, decider
        source = env.core.source
        self.results = {i: Decoded(i, source[i].completion.copy()) for i in range(len(env.core.examples))}
        self.began: dict[int, float] = {}
        self.commits: list[Commit] = []
        self.clock = time.perf_counter()

    def decide(self, step: Step) -> Tensor:
        """The decider's action; what it commits is noted."""
        said = self.env.core.predictions
        action = self.decider(step.observation, step.noise)
        chosen = ((action != 0) & (step.observation["action_mask"] != 0)).cpu().numpy()  # (n, L)
        tokens, sure = said.proposal[step.lane].cpu().numpy(), said.confidence[step.lane, :, 0].cpu().numpy()
        for row, item in enumerate(step.episode.tolist()):
            self.began.setdefault(item, self.clock)
            at = np.flatnonzero(chosen[row])
            self.results[item].commit(at, tokens[row, at])
            if len(self.results) == 1:
                self.commits = [self._commit(item, at, sure[row, at])]
        self.clock = time.perf_counter()
        return action

    def _commit(self, item: int, at: np.ndarray, sure: np.ndarray) -> Commit:
        result, dllm = self.results[item], self.env.core.dllm
        tokens = result.tokens[at].tolist()
        return Commit(len(result.order), at.tolist(), tokens, sure.tolist(), result.shown(dllm))

    def end(self, lane: int, episode: Any) -> Decoded:
        """The result of the episode that has ended in a lane."""
        result = self.results[int(episode["item"][lane])]
        result.nfe, result.text = int(episode["l"][lane]), self.env.last_completions()[lane] or ""
        result.seconds = time.perf_counter() - self.began[result.index]
        return result
