"""Episodes from the vector environment: for training (recorded, in groups) and for evaluation (results only)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, pad
from torch import Tensor

from dllm_gym.deciders.player import Decider
from dllm_gym.envs.dealer import check_example
from dllm_gym.envs.episodes import Ended, Step, play
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models.batches import upload


@dataclass
class Results:
    """How E episodes ended, in the order in which their examples were given.

    Attributes:
        reward, score: float32 [E]. nfe: int64 [E]. example: int64 [E].
        completions: E texts.
        row_forwards: rows that the dLLM computed. steps: of all episodes. lane_steps: of all lanes, idle ones included.
        masked: bool [E], the episode was cut and left masks. tokens: int64 [E], how many were committed, if counted.
        empty_steps: share of steps that unmasked nothing. idle_lanes: share of lane-steps without an episode.
    """

    reward: Tensor
    score: Tensor
    nfe: Tensor
    example: Tensor
    completions: list[str]
    masked: Tensor | None = None
    tokens: Tensor | None = None
    row_forwards: int = 0
    steps: int = 0
    lane_steps: int = 0
    empty_steps: float = 0.0
    idle_lanes: float = 0.0

    def part(self, places: Sequence[int]) -> Results:
        """The episodes at these places, without counts of work."""
        at = torch.tensor([*places], dtype=torch.int64)
        return Results(
            **{name: getattr(self, name)[at] for name in ("reward", "score", "nfe", "example")},
            completions=[self.completions[i] for i in places],
            masked=None if self.masked is None else self.masked[at],
            tokens=None if self.tokens is None else self.tokens[at],
        )


def evaluate(
    env: DLLMUnmaskVectorEnv, decider: Decider, examples: Sequence[int], seed: int = 0, alpha: float | None = None
) -> Results:
    """Decode ``examples`` with a heuristic or a policy; ``alpha`` sets the knob of an environment with a range of them.

    An episode's result depends on its place in ``examples`` and on ``seed`` (where draws are involved at all), not on
    the number of lanes nor on its company. A network is evaluated without its dropout.
    """
    record = Record(env, examples)
    decide = record.counting(lambda step: decider(step.observation, step.noise))
    with without_dropout(getattr(decider, "policy", None)):
        return record.of(play(env, decide, record.examples, seed, None if alpha is None else [alpha] * len(examples)))


@contextmanager
def without_dropout(network: Any) -> Iterator[None]:
    if not isinstance(network, torch.nn.Module) or not network.training:
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


class Player(Protocol):
    """Who decides in a recorded episode: ``decide(observation, noise) -> action, log-probability``."""

    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]: ...


def rollout(
    env: DLLMUnmaskVectorEnv,
    player: Player,
    examples: Sequence[int],
    seed: int = 0,
    observes: Sequence[str] | None = None,
    *,
    alphas: Sequence[float] | None = None,
) -> tuple[TensorDict, Results]:
    """Decode ``examples`` with a policy (or an expert) and record every step; a group is an example listed repeatedly.

    Args:
        observes: observation entries to record; None: all.
        alphas: one per episode, for an environment with a range of them.

    Returns:
        A TensorDict [E, T] with these entries, ``action`` [E, T, L] (ranks where the distribution is ordered),
        ``action_log_prob`` float32 [E, T] and ``active`` bool [E, T] (False behind an episode's end, where everything
        is 0), T the longest episode; and the results.
    """
    store: dict[str, Tensor] = {}
    shape = (len(examples), env.core.max_steps)

    def decide_and_record(step: Step) -> Tensor:
        action, log_prob = player.decide(step.observation, step.noise)
        seen = {name: step.observation[name] for name in observes or step.observation}
        seen |= {"action": action, "action_log_prob": log_prob, "active": torch.ones_like(log_prob, dtype=torch.bool)}
        for name, value in seen.items():
            if name not in store:
                store[name] = value.new_zeros((*shape, *value.shape[1:]))
            store[name][step.episode, step.time] = value
        return action

    record = Record(env, examples)
    results = record.of(play(env, record.counting(decide_and_record), record.examples, seed, alphas))
    longest = int(results.nfe.max())
    return TensorDict({name: value[:, :longest] for name, value in store.items()}, (shape[0], longest)), results


@dataclass
class Episodes:
    """What an algorithm learns from: E recorded episodes.

    Attributes:
        batch: [E, T] as ``rollout`` returns it, ``expert`` bool [E, T] and ``score`` float32 [E, T], each episode's.
        reward: float32 [E]. group: int64 [E], equal for episodes of one prompt.
        results: of every episode that the first player played for it, those that were dropped since among them.
    """

    batch: TensorDict
    reward: Tensor
    group: Tensor
    results: list[Results]

    def keep(self, episodes: Tensor) -> Episodes:
        """The episodes where ``episodes`` bool [E] is set."""
        return Episodes(self.batch[episodes], self.reward[episodes], self.group[episodes], self.results)


def join(parts: Sequence[Episodes]) -> Episodes:
    """Several sets of episodes as one; their groups stay apart unless their ids are equal."""
    longest = max(part.batch.shape[1] for part in parts)
    return Episodes(
        torch.cat([pad(part.batch, [0, 0, 0, longest - part.batch.shape[1]]) for part in parts]),
        torch.cat([part.reward for part in parts]),
        torch.cat([part.group for part in parts]),
        [results for part in parts for results in part.results],
    )


def play_groups(
    env: DLLMUnmaskVectorEnv,
    players: Sequence[tuple[Player, int]],
    prompts: Sequence[int] | np.ndarray,
    seed: int,
    observes: Sequence[str] | None = None,
) -> Episodes:
    """Let every player decode every prompt as often as it is listed with; group i holds all episodes of prompt i.

    Where the environment has a range of alphas, a group has one of them, and all groups together cover the range.
    """
    parts = []
    alphas = None
    if env.core.alpha_range is not None:
        rng, count = np.random.default_rng([seed, len(players)]), len(prompts)
        alphas = env.core.alpha_range.at((rng.permutation(count) + rng.random(count)) / count)
    for number, (player, count) in enumerate(players):
        own_seed = int(np.random.default_rng([seed, number]).integers(1 << 31))
        own_alphas = None if alphas is None else np.repeat(alphas, count).tolist()
        batch, results = rollout(env, player, np.repeat(prompts, count).tolist(), own_seed, observes, alphas=own_alphas)
        batch["expert"] = torch.full(batch.shape, number > 0, device=env.device)
        batch["score"] = results.score[:, None].expand(batch.shape)
        group = torch.arange(len(prompts), device=env.device).repeat_interleave(count)
        parts.append(Episodes(batch, results.reward, group, [results] if number == 0 else []))
    return join(parts)


class Record:
    """What becomes of episodes while they are played in ``env``, in the order of their ``examples``.

    Made before they begin, it counts the reset's work, too.
    """

    def __init__(self, env: DLLMUnmaskVectorEnv, examples: Sequence[int]):
        self.env, self.examples = env, [check_example(e, len(env.core.examples)) for e in examples]
        kinds = {"r": np.float32, "score": np.float32, "l": np.int64, "truncated": np.bool_}
        self.ended: dict[str, np.ndarray] = {name: np.zeros(len(examples), kind) for name, kind in kinds.items()}
        self.completions = [""] * len(examples)
        self.forwards = env.core.row_forwards
        self.steps = self.lane_steps = 0
        self.empty = torch.zeros((), dtype=torch.int64, device=env.device)

    def counting(self, decide: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        """``decide``, with what its actions [n, L] do counted."""

        def decide_and_count(step: Step) -> Tensor:
            action = decide(step)
            self.empty += (~(action.bool() & step.observation["action_mask"].bool()).any(1)).sum()
            self.steps += len(action)
            self.lane_steps += self.env.num_envs
            return action

        return decide_and_count

    def of(self, played: Iterable[Ended]) -> Results:
        """The results of all episodes, once they have been played to their ends."""
        for ended in played:
            if len(ended.lanes):
                self.end(ended.lanes, {**ended.episode, "truncated": ended.truncated})
        return self.results()

    def end(self, lanes: np.ndarray, episode: Mapping[str, np.ndarray]) -> None:
        """The episodes of these lanes have ended."""
        items, texts = episode["item"][lanes], self.env.last_completions()
        for name, values in self.ended.items():
            values[items] = episode[name][lanes]
        for lane, item in zip(lanes, items, strict=True):
            self.completions[item] = texts[lane] or ""

    def results(self) -> Results:
        device = self.env.device
        return Results(
            reward=upload(self.ended["r"], device),
            score=upload(self.ended["score"], device),
            nfe=upload(self.ended["l"], device),
            example=upload(np.asarray(self.examples, np.int64), device),
            completions=self.completions,
            masked=upload(self.ended["truncated"], device),
            row_forwards=self.env.core.row_forwards - self.forwards,
            steps=self.steps,
            lane_steps=self.lane_steps,
            empty_steps=float(self.empty) / max(self.steps, 1),
            idle_lanes=1 - self.steps / max(self.lane_steps, 1),
        )
