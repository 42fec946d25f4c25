"""One comparable table of several training runs and evaluations, means and standard deviations over seeds.

    python scripts/train.py -m agent=grpo,reinforce,ppo reward.alpha=0.3,1,3 seed=0,1,2
    python scripts/compare.py runs=multirun/train/2026-01-01_12-00-00 table=comparison.md

The columns are the choices in which the runs differ; runs of one configuration that differ in their seed make a row.
The best reward is first where all runs were paid by the same reward. Minutes are those of training, without evaluation.
An evaluation (scripts/evaluate.py) has a row for each of its policies, and one for its best rule by reward.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from command import command, console
from omegaconf import DictConfig, ListConfig
from rich.table import Table
from run_folder import allowed

from agents.evaluation import markdown
from agents.reproduction.comparison import as_numbers, as_text, over_seeds, read_runs
from dllm_gym.checks import distinct, text, writable
from dllm_gym.runs.files import atomically


def comma_separated(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@command("compare")
def main(cfg: DictConfig) -> None:
    folders = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    for folder in distinct("runs", folders):
        text("runs", folder)
    if cfg.table is not None:
        writable("table", cfg.table, (".csv", ".md"))
    rows = over_seeds(read_runs(folders, cfg.evaluated, allowed(cfg)))
    texts = [as_text(row) for row in rows]
    table = Table(title=f"policy ({cfg.evaluated}) of every run, mean ± standard deviation over seeds")
    for name in texts[0]:
        table.add_column(name, justify="left" if name in rows[0].label else "right")
    for line in texts:
        table.add_row(*line.values())
    console(width=160).print(table)
    if cfg.table is not None:
        is_markdown = Path(cfg.table).suffix.lower() == ".md"
        content = markdown(texts) if is_markdown else comma_separated([as_numbers(row) for row in rows])
        atomically(Path(cfg.table), lambda path: path.write_text(content))
        print(f"written: {cfg.table}")


if __name__ == "__main__":
    main()
