"""Which tokens of a dLLM are the mask, the end and the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What tokenizers call the mask and the end of a turn where no config field names them.
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "[MASK]")
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
    def of(cls, config: Mapping[str, Any], tokenizer: Any) -> SpecialIds:
        """From the raw ``config.json`` or, where it has no such field, from the tokenizer."""
        vocabulary = tokenizer.get_vocab()

        def named(*tokens: str) -> list[int]:
            return [vocabulary[token] for token in tokens if token in vocabulary]

        def listed(field: Any) -> list[int]:
            return [] if field is None else [int(i) for i in (field if isinstance(field, list) else [field])]

        masks = [*listed(config.get("mask_token_id")), *listed(tokenizer.mask_token_id), *named(*MASK_TOKENS)]
        if not masks:
            raise ValueError(
                "no mask token: config.json has no mask_token_id and the tokenizer no mask token; if one is in the "
                "vocabulary, name it with mask_token='...', otherwise this is no masked-diffusion model"
            )
        ends = [*listed(config.get("eos_token_id")), *listed(tokenizer.eos_token_id), *named(*END_TOKENS)]
        ends = ends or listed(tokenizer.sep_token_id)  # BERT has no EOS
        if not ends:
            raise ValueError("no EOS token: config.json has no eos_token_id and the tokenizer no EOS token")
        pads = [*listed(config.get("pad_token_id")), *listed(tokenizer.pad_token_id), ends[0]]
        # Pads that also end text were targets in training: without them the end of an answer could not be proposed.
        forbidden = {masks[0], pads[0]} - (set(ends) - {masks[0]})
        return cls(masks[0], ends[0], pads[0], frozenset(ends), tuple(sorted(forbidden)))
