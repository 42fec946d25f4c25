"""Tasks: where prompts come from and how an answer is graded."""

from __future__ import annotations

from collections.abc import Callable

from dllm_gym.tasks.arithmetic import Arithmetic
from dllm_gym.tasks.base import Example, ProceduralTask, Task
from dllm_gym.tasks.sudoku import Sudoku

TASKS: dict[str, Callable[[], Task]] = {"sudoku": Sudoku, "arithmetic": Arithmetic}


def make_task(task: str | Task) -> Task:
    """The task of that name with its default settings; a Task is returned as it is.

    Raises:
        ValueError: no task of that name.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"task={task!r} is not known: choose one of {', '.join(TASKS)}, or pass a Task")
    return TASKS[task]()


__all__ = ["TASKS", "Arithmetic", "Example", "ProceduralTask", "Sudoku", "Task", "make_task"]
