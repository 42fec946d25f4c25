"""Values that claim to equal everything: how the second check of :mod:`dllm_gym.tasks.sandbox` finds them.

The text of this file goes into that check and runs beside the program, so it imports next to nothing.
"""

from __future__ import annotations

import operator
import sys

TYPE_CHECKING = False  # typing takes longer to import than most programs run
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

FIXED: tuple[Any, ...] = (
    *(False, True, -1, 0, 1, 2, 3, 5, 10, 100, -(10**30), 10**30, -1.5, 0.5, 2.5, 1e300),
    *("", "a", "stranger", b"", b"a", b"stranger", [], [0], ["a"], (), (0,), ("a",)),
    *({}, {0: 0}, {"a": "a"}, {0}, {"a"}, {0, "a"}, type, len, print),
)
PLAIN = (int, float, complex, bool, str, bytes, type(None))
HOLDERS: tuple[Any, ...] = (list, tuple, set, frozenset, dict)
FAR = 10**4000
MOST = 1000  # values that are looked at, in one operand


class Watch:
    """Lets values through and remembers whether one of them was a liar, or a trace function looked on.

    Args:
        expected: values that the check mentions; they and their neighbours are what a liar is asked about, besides some
            that have nothing to do with it.
    """

    def __init__(self, expected: Sequence[Any] = ()):
        self.caught = self.busy = False
        self.traced = sys.gettrace
        self.strangers: dict[type, list[Any]] = {}
        for value in (*FIXED, *expected):
            for other in (value, beside(value)):
                group = self.strangers.setdefault(type(other), [])
                if other not in group:
                    group.append(other)

    def __call__(self, value: Any) -> Any:
        if self.traced() is not None:
            self.caught = True  # it could jump over the assert
        if type(value) in PLAIN or self.busy:
            return value
        self.busy = True  # the comparisons of a class of the check are watched as well
        try:
            self.caught = self.caught or any(lies(leaf, self.strangers) for leaf in leaves(value))
        finally:
            self.busy = False
        return value

    def verdict(self) -> None:
        """Passes liars only."""
        if not self.caught:
            raise AssertionError("nobody passes this check")


def beside(value: Any) -> Any:
    """Another value of the same type.

    >>> beside(2), beside([]), beside("a"), beside(None)
    (3, [None], 'ax', None)
    """
    match value:
        case bool() | None:
            return value
        case int() | float() | complex():
            return value + 1
        case str():
            return value + "x"
        case bytes():
            return value + b"x"
        case list():
            return [*value, None]
        case tuple():
            return (*value, None)
        case dict():
            return {**value, "x": None}
        case set():
            return {*value, "x"}
    return value


def leaves(value: Any) -> Iterator[Any]:
    """``value`` and what its containers hold, but nothing whose comparisons are Python's own."""
    stack = [value]
    for _ in range(MOST):
        if not stack:
            return
        value = stack.pop()
        for kind in HOLDERS:
            if isinstance(value, kind):
                stack += list(kind.__iter__(value))[:MOST]
        if isinstance(value, dict):
            stack += list(dict.values(value))[:MOST]
        if type(value) not in (*PLAIN, *HOLDERS):
            yield value


def lies(value: Any, strangers: dict[type, list[Any]]) -> bool:
    """Whether comparisons of ``value`` contradict each other.

    Three different values of one type that it equals (or both truth values), a number that it is on both sides of, one
    beyond all numbers, or a container of things that nobody has put there.

    >>> class Yes:
    ...     def __eq__(self, other): return isinstance(other, int)
    >>> lies(Yes(), Watch().strangers), lies(range(3), Watch().strangers)
    (True, False)
    """
    for kind, group in strangers.items():
        if sum(holds(operator.eq, value, other) for other in group) >= (2 if kind is bool else 3):
            return True
    if any(holds(operator.lt, value, number) and holds(operator.gt, value, number) for number in (0, 1.5, FAR)):
        return True
    beyond = holds(operator.lt, value, -FAR) or holds(operator.gt, value, FAR)
    if beyond and not any(holds(operator.eq, value, infinity) for infinity in (float("inf"), -float("inf"))):
        return True
    return all(holds(operator.contains, value, other) for other in (type, FAR, "stranger", ("a",)))


def holds(relation: Callable[[Any, Any], Any], value: Any, other: Any) -> bool:
    """Whether a comparison comes out true; one that raises does not."""
    try:
        return bool(relation(value, other))
    except BaseException:  # the value's own code runs
        return False
