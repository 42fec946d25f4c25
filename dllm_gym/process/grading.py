"""Answers on their way through the task's grader, while the dLLM goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import numpy as np

from dllm_gym.tasks import Task
from dllm_gym.tasks.base import Example


@dataclass
class Outcome:
    """What one step did to B lanes, on the host.

    Attributes:
        terminated, truncated: bool [B], the episode ended in this step.
        reward, score: float32 [B], 0 where no episode ended.
        nfe: int64 [B], steps of the episode so far.
        example: int64 [B], index of the example in its split.
        alpha: float64 [B], of the episode, where the environment has a range of alphas.
    """

    terminated: np.ndarray
    truncated: np.ndarray
    nfe: np.ndarray
    example: np.ndarray
    alpha: np.ndarray
    reward: np.ndarray = field(init=False)
    score: np.ndarray = field(init=False)

    def __post_init__(self):
        self.reward, self.score = np.zeros((2, len(self.nfe)), np.float32)

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A call in a thread of its own (a pool of threads would not survive a fork of the process)."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class Grading:
    """The step that was taken last, and the grades that it waits for."""

    def __init__(self, task: Task):
        self.task = task
        self._step: tuple[Outcome, Future[list[float]] | None] | None = None

    def hand_in(self, outcome: Outcome, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Let a thread grade the answers of the lanes that are done, if there are any."""
        grades = in_background(self.task.grade_all, examples, texts) if texts else None
        self._step = outcome, grades

    def settle(self) -> Outcome:
        """The outcome with its scores; waits for the graders."""
        assert self._step is not None, "settle() follows commit()"
        (outcome, grades), self._step = self._step, None
        if grades is not None:
            outcome.score[outcome.done] = grades.result()
        return outcome
