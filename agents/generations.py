"""Decoded episodes one by one: played, written down as they end, and found again instead of being played twice."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from agents.rollout import Results, without_dropout
from dllm_gym.checks import number
from dllm_gym.deciders.player import Decider, PolicyDecider
from dllm_gym.deciders.rules.base import Rule, draws
from dllm_gym.envs.episodes import Step, play
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

SAMPLE = 4096  # entries of a tensor that its fingerprint reads
DECISIVE: tuple[str, ...] = ("split", "cut_prompts", "max_prompt_length", "temperature", "max_episode_steps")
DECISIVE += ("steps_per_block", "committed_confidence", "stop_at_eos", "lookahead", "cache", "block_origin")


@dataclass(frozen=True, slots=True)
class Generation:
    """How one episode went: a line of ``generations.jsonl``.

    Attributes:
        key: of what decides it. decider: name. split, example: of which, by its index there.
        seed: None where nothing is drawn, so that every seed gives the same.
        prompt, text: what was asked and answered. score: of the answer. nfe: steps of the episode.
        sizes: tokens that each step committed. masked: the episode was cut and left masks.
        seconds: from its first step to its end, beside the others that were decoded then.
    """

    key: str
    decider: str
    split: str
    example: int
    seed: int | None
    prompt: Any
    text: str
    score: float
    nfe: int
    sizes: list[int]
    masked: bool
    seconds: float

    @classmethod
    def of_line(cls, line: bytes) -> Generation:
        """ValueError for anything that is no line of ours."""
        try:
            known = cls(**json.loads(line))
            number("score", known.score)
            number("nfe", known.nfe, least=0)
            if not isinstance(known.key, str) or sum(known.sizes) < 0 or not isinstance(known.text, str):
                raise ValueError("of another kind")
        except (TypeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return known


class Generations:
    """Those that are known, by key.

    Args:
        path: the file that holds them, to which new ones are added as they come; None: they are kept in memory. What a
            process that was killed left of a last line is cut off.

    Raises:
        ValueError: the file is damaged elsewhere.
    """

    def __init__(self, path: Path | None = None):
        self.known: dict[str, Generation] = {}
        self.file: IO[bytes] | None = None
        if path is None:
            return
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a run folder holds its own files")
        self.file = path.open("a+b")
        self.file.seek(0)
        whole = 0
        for count, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                self.file.truncate(whole)
                break
            try:
                generation = Generation.of_line(line)
            except ValueError as error:
                raise ValueError(f"{path} is damaged in line {count}: {error}") from error
            self.known[generation.key] = generation
            whole += len(line)

    def add(self, generation: Generation) -> None:
        self.known[generation.key] = generation
        if self.file is not None:
            self.file.write(json.dumps(asdict(generation), ensure_ascii=False).encode() + b"\n")
            self.file.flush()

    def forget(self) -> None:
        """Forget all that is in memory only."""
        if self.file is None:
            self.known.clear()

    def __enter__(self) -> Generations:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()


class Lab:
    """An environment in which deciders play examples, and what is known of their episodes.

    Args:
        env: of one split. known: what need not be played again.
        about: what else than the environment's own settings, its dLLM's weights and its examples decides an episode and
            its score: how dLLM and task are configured.

    Raises:
        ValueError: the environment commits right answers, whoever decides.
    """

    def __init__(self, env: DLLMUnmaskVectorEnv, known: Generations | None = None, about: Any = None):
        self.env, self.known = env, known or Generations()
        core = env.core
        if core.config.teacher_forcing:
            raise ValueError("teacher_forcing=True is for training: all answers are right, whoever decides")
        core.revisits = True
        settings = {name: getattr(core.config, name) for name in DECISIVE}  # all but the reward, and what is shown
        dllm = fingerprint(core.dllm.backbone.state_dict())
        self.place = digest(about, settings, core.task.name, core.L, core.block_length, dllm, core.dllm.device.type)
        self._examples: dict[int, str] = {}

    def results(self, name: str, decider: Decider, examples: Sequence[int], seed: int, alpha: float | None) -> Results:
        """How a decider does on these examples, as :func:`~agents.rollout.evaluate` has it, but without counts of work.

        Args:
            name: of the decider. alpha: of all episodes, where the environment has a range of them.
        """
        drawn = draws(decider) or self.env.core.sampling.temperature > 0
        who = digest(self.place, described(decider), self._preference(decider, alpha), seed if drawn else None)
        keys = [digest(who, self._example(e), place if drawn else None) for place, e in enumerate(examples)]
        missing = {key: place for place, key in enumerate(keys) if key not in self.known.known}
        if missing:
            for place, facts in self._play(decider, [*missing.values()], examples, seed, alpha):
                example = int(examples[place])
                split, task = self.env.core.config.split, self.env.core.task
                what: dict[str, Any] = {
                    "decider": name,
                    "split": split,
                    "example": example,
                    "seed": seed if drawn else None,
                }
                prompt = task.prompt(self.env.core.examples[example])
                self.known.add(Generation(key=keys[place], **what, prompt=prompt, **facts))
        return self._results([self.known.known[key] for key in keys], examples, alpha)

    def _preference(self, decider: Decider, alpha: float | None) -> Any:
        """What it is shown of its alpha, if it may read that."""
        reads = "preference" in decider.policy.in_keys if isinstance(decider, PolicyDecider) else None
        span = self.env.core.alpha_range
        return None if span is None or reads is False or isinstance(decider, Rule) else (span.low, span.high, alpha)

    def _example(self, index: int) -> str:
        """What an example asks and what is right, as a digest."""
        if index not in self._examples:
            core = self.env.core
            self._examples[index] = digest(core.examples[index], core.source[index].row.tolist())
        return self._examples[index]

    def _play(
        self, decider: Decider, places: Sequence[int], examples: Sequence[int], seed: int, alpha: float | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The episodes at these places of ``examples`` as they end: the place, and how it went."""
        env = self.env
        sizes = torch.zeros(len(places), env.core.max_steps, dtype=torch.int32, device=env.device)
        ticks = [time.perf_counter()]  # of the steps, which all lanes take together

        def decide(step: Step) -> Tensor:
            action = decider(step.observation, step.noise)
            chosen = action.bool() & step.observation["action_mask"].bool()
            sizes[step.episode, step.time] = chosen.sum(1, dtype=torch.int32)
            return action

        alphas = None if alpha is None else [alpha] * len(places)
        with without_dropout(getattr(decider, "policy", None)):
            for ended in play(env, decide, [examples[p] for p in places], seed, alphas, places):
                ticks.append(time.perf_counter())
                texts = env.last_completions() if len(ended.lanes) else []
                for lane in ended.lanes:
                    item, nfe = int(ended.episode["item"][lane]), int(ended.episode["l"][lane])
                    yield (
                        places[item],
                        {
                            "text": texts[lane] or "",
                            "score": float(ended.episode["score"][lane]),
                            "nfe": nfe,
                            "sizes": sizes[item, :nfe].tolist(),
                            "masked": bool(ended.truncated[lane]),
                            "seconds": round(ticks[-1] - ticks[-1 - nfe], 6),
                        },
                    )

    def _results(self, played: Sequence[Generation], examples: Sequence[int], alpha: float | None) -> Results:
        """The reward follows from score and NFE."""
        core = self.env.core
        score = np.array([each.score for each in played], np.float32)
        nfe = np.array([each.nfe for each in played], np.int64)
        alphas = np.full(len(played), 0.0 if core.alpha_range is None else alpha, np.float64)
        return Results(
            reward=torch.from_numpy(core.pay.of(alphas, score, nfe, core.source.lengths(examples))),
            score=torch.from_numpy(score),
            nfe=torch.from_numpy(nfe),
            example=torch.tensor([*examples]),
            completions=[each.text for each in played],
            masked=torch.tensor([each.masked for each in played]),
            tokens=torch.tensor([sum(each.sizes) for each in played]),
        )


def digest(*parts: Any) -> str:
    """32 hex digits that stand for plain data; what is not plain counts by its text."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """What tells weights apart: names, shapes, dtypes and up to ``SAMPLE`` evenly spread entries of every tensor."""
    known = hashlib.sha256()
    for name, value in tensors.items():
        known.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().flatten()
        some = flat[:: -(-len(flat) // SAMPLE) or 1].contiguous().cpu()
        known.update(some.view(torch.uint8).numpy().tobytes())
    return known.hexdigest()


def described(decider: Any) -> Any:
    """What decides how a decider decides: its class with the code, its settings, and a policy's weights."""
    if isinstance(decider, PolicyDecider):
        policy = decider.policy
        how = [described(decider.distribution_class), decider.temperature, decider.greedy]
        return [described(type(policy)), policy.settings, fingerprint(policy.state_dict()), *how]
    if isinstance(decider, type):
        return [[each.__module__, each.__qualname__, code(each)] for each in decider.__mro__[:-1]]
    if inspect.isroutine(decider):  # it may see more than its code: another process plays it again
        return repr(decider)
    own = getattr(decider, "__dict__", {}).items()
    inner = {name: described(value) if isinstance(value, Rule) else value for name, value in own}
    return [described(type(decider)), inner]


@cache
def code(kind: Any) -> str:
    """The source of a class or function; that of a library is known by its name."""
    if kind.__module__.partition(".")[0] in ("torch", "builtins", "abc", "typing", "huggingface_hub", "numpy"):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt
        return ""
