"""The training loop's parts: prompts, the episodes of a round, metrics, checkpoints."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents.advantages import group_advantage
from agents.algorithm import Algorithm
from agents.policies import Policy, PolicyDecider
from agents.rollout import Episodes, Results, join, play_groups
from dllm_gym.checks import whole
from dllm_gym.vector_env import DLLMUnmaskVectorEnv

CHECKPOINT = "checkpoint"  # folder of a run that holds the policy and the trainer's state


class Prompts:
    """Endless passes over shuffled examples; what comes next depends on the seed and on how many were taken."""

    def __init__(self, total: int, seed: int, taken: int = 0):
        self.total, self.seed, self.taken = total, seed, taken

    def take(self, count: int) -> np.ndarray:
        """The next indices [count]."""
        positions = np.arange(self.taken, self.taken + count)
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
            part = replace(part, group=part.group + number * self.prompts_per_round)
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
        "row_forwards": float(sum(r.row_forwards for r in results)),
        "empty_steps": sum(r.empty_steps * r.steps for r in results) / steps,
        "idle_lanes": 1 - steps / lane_steps,
    }


def read_rounds(run: str | Path, count: int) -> list[dict[str, str]]:
    """The first ``count`` rounds in a run's metrics.csv."""
    path = Path(run) / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["round"]) < count]


class Metrics:
    """Metrics of every round: a line of metrics.csv, the progress bar, and the logger if there is one.

    Args:
        path: of metrics.csv. bar: the progress bar. logger: TorchRL's, or None.
        before: rounds that an earlier run has done, as ``read_rounds`` gives them.
    """

    def __init__(self, path: Path, bar: tqdm, logger: Any, before: Sequence[dict[str, Any]] = ()):
        self.path, self.bar, self.logger = path, bar, logger
        self.rows = list(before)
        self._write(self.rows, "w")

    def log(self, round_: int, results: Sequence[Results], update: Mapping[str, float]) -> None:
        """Add a round; ``update`` holds the algorithm's own metrics."""
        row = {"round": round_, **episode_metrics(results), **update}
        known = self.columns()
        self.rows.append(row)
        self._write(*(([row], "a") if known == self.columns() else (self.rows, "w")))
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "accuracy", "nfe")})
        for name, value in row.items() if self.logger else ():
            self.logger.log_scalar(name, value, step=round_)

    def columns(self) -> list[str]:
        """Every metric that some round had (rounds without a gradient step have fewer)."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns())
            if mode == "w" and rows:
                writer.writeheader()
            writer.writerows(rows)


def save_checkpoint(run: Path, policy: Policy, algorithm: Algorithm, progress: dict[str, int]) -> None:
    """Replace the run's checkpoint; a crash on the way leaves the one before."""
    new, old = run / f"{CHECKPOINT}.new", run / f"{CHECKPOINT}.old"
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new / "policy")
    torch.save({**progress, "algorithm": algorithm.state_dict()}, new / "trainer.pt")
    if (run / CHECKPOINT).exists():
        shutil.rmtree(old, ignore_errors=True)
        (run / CHECKPOINT).rename(old)
    new.rename(run / CHECKPOINT)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_of(run: str | Path) -> Path:
    """Where a run's checkpoint lies: a crash while one is replaced leaves the one before beside it.

    Raises:
        ValueError: the folder holds none.
    """
    for path in (Path(run) / CHECKPOINT, Path(run) / f"{CHECKPOINT}.old"):
        if (path / "trainer.pt").is_file():
            return path
    raise ValueError(f"{str(run)!r} holds no {CHECKPOINT}: give a run folder of scripts/train.py")


def resume(folder: str | None, algorithm: Algorithm, device: torch.device) -> dict[str, int]:
    """Load the state of a run; returns how many ``rounds`` it has done and ``prompts`` it has taken."""
    if folder is None:
        return {"rounds": 0, "prompts": 0}
    try:
        path = checkpoint_of(folder) / "trainer.pt"
        state = torch.load(path, map_location=device, weights_only=True)
        algorithm.load_state_dict(state["algorithm"])
        return {name: state[name] for name in ("rounds", "prompts")}
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"resume={folder!r}: its state does not fit the policy and agent of this run: {error}"
        ) from error
