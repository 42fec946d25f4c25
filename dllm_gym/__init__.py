"""dllm_gym: the decoding of a frozen masked-diffusion language model as a reinforcement-learning environment."""

from gymnasium.envs.registration import register

__version__ = "0.1.0"

register(
    id="DLLMUnmask-v0",
    entry_point="dllm_gym.env:DLLMUnmaskEnv",
    vector_entry_point="dllm_gym.vector_env:DLLMUnmaskVectorEnv",
)
