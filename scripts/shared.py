"""What the scripts share: from configs to objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from run_folder import RunFolder

import dllm_gym  # noqa: F401  (registers DLLMUnmask-v0)
from agents.evaluation import Row, comparison, evaluate_rows, save_report, table
from agents.policies import Policy, PolicyDecider
from agents.rollout import Decider, evaluate
from dllm_gym.checks import whole
from dllm_gym.models import DLLM, load_dllm
from dllm_gym.models.load import check_device
from dllm_gym.rewards import AlphaRange
from dllm_gym.vector_env import DLLMUnmaskVectorEnv

COUNTS, FLAGS = ("top_k", "kl"), ("hidden", "entropy", "margin")  # the environment's observation settings


def prepare(cfg: DictConfig) -> torch.device:
    """Sets torch's threads; returns the device."""
    if cfg.threads is not None:
        torch.set_num_threads(whole("threads", cfg.threads))
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    return check_device(wanted)


def make_envs(cfg: DictConfig, device: torch.device, **settings: Any) -> DLLMUnmaskVectorEnv:
    """The vector environment of a configuration; ``settings`` are num_envs, split and what the deciders need."""
    task = hydra.utils.instantiate(cfg.task, _convert_="all")
    dllm = make_dllm(cfg, device)
    chosen = {**cfg.env, **cfg.reward}
    for name, value in settings.items():  # of what the user and the deciders ask for the larger counts
        chosen[name] = max(chosen.get(name) or 0, value) if name in (*COUNTS, *FLAGS) else value
    return gym.make_vec("DLLMUnmask-v0", model=dllm, task=task, device=dllm.device, **chosen)


def make_dllm(cfg: DictConfig, device: torch.device) -> DLLM:
    """The frozen dLLM of a configuration: ``cfg.model`` are the arguments of ``load_dllm``."""
    return load_dllm(**OmegaConf.to_container(cfg.model, resolve=True), device=device)


def make_policy(cfg: DictConfig, device: torch.device) -> Policy:
    """The policy network of a configuration; ``hidden_size: null`` is the dLLM's own width."""
    if "hidden_size" in cfg.policy and cfg.policy.hidden_size is None:
        cfg.policy.hidden_size = make_dllm(cfg, device).hidden_size
    return hydra.utils.instantiate(cfg.policy, _convert_="all").to(device)


def requirements(deciders: Iterable[Any]) -> dict[str, int]:
    """The least settings of an environment that all of these deciders can read: the largest of each."""
    needs: dict[str, int] = {}
    for decider in deciders:
        for name, least in getattr(decider, "requires", {}).items():
            needs[name] = max(needs.get(name, 0), int(least))
    return needs


def make_evaluation_envs(cfg: DictConfig, device: torch.device, deciders: Mapping[str, Decider]) -> DLLMUnmaskVectorEnv:
    """The environment of the evaluation, in which every decider has been tried once: what does not fit fails now."""
    settings = cfg.evaluation
    needs = requirements(deciders.values())
    envs = make_envs(cfg, device, num_envs=settings.num_envs, split=settings.split, **needs)
    total = len(envs.core.examples)
    if settings.examples is None:
        settings.examples = total
    if not 1 <= settings.examples <= total:
        raise ValueError(f"evaluation.examples={settings.examples}: split {settings.split!r} has {total} examples")
    for decider in deciders.values():
        evaluate(envs, decider, [0])
    return envs


def heuristics(cfg: DictConfig) -> dict[str, Decider]:
    """The configured rules by name; a rule that is listed twice would hide a row of the table."""
    rules = hydra.utils.instantiate(cfg.heuristics, _convert_="all")
    named = {str(rule): rule for rule in rules}
    if len(named) < len(rules):
        raise ValueError(f"heuristics: of {[str(rule) for rule in rules]} some are the same")
    return named


def policy_deciders(policy: Policy, cfg: DictConfig) -> dict[str, Decider]:
    """The policy as ``cfg`` evaluates it: greedy and sampled, and if it reads a preference with several alphas."""
    settings = hydra.utils.instantiate(cfg.distribution)
    temperature = settings.evaluate_temperature
    knobs = {f", alpha={a:.3g}": a for a in alphas(cfg)} if "preference" in policy.in_keys else {"": None}
    return {
        f"policy({how}{label})": PolicyDecider(policy, settings.evaluate, temperature, how == "greedy", alpha)
        for how in ("greedy", "sampled")
        for label, alpha in knobs.items()
    }


def alphas(cfg: DictConfig) -> list[float]:
    """The alphas that a policy with a preference is evaluated with: those chosen, or seven over the reward's range.

    Raises:
        ValueError: the reward has no range, or one of those chosen lies outside of it.
    """
    span = AlphaRange.of(cfg.reward.alpha)
    if span is None:
        raise ValueError(f"reward.alpha={cfg.reward.alpha}: this policy reads a preference, give a range [low, high]")
    chosen = cfg.evaluation.get("alphas")
    if chosen is None:
        return [span.alpha(i / 6) for i in range(7)]
    if not isinstance(chosen, ListConfig) or not all(span.low <= alpha <= span.high for alpha in chosen):
        raise ValueError(f"evaluation.alphas={chosen}: need a list of numbers from {span.low:g} to {span.high:g}")
    return [float(alpha) for alpha in chosen]


def policy_rewards(rows: Iterable[Row]) -> dict[str, float]:
    """Mean reward of the policy's rows, greedy and sampled: over alphas, if there are several."""
    found: dict[str, list[float]] = {}
    for row in (row for row in rows if row["family"] == "policy"):
        found.setdefault(row["name"].strip(")").partition("(")[2].partition(",")[0], []).append(row["reward"])
    return {how: sum(rewards) / len(rewards) for how, rewards in found.items()}


def chosen_names() -> set[str]:
    """What the command line sets, such as ``env.block_length`` and ``task``."""
    return {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}


def take_over(cfg: DictConfig, trained: DictConfig) -> None:
    """Let ``cfg`` use the model, task, env and reward that a policy was trained with, but for what the user chose."""
    chosen = chosen_names()
    for group in ("model", "task", "env", "reward"):
        if group in chosen:
            continue
        own, cfg[group] = cfg[group], trained[group]
        for name in (n.removeprefix(f"{group}.") for n in chosen if n.startswith(f"{group}.")):
            OmegaConf.update(cfg[group], name, OmegaConf.select(own, name), force_add=True)


def check_evaluation(cfg: DictConfig) -> None:
    """ValueError for an evaluation that could not be done, before any work."""
    settings = cfg.evaluation
    whole("evaluation.num_envs", settings.num_envs)
    if settings.examples is not None:
        whole("evaluation.examples", settings.examples)
    if not isinstance(settings.seeds, ListConfig) or not settings.seeds:
        raise ValueError(f"evaluation.seeds={settings.seeds}: need a list of whole numbers, e.g. [42,43,44]")
    for seed in settings.seeds:
        whole("evaluation.seeds", seed, least=0)


def report(
    cfg: DictConfig, envs: DLLMUnmaskVectorEnv, deciders: Mapping[str, Decider], run: RunFolder, console: Any
) -> list[Row]:
    """Evaluate, print the table, write results.{json,csv,png} into the run folder."""
    settings = cfg.evaluation
    rows = evaluate_rows(envs, deciders, range(settings.examples), settings.seeds)
    run.begin()  # an evaluation that was broken off leaves nothing
    core = envs.core
    title = f"{core.task.name}, {settings.examples} {settings.split} examples, L = {core.L}, BL = {core.block_length}"
    console.print(table(rows, title))
    for sentence in comparison(rows):
        console.print(sentence, highlight=False)
    save_report(rows, run.path, title)
    console.print(f"written: {run.path}/results.json, results.csv, results.png", highlight=False)
    return rows
