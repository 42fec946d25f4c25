"""Which tokens of a dLLM are the mask, the end and the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What tokenizers call the mask and the end of a turn where no config field names them.
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "|<MASK>|", "<[MASK]>", "<|MASK|>")
END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|role_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens with a meaning of their own, for :class:`~dllm_gym.models.DLLM`."""

    mask: int
    eos: int
    pad: int
    stop: frozenset[int]
    forbidden: tuple[int, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> SpecialIds:
        """From the raw ``config.json`` or, where it has no such field, from the tokenizer.

        Raises:
            ValueError: there is no mask or no EOS token; an id is none of the vocabulary's; the mask ends text.
        """
        vocabulary = tokenizer.get_vocab()

        def named(*tokens: str) -> list[int]:
            return [vocabulary[token] for token in tokens if token in vocabulary]

        def listed(name: str) -> list[int]:
            own = getattr(tokenizer, name)
            field = config.get(name)
            ids = [] if field is None else field if isinstance(field, list) and name == "eos_token_id" else [field]
            return [*ids, *([] if own is None else [own])]

        masks = [*listed("mask_token_id"), *named(*MASK_TOKENS)]
        if not masks:
            raise ValueError(
                "no mask token: config.json has no mask_token_id and the tokenizer no mask token; if one is in the "
                "vocabulary, name it with mask_token='...', otherwise this is no masked-diffusion model"
            )
        ends = [*listed("eos_token_id"), *named(*END_TOKENS)] or listed("sep_token_id")  # BERT has no EOS
        if not ends:
            raise ValueError("no EOS token: config.json has no eos_token_id and the tokenizer no EOS token")
        pads = [*listed("pad_token_id"), ends[0]]
        for name, ids in (("mask_token_id", masks[:1]), ("eos_token_id", ends), ("pad_token_id", pads[:1])):
            for i in ids:
                if type(i) is not int or not 0 <= i < vocab_size:
                    raise ValueError(f"{name}={i!r} is not valid: the vocabulary has the ids 0 to {vocab_size - 1}")
        if masks[0] in ends:
            raise ValueError(f"mask_token_id={masks[0]} is not valid: that token ends text")
        # Embeddings are rounded up: ids beyond the tokenizer's, and gaps between them, stand for no text.
        nameless = set(range(vocab_size)) - set(vocabulary.values())
        # Pads that also end text were targets in training: without them the end of an answer could not be proposed.
        forbidden = ({masks[0], pads[0]} | nameless) - (set(ends) - {masks[0]})
        return cls(masks[0], ends[0], pads[0], frozenset(ends), tuple(sorted(forbidden)))
