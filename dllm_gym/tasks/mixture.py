"""Several tasks as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dllm_gym.checks import whole
from dllm_gym.tasks.base import SPLITS, Example, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from dllm_gym.prompt import Chat


class Mixture(Task):
    """Examples of several tasks, evenly interleaved; each is shown and graded by its own task.

    Without weights, a split holds every example of every member once, so that a member counts as much as it has
    examples. With weights, ``train`` holds the members in these proportions: the largest number of examples for which
    none has to repeat (of a member with more, its first ones). ``validation`` and ``test`` always hold everything:
    weights are about what to learn from. Interleaved means that any first n examples hold the members in (nearly) the
    same proportions. The order depends on nothing but the sizes and weights.

    Example fields: ``member`` (name of the task), ``split`` and ``index`` (which of its examples).

    >>> from dllm_gym.tasks import Arithmetic, Sudoku
    >>> sizes = {"train": 12}
    >>> task = Mixture([Sudoku(sizes=sizes), Arithmetic(sizes=sizes)], weights=[1, 3])
    >>> [example["member"][0] for example in task.examples("train")]
    ['a', 's', 'a', 'a', 'a', 's', 'a', 'a', 'a', 's', 'a', 'a', 'a', 's', 'a', 'a']

    Args:
        tasks: name -> task, or tasks that differ in their names.
        weights: name -> weight, or one per task in order; only their ratios matter.
        gen_length: L; the largest of the members by default.
        name: how the mixture is called; the members' names joined by ``_`` by default.

    Raises:
        ValueError: no tasks, two of one name, or weights that do not fit.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task] | Sequence[Task],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        gen_length: int | None = None,
        name: str | None = None,
    ):
        if not isinstance(tasks, Mapping | Sequence):
            raise ValueError(f"tasks={tasks!r}: need a list of tasks, or a mapping from names to tasks")
        named = tasks.items() if isinstance(tasks, Mapping) else [(getattr(task, "name", ""), task) for task in tasks]
        self.tasks = dict(named)
        if len(self.tasks) < len(named) or not named or not all(isinstance(task, Task) for task in self.tasks.values()):
            raise ValueError(
                f"tasks={tasks!r}: need tasks that differ in their names (or a mapping from names to tasks)"
            )
        self.weights = None if weights is None else self._check(weights)
        largest = max(task.gen_length for task in self.tasks.values())
        self.gen_length = largest if gen_length is None else whole("gen_length", gen_length)
        self.name = name or "_".join(self.tasks)
        self._members: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._splits: dict[str, Dataset] = {}

    def _check(self, weights: Mapping[str, float] | Sequence[float]) -> dict[str, float]:
        given = weights
        if not isinstance(weights, Mapping):
            fits = isinstance(weights, Sequence) and len(weights) == len(self.tasks)
            weights = dict(zip(self.tasks, weights, strict=True)) if fits else {}
        good = all(
            isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < math.inf for w in weights.values()
        )
        if set(weights) != set(self.tasks) or not good:
            raise ValueError(
                f"weights={given!r}: need a positive number for each of {', '.join(self.tasks)} (leave out a task to "
                "give it no weight)"
            )
        return {name: float(weights[name]) for name in self.tasks}

    def examples(self, split: str) -> Dataset:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not a split of task {self.name!r}: choose one of {', '.join(SPLITS)}")
        if split not in self._splits:
            self._splits[split] = self._build(split)
        return self._splits[split]

    def _build(self, split: str) -> Dataset:
        from datasets import Dataset

        counts = {name: len(self._of(name, split)) for name in self.tasks}
        if self.weights and split == "train":
            total = min(counts[name] / weight for name, weight in self.weights.items())
            counts = {name: max(1, math.floor(total * weight + 1e-9)) for name, weight in self.weights.items()}
        places = [
            ((index + 0.5) / count, order, name, index)
            for order, (name, count) in enumerate(counts.items())
            for index in range(count)
        ]
        return Dataset.from_list(
            [{"member": name, "split": split, "index": index} for _, _, name, index in sorted(places)]
        )

    def _of(self, member: str, split: str) -> list[dict[str, Any]]:
        """The examples of a member, as a list: a Dataset is slow one by one."""
        if (member, split) not in self._members:
            self._members[member, split] = self.tasks[member].examples(split).to_list()
        return self._members[member, split]

    def member(self, example: Example) -> tuple[Task, Example]:
        """The task of an example, and what it is there."""
        return self.tasks[example["member"]], self._of(example["member"], example["split"])[example["index"]]

    def prompt(self, example: Example) -> str | Chat:
        task, own = self.member(example)
        return task.prompt(own)

    def template(self, example: Example) -> Sequence[str | int] | None:
        task, own = self.member(example)
        return task.template(own)

    def dataset_of(self, example: Example) -> str:
        """The name of its member; that of a member of a mixture within this one is ``outer/inner``."""
        task, own = self.member(example)
        inner = task.dataset_of(own)
        return example["member"] if inner == task.name else f"{example['member']}/{inner}"

    def gold(self, example: Example) -> str:
        task, own = self.member(example)
        return task.gold(own)

    def grade(self, example: Example, completion: str) -> float:
        task, own = self.member(example)
        return task.grade(own, completion)

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        scores = [0.0] * len(examples)
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
        for name, task in self.tasks.items():  # each member grades its own together
            places = [i for i, example in enumerate(examples) if example["member"] == name]
            own = [self.member(examples[i])[1] for i in places]
            for i, score in zip(places, task.grade_all(own, [completions[i] for i in places]), strict=True):
                scores[i] = score
        return scores
