"""The interface of a frozen masked-diffusion language model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_gym.models.ids import SpecialIds
from dllm_gym.noise import fold, uniform
from dllm_gym.prompt import Chat


@dataclass(frozen=True)
class Prediction:
    """What a dLLM says about n masked positions.

    Attributes:
        token: int64 [n], the proposed tokens.
        confidence: float32 [n, K], the K largest probabilities, descending.
        hidden: [n, d] last hidden states in the model's dtype.
        entropy: float32 [n], Shannon entropy of the distribution in nats.
        margin: float32 [n], the largest probability minus the second largest.
        log_prob: float32 [n, V], the whole distribution; -inf for a token that is never proposed.

    What was not asked for (see :class:`Sampling`) is None.
    """

    token: Tensor
    confidence: Tensor
    hidden: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    log_prob: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How proposals are drawn from a dLLM's logits.

    Attributes:
        top_k: K, how many probabilities to return.
        temperature: 0 proposes the most likely token; otherwise argmax(logits / temperature + Gumbel noise). The
            confidences are those of the untempered distribution in both cases.
        hidden, entropy, margin, log_prob: what else to return. Like the confidences, they describe the untempered
            distribution.
    """

    top_k: int = 1
    temperature: float = 0.0
    hidden: bool = False
    entropy: bool = False
    margin: bool = False
    log_prob: bool = False


class DLLM:
    """A frozen dLLM: predicts the masked positions it is asked for, and nothing else is computed over the vocabulary.

    Family quirks (position ids, logit shift, ids, prompt template) end here; code downstream sees one alignment.

    Args:
        backbone: maps ``input_ids`` [B, T], ``attention_mask`` and ``position_ids`` to ``last_hidden_state`` [B, T, d].
        lm_head: maps hidden states [n, d] to logits [n, V].
        tokenizer: a Hugging Face tokenizer.
        config: the raw ``config.json``. Special ids that it lacks are the tokenizer's.

    Attributes:
        mask_id, eos_id, pad_id: special token ids.
        stop_ids: the tokens that end a completion: EOS and the end of a turn.
        forbidden_ids: the tokens that are never proposed: the mask, and a pad token that does not also end text.
        vocab_size: V. max_positions: the longest prompt + completion. hidden_size: d.
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

        Raises:
            ValueError: the template refuses a role, or leaves a turn out; the vocabulary lacks a character.
        """
        text = str(prompt)
        if getattr(self.tokenizer, "chat_template", None):
            chat = Chat((("user", prompt),)) if isinstance(prompt, str) else prompt
            text = self._in_template(chat.turns) + chat.prefill
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)  # a template writes its own
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"this dLLM's tokenizer has no tokens for the prompt {text[:40]!r}...: {error}") from None

    def _in_template(self, turns: Iterable[tuple[str, str]]) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.template_options
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"this dLLM's chat template refuses turns of the roles {roles}: {error}") from None
        for message in messages:
            if message["content"].strip() not in text:
                raise ValueError(f"this dLLM's chat template leaves out turns of the role {message['role']!r}")
        return text

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
        hidden = self._hidden(tokens, attention_mask).to(tokens.device)[rows]  # (n, d)
        logits = self.lm_head(hidden).float().to(tokens.device)  # (n, V)
        for token_id in self.forbidden_ids:
            logits[:, token_id] = -torch.inf
        # argmax takes the lowest of equal logits; topk's choice among them may depend on how many are asked for
        greedy = sampling.temperature == 0
        token = logits.argmax(-1) if greedy else self._sample(logits, rows, sampling.temperature, key)
        largest = logits.topk(max(sampling.top_k, 2 if sampling.margin else 1), dim=-1).values
        probability = (largest - logits.logsumexp(-1, keepdim=True)).exp()  # (n, K), or (n, 2) for the margin
        return Prediction(
            token,
            probability[:, : sampling.top_k],
            hidden=hidden if sampling.hidden else None,
            entropy=entropy(logits) if sampling.entropy else None,
            margin=probability[:, 0] - probability[:, 1] if sampling.margin else None,
            log_prob=logits.log_softmax(-1) if sampling.log_prob else None,
        )

    def _hidden(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states [B, T, d], those at j predict token j; a family's shift, positions and masks go in here."""
        positions = None if attention_mask is None else positions_of(attention_mask)
        return self.backbone(
            input_ids=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _sample(self, logits: Tensor, rows: Tensor, temperature: float, key: Tensor | None) -> Tensor:
        """argmax(logits / temperature + Gumbel) [n], with noise that depends on a row's key and the position only."""
        if key is None:
            raise ValueError(f"temperature={temperature} draws tokens at random: pass key, one int64 stream per row")
        row, column = rows.nonzero(as_tuple=True)
        from_end = rows.shape[1] - column  # counted from the right: independent of left padding
        u = uniform(fold(key[row], from_end), 0, logits.shape[-1])  # (n, V)
        return (logits / temperature - (-u.log()).log()).argmax(-1)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] counted from each row's first token; 0 on the padding before it."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


PART = 1 << 24  # numbers that a reduction over the vocabulary may hold at a time (64 MiB)


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [n, ...], the first one [n, V], in pieces of rows: a copy of a piece is small beside the whole."""
    rows = max(1, PART // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy float32 [n] in nats of the distributions softmax(logits [n, V])."""
    return torch.cat([torch.special.entr(piece.softmax(-1)).sum(-1) for (piece,) in parts(logits)])


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) float32 [n] in nats of distributions given as log-probabilities [n, V].

    What p excludes counts 0; what q excludes and p does not makes it infinite.
    """
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1).clamp_min_(0)  # rounding may end below 0
