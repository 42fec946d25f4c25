"""The training loop's parts: prompts, the episodes of a round, metrics, checkpoints."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents.advantages import group_advantage
from agents.algorithm import Algorithm
from agents.rollout import Episodes, Results, join, play_groups
from dllm_gym.checks import whole
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.policy import Policy
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.runs.checkpoints import CONFIG, METRICS, POLICY, STATE, Checkpoint, Checkpoints
from dllm_gym.runs.files import noted, read


class Prompts:
    """Endless passes over shuffled examples; what comes next depends on the seed and on how many were taken."""

    def __init__(self, total: int, seed: int, taken: int = 0):
        self.total, self.seed, self.taken = total, seed, taken

    def take(self, count: int) -> np.ndarray:
        """The next indices [count]."""
        positions = range(self.taken, self.taken + count)
        passes = range(positions[0] // self.total, positions[-1] // self.total + 1)
        shuffled = {i: np.random.default_rng([self.seed, i]).permutation(self.total) for i in passes}
        self.taken += count
        return np.array([shuffled[p // self.total][p % self.total] for p in positions])


@dataclass
class Collector:
    """The episodes of a round, group by group.

    With ``max_batches`` > 1 groups whose rewards are all equal, which teach nothing, are replaced by those of further
    prompts (dynamic sampling, DAPO, arXiv 2503.14476); at most ``max_batches`` times as many episodes are played.

    Attributes:
        prompts_per_round, group_size: prompts, and episodes of the policy for each. seed: of all that is drawn.
        equal_groups: of the last round's episodes, replaced ones included, the share in groups with equal rewards.

    Raises:
        ValueError: a count is not positive.
    """

    envs: DLLMUnmaskVectorEnv
    prompts: Prompts
    seed: int
    prompts_per_round: int
    group_size: int
    max_batches: int = 1

    def __post_init__(self) -> None:
        self.equal_groups = 0.0
        for name in ("prompts_per_round", "group_size", "max_batches"):
            whole(name, getattr(self, name))

    def collect(self, algorithm: Algorithm, policy: PolicyDecider) -> Episodes:
        """The next round's episodes, played by the algorithm's players."""
        players = algorithm.players(policy, self.group_size)
        kept: list[Episodes] = []
        teach: list[Tensor] = []
        for number in range(self.max_batches):
            missing = self.prompts_per_round - sum(len(part.group.unique()) for part in kept)
            if not missing:
                break
            seed = int(np.random.default_rng([self.seed, self.prompts.taken]).integers(1 << 31))
            part = play_groups(self.envs, players, self.prompts.take(missing), seed, algorithm.observes)
            worth = algorithm.worth(part.batch, part.reward)
            part = replace(part, reward=worth, group=part.group + number * self.prompts_per_round)
            teach.append(group_advantage(part.reward, part.group)[1])
            kept.append(part.keep(teach[-1]) if self.max_batches > 1 else part)
        self.equal_groups = 1 - float(torch.cat(teach).float().mean())
        if not any(len(episodes.group) for episodes in kept):
            kept[-1] = part  # an algorithm learns from episodes, if only that nothing is to be learnt
        return join(kept)


def episode_metrics(results: Sequence[Results]) -> dict[str, float]:
    """What the metrics of a round say about its episodes."""
    lane_steps = sum(r.lane_steps for r in results)
    steps = sum(r.steps for r in results)
    return {
        "episodes": float(sum(len(r.reward) for r in results)),
        "reward": float(torch.cat([r.reward for r in results]).mean()),
        "accuracy": float(torch.cat([r.score for r in results]).mean()),
        "nfe": float(torch.cat([r.nfe for r in results]).float().mean()),
        "nfe_std": float(torch.cat([r.nfe for r in results]).float().std(unbiased=False)),
        "ended_masked": float(torch.cat([r.masked for r in results if r.masked is not None]).float().mean()),
        "row_forwards": float(sum(r.row_forwards for r in results)),
        "empty_steps": sum(r.empty_steps * r.steps for r in results) / steps,
        "idle_lanes": 1 - steps / lane_steps,
    }


def read_rounds(path: Path, count: int) -> tuple[list[dict[str, str]], list[int]]:
    """The first ``count`` rounds in a metrics.csv, and which of them are missing there (all, if it cannot be read)."""
    try:
        rows = list(csv.DictReader(io.StringIO(read(path)), strict=True))
    except (ValueError, csv.Error):
        rows = []
    known = {row["round"]: row for row in rows if row.get("round") and None not in row and None not in row.values()}
    there = [number for number in range(count) if str(number) in known]
    return [known[str(number)] for number in there], sorted(set(range(count)) - set(there))


class Metrics:
    """Metrics of every round: a line of metrics.csv, the progress bar, and the logger if there is one.

    Args:
        path: of metrics.csv. bar: the progress bar. logger: TorchRL's, or None.
        before: rounds that an earlier run has done, as ``read_rounds`` gives them.
    """

    def __init__(self, path: Path, bar: tqdm, logger: Any, before: Sequence[dict[str, Any]] = ()):
        self.path, self.bar, self.logger = path, bar, logger
        self.rows = list(before)
        self._write()

    def log(self, round_: int, results: Sequence[Results], update: Mapping[str, float]) -> None:
        """Add a round; ``update`` holds the algorithm's own metrics."""
        row = {"round": round_, **episode_metrics(results), **update}
        self.rows.append(row)
        self._write()
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "accuracy", "nfe")})
        for name, value in row.items() if self.logger else ():
            self.logger.log_scalar(name, value, step=round_)

    def columns(self) -> list[str]:
        """Every metric that some round had (rounds without a gradient step have fewer)."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _write(self) -> None:
        noted(self.path, self._write_to)

    def _write_to(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns())
            if self.rows:
                writer.writeheader()
            writer.writerows(self.rows)


@dataclass
class Saver:
    """Saves the checkpoints of a run.

    Attributes:
        run: its folder. keep: how many stay, besides the best one. validate: gives the policy's mean reward on the
            validation split; None: no checkpoint is known to be the best.
        last: rounds that were done at the last one; None: there is none in this folder.
    """

    run: Path
    policy: Policy
    algorithm: Algorithm
    keep: int
    validate: Callable[[], float] | None = None
    last: int | None = None

    def save(self, progress: Mapping[str, int]) -> None:
        """Save ``rounds`` and ``prompts`` of ``progress``, the policy and all that the algorithm needs to go on."""

        def write(folder: Path) -> None:
            self.policy.save_pretrained(folder / POLICY)
            torch.save({**progress, "algorithm": self.algorithm.state_dict()}, folder / STATE)
            for name in (CONFIG, METRICS):
                shutil.copyfile(self.run / name, folder / name)

        if progress["rounds"] != self.last:
            reward = None if self.validate is None else self.validate()
            Checkpoints(self.run).save(progress["rounds"], write, self.keep, reward)
            self.last = progress["rounds"]


def load_state(checkpoint: Checkpoint | None, algorithm: Algorithm, device: torch.device) -> dict[str, int]:
    """Load the state of a run; returns how many ``rounds`` it has done and ``prompts`` it has taken.

    Raises:
        ValueError: it does not fit, or is none.
    """
    if checkpoint is None:
        return {"rounds": 0, "prompts": 0}
    path = checkpoint.path / STATE
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        progress = {name: whole(name, state[name], least=0) for name in ("rounds", "prompts")}
        algorithm.load_state_dict(state["algorithm"])
    except Exception as error:  # a file that anybody may have made goes wrong in any way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: its state does not fit the policy and agent of this run: {reason}") from error
    return progress
