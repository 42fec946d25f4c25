"""Train the small dLLM that ships with dllm_gym, and write it in LLaDA's own checkpoint format.

    python scripts/pretrain_tiny.py            # the shipped weights: config, seed and all

The objective is LLaDA's (arXiv 2502.09992, eq. 3): mask a random share of the completion, predict what was masked. Two
things make it learn arithmetic in an hour on two cores: half of its rows are masked the way decoding in blocks meets
them (clean left of a cut, fully masked right of a window), and chains grow from one operation to four. Matrices are
trained with Muon, the rest with AdamW.
"""

from __future__ import annotations

from command import command
from omegaconf import DictConfig


@command("pretrain_tiny")
def main(cfg: DictConfig) -> None:
    from pretraining import pretrain

    pretrain(cfg)


if __name__ == "__main__":
    main()
