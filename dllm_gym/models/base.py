"""The interface of a frozen masked-diffusion language model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_gym.models.ids import SpecialIds
from dllm_gym.models.spelling import Spelling, in_template
from dllm_gym.models.vocabulary import Prediction, Sampling, Vocabulary
from dllm_gym.noise import fold
from dllm_gym.prompt import Chat


class DLLM:
    """A frozen dLLM: predicts the masked positions it is asked for, and nothing else is computed over the vocabulary.

    Family quirks (position ids, logit shift, ids, prompt template) end here; code downstream sees one alignment.

    A dLLM of your own is a ``backbone``, an ``lm_head``, a tokenizer and its ``config``; where its forward differs, a
    subclass overrides :meth:`hidden_states`, the one method that all predictions come from, in environments and in
    :meth:`predict`. (``predict`` itself is for use from outside: the environment reads positions its own way and
    refuses a class that overrides it.)

    Args:
        backbone: maps ``input_ids`` [B, T], ``attention_mask`` and ``position_ids`` to ``last_hidden_state`` [B, T, d].
        lm_head: maps hidden states [n, d] to logits [n, V].
        tokenizer: a Hugging Face tokenizer.
        config: the raw ``config.json``. Special ids that it lacks are the tokenizer's.

    Attributes:
        mask_id, eos_id, pad_id: special token ids.
        stop_ids: the tokens that end a completion: EOS and the end of a turn.
        forbidden_ids: the tokens that are never proposed: the mask, a pad token that does not also end text, and ids
            that the tokenizer has no token for.
        vocab_size: V. max_positions: the longest prompt + completion. hidden_size: d.
        vocabulary: the head, as proposals and confidences are read from it.
        compiled: the backbone is compiled for shapes that come again (see :meth:`compile`).
        template_options: what else the family's chat template is given.

    Raises:
        ValueError: neither the config nor the tokenizer names a mask, or an EOS token; a special id is not in the
            vocabulary; the mask is an EOS token too.
    """

    template_options: Mapping[str, Any] = {}

    def __init__(self, backbone: nn.Module, lm_head: nn.Module, tokenizer: Any, config: dict[str, Any]):
        self.backbone = backbone.eval().requires_grad_(False)
        self.lm_head = lm_head.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        sizes: Any = backbone.config
        self.vocab_size = int(sizes.vocab_size)
        ids = SpecialIds.of(config, tokenizer, self.vocab_size)
        self.mask_id, self.eos_id, self.pad_id = ids.mask, ids.eos, ids.pad
        self.stop_ids, self.forbidden_ids = ids.stop, ids.forbidden
        self.spelling = Spelling(tokenizer, {ids.mask, ids.pad, *ids.stop})
        self.vocabulary = Vocabulary(self.lm_head, self.vocab_size, self.forbidden_ids)
        self.compiled = False
        self.hidden_size = int(sizes.hidden_size)
        self.max_positions = int(sizes.max_position_embeddings)

    def __deepcopy__(self, memo: dict) -> DLLM:
        # Gymnasium copies an environment's keyword arguments whenever its spec is read; frozen weights are shared.
        return self

    @property
    def device(self) -> torch.device:
        """Where tokens go in; a backbone that is spread over several devices has its embedding there."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm_head.parameters()).dtype

    def encode(self, prompt: str | Chat) -> list[int]:
        """Token ids of a prompt; in the chat template, when the tokenizer has one, a text is the user's only turn.

        A text that spells a special token (``<|endoftext|>``) is encoded as the text that it is.

        Raises:
            ValueError: the template refuses a role, or leaves a turn out; the vocabulary lacks a character; a text
                cannot be encoded without becoming the mask, the padding or an end.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return self.spelling.plain(str(prompt))
        chat = Chat((("user", prompt),)) if isinstance(prompt, str) else prompt
        return self.spelling.chat(chat, partial(in_template, self.tokenizer, self.template_options))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion up to its first stop token; positions still masked contribute nothing."""
        kept = itertools.takewhile(lambda token: token not in self.stop_ids, tokens)
        return self.tokenizer.decode([token for token in kept if token != self.mask_id], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """The text of one token, for display."""
        return self.tokenizer.decode([token])

    @torch.no_grad()
    def predict(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor,
        sampling: Sampling = Sampling(),
        key: Tensor | None = None,
    ) -> Prediction:
        """Predict selected positions.

        Args:
            tokens: int64 [B, T], left-padded.
            attention_mask: bool [B, T], False on padding; None when nothing is padded.
            rows: bool [B, T], the positions to predict, n in all (row-major order in the result).
            sampling: how many probabilities, which temperature, what else to return.
            key: int64 [B], random streams of the rows; needed with a temperature.

        Returns:
            The n predictions; no forbidden token is among them.
        """
        hidden = self.encode_rows(tokens, attention_mask)[rows]  # (n, d)
        if key is None:
            return self.vocabulary.read(hidden, sampling)
        row, column = rows.nonzero(as_tuple=True)
        from_end = rows.shape[1] - column  # counted from the right: independent of left padding
        return self.vocabulary.read(hidden, sampling, fold(key[row], from_end))

    @torch.no_grad()
    def encode_rows(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """:meth:`hidden_states` without gradients and where the tokens are."""
        return self._hidden(tokens, attention_mask).to(tokens.device)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What ``lm_head`` reads; a family's shift, positions and masks go in here. To override.

        Args:
            tokens: int64 [B, T], left-padded.
            attention_mask: bool [B, T], False on padding; None when nothing is padded.

        Returns:
            Last hidden states [B, T, d]; those at j predict token j. A row's do not depend on the other rows, nor on
            its padding.
        """
        positions = None if attention_mask is None else positions_of(attention_mask)
        attention = getattr(self.backbone.config, "_attn_implementation", None) or ""
        if attention_mask is not None and attention.startswith("sdpa"):
            attention_mask = attention_mask[:, None, None]  # as it is used: nothing looks whether it is all True
        return self.backbone(
            input_ids=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _hidden(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The name of before: a class that overrides it goes on to work."""
        return self.hidden_states(tokens, attention_mask)

    def compile(self) -> None:
        """Let torch.compile build the backbone for shapes that come again, with CUDA graphs on a GPU.

        The first forwards take tens of seconds; ``compiled`` tells whoever calls to round shapes up.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.backbone.compile(mode=mode, dynamic=True)
        self.compiled = True


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] counted from each row's first token; 0 on the padding before it."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def last_block(backbone: nn.Module) -> nn.Module:
    """The last of the blocks that a backbone is made of.

    Raises:
        ValueError: it has no ``layers``.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"block_input=True: a {type(backbone).__name__} has no list of layers, whose last one is read")
    return layers[-1]


@contextmanager
def reading_last_block(dllm: DLLM) -> Iterator[list[Tensor]]:
    """Within it every forward adds what the backbone's last block reads, [B, T, d], to the list."""
    read: list[Tensor] = []

    def keep(_: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        read.append(given[0] if given else named["hidden_states"])

    hook = last_block(dllm.backbone).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def own_block(dllm: DLLM) -> dict[str, float]:
    """What a dLLM's blocks are built of, for a policy with blocks of the same kind.

    Raises:
        ValueError: they are not Llama's (RMS norms, rotary positions, SwiGLU, no biases).
    """
    config: Any = dllm.backbone.config
    kind = getattr(config, "model_type", None)
    if kind != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"own_block: the blocks of this model ({kind}) are not LLaDA's, which a policy could copy")
    return {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "ffn": config.intermediate_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "norm_eps": config.rms_norm_eps,
    }
