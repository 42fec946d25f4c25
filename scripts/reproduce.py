"""Reproduce the papers' claims on the embedded dLLM: heuristics, trained policies, transfer; a table, pictures, a page.

    python scripts/reproduce.py
    python scripts/reproduce.py experiment=quick

Every job is a run of scripts/train.py or scripts/evaluate.py in its own folder. Whatever ends this script, the next
call goes on: finished jobs are not done again, trainings continue from their checkpoints, and the table is the same.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from command import command, words
from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from settings import CONF, composing
from tqdm import tqdm

from agents.fronts import Point
from agents.reproduction.claims import LEARNED, read_results, read_table, write_table
from agents.reproduction.report import Evidence, read_training, write_page
from agents.runs.strangers import Allowed, read_config
from dllm_gym.checks import choice, distinct, flag, number, text, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.runs.checkpoints import CONFIG

SCRIPTS = Path(__file__).parent
LOG, SESSIONS = "log.txt", "sessions.csv"
SHOWN = ("worlds", "training", "others", "warm_start", "transfer", "variants")  # settings that the page repeats
POLL = 0.2  # seconds between looks at the running jobs
CHUNK = "agent.algorithm.chunk=128"  # parts that fit a core's cache are faster, and their gradients add up
GRACE = 120  # seconds that an interrupted training gets to finish its round and save it


@dataclass(eq=False)
class Job:
    """One run of a script in its own folder; done once its results are there.

    Attributes:
        name: for people; with a checksum of ``identity`` it names the run folder below ``root``.
        script: ``"train"`` or ``"evaluate"``. settings: its overrides.
        base: the training whose policy it begins with (train) or tries (evaluate).
        labels: of its rows in the table; none: it has no rows.
    """

    name: str
    script: str
    settings: list[str]
    root: Path
    base: Job | None = None
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> list[Any]:
        """What the results depend on: not where they lie, nor how fast they come."""
        return [self.script, *self.settings, self.base and self.base.identity]

    @property
    def folder(self) -> Path:
        return self.root / f"{self.name}-{zlib.crc32(json.dumps(self.identity).encode()):08x}"

    def done(self) -> bool:
        return (self.folder / "results.json").exists()  # appears last, and whole

    def command(self) -> list[str]:
        """A training that was broken off goes on from its checkpoint."""
        command = [sys.executable, str(SCRIPTS / f"{self.script}.py"), f"hydra.run.dir={self.folder}", "threads=1"]
        if self.script == "train":
            command += [CHUNK, "resume=auto", "checkpoints.validation=null"]  # the last policy counts here
        setting = "agent.warm_start" if self.script == "train" else "checkpoint"
        return [*command, *self.settings, *([f"{setting}={self.base.folder}"] if self.base else [])]

    def start(self) -> subprocess.Popen | None:
        """Run it. None while another process does, perhaps one whose session was killed: the child holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock, (self.folder / LOG).open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if self.done():  # by now, by the one that held the lock
                return None
            return subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is for this script, which passes it on
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )


# The plan


@dataclass(frozen=True)
class Place:
    """Where something is decoded: a task in an env, as it is or in one of the variants of cfg.variants."""

    task: str
    env: str
    world: str | None = None

    def settings(self, cfg: DictConfig) -> list[str]:
        own = [f"task={self.task}", f"env={self.env}", *cfg.worlds[self.task][self.env]]
        return own + list(cfg.variants[self.world][self.task]) if self.world else own

    def __str__(self) -> str:
        return "-".join(filter(None, (self.task, self.env, self.world)))


def plan(cfg: DictConfig) -> list[Job]:
    """Every job, in the order of the table; each stands behind the one that it builds on."""
    whole("workers", cfg.workers)
    if not set(cfg.transfer.families) <= set(LEARNED):
        raise ValueError(f"transfer.families={cfg.transfer.families}: a list of {', '.join(LEARNED)}; [] for none")
    jobs, policies = [], {}
    for place in (Place(task, env) for task, env in product(cfg.tasks, cfg.envs)):
        starts, policies[place] = trainings(cfg, place)
        jobs += [*heuristics(cfg, place, cfg.grids), *starts, *policies[place]]
        jobs += [evaluation(cfg, policy, place) for policy in policies[place]]
    for place in policies:
        if not (moving := [policy for policy in policies[place] if moves(cfg, policy)]):
            continue
        variants = [Place(place.task, place.env, name) for name, tasks in cfg.variants.items() if tasks.get(place.task)]
        others = [other for other in policies if other.env == place.env and other != place]
        for variant in variants:
            jobs += heuristics(cfg, variant, cfg.variant_grids)
        jobs += [evaluation(cfg, policy, target) for target in others + variants for policy in moving]
    return jobs


def moves(cfg: DictConfig, policy: Job) -> bool:
    """Whether a policy is also tried where it was not trained."""
    labels, transfer = policy.labels, cfg.transfer
    chosen = labels["alpha"] is None or labels["alpha"] in transfer.alphas
    return labels["family"] in transfer.families and labels["env"] in transfer.envs and chosen


def heuristics(cfg: DictConfig, place: Place, grids: Sequence[str]) -> Iterator[Job]:
    labels = {**asdict(place), "kind": "heuristic", "split": "test"}
    for grid in grids:
        settings = [*place.settings(cfg), *test_settings(cfg), *chosen_rules(cfg, grid), f"heuristics={grid}"]
        yield Job(f"heuristics-{place}-{grid}", "evaluate", settings, Path(cfg.folder), labels=labels)


def chosen_rules(cfg: DictConfig, grid: str) -> list[str]:
    """Settings of a grid's job, of which validation leaves the rules near the envelope."""
    if grid not in cfg.thinned:
        return []
    return [f"evaluation.validation={cfg.validation}", f"evaluation.within={cfg.within}"]


def test_settings(cfg: DictConfig) -> list[str]:
    once = ["evaluation.seeds=[42]", "evaluation.validation=null"]  # the page chooses by itself
    return ["evaluation.split=test", f"evaluation.examples={cfg.examples}", *once]


def knob(cfg: DictConfig) -> str:
    return f"evaluation.alphas=[{','.join(map(str, cfg.knob))}]"


def trainings(cfg: DictConfig, place: Place) -> tuple[list[Job], list[Job]]:
    """The trainings that others begin with, and those of the policies that count."""
    own = cfg.training[place.task][place.env]
    warm_start = list(cfg.warm_start[place.task][place.env])
    recipes = [("policy", alpha, [f"reward.alpha={alpha}"]) for alpha in cfg.alphas]
    if conditioned := cfg.training.conditioned:
        recipes.append(("conditioned", None, [*conditioned.all, *conditioned[place.task][place.env], knob(cfg)]))
    others = {name: o for name, o in cfg.others.items() if place.task in o.tasks and place.env in o.envs}
    for name, other in others.items():
        recipes.append((name, other.alpha, [*other.settings, *([knob(cfg)] if other.alpha is None else [])]))
    starts, policies = [], []
    for seed in cfg.seeds:
        common, base = [*place.settings(cfg), *cfg.training.all, f"seed={seed}"], None
        if warm_start:
            settings = [*common, *warm_start]
            base = Job(f"start-{place}-seed{seed}", "train", settings, Path(cfg.folder))
            starts.append(base)
        for family, alpha, chosen in recipes:
            if family in others and seed not in (others[family].seeds or cfg.seeds):
                continue
            name = f"{family}-{place}-" + (f"alpha{alpha}-" if alpha is not None else "") + f"seed{seed}"
            labels = {**asdict(place), "trained_on": place.task, "kind": family, "family": family, "alpha": alpha}
            labels |= {"seed": seed, "split": "validation"}
            mine = own if family in LEARNED else []  # controls bring all of theirs
            policies.append(Job(name, "train", [*common, *mine, *chosen], Path(cfg.folder), base, labels))
    return starts, policies


def evaluation(cfg: DictConfig, policy: Job, place: Place) -> Job:
    """A trained policy on the test split of where it comes from, or of another place."""
    home = (policy.labels["task"], policy.labels["env"], policy.labels["world"])
    kind = policy.labels["kind"] if home == (place.task, place.env, place.world) else "transfer"
    labels = {**policy.labels, **asdict(place), "kind": kind, "split": "test"}
    settings = [*place.settings(cfg), *test_settings(cfg), "heuristics=none"]
    settings += [knob(cfg)] if policy.labels["alpha"] is None else []
    return Job(f"test-{place}-of-{policy.name}", "evaluate", settings, policy.root, policy, labels)


# Doing it


def execute(jobs: Sequence[Job], workers: int, note: Callable[[Job], None] = lambda job: None) -> list[Job]:
    """Do what is not done, ``workers`` jobs side by side, and ``note`` each that ended.

    Returns:
        Those that failed or build on one that did.
    """
    waiting = [job for job in jobs if not job.done()]
    running: dict[Job, subprocess.Popen] = {}
    failed: list[Job] = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="reproducing", unit="job") as bar:
        try:
            while waiting or running:
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    del running[job]
                    note(job)
                    bar.update()
                    failed += [] if job.done() else [job]
                for job in list(waiting):
                    if job.done() or job.base in failed:
                        waiting.remove(job)
                        bar.update()
                        failed += [] if job.done() else [job]
                    elif len(running) < workers and (job.base is None or job.base.done()) and (process := job.start()):
                        waiting.remove(job)
                        running[job] = process
                bar.set_postfix_str(", ".join(job.name for job in running))
                time.sleep(POLL)
        except KeyboardInterrupt:
            stop(running)
            raise
    return failed


def stop(running: dict[Job, subprocess.Popen]) -> None:
    """Let trainings save what they have, and end the rest."""
    for job, process in running.items():
        process.send_signal(signal.SIGINT if job.script == "train" else signal.SIGTERM)
    tqdm.write("interrupted: waiting for the trainings to save their round")
    for process in running.values():
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def session(cfg: DictConfig, jobs: Sequence[Job]) -> list[Job]:
    """``execute``; every job that ends adds a line to sessions.csv: the session, the job, minutes since its start."""
    start = time.time()

    def note(job: Job) -> None:
        with (Path(cfg.folder) / SESSIONS).open("a", newline="") as file:
            csv.writer(file).writerow([f"{start:.0f}", job.name, f"{(time.time() - start) / 60:.2f}"])

    return execute(jobs, cfg.workers, note)


def session_minutes(folder: Path) -> list[float]:
    """How long each session in which a job ended took, up to the last one that did."""
    path = folder / SESSIONS
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [float(minutes) for minutes in {start: minutes for start, _, minutes in csv.reader(file)}.values()]


# The report


def tabulate(cfg: DictConfig, jobs: Sequence[Job]) -> list[Point]:
    """The table of what is done, written and read again: the page is made of what the file says."""
    write_table(rows_of(jobs), Path(cfg.table))
    return read_table(Path(cfg.table))


def rows_of(jobs: Sequence[Job]) -> list[Point]:
    """The rows of the jobs that are done."""
    done = [job for job in jobs if job.labels and job.done()]
    return [row for job in done for row in read_results(job.folder, {**job.labels, "length": length(job.folder)})]


def report(cfg: DictConfig, jobs: Sequence[Job]) -> None:
    """The table, the page and its pictures."""
    done = [job for job in jobs if job.done()]
    evidence = Evidence(
        rows=tabulate(cfg, jobs),
        trainings=[read_training(job.folder, job.labels) for job in done if job.labels and job.script == "train"],
        minutes=session_minutes(Path(cfg.folder)),
        jobs=(len(done), len(jobs)),
        quick=quick_version(Path(cfg.quick)),
        notes=dict(cfg.notes),
        title=cfg.title,
        settings=OmegaConf.to_yaml({name: cfg[name] for name in SHOWN}).strip(),
    )
    write_page(evidence, Path(cfg.page))
    print(f"written: {cfg.table}, {cfg.page}")


def length(run: Path) -> int:
    """L of a run."""
    saved = read_config(run / CONFIG)
    Allowed().check(saved, run / CONFIG)
    return saved["env"]["gen_length"] or hydra.utils.instantiate(saved["task"]).gen_length


def quick_version(folder: Path) -> tuple[list[Point], float] | None:
    """Table and minutes of the quick version, if it was run."""
    path = folder / "results.csv"
    return (read_table(path), sum(session_minutes(folder))) if path.exists() else None


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


# Its settings


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    flag("run", cfg.run)
    whole("workers", cfg.workers, most=256)
    whole("examples", cfg.examples)
    whole("validation", cfg.validation)
    number("within", cfg.within, least=0, most=1)
    for grid in cfg.thinned:
        choice("thinned", grid, cfg.grids)
    for name, suffix in (("folder", ""), ("quick", ""), ("table", ".csv"), ("page", ".md")):
        if "://" in text(name, cfg[name]) or (suffix and Path(cfg[name]).suffix != suffix):
            wanted = f"file that ends in {suffix}" if suffix else "folder"
            raise ValueError(f"{name}={cfg[name]!r}: need a local {wanted}")
    for name, group in (("tasks", "task"), ("envs", "env"), ("grids", "heuristics"), ("variant_grids", "heuristics")):
        among = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
        for chosen in distinct(name, cfg[name]):
            choice(name, chosen, among)
    if cfg.alphas or not cfg.training.conditioned:
        for alpha in distinct("alphas", cfg.alphas):
            number("alphas", alpha, least=0)
    for alpha in distinct("knob", cfg.knob):
        number("knob", alpha, above=0)
    for seed in distinct("seeds", cfg.seeds):
        check_seed("seeds", seed)
    check_transfer(cfg)
    check_recipes(cfg)


def check_transfer(cfg: DictConfig) -> None:
    transfer = cfg.transfer
    among = {"families": LEARNED, "envs": [path.stem for path in (CONF / "env").glob("[!_]*.yaml")]}
    for name, names in among.items():
        for chosen in distinct(f"transfer.{name}", transfer[name]) if len(transfer[name]) else ():
            choice(f"transfer.{name}", chosen, names)
    for alpha in transfer.alphas:
        number("transfer.alphas", alpha, least=0)


def check_recipes(cfg: DictConfig) -> None:
    """ValueError for a place without a recipe, or overrides that scripts/train.py would refuse."""
    groups = {"worlds": cfg.worlds, "training": cfg.training, "warm_start": cfg.warm_start}
    groups |= {"training.conditioned": cfg.training.conditioned} if cfg.training.conditioned else {}
    for name, group in groups.items():
        for task, env in product(cfg.tasks, cfg.envs):
            if not isinstance((group.get(task) or {}).get(env), ListConfig):
                raise ValueError(f"{name}.{task}.{env} has to be a list of overrides: every task in every env has one")
    if not cfg.run:
        return
    tried = {tuple(s for s in job.settings if not s.startswith("seed=")): job for job in plan(cfg)}
    for settings, job in tried.items():
        try:
            with composing():
                compose(job.script, list(settings))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{job.name}: scripts/{job.script}.py refuses its settings: {words(error)}") from error


def refuse_a_fuller_table(cfg: DictConfig, jobs: Sequence[Job]) -> None:
    """ValueError if there is nothing to report, or the report would replace a table by one that says less."""
    now = len(rows_of(jobs))
    if not now:
        raise ValueError(f"run=false: no job of this plan is finished in {cfg.folder}, there is nothing to report")
    there = len(read_table(Path(cfg.table))) if Path(cfg.table).exists() else 0
    if now < there:
        raise ValueError(
            f"run=false: {cfg.table} has {there} rows, the finished jobs in {cfg.folder} only {now}: name another "
            "table= and page= to write"
        )


@command("reproduce")
def main(cfg: DictConfig) -> None:
    check_settings(cfg)
    jobs = plan(cfg)
    if not cfg.run:
        refuse_a_fuller_table(cfg, jobs)
    for stopping in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell script's background job inherits it ignored
        signal.signal(stopping, signal.default_int_handler)
    try:
        failed = session(cfg, jobs) if cfg.run else []
    except KeyboardInterrupt:
        print("stopped: the same command goes on")
        sys.exit(130)
    report(cfg, jobs)
    for job in failed:
        if job.base not in failed:
            print(f"\nfailed: {job.folder}\n{tail(job.folder / LOG)}", file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} jobs failed; the same command tries them again")


if __name__ == "__main__":
    main()
