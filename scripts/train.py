"""Train an unmasking policy, then evaluate it beside every heuristic.

    python scripts/train.py agent=grpo
    python scripts/train.py -m agent=grpo,upo,ppo reward.alpha=0.3,1,3 seed=0,1,2

The run folder (outputs/train/...) gets config.yaml, metrics.csv, checkpoint/ and results.{json,csv,png}.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from shared import (
    heuristics,
    load_policy,
    make_envs,
    make_evaluation_envs,
    make_policy,
    policy_deciders,
    prepare,
    report,
    requirements,
)
from tqdm import tqdm

from agents.algorithm import Algorithm
from agents.policies import Policy, PolicyDecider, make_actor
from agents.training import Collector, Metrics, Prompts, resume, save_checkpoint
from dllm_gym.unmasking import positive
from dllm_gym.vector_env import DLLMUnmaskVectorEnv


def make_algorithm(cfg: DictConfig, policy: Policy) -> tuple[Algorithm, PolicyDecider]:
    """The algorithm, and the policy as it plays while it learns."""
    distribution = hydra.utils.instantiate(cfg.distribution)
    actor = make_actor(policy, distribution.train, distribution.temperature)
    algorithm = hydra.utils.instantiate(cfg.agent.algorithm, _convert_="all")(actor)
    return algorithm, PolicyDecider(policy, distribution.train, distribution.temperature)


def train(cfg: DictConfig, run: Path, envs: DLLMUnmaskVectorEnv, policy: Policy) -> bool:
    """The training loop: roll out, update, log, save. Returns False if the user broke it off (with a checkpoint)."""
    algorithm, behaviour = make_algorithm(cfg, policy)
    progress = resume(cfg.resume, algorithm, envs.device)
    prompts = Prompts(len(envs.core.examples), cfg.seed, progress["prompts"])
    counts = {name: cfg.agent[name] for name in ("group_size", "max_batches")}
    collector = Collector(envs, prompts, cfg.seed, cfg.prompts_per_round, **counts)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.logger else None
    with tqdm(total=cfg.rounds, initial=progress["rounds"], desc="training", unit="round") as bar:
        metrics = Metrics(run / "metrics.csv", progress["rounds"], bar, logger)
        try:
            for round_ in range(progress["rounds"], cfg.rounds):
                start = time.perf_counter()
                episodes = collector.collect(algorithm, behaviour)
                update = algorithm.update(episodes.batch, episodes.reward, episodes.group)
                metrics.log(round_, episodes.results, {**update, "seconds": time.perf_counter() - start})
                bar.update()
                progress = {"rounds": round_ + 1, "prompts": prompts.taken}
                if progress["rounds"] % cfg.checkpoint_every == 0:
                    save_checkpoint(run, policy, algorithm, progress)
        except KeyboardInterrupt:
            save_checkpoint(run, policy, algorithm, progress)
            return False
    save_checkpoint(run, policy, algorithm, progress)
    return True


def warm_start(cfg: DictConfig, policy: Policy) -> None:
    """Begin from the policy of another run (of agent=imitation, say)."""
    if cfg.agent.warm_start is None:
        return
    trained, _ = load_policy(cfg.agent.warm_start)
    if type(trained) is not type(policy) or trained.settings != policy.settings:
        raise ValueError(
            f"agent.warm_start={cfg.agent.warm_start!r}: its policy is {type(trained).__name__}({trained.settings}), "
            f"this run's {type(policy).__name__}({policy.settings})"
        )
    policy.load_state_dict(trained.state_dict())


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a count that is none, before any work."""
    for name in ("rounds", "prompts_per_round", "num_envs", "checkpoint_every"):
        positive(name, cfg[name])
    for name in ("group_size", "max_batches"):
        positive(f"agent.{name}", cfg.agent[name])
    positive("evaluation.num_envs", cfg.evaluation.num_envs)


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    check_settings(cfg)
    console = Console()
    run, device = prepare(cfg)
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg, device)
    warm_start(cfg, policy)
    make_algorithm(cfg, copy.deepcopy(policy))  # a combination that makes no sense is named now
    settings = {"num_envs": cfg.num_envs, "split": "train", "max_prompt_length": cfg.max_prompt_length}
    envs = make_envs(cfg, device, **settings, **requirements([policy]))
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
