"""The settings of the decision process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from dllm_gym.checks import choice, flag, number, whole
from dllm_gym.models import DLLM
from dllm_gym.process.rewards import AlphaRange, Reward
from dllm_gym.tasks import Task

LENGTHS = (
    "gen_length",
    "max_prompt_length",
    "block_length",
    "max_episode_steps",
    "steps_per_block",
)  # None, or at least 1
ORIGINS = ("completion", "prompt")
EMPTY = -1  # in place of an example: the lane holds no episode


@dataclass(frozen=True)
class EnvConfig:
    """The settings that all faces share.

    Attributes:
        model: name of a shipped dLLM such as ``"tiny"``, a checkpoint folder, a hub id or a
            :class:`~dllm_gym.models.DLLM`; None: the shipped one that knows the task (``Task.dllm``).
        task: name of a task or a :class:`~dllm_gym.tasks.Task`.
        split: the task's split that prompts come from.
        gen_length: L, tokens of a completion; the task's own length by default.
        max_prompt_length: leave out examples whose prompt, template included, has more tokens; None keeps all.
        cut_prompts: keep the last ``max_prompt_length`` tokens of a longer prompt instead of leaving its example out
            (as LUP's published code does).
        block_length: BL; only the first block with masks may be unmasked. L (full diffusion) by default.
        block_origin: where blocks are counted from: ``"completion"``, whose blocks are whole (BL must divide L), or
            ``"prompt"``, its first token, so that the completion's first block is shorter, and its last one ends with
            it. By default what the dLLM's own code does: ``"prompt"`` for block-causal ones.
        top_k: K, how many of the largest probabilities are observed per position.
        temperature: of the proposed tokens; 0 is greedy.
        reward: ``"multiplicative"``, ``"additive"`` or a callable (score, steps, L) -> reward. Where examples
            have templates, L is int64 [n]: how many blanks each episode began with.
        alpha: weight of speed in the reward, >= 0; or a range [low, high] with 0 < low. Then every episode has an alpha
            of its own (drawn log-uniformly, or chosen at reset), and observes where in the range it lies as its
            ``preference``.
        max_episode_steps: truncate after this many steps; L by default.
        steps_per_block: a block that still has masks after so many steps is left with them, and the next one becomes
            active (as in LUP's published code, there BL); None: a block is decoded to its end.
        committed_confidence: committed positions show the dLLM's largest probabilities there, given all that stands now
            (as in LUP's published code), instead of 1, 0, ..., 0; as of the last prediction where that is the last.
        stop_at_eos: end an episode once an end-of-text token is committed and nothing before it is masked. The answer
            is the same, as nothing after that token belongs to it; NFE are fewer, so results are not comparable with
            those of the published protocol.
        lookahead: predict every masked position. False: those that may be unmasked now only, which saves much of the
            head; all others read 0 in every entry. Not together with ``kl``.
        cache: ``"none"``, or ``"prefix"`` or ``"dual"``: keys and values of the tokens before the active block, or
            before and behind it, are those of the step that began the block (Fast-dLLM, arXiv 2505.22618). Faster,
            and approximate: other tokens, other NFE. ``"prefix"`` is exact for block-causal dLLMs.
        teacher_forcing: for training alone: positions are filled with the tokens of a right completion
            (:meth:`Task.gold <dllm_gym.tasks.Task.gold>`, EOS behind it) in place of the dLLM's proposals, and how
            likely the dLLM held these tokens is observed, too.
        hidden: observe the dLLM's last hidden states, too (those of the last prediction).
        block_input: observe what the dLLM's last block reads, too (at the last prediction). Not with ``cache``, and not
            of a compiled dLLM.
        entropy: observe the entropy of the dLLM's distributions, too.
        margin: observe how far the best token leads the second best, too.
        committed: observe with which confidence each position was committed, too.
        tokens: observe the tokens, too: those committed, and at masked positions those that would be.
        kl: H, how many of the last steps to observe by how much they moved the dLLM's distributions; 0 is none. It
            keeps a distribution per position: num_envs * L * V * 4 bytes on the device (V: the vocabulary).
        device, dtype: of the dLLM (CPU and float32 by default); observations live on the same device, confidences are
            float32.

    Raises:
        ValueError: a setting is wrong by itself, whatever the task and the dLLM; those have their own say later.
    """

    model: str | DLLM | None = None
    task: str | Task = "sudoku"
    split: str = "train"
    gen_length: int | None = None
    max_prompt_length: int | None = None
    cut_prompts: bool = False
    block_length: int | None = None
    block_origin: str | None = None
    top_k: int = 1
    temperature: float = 0.0
    reward: str | Reward = "multiplicative"
    alpha: float | Sequence[float] = 1.0
    max_episode_steps: int | None = None
    steps_per_block: int | None = None
    committed_confidence: bool = False
    stop_at_eos: bool = False
    lookahead: bool = True
    cache: str = "none"
    teacher_forcing: bool = False
    hidden: bool = False
    block_input: bool = False
    entropy: bool = False
    margin: bool = False
    committed: bool = False
    tokens: bool = False
    kl: int = 0
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                self._put(field.name, flag(field.name, value))
            elif field.name in LENGTHS and value is not None:
                self._put(field.name, whole(field.name, value))
        if self.block_origin is not None:
            choice("block_origin", self.block_origin, ORIGINS)
        self._put("top_k", whole("top_k", self.top_k))
        self._put("kl", whole("kl", self.kl, least=0))
        self._put("temperature", number("temperature", self.temperature, least=0))
        if self.cut_prompts and self.max_prompt_length is None:
            raise ValueError("cut_prompts=True needs max_prompt_length: how many tokens of a prompt are kept")
        if self.kl and not self.lookahead:
            raise ValueError(f"lookahead=False: the divergences of kl={self.kl} need the predictions of every step")
        if AlphaRange.of(self.alpha) is not None and callable(self.reward):
            raise ValueError(f"alpha={self.alpha!r}: a reward of your own is called without an alpha, give a number")

    def _put(self, name: str, value: Any) -> None:
        """A checked value in plain Python (not NumPy's), in place of the one given."""
        object.__setattr__(self, name, value)  # frozen for everybody else

    @classmethod
    def of(cls, settings: dict[str, Any]) -> EnvConfig:
        """The configuration with these settings; TypeError for a name that is none."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                # Python's own words: TorchRL's GymEnv tries a setting of its own and looks for them.
                raise TypeError(
                    f"DLLMUnmask-v0 got an unexpected keyword argument {name!r}: choose from {', '.join(known)}"
                )
        return cls(**settings)
