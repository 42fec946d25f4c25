"""GSM8K: grade-school word problems whose answer is a number."""

from __future__ import annotations

import re

from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask
from dllm_gym.tasks.grading.text import numbers, same_number, same_plain_number
from dllm_gym.tasks.rows import Row, Source, cell


class GSM8K(DatasetTask):
    r"""Word problems (Cobbe et al., arXiv 2110.14168); an answer is right if it is the same number up to 1e-6.

    Where a reply states its answer is told in :mod:`~dllm_gym.tasks.grading.text`. Rows need ``question`` and
    ``answer`` (working, then ``#### 72``; or only the number). Example fields: ``question``, ``working`` (without
    calculator marks), ``answer`` (the number as text).

    >>> task = GSM8K(prompt_style="chat")
    >>> example = {"question": "What is 6 * 8?", "working": "6 * 8 = 48", "answer": "48"}
    >>> print(task.prompt(example))
    What is 6 * 8?
    Work it out step by step and put the final number into \boxed{}.
    <BLANKLINE>
    >>> task.grade(example, r"Six times eight is \boxed{48}.")
    1.0

    Args:
        settings: those of :class:`~dllm_gym.tasks.dataset.DatasetTask`.
    """

    name = "gsm8k"
    gen_length = 256
    hub = {"train": Source("openai/gsm8k", "main", "train"), "test": Source("openai/gsm8k", "main", "test")}
    fields = ("question", "answer")
    graders = ("own", "lup")

    def prepare(self, row: Row) -> Row:
        working, _, answer = cell(row, "answer").rpartition("####")
        if not numbers(answer):
            raise ValueError(f"the answer {row['answer']!r} has no number")
        working = re.sub(r"<<.*?>>", "", working).strip()
        return {"question": cell(row, "question"), "working": working, "answer": answer.strip()}

    def bare(self, example: Example) -> str:
        return example["question"]

    def question(self, example: Example) -> str:
        return f"{example['question']}\nWork it out step by step and put the final number into \\boxed{{}}."

    def reply(self, example: Example) -> str:
        return self.style.write(example["working"], f"\\boxed{{{example['answer']}}}")

    def grade(self, example: Example, completion: str) -> float:
        reply = self.whole_reply(example, completion)
        if self.grader == "lup":
            return float(same_plain_number(example["answer"], reply))
        return float(same_number(example["answer"], reply))
