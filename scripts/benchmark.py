"""How fast the environment steps, and what share of the time is not the dLLM's forward.

    python scripts/benchmark.py num_envs=[16,128] task=arithmetic

Settings run in turn, ``repeats`` times; the table shows medians with minimum and maximum.
"""

from __future__ import annotations

import json
import time
from statistics import median

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from shared import make_envs, prepare, requirements

from agents.evaluation import atomically
from agents.rollout import Decider, evaluate
from dllm_gym.models import DLLM
from dllm_gym.vector_env import DLLMUnmaskVectorEnv


class ForwardClock:
    """Seconds spent in a dLLM's ``predict`` while it is active."""

    def __init__(self, dllm: DLLM):
        self.dllm, self.seconds = dllm, 0.0

    def __enter__(self) -> ForwardClock:
        plain = self.dllm.predict

        def timed(*args, **kwargs):
            start = now(self.dllm.device)
            prediction = plain(*args, **kwargs)
            self.seconds += now(self.dllm.device) - start
            return prediction

        self.dllm.predict = timed  # shadows the method on this object only
        return self

    def __exit__(self, *exception) -> None:
        del self.dllm.predict


def now(device: torch.device) -> float:
    """Wall-clock seconds once the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(envs: DLLMUnmaskVectorEnv, decider: Decider, episodes: int) -> dict[str, float]:
    """One run: rates per second and the share of time outside the forward."""
    steps_before = envs.core.lane_steps
    with ForwardClock(envs.core.dllm) as clock:
        start = now(envs.device)
        results = evaluate(envs, decider, range(episodes))
        seconds = now(envs.device) - start
    return {
        "episodes/s": episodes / seconds,
        "env steps/s": (envs.core.lane_steps - steps_before) / seconds,
        "row forwards/s": results.row_forwards / seconds,
        "outside forward": 1 - clock.seconds / seconds,
    }


@hydra.main(version_base=None, config_path="../conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    run, device = prepare(cfg)
    decider = hydra.utils.instantiate(cfg.decider)
    envs = {n: make_envs(cfg, device, num_envs=n, split="test", **requirements([decider])) for n in cfg.num_envs}
    episodes = {n: max(1, cfg.episodes // (16 if n == 1 else 1)) for n in envs}
    measured: dict[int, list[dict[str, float]]] = {n: [] for n in envs}
    for n in envs:
        measure(envs[n], decider, min(episodes[n], 2 * n))  # warm up
    for _ in range(cfg.repeats):
        for n in envs:
            measured[n].append(measure(envs[n], decider, episodes[n]))
    table = Table(title=f"{next(iter(envs.values())).core.task.name}, {decider}, {device}, {cfg.repeats} runs")
    table.add_column("lanes", justify="right")
    for column in measured[cfg.num_envs[0]][0]:
        table.add_column(column, justify="right")
    for n, runs in measured.items():
        columns = [[r[c] for r in runs] for c in runs[0]]
        table.add_row(str(n), *(f"{median(c):.3g} ({min(c):.3g} - {max(c):.3g})" for c in columns))
    Console(width=140).print(table)
    atomically(run / "benchmark.json", lambda path: path.write_text(json.dumps(measured, indent=2) + "\n"))


if __name__ == "__main__":
    main()
