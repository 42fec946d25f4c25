"""A rule of your own beside the threshold, on 200 test puzzles: python examples/own_rule.py"""

from __future__ import annotations

from torch import Tensor

from agents.rollout import evaluate
from dllm_gym.deciders import Rule, Threshold
from dllm_gym.deciders.rules import Observation
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


class NearBest(Rule):
    """Everything whose confidence is at least ``share`` of the row's largest one."""

    label = "near_best"  # tables call it near_best(0.9)

    def __init__(self, share: float = 0.9):
        self.share = share

    def choose(self, observation: Observation, noise: Tensor, legal: Tensor) -> Tensor:
        confidence = observation["confidence"][..., 0].masked_fill(~legal, 0.0)  # (.., L)
        return legal & (confidence >= self.share * confidence.amax(-1, keepdim=True))


def main(examples: int = 200) -> dict[str, tuple[float, float]]:
    """Accuracy and NFE by rule."""
    env = DLLMUnmaskVectorEnv(num_envs=100, task="sudoku", split="test")
    table = {}
    for rule in (NearBest(0.9), NearBest(0.7), Threshold(0.9), Threshold(0.6)):
        played = evaluate(env, rule, range(examples))
        table[str(rule)] = (float(played.score.mean()), float(played.nfe.float().mean()))
        print(f"{rule}: accuracy {table[str(rule)][0]:.3f} at NFE {table[str(rule)][1]:.2f}")
    return table


if __name__ == "__main__":
    main()
