"""Replay one decoding in the terminal.

python scripts/watch.py example=3
python scripts/watch.py checkpoint=outputs/train/2026-01-01_12-00-00 gif=replay.gif
python scripts/watch.py html=race.html 'against=["joint(0.4)", "top_k(2)"]'
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from command import command
from omegaconf import DictConfig, OmegaConf
from settings import refuse_chosen

from dllm_gym.checks import flag, number, text, whole, writable
from dllm_gym.checks import seed as check_seed
from dllm_gym.render import LEAST_FPS, MOST_FPS, Viewer, pixels
from dllm_gym.replay import MOST, page

if TYPE_CHECKING:
    from agents.rollout import Decider
    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


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
        refuse_chosen(["gif", "fps"], "a page has its own speed")
        if len(cfg.against) > MOST - 1:
            raise ValueError(f"against={list(cfg.against)}: at most {MOST - 1} others have room on a page")
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
    from run_folder import load_policy

    from dllm_gym.deciders.player import PolicyDecider, make_decider
    from dllm_gym.envs.episodes import record

    check_settings(cfg)
    decider = hydra.utils.instantiate(cfg.decider)
    if cfg.checkpoint is not None:
        policy, trained = load_policy(cfg.checkpoint, cfg)
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
    envs = make_envs(cfg, device, num_envs=1, split=cfg.split, autoreset_mode="Disabled", **requirements(racers))
    example = whole("example", cfg.example, least=0, most=len(envs.core.examples) - 1)
    if cfg.html is not None:
        write_page(envs, racers, cfg)
        return
    print(f"{decider} on example {example} of {cfg.split}\n")
    frames = record(envs, decider, example, cfg.seed, Viewer(fps=cfg.fps).show)
    if cfg.gif is not None:
        save_gif([pixels(frame) for frame in frames], cfg.gif, cfg.fps)
        print(f"written: {cfg.gif}")


def write_page(envs: DLLMUnmaskVectorEnv, racers: list[Decider], cfg: DictConfig) -> None:
    """Let them race on the same examples, and write the page."""
    from dllm_gym.envs.episodes import record

    last = min(cfg.example + cfg.examples, len(envs.core.examples))
    races = [[record(envs, racer, example, cfg.seed) for racer in racers] for example in range(cfg.example, last)]
    Path(cfg.html).write_text(page([str(racer) for racer in racers], races), encoding="utf-8")
    print(f"written: {cfg.html}")


def save_gif(pictures: list, path: str, fps: float) -> None:
    """Pictures uint8 [H, W, 3] as an endless animation that rests on its last frame."""
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    duration = [round(1000 / fps)] * len(others) + [2500]
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


if __name__ == "__main__":
    main()
