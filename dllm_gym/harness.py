"""A dLLM that a rule or a policy decodes, as a model of EleutherAI's lm-evaluation-harness (0.4.13 and newer).

    python -m dllm_gym.harness --model dllm_gym --model_args "model=FOLDER,policy=threshold(0.9)" --tasks gsm8k

The harness knows the models that somebody has imported: this module registers one, and as a program it hands over to
the harness's own command line. Needs the extra ``lm-eval``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from dllm_gym.checks import flag, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.deciders.player import make_decider
from dllm_gym.decode import Decoded, Decoder
from dllm_gym.models import DLLM
from dllm_gym.models.spelling import in_template
from dllm_gym.prompt import Chat

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    end = SystemExit if __name__ == "__main__" else ImportError
    raise end("dllm_gym.harness needs lm-evaluation-harness: pip install 'dllm_gym[lm-eval]'") from error

log = logging.getLogger("lm_eval.dllm_gym")  # the harness shows what is logged below its own name

LENGTH = 256  # tokens of a completion where nobody says; the harness's own default
LANES = 64  # of --batch_size auto
AT_ONCE = 256  # positions whose logits over the whole vocabulary are held


class HarnessDLLM(LM):
    """What ``--model_args`` sets are the arguments of :class:`~dllm_gym.decode.Decoder`, and these:

    Args:
        model, policy: as of the decoder. gen_length: the policy's own, or 256. A task's ``until`` cuts the text; what
            else it asks of the generation (``temperature``, ``max_gen_toks``) is the decoder's matter.
        batch_size, device: the harness's ``--batch_size`` and ``--device``; results do not depend on the former.
        mc_num: masked copies of an answer that its likelihood is estimated from.
        check_greedy: whether an answer's likelihood comes with whether greedy decoding gives the answer, which takes a
            forward per token; False says that it never does, for tasks none of whose metrics asks (LLaDA's advice).
        seed: of all draws.
        distribution, policy_temperature, greedy, alpha: how a policy is played.
        settings: others of the decoder.

    Attributes:
        decoder: who decodes. decoded: the results of the last generation, in the order of its requests.

    Raises:
        ValueError: as of the decoder.
    """

    def __init__(
        self,
        model: str | DLLM | None = None,
        policy: Any = "threshold(0.9)",
        *,
        gen_length: int | None = None,
        batch_size: int | str = LANES,
        max_batch_size: int | None = None,
        device: str | None = None,
        mc_num: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        distribution: str | None = None,
        policy_temperature: float | None = None,
        greedy: bool | None = None,
        alpha: float | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.mc_num = whole("mc_num", mc_num)
        self.check_greedy, self.seed = flag("check_greedy", check_greedy), check_seed("seed", seed)
        auto = isinstance(batch_size, str) and batch_size.startswith("auto")
        lanes: Any = (max_batch_size or LANES) if auto else batch_size
        lanes = int(lanes) if str(lanes).isdecimal() else lanes  # the command line gives texts
        how = {"distribution": distribution, "temperature": policy_temperature, "greedy": greedy, "alpha": alpha}
        decider = make_decider(policy, **how)
        manner = getattr(getattr(decider, "policy", None), "manner", None)
        if gen_length is None and (manner is None or "gen_length" not in manner.env):
            gen_length = LENGTH
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            log.warning("--device %s, the harness's default: there is no CUDA here, the CPU decodes", device)
            device = None
        own: dict[str, Any] = {"gen_length": gen_length, "batch_size": lanes, "seed": seed, "device": device}
        self.decoder = Decoder(model, decider, **{**own, **settings})
        self.dllm, self._device = self.decoder.dllm, self.decoder.dllm.device
        self.decoded: list[Decoded] = []
        self.chats: dict[str, Chat] = {}  # by what the template makes of them

    # ---- prompts ----

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return str(self.dllm.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The dLLM's own; there is one at most."""
        return (chat_template and self.dllm.tokenizer.chat_template) or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns in the dLLM's template; a last turn of the assistant is how its reply begins.

        Raises:
            ValueError: the dLLM has no template, or it refuses a turn.
        """
        if not self.dllm.tokenizer.chat_template:
            raise ValueError("--apply_chat_template: this dLLM has no chat template")
        chat = Chat.of(chat_history)
        written = in_template(self.dllm.tokenizer, self.dllm.template_options, chat.turns) + chat.prefill
        self.chats[written] = chat
        return written

    def _prompt(self, context: str) -> str | Chat:
        """A context as it is decoded: the conversation that it was written from, or the text as it stands."""
        if self.chats and context not in self.chats:
            raise ValueError(
                f"the context {context[:40]!r}... was not written by this model (--cache_requests keeps it)"
            )
        return self.chats.get(context, context)

    # ---- what the harness asks ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completions of (context, settings), each up to the first of the texts in ``until``."""
        asked = [request.args for request in requests]
        found: dict[int, Decoded] = {}
        with nullcontext() if self.chats else without_template(self.dllm.tokenizer):
            ended = self.decoder.as_they_end([self._prompt(context) for context, _ in asked])
            for result in tqdm(ended, total=len(asked), desc="decoding", unit="prompt", disable=disable_tqdm):
                found[result.index] = result
                stops = asked[result.index][1].get("until") or []
                result.text = cut(result.text, [stops] if isinstance(stops, str) else stops)
                self.cache_hook.add_partial("generate_until", asked[result.index], result.text)
        self.decoded = [found[i] for i in range(len(asked))]
        nfe, speed = (np.mean([getattr(r, name) for r in self.decoded]) for name in ("nfe", "tokens_per_forward"))
        log.info("%s: %.2f forwards per answer, %.2f tokens per forward", self.decoder.decider, nfe, speed)
        return [result.text for result in self.decoded]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of (context, continuation) the log-likelihood in nats, as :func:`log_likelihood` estimates it, and whether
        most-confident-first decoding, one token at a time, gives the continuation."""
        answers = []
        for request in tqdm(requests, desc="likelihoods", disable=disable_tqdm):
            context, target = self._pair(*request.args)
            answers.append(
                (self._estimate(context, target), self.check_greedy and is_greedy(self.dllm, context, target))
            )
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, without a context; one that is longer than the dLLM reads is refused."""
        texts = [request.args[0] for request in requests]
        encoded = [self.dllm.spelling.plain(text) for text in texts]
        return [self._estimate([], target) for target in tqdm(encoded, desc="likelihoods", disable=disable_tqdm)]

    def _estimate(self, context: list[int], target: list[int]) -> float:
        rng = np.random.default_rng([self.seed, *context, *target])  # the same whatever is asked before it
        return log_likelihood(self.dllm, context, target, rng, self.mc_num, self.decoder.batch_size)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; blanks between them belong to the continuation, as to its first word's token.

        Raises:
            ValueError: together they are more than the dLLM reads.
        """
        prompt, plain = self._prompt(context), self.dllm.spelling.plain
        if isinstance(prompt, Chat):
            return self.dllm.encode(prompt), plain(continuation)
        own = plain(context.rstrip())
        return own, plain(context + continuation)[len(own) :]


@contextmanager
def without_template(tokenizer: Any) -> Iterator[None]:
    """A text is no turn of a conversation in here: it goes to the dLLM as it stands."""
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        yield
    finally:
        tokenizer.chat_template = template


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops in it."""
    return min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)


@torch.no_grad()
def is_greedy(dllm: DLLM, context: Sequence[int], target: Sequence[int]) -> bool:
    """Whether committing the surest token, one at a time, writes the target behind the context."""
    row = torch.tensor([[*context, *[dllm.mask_id] * len(target)]], device=dllm.device)
    masked = torch.arange(row.shape[1], device=dllm.device)[None] >= len(context)
    for _ in target:
        said = dllm.predict(row, None, masked)
        best = int(said.confidence[:, 0].argmax())
        at = int(masked[0].nonzero()[best])
        if int(said.token[best]) != target[at - len(context)]:
            return False
        row[0, at], masked[0, at] = said.token[best], False
    return True


def masks(length: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """bool [samples, length]: which tokens are masked. Every number of them from 1 to ``length`` is equally likely, and
    comes up about equally often (LLaDA's strata, rounded down)."""
    count = (rng.integers(length) + np.arange(samples) * length // samples) % length + 1  # (samples,)
    return rng.random((samples, length)).argsort(1).argsort(1) < count[:, None]


@torch.no_grad()
def log_likelihood(
    dllm: DLLM, context: Sequence[int], target: Sequence[int], rng: np.random.Generator, samples: int, batch: int
) -> float:
    """A lower bound of the log-likelihood of n tokens behind others, in nats, estimated from masked copies.

    The mean of (n / m) sum log p(token) over copies of which m tokens are masked, as LLaDA evaluates itself (arXiv
    2502.09992, its equation 6; ``eval_llada.py``), without guidance. Equal copies are forwarded once.

    Raises:
        ValueError: together they are more tokens than the dLLM reads.
    """
    n, size = len(target), len(context) + len(target)
    if size > dllm.max_positions:
        raise ValueError(
            f"context and continuation have {size} tokens: more than the {dllm.max_positions} of this dLLM"
        )
    if not n:
        return 0.0
    drawn, times = np.unique(masks(n, samples, rng), axis=0, return_counts=True)
    total = 0.0
    for masked, share in zip(torch.from_numpy(drawn).split(batch), torch.from_numpy(times).split(batch), strict=True):
        where = masked.to(dllm.device)  # (b, n)
        row = torch.tensor([[*context, *target]], device=dllm.device).repeat(len(where), 1)
        row[:, len(context) :].masked_fill_(where, dllm.mask_id)
        hidden = dllm.encode_rows(row, None)[:, len(context) :][where]  # (m, d)
        tokens = torch.tensor([target], device=dllm.device).expand_as(where)[where]  # (m,)
        weight = (share * n / masked.sum(1))[:, None].expand_as(masked)[masked]  # (m,)
        pieces = zip(hidden.split(AT_ONCE), tokens.split(AT_ONCE), strict=True)
        loss = torch.cat([cross_entropy(dllm.lm_head(h).float(), t, reduction="none") for h, t in pieces])
        total -= float((loss.double().cpu() * weight).sum())
    return total / samples


if __name__ == "__main__":
    importlib.import_module("dllm_gym.harness")  # registers it as others know it, once
    cli_evaluate()
else:
    register_model("dllm_gym")(HarnessDLLM)
