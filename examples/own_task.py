"""A task of your own, on the shipped dLLM: python examples/own_task.py

The vocabulary of ``tiny`` is digits and a few signs, so this task writes a letter as two digits, A = 01 to Z = 26; for
a dLLM that knows letters, ``spelled`` falls away. ``tiny`` has learnt no capitals: expect a score near 0.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym

import dllm_gym.tasks
from dllm_gym.tasks import DatasetTask, Example

CSV = Path(__file__).with_name("capitals.csv")


def spelled(text: str) -> str:
    """The letters of a text as two digits each.

    >>> spelled("Rome")
    '18151305'
    """
    return "".join(f"{ord(letter) - ord('A') + 1:02}" for letter in text.upper())


class Capitals(DatasetTask):
    name, gen_length, fields = "capitals", 16, ("country", "capital")

    def question(self, example: Example) -> str:
        return f"{spelled(example['country'])}="

    def reply(self, example: Example) -> str:
        return spelled(example["capital"])

    def grade(self, example: Example, completion: str) -> float:
        """The share of the capital's digits that stand in their place; 0 for more digits than it has."""
        right = self.reply(example)
        hits = sum(one == other for one, other in zip(right, completion, strict=False))
        return hits / len(right) if len(completion) <= len(right) else 0.0


dllm_gym.tasks.register("capitals", lambda: Capitals(data=CSV, prompt_style="chat", held_out=0.3))


def main() -> dict:
    """Play one episode, a token per step, the most confident first."""
    env = gym.make("DLLMUnmask-v0", task="capitals")
    observation, info = env.reset(seed=0)
    while "episode" not in info:
        sure = observation["confidence"][:, 0] * observation["action_mask"]
        observation, reward, terminated, truncated, info = env.step(sure == sure.max())
    print(f"{env.unwrapped.last_completion()!r}: {info['episode']}")
    return info["episode"]


if __name__ == "__main__":
    main()
