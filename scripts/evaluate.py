"""Evaluate heuristics and, with ``checkpoint=``, a trained policy.

    python scripts/evaluate.py task=arithmetic env=semi_autoregressive
    python scripts/evaluate.py checkpoint=outputs/train/2026-01-01_12-00-00 evaluation.examples=2000

A policy is evaluated on the model, task, env and reward it was trained with, unless the command line names others.
The run folder (outputs/evaluate/...) gets results.{json,csv,png}.
"""

from __future__ import annotations

from command import command, console
from omegaconf import DictConfig, OmegaConf

from dllm_gym.checks import number, text


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from factory import (
        check_evaluation,
        heuristics,
        make_evaluation_envs,
        policy_deciders,
        prepare,
        refuse_a_range_that_nothing_reads,
        report,
        take_over,
    )
    from run_folder import RunFolder, load_policy

    check_evaluation(cfg)
    deciders = heuristics(cfg)
    if cfg.checkpoint is None and (cfg.temperature is not None or not deciders):
        raise ValueError("checkpoint=null: nothing to evaluate but heuristics, and they have no temperature")
    if cfg.checkpoint is not None:
        text("checkpoint", cfg.checkpoint)
    if cfg.temperature is not None:
        number("temperature", cfg.temperature, above=0)
    device = prepare(cfg)
    if cfg.checkpoint is not None:
        policy, trained = load_policy(cfg.checkpoint, cfg)
        take_over(cfg, trained)
        if cfg.temperature is not None:
            trained.distribution.evaluate_temperature = cfg.temperature
        settings = {"distribution": trained.distribution, "reward": cfg.reward, "evaluation": cfg.evaluation}
        deciders = {**policy_deciders(policy.to(device), OmegaConf.create(settings)), **deciders}
    refuse_a_range_that_nothing_reads(cfg, deciders.values())
    with RunFolder(cfg) as run:
        run.refuse_another_run()
        report(cfg, make_evaluation_envs(cfg, device, deciders), deciders, run, console())


if __name__ == "__main__":
    main()
