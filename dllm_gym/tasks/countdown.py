"""Countdown: reach a target number with four operations on given numbers."""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from typing import Any

from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask
from dllm_gym.tasks.grading.text import marked
from dllm_gym.tasks.rows import Row, Source

LONGEST = 200  # characters of an expression
COLUMNS = {"numbers": ("numbers", "nums", "input"), "target": ("target", "output")}
SIGNS = str.maketrans(
    dict.fromkeys("×·∙•⋅∗✕✖", "*")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
    | {"[": "(", "]": ")", "{": "(", "}": ")", "$": " ", "`": " ", "\uff0b": "+", "\uff1d": "="}
)
MARKUP = re.compile(r"```[a-z]*|</?[a-z]{1,10}>|\\[()\[\],;:! ]|\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])", re.I)
BOX = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boxed)(?=\{)")
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
EMPHASIS = re.compile(r"(?<![0-9)*_])(\*{1,3}|_{1,3})(?![*_])(.+?)\1(?![0-9(*_])")
SET_OFF = re.compile(r"`([^`\n]+)`|(?<!\*)\*\*([^\n]+?)\*\*(?!\*)|\$([^$\n]+)\$|\\\((.+?)\\\)")


class Countdown(DatasetTask):
    r"""An expression that uses each number exactly once and hits the target scores 1, anything else 0.

    Allowed are ``+ - * /`` (also as ``\times``, ``\div``, ``\cdot``) and parentheses; what follows ``=`` is not read
    (unless a lone number precedes it: ``46 = 7 * 3 + 25``).
    The expression is the reply's mark (:mod:`~dllm_gym.tasks.grading.text`), or without one its last line; of either,
    what is set off as code, in bold or as a formula, if the whole is no expression.

    Rows need the numbers (``numbers``, ``nums`` or ``input``: a list, or a text such as ``3,7,25``) and ``target`` (or
    ``output``), which covers the files of d1 and the dataset on the hub. Example fields: ``numbers``, ``target``.

    >>> task, example = Countdown(), {"numbers": [3, 7, 25], "target": 46}
    >>> [task.grade(example, f"<answer>{text}</answer>") for text in ("7 * 3 + 25 = 46", "46", "3 * 7 + 5 * 5")]
    [1.0, 0.0, 0.0]

    Args:
        settings: those of :class:`~dllm_gym.tasks.dataset.DatasetTask`.
    """

    name = "countdown"
    gen_length = 256
    hub = {"train": Source("Jiayi-Pan/Countdown-Tasks-3to4")}

    def prepare(self, row: Row) -> Row:
        found = {}
        for field, names in COLUMNS.items():
            present = [name for name in names if row.get(name) is not None]
            if not present:
                raise ValueError(f"no value for {' or '.join(names)} among the columns {', '.join(row)}")
            found[field] = row[present[0]]
        numbers = found["numbers"]
        if isinstance(numbers, str):
            numbers = re.split(r"[\s,;]+", numbers.strip(" []()"))
        if not isinstance(numbers, list) or not numbers:
            raise ValueError(f"numbers={found['numbers']!r}: need a list of whole numbers, or a text such as 3,7,25")
        return {
            "numbers": [integer("numbers", number, lowest=0) for number in numbers],
            "target": integer("target", found["target"]),
        }

    def question(self, example: Example) -> str:
        numbers = ", ".join(map(str, example["numbers"]))
        return (
            f"Combine the numbers {numbers} with +, -, *, / and parentheses so that the result is {example['target']}. "
            "Use every number exactly once. Put the expression alone, without an equals sign, into \\boxed{}."
        )

    def reply(self, example: Example) -> str:
        expression = solve(example["numbers"], example["target"])
        return self.style.write(f"{expression} = {example['target']}", f"\\boxed{{{expression}}}")

    def grade(self, example: Example, completion: str) -> float:
        reply = self.whole_reply(example, completion)
        lines = [line for line in reply[-10 * LONGEST :].split("\n") if line.strip(" \t`*_")]
        said = marked(reply, hashes=False) or (lines[-1] if lines else "")
        set_off = ["".join(groups) for groups in SET_OFF.findall(said[-2 * LONGEST :])]
        outcome = evaluate(said) or (evaluate(set_off[-1]) if set_off else None)
        return float(outcome is not None and outcome == (example["target"], sorted(example["numbers"])))


def integer(name: str, value: Any, *, lowest: int | None = None) -> int:
    """The whole number that a cell holds.

    >>> integer("target", "46.0"), integer("target", -3)
    (46, -3)

    Raises:
        ValueError: it holds something else, or a number below ``lowest``.
    """
    written = re.fullmatch(r"\s*(-?[0-9]{1,18})(?:\.0*)?\s*", str(value)) if type(value) in (int, float, str) else None
    if not written or (lowest is not None and int(written[1]) < lowest):
        raise ValueError(f"{name}: {value!r} is no whole number{'' if lowest is None else f' of at least {lowest}'}")
    return int(written[1])


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    r"""Value and sorted numbers of an expression; None if it is none.

    >>> evaluate(r"(7 - 3) \times 25 = 100")
    (Fraction(100, 1), [3, 7, 25])
    """
    sides = [side.strip() for side in without_markup(text[: 2 * LONGEST]).split("=")]
    text = sides[1 if len(sides) > 1 and re.fullmatch("[0-9]+", sides[0]) else 0].rstrip(".")
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    try:
        used: list[int] = []
        return _value(ast.parse(text, mode="eval").body, used), sorted(used)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def without_markup(text: str) -> str:
    r"""An expression in plain signs: without marks of code, emphasis, LaTeX or what introduces it.

    >>> without_markup(r"Answer: **\(\frac{3}{7} \times 25\)**.")
    '((3)/(7))*25.'
    """
    text = MARKUP.sub(" ", text)
    for _ in range(3):  # one in another
        text = FRACTION.sub(r"((\1)/(\2))", text)
    text = re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])", "*", re.sub(r"\\div(?![A-Za-z])", "/", BOX.sub("", text)))
    text = re.sub(r"\s*([^\w\s]|_)\s*", r"\1", text.translate(SIGNS))  # 3 * 4 * 5 has nothing emphasised
    text = EMPHASIS.sub(r"\2", text).rpartition(":")[2].lstrip("*_")
    text = re.sub(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", "*", text)
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text).strip()


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, used) + _value(right, used)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, used) - _value(right, used)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, used) * _value(right, used)
        case ast.BinOp(left, ast.Div(), right):
            return _value(left, used) / _value(right, used)
    raise ValueError("not one of the four operations")


def solve(numbers: list[int], target: int) -> str:
    """An expression that uses every number once and hits the target.

    >>> solve([3, 7, 25], 46)
    '(25 + (3 * 7))'

    Raises:
        ValueError: there is none.
    """

    def search(items: list[tuple[Fraction, str]]) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        for i, (a, left) in enumerate(items):
            for j, (b, right) in enumerate(items):
                if i == j:
                    continue
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                results = {"+": a + b, "-": a - b, "*": a * b} | ({"/": a / b} if b else {})
                for sign, value in results.items():
                    found = search([*rest, (value, f"({left} {sign} {right})")])
                    if found:
                        return found
        return None

    solution = search([(Fraction(number), str(number)) for number in numbers])
    if solution is None:
        raise ValueError(f"no expression of {numbers} has the value {target}")
    return solution
