"""The puzzles of reasoning-gym (an optional package) as tasks."""

from __future__ import annotations

import importlib.util
import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dllm_gym.checks import choice, whole
from dllm_gym.tasks.base import Example, ProceduralTask
from dllm_gym.tasks.dataset import STYLES, PromptStyle
from dllm_gym.tasks.grading.text import tagged, tags
from dllm_gym.tasks.grading.workers import Pool, puzzles, sealed

POOL = Pool("reasoning", seconds=5.0)  # of processor time for one answer
KEPT = 5_000  # puzzles
ITEMS = 1_000_000  # of a generator, unless its options say otherwise
ONE_AT_A_TIME = threading.Lock()


class ReasoningGym(ProceduralTask):
    """Puzzles of one of reasoning-gym's generators, graded by its own scorer.

    A puzzle is an item of the generator, drawn by number; as with all procedural tasks a checksum of its text says
    which split it belongs to. The answer is the reply's last ``<answer>``, or without one the whole reply. Scorers run
    in worker processes, a new one per answer, since some evaluate the answer and none has a time limit. Those that may
    evaluate it score 0 for text that could be a program (strings with brackets in them, attributes, calls of anything
    but common functions), unless it is the generator's own answer. A generator that depends on the order of hashes
    (``polynomial_multiplication``) makes other puzzles in other processes, unless ``PYTHONHASHSEED`` is set.

    Example fields: ``question``, ``answer`` (one right answer; empty where the generator gives none), ``item``.

    >>> task = ReasoningGym("mini_sudoku", options={"min_empty": 2, "max_empty": 4}, prompt_style="chat")
    >>> example = {"question": "Fill the grid: ...", "answer": "1 2 3 4", "item": 0}
    >>> task.prompt(example), task.solution(example)
    ('Fill the grid: ...', '<answer>1 2 3 4</answer>')

    Args:
        dataset: name of the generator.
        options: its settings; ``seed`` (0) and ``size`` (a million items to draw from; some generators make all of them
            first and want fewer) are among them.
        gen_length: L.
        prompt_style: ``"xml"`` or ``"chat"``, or a :class:`~dllm_gym.tasks.dataset.PromptStyle` (only its instructions
            are used).
        seed, sizes: which items, and how many per split (2,000, 200 and 500 by default).

    Raises:
        ValueError: reasoning-gym is not installed (when examples are asked for), or it does not know the dataset or an
            option.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        dataset: str = "mini_sudoku",
        *,
        options: Mapping[str, Any] | None = None,
        gen_length: int = 128,
        prompt_style: str | PromptStyle = "xml",
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
    ):
        super().__init__(seed, {"train": 2000, "validation": 200, "test": 500, **(sizes or {})})
        if not isinstance(prompt_style, PromptStyle):
            prompt_style = STYLES[choice("prompt_style", prompt_style, STYLES)]
        self.style = prompt_style
        if not isinstance(dataset, str):
            raise ValueError(f"dataset={dataset!r}: need the name of a generator")
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options={options!r}: need the generator's settings, such as {{'min_empty': 4}}")
        self.dataset, self.options = dataset, {"seed": 0, "size": ITEMS, **(options or {})}
        self.gen_length = whole("gen_length", gen_length)
        self.items = whole("options['size']", self.options["size"])
        self._generator: Any = None
        self._puzzles: dict[int, dict[str, Any]] = {}  # by item

    @property
    def generator(self) -> Any:
        """The generator of reasoning-gym."""
        if self._generator is None:
            if importlib.util.find_spec("reasoning_gym") is None:
                raise ValueError("task reasoning_gym needs reasoning-gym: pip install 'dllm_gym[reasoning]'")
            try:
                self._generator = puzzles(self.dataset, json.dumps(self.options))
            except Exception as error:  # whatever a generator's own checks raise
                raise ValueError(
                    f"dataset={self.dataset!r}, options={self.options}: reasoning-gym refuses this ({error})"
                ) from error
        return self._generator

    def generate(self, rng: random.Random) -> dict[str, Any]:
        item = rng.randrange(self.items)
        puzzle = self._puzzle(item)
        answer = "" if puzzle["answer"] is None else str(puzzle["answer"])
        return {"question": puzzle["question"], "answer": answer, "item": item}

    def _puzzle(self, item: int) -> dict[str, Any]:
        """An item of the generator; those asked for last are kept, some take long to make."""
        if item not in self._puzzles:
            with global_streams(item):
                self._puzzles[item] = self.generator[item]
            while len(self._puzzles) > KEPT:
                del self._puzzles[next(iter(self._puzzles))]
        return self._puzzles[item]

    def prompt(self, example: Example) -> str:
        return "\n\n".join(part for part in (self.style.instructions, example["question"]) if part)

    def solution(self, example: Example) -> str:
        """The generator's own answer. Raises ValueError where it gives none."""
        if not example["answer"] and self._puzzle(example["item"])["answer"] is None:
            raise ValueError(f"dataset={self.dataset!r}: its generator has puzzles, and a scorer, but no answers")
        return f"<answer>{example['answer']}</answer>"

    def grade(self, example: Example, completion: str) -> float:
        return self.grade_all([example], [completion])[0]

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        options = json.dumps(self.options)
        questions = [
            (self.dataset, options, sealed(self._puzzle(example["item"])), answer_of(text)[-20_000:])
            for example, text in zip(examples, completions, strict=True)
        ]
        return [min(1.0, max(0.0, score or 0.0)) for score in POOL.ask_all(questions)]


@contextmanager
def global_streams(seed: int) -> Iterator[None]:
    """The global generators of Python and NumPy begin at ``seed`` within it, and are as they were behind it.

    An item is to be the same puzzle whenever it is made, but ``list_functions`` draws from Python's generator, and
    ``pool_matrix`` seeds NumPy's.
    """
    with ONE_AT_A_TIME:
        before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002  (the very one that they use)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)  # noqa: NPY002


def answer_of(text: str) -> str:
    """What a reply gives as its answer: its last tag that is not empty, nothing if all are, without a tag all of it.

    >>> answer_of("<answer>1</answer> no: <answer>2 3"), answer_of("<answer></answer>"), answer_of(" 2 3 ")
    ('2 3', '', '2 3')
    """
    return tagged(text) or ("" if any(tags(text)) else text.strip())
