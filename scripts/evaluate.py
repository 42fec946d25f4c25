"""Evaluate heuristics and, with ``checkpoint=``, a trained policy.

    python scripts/evaluate.py task=arithmetic env=semi_autoregressive
    python scripts/evaluate.py checkpoint=outputs/train/2026-01-01_12-00-00 evaluation.examples=2000

The run folder (outputs/evaluate/...) gets results.{json,csv,png}.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from rich.console import Console
from shared import heuristics, load_policy, make_evaluation_envs, policy_deciders, prepare, report


@hydra.main(version_base=None, config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    run, device = prepare(cfg)
    deciders = heuristics(cfg)
    if cfg.checkpoint is not None:
        policy, trained = load_policy(cfg.checkpoint, device)
        deciders = {**policy_deciders(policy, trained.distribution), **deciders}
    report(cfg, make_evaluation_envs(cfg, device), deciders, run, Console())


if __name__ == "__main__":
    main()
