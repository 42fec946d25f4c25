"""What a dLLM is asked: a text or the turns of a conversation, and how its completion begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A conversation that the completion continues; the dLLM puts it into its own template.

    Attributes:
        turns: (role, text) pairs, oldest first; roles are ``"system"``, ``"user"`` and ``"assistant"``, the last turn
            is the user's.
        prefill: how the reply begins; it belongs to the prompt, so a grader has to put it in front of the completion.

    >>> print(Chat((("user", "What is 2 + 2?"),), prefill="It is"))
    What is 2 + 2?
    It is
    """

    turns: tuple[tuple[str, str], ...]
    prefill: str = ""

    def __str__(self) -> str:
        """The conversation as plain text: what a dLLM without a template is shown, and what people see."""
        return "\n".join([text for _, text in self.turns] + [self.prefill])

    @classmethod
    def of(cls, turns: Sequence[Any]) -> Chat:
        """A conversation from (role, text) pairs or mappings with ``role`` and ``content``; a last turn of the
        assistant is how its reply begins.

        Raises:
            ValueError: it has no turn of the user's in its place, or a turn is something else.
        """
        pairs = [_turn(turn) for turn in turns]
        prefill = pairs.pop()[1] if pairs and pairs[-1][0] == "assistant" else ""
        if not pairs or pairs[-1][0] != "user":
            raise ValueError(f"turns={turns!r}: the last one, before the reply's beginning, has to be the user's")
        return cls(tuple(pairs), prefill)


def _turn(turn: Any) -> tuple[str, str]:
    role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else _pair(turn)
    if role not in ROLES or not isinstance(text, str):
        raise ValueError(f"turn={turn!r}: need a role ({', '.join(ROLES)}) and a text")
    return role, text


def _pair(turn: Any) -> tuple[Any, Any]:
    return tuple(turn) if isinstance(turn, Sequence) and len(turn) == 2 and not isinstance(turn, str) else (None, None)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its completion begins with.

    Attributes:
        prompt: a text, or a conversation.
        given: texts and numbers of blanks, as of :meth:`dllm_gym.tasks.Task.template`; None: all is blank.

    >>> Prompt("", given=["3+", 1, "=0", 1, ";"]).given[1]
    1
    """

    prompt: str | Chat
    given: Sequence[str | int] | None = None

    @classmethod
    def of(cls, value: Any) -> Prompt:
        """A prompt from a text, a :class:`Chat`, a list of turns (see :meth:`Chat.of`) or a prompt.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str | Chat):
            return cls(value)
        if isinstance(value, Sequence) and all(isinstance(turn, Sequence | Mapping) and len(turn) for turn in value):
            return cls(Chat.of(value))
        raise ValueError(f"prompt={value!r}: need a text, a list of turns, or dllm_gym.prompt.Prompt")
