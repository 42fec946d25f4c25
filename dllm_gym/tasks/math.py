"""MATH: competition problems whose answer is a formula."""

from __future__ import annotations

from collections.abc import Sequence

from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask, Row, Source
from dllm_gym.tasks.grading import boxes, marked
from dllm_gym.tasks.latex import equivalent_all


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
    """

    name = "math"
    gen_length = 256
    hub = {"train": Source("ankner/math-500"), "test": Source("HuggingFaceH4/MATH-500", split="test")}
    fields = ("problem",)

    def prepare(self, row: Row) -> Row:
        working = str(row.get("solution") or "")
        boxed = [content for _, content in boxes(working) if content.strip()]
        answer = str(row.get("answer") or (boxed[-1] if boxed else "")).strip()
        if not answer:
            raise ValueError(f"data={self.data!r}: the problem {row['problem']!r} has no answer and no boxed solution")
        return {"problem": str(row["problem"]).strip(), "working": working.strip(), "answer": answer}

    def question(self, example: Example) -> str:
        return f"{example['problem']}\nDerive the result step by step and put it, in LaTeX, into \\boxed{{}}."

    def reply(self, example: Example) -> str:
        return self.style.write(example["working"], f"\\boxed{{{example['answer']}}}")

    def grade(self, example: Example, completion: str) -> float:
        return self.grade_all([example], [completion])[0]

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        replies = [self.whole_reply(e, completion) for e, completion in zip(examples, completions, strict=True)]
        answers = [marked(reply, hashes=False) or "" for reply in replies]
        pairs = [(example["answer"], answer) for example, answer in zip(examples, answers, strict=True)]
        return [float(verdict) for verdict in equivalent_all(pairs)]
