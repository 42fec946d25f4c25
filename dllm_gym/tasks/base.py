"""What a task is: where prompts come from, and how an answer is graded."""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dllm_gym.checks import seed as check_seed
from dllm_gym.checks import whole

if TYPE_CHECKING:
    from datasets import Dataset

    from dllm_gym.prompt import Chat

Example = Mapping[str, Any]

SPLITS = ("train", "validation", "test")
ATTEMPTS = 10_000  # draws without anything new after which a split counts as exhausted


class Task(ABC):
    """A source of prompts together with the grader of their answers.

    Attributes:
        name: how configurations call the task.
        gen_length: L, the number of completion tokens an answer needs by default.
        dllm: the shipped dLLM that decodes where no model is named; the one that knows the task, if there is one.
    """

    name: str
    gen_length: int
    dllm: str = "tiny"

    @abstractmethod
    def examples(self, split: str) -> Dataset:
        """The examples of ``split``; the same ones at every call.

        Raises:
            ValueError: the split is not one of the task's.
        """

    @abstractmethod
    def prompt(self, example: Example) -> str | Chat:
        """What the dLLM is shown before the masked completion: a text, or a conversation for its chat template."""

    def template(self, example: Example) -> Sequence[str | int] | None:
        """What the completion begins with, piece by piece: given texts, and numbers of blanks to fill.

        A text is encoded without the chat template, and one that spells a special token stays text. What is left of the
        L tokens behind the last piece is given, too: EOS. None: all L tokens are blanks. In ``["x=", 2, ";y=", 1]``
        three tokens are decoded. The grader gets the whole completion, given texts included.
        """
        return None

    def dataset_of(self, example: Example) -> str:
        """What tables call the data set that an example is from: the task, if it has one alone."""
        return self.name

    def gold(self, example: Example) -> str:
        """A completion that is right, as text: what ``teacher_forcing`` writes.

        Raises:
            ValueError: the task knows none.
        """
        raise ValueError(f"task {self.name!r} has no gold completions: teacher forcing needs a task with Task.gold")

    @abstractmethod
    def grade(self, example: Example, completion: str) -> float:
        """The score in [0, 1] of a decoded completion. Never raises, whatever the text.

        Environments call it in a thread beside the main one, one call at a time, while the dLLM goes on.
        """

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        """The scores of several completions, in order; tasks whose grading takes long do it in parallel."""
        return [self.grade(example, completion) for example, completion in zip(examples, completions, strict=True)]


class ProceduralTask(Task):
    """A task whose examples a seeded generator makes; its splits share no prompt.

    A prompt belongs to exactly one split, by a checksum of its text: a tenth of all prompts to ``test``, a tenth to
    ``validation``, the rest to ``train``. For given settings of a task its splits are disjoint whatever the seeds and
    sizes, and whoever trains a dLLM on :meth:`draw` with ``split="train"`` has not seen a test prompt. (The checksum is
    of the text, padding included: a chain of arithmetic changes its split with ``max_operations``.) Where prompts do
    not tell examples apart, their :meth:`key` takes the place of the prompt in all of this.

    Args:
        seed: seed of the generator; other seeds give other examples of the same splits.
        sizes: number of examples per split; a split never holds a prompt twice.
    """

    def __init__(self, seed: int = 0, sizes: Mapping[str, int] | None = None):
        self.seed = check_seed("seed", seed)
        if sizes is not None and not isinstance(sizes, Mapping):
            raise ValueError(f"sizes={sizes!r}: need numbers of examples by split, such as {{'train': 1000}}")
        self.sizes = {"train": 10_000, "validation": 2_000, "test": 2_000, **(sizes or {})}
        for split, size in self.sizes.items():
            if split not in SPLITS:
                raise ValueError(f"sizes names the split {split!r}: choose among {', '.join(SPLITS)}")
            whole(f"sizes[{split!r}]", size)
        self._splits: dict[str, Dataset] = {}

    @abstractmethod
    def prompt(self, example: Example) -> str: ...

    @abstractmethod
    def generate(self, rng: random.Random) -> dict[str, Any]:
        """One example of any split."""

    @abstractmethod
    def solution(self, example: Example) -> str:
        """A completion that scores 1 (what a dLLM for this task is trained on)."""

    def gold(self, example: Example) -> str:
        return self.solution(example)

    def causes(self, example: Example) -> dict[int, list[int]]:
        """Of characters of the solution (by place) those that they are worked out from; {}: there is no such order.

        A dLLM that is trained with ``causes_first`` is never shown the former while it does not know the latter.
        """
        return {}

    def key(self, example: Example) -> str:
        """What tells examples apart: the prompt, or what a task with a template says in its place."""
        return self.prompt(example)

    def draw(self, rng: random.Random, split: str) -> dict[str, Any]:
        """One example of ``split`` (independent draws: examples may repeat).

        Raises:
            ValueError: no prompt of the task falls into ``split`` (or the split is unknown).
        """
        self._require(split)
        for _ in range(ATTEMPTS):
            example = self.generate(rng)
            if split_of(self.key(example)) == split:
                return example
        raise ValueError(
            f"split={split!r}: none of {ATTEMPTS} prompts of task {self.name!r} falls into it; "
            "the task's settings leave too few distinct prompts"
        )

    def examples(self, split: str) -> Dataset:
        self._require(split)
        if split not in self._splits:
            self._splits[split] = self._build(split)
        return self._splits[split]

    def _require(self, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not a split of task {self.name!r}: choose one of {', '.join(SPLITS)}")

    def _build(self, split: str) -> Dataset:
        from datasets import Dataset

        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        unique: dict[str, dict[str, Any]] = {}
        repeats = 0
        while len(unique) < self.sizes[split]:
            example = self.draw(rng, split)
            repeats = repeats + 1 if self.key(example) in unique else 0
            if repeats > ATTEMPTS:
                raise ValueError(
                    f"sizes[{split!r}]={self.sizes[split]} is more than task {self.name!r} has distinct prompts "
                    f"(about {len(unique)}): ask for fewer"
                )
            unique.setdefault(self.key(example), example)
        return Dataset.from_list(list(unique.values()))


def split_of(key: str) -> str:
    """The split that an example of a procedural task belongs to, by its key: its prompt as a rule."""
    bucket = zlib.crc32(key.encode()) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")
