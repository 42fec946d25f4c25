"""Replay one decoding in the terminal.

python scripts/watch.py example=3
python scripts/watch.py checkpoint=outputs/train/2026-01-01_12-00-00 gif=replay.gif
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra
from command import command
from omegaconf import DictConfig, OmegaConf
from settings import refuse_chosen

from dllm_gym.checks import flag, number, text, whole, writable
from dllm_gym.checks import seed as check_seed
from dllm_gym.render import LEAST_FPS, MOST_FPS, Viewer, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from agents.rollout import Decider
    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
    from dllm_gym.render import Frame


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    flag("greedy", cfg.greedy)
    number("alpha", cfg.alpha, above=0)
    number("fps", cfg.fps, least=LEAST_FPS, most=MOST_FPS)
    whole("example", cfg.example, least=0)
    check_seed("seed", cfg.seed)
    if cfg.gif is not None:
        writable("gif", cfg.gif, (".gif",))
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
    if cfg.checkpoint is not None:
        policy.to(device)
    envs = make_envs(cfg, device, num_envs=1, split=cfg.split, autoreset_mode="Disabled", **requirements([decider]))
    example = whole("example", cfg.example, least=0, most=len(envs.core.examples) - 1)
    options = {"examples": [example], "alpha": getattr(decider, "alpha", None)}
    observation, _ = envs.reset(seed=cfg.seed, options=options)
    print(f"{decider} on example {example} of {cfg.split}\n")
    frames = replay(envs, decider, observation, cfg)
    if cfg.gif is not None:
        save_gif([pixels(frame) for frame in frames], cfg.gif, cfg.fps)
        print(f"written: {cfg.gif}")


def replay(envs: DLLMUnmaskVectorEnv, decider: Decider, observation: dict[str, Tensor], cfg: DictConfig) -> list[Frame]:
    """Decode and show one episode, step by step; returns what was shown."""
    import torch

    from dllm_gym.noise import fold, uniform

    viewer, frames, done = Viewer(fps=cfg.fps), [], False
    device = envs.device
    stream = fold(torch.full((1,), cfg.seed, dtype=torch.int64, device=device), 0)
    for step in range(envs.core.max_steps + 1):
        frames.append(envs.core.frame(0))
        viewer.show(frames[-1])
        if done:
            break
        action = decider(observation, uniform(stream, step, envs.core.L))
        observation, _, terminated, truncated, _ = envs.step(action)
        done = bool(terminated | truncated)
    return frames


def save_gif(pictures: list, path: str, fps: float) -> None:
    """Pictures uint8 [H, W, 3] as an endless animation that rests on its last frame."""
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    duration = [round(1000 / fps)] * len(others) + [2500]
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


if __name__ == "__main__":
    main()
