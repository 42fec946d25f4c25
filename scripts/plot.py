"""Draw accuracy against NFE from one or more results.json.

python scripts/plot.py results=outputs/train/2026-01-01_12-00-00/results.json picture=front.png
"""

from __future__ import annotations

from pathlib import Path

from command import command
from omegaconf import DictConfig, ListConfig

from agents.evaluation import read_points
from agents.pictures import plot
from dllm_gym.checks import distinct, text, writable
from dllm_gym.runs.files import atomically

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
DRAWN = ("accuracy", "accuracy_low", "accuracy_high", "nfe", "nfe_low", "nfe_high")


@command("plot")
def main(cfg: DictConfig) -> None:
    writable("picture", cfg.picture, PICTURES)
    paths = distinct("results", cfg.results if isinstance(cfg.results, ListConfig) else [cfg.results])
    for path in paths:
        text("results", path)
    rows = [{**row, "run": path} for path in paths for row in read_points(Path(path), DRAWN)]
    unique = {(row["name"], row["nfe"], row["accuracy"]): row for row in rows}  # heuristics that several runs share
    atomically(Path(cfg.picture), lambda path: plot(list(unique.values()), path, cfg.title))
    print(f"written: {cfg.picture}")


if __name__ == "__main__":
    main()
