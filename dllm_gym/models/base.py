"""The interface of a frozen masked-diffusion language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_gym.noise import fold, uniform


@dataclass(frozen=True)
class Prediction:
    """What a dLLM says about n masked positions.

    Attributes:
        token: int64 [n], the proposed tokens.
        confidence: float32 [n, K], the K largest probabilities, descending.
        hidden: [n, d] last hidden states in the model's dtype, or None when they were not asked for.
    """

    token: Tensor
    confidence: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How proposals are drawn from a dLLM's logits.

    Attributes:
        top_k: K, how many probabilities to return.
        temperature: 0 proposes the most likely token; otherwise argmax(logits / temperature + Gumbel noise). The
            confidences are those of the untempered distribution in both cases.
        hidden: also return hidden states.
    """

    top_k: int = 1
    temperature: float = 0.0
    hidden: bool = False


class DLLM:
    """A frozen dLLM: predicts the masked positions it is asked for, and nothing else is computed over the vocabulary.

    Family quirks (position ids, logit shift, ids, prompt template) end here; code downstream sees one alignment.

    Args:
        backbone: maps ``input_ids`` [B, T], ``attention_mask`` and ``position_ids`` to ``last_hidden_state`` [B, T, d].
        lm_head: maps hidden states [n, d] to logits [n, V].
        tokenizer: a Hugging Face tokenizer.
        config: the raw ``config.json``.

    Attributes:
        mask_id, eos_id, pad_id: special token ids.
        vocab_size: V. max_positions: the longest prompt + completion. hidden_size: d.
    """

    def __init__(self, backbone: nn.Module, lm_head: nn.Module, tokenizer: Any, config: dict[str, Any]):
        self.backbone = backbone.eval().requires_grad_(False)
        self.lm_head = lm_head.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self.mask_id = int(config["mask_token_id"])
        self.eos_id = int(config["eos_token_id"])
        self.pad_id = int(config["pad_token_id"])
        sizes: Any = backbone.config
        self.vocab_size = int(sizes.vocab_size)
        self.hidden_size = int(sizes.hidden_size)
        self.max_positions = int(sizes.max_position_embeddings)

    def __deepcopy__(self, memo: dict) -> DLLM:
        # Gymnasium copies an environment's keyword arguments whenever its spec is read; frozen weights are shared.
        return self

    @property
    def device(self) -> torch.device:
        return next(self.lm_head.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm_head.parameters()).dtype

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, in the chat template when the tokenizer has one."""
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion up to its first EOS; positions still masked contribute nothing."""
        tokens = list(tokens)
        if self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id)]
        return self.tokenizer.decode([t for t in tokens if t != self.mask_id], skip_special_tokens=True)

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
            sampling: how many probabilities, which temperature, hidden states or not.
            key: int64 [B], random streams of the rows; needed with a temperature.

        Returns:
            The n predictions. The mask token (and a pad token that is not also EOS) is never proposed.
        """
        positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
        out = self.backbone(input_ids=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        hidden = self._align(out.last_hidden_state)[rows]  # (n, d)
        logits = self.lm_head(hidden).float()  # (n, V)
        logits[:, self.mask_id] = -torch.inf
        if self.pad_id != self.eos_id:
            logits[:, self.pad_id] = -torch.inf
        top, order = logits.topk(sampling.top_k, dim=-1)
        confidence = (top - logits.logsumexp(-1, keepdim=True)).exp()  # (n, K)
        token = order[:, 0] if sampling.temperature == 0 else self._sample(logits, rows, sampling.temperature, key)
        return Prediction(token, confidence, hidden if sampling.hidden else None)

    def _align(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, d] such that row j predicts token j; families with a logit shift override this."""
        return hidden

    def _sample(self, logits: Tensor, rows: Tensor, temperature: float, key: Tensor | None) -> Tensor:
        """argmax(logits / temperature + Gumbel) [n], with noise that depends on a row's key and the position only."""
        if key is None:
            raise ValueError(f"temperature={temperature} draws tokens at random: pass key, one int64 stream per row")
        row, column = rows.nonzero(as_tuple=True)
        from_end = rows.shape[1] - column  # counted from the right: independent of left padding
        u = uniform(fold(key[row], from_end), 0, logits.shape[-1])  # (n, V)
        return (logits / temperature - (-u.log()).log()).argmax(-1)
