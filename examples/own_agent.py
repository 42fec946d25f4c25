"""A decision rule of your own in DLLMUnmask-v0: python examples/own_agent.py"""

import gymnasium as gym
import numpy as np

import dllm_gym  # noqa: F401  (registers the environment)

env = gym.make("DLLMUnmask-v0", task="sudoku", split="test", alpha=1.0)
scores, steps = [], []
for example in range(20):
    observation, _ = env.reset(seed=example, options={"examples": example})
    over = False
    while not over:
        confidence = np.where(observation["action_mask"], observation["confidence"][:, 0], 0.0)
        action = confidence >= 0.9 * confidence.max()  # everything nearly as sure as the surest position
        observation, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    scores.append(info["episode"]["score"])
    steps.append(info["episode"]["l"])
print(f"accuracy {np.mean(scores):.2f} at NFE {np.mean(steps):.1f}")
