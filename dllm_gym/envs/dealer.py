"""Which example and which random stream an episode gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dllm_gym.process.config import EMPTY
from dllm_gym.process.rewards import AlphaRange


def draw(rng: np.random.Generator, count: int) -> tuple[int, int]:
    """An example index below ``count`` and the key of a random stream."""
    return int(rng.integers(count)), int(rng.integers(1 << 63))


def check_options(options: dict[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """The options of a reset that are not None; ValueError for a key that means nothing."""
    for key in options or {}:
        if key not in known:
            raise ValueError(f"options[{key!r}] is not known: choose from {', '.join(known)}")
    return {key: value for key, value in (options or {}).items() if value is not None}


def check_example(index: Any, count: int, least: int = 0) -> int:
    """``index`` if it names one of ``count`` examples (with ``least=EMPTY``, or none)."""
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not least <= index < count:
        raise ValueError(f"options['examples']: {index!r} is not an example of the split (0 to {count - 1})")
    return int(index)


def check_alphas(options: Mapping[str, Any], alpha_range: AlphaRange | None, count: int) -> list[float | None]:
    """``options["alpha"]``: one per episode that is started or queued, ``count`` in all; a number counts for all.

    None for episodes that draw their own.

    Raises:
        ValueError: the environment has no range of alphas, or one of these lies outside of it.
    """
    chosen = options.get("alpha")
    if chosen is None:
        return [None] * count
    if alpha_range is None:
        raise ValueError(f"options['alpha']={chosen!r}: make the environment with a range, alpha=[low, high]")
    try:
        values = [float(a) for a in (chosen if np.ndim(chosen) else [chosen] * count)]
        if len(values) != count or not all(alpha_range.low <= a <= alpha_range.high for a in values):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"options['alpha']={chosen!r}: need a number from {alpha_range.low:g} to {alpha_range.high:g}, or {count} "
            "of them, for the lanes and then for the queue"
        ) from None
    return [*values]


def check_streams(options: Mapping[str, Any], count: int | None) -> list[int] | None:
    """``options["streams"]``: one number >= 0 per item of a reset with a queue, ``count`` in all; None: none is given.

    Raises:
        ValueError: they are something else, or there is no queue.
    """
    streams = options.get("streams")
    if streams is None:
        return None
    if count is None:
        raise ValueError("options['streams'] goes with options['queue']")
    whole = [s for s in streams if isinstance(s, int | np.integer) and not isinstance(s, bool) and s >= 0]
    if len(whole) != count or len(streams) != count:
        raise ValueError(f"options['streams']={streams!r}: need {count} whole numbers >= 0, the lanes' and the queue's")
    return [int(s) for s in whole]


class Dealer:
    """Deals examples to lanes.

    Every lane draws from its own generator, seeded with seed + lane, so what it decodes depends on nothing else. When
    examples are chosen at a seeded reset, item i of them (lanes first, then the queue) has the random stream of
    seed + i, whichever lane takes it, or of seed + ``streams[i]``.

    Args:
        lanes: number of lanes. count: number of examples in the split. alpha_range: of the environment.

    Attributes:
        items: int64 [lanes], which of the examples of a reset with a queue each lane has, counted over the lanes and
            then the queue; EMPTY: none of them.
    """

    def __init__(self, lanes: int, count: int, alpha_range: AlphaRange | None = None):
        self.lanes, self.count, self.alpha_range = lanes, count, alpha_range
        self.alpha: float | None = None  # of all episodes; None: each draws its own, or has it from the queue
        self.queue: deque[tuple[int, float | None]] | None = None
        self.generators = [np.random.default_rng() for _ in range(lanes)]
        self.base: int | None = None  # the seed of a reset that has not dealt yet
        self.queue_base = self.item = 0
        self.streams: Sequence[int] | None = None  # of the items; None: their numbers
        self.items = np.full(lanes, EMPTY)

    def seed(self, seed: int | Sequence[int | None] | None, lanes: Iterable[int] | None = None) -> None:
        """Start generators anew: from seed + lane, from seed[lane], or (None) from the system's entropy.

        Args:
            seed: for all lanes, or one per lane.
            lanes: whose generators; all by default.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seed = [None if seed is None else int(seed) + lane for lane in range(self.lanes)]
        if len(seed) != self.lanes:
            raise ValueError(f"seed={seed!r}: need one number, or {self.lanes} of them")
        for lane in range(self.lanes) if lanes is None else lanes:
            self.generators[lane] = np.random.default_rng(seed[lane])
        if lanes is None:
            self.base = seed[0]

    def deal_all(self, options: Mapping[str, Any]) -> tuple[list[int], list[int], list[float | None]]:
        """Examples, keys and alphas (None: drawn by the episode) of the first episode of every lane.

        Args:
            options: of reset; ``examples`` (one index per lane, EMPTY for none), ``queue`` (indices of further
                examples: lanes that finish take the next one, and stay empty when none is left), ``streams`` (one
                number >= 0 per item of both) and ``alpha``.
        """
        chosen = self.chosen(options)
        queue = options.get("queue")
        if queue is not None and chosen is None:
            raise ValueError("options['queue'] goes with options['examples']")
        streams = check_streams(options, None if queue is None else self.lanes + len(queue))
        alphas = check_alphas(options, self.alpha_range, self.lanes + len(queue or ()))
        self.alpha = alphas[0] if isinstance(options.get("alpha"), int | float) else None
        examples = [check_example(e, self.count) for e in queue or ()]
        self.queue = None if queue is None else deque(zip(examples, alphas[self.lanes :], strict=True))
        self.item = self.lanes
        if self.base is None:  # not seeded for this reset: queue items get new streams
            self.base = int(self.generators[0].integers(1 << 31))
        self.queue_base, self.base = self.base, None
        self.items[:] = EMPTY
        if chosen is not None and self.queue is not None:
            self.items = np.where(np.array(chosen) == EMPTY, EMPTY, np.arange(self.lanes))
        self.streams = streams
        generators = self.generators if streams is None else map(self._generator, range(self.lanes))
        dealt = [draw(generator, self.count) for generator in generators]
        return chosen or [example for example, _ in dealt], [key for _, key in dealt], alphas[: self.lanes]

    def chosen(self, options: Mapping[str, Any]) -> list[int] | None:
        """``options["examples"]``, checked: one index per lane, EMPTY for none."""
        examples = options.get("examples")
        if examples is None:
            return None
        if np.ndim(examples) != 1 or len(examples) != self.lanes:
            raise ValueError(f"options['examples']={examples!r}: need a sequence of {self.lanes} indices")
        return [check_example(e, self.count, least=EMPTY) for e in examples]

    def deal(self, lane: int) -> tuple[int, int, float | None]:
        """The next example, key and alpha (None: drawn by the episode) for a lane that has finished."""
        if self.queue is None:
            return *draw(self.generators[lane], self.count), self.alpha
        if not self.queue:
            self.items[lane] = EMPTY
            return EMPTY, 0, None
        _, key = draw(self._generator(self.item), self.count)
        self.items[lane] = self.item
        self.item += 1
        example, alpha = self.queue.popleft()
        return example, key, alpha

    def _generator(self, item: int) -> np.random.Generator:
        """Where the random stream of an item of a reset with a queue comes from."""
        return np.random.default_rng(self.queue_base + (item if self.streams is None else self.streams[item]))

    def restart(self, lane: int, options: Mapping[str, Any]) -> tuple[int, int, float | None]:
        """Example, key and alpha for a lane that is reset by itself: those of the options, else the next ones."""
        chosen, alphas = self.chosen(options), check_alphas(options, self.alpha_range, self.lanes)
        if chosen is None:
            example, key, alpha = self.deal(lane)
        else:
            (_, key), example, alpha = draw(self.generators[lane], self.count), chosen[lane], None
            self.items[lane] = EMPTY
        return example, key, alpha if alphas[lane] is None else alphas[lane]
