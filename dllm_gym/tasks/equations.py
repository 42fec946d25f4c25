"""Several sums with blanks: digits that may be chosen freely, and digits that follow from them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from dllm_gym.checks import number, whole
from dllm_gym.tasks.base import Example, ProceduralTask

BLANK = "."
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+);")


def pieces(puzzle: str) -> list[str | int]:
    """The template of a text with a dot per blank: given texts, and how many blanks stand between them.

    >>> pieces("3+.=0.;")
    ['3+', 1, '=0', 1, ';']
    """
    runs = (("".join(run), blank) for blank, run in groupby(puzzle, lambda character: character == BLANK))
    return [len(run) if blank else run for run, blank in runs]


class Equations(ProceduralTask):
    """Fill the blanks of several equations, ``.+3=1.;.4-..=0.;``: any digits with which all of them hold score 1.

    The completion begins with what is shown (:meth:`template`); there is no prompt. Between a minus' operands, between
    a product and its factors, and between digits of one sum there are choices: a digit is *free* while others can still
    make the equation hold, whatever it is, and follows once they are there. Its confidence does not say which: at the
    start free digits and those that depend on them are equally unsure. What it stands for in real text: quantities
    that are chosen and then computed with, names that are chosen and then repeated.

    Numbers are padded with zeros to widths that the operands' widths give, so blanks show no size. Example fields:
    ``puzzle`` (with ``.`` for a blank), ``answer`` (one way to fill it).

    >>> task = Equations()
    >>> task.grade({"puzzle": ".+3=1.;", "answer": "7+3=10;"}, "9+3=12;")
    1.0

    Args:
        min_equations, max_equations: how many, uniform; fewer where L = 32 tokens do not hold that many.
        operations: the operators to draw from, of ``+-*``.
        two_digits: the chance that an operand of ``+`` or ``-`` has two digits, in [0, 1].
        most_shown: the share of digits that is shown is uniform between 0 and this.
    """

    name = "equations"
    gen_length = 32

    def __init__(
        self,
        min_equations: int = 2,
        max_equations: int = 4,
        operations: str = "+-*",
        two_digits: float = 0.25,
        most_shown: float = 0.5,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
    ):
        super().__init__(seed, sizes)
        if not 1 <= whole("min_equations", min_equations) <= whole("max_equations", max_equations):
            raise ValueError(
                f"min_equations={min_equations}, max_equations={max_equations}: need min_equations <= max_equations"
            )
        if not isinstance(operations, str) or not operations or set(operations) - set(OPERATIONS):
            raise ValueError(f"operations={operations!r}: need some of {''.join(OPERATIONS)}")
        self.min_equations, self.max_equations, self.operations = min_equations, max_equations, operations
        self.two_digits = number("two_digits", two_digits, least=0, most=1)
        self.most_shown = number("most_shown", most_shown, least=0, most=1)

    def generate(self, rng: random.Random) -> dict[str, str]:
        wanted = rng.randint(self.min_equations, self.max_equations)
        answer = ""
        for equation in (self._equation(rng) for _ in range(wanted)):
            if len(answer) + len(equation) <= self.gen_length:
                answer += equation
        share = rng.random() * self.most_shown
        puzzle = [BLANK if c.isdigit() and rng.random() >= share else c for c in answer]
        if BLANK not in puzzle:
            puzzle[-2] = BLANK
        return {"puzzle": "".join(puzzle), "answer": answer}

    def _equation(self, rng: random.Random) -> str:
        sign = rng.choice(self.operations)
        widths = [1 + (sign != "*" and rng.random() < self.two_digits) for _ in range(2)]
        a, b = (rng.randrange(10**width) for width in widths)
        if sign == "-" and a < b:
            a, b, widths = b, a, widths[::-1]
        width = max(widths) + (sign != "-")
        return f"{a:0{widths[0]}}{sign}{b:0{widths[1]}}={OPERATIONS[sign](a, b):0{width}};"

    def prompt(self, example: Example) -> str:
        return ""

    def key(self, example: Example) -> str:
        return example["puzzle"]

    def template(self, example: Example) -> Sequence[str | int]:
        return pieces(example["puzzle"])

    def solution(self, example: Example) -> str:
        return example["answer"]

    def grade(self, example: Example, completion: str) -> float:
        puzzle = example["puzzle"]
        kept = len(completion) == len(puzzle) and all(p in (BLANK, c) for p, c in zip(puzzle, completion, strict=True))
        return float(kept and _hold(completion))


def _hold(text: str) -> bool:
    """Whether a text is equations that all hold."""
    found = list(_EQUATION.finditer(text))
    whole_text = "".join(match.group() for match in found) == text
    return whole_text and all(OPERATIONS[m[2]](int(m[1]), int(m[3])) == int(m[4]) for m in found)
