"""What scripts/benchmark.py measures, prints and writes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import numpy as np
import torch
from command import console as make_console
from factory import make_policy, prepare, refuse_a_range_that_nothing_reads, requirements
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from run_folder import RunFolder
from settings import refuse_chosen
from torch import Tensor
from training_run import make_learner

from agents.rollout import Decider, Results, evaluate
from agents.training import Collector, Prompts
from benchmarking.growth import Sizes, growth, peak_memory
from benchmarking.lockstep import Decoded, lockstep
from benchmarking.meters import Stopwatch, now, timed
from benchmarking.workloads import Workload
from dllm_gym.checks import choice, distinct, flag, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import Threshold
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import DLLM
from dllm_gym.process.predictions import Work
from dllm_gym.process.unmasking import MOST_LANES
from dllm_gym.runs.files import atomically

EXACT = "none"  # the setting of ``cache`` that gives the plain loop's tokens and NFE
OPTIONAL = ("lockstep_batches", "growth_rows", "limit_tokens")  # counts of a workload that may be null
TRAINING = ("agent", "policy", "distribution", "expert", "reference")  # groups of the training rounds
Figures = dict[str, Any]


@dataclass
class Run:
    """One run of ours; ``deciding`` seconds of it went to the decider."""

    seconds: float
    deciding: float
    results: Results
    work: Work
    bytes_per_lane: int

    def figures(self) -> Figures:
        results, work = self.results, self.work
        return {
            "NFE": float(results.nfe.float().mean()),
            "accuracy": float(results.score.mean()),
            "row forwards": work.rows,
            "lanes used": 1 - results.idle_lanes,
            "empty steps": results.empty_steps,
            "padding": work.padding / work.tokens,
            "reused": work.reused,
            "deciding": self.deciding / self.seconds,
            "bytes/lane": self.bytes_per_lane,
        }


@dataclass
class Case:
    """One decider on one workload, in blocks of one length."""

    workload: Workload
    block_length: int | None
    decider: Decider
    seed: int

    def envs(self, cache: str = EXACT) -> DLLMUnmaskVectorEnv:
        return self.workload.envs(block_length=self.block_length, cache=cache, **requirements([self.decider]))

    def ours(self, cache: str = EXACT) -> Run:
        envs, examples = self.envs(cache), self.workload.examples
        decider = Stopwatch(self.decider, envs.device)
        seconds, results = timed(envs.device, lambda: evaluate(envs, decider, examples, self.seed))
        return Run(seconds, decider.seconds(), results, envs.core.work, envs.core.bytes_per_lane)

    def limit(self, lengths: Counter[int]) -> float:
        """Seconds that the backbone alone needs for rows of these lengths."""
        dllm = self.workload.dllm
        batches = list(unpadded(dllm, lengths, self.workload.num_envs, self.workload.limit_tokens))
        start = now(dllm.device)
        for tokens in batches:
            dllm.encode_rows(tokens, None)
        return now(dllm.device) - start

    def lockstep(self, episodes: Sequence[int]) -> tuple[float, Decoded]:
        """Seconds that the plain loop needs for all episodes, going by these, and how these ended."""
        core, examples = self.envs().core, self.workload.examples
        call = lambda: lockstep(core, self.decider, examples, self.seed, episodes)  # noqa: E731
        seconds, decoded = timed(core.dllm.device, call)
        return seconds * len(examples) / len(episodes), decoded

    def warm_up(self, caches: Sequence[str]) -> None:
        """Run all code once, on every shape if they are compiled; the plain loop with one step per block."""
        examples = self.workload.examples
        few = examples if self.workload.dllm.compiled else examples[: self.workload.num_envs]
        for cache in (EXACT, *caches):
            envs = self.envs(cache)
            evaluate(envs, self.decider, few, self.seed)
            if cache == EXACT:
                self.limit(envs.core.work.lengths)
        lockstep(self.envs().core, Threshold(0.0), few)


def unpadded(dllm: DLLM, lengths: Counter[int], rows: int, most: int | None) -> Iterator[Tensor]:
    """Random tokens int64 [b, T] of rows of these lengths, up to ``rows`` rows and ``most`` tokens at a time."""
    for length, count in sorted(lengths.items()):
        size = rows if most is None else min(rows, max(1, most // length))
        for start in range(0, count, size):
            yield torch.randint(2, dllm.vocab_size, (min(size, count - start), length), device=dllm.device)


def turns(episodes: int, size: int, batches: int | None) -> Iterator[list[int]]:
    """Endlessly, the episodes of the next ``batches`` batches of the plain loop (None: all)."""
    parts = [list(range(start, min(start + size, episodes))) for start in range(0, episodes, size)]
    count, first = len(parts) if batches is None else min(batches, len(parts)), 0
    while True:
        yield [episode for i in range(count) for episode in parts[(first + i) % len(parts)]]
        first += count


def measure(case: Case, repeats: int, batches: int | None, caches: Sequence[str]) -> Figures:
    """Times, their ratios, and what ours and the plain loop did, for ``repeats`` turns."""
    case.warm_up(caches)
    total = len(case.workload.examples)
    seconds: dict[str, list[float]] = defaultdict(list)
    agreement: dict[str, list[Figures]] = defaultdict(list)
    plain: list[Decoded] = []
    turn = turns(total, case.workload.num_envs, batches)
    for _ in range(repeats):
        runs = {"ours": case.ours()}
        limit = case.limit(runs["ours"].work.lengths)
        episodes = next(turn)
        time, decoded = case.lockstep(episodes)
        runs |= {cache: case.ours(cache) for cache in caches}
        plain.append(decoded)
        for name, value in {"lockstep": time, "limit": limit, **{n: run.seconds for n, run in runs.items()}}.items():
            seconds[name].append(value)
        for name, run in runs.items():
            agreement[name].append(same(case.workload.dllm, run.results, decoded, episodes))
    did = {"lockstep": plain_figures(plain, total)} | {name: run.figures() for name, run in runs.items()}
    unmasked = torch.cat([d.tokens for d in plain]) != case.workload.dllm.mask_id  # a step limit leaves some masked
    committed = total * float(unmasked.float().sum(1).mean())
    for name, figures in did.items():
        time = median(seconds[name])
        figures |= {"episodes/s": total / time, "tokens/s": committed / time}
        for key in agreement[name][0] if name in agreement else ():
            figures[key] = float(np.mean([shares[key] for shares in agreement[name]]))
    return {"seconds": seconds, "ratios": ratios(seconds), "did": did}


def plain_figures(decoded: Sequence[Decoded], episodes: int) -> Figures:
    """What the plain loop did, on the average of its measured batches."""
    nfe = torch.cat([d.nfe for d in decoded]).float()
    steps = [float(d.nfe.sum()) for d in decoded]
    return {
        "NFE": float(nfe.mean()),
        "accuracy": float(torch.cat([d.score for d in decoded]).mean()),
        "row forwards": round(sum(d.row_forwards for d in decoded) / len(nfe) * episodes),
        "lanes used": sum(steps) / sum(d.row_forwards for d in decoded),
        "empty steps": float(np.average([d.empty_steps for d in decoded], weights=steps)),
        "padding": float(np.average([d.padding for d in decoded], weights=[d.row_forwards for d in decoded])),
    }


def same(dllm: DLLM, results: Results, decoded: Decoded, episodes: Sequence[int]) -> Figures:
    """Shares of the plain loop's episodes with the same NFE, and of its tokens that are the same in ours."""
    equal = total = 0
    for episode, text in zip(episodes, decoded.completions, strict=True):
        pair = [dllm.tokenizer.encode(t, add_special_tokens=False) for t in (results.completions[episode], text)]
        equal += sum(a == b for a, b in zip(*pair, strict=False))
        total += max(map(len, pair))
    nfe = results.nfe[torch.tensor(episodes, device=results.nfe.device)]
    return {"same NFE": float((nfe == decoded.nfe).float().mean()), "same tokens": equal / max(total, 1)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of the times of one turn each: the plain loop's over ours, and ours over the limit's."""

    def over(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]

    variants = [name for name in seconds if name not in ("limit", "lockstep")]
    return {f"lockstep / {name}": over("lockstep", name) for name in variants} | {"ours / limit": over("ours", "limit")}


def training_rounds(workload: Workload, cfg: DictConfig) -> list[float]:
    """Seconds of rounds of training as scripts/train.py does them, after one that warms up."""
    policy = make_policy(cfg)
    learner = make_learner(cfg, policy)
    envs = workload.envs(**requirements([policy, learner.algorithm]))
    prompts = Prompts(len(envs.core.examples), cfg.seed)
    collector = Collector(envs, prompts, cfg.seed, cfg.prompts_per_round, cfg.agent.group_size, cfg.agent.max_batches)

    def one_round() -> None:
        episodes = collector.collect(learner.algorithm, learner.player)
        learner.algorithm.update(episodes.batch, episodes.reward, episodes.group)

    return [timed(workload.dllm.device, one_round)[0] for _ in range(cfg.repeats + 1)][1:]


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    for name in ("repeats", "rounds", "prompts_per_round"):
        whole(name, cfg[name])
    for name in ("group_size", "max_batches"):
        whole(f"agent.{name}", cfg.agent[name])
    check_seed("seed", cfg.seed)
    for name in distinct("measure", cfg.measure):
        choice("measure", name, cfg.workloads)
        check_workload(f"workloads.{name}", cfg.workloads[name])
    unmeasured = [name for name in cfg.workloads if name not in cfg.measure]
    refuse_chosen([f"workloads.{name}" for name in unmeasured], "measure names other workloads")
    if not any("${model}" in text or "${task}" in text for text in map(str, uses(cfg))):
        refuse_chosen(["model", "task", "env"], "the measured workloads have their own")
    if not any(cfg.workloads[name].training for name in cfg.measure):
        refuse_chosen([*TRAINING, "rounds", "prompts_per_round"], "no measured workload has training=true")


def uses(cfg: DictConfig) -> list[Any]:
    """The measured workloads as they are written, with their references to the groups."""
    workloads = OmegaConf.to_container(cfg.workloads, resolve=False)
    return [workloads[name] for name in cfg.measure]


def check_workload(path: str, own: DictConfig) -> None:
    """ValueError for a setting of a workload that makes no sense."""
    whole(f"{path}.num_envs", own.num_envs, most=MOST_LANES)
    for count in ("prompts", "group_size", *OPTIONAL):
        if own[count] is not None or count not in OPTIONAL:
            whole(f"{path}.{count}", own[count])
    for length in distinct(f"{path}.block_lengths", own.block_lengths):
        if length is not None:
            whole(f"{path}.block_lengths", length)
    for cache in distinct(f"{path}.caches", own.caches) if own.caches else ():
        choice(f"{path}.caches", cache, ("prefix", "dual"))
    flag(f"{path}.training", own.training)


def deciders(cfg: DictConfig, device: torch.device) -> dict[str, Decider]:
    """The configured deciders, seeded."""
    torch.manual_seed(cfg.seed)
    made = hydra.utils.instantiate(cfg.deciders, _convert_="all")
    for decider in made.values():
        if isinstance(decider, PolicyDecider):
            decider.policy.to(device)
    return made


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum as text."""
    return f"{median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def rows_table(title: str, rows: dict[tuple[str, ...], dict[str, str]]) -> Table:
    """A table of named rows; a cell that a row lacks stays empty."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    for _ in next(iter(rows)):
        table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for names, row in rows.items():
        table.add_row(*names, *(row.get(column, "") for column in columns))
    return table


def cases(workload: Workload, cfg: DictConfig) -> Iterator[tuple[str, Case]]:
    """Every decider in blocks of every length, by name."""
    for block_length, (name, decider) in product(
        cfg.workloads[workload.name].block_lengths, deciders(cfg, workload.dllm.device).items()
    ):
        case = Case(workload, block_length, decider, cfg.seed)
        yield f"BL = {case.envs().core.block_length}, {name}", case


def step_figures(workload: Workload, growth_rows: int | None, repeats: int) -> Figures:
    """Peak memory of a prediction step, and how its cost grows."""
    prompts, length = workload.prompts(workload.examples[: workload.num_envs]), workload.envs().core.L
    figures: Figures = {"peak bytes": peak_memory(workload.dllm, prompts, length, top_k=1)}
    if growth_rows is not None:
        sizes = Sizes(growth_rows, max(map(len, prompts)), length, workload.dllm.vocab_size)
        figures["growth"] = growth(workload.dllm, sizes, repeats)
    return figures


def print_cases(console: Console, workload: Workload, measured: dict[str, Figures], cfg: DictConfig) -> None:
    """Times and their ratios for every case, then what was done in each."""
    batches = cfg.workloads[workload.name].lockstep_batches
    title = (
        f"{workload.name}: {len(workload.examples)} episodes, {workload.num_envs} lanes, L = {workload.envs().core.L}, "
        f"{workload.dllm.dtype} on {workload.dllm.device}; median (minimum - maximum) of {cfg.repeats} turns"
    )
    title += "" if batches is None else f"; lockstep: {batches} batches per turn, its seconds scaled to all episodes"
    times: dict[tuple[str, ...], dict[str, str]] = {}
    did: dict[tuple[str, ...], dict[str, str]] = {}
    for name, case in measured.items():
        seconds = {f"{who}, s": values for who, values in case["seconds"].items()}
        times[name,] = {key: spread(values) for key, values in {**case["ratios"], **seconds}.items()}
        did |= {(name, who): {k: f"{v:.4g}" for k, v in figures.items()} for who, figures in case["did"].items()}
    console.print(rows_table(title, times))
    console.print(rows_table("", did))


def print_step(console: Console, workload: Workload, figures: Figures) -> None:
    peak = {key: value / 2**20 for key, value in figures["peak bytes"].items()}
    console.print(
        f"peak memory of a prediction step of {workload.num_envs} rows: {peak['ours']:.1f} MiB; with the full softmax "
        f"{peak['full softmax']:.1f} MiB, {peak['full softmax'] / peak['ours']:.1f} times as much"
    )
    if "growth" in figures:
        rows = {(size,): {k: f"{v:.2f}" for k, v in row.items()} for size, row in figures["growth"].items()}
        console.print(rows_table("exponents when one size of the prediction step is doubled", rows))


def measure_all(cfg: DictConfig, device: torch.device, run: Path) -> None:
    """Measure, print and write every chosen workload."""
    console = make_console(width=200)
    measured: dict[str, Figures] = {name: {"cases": {}} for name in cfg.measure}

    def save() -> None:
        atomically(run / "benchmark.json", lambda path: path.write_text(json.dumps(measured, indent=2) + "\n"))

    for name, figures in measured.items():
        own, workload = cfg.workloads[name], Workload.of(name, cfg, device)
        for label, case in cases(workload, cfg):
            figures["cases"][label] = measure(case, cfg.repeats, own.lockstep_batches, own.caches)
            save()  # a run may take hours
        print_cases(console, workload, figures["cases"], cfg)
        figures |= step_figures(workload, own.growth_rows, cfg.repeats)
        print_step(console, workload, figures)
        if own.training:
            figures["training seconds"] = training_rounds(workload, cfg)
            episodes = cfg.prompts_per_round * cfg.agent.group_size
            console.print(f"a round of training, {episodes} episodes: {spread(figures['training seconds'])} s")
        save()
    console.print(f"written: {run}/benchmark.json", soft_wrap=True)


def benchmark(cfg: DictConfig) -> None:
    """Check the settings and measure in the run folder."""
    check_settings(cfg)
    device = prepare(cfg)
    refuse_a_range_that_nothing_reads(cfg, deciders(cfg, device).values())
    with RunFolder(cfg) as run:
        run.refuse_another_run()
        run.begin()
        measure_all(cfg, device, run.path)
