"""Whether two LaTeX answers mean the same: by their text where possible, else by math-verify in a worker process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from dllm_gym.tasks.grading.workers import Pool

LONGEST = 1000  # characters: a longer answer equals only itself (the longest right answer of MATH has about 160)

POOL = Pool("latex", seconds=2.0)  # of processor time for one comparison; usual ones take milliseconds

_PLAIN = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-+]?\.[0-9]+")
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~")  # not the line break before a blank
_NOTHING = re.compile(r"(?<!\\)\\(?:!|(?:left|right|displaystyle)(?![A-Za-z]))")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_MIXED = re.compile(r"(?<![0-9.,/^_{])([0-9]{1,9})(?:\s|\\[,;: ]|~)+([0-9]{1,9})/([0-9]{1,9})(?![0-9.])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[ ][0-9]{3})+(?![0-9])")
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}")
_FIGURE = re.compile(r"\\(angle|overline|triangle|widehat)\{?([A-Z]{2,6})\}?")
_REPEATING = re.compile(r"(?<![0-9.,])([0-9]{1,9})\.([0-9]{0,9})\\(?:overline|bar|dot)\s*\{([0-9]{1,9})\}(?![0-9])")
_PERCENT = re.compile(r"(?<=[0-9})])\s*(?:\\?%|\\?percent(?:age)?(?![A-Za-z]))")
_RATIO = re.compile(r"[0-9]{1,15}(?::[0-9]{1,15}){2,9}")  # 1:2:3
_WORD = re.compile(r"[A-Za-z]{3,}")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")  # of a formula
_ROMAN = re.compile(r"\\(?:mathrm|text|textrm|operatorname|rm)\s*\{\s*([ei])\s*\}|\{\s*\\rm\s+([ei])\s*\}")  # 1/e, 3i
_MINUTES = re.compile(r"([0-9]{1,5})\s?\^?\{?\\circ\}?\s?([0-9]{1,2})\s?(?:'|\^?\{?\\prime\}?)(?!\s?[0-9'])")
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
    r"""What is visible, in the signs that math-verify reads: mixed numbers, roman e and i (units to it), 30\degree 15'.

    >>> readable("1 1/2"), readable(r"\mathrm{e}^2"), readable(r"30^\circ 15'")
    ('1\\frac{1}{2}', 'e^2', '(30+\\frac{15}{60})^\\circ')
    """
    latex = _ROMAN.sub(r" \1\2", _DELIMITER.sub(" ", visible(latex))).strip()
    latex = _PERCENT.sub("", _REPEATING.sub(_repeating, latex)).replace("**", "^").replace("\\varnothing", "\\emptyset")
    latex = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi", latex)
    latex = _MINUTES.sub(r"(\1+\\frac{\2}{60})^\\circ", latex)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", latex)


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
    for of_a_kind in (_lists, _ratios, _words, _figures):
        verdict = of_a_kind(left, right)
        if verdict is not None:
            return verdict
    if _BASED.fullmatch(left) and _BASED.fullmatch(right):
        return False  # math-verify does not look at the base
    if "=" not in left and len({_number(side) for side in right.split("=") if _PLAIN.fullmatch(side)}) > 1:
        return False  # 6 = 5: it would take the last side
    return None


def _lists(left: str, right: str) -> bool | None:
    """Lists of numbers: equal in any order, each as often (math-verify makes sets of them: 2, 2 is 2)."""
    a, b = ([_number(part) for part in side.split(",") if _PLAIN.fullmatch(part)] for side in (left, right))
    if len(a) <= left.count(",") or len(b) <= right.count(",") or len(a) == len(b) == 1:
        return None  # something else is among them, or they are no lists
    return sorted(a) == sorted(b)


def _ratios(left: str, right: str) -> bool | None:
    """Ratios of three or more numbers (to math-verify 1:2:3 is 1/6), and times of day such as 6:05."""
    if _TIME.fullmatch(left) and _TIME.fullmatch(right) and ":0" in left + right:
        return left == right
    if not _RATIO.fullmatch(left) and not _RATIO.fullmatch(right):
        return None
    if not _RATIO.fullmatch(left) or not _RATIO.fullmatch(right):
        return False
    a, b = ([int(part) for part in side.split(":")] for side in (left, right))
    return len(a) == len(b) and all(x * sum(b) == y * sum(a) for x, y in zip(a, b, strict=True))


def _words(left: str, right: str) -> bool | None:
    """Words: to math-verify they are products of their letters, and silent is listen."""
    return left.lower() == right.lower() if _WORD.fullmatch(left) or _WORD.fullmatch(right) else None


def _figures(left: str, right: str) -> bool | None:
    """Angles, segments and triangles, named by their points from either end (a triangle from any)."""
    a, b = _FIGURE.fullmatch(left), _FIGURE.fullmatch(right)
    if not a or not b:
        return None
    orders = {a[2], a[2][::-1]}
    return a[1] == b[1] and (b[2] in orders or (a[1] == "triangle" and sorted(a[2]) == sorted(b[2])))


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction: 0.1 and then 3 for ever is (13 - 1) / 90."""
    whole, fixed, again = match.groups()
    numerator = int(whole + fixed + again) - int(whole + fixed)
    return f"\\frac{{{numerator}}}{{{'9' * len(again) + '0' * len(fixed)}}}"


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
