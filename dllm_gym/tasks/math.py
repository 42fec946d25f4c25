"""MATH: competition problems whose answer is a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask
from dllm_gym.tasks.grading.latex import equivalent, equivalent_all
from dllm_gym.tasks.grading.text import boxes, last_box, marked
from dllm_gym.tasks.rows import Row, Source, cell

if TYPE_CHECKING:
    from datasets import Dataset


class Math(DatasetTask):
    r"""Competition problems (Hendrycks et al., arXiv 2103.03874); an answer is right if it means the same formula.

    Training problems are those of MATH without the 500 of the test split, which is MATH-500. The answer of a reply is
    its last ``\boxed{}`` or ``<answer>``; a reply without either scores 0. Rows need ``problem`` and either ``answer``
    or a ``solution`` with a box. Example fields: ``problem``, ``working``, ``answer``.

    >>> task = Math(prompt_style="chat")
    >>> example = {"problem": "Solve $2x = 1$.", "working": "Divide by two.", "answer": "\\frac{1}{2}"}
    >>> task.grade_all([example] * 3, [r"\boxed{\dfrac12}", "<answer>0.5</answer>", "It is 0.5."])
    [1.0, 1.0, 0.0]

    Args:
        settings: those of :class:`~dllm_gym.tasks.dataset.DatasetTask`.

    Raises:
        ValueError: as of any such task, or (at the first use) math-verify cannot be loaded.
    """

    name = "math"
    gen_length = 256
    hub = {"train": Source("ankner/math-500"), "test": Source("HuggingFaceH4/MATH-500", split="test")}
    fields = ("problem",)
    graders = ("own", "lup")
    files = {"math500": "test"}

    def prepare(self, row: Row) -> Row:
        working = str(row.get("solution") or "")
        boxed = [content for _, content in boxes(working) if content.strip()]
        problem = cell(row, "problem")
        if row.get("answer") not in (None, ""):
            answer = cell(row, "answer")
        elif boxed:
            answer = boxed[-1].strip()
        else:
            raise ValueError(f"the problem {problem!r} has no answer and no boxed solution")
        return {"problem": problem, "working": working.strip(), "answer": answer}

    def examples(self, split: str) -> Dataset:
        try:
            equivalent("x + x", "2x")  # before the first episode, not at its end
        except RuntimeError as error:
            raise ValueError(f"task {self.name!r} needs math-verify: pip install math-verify ({error})") from error
        return super().examples(split)

    def bare(self, example: Example) -> str:
        return example["problem"]

    def question(self, example: Example) -> str:
        return f"{example['problem']}\nDerive the result step by step and put it, in LaTeX, into \\boxed{{}}."

    def reply(self, example: Example) -> str:
        return self.style.write(example["working"], f"\\boxed{{{example['answer']}}}")

    def grade(self, example: Example, completion: str) -> float:
        return self.grade_all([example], [completion])[0]

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        replies = [self.whole_reply(e, completion) for e, completion in zip(examples, completions, strict=True)]
        read = last_box if self.grader == "lup" else lambda reply: marked(reply, hashes=False)
        answers = [read(reply) or "" for reply in replies]
        pairs = [(example["answer"], answer) for example, answer in zip(examples, answers, strict=True)]
        return [float(verdict) for verdict in equivalent_all(pairs)]
