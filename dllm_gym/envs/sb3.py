"""The Stable-Baselines3 face: the vector environment's lanes as an SB3 ``VecEnv``, in numpy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from dllm_gym.envs.dealer import check_options
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.process.config import EnvConfig

try:
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
except ImportError as error:
    raise ImportError("dllm_gym.envs.sb3 needs Stable-Baselines3: pip install dllm_gym[sb3]") from error


class DLLMUnmaskSB3VecEnv(VecEnv):
    """``DLLMUnmask-v0`` in many lanes for Stable-Baselines3 and sb3-contrib: one forward of the dLLM serves all lanes.

    >>> from dllm_gym.envs.sb3 import DLLMUnmaskSB3VecEnv
    >>> from stable_baselines3 import PPO
    >>> model = PPO("MultiInputPolicy", DLLMUnmaskSB3VecEnv(num_envs=4, alpha=3.0), n_steps=8, batch_size=32, seed=0)
    >>> model.learn(32).num_timesteps
    32

    Observation, action, reward and end of an episode are those of :class:`~dllm_gym.envs.single.DLLMUnmaskEnv`, as
    numpy arrays with a leading lane axis [N, ...]; rewards are float32 [N], dones bool [N]. Actions are integers,
    bools, or the floats 0 and 1 of shape [N, L].

    ## Information
    A lane that finishes takes its next prompt within the same step. Every lane's info holds ``TimeLimit.truncated``;
    at the end of an episode also ``terminal_observation`` and ``episode``, a dict of ``r`` (reward), ``l`` (steps =
    NFE), ``score`` and ``example``. This is what SB3's ``Monitor`` reports (less the wall-clock time), so that
    ``env_is_wrapped(Monitor)`` says True: statistics and ``evaluate_policy`` work without a ``VecMonitor``.

    Where ``TimeLimit.truncated`` is set SB3 adds gamma times its critic's value of the terminal observation to the
    reward, although the answer has been graded by then. At the default ``max_episode_steps`` (L) only an episode with
    empty actions comes to that.

    ## Masks
    ``env_method("action_masks")`` gives, per lane, bool [2L] in the layout of ``sb3_contrib.MaskablePPO``: for each bit
    whether it may be 0 (always) and whether it may be 1 (where ``action_mask`` is 1).

    ## Lanes
    ``get_attr`` and ``env_method`` address a :class:`Lane`; the vector environment itself is :attr:`vector_env`.
    ``seed(s)`` gives lane i the seed s + i at the next ``reset``; ``set_options({"examples": i})`` (or a list of such,
    one per lane) chooses the prompts of the next ``reset``.

    Args:
        num_envs: N. render_mode: ``"ansi"`` or ``"rgb_array"``.
        settings: the fields of :class:`~dllm_gym.process.config.EnvConfig`.

    Raises:
        ValueError: a setting is wrong. ImportError (on import of the module): Stable-Baselines3 is not installed.
    """

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, **settings: Any):
        self.vector_env = DLLMUnmaskVectorEnv(num_envs, AutoresetMode.SAME_STEP, render_mode, "numpy", **settings)
        self._views = [Lane(self, index) for index in range(num_envs)]
        self.legal: np.ndarray | None = None  # bool [N, L], the last observation's action_mask; None: never reset
        self._actions: np.ndarray | None = None  # between step_async and step_wait
        super().__init__(num_envs, self.vector_env.single_observation_space, self.vector_env.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        """Start episodes in all lanes, with the seeds and options given since the last reset."""
        seed = None if None in self._seeds else list(self._seeds)
        observation, _ = self.vector_env.reset(seed=seed, options=self._chosen())
        self._reset_seeds()
        self._reset_options()
        self._actions = None
        return self._note(observation)

    def _chosen(self) -> dict[str, list[int]] | None:
        """What :meth:`set_options` asked for, as the vector environment's options."""
        chosen = [check_options(options, ("examples",)) for options in self._options]
        if not any(chosen):
            return None
        if not all(chosen):
            raise ValueError(f"options={self._options!r}: choose 'examples' for every lane or for none")
        return {"examples": [options["examples"] for options in chosen]}

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions [N, L]; :meth:`step_wait` performs them."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Unmask; returns observation, reward float32 [N], done bool [N] and one info per lane.

        Raises:
            ValueError: the actions have a wrong shape or dtype. gymnasium.error.ResetNeeded: before the first reset.
        """
        actions, self._actions = self._actions, None
        observation, reward, terminated, truncated, info = self.vector_env.step(actions)
        ended = terminated | truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(flag)} for flag in truncated & ~terminated]
        for lane in np.flatnonzero(ended):
            infos[lane]["episode"] = {name: value[lane].item() for name, value in info["episode"].items()}
            infos[lane]["terminal_observation"] = {name: value[lane] for name, value in info["final_obs"].items()}
        return self._note(observation), reward, ended, infos

    def _note(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.legal = observation["action_mask"] == 1
        return observation

    # ---- lane by lane ----

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the chosen lanes. Raises AttributeError if a :class:`Lane` has none of this name."""
        return [getattr(self._views[index], attr_name) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Attach a value to the chosen lanes, for :meth:`get_attr`.

        Raises:
            AttributeError: it is a setting of the environment; those are fixed at construction.
        """
        if attr_name in {field.name for field in fields(EnvConfig)}:
            raise AttributeError(f"{attr_name} is fixed: make a new DLLMUnmaskSB3VecEnv with {attr_name}={value!r}")
        for index in self._get_indices(indices):
            setattr(self._views[index], attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the chosen lanes."""
        return [method(*method_args, **method_kwargs) for method in self.get_attr(method_name, indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for ``Monitor``, whose report the infos carry; there is no other wrapper."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_images(self) -> list[np.ndarray]:
        """One uint8 picture [H, W, 3] per lane (``render_mode="rgb_array"``)."""
        return list(self.vector_env.render() or ())

    def close(self) -> None:
        """Close the vector environment; weights are shared within the process and stay."""
        self.vector_env.close()


class Lane:
    """One lane, as ``get_attr`` and ``env_method`` see it."""

    def __init__(self, venv: DLLMUnmaskSB3VecEnv, index: int):
        self._venv, self._index = venv, index
        self.render_mode = venv.vector_env.render_mode
        self.observation_space = venv.vector_env.single_observation_space
        self.action_space = venv.vector_env.single_action_space

    def action_masks(self) -> np.ndarray:
        """bool [2L]: for each bit, whether it may be 0 and whether it may be 1."""
        if self._venv.legal is None:
            raise gym.error.ResetNeeded("action_masks() was called before reset()")
        legal = self._venv.legal[self._index]
        return np.stack([np.ones_like(legal), legal], axis=1).reshape(-1)  # (L, 2) -> (2L,)

    def last_completion(self) -> str | None:
        """The text of the lane's last finished episode (None before the first)."""
        return self._venv.vector_env.last_completions()[self._index]

    def render(self) -> Any:
        """The lane's frame: a text or a picture."""
        frames = self._venv.vector_env.render()
        return frames[self._index] if frames else None
