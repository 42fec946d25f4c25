"""Replay one decoding in the terminal.

python scripts/watch.py example=3
python scripts/watch.py checkpoint=outputs/train/2026-01-01_12-00-00 gif=replay.gif
"""

from __future__ import annotations

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from run_folder import load_policy
from shared import make_envs, policy_deciders, prepare, requirements, take_over

from dllm_gym.dealer import check_example
from dllm_gym.noise import fold, uniform
from dllm_gym.render import Viewer, pixels


@hydra.main(version_base=None, config_path="../conf", config_name="watch")
def main(cfg: DictConfig) -> None:
    decider = hydra.utils.instantiate(cfg.decider)
    if cfg.checkpoint is not None:
        policy, trained = load_policy(cfg.checkpoint, cfg)
        take_over(cfg, trained)
        settings = {"distribution": trained.distribution, "reward": cfg.reward, "evaluation": {"alphas": [cfg.alpha]}}
        greedy, sampled = policy_deciders(policy, OmegaConf.create(settings)).values()
        decider = greedy if cfg.greedy else sampled
    device = prepare(cfg)
    if cfg.checkpoint is not None:
        policy.to(device)
    envs = make_envs(cfg, device, num_envs=1, split=cfg.split, autoreset_mode="Disabled", **requirements([decider]))
    example = check_example(cfg.example, len(envs.core.examples))
    options = {"examples": [example], "alpha": getattr(decider, "alpha", None)}
    observation, _ = envs.reset(seed=cfg.seed, options=options)
    viewer, frames, done = Viewer(fps=cfg.fps), [], False
    print(f"{decider} on example {example} of {cfg.split}\n")
    stream = fold(torch.full((1,), cfg.seed, dtype=torch.int64, device=device), 0)
    for step in range(envs.core.max_steps + 1):
        frames.append(envs.core.frame(0))
        viewer.show(frames[-1])
        if done:
            break
        action = decider(observation, uniform(stream, step, envs.core.L))
        observation, _, terminated, truncated, _ = envs.step(action)
        done = bool(terminated | truncated)
    if cfg.gif:
        save_gif([pixels(frame) for frame in frames], cfg.gif, cfg.fps)
        print(f"written: {cfg.gif}")


def save_gif(pictures: list, path: str, fps: float) -> None:
    """Pictures uint8 [H, W, 3] as an endless animation that rests on its last frame."""
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    duration = [round(1000 / fps)] * len(others) + [2500]
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


if __name__ == "__main__":
    main()
