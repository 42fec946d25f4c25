"""PPO from TorchRL's parts (Collector, GAE, ClipPPOLoss) with this project's policy on DLLMUnmask-v0.

python examples/torchrl_ppo.py                     # a minute on two CPU cores
python examples/torchrl_ppo.py --alpha=1 --seed=2  # every argument of main is an option

Prints the mean reward, score and NFE of the episodes that ended in each batch; the reward goes from 0.22 to 0.69.
"""

from __future__ import annotations

import argparse
import inspect

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import make_actor
from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv


class Value(nn.Module):
    """The critic: how sure the dLLM is, how much is left, and the time -> what that is worth."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, confidence: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        sure, left = confidence[..., 0] * mask, mask.float().mean(-1, keepdim=True)  # (.., L), (.., 1)
        facts = [sure.mean(-1, keepdim=True), sure.amax(-1, keepdim=True), left, time]
        return self.net(torch.cat(facts, -1))  # (.., 1)


def main(batches: int = 24, num_envs: int = 64, num_steps: int = 16, alpha: float = 3.0, seed: int = 1) -> list[dict]:
    """Train; returns what is printed, one dict per batch of num_envs x num_steps."""
    torch.manual_seed(seed)
    env = DLLMUnmaskTorchRLEnv(num_envs=num_envs, task="sudoku", alpha=alpha)
    env.set_seed(seed)
    actor = make_actor(DiTConfidence(width=32, ffn=64, output_bias=-1.0), ZeroTruncatedBernoulli)
    critic = TensorDictModule(Value(), in_keys=["confidence", "mask", "time"], out_keys=["state_value"])
    gae = GAE(gamma=1.0, lmbda=0.95, value_network=critic, average_gae=True)
    ppo = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=1e-3, critic_coeff=0.5)
    optimizer = torch.optim.Adam(ppo.parameters(), lr=2e-3)
    frames = num_envs * num_steps
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=batches * frames, auto_register_policy_transforms=False
    )
    history: list[dict] = []
    for data in collector:  # (N, T)
        gae(data)
        for _ in range(4):
            for rows in torch.randperm(frames).chunk(4):
                losses = ppo(data.reshape(-1)[rows])
                loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(ppo.parameters(), 0.5)
                optimizer.step()
        ended = data["next"][data["next", "done"].squeeze(-1)]  # one row for every episode that ended
        told = {name: ended[name].float().mean().item() for name in ("reward", "score", "nfe")}
        history.append({"steps": (len(history) + 1) * frames, **told, "loss": loss.item()})
        print("  ".join(f"{name} {value:.3f}".removesuffix(".000") for name, value in history[-1].items()), flush=True)
    collector.shutdown()
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, argument in inspect.signature(main).parameters.items():
        parser.add_argument(f"--{name}", type=type(argument.default), default=argument.default)
    main(**vars(parser.parse_args()))
