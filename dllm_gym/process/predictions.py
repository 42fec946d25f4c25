"""What the dLLM says about every lane, renewed with as few and as short forwards as there can be.

All of it is exact: only rows whose tokens changed are forwarded, equal rows once, rows of about one length together,
and the head reads the positions that are asked for. Only a cache of keys and values (``cache=``) approximates.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dllm_gym.models import DLLM, Prediction, Sampling
from dllm_gym.models.base import last_block, reading_last_block
from dllm_gym.models.batches import Batching, upload
from dllm_gym.models.vocabulary import kl_divergence, parts
from dllm_gym.noise import fold

if TYPE_CHECKING:
    from dllm_gym.models.cache import BlockCache

KEPT_BYTES = 1 << 27  # of predictions that may be asked for again (128 MiB)
KL_MOST = 100.0  # nats, as the rules know it; exp(-100) is about the smallest probability that float32 holds
ENTRY_BYTES = 2000  # that keeping one takes besides its numbers, roughly


@dataclass
class Work:
    """What the dLLM computed since construction.

    Attributes:
        rows, forwards: rows in calls of the backbone, and these calls.
        tokens, padding: tokens in these rows, and how many of them are padding.
        lengths: prompt + completion tokens -> how many whole rows of that length were forwarded.
        reused: rows whose prediction was taken from an equal row.
    """

    rows: int = 0
    forwards: int = 0
    tokens: int = 0
    padding: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    reused: int = 0

    def add(self, rows: int, tokens: int, padding: int) -> None:
        """A call of the backbone."""
        self.rows += rows
        self.forwards += 1
        self.tokens += tokens
        self.padding += padding


@dataclass(frozen=True)
class Request:
    """What is asked of the dLLM: to predict positions in b rows.

    Attributes:
        lanes: int64 [b]. length: int64 [b], tokens of prompt and completion.
        tokens: int64 [b, W], left-padded; their last L columns are the completion.
        where: bool [b, L], positions to predict. count: int64 [b], how many they are.
        block: int64 [b], the active block.
        key: int64 [b], random streams for proposals at a temperature.
        row: per row its tokens (without padding) if these alone say what is asked and it may come again, else None: as
            long as nothing has been committed, or always, where states are revisited.
        truth: int64 [b, L], the right completions, where it is asked how likely they are; else None.
    """

    lanes: np.ndarray
    length: np.ndarray
    tokens: Tensor
    where: Tensor
    count: np.ndarray
    block: np.ndarray
    key: Tensor
    row: Sequence[bytes | None]
    truth: Tensor | None = None

    def pick(self, rows: np.ndarray) -> Request:
        """Some of the rows, in the order of their indices ``rows``."""
        if len(rows) == len(self.lanes) and (rows == np.arange(len(rows))).all():
            return self
        on_device = upload(rows, self.tokens.device)
        tensors = {name: getattr(self, name)[on_device] for name in ("tokens", "where", "key")}
        arrays = {name: getattr(self, name)[rows] for name in ("lanes", "length", "count", "block")}
        truth = None if self.truth is None else self.truth[on_device]
        return replace(self, **tensors, **arrays, row=[self.row[i] for i in rows], truth=truth)


def positions(where: Tensor, count: int) -> Tensor:
    """Flat indices int64 [count] of the set entries of ``where``, in order; the host knows how many there are."""
    flat = where.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=flat.device)
    return found.scatter_(0, slot, torch.arange(len(flat), device=flat.device))[:count]


class Drift:
    """By how much each of the last H steps of an episode moved the dLLM's distributions (KLASS, arXiv 2511.05664).

    Args:
        lanes: B. length: L. vocabulary: V. history: H. device: where everything lives.

    Attributes:
        kl: float32 [B, L, H], KL(p_t || p_{t-1}) in nats, newest first; KL_MOST where it is larger, and where there
            was no prediction before.
        log_prob: float32 [B * L, V], the last distribution of every position, -inf before an episode's first.
    """

    def __init__(self, lanes: int, length: int, vocabulary: int, history: int, device: torch.device):
        self.length = length
        self.kl = torch.full((lanes, length, history), KL_MOST, device=device)
        self.log_prob = torch.full((lanes * length, vocabulary), -torch.inf, device=device)

    def forget(self, lanes: Tensor) -> None:
        """New episodes begin: the divergence of a first prediction from -inf is infinite."""
        self.kl[lanes] = KL_MOST
        rows = lanes[:, None] * self.length + torch.arange(self.length, device=lanes.device)
        self.log_prob[rows] = -torch.inf

    def stay(self, lanes: Tensor) -> None:
        """A step that left the distributions of these lanes as they were."""
        self._shift(lanes)

    def move(self, lanes: Tensor, at: Tensor, log_prob: Tensor) -> None:
        """New distributions [n, V] of the flat positions ``at`` (int64 [n], lane * L + position) in these lanes."""
        self._shift(lanes)
        for new, rows in parts(log_prob, at):
            divergence = kl_divergence(new, self.log_prob[rows])
            self.kl.view(-1, self.kl.shape[-1])[rows, 0] = divergence.clamp_max(KL_MOST)
            self.log_prob[rows] = new

    def _shift(self, lanes: Tensor) -> None:
        """The newest divergence is the one before; 0 where no other is written."""
        self.kl[lanes] = torch.nn.functional.pad(self.kl[lanes][..., :-1], (1, 0))


class KnownPredictions:
    """What was predicted for rows that may come again: equal ones are forwarded once.

    Args:
        tensors: what is predicted per lane and position, [B, L, ...] each.

    Attributes:
        kept: the tokens of a row -> its part of every tensor, [L, ...] each; the latest last.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self.device = tensors[0].device

    def recall(self, known_by: Sequence[bytes | None], lanes: np.ndarray) -> dict[int, int | None]:
        """Rows that need no forward: to which other row each is equal, None if it is known already.

        Args:
            known_by: per row its tokens; None if it need not be looked for.
            lanes: int64 [b], where rows that are known are written to.
        """
        twins: dict[int, int | None] = {}
        met: dict[bytes, int] = {}
        known: list[tuple[int, list[Tensor]]] = []
        for i, row in enumerate(known_by):
            if row is None:
                continue
            if row in self.kept:
                self.kept.move_to_end(row)
                known.append((int(lanes[i]), self.kept[row]))
                twins[i] = None
            elif row in met:
                twins[i] = met[row]
            else:
                met[row] = i
        if known:
            to = upload([lane for lane, _ in known], self.device)
            for number, tensor in enumerate(self.tensors):
                tensor[to] = torch.stack([stored[number] for _, stored in known])
        return twins

    def remember(self, known_by: Sequence[bytes | None], lanes: np.ndarray) -> None:
        """Keep the predictions among these that may be asked for again."""
        new = [(row, int(lane)) for row, lane in zip(known_by, lanes, strict=True) if row is not None]
        if not new:
            return
        most = max(1, KEPT_BYTES // (ENTRY_BYTES + sum(tensor[0].nbytes for tensor in self.tensors)))
        for row, lane in new[-most:]:
            self.kept[row] = [tensor[lane].clone() for tensor in self.tensors]
        while len(self.kept) > most:
            self.kept.popitem(last=False)

    def copy(self, source: dict[int, int]) -> None:
        """Give lanes the predictions of others: ``source`` maps a lane to the one that it equals."""
        if source:
            to, of = (upload(list(lanes), self.device) for lanes in (source.keys(), source.values()))
            for tensor in self.tensors:
                tensor[to] = tensor[of]


class Predictions:
    """The dLLM's proposals and confidences at the L positions of B lanes.

    Args:
        dllm: the frozen dLLM. lanes: B. length: L. sampling: what to predict.
        cache: keys and values to keep between steps, or None.
        history: H, how many steps to remember by their divergence; 0: none.
        block_input: whether to keep what the dLLM's last block reads.

    Attributes:
        proposal: int64 [B, L]. confidence: float32 [B, L, K].
        measures: float32 [B, L] by name, those of ``Sampling.measures``.
        hidden: float32 [B, L, d], or None. block_input: likewise. drift: or None.
        work: what was computed for it.
    """

    def __init__(
        self,
        dllm: DLLM,
        lanes: int,
        length: int,
        *,
        sampling: Sampling,
        cache: BlockCache | None,
        history: int,
        block_input: bool = False,
    ):
        if type(dllm).predict is not DLLM.predict:
            raise ValueError(
                f"{type(dllm).__name__} has a predict of its own, which is not called: override hidden_states"
            )
        self.dllm, self.L, self.cache = dllm, length, cache
        self.sampling = replace(sampling, hidden=False)  # those are taken whole, at committed positions as well
        device = dllm.device
        self.proposal = torch.zeros(lanes, length, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(lanes, length, sampling.top_k, device=device)
        self.measures = {name: torch.zeros(lanes, length, device=device) for name in sampling.measures}
        if block_input:
            refuse_unread_blocks(dllm, cache)
        shape = (lanes, length, dllm.hidden_size)
        self.hidden = torch.zeros(shape, device=device) if sampling.hidden else None
        self.block_input = torch.zeros(shape, device=device) if block_input else None
        self.drift = Drift(lanes, length, dllm.vocab_size, history, device) if history else None
        self.work = Work()
        self.known = KnownPredictions(self.tensors())
        self.batching = Batching.on(device)

    def tensors(self) -> list[Tensor]:
        """What is kept per lane and position, [B, L, ...] each."""
        optional = [states for states in (self.hidden, self.block_input) if states is not None]
        return [self.proposal, self.confidence, *self.measures.values(), *optional]

    @property
    def bytes_per_lane(self) -> int:
        """What a lane takes on the device, the cache's part included."""
        tensors = self.tensors() + ([] if self.drift is None else [self.drift.kl, self.drift.log_prob])
        kept = sum(tensor.nbytes for tensor in tensors) // len(self.proposal)
        return kept + (0 if self.cache is None else self.cache.bytes_per_lane)

    def stay(self, lanes: np.ndarray) -> None:
        """A step that changed no token of these lanes."""
        if self.drift is not None:
            self.drift.stay(upload(lanes, self.dllm.device))

    def forget(self, lanes: np.ndarray) -> None:
        """New episodes begin in these lanes."""
        if self.drift is not None:
            self.drift.forget(upload(lanes, self.dllm.device))
        if self.cache is not None:
            self.cache.forget(lanes)

    @torch.no_grad()
    def renew(self, rows: Request) -> None:
        """Predict rows whose tokens changed."""
        if self.cache is not None:
            self._forward_cached(rows)
            return
        # Distributions are not kept for later, and at a temperature every row draws proposals of its own.
        repeatable = self.drift is None and self.sampling.temperature == 0
        twins = self.known.recall(rows.row, rows.lanes) if repeatable else {}
        self.work.reused += len(twins)
        needed = rows.pick(np.array([i for i in range(len(rows.lanes)) if i not in twins], np.int64))
        for batch in self.batching.split(needed.length):
            self._forward(needed.pick(batch))
        if repeatable:
            self.known.remember(needed.row, needed.lanes)
            self.known.copy({int(rows.lanes[i]): int(rows.lanes[j]) for i, j in twins.items() if j is not None})

    # ---- one forward ----

    def _forward(self, rows: Request) -> None:
        width = int(rows.length.max())
        height = len(rows.lanes)
        if self.dllm.compiled:
            width, height = rounded(width, 32), rounded(height, 8) if height > 8 else 1 << (height - 1).bit_length()
        tokens, mask = self._padded(rows, width, height)
        lanes = upload(rows.lanes, tokens.device)
        hidden = encoded(self.dllm, tokens, mask, self.block_input, lanes)[: len(rows.lanes), -self.L :]  # (b, L, d)
        self.work.add(len(rows.lanes), width * height, width * height - int(rows.length.sum()))
        self.work.lengths.update(rows.length.tolist())
        at = positions(rows.where, int(rows.count.sum()))  # (n,) in b * L
        if self.hidden is not None:
            self.hidden[lanes] = hidden.float()
        self._read(rows, lanes, at, hidden.reshape(-1, hidden.shape[-1])[at])

    def _padded(self, rows: Request, width: int, height: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [height, width] and their attention mask; rows beyond those given repeat the last one."""
        missing = width - rows.tokens.shape[1]
        tokens = torch.nn.functional.pad(rows.tokens[:, -width:], (max(missing, 0), 0), value=self.dllm.pad_id)
        padding = width - rows.length
        repeat = np.minimum(np.arange(height), len(rows.lanes) - 1)
        if height > len(rows.lanes):
            tokens, padding = tokens[upload(repeat, tokens.device)], padding[repeat]
        if not padding.any():
            return tokens, None
        start = upload(padding, tokens.device)
        return tokens, torch.arange(width, device=tokens.device) >= start[:, None]

    def _forward_cached(self, rows: Request) -> None:
        assert self.cache is not None
        tokens = rows.tokens
        for part in self.cache.encode(rows.lanes, tokens, rows.length, rows.block):
            some = rows.pick(part.rows)
            there = part.columns >= 0
            columns = part.columns.clamp_min(0)
            wanted = there & some.where.gather(1, columns)  # (c, q)
            self.work.add(len(part.rows), part.columns.numel(), part.padding)
            lanes = upload(some.lanes, tokens.device)
            if self.hidden is not None:
                row = lanes[:, None].expand_as(columns)
                self.hidden[row[there], columns[there]] = part.hidden[there].float()
            at = torch.arange(len(columns), device=tokens.device)[:, None] * self.L + columns
            self._read(some, lanes, at[wanted], part.hidden[wanted])

    def _read(self, rows: Request, lanes: Tensor, at: Tensor, hidden: Tensor) -> None:
        """Take over what hidden states [n, d] say about the flat positions ``at`` (int64 [n], row * L + position)."""
        row, column = at // self.L, at % self.L
        stream = fold(rows.key[row], self.L - column) if self.sampling.temperature > 0 else None
        truth = None if rows.truth is None else rows.truth[row, column]
        prediction: Prediction = self.dllm.vocabulary.read(hidden, self.sampling, stream, truth)
        at = lanes[row] * self.L + column
        device = self.proposal.device
        self.proposal.view(-1)[at] = prediction.token.to(device)
        self.confidence.flatten(0, 1)[at] = prediction.confidence.to(device)
        for name, value in self.measures.items():
            value.view(-1)[at] = getattr(prediction, name).to(device)
        if self.drift is not None and prediction.log_prob is not None:
            self.drift.move(lanes, at, prediction.log_prob.to(device))


def encoded(dllm: DLLM, tokens: Tensor, mask: Tensor | None, block_input: Tensor | None, lanes: Tensor) -> Tensor:
    """Hidden states [B, T, d] of ``tokens`` [B, T], whose first b rows are those of the lanes int64 [b].

    What the last block read for them is kept in ``block_input`` [lanes, L, d], if there is one.
    """
    if block_input is None:
        return dllm.encode_rows(tokens, mask)
    with reading_last_block(dllm) as read:
        hidden = dllm.encode_rows(tokens, mask)
    block_input[lanes] = read[-1][: len(lanes), -block_input.shape[1] :].to(tokens.device).float()
    return hidden


def refuse_unread_blocks(dllm: DLLM, cache: BlockCache | None) -> None:
    """ValueError where what the dLLM's last block reads cannot be had for the whole completion."""
    last_block(dllm.backbone)
    if cache is not None:
        raise ValueError(f"block_input=True: with cache={cache.kind!r} the last block reads only a part")
    if dllm.compiled:
        raise ValueError("block_input=True: what the blocks of a compiled dLLM read is not seen, load it otherwise")


def rounded(number: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``number``."""
    return -(-number // step) * step
