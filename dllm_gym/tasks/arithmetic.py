"""Chains of additions and subtractions with worked steps: later digits depend on earlier ones."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from dllm_gym.checks import span
from dllm_gym.tasks.base import Example, ProceduralTask

BLOCK = 12  # tokens: L is a multiple of it, so that semi-autoregressive blocks fit


class Arithmetic(ProceduralTask):
    """Work out a chain such as ``3+8-5+9=`` step by step: ``3+8=11;11-5=6;6+9=15#15``.

    Operands are digits and no running total is negative. The prompt is filled up with blanks to one width, so that
    the k-th operand always stands at the same place. Only what stands after ``#`` is graded; the rest of the L = 48
    tokens is EOS, as in instruction-tuned dLLMs (six or more operations need more tokens: L grows in twelves).

    Example fields: ``chain`` (the left-hand side, without ``=``), ``answer`` (int).

    >>> task = Arithmetic()
    >>> task.solution({"chain": "3+8-5", "answer": 6}), task.grade({"chain": "3+8-5", "answer": 6}, "...#6")
    ('3+8=11;11-5=6#6', 1.0)

    Args:
        min_operations, max_operations: the number of operations is uniform between these (at least 1).
    """

    name = "arithmetic"
    gen_length = 48

    def __init__(
        self, min_operations: int = 1, max_operations: int = 4, seed: int = 0, sizes: Mapping[str, int] | None = None
    ):
        super().__init__(seed, sizes)
        self.min_operations, self.max_operations = span("operations", min_operations, max_operations)
        longest = len(self.solution({"chain": "9" + "+9" * max_operations})) + 1  # and an EOS
        self.gen_length = max(Arithmetic.gen_length, BLOCK * math.ceil(longest / BLOCK))

    def generate(self, rng: random.Random) -> dict[str, str | int]:
        total = rng.randint(0, 9)
        chain = str(total)
        for _ in range(rng.randint(self.min_operations, self.max_operations)):
            operand = rng.randint(0, 9)
            sign = 1 if operand > total else rng.choice((1, -1))
            total += sign * operand
            chain += f"{'+' if sign > 0 else '-'}{operand}"
        return {"chain": chain, "answer": total}

    def prompt(self, example: Example) -> str:
        return f"{example['chain']}=".ljust(2 * self.max_operations + 2)

    def solution(self, example: Example) -> str:
        chain = example["chain"]
        total, steps = int(chain[0]), []
        for sign, operand in zip(chain[1::2], chain[2::2], strict=True):
            result = total + int(operand) if sign == "+" else total - int(operand)
            steps.append(f"{total}{sign}{operand}={result}")
            total = result
        return ";".join(steps) + f"#{total}"

    def grade(self, example: Example, completion: str) -> float:
        return float(completion.rpartition("#")[2].strip() == str(example["answer"]) and "#" in completion)
