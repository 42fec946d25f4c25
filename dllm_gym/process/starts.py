"""What episodes begin with: an example's prompt, and its completion with a mask at every blank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym.models import DLLM
from dllm_gym.process.config import EMPTY, EnvConfig
from dllm_gym.tasks import Task
from dllm_gym.tasks.base import Example

log = logging.getLogger(__name__)

SHOWN = 80  # characters of an example in a message


def template_of(task: Task, example: Example, length: int) -> list[str | int] | None:
    """The example's template, checked as far as that goes without a tokenizer; None if all L tokens are blanks.

    Raises:
        ValueError: it is no sequence of texts and numbers of blanks, without a blank, or holds more than ``length``.
    """
    given = task.template(example)
    if given is None:
        return None
    who = f"template of task {task.name!r} for the prompt {str(task.prompt(example))[:SHOWN]!r}"
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ValueError(f"{who} is {given!r}: need a list of texts and numbers of blanks, or None")
    pieces: list[str | int] = []
    for piece in given:
        is_count = isinstance(piece, int | np.integer) and not isinstance(piece, bool) and piece >= 1
        if not is_count and not isinstance(piece, str):
            raise ValueError(f"{who} holds {piece!r}: need texts, and numbers of blanks of at least 1")
        pieces.append(piece if isinstance(piece, str) else int(piece))
    blanks = sum(piece for piece in pieces if isinstance(piece, int))
    if not blanks:
        raise ValueError(f"{who} is {str(pieces)[:SHOWN]}: need at least one blank, there is nothing to decode")
    if blanks > length:
        raise ValueError(f"{who} has {blanks} blanks: more than gen_length={length} holds")
    return pieces


def completion_of(task: Task, example: Example, dllm: DLLM, length: int) -> np.ndarray:
    """The completion int64 [L] as an episode begins with it: masks at the blanks, EOS behind the template.

    Raises:
        ValueError: as of :func:`template_of`; the tokens are more than L, or the dLLM has none for a text.
    """
    pieces = template_of(task, example, length)
    if pieces is None:
        return np.full(length, dllm.mask_id)
    who = f"template of task {task.name!r} for the prompt {str(task.prompt(example))[:SHOWN]!r}"
    tokens: list[int] = []
    for piece in pieces:
        try:
            tokens += [dllm.mask_id] * piece if isinstance(piece, int) else dllm.spelling.plain(piece)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None
    if len(tokens) > length:
        raise ValueError(f"{who} has {len(tokens)} tokens: more than gen_length={length} holds")
    return np.array(tokens + [dllm.eos_id] * (length - len(tokens)))


def truth_of(task: Task, example: Example, dllm: DLLM, completion: np.ndarray) -> np.ndarray:
    """A right completion int64 [L] of an example that begins with ``completion`` int64 [L].

    Behind its text stands EOS; of a longer one the first L tokens count.

    Raises:
        ValueError: the task knows none, the dLLM has no tokens for it, or it lacks what the template gives.
    """
    text = task.gold(example)
    tokens = dllm.spelling.plain(text)[: len(completion)]
    truth = np.array(tokens + [dllm.eos_id] * (len(completion) - len(tokens)))
    if ((completion != dllm.mask_id) & (completion != truth)).any():
        raise ValueError(
            f"task {task.name!r}: the gold completion {text[:SHOWN]!r} does not have what the template "
            f"{str(task.template(example))[:SHOWN]} gives"
        )
    return truth


@dataclass(frozen=True)
class Start:
    """What one episode begins with.

    Attributes:
        prompt: int64 [P]. completion: int64 [L]. blanks: bool [L], where the completion is masked.
        truth: int64 [L], a right completion; None where nobody asks for it.
    """

    prompt: np.ndarray
    completion: np.ndarray
    blanks: np.ndarray
    truth: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        completion: Sequence[int] | np.ndarray,
        mask_id: int,
        truth: np.ndarray | None = None,
    ) -> Start:
        tokens = np.asarray(completion, np.int64)
        return cls(np.asarray(prompt, np.int64), tokens, tokens == mask_id, truth)

    @property
    def row(self) -> np.ndarray:
        """int64 [P + L]"""
        return np.concatenate([self.prompt, self.completion])

    def with_completion(self, completion: np.ndarray) -> bytes:
        """The row's tokens as int32, with another completion int64 [L] in place of its own; then those of the truth."""
        known = [self.prompt, completion, *([] if self.truth is None else [self.truth])]
        return np.concatenate(known).astype(np.int32).tobytes()


class Starts:
    """The examples of a split, as episodes begin with them.

    Args:
        task, dllm: whose. length: L. config: its split, ``max_prompt_length``, ``cut_prompts`` and ``teacher_forcing``
            are read.

    Raises:
        ValueError: no prompt is short enough; a prompt and its completion exceed the model's positions; a template is
            wrong (texts are encoded when they are needed, those of the longest template at once).

    Attributes:
        examples: those that are in use; ``dropped`` others have too long a prompt.
        kept: how many tokens of a prompt, its last ones; None: all.
        templated: some of them have a template.
    """

    def __init__(self, task: Task, dllm: DLLM, length: int, config: EnvConfig):
        self.task, self.dllm, self.L = task, dllm, length
        self.kept = config.max_prompt_length if config.cut_prompts else None
        self.forced = config.teacher_forcing
        self.examples = self._within(task.examples(config.split).to_list(), config.max_prompt_length)
        self._known: dict[int, Start] = {}
        sizes = [self._size(template_of(task, example, length)) for example in self.examples]
        self.templated = any(size is not None for size in sizes)
        self[max(range(len(sizes)), key=lambda index: sizes[index] or 0)]
        self[max(range(len(sizes)), key=lambda index: len(str(task.prompt(self.examples[index]))))]

    @staticmethod
    def _size(template: list[str | int] | None) -> int | None:
        """Letters and blanks of a template: about as many tokens."""
        return None if template is None else sum(p if isinstance(p, int) else len(p) for p in template)

    def _within(self, examples: list[Any], most: int | None) -> list[Any]:
        """The examples whose prompt has at most ``most`` tokens, or may be cut to them."""
        self.dropped = 0
        if most is None or self.kept is not None:
            return examples
        kept = [example for example in examples if len(self.dllm.encode(self.task.prompt(example))) <= most]
        self.dropped = len(examples) - len(kept)
        if not kept:
            raise ValueError(f"max_prompt_length={most}: every prompt of task {self.task.name!r} has more tokens")
        if self.dropped:
            log.warning("max_prompt_length=%d drops %d of %d examples", most, self.dropped, len(examples))
        return kept

    def __getitem__(self, index: int) -> Start:
        """That of the example of this index; ``EMPTY`` gives a row without prompt and blanks."""
        if index not in self._known:
            self._known[index] = self._start(index)
        return self._known[index]

    def lengths(self, indices: Sequence[int] | np.ndarray) -> int | Tensor:
        """What rewards know as L of the episodes of these examples: their blanks int64 [n], or L without templates."""
        return torch.tensor([int(self[i].blanks.sum()) for i in indices]) if self.templated else self.L

    def _start(self, index: int) -> Start:
        if index == EMPTY:
            ended = np.full(self.L, self.dllm.eos_id)
            return Start.of([], ended, self.dllm.mask_id, ended if self.forced else None)
        example = self.examples[index]
        completion = completion_of(self.task, example, self.dllm, self.L)
        truth = truth_of(self.task, example, self.dllm, completion) if self.forced else None
        return Start.of(self._prompt(example), completion, self.dllm.mask_id, truth)

    def _prompt(self, example: Any) -> list[int]:
        """The prompt's tokens, if prompt and completion fit the model's positions."""
        prompt = self.dllm.encode(self.task.prompt(example))
        prompt = prompt if self.kept is None else prompt[-self.kept :]
        if len(prompt) + self.L > self.dllm.max_positions:
            raise ValueError(
                f"a prompt of task {self.task.name!r} has {len(prompt)} tokens: with gen_length={self.L} it exceeds "
                f"the model's {self.dllm.max_positions} positions"
            )
        return prompt
