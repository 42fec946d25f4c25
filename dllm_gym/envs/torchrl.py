"""The TorchRL face: a native ``EnvBase`` over the same lanes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from dllm_gym.envs.dealer import Dealer
from dllm_gym.envs.spaces import check_action
from dllm_gym.models.batches import upload
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.entries import BITS, Entry
from dllm_gym.process.grading import Outcome
from dllm_gym.process.unmasking import Unmasking


class DLLMUnmaskTorchRLEnv(EnvBase):
    """``DLLMUnmask-v0`` as a TorchRL environment of batch size [N]; tensors stay on the dLLM's device.

    Observation entries as in :class:`~dllm_gym.envs.single.DLLMUnmaskEnv`, ``action`` int8 [N, L] of 0 and 1,
    ``reward`` float32 [N, 1]. Two more observation entries describe the episode that just ended (0 otherwise):
    ``score`` float32 [N, 1] and ``nfe`` int64 [N, 1]. Finished lanes are reset by whoever drives the environment
    (``rollout``, collectors), through ``_reset``, and draw their next prompt from their own generator.

    >>> from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv
    >>> env = DLLMUnmaskTorchRLEnv(num_envs=4)
    >>> env.rollout(3).shape
    torch.Size([4, 3])

    Args:
        num_envs: N. settings: the fields of :class:`~dllm_gym.process.config.EnvConfig`.

    Raises:
        ValueError: a setting is wrong.
    """

    batch_locked = True

    def __init__(self, num_envs: int = 1, **settings: Any):
        self.core = Unmasking(num_envs, EnvConfig.of(settings))
        super().__init__(device=self.core.dllm.device, batch_size=torch.Size([num_envs]))
        N, L = num_envs, self.core.L
        entries = {entry.name: self._spec(entry) for entry in self.core.entries}
        entries["score"] = Bounded(0, 1, shape=(N, 1), dtype=torch.float32, device=self.device)
        entries["nfe"] = Unbounded(shape=(N, 1), dtype=torch.int64, device=self.device)
        self.observation_spec = Composite(entries, shape=(N,), device=self.device)
        self.action_spec = Binary(L, shape=(N, L), dtype=torch.int8, device=self.device)
        self.reward_spec = Unbounded(shape=(N, 1), dtype=torch.float32, device=self.device)
        flag = Binary(1, shape=(N, 1), dtype=torch.bool, device=self.device)
        self.done_spec = Composite(
            {"done": flag, "terminated": flag.clone(), "truncated": flag.clone()}, shape=(N,), device=self.device
        )
        self.dealer = Dealer(num_envs, len(self.core.examples))
        self._was_reset = False
        self._terminated = np.zeros(num_envs, bool)
        self._truncated = np.zeros(num_envs, bool)

    def _spec(self, entry: Entry) -> TensorSpec:
        """The spec of an entry in all lanes; on the device, as every part of a spec."""
        shape, most = (self.core.B, *entry.size(self.core)), entry.most(self.core)
        if entry.dtype is BITS:
            return Binary(shape[-1], shape=shape, dtype=BITS, device=self.device)
        if entry.dtype is torch.int64:
            return Categorical(int(most) + 1, shape=shape, dtype=torch.int64, device=self.device)
        if math.isinf(most):
            return Unbounded(shape=shape, dtype=torch.float32, device=self.device)
        return Bounded(entry.low, most, shape=shape, dtype=torch.float32, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self.dealer.seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        lanes = range(self.core.B) if chosen is None else chosen.view(-1).nonzero()[:, 0].tolist()
        if len(lanes):
            self.core.begin(lanes, *zip(*(self.dealer.deal(lane) for lane in lanes), strict=True))
        self._was_reset = True
        self._terminated[list(lanes)] = self._truncated[list(lanes)] = False
        self.core.predict()
        return self._pack(np.zeros(self.core.B, np.float32), np.zeros(self.core.B, np.int64))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self._was_reset:
            raise RuntimeError("step() was called before reset()")
        action = check_action(tensordict["action"], (self.core.B, self.core.L), self.core.dllm.device)
        self.core.commit(action)
        self.core.predict()  # while the answers that are done are graded
        outcome: Outcome = self.core.settle()
        self._terminated |= outcome.terminated
        self._truncated |= outcome.truncated
        result = self._pack(outcome.score, np.where(outcome.done, outcome.nfe, 0))
        result["reward"] = upload(outcome.reward, self.device)[:, None]
        return result

    def _pack(self, score: np.ndarray, nfe: np.ndarray) -> TensorDict:
        columns = {
            "score": score,
            "nfe": nfe,
            "terminated": self._terminated.copy(),
            "truncated": self._truncated.copy(),
            "done": self._terminated | self._truncated,
        }
        entries = {name: upload(value, self.device)[:, None] for name, value in columns.items()}
        return TensorDict({**self.core.observe(), **entries}, self.batch_size, device=self.device)
