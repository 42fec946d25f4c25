"""Several sums with blanks: digits that may be chosen freely, and digits that follow from them."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Mapping

from dllm_gym.checks import number, span
from dllm_gym.tasks.blanks import BLANK, Infilling

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_EQUATION = re.compile(r"([0-9]+)([-+*])([0-9]+)=([0-9]+);")


class Equations(Infilling):
    """Fill the blanks of several equations, ``.+3=1.;.4-..=0.;``: any digits with which all of them hold score 1.

    A digit is *free* while the equation can still be made to hold whatever it is, and follows once the others are
    there. Its confidence does not say which: at the start both kinds are equally unsure.
    What it stands for in real text: quantities that are chosen and then computed with, names that are chosen and then
    repeated.

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
    dllm = "tiny_equations"

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
        self.min_equations, self.max_equations = span("equations", min_equations, max_equations)
        if not isinstance(operations, str) or not operations or set(operations) - set(OPERATIONS):
            raise ValueError(f"operations={operations!r}: need some of {''.join(OPERATIONS)}")
        self.operations = operations
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

    def holds(self, text: str) -> bool:
        """Whether a text is equations that all hold."""
        found = list(_EQUATION.finditer(text))
        nothing_else = "".join(match.group() for match in found) == text
        return nothing_else and all(OPERATIONS[m[2]](int(m[1]), int(m[3])) == int(m[4]) for m in found)
