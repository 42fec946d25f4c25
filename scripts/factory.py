"""What the scripts share: from configs to objects."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from run_folder import RunFolder
from settings import check_groups, chosen_names
from tqdm import tqdm

import dllm_gym  # noqa: F401  (registers DLLMUnmask-v0)
from agents.evaluation import Played, dataset_rows, evaluate_rows, near, play, save_report, table
from agents.fronts import Point, front_rows, sentences
from agents.generations import Lab
from agents.rollout import Decider
from dllm_gym.checks import distinct, flag, number, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.deciders.distributions import UnmaskDistribution
from dllm_gym.deciders.manner import Manner
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.policy import Policy
from dllm_gym.deciders.rules import Rule
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import DLLM, load_dllm
from dllm_gym.models.base import last_block, own_block
from dllm_gym.models.load import check_device
from dllm_gym.process.config import EMPTY
from dllm_gym.process.entries import COUNTS, FLAGS
from dllm_gym.process.rewards import AlphaRange
from dllm_gym.process.unmasking import MOST_LANES
from dllm_gym.tasks import ProceduralTask, Task

log = logging.getLogger(__name__)

MOST_THREADS = 1024  # beyond this starting them fails
MODELS_OWN: dict[str, Callable[[DLLM], Any]] = {  # of a policy: the dLLM's own where they are null
    "hidden_size": lambda dllm: dllm.hidden_size,
    "vocab_size": lambda dllm: dllm.vocab_size,
    "own_block": own_block,
}
HASTE = 3.0  # of haste: null: between the ends of the preference a threshold falls from 0.5 to 0.05
DECODINGS = {None: ("greedy", "sampled"), True: ("greedy",), False: ("sampled",)}  # of a policy, by evaluation.greedy
SAMPLE = 200  # examples whose answers are measured


def prepare(cfg: DictConfig) -> torch.device:
    """Sets torch's threads; returns the device."""
    if cfg.threads is not None:
        torch.set_num_threads(whole("threads", cfg.threads, most=MOST_THREADS))
    return device_of(cfg)


def device_of(cfg: DictConfig) -> torch.device:
    """Where everything of a configuration lives; ValueError if tensors cannot be made there."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    return check_device(wanted)


def make_envs(cfg: DictConfig, **settings: Any) -> DLLMUnmaskVectorEnv:
    """The vector environment of a configuration; ``settings`` are num_envs, split and what the deciders need."""
    task = hydra.utils.instantiate(cfg.task, _convert_="all")
    dllm = make_dllm(cfg, task)
    chosen = {**cfg.env, **cfg.reward}
    if chosen.get("teacher_forcing"):
        raise ValueError(
            f"env.teacher_forcing={chosen['teacher_forcing']}: all answers would be right, whoever decides; agents "
            "that learn from right answers (gt_margin, sas) switch it on for their training alone"
        )
    for name, value in settings.items():  # of what the user and the deciders ask for the larger counts
        chosen[name] = max(chosen.get(name) or 0, value) if name in (*COUNTS, *FLAGS) else value
    envs = gym.make_vec("DLLMUnmask-v0", model=dllm, task=task, device=dllm.device, **chosen)
    refuse_short_answers(envs)
    return envs


def make_dllm(cfg: DictConfig, task: Task | None = None) -> DLLM:
    """The frozen dLLM of a configuration: ``cfg.model`` are the arguments of ``load_dllm``; null is the task's own."""
    if cfg.model.model is None:
        cfg.model.model = (task or hydra.utils.instantiate(cfg.task, _convert_="all")).dllm
    return load_dllm(**OmegaConf.to_container(cfg.model, resolve=True), device=device_of(cfg))


def make_policy(cfg: DictConfig) -> Policy:
    """The policy network of a configuration; what is null of ``MODELS_OWN`` (in a reference, too) is the dLLM's own.

    With ``preference: null`` it reads the preference if the reward has a range of alphas, with ``haste: null`` that
    preference moves its speed from the start.
    """
    if "preference" in cfg.policy and cfg.policy.preference is None:
        cfg.policy.preference = AlphaRange.of(cfg.reward.alpha) is not None
    if "haste" in cfg.policy and cfg.policy.haste is None:
        cfg.policy.haste = HASTE if cfg.policy.preference else 0.0
    for part in (cfg.policy, cfg.get("reference") or {}):
        for size, own in MODELS_OWN.items():
            if size in part and part[size] is None:
                part[size] = own(make_dllm(cfg))
    policy = hydra.utils.instantiate(cfg.policy, _convert_="all")
    if hasattr(policy, "adopt"):  # a network that begins with weights of the dLLM
        policy.adopt(last_block(make_dllm(cfg).backbone))
    return policy.to(device_of(cfg))


def manner_of(cfg: DictConfig, envs: DLLMUnmaskVectorEnv | None = None, recipe: str | None = None) -> Manner:
    """How the policy of a configuration wants to be played; ``envs`` and ``recipe`` say what it is trained on and how.

    Without an environment it says what the configuration alone does.
    """
    settings = hydra.utils.instantiate(cfg.distribution)
    env = {name: value for name, value in OmegaConf.to_container(cfg.env, resolve=True).items() if value is not None}
    task = getattr(hydra.utils.get_object(cfg.task._target_), "name", None)
    dllm: dict[str, Any] = {}
    if envs is not None:
        core = envs.core
        env |= {"gen_length": core.L, "block_length": core.blocks.length}
        task, dllm = core.task.name, {"family": core.dllm.config.get("model_type"), "vocab_size": core.dllm.vocab_size}
    return Manner(
        distribution=settings.evaluate.__name__,
        temperature=settings.evaluate_temperature,
        greedy=cfg.evaluation.get("greedy") is not False,
        alpha=None if AlphaRange.of(cfg.reward.alpha) is None else [float(a) for a in cfg.reward.alpha],
        model=OmegaConf.to_container(cfg.model, resolve=True),
        task=task,
        env=env,
        recipe=recipe,
        **dllm,
    )


def requirements(deciders: Iterable[Any]) -> dict[str, int]:
    """The least settings of an environment that all of these deciders can read: the largest of each."""
    needs: dict[str, int] = {}
    for decider in deciders:
        for name, least in getattr(decider, "requires", {}).items():
            needs[name] = max(needs.get(name, 0), int(least))
    return needs


def make_evaluation_envs(cfg: DictConfig, deciders: Mapping[str, Decider]) -> DLLMUnmaskVectorEnv:
    """The environment of the evaluation, in which every decider has made a step: what does not fit fails now."""
    settings = cfg.evaluation
    baseline = settings.get("baseline")
    if baseline is not None and baseline not in deciders:
        raise ValueError(f"evaluation.baseline={baseline!r} is none of {', '.join(deciders)}")
    needs = requirements(deciders.values())
    print(f"loading {settings.split} examples and {cfg.model.model or 'their own dLLM'}", flush=True)
    envs = make_envs(cfg, num_envs=settings.num_envs, split=settings.split, **needs)
    total = len(envs.core.examples)
    if settings.examples is None:
        settings.examples = total
    if not 1 <= settings.examples <= total:
        raise ValueError(f"evaluation.examples={settings.examples}: split {settings.split!r} has {total} examples")
    print(f"trying {len(deciders)} deciders, one step each", flush=True)
    for decider in deciders.values():
        check_vocabulary(decider, envs)
        try_out(decider, envs)
    return envs


def try_out(decider: Decider, envs: DLLMUnmaskVectorEnv) -> None:
    """One step of one episode; whatever a decider raises that cannot read this observation, or a ValueError for its
    action."""
    observation, _ = envs.reset(seed=0, options={"examples": [0, *[EMPTY] * (envs.num_envs - 1)]})
    noise = torch.full((1, envs.core.L), 0.5, device=envs.device)
    action = decider({name: value[:1] for name, value in observation.items()}, noise)
    envs.step(torch.cat([action, action.new_zeros(envs.num_envs - 1, envs.core.L)]))


def check_vocabulary(decider: Decider, envs: DLLMUnmaskVectorEnv) -> None:
    """ValueError for a policy that reads tokens of another vocabulary than the dLLM's."""
    known, own = getattr(getattr(decider, "policy", None), "vocab_size", 0), envs.core.dllm.vocab_size
    if known not in (0, own):
        raise ValueError(f"policy.vocab_size={known}: the policy reads other tokens than this model's, which has {own}")


def heuristics(cfg: DictConfig) -> dict[str, Decider]:
    """The configured rules by name; a rule that is listed twice would hide a row of the table."""
    rules = hydra.utils.instantiate(cfg.heuristics, _convert_="all")
    named = {str(rule): rule for rule in rules}
    if len(named) < len(rules):
        raise ValueError(f"heuristics: of {[str(rule) for rule in rules]} some are the same")
    return named


def refuse_a_range_that_nothing_reads(cfg: DictConfig, deciders: Iterable[Decider]) -> None:
    """ValueError for several alphas where no decider reads the preference that tells them apart."""
    if any(reads_preference(decider) for decider in deciders):
        return
    if AlphaRange.of(cfg.reward.alpha) is not None:
        raise ValueError(
            f"reward.alpha={list(cfg.reward.alpha)}: no decider here reads which alpha of a range an episode has, give "
            "a number (a policy reads it with policy.preference=true)"
        )
    if cfg.get("evaluation") is not None and cfg.evaluation.get("alphas") is not None:
        raise ValueError(
            f"evaluation.alphas={cfg.evaluation.alphas} is read by nothing: it is for a policy that reads a preference "
            "(policy.preference=true and reward.alpha=[low,high])"
        )


def refuse_speed_that_is_fixed(cfg: DictConfig, distribution: type[UnmaskDistribution]) -> None:
    """ValueError for a reward that pays for speed where the distribution fixes how many steps an episode takes."""
    alpha = cfg.reward.alpha
    if distribution.fixed_steps and (AlphaRange.of(alpha) is not None or alpha > 0):
        raise ValueError(
            f"reward.alpha={alpha}: with {distribution.__name__} an episode takes as many steps as it has masks, there "
            "is no speed to pay for: use reward.alpha=0 or another distribution"
        )


def reads_preference(decider: Decider) -> bool:
    """False for rules and policies that are known not to read it."""
    if isinstance(decider, PolicyDecider):
        return "preference" in decider.policy.in_keys
    return not isinstance(decider, Rule)


def refuse_short_answers(envs: DLLMUnmaskVectorEnv) -> None:
    """ValueError if not one known answer of a procedural task fits into the completion; a warning if some do not."""
    core, task = envs.core, envs.core.task
    if not isinstance(task, ProceduralTask):
        return
    needed = [len(core.dllm.encode(task.solution(example))) for example in core.examples[:SAMPLE]]
    long = sum(tokens > core.L for tokens in needed)
    if long == len(needed):
        raise ValueError(
            f"gen_length={core.L}: no completion of that length holds an answer of task {task.name!r} (at least "
            f"{min(needed)} tokens)"
        )
    if long:
        log.warning("gen_length=%d is too short for %d of %d answers of task %r", core.L, long, len(needed), task.name)


def policy_deciders(
    policy: Policy, cfg: DictConfig, temperatures: Sequence[float] | None = None, run: str = ""
) -> dict[str, Decider]:
    """The policy as ``cfg`` evaluates it: greedy, sampled or both, and if it reads a preference with several alphas.

    Args:
        temperatures: at which it is sampled; None: the one that ``cfg`` has. A greedy action is that of every
            temperature. run: which one it is of, where there are several.
    """
    settings = hydra.utils.instantiate(cfg.distribution)
    heats = [settings.evaluate_temperature] if temperatures is None else list(temperatures)
    named = {"greedy": [("greedy", heats[0])]}
    named["sampled"] = [("sampled" if len(heats) == 1 else f"sampled, temperature={heat:g}", heat) for heat in heats]
    knobs = {f", alpha={a:.3g}": a for a in alphas(cfg)} if "preference" in policy.in_keys else {"": None}
    which = run and f", run={run}"
    return {
        f"policy({how}{which}{label})": PolicyDecider(policy, settings.evaluate, heat, how == "greedy", alpha)
        for kind in DECODINGS[cfg.evaluation.get("greedy")]
        for how, heat in named[kind]
        for label, alpha in knobs.items()
    }


def alphas(cfg: DictConfig) -> list[float]:
    """The alphas that a policy with a preference is evaluated with: those chosen, or seven over the reward's range.

    Raises:
        ValueError: the reward has no range, or one of those chosen lies outside of it.
    """
    span = AlphaRange.of(cfg.reward.alpha)
    if span is None:
        raise ValueError(f"reward.alpha={cfg.reward.alpha}: this policy reads a preference, give a range [low, high]")
    chosen = cfg.evaluation.get("alphas")
    if chosen is None:
        return [span.at(i / 6) for i in range(7)]
    return [number("evaluation.alphas", a, span.low, span.high) for a in distinct("evaluation.alphas", chosen)]


def take_over(cfg: DictConfig, trained: DictConfig) -> None:
    """Let ``cfg`` use the model, task, env and reward that a policy was trained with, but for what the user chose."""
    chosen = chosen_names()
    for group in ("model", "task", "env", "reward"):
        if group in chosen:
            continue
        own, cfg[group] = cfg[group], trained[group]
        for name in (n.removeprefix(f"{group}.") for n in chosen if n.startswith(f"{group}.")):
            OmegaConf.update(cfg[group], name, OmegaConf.select(own, name), force_add=True)
    check_groups(cfg)


def check_evaluation(cfg: DictConfig) -> None:
    """ValueError for an evaluation that could not be done, before any work."""
    settings = cfg.evaluation
    whole("evaluation.num_envs", settings.num_envs, most=MOST_LANES)
    if settings.examples is not None:
        whole("evaluation.examples", settings.examples)
    if settings.greedy is not None:
        flag("evaluation.greedy", settings.greedy)
    if settings.validation is not None:
        whole("evaluation.validation", settings.validation)
    if settings.within is not None:
        number("evaluation.within", settings.within, least=0, most=1)
    for seed in distinct("evaluation.seeds", settings.seeds):
        check_seed("evaluation.seeds", seed)
    if settings.get("reward_alpha") is not None:
        number("evaluation.reward_alpha", settings.reward_alpha, least=0)
    if settings.alphas is not None:
        for alpha in distinct("evaluation.alphas", settings.alphas):
            number("evaluation.alphas", alpha, above=0)


def validate(cfg: DictConfig, lab: Lab, deciders: Mapping[str, Decider], console: Any) -> dict[str, Played] | None:
    """The deciders on the first examples of the validation split, once; None where nothing is to be chosen there."""
    settings = cfg.evaluation
    if settings.validation is None or settings.split == "validation":
        return None
    began = time.perf_counter()
    needs = requirements(deciders.values())
    try:
        own = make_envs(cfg, num_envs=settings.num_envs, split="validation", **needs)
    except ValueError as error:
        console.print(f"nothing is chosen on validation: {error}")
        return None
    count = min(settings.validation, settings.examples, len(own.core.examples))
    there = Lab(own, lab.known, about(cfg))
    played = play_each(there, deciders, range(count), settings.seeds[:1], "validating")
    seconds = time.perf_counter() - began
    console.print(f"chosen on validation: {count} examples, {len(deciders)} deciders, {seconds:.0f} s")
    return played


def play_each(
    lab: Lab, deciders: Mapping[str, Decider], examples: Sequence[int], seeds: Sequence[int], what: str
) -> dict[str, Played]:
    """As :func:`~agents.evaluation.play`; says which decider plays."""
    played: dict[str, Played] = {}
    with tqdm(total=len(deciders), desc=f"{what} on {len(examples)} examples", unit="decider") as bar:
        for name, decider in deciders.items():
            bar.set_postfix_str(name)
            played |= play(lab, {name: decider}, examples, seeds)
            bar.update()
    return played


def about(cfg: DictConfig) -> dict[str, Any]:
    """Settings that decide episodes and scores, and that neither the environment nor its examples show."""
    groups = OmegaConf.to_container(OmegaConf.create({"model": cfg.model, "task": cfg.task}), resolve=True)
    return {"block_length": cfg.env.get("block_length"), **groups}


def report(cfg: DictConfig, lab: Lab, deciders: Mapping[str, Decider], run: RunFolder, console: Any) -> list[Point]:
    """Evaluate, print the table and what it says, write results.{json,csv,md,png} into the run folder."""
    settings = cfg.evaluation
    stated = settings.get("reward_alpha")
    validation = validate(cfg, lab, deciders, console)
    validation = validation and {name: played.paid_by(stated) for name, played in validation.items()}
    if settings.within is not None and validation is not None:
        kept = {*near(validation, settings.within), settings.get("baseline")}
        deciders = {name: decider for name, decider in deciders.items() if name in kept}
    test = play_each(lab, deciders, range(settings.examples), settings.seeds, "evaluating")
    test = {name: played.paid_by(stated) for name, played in test.items()}
    rows = evaluate_rows(test, validation, settings.get("baseline"))
    core = lab.env.core
    title = f"{core.task.name}, {settings.examples} {settings.split} examples, L = {core.L}, BL = {core.block_length}"
    datasets = [core.task.dataset_of(core.examples[i]) for i in range(settings.examples)]
    parts = dataset_rows(test, datasets, settings.get("baseline"))
    save_report(rows, run.path, title, front_rows(rows, core.L), parts)  # before printing: a reader may go away
    console.print(table(rows, title))
    if parts:
        console.print(table(parts, "by data set"))
    for sentence in sentences(rows):
        console.print(sentence)
    console.print(f"written: {run.path}/results.json, results.csv, results.md, results.png", soft_wrap=True)
    return rows
