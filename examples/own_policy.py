"""A policy network of your own, saved, loaded and played: python examples/own_policy.py"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

from agents.rollout import evaluate
from dllm_gym.deciders import Policy, PolicyDecider, ZeroTruncatedBernoulli
from dllm_gym.deciders.policy import smart_head
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


class EntropyPolicy(Policy):
    """A network per position that reads confidence, entropy and how much is still masked."""

    reads = ("confidence", "entropy", "mask")

    def __init__(self, *, width: int = 64, output_bias: float = -2.0, candidates: int | None = None):
        super().__init__(candidates=candidates)
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = smart_head(width, output_bias)

    @property
    def requires(self) -> dict[str, int]:
        return {**super().requires, "entropy": 1}

    def trunk(self, confidence: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        left = mask.float().mean(-1, keepdim=True).expand(mask.shape)  # (B, L)
        seen = torch.stack([confidence[..., 0], entropy, left], -1)  # (B, L, 3)
        return self.layers(seen.to(self.head.weight.dtype))


def main(examples: int = 50) -> tuple[list[str], list[str]]:
    """The completions of a new policy, and those of what was loaded after it was saved."""
    torch.manual_seed(0)
    policy = EntropyPolicy()
    env = DLLMUnmaskVectorEnv(num_envs=50, task="sudoku", split="test", **policy.requires)
    played = evaluate(env, PolicyDecider(policy, ZeroTruncatedBernoulli), range(examples))
    print(f"untrained: accuracy {played.score.mean():.3f} at NFE {played.nfe.float().mean():.2f}")
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        loaded = EntropyPolicy.from_pretrained(folder)
    again = evaluate(env, PolicyDecider(loaded, ZeroTruncatedBernoulli), range(examples))
    return played.completions, again.completions


if __name__ == "__main__":
    main()
