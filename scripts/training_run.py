"""What scripts/train.py does: a run from its checkpoint or from the start, round by round, then its report."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hydra
import torch
from command import console as make_console
from factory import (
    about,
    check_evaluation,
    heuristics,
    make_envs,
    make_evaluation_envs,
    make_policy,
    manner_of,
    policy_deciders,
    prepare,
    refuse_a_range_that_nothing_reads,
    refuse_speed_that_is_fixed,
    report,
    requirements,
)
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from run_folder import OVERRIDES, RunFolder, allowed, load_config, load_policy, load_run, naming
from tqdm import tqdm

from agents.algorithm import Algorithm
from agents.fronts import policy_rewards
from agents.generations import Lab
from agents.imitation import Imitation
from agents.rollout import evaluate
from agents.runs.strangers import Refused, read_overrides
from agents.training import Collector, Metrics, Prompts, Saver, load_state, read_rounds
from dllm_gym.checks import number, text, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.policy import Policy
from dllm_gym.deciders.rules import TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.process.unmasking import MOST_LANES
from dllm_gym.runs.checkpoints import CONFIG, METRICS, Checkpoint, Checkpoints

LOGGERS = {  # TorchRL's class -> the package that it needs, which is also the name of our extra
    "torchrl.record.MLFlowLogger": "mlflow",
    "torchrl.record.TensorboardLogger": "tensorboard",
    "torchrl.record.WandbLogger": "wandb",
    "torchrl.record.loggers.trackio.TrackioLogger": "trackio",
}
LOGS = {"log_dir": "{}/logs", "tracking_uri": "sqlite:///{}/mlflow.db", "artifact_location": "{}/mlflow"}
FREE = ("rounds", "num_envs", "checkpoint_every", "checkpoint_minutes", "checkpoints", "device", "threads")
FREE += ("evaluation", "heuristics", "logger", "resume", "trust")  # what a resumed run may choose anew
GREW = ("agent", "checkpoints", "evaluation")  # groups that have settings which older runs were saved without


def resumed(cfg: DictConfig, run: RunFolder) -> tuple[DictConfig, Checkpoint] | None:
    """The configuration and checkpoint to go on from; None: the run begins.

    Raises:
        ValueError: there is no such run, or it cannot be used; or the folder holds another run.
    """
    if cfg.resume is None:
        run.refuse_another_run()
        return None
    if cfg.resume == "auto":
        return newest(cfg, run)
    with naming("resume", cfg.resume):
        saved, checkpoint = load_run(cfg.resume, allowed(cfg))
        if checkpoint.run.resolve() != run.path.resolve():
            run.refuse_another_run()
        else:
            Checkpoints(run.path).refuse_later(checkpoint.number)
    return saved, checkpoint


def newest(cfg: DictConfig, run: RunFolder) -> tuple[DictConfig, Checkpoint] | None:
    """The newest whole checkpoint of the run in this folder; None if there is no checkpoint yet."""
    every = Checkpoints(run.path).all()
    if not every:
        return None
    with naming("resume", cfg.resume):
        checkpoint = next(Checkpoints(run.path).whole(), None)
        if checkpoint is None:
            every[-1].check()
        for damaged in every[every.index(checkpoint) + 1 :]:
            print(f"{damaged.path} is damaged; going on from {checkpoint}")
        try:
            return load_config(run.path / CONFIG, allowed(cfg)), checkpoint
        except Refused:
            raise
        except ValueError as error:
            print(f"{error}; going on with that of {checkpoint}")
            return load_config(checkpoint.config, allowed(cfg)), checkpoint


def go_on(cfg: DictConfig, saved: DictConfig, began: Sequence[str]) -> None:
    """Let a resumed run be the run that it resumes: only what does not change the learning may be chosen anew.

    Args:
        saved: the configuration of the run that is resumed. began: the command line that it began with.

    Raises:
        ValueError: the command line chooses anything else that the run did not begin with.
    """
    today = cfg.copy()
    for name, value in saved.items():
        if name not in ("resume", "trust"):
            whole = {**today[name], **value} if name in GREW else value
            OmegaConf.update(cfg, name, whole, merge=False, force_add=True)
    steps = "agent.algorithm.scheduler.num_training_steps"
    ends_with_run = OmegaConf.select(cfg, steps) == saved.get("rounds")
    for name, here in LOGS.items():  # the saved ones are where the run lay once
        if cfg.logger and name in cfg.logger:
            cfg.logger[name] = here.format(HydraConfig.get().runtime.output_dir)
    for override in HydraConfig.get().overrides.task:
        name = override.lstrip("+~").partition("=")[0]
        if name.partition(".")[0] in FREE:
            OmegaConf.update(cfg, name, OmegaConf.select(today, name), merge=False, force_add=True)
        elif override not in began:
            free = ", ".join(FREE)
            raise ValueError(f"resume={cfg.resume!r}: it did not begin with {override}; only {free} may be chosen anew")
    if ends_with_run:
        OmegaConf.update(cfg, steps, cfg.rounds)


class Interrupt:
    """Ctrl-C or SIGTERM: what runs is stopped at once, but a round (``with stop.after_this:``) is done to its end.

    Attributes:
        asked: the signal that came during a round, else None; a second one stops that as well.
        code: the exit code that says which signal it was.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None
        self.code = 128 + signal.SIGINT
        self.in_round = False

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, number: int, _: Any) -> None:
        self.code = 128 + number
        if self.asked is not None or not self.in_round:
            raise KeyboardInterrupt
        self.asked = number
        tqdm.write("interrupted: the round that runs is finished and saved first; once more to stop at once")

    @contextmanager
    def round(self) -> Iterator[None]:
        """What is done to its end."""
        self.in_round = True
        try:
            yield
        finally:
            self.in_round = False

    def __exit__(self, *_: Any) -> None:
        for signal_number, handler in self.before.items():
            signal.signal(signal_number, handler)


@dataclass
class Learner:
    """What learns: the network, the algorithm that trains it, and the player that it is while it learns."""

    policy: Policy
    algorithm: Algorithm
    player: PolicyDecider


def make_learner(cfg: DictConfig, policy: Policy) -> Learner:
    """The algorithm on a policy; ValueError for a combination that makes no sense."""
    distribution = hydra.utils.instantiate(cfg.distribution)
    actor = make_actor(policy, distribution.train, distribution.temperature)
    make_algorithm = hydra.utils.instantiate(cfg.agent.algorithm, _convert_="all")
    try:
        algorithm = make_algorithm(actor)
    except TypeError as error:  # an argument that it hands on, to the descent, the optimizer or the schedule
        raise ValueError(f"agent.algorithm: {error}") from error
    player = PolicyDecider(policy, distribution.train, distribution.temperature)
    algorithm.players(player, cfg.agent.group_size)
    if cfg.agent.max_batches > 1 and not algorithm.compares:
        raise ValueError(
            f"agent.max_batches={cfg.agent.max_batches}: {type(algorithm).__name__} learns from groups with equal "
            "rewards, too; only agents that compare within a group may replace them"
        )
    return Learner(policy, algorithm, player)


@dataclass
class Start:
    """Where a training begins.

    Attributes:
        progress: ``rounds`` that are done, and ``prompts`` that were taken for them.
        rows: the metrics of these rounds. here: whether the folder of this run holds them.
    """

    progress: dict[str, int]
    rows: list[dict[str, str]]
    here: bool

    @classmethod
    def of(cls, source: Checkpoint | None, algorithm: Algorithm, device: torch.device, run: RunFolder) -> Start:
        progress = load_state(source, algorithm, device)
        here = source is not None and source.run.resolve() == run.path.resolve()
        return cls(progress, rounds_before(source, progress["rounds"]), here)

    def take_place(self, saver: Saver, rounds: int, run: RunFolder) -> None:
        """Put away what the folder holds of later rounds, which come again."""
        if self.here:
            Checkpoints(run.path).set_aside(self.progress["rounds"])
            saver.last = self.progress["rounds"]
        if self.progress["rounds"] < rounds:
            run.drop_results()


def rounds_before(source: Checkpoint | None, count: int) -> list[dict[str, str]]:
    """The metrics of the rounds before a checkpoint; says which are missing there."""
    if source is None:
        return []
    rows, missing = read_rounds(source.metrics, count)
    if missing:
        print(f"{source.metrics} lacks rounds {', '.join(map(str, missing))}: so does the {METRICS} of this run")
    return rows


def validation(cfg: DictConfig, policy: Policy) -> Callable[[], float] | None:
    """The policy's mean reward on the first examples of the validation split; None where there is none.

    It is sampled, unless it is evaluated greedily alone.
    """
    if cfg.checkpoints.validation is None:
        return None
    every = list(policy_deciders(policy, cfg).values())
    deciders = [d for d in every if not d.greedy] or every
    settings = {"num_envs": cfg.num_envs, "split": "validation", **requirements(deciders)}
    try:
        envs = make_envs(cfg, **settings)
    except ValueError as error:
        print(f"no checkpoint will be the best one, for want of validation examples: {error}")
        return None
    each = max(1, min(cfg.checkpoints.validation, len(envs.core.examples)) // len(deciders))

    def reward() -> float:
        results = [evaluate(envs, d, range(each), cfg.seed, getattr(d, "alpha", None)).reward for d in deciders]
        return float(torch.cat(results).mean())

    return reward


@dataclass
class Due:
    """When the next checkpoint is due: after so many rounds (``every``) or, if set, ``minutes``."""

    every: int
    minutes: float | None

    def __post_init__(self) -> None:
        self.last = time.monotonic()

    def now(self, rounds: int) -> bool:
        late = self.minutes is not None and time.monotonic() - self.last >= 60 * self.minutes
        if due := late or rounds % self.every == 0:
            self.last = time.monotonic()
        return due


def train(
    cfg: DictConfig, envs: DLLMUnmaskVectorEnv, learner: Learner, saver: Saver, start: Start, stop: Interrupt
) -> bool:
    """The training loop: roll out, update, log, save. Returns False if the user broke it off (with a checkpoint)."""
    progress = start.progress
    prompts = Prompts(len(envs.core.examples), cfg.seed, progress["prompts"])
    counts = {name: cfg.agent[name] for name in ("group_size", "max_batches")}
    collector = Collector(envs, prompts, cfg.seed, cfg.prompts_per_round, **counts)
    logger = hydra.utils.instantiate(cfg.logger) if cfg.logger else None
    due = Due(cfg.checkpoint_every, cfg.checkpoint_minutes)
    with tqdm(total=cfg.rounds, initial=progress["rounds"], desc="training", unit="round") as bar:
        metrics = Metrics(saver.run / METRICS, bar, logger, start.rows)
        for round_ in range(progress["rounds"], cfg.rounds):
            with stop.round():
                began = time.perf_counter()
                bar.set_description(f"training, decoding {cfg.prompts_per_round * cfg.agent.group_size} episodes")
                episodes = collector.collect(learner.algorithm, learner.player)
                bar.set_description("training, learning from them")
                wanted = learner.player.gauge.take()
                update = learner.algorithm.update(episodes.batch, episodes.reward, episodes.group) | wanted
                seconds = time.perf_counter() - began
                metrics.log(
                    round_, episodes.results, {**update, "equal_groups": collector.equal_groups, "seconds": seconds}
                )
                bar.update()
                progress = {"rounds": round_ + 1, "prompts": prompts.taken}
                if due.now(round_ + 1) or stop.asked is not None or round_ + 1 == cfg.rounds:
                    bar.set_description("training, trying and saving a checkpoint")
                    saver.save(progress)
            if stop.asked is not None:
                return False
        with stop.round():
            saver.save(progress)  # a run without rounds of its own in a folder of its own
    return True


def warm_start(cfg: DictConfig, policy: Policy) -> None:
    """Begin from the policy of another run (of agent=imitation, say)."""
    if cfg.agent.warm_start is None:
        return
    trained, _ = load_policy(cfg.agent.warm_start, cfg, "agent.warm_start")
    if type(trained) is not type(policy) or trained.settings != policy.settings:
        raise ValueError(
            f"agent.warm_start={cfg.agent.warm_start!r}: its policy is {type(trained).__name__}({trained.settings}), "
            f"this run's {type(policy).__name__}({policy.settings})"
        )
    policy.load_state_dict(trained.state_dict())


def imitate(cfg: DictConfig, envs: DLLMUnmaskVectorEnv, policy: Policy) -> None:
    """Let a policy imitate the most confident position before it learns from rewards (UPO's pre-training)."""
    distribution = hydra.utils.instantiate(cfg.distribution)
    settings, descent = cfg.agent.imitation, cfg.agent.algorithm
    imitation = Imitation(
        make_actor(policy, distribution.train, distribution.temperature),
        hydra.utils.instantiate(descent.optimizer, lr=settings.lr),
        expert=TopK(1),
        **{name: descent[name] for name in ("epochs", "max_grad_norm", "chunk") if name in descent},
    )
    player = PolicyDecider(policy, distribution.train, distribution.temperature)
    prompts = Prompts(len(envs.core.examples), cfg.seed)
    collector = Collector(envs, prompts, cfg.seed, cfg.prompts_per_round, group_size=1)
    with tqdm(total=settings.rounds, desc="imitating the most confident position", unit="round") as bar:
        for _ in range(settings.rounds):
            episodes = collector.collect(imitation, player)
            update = imitation.update(episodes.batch, episodes.reward, episodes.group)
            bar.set_postfix(loss=f"{update['loss']:.3f}")
            bar.update()


def check_imitation(cfg: DictConfig) -> None:
    """ValueError for an imitation before the training that could not be done."""
    settings = cfg.agent.imitation
    whole("agent.imitation.rounds", settings.rounds, least=0)
    number("agent.imitation.lr", settings.lr, above=0)
    if settings.rounds and cfg.agent.warm_start is not None:
        raise ValueError(
            f"agent.imitation.rounds={settings.rounds}: agent.warm_start={cfg.agent.warm_start!r} is where this run "
            "begins already, say agent.imitation.rounds=0"
        )


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a count that is none, before any work."""
    for name in ("rounds", "prompts_per_round", "checkpoint_every"):
        whole(name, cfg[name])
    whole("num_envs", cfg.num_envs, most=MOST_LANES)
    if cfg.max_prompt_length is not None:
        whole("max_prompt_length", cfg.max_prompt_length)
    if cfg.agent.warm_start is not None:
        text("agent.warm_start", cfg.agent.warm_start)
    check_imitation(cfg)
    check_logger(cfg.logger)
    for name in ("group_size", "max_batches"):
        whole(f"agent.{name}", cfg.agent[name])
    whole("checkpoints.keep", cfg.checkpoints.keep)
    if cfg.checkpoints.validation is not None:
        whole("checkpoints.validation", cfg.checkpoints.validation)
    if cfg.checkpoint_minutes is not None:
        number("checkpoint_minutes", cfg.checkpoint_minutes, above=0)
    check_seed("seed", cfg.seed)
    check_evaluation(cfg)


def check_logger(logger: DictConfig) -> None:
    """ValueError for a logger whose package is not installed: it is made only when the training begins."""
    package = LOGGERS.get(logger.get("_target_", "")) if logger else None
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"logger={package} needs the package {package}: pip install 'dllm_gym[{package}]'")


def run_in(cfg: DictConfig, run: RunFolder, stop: Interrupt, console: Any) -> float | None:
    """Train and evaluate in a folder; None if the training was broken off. Nothing is written before all is checked."""
    if cfg.resume is not None:
        text("resume", cfg.resume)
    source = resumed(cfg, run)
    began = began_with(source and source[1])
    if source is not None:
        go_on(cfg, source[0], began)
    check_settings(cfg)
    device = prepare(cfg)
    torch.manual_seed(cfg.seed)
    policy = make_policy(cfg)
    if source is None:
        warm_start(cfg, policy)
    learner = make_learner(cfg, policy)
    refuse_speed_that_is_fixed(cfg, learner.player.distribution_class)
    settings = {"num_envs": cfg.num_envs, "split": "train", "max_prompt_length": cfg.max_prompt_length}
    print(f"loading train examples and {cfg.model.model or 'their own dLLM'}", flush=True)
    settings["cut_prompts"] = cfg.cut_prompts
    envs = make_envs(cfg, **settings, **requirements([policy, learner.algorithm]))
    policy.manner = manner_of(cfg, envs, recipe(began, cfg.seed))
    deciders = {**policy_deciders(policy, cfg), **heuristics(cfg)}
    refuse_a_range_that_nothing_reads(cfg, deciders.values())
    test_envs = make_evaluation_envs(cfg, deciders)
    if source is None and cfg.agent.imitation.rounds:
        imitate(cfg, envs, policy)
        learner = make_learner(cfg, policy)  # what is held near the beginning is held near this one
    start = Start.of(source and source[1], learner.algorithm, device, run)
    saver = Saver(run.path, policy, learner.algorithm, cfg.checkpoints.keep, validation(cfg, policy))
    start.take_place(saver, cfg.rounds, run)
    run.begin(began)
    if not train(cfg, envs, learner, saver, start, stop):
        return None
    rows = report(cfg, Lab(test_envs, about=about(cfg)), deciders, run, console)
    validated = all(row["validation_reward"] is not None for row in rows)
    # What Hydra's optimising sweepers maximise: not on the test split, where there is another.
    return max(policy_rewards(rows, "validation_reward" if validated else "reward").values())


def began_with(source: Checkpoint | None) -> list[str]:
    """The command line that a run began with: today's, or that of the run which is resumed."""
    if source is None:
        return list(HydraConfig.get().overrides.task)
    return read_overrides(source.run / OVERRIDES) if (source.run / OVERRIDES).is_file() else []


def recipe(began: Sequence[str], seed: int) -> str:
    """The command that trains this run's policy, seed included."""
    named = [] if any(override.startswith("seed=") for override in began) else [f"seed={seed}"]
    return shlex.join(["python", "scripts/train.py", *began, *named])


def told(run: RunFolder) -> str:
    """How to go on with what is saved in a folder, if anything is."""
    last = next(Checkpoints(run.path).whole(), None)
    if last is None:
        return "stopped before anything was saved"
    return f"interrupted; {last} is saved: go on with resume=auto hydra.run.dir={run.path}"


def train_and_report(cfg: DictConfig) -> float:
    """Train and evaluate in the run folder; returns the policy's best mean reward, or exits if it is broken off."""
    console = make_console()
    with Interrupt() as stop, RunFolder(cfg) as run:
        try:
            reward = run_in(cfg, run, stop, console)
        except KeyboardInterrupt:
            reward = None
        if reward is None:
            console.print(told(run), soft_wrap=True)
            sys.exit(stop.code)
    return reward
