"""Sums, differences and products that are easy in one direction only: the order in which digits are filled decides."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from dllm_gym.checks import number, span
from dllm_gym.tasks.base import Example
from dllm_gym.tasks.blanks import BLANK, Infilling

LONGEST = 7  # tokens of an equation
# What operands are drawn from. The most likely result is not that of the most likely operands, and it is surer than an
# operand of a product (1/8) and of a difference (1/4), but less sure than one of a sum (2/5).
OPERANDS = {"*": (2, 3, 4, 5, 6, 7, 8, 9), "+": (1, 1, 1, 1, 4, 4, 4, 2, 3, 6), "-": (1, 2, 3, 4)}
_EQUATION = re.compile(r"(?:([0-9]+)=)?([0-9])([*+-])([0-9])(?:=([0-9]+))?")


def result(a: int, sign: str, b: int) -> str:
    """Two digits of a product, the last digit of a sum, a difference without its sign."""
    return {"*": f"{a * b:02d}", "+": str((a + b) % 10), "-": str(abs(a - b))}[sign]


class OneWay(Infilling):
    """Fill the blanks of equations whose result stands left or right, ``.*.=..;.=1+.;``; all have to hold.

    Results are never shown. Whoever fills the operands first can compute them; whoever begins with a result has to find
    operands for it, which a dLLM cannot that only ever saw causes before effects (``causes_first`` in its training).
    Confidence does not say what comes first: a product's first digit is surer than its factors, a sum's operands are
    surer than the sum, so neither the most nor the least confident position is the right one; nor is the leftmost.
    What it stands for in real text: an answer and the working it follows from, whichever is written first.

    Example fields: ``puzzle`` (with ``.`` for a blank), ``answer`` (one way to fill it).

    >>> task = OneWay()
    >>> task.grade({"puzzle": "..=.*3;", "answer": "12=4*3;"}, "15=5*3;")
    1.0

    Args:
        min_equations, max_equations: how many, uniform.
        most_shown: the share of operands that is shown is uniform between 0 and this.
    """

    name = "one_way"
    dllm = "tiny_one_way"

    def __init__(
        self,
        min_equations: int = 1,
        max_equations: int = 3,
        most_shown: float = 0.5,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
    ):
        super().__init__(seed, sizes)
        self.min_equations, self.max_equations = span("equations", min_equations, max_equations)
        self.most_shown = number("most_shown", most_shown, least=0, most=1)
        self.gen_length = LONGEST * max_equations + max_equations % 2  # even, for blocks

    def generate(self, rng: random.Random) -> dict[str, str]:
        share = rng.random() * self.most_shown
        puzzle = answer = ""
        for _ in range(rng.randint(self.min_equations, self.max_equations)):
            sign = rng.choice("*+-")
            a, b = rng.choices(OPERANDS[sign], k=2)
            shown = "".join(str(x) if rng.random() < share else BLANK for x in (a, b))
            sides = [(f"{a}{sign}{b}", f"{shown[0]}{sign}{shown[1]}")]
            sides.insert(rng.randrange(2), (result(a, sign, b), BLANK * len(result(a, sign, b))))
            answer += "=".join(side for side, _ in sides) + ";"
            puzzle += "=".join(side for _, side in sides) + ";"
        return {"puzzle": puzzle, "answer": answer}

    def causes(self, example: Example) -> dict[int, list[int]]:
        """Of every digit of a result the places of the operands it follows from."""
        causes: dict[int, list[int]] = {}
        start = 0
        for equation in example["answer"].split(";")[:-1]:
            sign = max(map(equation.find, OPERANDS))
            operands = [start + sign - 1, start + sign + 1]
            digits = [start + i for i, c in enumerate(equation) if c.isdigit()]
            causes |= {place: operands for place in digits if place not in operands}
            start += len(equation) + 1
        return causes

    def holds(self, text: str) -> bool:
        """Whether all equations of a text hold."""
        return all(map(_holds, text.split(";")[:-1]))


def _holds(equation: str) -> bool:
    found = _EQUATION.fullmatch(equation)
    return found is not None and (found[1] or found[5]) == result(int(found[2]), found[3], int(found[4]))
