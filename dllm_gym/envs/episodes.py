"""Chosen examples through the lanes of a vector environment, which are refilled as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models.batches import upload
from dllm_gym.noise import fold, uniform
from dllm_gym.process.config import EMPTY
from dllm_gym.render import Frame


@dataclass
class Step:
    """One step of the n lanes that hold an episode: which episode, its how-manieth step, what is seen."""

    lane: Tensor  # int64 [n]
    episode: Tensor  # int64 [n]
    time: Tensor  # int64 [n]
    observation: dict[str, Tensor]  # [n, ...]
    noise: Tensor  # float32 [n, L]


@dataclass(frozen=True)
class Ended:
    """The episodes that a step ended.

    Attributes:
        lanes: int64 [n], those that they were in; none as a rule.
        episode: what the environment's ``info["episode"]`` says, [N] each; ``item`` is the place in ``examples``.
        truncated: bool [N], the episode was cut, and left masks.
    """

    lanes: np.ndarray
    episode: Mapping[str, np.ndarray]
    truncated: np.ndarray


def _begin(
    env: DLLMUnmaskVectorEnv,
    examples: Sequence[int],
    seed: int,
    alphas: Sequence[float] | None,
    places: Sequence[int] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put an example into every lane and the others into the queue."""
    if env.autoreset_mode is not AutoresetMode.SAME_STEP:
        raise ValueError(f"autoreset_mode={env.autoreset_mode.value!r}: rollouts need an environment with 'SameStep'")
    B = env.num_envs
    idle = max(B - len(examples), 0)
    options: dict[str, Any] = {"examples": [*examples[:B], *[EMPTY] * idle], "queue": examples[B:]}
    if alphas is not None:  # lanes without an episode have none of their own
        options["alpha"] = [*alphas[:B], *[alphas[0]] * idle, *alphas[B:]]
    if places is not None:  # those of lanes without an episode are read by nothing
        options["streams"] = [*places[:B], *[0] * idle, *places[B:]]
    # Item i starts from seed + i: spread the seeds, or item i + 1 of seed 0 would be item i of seed 1.
    return env.reset(seed=int(np.random.default_rng(seed).integers(1 << 62)), options=options)


def play(
    env: DLLMUnmaskVectorEnv,
    decide: Callable[[Step], Tensor],
    examples: Sequence[int],
    seed: int = 0,
    alphas: Sequence[float] | None = None,
    places: Sequence[int] | None = None,
) -> Iterator[Ended]:
    """Run one episode per entry of ``examples``; gives after every step what it ended.

    An episode depends on its place in ``examples`` and on ``seed`` (where draws are involved at all), not on the number
    of lanes nor on its company.

    Args:
        env: resets finished lanes in the same step.
        decide: the action [n, L] of the n lanes that hold an episode.
        examples: indices of the environment's examples. alphas: one each, where there is a range of them.
        places: which place each is taken to have (None: its own): a part of the examples then goes as in the whole.
    """
    B, L, device = env.num_envs, env.core.L, env.device
    observation, info = _begin(env, examples, seed, alphas, places)
    episodes = torch.arange(len(examples), device=device) if places is None else upload([*places], device)
    streams = fold(torch.full((), seed, dtype=torch.int64, device=device), episodes)  # (E,)
    time = torch.zeros(B, dtype=torch.int64, device=device)
    nothing = np.zeros(0, np.int64)
    moved = True  # lanes have begun other episodes
    while "item" in info:
        if moved:
            busy = np.flatnonzero(info["_item"])
            lanes, which = upload(busy, device), upload(info["item"][busy], device)
        if len(busy) < B:  # nobody has to decide for the others
            observation = {name: value[lanes] for name, value in observation.items()}
        noise = uniform(streams[which], time[lanes], L)
        action = decide(Step(lanes, which, time[lanes], observation, noise))
        observation, _, _, truncated, info = env.step(action.new_zeros(B, L).index_copy_(0, lanes, action))
        time += 1
        moved = "episode" in info
        done = np.flatnonzero(info["_episode"]) if moved else nothing
        if moved:
            time[upload(done, device)] = 0
        yield Ended(done, info.get("episode", {}), truncated)


def record(
    env: DLLMUnmaskVectorEnv,
    decider: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    example: int,
    seed: int = 0,
    show: Callable[[Frame], None] | None = None,
) -> list[Frame]:
    """What is to be seen of one episode: a frame before its first step, and one after every step.

    Args:
        env: has one lane, and does not reset it (``autoreset_mode="Disabled"``).
        example: which of the environment's.
        show: is given every frame as soon as it is there.
    """
    options = {"examples": [example], "alpha": getattr(decider, "alpha", None)}
    observation, _ = env.reset(seed=seed, options=options)
    stream = fold(torch.full((1,), seed, dtype=torch.int64, device=env.device), 0)
    frames: list[Frame] = []
    done = False
    for step in range(env.core.max_steps + 1):
        frames.append(env.core.frame(0))
        if show is not None:
            show(frames[-1])
        if done:
            break
        action = decider(observation, uniform(stream, step, env.core.L))
        observation, _, terminated, truncated, _ = env.step(action)
        done = bool(terminated | truncated)
    return frames
