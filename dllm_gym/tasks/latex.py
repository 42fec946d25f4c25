"""Whether two LaTeX answers mean the same: by their text where possible, else by math-verify in a worker process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from dllm_gym.tasks.workers import Pool

LONGEST = 1000  # characters: a longer answer equals only itself (the longest right answer of MATH has about 160)

POOL = Pool("latex", seconds=2.0)  # of processor time for one comparison; usual ones take milliseconds

_PLAIN = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-+]?\.[0-9]+")
_SPACING = re.compile(r"\\(?:[,!;: ]|q?quad(?![A-Za-z])|left(?![A-Za-z])|right(?![A-Za-z])|displaystyle(?![A-Za-z]))")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")


def strip_macros(latex: str) -> str:
    r"""LaTeX without spacing, text boxes and escapes of signs; ``\dfrac`` and ``\tfrac`` become ``\frac``.

    >>> strip_macros(r"\$2{,}000\,\text{ m}"), strip_macros(r"\left( \dfrac{1}{2} \right)")
    ('$2{,}000 m', '( \\frac{1}{2} )')
    """
    latex = _TEXT.sub(r"\1", _SPACING.sub("", latex))
    return re.sub(r"\\([$%])", r"\1", re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", latex))


def normal(latex: str) -> str:
    r"""A form in which answers that differ in looks only are equal as texts.

    >>> normal(r"$\left(3, \dfrac{\pi}{2}\right)$.") == normal(r"(3,\frac{\pi}{2})")
    True
    """
    latex = strip_macros(latex).replace("$", "").replace("{,}", ",").replace("\u2212", "-")
    return re.sub(r"\s+", "", latex).rstrip(".").replace("^{\\circ}", "^\\circ")


def decide(gold: str, answer: str) -> bool | None:
    """Whether the answers are equal, if their texts tell; None if it takes mathematics."""
    if len(gold) > LONGEST or len(answer) > LONGEST:
        return gold.strip() == answer.strip() != ""
    left, right = normal(gold), normal(answer)
    if not left or not right or left == right:
        return left == right != ""
    if _PLAIN.fullmatch(left) and _PLAIN.fullmatch(right):
        return Fraction(left.replace(",", "")) == Fraction(right.replace(",", ""))
    return None


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
    found = dict(zip(open_pairs, POOL.ask_all(open_pairs), strict=True))
    return [
        bool(found.get(pair) if verdict is None else verdict) for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
