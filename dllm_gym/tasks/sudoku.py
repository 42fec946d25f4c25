"""4x4 sudoku: cells that look sure one by one clash when they are unmasked together."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import permutations

from dllm_gym.checks import whole
from dllm_gym.tasks.base import Example, ProceduralTask

BLANK = "."
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


class Sudoku(ProceduralTask):
    r"""Complete a 4x4 grid: any valid grid that keeps the givens scores 1, anything else 0.

    The prompt is the puzzle, four lines with ``.`` for a blank; the answer is the grid in the same four lines and
    takes 19 tokens and an EOS (L = 20). Puzzles with few givens have many answers: the dLLM is unsure in a way that
    no order removes, and what a policy must learn is which cells may be unmasked together.

    Example fields: ``puzzle`` (16 characters of ``1234.``), ``grid`` (one of its answers).

    >>> task = Sudoku()
    >>> task.grade({"puzzle": "1...............", "grid": ""}, "1234\n3412\n2143\n4321\n")
    1.0

    Args:
        min_givens, max_givens: the number of given cells is uniform between these (0 to 16).
    """

    name = "sudoku"
    gen_length = 20

    def __init__(
        self, min_givens: int = 0, max_givens: int = 12, seed: int = 0, sizes: Mapping[str, int] | None = None
    ):
        super().__init__(seed, sizes)
        if not 0 <= whole("min_givens", min_givens, least=0) <= whole("max_givens", max_givens, least=0) <= 16:
            raise ValueError(
                f"min_givens={min_givens}, max_givens={max_givens}: need 0 <= min_givens <= max_givens <= 16"
            )
        self.min_givens, self.max_givens = min_givens, max_givens

    def generate(self, rng: random.Random) -> dict[str, str]:
        grid = rng.choice(GRIDS)
        givens = set(rng.sample(range(16), rng.randint(self.min_givens, self.max_givens)))
        return {"puzzle": "".join(c if i in givens else BLANK for i, c in enumerate(grid)), "grid": grid}

    def prompt(self, example: Example) -> str:
        return _lines(example["puzzle"]) + "\n"

    def solution(self, example: Example) -> str:
        return _lines(example["grid"])

    def grade(self, example: Example, completion: str) -> float:
        lines = completion.strip().split("\n")
        grid = "".join(lines)
        keeps_givens = all(given in (BLANK, cell) for given, cell in zip(example["puzzle"], grid, strict=False))
        return float([len(line) for line in lines] == [4, 4, 4, 4] and is_valid(grid) and keeps_givens)


def _lines(cells: str) -> str:
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))
