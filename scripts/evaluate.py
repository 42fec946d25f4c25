"""Evaluate heuristics and, with ``checkpoint=``, trained policies.

    python scripts/evaluate.py task=arithmetic env=semi_autoregressive
    python scripts/evaluate.py checkpoint=outputs/train/2026-01-01_12-00-00 evaluation.examples=2000
    python scripts/evaluate.py checkpoint=[RUN@first,RUN@best] temperature=[0.5,1] hydra.run.dir=outputs/mine

A policy is evaluated on the model, task, env and reward it was trained with, unless the command line names others;
several policies must agree in what it does not name. The run folder (outputs/evaluate/...) gets generations.jsonl, an
episode per line, while the evaluation goes on, and results.{json,csv,md,png}, fronts.json and, of a mixture of tasks,
datasets.{json,csv} at its end. The same
command in the same folder (hydra.run.dir=...) plays only what is not there yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from command import command, console
from omegaconf import DictConfig, ListConfig, OmegaConf

from dllm_gym.checks import distinct, flag, number, text

if TYPE_CHECKING:
    import torch

    from agents.rollout import Decider


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from factory import (
        about,
        check_evaluation,
        heuristics,
        make_evaluation_envs,
        prepare,
        refuse_a_range_that_nothing_reads,
        report,
    )
    from run_folder import GENERATIONS, RunFolder

    from agents.generations import Generations, Lab

    check_evaluation(cfg)
    flag("generations", cfg.generations)
    rules = heuristics(cfg)
    checkpoints, temperatures = listed("checkpoint", cfg.checkpoint), listed("temperature", cfg.temperature)
    if not checkpoints and (temperatures or not rules):
        raise ValueError("checkpoint=null: nothing to evaluate but heuristics, and they have no temperature")
    for name in checkpoints:
        text("checkpoint", name)
    for temperature in temperatures:
        number("temperature", temperature, above=0)
    device = prepare(cfg)
    deciders = {**policies(cfg, checkpoints, temperatures, device), **rules}
    refuse_a_range_that_nothing_reads(cfg, deciders.values())
    with RunFolder(cfg) as run:
        run.refuse_another_run(resumes=GENERATIONS)
        envs = make_evaluation_envs(cfg, deciders)
        with Generations(run.path / GENERATIONS if cfg.generations else None) as known:
            run.begin()
            report(cfg, Lab(envs, known, about(cfg)), deciders, run, console())


def listed(name: str, value: Any) -> list[Any]:
    """The values of a setting that takes null, one or a list of them."""
    if value is None:
        return []
    return distinct(name, list(value)) if isinstance(value, ListConfig) else [value]


def policies(
    cfg: DictConfig, checkpoints: list[str], temperatures: list[float], device: torch.device
) -> dict[str, Decider]:
    """The policies of these checkpoints; ``cfg`` takes over what they were trained with."""
    from factory import policy_deciders, take_over
    from run_folder import load_policy, naming

    found: dict[str, Decider] = {}
    own, loaded = cfg.copy(), [load_policy(name, cfg) for name in checkpoints]
    for name, label, (policy, trained) in zip(checkpoints, labels(checkpoints), loaded, strict=True):
        other = own.copy() if found else cfg
        with naming("checkpoint", name):
            take_over(other, trained)
        for group in ("model", "task", "env", "reward"):
            if OmegaConf.to_container(other[group], resolve=True) != OmegaConf.to_container(cfg[group], resolve=True):
                raise ValueError(
                    f"checkpoint: {name} was trained with another {group} than {checkpoints[0]}: choose what they are "
                    f"compared in ({group}=... or {group}.NAME=...)"
                )
        settings = {"distribution": trained.distribution, "reward": cfg.reward, "evaluation": cfg.evaluation}
        found |= policy_deciders(policy.to(device), OmegaConf.create(settings), temperatures or None, label)
    return found


def labels(checkpoints: list[str]) -> list[str]:
    """How the table tells checkpoints apart: RUN@100 without the folders above; nothing if there is only one."""
    from run_folder import short

    if len(checkpoints) < 2:
        return [""] * len(checkpoints)
    names = [short(name) for name in checkpoints]
    return names if len(set(names)) == len(names) else checkpoints


if __name__ == "__main__":
    main()
