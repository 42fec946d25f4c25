"""Train an unmasking policy, then evaluate it beside every heuristic.

    python scripts/train.py agent=grpo
    python scripts/train.py -m agent=grpo,reinforce,ppo reward.alpha=0.3,1,3 seed=0,1,2

The run folder (outputs/train/...) gets config.yaml, metrics.csv, checkpoints/ and results.{json,csv,png}.
"""

from __future__ import annotations

from command import command
from omegaconf import DictConfig


@command("train")
def main(cfg: DictConfig) -> float:
    from training_run import train_and_report

    return train_and_report(cfg)


if __name__ == "__main__":
    main()
