"""Train an unmasking policy, then evaluate it beside every heuristic.

    python scripts/train.py agent=grpo
    python scripts/train.py -m agent=grpo reward.alpha=0.3,1,3 seed=0,1,2

The run folder (outputs/train/...) gets config.yaml, metrics.csv, checkpoint/ and results.{json,csv,png}.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
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


def prompts_of_round(round_: int, count: int, total: int, seed: int) -> np.ndarray:
    """Indices [count] of a round's prompts: passes over shuffled examples, the same whenever they are asked for."""
    positions = np.arange(round_ * count, (round_ + 1) * count)
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(total) for epoch in set(positions // total)}
    return np.array([shuffled[p // total][p % total] for p in positions])


def save_checkpoint(run: Path, policy: torch.nn.Module, algorithm: Any, round_: int) -> None:
    """Replace the run's checkpoint; a crash on the way leaves the one before."""
    new, old = run / f"{CHECKPOINT}.new", run / f"{CHECKPOINT}.old"
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    policy.save_pretrained(new / "policy")
    torch.save({"round": round_, "algorithm": algorithm.state_dict()}, new / "trainer.pt")
    if (run / CHECKPOINT).exists():
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
    state = torch.load(path, map_location=device, weights_only=True)
    algorithm.load_state_dict(state["algorithm"])
    return state["round"]


class Metrics:
    """Metrics of every round: a line of metrics.csv, the progress bar, and the logger if there is one."""

    def __init__(self, run: Path, bar: tqdm, logger: Any):
        self.file = (run / "metrics.csv").open("w", newline="")
        self.bar, self.logger, self.writer = bar, logger, None

    def log(self, round_: int, results: Results, update: Mapping[str, float]) -> None:
        rollout_metrics = {
            "reward": float(results.reward.mean()),
            "accuracy": float(results.score.mean()),
            "nfe": float(results.nfe.float().mean()),
            "empty_steps": results.empty_steps,
            "idle_lanes": results.idle_lanes,
        }
        row = {"round": round_, **rollout_metrics, **update}
        if self.writer is None:
            columns = [*row, *(c for c in ("loss", "clip_fraction", "kl_approx", "grad_norm") if c not in row)]
            self.writer = csv.DictWriter(self.file, columns, extrasaction="ignore")
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()
        self.bar.set_postfix({k: f"{rollout_metrics[k]:.3f}" for k in ("reward", "accuracy", "nfe")})
        for name, value in row.items() if self.logger else ():
            self.logger.log_scalar(name, value, step=round_)


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
        metrics = Metrics(run, bar, logger)
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
        finally:
            metrics.file.close()
    save_checkpoint(run, policy, algorithm, done)
    return True


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    console = Console()
    run, device = prepare(cfg)
    torch.manual_seed(cfg.seed)
    policy = hydra.utils.instantiate(cfg.policy).to(device)
    envs = make_envs(cfg, device, num_envs=cfg.num_envs, split="train", top_k=policy.top_k)
    test_envs = make_evaluation_envs(cfg, device)
    deciders = {**policy_deciders(policy, cfg.distribution), **heuristics(cfg)}
    if not train(cfg, run, envs, policy):
        console.print(f"interrupted, checkpoint saved: go on with resume={run}", highlight=False)
        return None
    rows = report(cfg, test_envs, deciders, run, console)
    return max(row["reward"] for row in rows if row["family"] == "policy")  # what Hydra's optimising sweepers maximise


if __name__ == "__main__":
    main()
