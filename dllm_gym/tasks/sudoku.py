"""4x4 sudoku: cells that look sure one by one clash when they are unmasked together."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import reduce
from itertools import permutations
from operator import and_

from dllm_gym.checks import choice, flag, span
from dllm_gym.tasks.base import Example, ProceduralTask
from dllm_gym.tasks.blanks import BLANK, pieces

UNITS = (
    [[4 * row + column for column in range(4)] for row in range(4)]
    + [[4 * row + column for row in range(4)] for column in range(4)]
    + [[4 * (row + i) + column + j for i in range(2) for j in range(2)] for row in (0, 2) for column in (0, 2)]
)


def is_valid(grid: str) -> bool:
    """Whether 16 cells hold each of 1-4 once in every row, column and box."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


def _all_grids() -> list[str]:
    """The 288 valid grids."""
    rows = ["".join(p) for p in permutations("1234")]
    grids = [""]
    for _ in range(4):
        grids = [g + row for g in grids for row in rows if _fits(g + row)]
    return grids


def _fits(prefix: str) -> bool:
    """Whether the cells filled so far (whole rows) break no unit."""
    filled = ([prefix[cell] for cell in unit if cell < len(prefix)] for unit in UNITS)
    return all(len(set(cells)) == len(cells) for cells in filled)


GRIDS = _all_grids()
FEWEST = 4  # givens that a puzzle with one answer has
_HAVING = {  # (cell, digit) -> which of the grids have it there, as bits
    (cell, digit): sum(1 << i for i, grid in enumerate(GRIDS) if grid[cell] == digit)
    for cell in range(16)
    for digit in "1234"
}


def answers(puzzle: str) -> int:
    """How many grids keep the givens of a puzzle (16 characters of ``1234.``).

    >>> answers("1" + "." * 15), answers("1.......2.......")
    (72, 24)
    """
    given = (_HAVING[cell, digit] for cell, digit in enumerate(puzzle) if digit != BLANK)
    return reduce(and_, given, (1 << len(GRIDS)) - 1).bit_count()


class Sudoku(ProceduralTask):
    r"""Complete a 4x4 grid: any valid grid that keeps the givens scores 1, anything else 0.

    The prompt is the puzzle, four lines with ``.`` for a blank; the answer is the grid in the same four lines and
    takes 19 tokens and an EOS (L = 20). Puzzles with few givens have many answers: the dLLM is unsure in a way that
    no order removes, and what a policy must learn is which cells may be unmasked together.

    ``template=True, unique=True, score="cells"`` is the protocol of UPO (arXiv 2510.05725).

    Example fields: ``puzzle`` (16 characters of ``1234.``), ``grid`` (one of its answers).

    >>> task = Sudoku()
    >>> task.grade({"puzzle": "1...............", "grid": ""}, "1234\n3412\n2143\n4321\n")
    1.0

    Args:
        min_givens, max_givens: the number of given cells is uniform between these (0 to 16).
        template: the answer's givens, line ends and EOS are filled in already; only the blank cells are masked.
        unique: only puzzles with exactly one answer; they have at least 4 givens, whatever ``min_givens`` is.
        score: ``"solved"``: 1 for a valid grid that keeps the givens, else 0; ``"cells"``: the share of blank cells
            that are as in the one answer (needs ``unique``).
        seed, sizes: see :class:`~dllm_gym.tasks.base.ProceduralTask`.

    Raises:
        ValueError: a setting is wrong, or leaves no puzzle.
    """

    name = "sudoku"
    gen_length = 20

    def __init__(
        self,
        min_givens: int = 0,
        max_givens: int = 12,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        *,
        template: bool = False,
        unique: bool = False,
        score: str = "solved",
    ):
        super().__init__(seed, sizes)
        self.min_givens, self.max_givens = span("givens", min_givens, max_givens, least=0, most=16)
        self.filled, self.unique = flag("template", template), flag("unique", unique)
        self.score = choice("score", score, ("solved", "cells"))
        if self.unique and max_givens < FEWEST:
            raise ValueError(f"max_givens={max_givens}, unique=True: a puzzle with one answer has at least {FEWEST}")
        if self.score == "cells" and not self.unique:
            raise ValueError("score='cells', unique=False: cells are compared with the one answer, say unique=True")
        if max_givens == 16 and (self.filled or self.score == "cells"):
            raise ValueError(
                f"max_givens=16, template={template}, score={score!r}: need a blank cell, at most 15 givens"
            )

    def generate(self, rng: random.Random) -> dict[str, str]:
        count = rng.randint(max(self.min_givens, FEWEST), self.max_givens) if self.unique else None
        while True:
            grid = rng.choice(GRIDS)
            givens = set(
                rng.sample(range(16), rng.randint(self.min_givens, self.max_givens) if count is None else count)
            )
            puzzle = "".join(c if i in givens else BLANK for i, c in enumerate(grid))
            if not self.unique or answers(puzzle) == 1:
                return {"puzzle": puzzle, "grid": grid}

    def prompt(self, example: Example) -> str:
        return _lines(example["puzzle"]) + "\n"

    def template(self, example: Example) -> list[str | int] | None:
        return pieces(_lines(example["puzzle"])) if self.filled else None

    def solution(self, example: Example) -> str:
        return _lines(example["grid"])

    def grade(self, example: Example, completion: str) -> float:
        lines = (completion if self.filled else completion.strip()).split("\n")
        if self.score == "cells":
            return self._share(example, lines)
        grid = "".join(lines)
        keeps_givens = all(given in (BLANK, cell) for given, cell in zip(example["puzzle"], grid, strict=False))
        return float([len(line) for line in lines] == [4, 4, 4, 4] and is_valid(grid) and keeps_givens)

    @staticmethod
    def _share(example: Example, lines: list[str]) -> float:
        """The share of blank cells that are right; those of lines that are missing or of another length are not."""
        rows = [line if len(line) == 4 else BLANK * 4 for line in (lines + [""] * 4)[:4]]
        cells = zip(example["puzzle"], example["grid"], "".join(rows), strict=True)
        right = [cell == answer for given, answer, cell in cells if given == BLANK]
        return sum(right) / len(right)


def _lines(cells: str) -> str:
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))
