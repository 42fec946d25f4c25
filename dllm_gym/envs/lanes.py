"""The lanes of the vector environment: which of them get an episode when, and what is said of those that ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from dllm_gym.envs.dealer import Dealer
from dllm_gym.models.batches import upload
from dllm_gym.process.config import EMPTY
from dllm_gym.process.grading import Outcome
from dllm_gym.process.unmasking import Unmasking


class Lanes:
    """Puts episodes into lanes: at a reset, and as ``mode`` says when others have ended.

    Args:
        core: the process. dealer: says which example a lane gets. mode: what happens to a lane whose episode is over.

    Attributes:
        waiting: bool [N], lanes whose episode is over (NEXT_STEP, DISABLED); None: they have never been reset.
    """

    def __init__(self, core: Unmasking, dealer: Dealer, mode: AutoresetMode):
        self.core, self.dealer, self.mode = core, dealer, mode
        self.count = dealer.lanes
        self.waiting: np.ndarray | None = None

    def reset(self, seed: Any, options: Mapping[str, Any]) -> None:
        """New episodes in all lanes, or in those of ``options["reset_mask"]``."""
        if "reset_mask" in options:
            self._reset_some(np.asarray(torch.as_tensor(options["reset_mask"]).cpu()), seed, options)
            return
        if seed is not None:
            self.dealer.seed(seed)
        self.core.begin(range(self.count), *self.dealer.deal_all(options))
        self.waiting = np.zeros(self.count, bool)

    def _reset_some(self, reset_mask: np.ndarray, seed: Any, options: Mapping[str, Any]) -> None:
        if reset_mask.shape != (self.count,) or reset_mask.dtype != bool:
            raise ValueError(f"options['reset_mask']={reset_mask!r}: need bools of shape ({self.count},)")
        if "queue" in options:
            raise ValueError("options['queue'] goes with a reset of all lanes, without options['reset_mask']")
        if self.waiting is None and not reset_mask.all():
            raise gym.error.ResetNeeded("the first reset is of all lanes: options['reset_mask'] leaves some out")
        lanes = np.flatnonzero(reset_mask)
        if seed is not None:
            self.dealer.seed(seed, lanes)
        self._begin(lanes, [self.dealer.restart(int(lane), options) for lane in lanes])
        self.waiting = np.zeros(self.count, bool) if self.waiting is None else self.waiting & ~reset_mask

    def _deal(self, lanes: np.ndarray) -> None:
        """Put the next prompt into each of these lanes, the lowest lane first."""
        self._begin(lanes, [self.dealer.deal(lane) for lane in lanes])

    def _begin(self, lanes: np.ndarray, dealt: list[tuple[int, int, float | None]]) -> None:
        if len(lanes):
            self.core.begin(lanes, *zip(*dealt, strict=True))

    def check_ready(self) -> None:
        """Raises gymnasium.error.ResetNeeded where a step needs a reset before it."""
        if self.waiting is None:
            raise gym.error.ResetNeeded("step() was called before reset()")
        if self.mode is AutoresetMode.DISABLED and self.waiting.any():
            lanes = np.flatnonzero(self.waiting).tolist()
            raise gym.error.ResetNeeded(f"lanes {lanes} have finished: reset them with options={{'reset_mask': ...}}")

    def move_on(self, done: np.ndarray) -> dict[str, np.ndarray] | None:
        """Refill lanes after a commit, as the mode has it.

        Args:
            done: bool [N], whose episode is over.

        Returns:
            What was seen last of lanes that are refilled at once, if there are any.
        """
        last = None
        if self.mode is AutoresetMode.SAME_STEP:
            last = self._last_observation(done) if done.any() else None
            self._deal(np.flatnonzero(done))
        elif self.mode is AutoresetMode.NEXT_STEP and self.waiting is not None:
            self._deal(np.flatnonzero(self.waiting))
        self.waiting = done & (self.mode is not AutoresetMode.SAME_STEP)
        return last

    def _last_observation(self, done: np.ndarray) -> dict[str, np.ndarray]:
        """What is seen of the lanes that are about to be refilled, with zeros for the others."""
        if self.core.stale[done].any():
            self.core.predict()  # masked positions of a truncated lane deserve their true confidences
        where = upload(np.flatnonzero(done), self.core.dllm.device)
        last = {}
        for name, value in self.core.observe().items():
            seen = value[where].cpu().numpy()
            last[name] = np.zeros((self.count, *seen.shape[1:]), seen.dtype)
            last[name][done] = seen
        return last

    def items(self) -> dict[str, np.ndarray]:
        """Which item of a reset with a queue each lane works on, as long as there is one that does."""
        items, some = self.dealer.items, self.dealer.items != EMPTY
        return {"item": items.copy(), "_item": some} if some.any() else {}

    def information(self, outcome: Outcome, items: np.ndarray) -> dict[str, Any]:
        """``episode`` and ``_episode`` of a step; ``items`` int64 [N] are those that the lanes had in it."""
        done = outcome.done
        if not done.any():
            return {}
        episode = {
            "r": outcome.reward.copy(),
            "l": np.where(done, outcome.nfe, 0),
            "score": outcome.score.copy(),
            "example": np.where(done, outcome.example, EMPTY),
        }
        if self.core.alpha_range is not None:
            episode["alpha"] = np.where(done, outcome.alpha, 0).astype(np.float32)
        if self.dealer.queue is not None:
            episode["item"] = np.where(done, items, EMPTY)
        return {"episode": episode, "_episode": done}
