"""Reading an answer out of a reply, and comparing it with the right one; no text makes it raise or take long.

An answer is *marked* by an ``<answer>`` tag, a ``\\boxed{}`` or a GSM8K line (``#### 72``). Of several marks the one
that begins last counts (a box inside a tag begins after the tag), whichever kind it is: models that repeat the format
or change their mind say the final result last. Empty marks are passed over.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest

from dllm_gym.tasks.grading.latex import strip_macros, visible

LIMIT = 20_000  # characters: of a longer text only the end is read (L = 256 tokens are about 1,000)
TOLERANCE = Fraction(1, 10**6)

_BRACES = re.compile(r"\\f?boxed\s*\{|\\f?boxed[ \t]+(?=[^\s{])|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</answer>", re.IGNORECASE)
# a number alone on its line, perhaps with a unit: "#### 2. Second step" is a heading
_HASHES = re.compile(
    r"""\#{4}[ \t]*
        (   (?:[-+$€£\\][ \t]*){0,4}
            (?:[0-9][0-9,]{0,60}(?:\.[0-9]{1,60})?|\.[0-9]{1,60})
            (?:[ \t]{0,9}[%\w\\/]{1,20}){0,2}        # a unit
        )[ \t]{0,9}\.?[ \t]{0,9}$""",
    re.MULTILINE | re.VERBOSE,
)
_NUMBER = re.compile(
    r"""(?<![0-9.])                              # not inside another number
        (?:(?<![0-9A-Za-z)\]}])-)?               # a sign; after an operand it is a subtraction
        (?: (?:[01]?[0-9]|2[0-4])(?::[0-5][0-9]){1,2}(?![0-9:])                # an hour of the clock, 5:30
        | [0-9]{1,9}[ ]{1,3}(?=[0-9]{1,9}/[0-9]{1,9}(?![0-9.])) [0-9]+      # a mixed number, 2 1/2
        | [0-9]{1,3}(?:(?:,[0-9]{3})+|(?:[ ][0-9]{3})+|(?:['’_][0-9]{3})+)(?![0-9]) (?:\.[0-9]+)?  # 12,000 or 12 000
        | [0-9]+(?:\.[0-9]+)? | \.[0-9]+ )
        (?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?
        (?:/[0-9]{1,30}(?![0-9.]))?              # a fraction""",
    re.VERBOSE,
)
_PLAIN = re.compile(r"-?[0-9]{1,64}(?:\.[0-9]{1,64})?")
_PART = r"(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*{_PART}\s*{_PART}")
_AFTER_WHOLE = re.compile(r"(?<=[0-9])\s*(?=\\[dtc]?frac)")
_EXPONENT = r"[ ]?\^[ ]?(?:\{[ ]?([-+]?[0-9]{1,3})[ ]?\}|([-+]?[0-9]{1,3}))"
_POWER_OF_TEN = re.compile(rf"([0-9])[ ]?(?:\\times|\\cdot|[×·*x])[ ]?10{_EXPONENT}")
_UNIT_POWER = re.compile(rf"(?<=[A-Za-z)}}]){_EXPONENT}")  # of m^2
_UNIT_SQUARED = re.compile(r"(?<=[0-9])([ ]?(?:[kcdm]?m|in|ft|yd|mi))[23](?![0-9A-Za-z]|\.[0-9])")  # 72 cm2
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")  # a fraction in one character
_SPACED_SIGN = re.compile(r"(?<==)([ ]{0,9}-)[ ]{1,9}(?=[0-9.])")


def boxes(text: str) -> list[tuple[int, str]]:
    r"""Start and content of every complete ``\boxed{}`` (braces balanced), by where they begin.

    >>> boxes(r"so \boxed{\frac{1}{2}}, no: \boxed{\{3\}} and \boxed{4")
    [(3, '\\frac{1}{2}'), (28, '\\{3\\}')]
    """
    found: list[tuple[int, str]] = []
    open_braces: list[tuple[int, int] | None] = []  # (start, start of the content) of a box, None for another brace
    for match in _BRACES.finditer(text):
        token = match.group()
        if "boxed" in token and token.endswith("{"):
            open_braces.append((match.start(), match.end()))
        elif "boxed" in token:  # without braces: up to the end of the formula
            found.append((match.start(), re.split(r"[$\n]", text[match.end() :], maxsplit=1)[0]))
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            box = open_braces.pop()
            if box:
                found.append((box[0], text[box[1] : match.start()]))
    return sorted(found)


def tags(text: str) -> Iterator[tuple[int, str]]:
    """Start and content of every ``<answer>`` tag; one that is not closed reaches to the next, or to the end."""
    starts = [*_TAG.finditer(text)]
    for match, following in zip_longest(starts, starts[1:]):
        end = following.start() if following else len(text)
        yield match.start(), _TAG_END.split(text[match.end() : end], maxsplit=1)[0]


def marked(text: str, *, hashes: bool = True) -> str | None:
    r"""The content of the mark that begins last among those that are not empty; None without any.

    >>> marked(r"<answer>\boxed{3}</answer>"), marked(r"\boxed{3} <answer>4</answer>"), marked("It is 4.")
    ('3', '4', None)
    """
    text = text[-LIMIT:]
    marks = [*boxes(text), *tags(text)]
    if hashes:
        marks += [(match.start(), match.group(1)) for match in _HASHES.finditer(text)]
    contents = [content for _, content in sorted(marks) if content.strip()]
    return contents[-1].strip() if contents else None


def tagged(text: str) -> str | None:
    """The content of the last ``<answer>`` tag that is not empty; None without any.

    >>> tagged("<answer>1 2</answer> no: <answer>3 4")
    '3 4'
    """
    contents = [content for _, content in tags(text[-LIMIT:]) if content.strip()]
    return contents[-1].strip() if contents else None


def numbers(text: str) -> list[Fraction]:
    r"""The decimal numbers of a text, in order.

    Thousands may be grouped by commas or spaces; currency signs, units and percent signs are passed over (50% reads
    50). Fractions, mixed numbers (2 1/2) and powers of ten (1.5 * 10^3) are read whole, the clock in hours (5:30 reads
    5.5).

    >>> [str(n) for n in numbers(r"$1,234.50, then -5 of 3/4 and 1\frac{1}{2}, 7-2 km^2.")]
    ['2469/2', '-5', '3/4', '3/2', '7', '2']
    """
    text = _VULGAR.sub(_spelled_out, visible(text[-LIMIT:]))
    text = strip_macros(text).replace("{,}", ",").replace("{:}", ":")
    text = re.sub(r"(?<=[A-Za-z])\.(?=[0-9])", ". ", text)  # Rs.15
    text = re.sub(r"[$€£]", "", _FRACTION.sub(r"\1\2/\3\4 ", _AFTER_WHOLE.sub(" ", text)))
    text = _UNIT_POWER.sub("", _POWER_OF_TEN.sub(r"\1e\2\3", text))
    text = _SPACED_SIGN.sub(r"\1", text.replace("*", "|"))  # 5*3 is not 53, 5 * 1/2 not 5 1/2
    text = _UNIT_SQUARED.sub(r"\1", text)
    return [value for value in map(_value, _NUMBER.findall(text)) if value is not None]


def _spelled_out(vulgar: re.Match[str]) -> str:
    return f" {unicodedata.normalize('NFKC', vulgar.group())} ".replace("⁄", "/")


def _value(number: str) -> Fraction | None:
    if len(number) > 64:  # no answer of a person has so many digits, and huge integers are slow
        return None
    try:
        if ":" in number:
            sign = -1 if number.startswith("-") else 1
            parts = enumerate(number.lstrip("-").split(":"))
            return sum((sign * Fraction(int(part), 60**i) for i, part in parts), Fraction(0))
        rest, _, denominator = re.sub("[,'’_]", "", number).partition("/")
        whole, _, numerator = rest.rpartition(" ") if denominator else ("", "", rest.replace(" ", ""))
        part = Fraction(numerator) / Fraction(denominator or 1)
        if not whole.strip() or part >= 1:  # 3 5/2 is no mixed number
            return part
        return Fraction(whole) + (-part if whole.startswith("-") else part)
    except (ValueError, ZeroDivisionError):
        return None


def number_answer(reply: str) -> Fraction | None:
    r"""The number that a reply gives as its answer: the last one of its mark, or without a mark of the whole reply.

    A mark without a number is an answer without a number.

    >>> number_answer(r"We get 5 * 3 = 15, so \boxed{\$1,500} in 2 days."), number_answer("5 * 3 = 15.")
    (Fraction(1500, 1), Fraction(15, 1))
    """
    mark = marked(reply)
    found = numbers(reply if mark is None else f"={mark}")  # "- 72" is negative in a mark, an item of a list elsewhere
    return found[-1] if found else None


def same_number(gold: str, reply: str) -> bool:
    """Whether the answer of a reply equals the number ``gold`` up to 1e-6.

    >>> same_number("72", "<answer>72 clips</answer>"), same_number("72", "72, or 73")
    (True, False)
    """
    right, given = numbers(f"={gold}"), number_answer(reply)
    return bool(right) and given is not None and abs(given - right[-1]) <= TOLERANCE


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{}``, the one mark that LUP's published graders read; None without any.

    >>> last_box(r"\boxed{3}, no: \boxed{4} <answer>5</answer>"), last_box("<answer>5</answer>")
    ('4', None)
    """
    found = boxes(text[-LIMIT:])
    return found[-1][1].strip() if found else None


def same_plain_number(gold: str, reply: str) -> bool:
    r"""Whether the first plain number in the last box equals ``gold``, as LUP's published grader reads GSM8K.

    It knows no thousands: ``\boxed{2,125}`` reads 2.

    >>> same_plain_number("72", r"\boxed{72 clips}"), same_plain_number("2,125", r"\boxed{2,125}")
    (True, False)
    """
    right, given = numbers(f"={gold}"), _PLAIN.search(last_box(reply) or "")
    return bool(right) and given is not None and abs(Fraction(given.group()) - right[-1]) <= TOLERANCE
