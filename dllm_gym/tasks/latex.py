"""Whether two LaTeX answers mean the same: by their text where possible, else by math-verify in a worker process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from dllm_gym.tasks.workers import Pool

LONGEST = 1000  # characters: a longer answer equals only itself (the longest right answer of MATH has about 160)

POOL = Pool("latex", seconds=2.0)  # of processor time for one comparison; usual ones take milliseconds

_PLAIN = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-+]?\.[0-9]+")
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~")  # not the line break before a blank
_NOTHING = re.compile(r"(?<!\\)\\(?:!|(?:left|right|displaystyle)(?![A-Za-z]))")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_MIXED = re.compile(r"(?<![0-9.,/^_{])([0-9]{1,9})(?:\s|\\[,;: ]|~)+([0-9]{1,9})/([0-9]{1,9})(?![0-9.])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[ ][0-9]{3})+(?![0-9])")
_BASED = re.compile(r"-?[0-9][0-9A-Z]*_[0-9]+")  # 4210_5
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")


def strip_macros(latex: str) -> str:
    r"""LaTeX without spacing, text boxes and escapes of signs; ``\dfrac`` and ``\tfrac`` become ``\frac``.

    >>> strip_macros(r"\$2{,}000\,\text{m}"), strip_macros(r"\left( \dfrac{1}{2} \right)")
    ('$2{,}000 m', '( \\frac{1}{2} )')
    """
    latex = _TEXT.sub(r"\1", _SPACING.sub(" ", _NOTHING.sub("", latex)))
    return re.sub(r"\\([$%])", r"\1", re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", latex))


def visible(text: str) -> str:
    """The text without characters that nobody sees; every minus is a hyphen, every unbreakable space a space.

    >>> visible("\u22127\u200b2")
    '-72'
    """
    return re.sub("[\u00a0\u2009\u202f]", " ", _INVISIBLE.sub("", text).replace("\u2212", "-"))


def readable(latex: str) -> str:
    r"""What is visible, with mixed numbers as math-verify reads them.

    >>> readable("1 1/2")
    '1\\frac{1}{2}'
    """
    return _MIXED.sub(r"\1\\frac{\2}{\3}", visible(latex))


def normal(latex: str) -> str:
    r"""A form in which answers that differ in looks only are equal as texts.

    >>> normal(r"$\left(3, \dfrac{\pi}{2}\right)$.") == normal(r"(3,\frac{\pi}{2})")
    True
    """
    latex = strip_macros(readable(latex)).replace("$", "").replace("{,}", ",").strip().rstrip(". ")
    latex = re.sub(r"(?<![0-9.]) | (?![0-9.])", "", re.sub(r"\s+", " ", latex))  # one between digits stays: "1 3"
    latex = _THOUSANDS.sub(lambda match: match.group().replace(" ", ""), latex)
    return re.sub(r"_\{([0-9]+)\}", r"_\1", latex).replace("^{\\circ}", "^\\circ")


def decide(gold: str, answer: str) -> bool | None:
    """Whether the answers are equal, if their texts tell; None if it takes mathematics."""
    if len(gold) > LONGEST or len(answer) > LONGEST:
        return gold.strip() == answer.strip() != ""
    left, right = normal(gold), normal(answer)
    if not left or not right or left == right:
        return left == right != ""
    if _PLAIN.fullmatch(left) and _PLAIN.fullmatch(right):
        return _number(left) == _number(right)
    if _BASED.fullmatch(left) and _BASED.fullmatch(right):
        return False  # math-verify does not look at the base
    if "=" not in left and len({_number(side) for side in right.split("=") if _PLAIN.fullmatch(side)}) > 1:
        return False  # 6 = 5: it would take the last side
    return None


def _number(plain: str) -> Fraction:
    return Fraction(plain.replace(",", ""))


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether two answers mean the same; False where it cannot be found out in time. Any thread may call it.

    >>> equivalent(r"\frac{1}{2}", "0.5"), equivalent("2,000", "2000"), equivalent("(1,2)", "(2,1)")
    (True, True, False)
    """
    return equivalent_all([(gold, answer)])[0]


def equivalent_all(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """The verdicts on several (right answer, answer) pairs, in order; those that take mathematics side by side.

    Raises:
        RuntimeError: no worker starts (math-verify is not installed).
    """
    verdicts = [decide(gold, answer) for gold, answer in pairs]
    open_pairs = list(dict.fromkeys(pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None))
    asked = [(readable(gold), readable(answer)) for gold, answer in open_pairs]
    found = dict(zip(open_pairs, POOL.ask_all(asked), strict=True))
    return [
        bool(found.get(pair) if verdict is None else verdict) for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
