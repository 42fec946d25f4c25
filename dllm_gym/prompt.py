"""A prompt for a chat model: turns of a conversation and the beginning of the reply."""

from __future__ import annotations

from dataclasses import dataclass


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
