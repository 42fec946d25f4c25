"""An algorithm of your own, trained for a few rounds: python examples/own_algorithm.py"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchrl.modules import ProbabilisticActor

from agents.advantages import group_advantage
from agents.algorithm import Algorithm, per_step
from agents.losses import Descent, pack
from agents.reinforce import PolicyGradientLoss
from agents.training import Collector, Prompts
from dllm_gym.deciders import DiTConfidence, PolicyDecider, ZeroTruncatedBernoulli, make_actor
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


class SignGradient(Algorithm):
    """The policy gradient that only asks whether an episode did better or worse than its group."""

    compares = True  # a group of one teaches nothing

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        **descent: Any,
    ):
        loss = PolicyGradientLoss(actor, None, entropy_bonus=False, functional=False)
        super().__init__(actor, Descent(loss, optimizer, **descent))

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        advantage, _ = group_advantage(reward, group)  # (E,)
        batch = batch.select(*self.actor.in_keys, "action", "action_log_prob", "active")
        batch["advantage"] = per_step(advantage.sign(), batch)
        return self.descent.run(pack(batch, summed=True))


def main(rounds: int = 8, lr: float = 5e-3) -> list[float]:
    """The mean reward of every round."""
    torch.manual_seed(0)
    policy = DiTConfidence(width=64, ffn=128, absolute_positions=True)
    algorithm = SignGradient(make_actor(policy, ZeroTruncatedBernoulli), partial(AdamW, lr=lr))
    player = PolicyDecider(policy, ZeroTruncatedBernoulli)
    env = DLLMUnmaskVectorEnv(num_envs=64, task="sudoku", alpha=1.0)
    prompts = Prompts(len(env.core.examples), seed=0)
    collector = Collector(env, prompts, seed=0, prompts_per_round=8, group_size=8)
    rewards = []
    for number in range(rounds):
        episodes = collector.collect(algorithm, player)
        algorithm.update(episodes.batch, episodes.reward, episodes.group)
        rewards.append(float(episodes.reward.mean()))
        print(f"round {number}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
