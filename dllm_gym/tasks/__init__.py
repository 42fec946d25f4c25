"""Tasks: where prompts come from and how an answer is graded."""

from __future__ import annotations

from collections.abc import Callable

from dllm_gym.tasks.arithmetic import Arithmetic
from dllm_gym.tasks.base import Example, ProceduralTask, Task
from dllm_gym.tasks.code import MBPP, CodeTask, HumanEval, KodCode
from dllm_gym.tasks.countdown import Countdown
from dllm_gym.tasks.dataset import DatasetTask, PromptStyle, Source
from dllm_gym.tasks.equations import Equations
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.tasks.math import Math
from dllm_gym.tasks.mixture import Mixture
from dllm_gym.tasks.one_way import OneWay
from dllm_gym.tasks.reasoning import ReasoningGym
from dllm_gym.tasks.sudoku import Sudoku
from dllm_gym.tasks.sudoku_file import SudokuFile


def gsm8k_math() -> Mixture:
    """The union of GSM8K and MATH that LUP trains on (arXiv 2512.09106)."""
    return Mixture([GSM8K(), Math()])


TASKS: dict[str, Callable[..., Task]] = {
    "sudoku": Sudoku,
    "arithmetic": Arithmetic,
    "equations": Equations,
    "one_way": OneWay,
    "gsm8k": GSM8K,
    "math": Math,
    "gsm8k_math": gsm8k_math,
    "humaneval": HumanEval,
    "mbpp": MBPP,
    "kodcode": KodCode,
    "countdown": Countdown,
    "sudoku4_csv": SudokuFile,
    "reasoning_gym": ReasoningGym,
}


def register(name: str, factory: Callable[..., Task], *, replace: bool = False) -> None:
    """Make a task known by a name, so that ``gym.make("DLLMUnmask-v0", task=name)`` finds it.

    >>> register("easy_sudoku", lambda: Sudoku(min_givens=10))
    >>> make_task("easy_sudoku").min_givens
    10
    >>> del TASKS["easy_sudoku"]

    Args:
        name: how it is called.
        factory: gives the task with its default settings when called without arguments.
        replace: take the place of a task of that name.

    Raises:
        ValueError: the name is taken, or the factory cannot be called.
    """
    if not isinstance(name, str) or not name or not callable(factory):
        raise ValueError(f"name={name!r}, factory={factory!r}: need a name and a callable that gives a Task")
    if name in TASKS and not replace:
        raise ValueError(f"name={name!r} is taken by {TASKS[name]!r}: choose another, or say replace=True")
    TASKS[name] = factory


def make_task(task: str | Task) -> Task:
    """The task of that name with its default settings; a Task is returned as it is.

    Raises:
        ValueError: no task of that name, or its factory gives something else.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"task={task!r} is not known: choose one of {', '.join(TASKS)}, or pass a Task")
    made = TASKS[task]()
    if not isinstance(made, Task):
        raise ValueError(f"task={task!r}: its factory gives {made!r}, which is no Task")
    return made


__all__ = [
    "TASKS",
    "Arithmetic",
    "CodeTask",
    "Countdown",
    "DatasetTask",
    "Equations",
    "Example",
    "GSM8K",
    "HumanEval",
    "KodCode",
    "MBPP",
    "Math",
    "Mixture",
    "OneWay",
    "ProceduralTask",
    "PromptStyle",
    "ReasoningGym",
    "Source",
    "Sudoku",
    "SudokuFile",
    "Task",
    "make_task",
    "register",
]
