"""Keys and values that are kept between the steps of an episode (Fast-dLLM, arXiv 2505.22618).

Between two predictions of a row only tokens of its active block change. A *refresh* forwards the whole row and stores
the keys and values of every position; after it only a *window* is forwarded, which attends to what is stored outside.

- ``prefix``: the window goes from the active block to the end of the row.
- ``dual``: the window is the active block.

In a model that looks both ways a token that changes moves the keys and values of all others: what is stored is an
approximation, and every new active block begins with a refresh. In a block-causal model the blocks before keep theirs:
windows of whole blocks of the model, from the one in which a token may have changed, are exact and need no refresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dllm_gym.models.attention import ATTENTION
from dllm_gym.models.base import DLLM
from dllm_gym.models.batches import Batching, upload
from dllm_gym.models.views import View

KINDS = ("prefix", "dual")


@dataclass(frozen=True)
class Encoded:
    """Hidden states of c rows.

    Attributes:
        rows: int64 [c], which of the rows that were given.
        columns: int64 [c, q], positions within the completion that they predict, each once per row; -1: none.
        hidden: [c, q, d] last hidden states in the model's dtype.
        padding: how many of the c * q positions were computed only because another row's window is longer.
    """

    rows: np.ndarray
    columns: Tensor
    hidden: Tensor
    padding: int


class BlockCache:
    """Keys and values of B lanes, each with an active block of its own.

    Args:
        dllm: a dLLM on one of transformers' decoders.
        kind: ``"prefix"`` or ``"dual"``.
        lanes: B. length: L, tokens of a completion. block_length: BL, of the environment's blocks.
        from_prompt: which are counted from the row's first token, not from the completion's.

    Raises:
        ValueError: there is no such kind, or the dLLM has no keys and values to keep.

    Attributes:
        exact: what is predicted is what would be predicted without a cache.
        store: a tensor [2 (keys, values), B, W, heads, size] per layer, right-aligned; W grows with the longest row.
    """

    def __init__(self, dllm: DLLM, kind: str, lanes: int, length: int, block_length: int, *, from_prompt: bool = False):
        view = view_of(dllm)
        if kind not in KINDS:
            raise ValueError(f"cache={kind!r} is not valid: choose 'none', 'prefix' or 'dual'")
        if view is None:
            raise ValueError(f"cache={kind!r}: a {type(dllm).__name__} has no keys and values to keep, choose 'none'")
        backbone: Any = dllm.backbone
        backbone.set_attn_implementation(ATTENTION)  # a forward without lanes computes what it did before
        self.dllm, self.kind, self.view = dllm, kind, view
        self.L, self.block_length, self.from_prompt = length, block_length, from_prompt
        self.exact = view.block is not None
        self.active = np.full(lanes, -1)  # each lane's active block when it was last encoded; -1: nothing is stored
        self.width = length  # W
        self.store: list[Tensor] = []

    @property
    def bytes_per_lane(self) -> int:
        return sum(layer.nbytes for layer in self.store) // len(self.active)

    def forget(self, lanes: np.ndarray) -> None:
        """New episodes begin in these lanes."""
        self.active[lanes] = -1

    @torch.no_grad()
    def encode(self, lanes: np.ndarray, tokens: Tensor, length: np.ndarray, block: np.ndarray) -> list[Encoded]:
        """Hidden states of b lanes, at least those that predict their active blocks.

        Args:
            lanes: int64 [b], each once.
            tokens: int64 [b, T], left-padded; the last L columns are the completions.
            length: int64 [b], tokens of each row's prompt and completion.
            block: int64 [b], the active blocks; until the next call, no token behind them changes.

        Returns:
            One entry per forward; together they have every row once.
        """
        self.width = max(self.width, int(length.max()))
        begin, end = self._windows(lanes, length, block)
        self.active[lanes] = block
        table = np.stack([lanes, length, begin, end])  # (4, b)
        batches = Batching.on(tokens.device).split(begin - end)
        return [self._forward(rows, table[:, rows], tokens) for rows in batches]

    def _windows(self, lanes: np.ndarray, length: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows' windows begin and end, each int64 [b], counted from the end of the row: 1 is the last token,
        and a window that ends at 0 contains it."""
        before, size = self.active[lanes], self.view.block
        whole = self.L + ((length - self.L) % self.block_length if self.from_prompt else 0)  # with the first block's
        begin = np.minimum(whole - before * self.block_length, self.L)  # the first token that may have changed
        begin = begin + self.view.shift  # what predicts it
        end = np.maximum(whole - (block + 1) * self.block_length, 0)
        if size is None:
            refresh = before != block
        else:
            refresh = before < 0
            begin = length - (length - begin) // size * size  # where that token's block of the model begins
            end = np.maximum(length - -(-(length - end) // size) * size, 0)  # the division rounds up
        begin = np.where(refresh, np.maximum(length, self.L + self.view.shift), begin)
        return begin, np.where(refresh | (self.kind == "prefix"), 0, end)

    def _forward(self, rows: np.ndarray, table: np.ndarray, tokens: Tensor) -> Encoded:
        """One forward of c rows with (lane, length, begin, end) [4, c]; shorter windows repeat their first position."""
        sizes, width = table[2] - table[3], int(table[1].max())
        q, device = int(sizes.max()), tokens.device
        row, lane, length, begin, end = upload(np.stack([rows, *table]), device)[..., None]  # (c, 1) each
        slot = torch.arange(-q, 0, device=device) - end  # (c, q), counted from the row's end: -1 is the last token
        place = slot.maximum(-begin.minimum(length))  # (c, q)
        position = place + length  # (c, q), counted from the row's first token
        key = torch.arange(-width, 0, device=device) + length  # (c, K), positions as well; negative on padding
        sees = (key >= 0)[:, None].expand(-1, q, -1)  # (c, q, K)
        if self.view.block is not None:
            sees = sees & (key[:, None] // self.view.block <= position[..., None] // self.view.block)
        hidden = self.dllm.backbone.forward(  # not __call__: a compiled backbone is built for whole rows
            input_ids=tokens[row, place],
            attention_mask=sees[:, None],
            position_ids=position,
            use_cache=False,
            lanes=Lanes(self, lane, place, width),
        ).last_hidden_state
        target = slot + self.L + self.view.shift  # (c, q)
        predicts = (slot >= -begin) & (target >= 0) & (target < self.L)
        return Encoded(rows, target.where(predicts, -1), hidden.to(device), q * len(rows) - int(sizes.sum()))

    def layer(self, index: int, like: Tensor) -> Tensor:
        """The store of a layer, as wide as it has to be; ``like`` [c, heads, q, size] are new values of it."""
        if index == len(self.store):
            self.store.append(like.new_zeros(2, len(self.active), 0, like.shape[1], like.shape[3]))
        missing = self.width - self.store[index].shape[2]
        if missing:
            self.store[index] = pad(self.store[index], (0, 0, 0, 0, missing, 0))
        return self.store[index]


@dataclass(frozen=True)
class Lanes:
    """The lanes of one forward: every layer's attention calls ``update``.

    Attributes:
        cache: where keys and values lie.
        lane: int64 [c, 1]. place: int64 [c, q], where the new ones go, counted from the end of the row.
        width: K, how many of a lane's last ones are attended to.
    """

    cache: BlockCache
    lane: Tensor
    place: Tensor
    width: int

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values, each [c, heads, q, size]; returns all of them, each [c, heads, K, size]."""
        store = self.cache.layer(layer, value)
        lane, place = self.lane.to(store.device), self.place.to(store.device)
        new = torch.stack([key, value])
        store[:, lane, place] = new.transpose(2, 3)
        keys, values = store[:, lane[:, 0], -self.width :].transpose(2, 3)
        return keys, values


def view_of(dllm: DLLM) -> View | None:
    """What the class that computes the hidden states says of them; None when there is nothing that a cache can use."""
    own = next(kind for kind in type(dllm).__mro__ if {"hidden_states", "_hidden"} & set(vars(kind)))
    if getattr(dllm.backbone.config, "_attn_implementation", None) not in ("sdpa", ATTENTION):
        return None
    if own is DLLM:
        return View()
    return dllm.view if "view" in vars(own) else None  # type: ignore[attr-defined]
