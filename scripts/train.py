"""Train an unmasking policy, then evaluate it beside every heuristic.

    python scripts/train.py agent=grpo
    python scripts/train.py -m agent=grpo,upo,ppo reward.alpha=0.3,1,3 seed=0,1,2

The run folder (outputs/train/...) gets config.yaml, metrics.csv, checkpoint/ and results.{json,csv,png}.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from shared import (
    check_evaluation,
    chosen_names,
    heuristics,
    load_config,
    load_policy,
    make_envs,
    make_evaluation_envs,
    make_policy,
    policy_deciders,
    policy_rewards,
    prepare,
    report,
    requirements,
)
from tqdm import tqdm

from agents.algorithm import Algorithm
from agents.policies import Policy, PolicyDecider, make_actor
from agents.training import Collector, Metrics, Prompts, read_rounds, resume, save_checkpoint
from dllm_gym.checks import whole
from dllm_gym.vector_env import DLLMUnmaskVectorEnv

FREE = ("rounds", "num_envs", "checkpoint_every", "device", "threads", "evaluation", "heuristics", "logger", "resume")


def go_on(cfg: DictConfig) -> None:
    """Let a resumed run be the run that it resumes: only what does not change the learning may be chosen anew.

    Raises:
        ValueError: the command line changes another setting.
    """
    saved, chosen = load_config(cfg.resume, "resume"), chosen_names()
    for name in saved:
        if OmegaConf.is_config(saved[name]) and OmegaConf.is_config(cfg.get(name)):
            saved[name] = with_new_settings(saved[name], cfg[name])
        if name in FREE:
            if not any(n.partition(".")[0] == name for n in (*chosen, "resume")):
                cfg[name] = saved[name]
        elif any(n.partition(".")[0] == name for n in chosen) and not same(cfg.get(name), saved[name]):
            raise ValueError(f"resume={cfg.resume!r}: {name} differs from the run's own; only {', '.join(FREE)} may")
        else:
            OmegaConf.update(cfg, name, saved[name], merge=False, force_add=True)
    steps = "agent.algorithm.scheduler.num_training_steps"
    if OmegaConf.select(cfg, steps) == saved.rounds:  # the schedule that ends with the run still does
        OmegaConf.update(cfg, steps, cfg.rounds)


def with_new_settings(saved: Any, today: Any) -> Any:
    """Saved settings, and those that have come up since the run was saved."""
    if (
        not isinstance(saved, DictConfig)
        or not isinstance(today, DictConfig)
        or saved.get("_target_") != today.get("_target_")
    ):
        return saved
    return OmegaConf.merge({name: value for name, value in today.items() if name not in saved}, saved)


def same(one: Any, other: Any) -> bool:
    """Whether two parts of configurations say the same, once resolved; the schedule's length goes with the rounds."""
    texts = []
    for part in (one, other):
        plain = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        if isinstance(plain, dict):
            plain.get("algorithm", {}).get("scheduler", {}).pop("num_training_steps", None)
            plain = {key: value for key, value in plain.items() if key != "hidden_size"}  # null is the model's own
        texts.append(plain)
    return texts[0] == texts[1]


class Interrupt:
    """Ctrl-C ends the training after the round that runs; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        tqdm.write("interrupted: this round is finished and saved; once more to stop at once")

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)


@dataclass
class Learner:
    """What learns: the network, the algorithm that trains it, and the player that it is while it learns."""

    policy: Policy
    algorithm: Algorithm
    player: PolicyDecider


def make_learner(cfg: DictConfig, policy: Policy) -> Learner:
    """The algorithm on a policy; ValueError for a combination that makes no sense."""
    distribution = hydra.utils.instantiate(cfg.distribution)
    actor = make_actor(policy, distribution.train, distribution.temperature)
    algorithm = hydra.utils.instantiate(cfg.agent.algorithm, _convert_="all")(actor)
    player = PolicyDecider(policy, distribution.train, distribution.temperature)
    algorithm.players(player, cfg.agent.group_size)
    if cfg.agent.max_batches > 1 and not algorithm.compares:
        raise ValueError(
            f"agent.max_batches={cfg.agent.max_batches}: {type(algorithm).__name__} learns from groups with equal "
            "rewards, too; only agents that compare within a group may replace them"
        )
    return Learner(policy, algorithm, player)


def train(cfg: DictConfig, run: Path, envs: DLLMUnmaskVectorEnv, learner: Learner) -> bool:
    """The training loop: roll out, update, log, save. Returns False if the user broke it off (with a checkpoint)."""
    progress = resume(cfg.resume, learner.algorithm, envs.device)
    before = read_rounds(cfg.resume, progress["rounds"]) if cfg.resume else []
    prompts = Prompts(len(envs.core.examples), cfg.seed, progress["prompts"])
    counts = {name: cfg.agent[name] for name in ("group_size", "max_batches")}
    collector = Collector(envs, prompts, cfg.seed, cfg.prompts_per_round, **counts)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.logger else None
    with tqdm(total=cfg.rounds, initial=progress["rounds"], desc="training", unit="round") as bar, Interrupt() as stop:
        metrics = Metrics(run / "metrics.csv", bar, logger, before)
        for round_ in range(progress["rounds"], cfg.rounds):
            start = time.perf_counter()
            episodes = collector.collect(learner.algorithm, learner.player)
            update = learner.algorithm.update(episodes.batch, episodes.reward, episodes.group)
            seconds = time.perf_counter() - start
            metrics.log(
                round_, episodes.results, {**update, "equal_groups": collector.equal_groups, "seconds": seconds}
            )
            bar.update()
            progress = {"rounds": round_ + 1, "prompts": prompts.taken}
            if progress["rounds"] % cfg.checkpoint_every == 0 or stop.asked:
                save_checkpoint(run, learner.policy, learner.algorithm, progress)
            if stop.asked:
                return False
    save_checkpoint(run, learner.policy, learner.algorithm, progress)
    return True


def warm_start(cfg: DictConfig, policy: Policy) -> None:
    """Begin from the policy of another run (of agent=imitation, say)."""
    if cfg.agent.warm_start is None:
        return
    trained, _ = load_policy(cfg.agent.warm_start, "agent.warm_start")
    if type(trained) is not type(policy) or trained.settings != policy.settings:
        raise ValueError(
            f"agent.warm_start={cfg.agent.warm_start!r}: its policy is {type(trained).__name__}({trained.settings}), "
            f"this run's {type(policy).__name__}({policy.settings})"
        )
    policy.load_state_dict(trained.state_dict())


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a count that is none, before any work."""
    for name in ("rounds", "prompts_per_round", "num_envs", "checkpoint_every"):
        whole(name, cfg[name])
    for name in ("group_size", "max_batches"):
        whole(f"agent.{name}", cfg.agent[name])
    whole("seed", cfg.seed, least=0)
    check_evaluation(cfg)


@hydra.main(version_base=None, config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    if cfg.resume is not None:
        go_on(cfg)
    check_settings(cfg)
    console = Console()
    run, device = prepare(cfg)
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg, device)
    warm_start(cfg, policy)
    learner = make_learner(cfg, policy)
    settings = {"num_envs": cfg.num_envs, "split": "train", "max_prompt_length": cfg.max_prompt_length}
    envs = make_envs(cfg, device, **settings, **requirements([policy, learner.algorithm]))
    deciders = {**policy_deciders(policy, cfg), **heuristics(cfg)}
    test_envs = make_evaluation_envs(cfg, device, deciders)
    for stale in run.glob("results.*"):  # of an earlier run in the same folder
        stale.unlink()
    if not train(cfg, run, envs, learner):
        console.print(f"interrupted, checkpoint saved: go on with resume={run}", highlight=False)
        sys.exit(130)
    rows = report(cfg, test_envs, deciders, run, console)
    return max(policy_rewards(rows).values())  # what Hydra's optimising sweepers maximise


if __name__ == "__main__":
    main()
