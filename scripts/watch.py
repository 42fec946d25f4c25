"""Replay one decoding in the terminal, or several of them on a page.

python scripts/watch.py example=3
python scripts/watch.py checkpoint=outputs/train/2026-01-01_12-00-00 gif=replay.gif mp4=replay.mp4
python scripts/watch.py html=race.html 'against=["joint(0.4)", "top_k(2)"]'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from command import command
from omegaconf import DictConfig, OmegaConf
from settings import refuse_chosen

from dllm_gym.checks import flag, number, text, whole, writable
from dllm_gym.checks import seed as check_seed
from dllm_gym.render import LEAST_FPS, MOST_FPS, Viewer, pixels
from dllm_gym.replay import METRICS, MOST, page

if TYPE_CHECKING:
    from agents.rollout import Decider
    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

REST = 2.5  # seconds for the last picture
MOST_ROUNDS = 100_000  # of runs whose only checkpoint does not say how many it has


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    flag("greedy", cfg.greedy)
    number("alpha", cfg.alpha, above=0)
    number("fps", cfg.fps, least=LEAST_FPS, most=MOST_FPS)
    whole("example", cfg.example, least=0)
    check_seed("seed", cfg.seed)
    if cfg.gif is not None:
        writable("gif", cfg.gif, (".gif",))
    whole("examples", cfg.examples)
    if cfg.html is None:
        refuse_chosen(["against", "examples"], "they are of a page, html=race.html")
    else:
        writable("html", cfg.html, (".html", ".htm"))
        refuse_chosen(["gif", "mp4", "fps"], "a page has its own speed")
        if len(cfg.against) > MOST - 1:
            raise ValueError(f"against={list(cfg.against)}: at most {MOST - 1} others have room on a page")
    if cfg.mp4 is not None:
        writable("mp4", cfg.mp4, (".mp4",))
        try:
            import av  # noqa: F401
            import imageio  # noqa: F401
        except ImportError as error:
            raise ValueError(f"mp4={cfg.mp4!r}: videos need pip install -e '.[video]' ({error})") from None
    if cfg.checkpoint is None:
        refuse_chosen(["greedy", "alpha"], "they are of a checkpoint's policy")
    else:
        text("checkpoint", cfg.checkpoint)
        refuse_chosen(["decider"], "the policy of checkpoint= decides")


@command("watch")
def main(cfg: DictConfig) -> None:
    from factory import (
        make_envs,
        policy_deciders,
        prepare,
        reads_preference,
        refuse_a_range_that_nothing_reads,
        requirements,
        take_over,
    )
    from run_folder import load_policy, naming

    from dllm_gym.deciders.player import PolicyDecider, make_decider
    from dllm_gym.envs.episodes import record

    check_settings(cfg)
    decider = hydra.utils.instantiate(cfg.decider)
    if cfg.checkpoint is not None:
        policy, trained = load_policy(cfg.checkpoint, cfg)
        with naming("checkpoint", cfg.checkpoint):
            take_over(cfg, trained)
        settings = {"distribution": trained.distribution, "reward": cfg.reward, "evaluation": {"alphas": [cfg.alpha]}}
        greedy, sampled = policy_deciders(policy, OmegaConf.create(settings)).values()
        decider = greedy if cfg.greedy else sampled
        if not reads_preference(decider):
            refuse_chosen(["alpha"], f"the policy of {cfg.checkpoint} has no preference")
    refuse_a_range_that_nothing_reads(cfg, [decider])
    device = prepare(cfg)
    racers = [decider, *(make_decider(name) for name in cfg.against)]
    for racer in racers:
        if isinstance(racer, PolicyDecider):
            racer.policy.to(device)
    envs = make_envs(cfg, num_envs=1, split=cfg.split, autoreset_mode="Disabled", **requirements(racers))
    example = whole("example", cfg.example, least=0, most=len(envs.core.examples) - 1)
    if cfg.html is not None:
        write_page(envs, dict(zip(names([cfg.checkpoint, *cfg.against], racers), racers, strict=True)), cfg)
        return
    print(f"{decider} on example {example} of {cfg.split}\n")
    frames = record(envs, decider, example, cfg.seed, Viewer(fps=cfg.fps).show)
    for path, save in ((cfg.gif, save_gif), (cfg.mp4, save_mp4)):
        if path is not None:
            save([pixels(frame) for frame in frames], path, cfg.fps)
            print(f"written: {path}")


def names(sources: Sequence[str | None], racers: Sequence[Decider]) -> list[str]:
    """What the page calls them: rules as in tables, saved policies as the user does, and at which alpha they play.

    Raises:
        ValueError: two are the same.
    """
    from run_folder import short

    from dllm_gym.deciders.player import PolicyDecider

    found = []
    for source, racer in zip(sources, racers, strict=True):
        alpha = getattr(racer, "alpha", None)
        own = source is not None and isinstance(racer, PolicyDecider)
        found.append((short(str(source)) if own else str(racer)) + (f", alpha {alpha:.3g}" if alpha else ""))
    if len(set(found)) < len(found):
        raise ValueError(f"against={list(sources[1:])}: of the racers {found} some are the same")
    return found


def write_page(envs: DLLMUnmaskVectorEnv, racers: Mapping[str, Decider], cfg: DictConfig) -> None:
    """Let them race on the same examples, and write the page."""
    from dllm_gym.envs.episodes import record

    last = min(cfg.example + cfg.examples, len(envs.core.examples))
    races = [
        [record(envs, racer, example, cfg.seed) for racer in racers.values()] for example in range(cfg.example, last)
    ]
    sources = zip(racers, [cfg.checkpoint, *cfg.against], strict=True)
    curves = {name: learning(str(source)) for name, source in sources if source is not None}
    Path(cfg.html).write_text(page([*racers], races, curves), encoding="utf-8")
    print(f"written: {cfg.html}")


def learning(source: str) -> list[dict[str, float]]:
    """The rounds of the run that a decider comes from, as far as its checkpoint; none where there is no run."""
    from agents.training import read_rounds
    from dllm_gym.deciders.saved import checkpoint_of

    checkpoint = checkpoint_of(source)
    if checkpoint is None:
        return []
    rows, _ = read_rounds(checkpoint.metrics, checkpoint.number if checkpoint.number >= 0 else MOST_ROUNDS)
    return [{name: float(row[name]) for name in ("round", *METRICS)} for row in rows if row.keys() >= set(METRICS)]


def save_gif(pictures: list[Any], path: str, fps: float) -> None:
    """Pictures uint8 [H, W, 3] as an endless animation that rests on its last frame."""
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    duration = [round(1000 / fps)] * len(others) + [round(1000 * REST)]
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


def save_mp4(pictures: list[Any], path: str, fps: float) -> None:
    """Pictures uint8 [H, W, 3] as H.264, which rests for as long on its last frame."""
    import imageio.v3 as iio

    rest = math.ceil(REST * fps)
    iio.imwrite(path, [*pictures, *pictures[-1:] * (rest - 1)], plugin="pyav", codec="libx264", fps=fps)


if __name__ == "__main__":
    main()
