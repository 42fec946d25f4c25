"""Texts with blanks: tasks whose completion begins as the whole text, with masks where something is missing."""

from __future__ import annotations

from abc import abstractmethod
from itertools import groupby

from dllm_gym.tasks.base import Example, ProceduralTask

BLANK = "."


def pieces(text: str) -> list[str | int]:
    """The template of a text with a dot per blank: given texts, and how many blanks stand between them.

    >>> pieces("3+.=0.;")
    ['3+', 1, '=0', 1, ';']
    """
    runs = ((blank, "".join(run)) for blank, run in groupby(text, lambda character: character == BLANK))
    return [len(run) if blank else run for blank, run in runs]


class Infilling(ProceduralTask):
    """There is no prompt: the completion begins with what is shown. What is filled in is right if the text holds.

    Example fields: ``puzzle`` (with ``.`` for a blank), ``answer`` (one way to fill it).
    """

    @abstractmethod
    def holds(self, text: str) -> bool:
        """Whether a text without blanks is right."""

    def prompt(self, example: Example) -> str:
        return ""

    def key(self, example: Example) -> str:
        return example["puzzle"]

    def template(self, example: Example) -> list[str | int]:
        return pieces(example["puzzle"])

    def solution(self, example: Example) -> str:
        return example["answer"]

    def grade(self, example: Example, completion: str) -> float:
        puzzle = example["puzzle"]
        kept = len(completion) == len(puzzle) and all(p in (BLANK, c) for p, c in zip(puzzle, completion, strict=True))
        return float(kept and self.holds(completion))
