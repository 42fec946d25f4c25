"""How a policy wants to be played, and what it was trained on: saved with it, so that nobody has to remember."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from dllm_gym.checks import choice, flag, number, text, whole
from dllm_gym.deciders.distributions import UnmaskDistribution

Kind = TypeVar("Kind")


def kinds_of(base: type[Kind]) -> Iterator[type[Kind]]:
    """The subclasses of a class that have been defined by now, at any depth; the latest of a name comes last."""
    for kind in base.__subclasses__():
        yield kind
        yield from kinds_of(kind)


@dataclass(frozen=True)
class Manner:
    """How a policy is played, and what it was trained on.

    Attributes:
        distribution: name of the class that says what the logits mean.
        temperature: divides the logits, > 0. greedy: take the distribution's greedy action instead of a draw.
        alpha: the range [low, high] of speed weights that the policy was trained for, if it reads a preference.
        model: the arguments of ``load_dllm`` of the dLLM. family, vocab_size: its ``model_type`` and V.
        task: the task's name. env: settings of the environment.
        recipe: the command that trained it.

    Raises:
        ValueError: one of them is nothing of the kind.
    """

    distribution: str
    temperature: float = 1.0
    greedy: bool = True
    alpha: list[float] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    vocab_size: int | None = None
    task: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    def __post_init__(self) -> None:
        choice("distribution", self.distribution, distributions())
        number("temperature", self.temperature, above=0)
        flag("greedy", self.greedy)
        if self.alpha is not None:
            low, high = (number("alpha", a, above=0) for a in _pair(self.alpha))
            number("alpha", high, above=low)
        if self.vocab_size is not None:
            whole("vocab_size", self.vocab_size)
        for name in ("family", "task", "recipe"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name))
        for name in ("model", "env"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}={getattr(self, name)!r}: need settings by their names")

    @classmethod
    def of(cls, saved: Any) -> Manner:
        """That which :meth:`as_dict` gave; ValueError for anything else."""
        if not isinstance(saved, Mapping):
            raise ValueError(f"manner={saved!r}: need settings by their names")
        for name in saved:
            choice("a setting of manner", name, [f.name for f in fields(cls)])
        if "distribution" not in saved:
            raise ValueError("manner lacks distribution")
        return cls(**saved)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @property
    def distribution_class(self) -> type[UnmaskDistribution]:
        return distributions()[self.distribution]


def _pair(alpha: Any) -> list[Any]:
    if not isinstance(alpha, list | tuple) or len(alpha) != 2:
        raise ValueError(f"alpha={alpha!r}: need a range [low, high]")
    return list(alpha)


def distributions() -> dict[str, type[UnmaskDistribution]]:
    """Those that have been defined, by name."""
    return {kind.__name__: kind for kind in kinds_of(UnmaskDistribution)}
