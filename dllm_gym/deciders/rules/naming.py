"""From the name of a rule to the rule."""

from __future__ import annotations

import ast
from typing import Any

from dllm_gym.deciders.rules.base import Rule


def known_rules(base: type[Rule] = Rule) -> dict[str, type[Rule]]:
    """Every rule that has been defined, one's own among them, by its label."""
    found = {base.label: base} if base.label else {}
    for rule in base.__subclasses__():
        found |= known_rules(rule)
    return found


def make_rule(name: str) -> Rule:
    """The rule that is called so, as tables call it: ``str(make_rule(name)) == name``.

    >>> from dllm_gym.deciders.rules import Threshold
    >>> print(make_rule("blockwise(threshold(0.9), 32)"))
    blockwise(threshold(0.9), 32)

    Args:
        name: label and arguments, by place or by name (``klass(0.6, kl=0.1)``); a label alone has the defaults.

    Raises:
        ValueError: there is no such rule, or it does not take these arguments.
    """
    try:
        return _rule(ast.parse(name.strip(), mode="eval").body, known_rules())
    except (SyntaxError, TypeError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{name!r} names no rule: {error}") from None


def _rule(node: ast.expr, known: dict[str, type[Rule]]) -> Rule:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    label = call.func.id if isinstance(call.func, ast.Name) else ""
    if label not in known:
        raise ValueError(f"choose one of {', '.join(known)}, with its arguments, such as threshold(0.9)")
    named = {keyword.arg: _argument(keyword.value, known) for keyword in call.keywords if keyword.arg}
    if len(named) < len(call.keywords):
        raise ValueError("write every argument out")
    return known[label].of(*(_argument(argument, known) for argument in call.args), **named)


def _argument(node: ast.expr, known: dict[str, type[Rule]]) -> Any:
    return _rule(node, known) if isinstance(node, ast.Call | ast.Name) else ast.literal_eval(node)
