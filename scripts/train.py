"""Train an unmasking policy, then evaluate it beside every heuristic.

    python scripts/train.py agent=grpo
    python scripts/train.py -m agent=grpo reward.alpha=0.3,1,3 seed=0,1,2

The run folder (outputs/train/...) gets config.yaml, metrics.csv, checkpoint/ and results.{json,csv,png}.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from shared import CHECKPOINT, heuristics, make_envs, make_evaluation_envs, policy_deciders, prepare, report
from tqdm import tqdm

from agents.policies import PolicyDecider, make_actor
from agents.rollout import Results, rollout
from dllm_gym.unmasking import positive


def prompts_of_round(round_: int, count: int, total: int, seed: int) -> np.ndarray:
    """Indices [count] of a round's prompts: passes over shuffled examples, the same whenever they are asked for."""
    positions = np.arange(round_ * count, (round_ + 1) * count)
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(total) for epoch in set(positions // total)}
    return np.array([shuffled[p // total][p % total] for p in positions])


def save_checkpoint(run: Path, policy: torch.nn.Module, algorithm: Any, round_: int) -> None:
    """Replace the run's checkpoint; a crash on the way leaves the one before."""
    new, old = run / f"{CHECKPOINT}.new", run / f"{CHECKPOINT}.old"
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new / "policy")
    torch.save({"round": round_, "algorithm": algorithm.state_dict()}, new / "trainer.pt")
    if (run / CHECKPOINT).exists():
        shutil.rmtree(old, ignore_errors=True)
        (run / CHECKPOINT).rename(old)
    new.rename(run / CHECKPOINT)
    shutil.rmtree(old, ignore_errors=True)


def resume(folder: str | None, algorithm: Any, device: torch.device) -> int:
    """Load the state of a run; returns the number of rounds it has done."""
    if folder is None:
        return 0
    path = Path(folder) / CHECKPOINT / "trainer.pt"
    if not path.is_file():
        raise ValueError(f"resume={folder!r}: {path} does not exist; give a run folder of scripts/train.py")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        algorithm.load_state_dict(state["algorithm"])
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"resume={folder!r}: its state does not fit the policy and agent of this run: {error}"
        ) from error
    return state["round"]


class Metrics:
    """Metrics of every round: a line of metrics.csv, the progress bar, and the logger if there is one."""

    def __init__(self, path: Path, start: int, bar: tqdm, logger: Any):
        self.path, self.bar, self.logger = path, bar, logger
        self.rows: list[dict[str, Any]] = []
        if path.exists():  # a run that goes on in its own folder
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["round"]) < start]
        self._write(self.rows, "w")

    def log(self, round_: int, results: Results, update: Mapping[str, float]) -> None:
        """Add a round; ``update`` holds the algorithm's own metrics."""
        rollout_metrics = {
            "reward": float(results.reward.mean()),
            "accuracy": float(results.score.mean()),
            "nfe": float(results.nfe.float().mean()),
            "empty_steps": results.empty_steps,
            "idle_lanes": results.idle_lanes,
        }
        row = {"round": round_, **rollout_metrics, **update}
        known = self.columns()
        self.rows.append(row)
        self._write(*(([row], "a") if known == self.columns() else (self.rows, "w")))
        self.bar.set_postfix({k: f"{rollout_metrics[k]:.3f}" for k in ("reward", "accuracy", "nfe")})
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


def train(cfg: DictConfig, run: Path, envs: Any, policy: torch.nn.Module) -> bool:
    """The training loop: roll out, update, log, save. Returns False if the user broke it off (with a checkpoint)."""
    distribution = hydra.utils.instantiate(cfg.distribution)
    actor = make_actor(policy, distribution.train, distribution.temperature)
    algorithm = hydra.utils.instantiate(cfg.agent.algorithm, _convert_="all")(actor)
    behaviour = PolicyDecider(policy, distribution.train, distribution.temperature)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.logger else None
    start = resume(cfg.resume, algorithm, envs.device)
    done = start
    with tqdm(total=cfg.rounds, initial=start, desc="training", unit="round") as bar:
        metrics = Metrics(run / "metrics.csv", start, bar, logger)
        try:
            for round_ in range(start, cfg.rounds):
                prompts = prompts_of_round(round_, cfg.prompts_per_round, len(envs.core.examples), cfg.seed)
                group = torch.arange(len(prompts), device=envs.device).repeat_interleave(cfg.agent.group_size)
                examples = prompts.repeat(cfg.agent.group_size)
                seed = int(np.random.default_rng([cfg.seed, round_]).integers(1 << 31))
                batch, results = rollout(envs, behaviour, examples, seed)
                update = algorithm.update(batch, results.reward, group)
                metrics.log(round_, results, update)
                bar.update()
                done = round_ + 1
                if done % cfg.checkpoint_every == 0:
                    save_checkpoint(run, policy, algorithm, done)
        except KeyboardInterrupt:
            save_checkpoint(run, policy, algorithm, done)
            return False
    save_checkpoint(run, policy, algorithm, done)
    return True


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a count that is none, before any work."""
    for name in ("rounds", "prompts_per_round", "num_envs", "checkpoint_every"):
        positive(name, cfg[name])
    positive("agent.group_size", cfg.agent.group_size)
    positive("evaluation.num_envs", cfg.evaluation.num_envs)


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    check_settings(cfg)
    console = Console()
    run, device = prepare(cfg)
    torch.manual_seed(cfg.seed)
    policy = hydra.utils.instantiate(cfg.policy).to(device)
    envs = make_envs(cfg, device, num_envs=cfg.num_envs, split="train", top_k=policy.top_k)
    deciders = {**policy_deciders(policy, cfg.distribution), **heuristics(cfg)}
    test_envs = make_evaluation_envs(cfg, device, deciders)
    for stale in run.glob("results.*"):  # of an earlier run in the same folder
        stale.unlink()
    if not train(cfg, run, envs, policy):
        console.print(f"interrupted, checkpoint saved: go on with resume={run}", highlight=False)
        sys.exit(130)
    rows = report(cfg, test_envs, deciders, run, console)
    return max(row["reward"] for row in rows if row["family"] == "policy")  # what Hydra's optimising sweepers maximise


if __name__ == "__main__":
    main()
