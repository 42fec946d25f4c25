"""Prompts whose text spells a token with a meaning of its own (a mask, an end, a mark of the template)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Any

from dllm_gym.prompt import Chat

Turns = Sequence[tuple[str, str]]

PRIVATE = 0xE000  # the first of 6,400 characters without a meaning


class Spelling:
    """Token ids of prompts in which control tokens are those of the template, never those that a text spells.

    Args:
        tokenizer: a Hugging Face tokenizer.
        control: ids that no text may become: the mask, the padding and those that end a completion.
    """

    def __init__(self, tokenizer: Any, control: Collection[int]):
        self.tokenizer, self.control = tokenizer, frozenset(control)
        added = tokenizer.added_tokens_decoder.items()
        self.ids: dict[str, int] = {t.content: i for i, t in added if t.content and (t.special or i in self.control)}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.exact = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.unknown = unknown_id(tokenizer)
        self.any_case = re.compile(self.exact.pattern, re.IGNORECASE)  # a normaliser may change it

    def plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing has a meaning of its own.

        Raises:
            ValueError: the vocabulary lacks a character, or the text cannot be written without a control token.
        """
        ids = self._encode(text, split_special_tokens=True)
        if self.control.intersection(ids):  # a control token that the tokenizer does not call special
            ids = [i for piece in self._cut(text) for i in self._encode(piece, split_special_tokens=True)]
        for token in self.control.intersection(ids):
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise ValueError(
                f"this dLLM's tokenizer reads {name!r} in {text[:40]!r}..., and has no other tokens for it"
            )
        return ids

    def chat(self, chat: Chat, template: Callable[[Turns], str]) -> list[int]:
        """Token ids of a conversation; ``template`` writes turns out, control tokens included.

        Raises:
            ValueError: as of :meth:`plain`, or of the template.
        """
        texts = [*(text for _, text in chat.turns), chat.prefill]
        spelled = dict.fromkeys(match for text in texts for match in self.any_case.findall(text))
        if not spelled:
            return self._encode(template(chat.turns) + chat.prefill)
        # What is spelled is hidden behind characters that nobody uses, so that the template's own tokens are known.
        unused = (chr(code) for code in count(PRIVATE) if not any(chr(code) in text for text in texts))
        hidden = dict(zip(spelled, unused, strict=False))
        back = {ord(character): text for text, character in hidden.items()}

        def hide(text: str) -> str:
            return self.any_case.sub(lambda match: hidden[match.group()], text)

        written = template([(role, hide(text)) for role, text in chat.turns]) + hide(chat.prefill)
        ids: list[int] = []
        for piece in self.exact.split(written):
            ids += [self.ids[piece]] if piece in self.ids else self.plain(piece.translate(back))
        return ids

    def _cut(self, text: str) -> list[str]:
        """The text, cut within everything that spells a token."""
        cuts = [0, *(match.start() + 1 for match in self.any_case.finditer(text)), len(text)]
        return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]

    def _encode(self, text: str, **how: Any) -> list[int]:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False, **how)  # a template writes its own
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"this dLLM's tokenizer has no tokens for the prompt {text[:40]!r}...: {error}") from None
        if self.unknown is not None and (count := ids.count(self.unknown)):
            self._refuse_unknown(text, count)
        return ids

    def _refuse_unknown(self, text: str, count: int) -> None:
        """ValueError if a part of the text has become the token for what is not in the vocabulary, ``count`` times."""
        name = self.tokenizer.convert_ids_to_tokens(self.unknown)
        if count > len(re.findall(re.escape(name), text, re.IGNORECASE)):
            lost = [c for c in dict.fromkeys(text) if self._is_unknown(c)] or "parts"
            raise ValueError(
                f"this dLLM's tokenizer has no tokens for {''.join(lost)[:20]!r} in the prompt {text[:40]!r}...: they "
                f"would become {name!r}"
            )

    def _is_unknown(self, text: str) -> bool:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == [self.unknown]


def unknown_id(tokenizer: Any) -> int | None:
    """The token for what the vocabulary lacks, as the tokenizer or the model inside it names it; None without one."""
    named = getattr(tokenizer, "unk_token_id", None)
    if named is not None:
        return named
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None)
    return tokenizer.get_vocab().get(name) if name else None


def in_template(tokenizer: Any, options: Mapping[str, Any], turns: Turns) -> str:
    """Turns as the tokenizer's chat template writes them; ``options`` are what else it is given.

    Raises:
        ValueError: it refuses a role, or leaves a turn out.
    """
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"this dLLM's chat template refuses turns of the roles {roles}: {error}") from None
    for role, content in turns:
        if content.strip() not in text:
            raise ValueError(f"this dLLM's chat template leaves out turns of the role {role!r}")
    return text
