"""What the scripts share: from configs to objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import dllm_gym  # noqa: F401  (registers DLLMUnmask-v0)
from agents.evaluation import Row, comparison, evaluate_rows, save_report, table
from agents.policies import Policy, PolicyDecider
from agents.rollout import Decider
from dllm_gym.vector_env import DLLMUnmaskVectorEnv

CHECKPOINT = "checkpoint"  # folder of a run that holds the policy and the trainer's state
CONFIG = "config.yaml"  # a run's resolved configuration


def prepare(cfg: DictConfig) -> tuple[Path, torch.device]:
    """Threads, the run folder with the resolved configuration in it, and the device."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run / CONFIG, resolve=True)
    if cfg.device != "auto":
        return run, torch.device(cfg.device)
    return run, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_envs(cfg: DictConfig, device: torch.device, **settings: Any) -> DLLMUnmaskVectorEnv:
    """The vector environment of a configuration; ``settings`` are num_envs, split and top_k."""
    groups = {**cfg.model, **cfg.env, **cfg.reward}
    task = hydra.utils.instantiate(cfg.task, _convert_="all")
    return gym.make_vec("DLLMUnmask-v0", task=task, device=device, **groups, **settings)


def make_evaluation_envs(cfg: DictConfig, device: torch.device) -> DLLMUnmaskVectorEnv:
    """The environment of the evaluation, checked against the number of examples asked for."""
    settings = cfg.evaluation
    envs = make_envs(cfg, device, num_envs=settings.num_envs, split=settings.split, top_k=settings.top_k)
    if not 1 <= settings.examples <= len(envs.core.examples):
        raise ValueError(
            f"evaluation.examples={settings.examples}: split {settings.split!r} has {len(envs.core.examples)} examples"
        )
    return envs


def heuristics(cfg: DictConfig) -> dict[str, Decider]:
    rules = hydra.utils.instantiate(cfg.heuristics, _convert_="all")
    return {str(rule): rule for rule in rules}


def policy_deciders(policy: Policy, distribution: DictConfig) -> dict[str, Decider]:
    """The policy as it is evaluated: greedy and sampled."""
    settings = hydra.utils.instantiate(distribution)
    return {
        f"policy({how})": PolicyDecider(policy, settings.evaluate, settings.temperature, greedy=how == "greedy")
        for how in ("greedy", "sampled")
    }


def load_policy(run: str | Path, device: torch.device) -> tuple[Policy, DictConfig]:
    """The policy that a run saved, and the run's configuration.

    Raises:
        ValueError: the folder is no run of scripts/train.py with a checkpoint.
    """
    run = Path(run)
    for needed in (run / CONFIG, run / CHECKPOINT / "policy"):
        if not needed.exists():
            raise ValueError(f"checkpoint={str(run)!r}: {needed} does not exist; give a run folder of scripts/train.py")
    cfg = OmegaConf.load(run / CONFIG)
    policy_class = hydra.utils.get_class(cfg.policy._target_)
    return policy_class.from_pretrained(run / CHECKPOINT / "policy").to(device).eval(), cfg


def report(
    cfg: DictConfig, envs: DLLMUnmaskVectorEnv, deciders: Mapping[str, Decider], run: Path, console: Any
) -> list[Row]:
    """Evaluate, print the table, write results.{json,csv,png} into the run folder."""
    settings = cfg.evaluation
    rows = evaluate_rows(envs, deciders, range(settings.examples), settings.seeds)
    core = envs.core
    title = f"{core.task.name}, {settings.examples} {settings.split} examples, L = {core.L}, BL = {core.block_length}"
    console.print(table(rows, title))
    for sentence in comparison(rows):
        console.print(sentence, highlight=False)
    save_report(rows, run, title)
    console.print(f"written: {run}/results.json, results.csv, results.png", highlight=False)
    return rows
