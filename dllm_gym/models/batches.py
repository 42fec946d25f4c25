"""Which rows share a forward, and how numbers get to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batching:
    """How rows of different lengths are put together: where padding costs more than another forward, they are split.

    Attributes:
        start: what starting another forward costs, in tokens that could be computed meanwhile.
        most: tokens in one forward (but at least one row); None: no limit.
    """

    start: int
    most: int | None = None

    @classmethod
    def on(cls, device: torch.device) -> Batching:
        """What suits a device: on a CPU the activations of more than some 2,000 tokens leave its caches."""
        return cls(64, 2048) if device.type == "cpu" else cls(256)

    def split(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of the rows of one forward after the other, the longest rows first.

        Args:
            lengths: int64 [n], tokens per row.
        """
        if len(lengths):
            yield from self._split(np.argsort(-lengths, kind="stable"), lengths)

    def _split(self, rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        width = lengths[rows[0]]
        saved = (width - lengths[rows]) * (len(rows) - np.arange(len(rows)))  # tokens, with a cut before each row
        cut = int(saved.argmax())
        if saved[cut] > self.start:
            yield from self._split(rows[:cut], lengths)
            yield from self._split(rows[cut:], lengths)
        else:
            size = len(rows) if self.most is None else max(1, self.most // int(width))
            yield from np.array_split(rows, -(-len(rows) // size))


def upload(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(**tensors: Tensor) -> dict[str, np.ndarray]:
    """Copies int64 [b] or [b, n] on the host of tensors [b] or [b, n]; the host waits for the device once."""
    columns = [tensor.long().reshape(len(tensor), -1) for tensor in tensors.values()]
    ends = np.cumsum([column.shape[1] for column in columns])
    parts = np.split(torch.cat(columns, 1).cpu().numpy(), ends[:-1], axis=1)
    named = zip(tensors.items(), parts, strict=True)
    return {name: part.reshape(tuple(tensor.shape)).copy() for (name, tensor), part in named}
