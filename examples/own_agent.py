"""A decision rule of your own on 20 test puzzles of DLLMUnmask-v0, in seconds: python examples/own_agent.py"""

import gymnasium as gym
import numpy as np

import dllm_gym  # noqa: F401  (registers the environment)

env = gym.make("DLLMUnmask-v0", task="sudoku", split="test")
results = []
for example in range(20):
    observation, info = env.reset(seed=example, options={"examples": example})
    terminated = truncated = False
    while not (terminated or truncated):
        confidence = np.where(observation["action_mask"], observation["confidence"][:, 0], 0.0)
        action = confidence >= 0.9 * confidence.max()  # everything nearly as sure as the surest position
        observation, reward, terminated, truncated, info = env.step(action)
    results.append([info["episode"]["score"], info["episode"]["l"]])
print("accuracy {:.2f} at NFE {:.1f}".format(*np.mean(results, axis=0)))
