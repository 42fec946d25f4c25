"""The Gymnasium vector face: many lanes; observations stay on the dLLM's device, all else is numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import MultiBinary
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from dllm_gym import render
from dllm_gym.checks import choice, whole
from dllm_gym.envs.dealer import Dealer, check_options
from dllm_gym.envs.lanes import Lanes
from dllm_gym.envs.spaces import check_action, observation_space
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.unmasking import Unmasking

ARRAYS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "torch": dict,
    "numpy": lambda observation: {name: value.cpu().numpy() for name, value in observation.items()},
}


class DLLMUnmaskVectorEnv(VectorEnv):
    """``DLLMUnmask-v0`` in many lanes at once; :class:`~dllm_gym.envs.single.DLLMUnmaskEnv` describes the process.

    >>> import gymnasium as gym, torch, dllm_gym
    >>> envs = gym.make_vec("DLLMUnmask-v0", num_envs=2)
    >>> observation, info = envs.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = envs.step(observation["action_mask"])
    >>> terminated.tolist()
    [True, True]

    ## Observation and action
    The single environment's with a leading lane axis [N, ...]. Observations are torch tensors on the dLLM's device, or
    numpy arrays with ``arrays="numpy"``, for learners and wrappers that compute in numpy. Actions are integer or bool
    tensors or arrays of shape [N, L]. All else is made on the host and is numpy in either case, as Gymnasium's wrappers
    want it: rewards float32 [N], ``terminated`` and ``truncated`` bool [N], and the infos, final observations included.
    Nothing that is returned is written to again.

    ## Autoreset
    ``autoreset_mode`` is one of Gymnasium's three (enum or its value).

    - ``SAME_STEP`` (default): a lane that finishes takes its next prompt within the same step, so every forward serves
      every lane. ``info["final_obs"]`` holds the last observations (where ``info["_final_obs"]``; 0 elsewhere),
      ``info["final_info"]`` the last infos.
    - ``NEXT_STEP``: the step after the end starts the next episode; its action is ignored and its reward is 0.
    - ``DISABLED``: finished lanes wait for ``reset(options={"reset_mask": bool [N]})``.

    ## Choosing prompts
    ``reset(options={"examples": [...]})`` gives every lane an example of the split (-1: none). With ``"queue"`` beside
    it, lanes that finish take the next index from there, the lowest lane first, and stay empty once it is used up: an
    empty lane has no legal position, no reward, no end, and costs no forward. Without a queue lanes draw at random.
    ``"streams"`` beside a queue gives every item the random stream of a number of one's own in place of its place, so
    that a part of a set of examples goes as it goes within the whole.
    Where the environment has a range of alphas, ``alpha`` chooses from it: a number for all episodes until the next
    reset, or one per lane followed by one per item of the queue.

    ## Information
    Where ``info["_episode"]`` (bool [N]) is set an episode has ended, and ``info["episode"]`` holds ``r`` (reward,
    float32 [N]), ``l`` (NFE, int64 [N]), ``score`` (float32 [N]) and ``example`` (int64 [N]), with a range of alphas
    also ``alpha`` (float32 [N]). Texts are read with :meth:`last_completions`.

    After a reset with a queue ``info["item"]`` (int64 [N]) says which of its examples a lane works on now, the lanes'
    counted first and then the queue's (-1: none, where ``info["_item"]`` is not set; absent once all lanes are empty),
    and ``info["episode"]["item"]`` which one an episode had.

    Args:
        num_envs: N, the number of lanes.
        autoreset_mode: see above.
        render_mode: ``"ansi"`` or ``"rgb_array"``; :meth:`render` gives one frame per lane.
        arrays: what observations are made of, ``"torch"`` or ``"numpy"``.
        settings: the fields of :class:`~dllm_gym.process.config.EnvConfig`.

    Raises:
        ValueError: a setting is wrong.
    """

    metadata: dict[str, Any] = {"render_modes": [*render.WRITERS], "render_fps": 4}

    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        arrays: str = "torch",
        **settings: Any,
    ):
        self._deliver = ARRAYS[choice("arrays", arrays, ARRAYS)]
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            choices = ", ".join(mode.value for mode in AutoresetMode)
            raise ValueError(f"autoreset_mode={autoreset_mode!r} is not known: choose one of {choices}") from None
        self.num_envs = whole("num_envs", num_envs)
        self.render_mode = render.check_mode(render_mode, self.metadata["render_modes"])
        self.core = Unmasking(self.num_envs, EnvConfig.of(settings))
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = observation_space(self.core)
        self.single_action_space = MultiBinary(self.core.L)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.dealer = Dealer(self.num_envs, len(self.core.examples), self.core.alpha_range)
        self._lanes = Lanes(self.core, self.dealer, self.autoreset_mode)

    @property
    def device(self) -> torch.device:
        """Where observations live, unless they are asked for as numpy arrays."""
        return self.core.dllm.device

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes in all lanes, or in those of ``options["reset_mask"]``.

        Args:
            seed: lane i's generator starts from seed + i (or from seed[i]).
            options: ``examples``, ``queue``, ``streams``, ``alpha``, ``reset_mask``: see the class. With
                ``reset_mask`` a seed, examples and alphas count for the lanes that it names.

        Raises:
            ValueError: an option is wrong. gymnasium.error.ResetNeeded: the first reset leaves lanes out.
        """
        options = check_options(options, ("examples", "queue", "streams", "alpha", "reset_mask"))
        self._lanes.reset(seed, options)
        self.core.predict()
        return self._deliver(self.core.observe()), self._lanes.items()

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Unmask the chosen positions in every lane.

        Args:
            actions: integer or bool [N, L], tensor or array; 1 unmasks. Bits outside ``action_mask`` are ignored.

        Raises:
            ValueError: wrong shape or dtype. gymnasium.error.ResetNeeded: before the first reset, or (DISABLED) a
                finished lane has not been reset.
        """
        self._lanes.check_ready()
        done = self.core.commit(check_action(actions, (self.num_envs, self.core.L), self.device))
        items = self.dealer.items.copy()
        last = self._lanes.move_on(done)
        self.core.predict()  # while the answers that are done are graded
        outcome = self.core.settle()
        info = self._lanes.information(outcome, items)
        if last is not None:
            info |= {"final_obs": last, "final_info": dict(info)}
            info |= {name: done.copy() for name in ("_final_obs", "_final_info")}
        terminated, truncated = outcome.terminated.copy(), outcome.truncated.copy()
        observation = self._deliver(self.core.observe())
        return observation, outcome.reward.copy(), terminated, truncated, info | self._lanes.items()

    def last_completions(self) -> list[str | None]:
        """The text of the last finished episode of every lane (None where none has finished)."""
        return list(self.core.completions)

    def render(self) -> tuple[Any, ...] | None:
        """One frame per lane: texts (ansi) or uint8 arrays [H, W, 3] (rgb_array)."""
        if self.render_mode is None:
            return None
        draw = render.WRITERS[self.render_mode]
        return tuple(draw(self.core.frame(lane)) for lane in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing to release: weights are shared within the process."""
