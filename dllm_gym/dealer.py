"""Which example and which random stream an episode gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EMPTY = -1  # in place of an example: the lane holds no episode


def draw(rng: np.random.Generator, count: int) -> tuple[int, int]:
    """An example index below ``count`` and the key of a random stream."""
    return int(rng.integers(count)), int(rng.integers(1 << 63))


def check_example(index: Any, count: int) -> int:
    """``index`` if it names one of ``count`` examples (or none, as EMPTY)."""
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not EMPTY <= index < count:
        raise ValueError(f"options['examples']: {index!r} is not an example of the split (0 to {count - 1})")
    return int(index)


class Dealer:
    """Deals examples to lanes.

    Every lane draws from its own generator, seeded with seed + lane, so what it decodes depends on nothing else. When
    examples are chosen at reset, item i of them (lanes first, then the queue) has the random stream of seed + i,
    whichever lane takes it.

    Args:
        lanes: number of lanes. count: number of examples in the split.
    """

    def __init__(self, lanes: int, count: int):
        self.lanes, self.count = lanes, count
        self.queue: deque[int] | None = None
        self.seed(None)

    def seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Start all generators anew: from seed + lane, from seed[lane], or (None) from the system's entropy."""
        if seed is None or isinstance(seed, int | np.integer):
            base = int(np.random.default_rng().integers(1 << 31)) if seed is None else int(seed)
            seed = [base + lane for lane in range(self.lanes)]
        if len(seed) != self.lanes:
            raise ValueError(f"seed={seed!r}: need one number, or {self.lanes} of them")
        self.generators = [np.random.default_rng(s) for s in seed]
        self.base = int(np.random.default_rng().integers(1 << 31)) if seed[0] is None else int(seed[0])

    def open(self, options: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Examples and keys of the first episode of every lane.

        Args:
            options: of reset; ``examples`` (one index per lane, EMPTY for none) and ``queue`` (indices of further
                examples: lanes that finish take the next one, and stay empty when none is left).
        """
        dealt = [draw(generator, self.count) for generator in self.generators]
        examples = options.get("examples")
        if examples is not None:
            if isinstance(examples, int) or len(examples) != self.lanes:
                raise ValueError(f"options['examples']={examples!r}: need a sequence of {self.lanes} indices")
            dealt = [(check_example(e, self.count), key) for e, (_, key) in zip(examples, dealt, strict=True)]
        queue: Sequence[int] | None = options.get("queue")
        if queue is not None and examples is None:
            raise ValueError("options['queue'] goes with options['examples']")
        self.queue = None if queue is None else deque(check_example(e, self.count) for e in queue)
        self.item = self.lanes
        return [example for example, _ in dealt], [key for _, key in dealt]

    def deal(self, lane: int) -> tuple[int, int]:
        """The next example and key for a lane that has finished."""
        if self.queue is None:
            return draw(self.generators[lane], self.count)
        if not self.queue:
            return EMPTY, 0
        _, key = draw(np.random.default_rng(self.base + self.item), self.count)
        self.item += 1
        return self.queue.popleft(), key
