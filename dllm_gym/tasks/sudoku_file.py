"""4x4 sudokus from a file, with one answer each, as the papers on dLLMs use them."""

from __future__ import annotations

import re

from dllm_gym.checks import choice
from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask
from dllm_gym.tasks.grading.text import LIMIT, marked
from dllm_gym.tasks.rows import Row

# cells with little between them; then also as lists, tables, matrices and bold text write them: the text before a grid
# may end in such a sign, too, so both are tried; a blank line ends the second kind
_CELLS = (
    re.compile(r"[0-9._](?:[\s|,]*[0-9._])*"),
    re.compile(r"[0-9._](?:(?:(?!\n[ ]*\n)[\s|,\[\]*\\&:+-])*[0-9._])*"),
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SCORES = ("cells", "grid", "d1")
_ROW_NAME = re.compile(r"\brow[ ]?[0-9][ ]?:", re.IGNORECASE)


class SudokuFile(DatasetTask):
    r"""Complete a 4x4 grid with one answer; needs a file with the columns ``Puzzle`` and ``Solution``, 16 digits each.

    0 is a blank cell. The answer is the last grid (16 digits, whatever blanks, bars, commas, brackets, dashes,
    asterisks or line breaks of LaTeX stand between them) in the reply's mark (:mod:`~dllm_gym.tasks.grading.text`), or
    without a mark in the whole reply. Example fields: ``puzzle``, ``solution``.

    >>> task = SudokuFile(score="cells")
    >>> example = {"puzzle": "1204341221404321", "solution": "1234341221434321"}
    >>> task.grade(example, "<answer>\n1234\n3412\n2144\n4321\n</answer>")
    0.5

    Args:
        score: ``"cells"``, the fraction of blank cells that are right, or ``"grid"``: 1 if all are, else 0. Both need
            a whole grid. ``"d1"`` is the reward of d1 (arXiv 2504.12216) and UPO to the letter, for comparisons: the
            fraction of blank cells that are right in the digits of the last closed ``<answer>``, whatever stands
            between them; zeros are appended to less than 16, more are cut off.
        settings: those of :class:`~dllm_gym.tasks.dataset.DatasetTask`.
    """

    name = "sudoku4_csv"
    gen_length = 128
    fields = ("Puzzle", "Solution")

    def __init__(self, *, score: str = "cells", **settings):
        super().__init__(**settings)
        self.score = choice("score", score, SCORES)

    def prepare(self, row: Row) -> Row:
        cells = (row[field] for field in self.fields)
        puzzle, solution = (f"{c:016d}" if isinstance(c, int) else str(c).strip() for c in cells)  # ints lose zeros
        digits = re.fullmatch("[0-4]{16}", puzzle) and re.fullmatch("[1-4]{16}", solution) and "0" in puzzle
        if not digits or any(given not in ("0", cell) for given, cell in zip(puzzle, solution, strict=True)):
            raise ValueError(f"{puzzle!r}, {solution!r} is no 4x4 puzzle with blanks and its answer")
        return {"puzzle": puzzle, "solution": solution}

    def question(self, example: Example) -> str:
        return (
            "Fill every 0 of this 4x4 sudoku with a digit from 1 to 4, so that each row, each column and each of the "
            f"four 2x2 boxes holds each digit once:\n{lines(example['puzzle'])}\n"
            "Answer with the full grid in four lines of four digits, between <answer> and </answer>."
        )

    def reply(self, example: Example) -> str:
        if "<answer>" in self.style.reply:
            return self.style.write("Filling the blanks one after another.", lines(example["solution"]))
        return f"<answer>\n{lines(example['solution'])}\n</answer>"

    def grade(self, example: Example, completion: str) -> float:
        reply = self.whole_reply(example, completion)
        if self.score == "d1":
            return share(example, digits_of(reply).ljust(16, "0")[:16])
        cells = last_grid((marked(reply, hashes=False) or reply)[-LIMIT:])
        if not cells:
            return 0.0
        return share(example, cells) if self.score == "cells" else float(cells == example["solution"])


def share(example: Example, cells: str) -> float:
    """The fraction of blank cells that are right in sixteen cells."""
    right = [c == s for c, p, s in zip(cells, example["puzzle"], example["solution"], strict=True) if p == "0"]
    return sum(right) / len(right)


def digits_of(text: str) -> str:
    """All digits in the last closed ``<answer>``, as d1 reads it; empty without one.

    >>> digits_of("<answer>9</answer> or <answer>12a3\\n4</answer>, <answer>5")
    '1234'
    """
    answers = _ANSWER.findall(text)
    return re.sub(r"\D", "", answers[-1]) if answers else ""


def last_grid(text: str) -> str:
    """The sixteen cells of the last grid in a text; empty without one.

    >>> last_grid("First 1234341221434320, then [[1,2,3,4], [3,4,1,2], [2,1,4,3], [4,3,2,1]].")
    '1234341221434321'
    """
    text = _ROW_NAME.sub(" ", text)
    grids = []
    for pattern in _CELLS:
        for match in pattern.finditer(text):
            cells = re.sub(r"[^0-9._]", "", match.group())
            cells = cells if len(cells) == 16 else cells.strip(".")  # the full stop of a sentence
            if len(cells) == 16:
                grids.append((match.end(), cells))
    return max(grids)[1] if grids else ""


def lines(cells: str) -> str:
    """Sixteen cells as four lines.

    >>> lines("1234341221434321")
    '1234\\n3412\\n2143\\n4321'
    """
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))
