"""Checks of arguments: each gives the value back, or raises a ValueError that names the setting and what is valid."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_SEED = 2**63 - 1  # random streams are keyed by int64


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``."""
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r}: need a whole number {span}")
    return int(value)


def span(name: str, low: Any, high: Any, least: int = 1, most: float = math.inf) -> tuple[int, int]:
    """The whole numbers ``min_name`` and ``max_name``, with least <= min_name <= max_name <= most."""
    pair = whole(f"min_{name}", low, least=0), whole(f"max_{name}", high, least=0)
    if not least <= pair[0] <= pair[1] <= most:
        bounds = f"{least} <= min_{name} <= max_{name}" + (f" <= {most}" if most < math.inf else "")
        raise ValueError(f"min_{name}={low}, max_{name}={high}: need {bounds}")
    return pair


def seed(name: str, value: Any) -> int:
    """A seed of random streams."""
    return whole(name, value, least=0, most=LARGEST_SEED)


def number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> float:
    """A finite number from ``least`` to ``most``, greater than ``above`` if that is given."""
    if isinstance(value, np.floating):
        value = float(value)  # comparing a float32 with what it cannot hold would warn
    fits = isinstance(value, int | float | np.integer) and not isinstance(value, bool)
    fits = fits and abs(value) <= sys.float_info.max  # not a NaN either; math.isfinite refuses larger integers
    if not fits or not least <= value <= most or (above is not None and value <= above):
        bounds = [] if above is None else [f"> {above:g}"]
        bounds += [f">= {least:g}"] if least > -math.inf else []
        bounds += [f"<= {most:g}"] if most < math.inf else []
        raise ValueError(f"{name}={value!r}: need a finite number {' and '.join(bounds)}".rstrip())
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A truth value, or 0 or 1 (YAML's bare words ``no`` and ``off`` arrive here as texts)."""
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise ValueError(f"{name}={value!r}: need True or False")
    return bool(value)


def choice(name: str, value: Any, among: Iterable[str]) -> str:
    """One of these texts."""
    among = list(among)
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(among)}")
    return value


def text(name: str, value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}={value!r}: need a text")
    return value


def distinct(name: str, values: Any) -> list[Any]:
    """A list that holds something, and nothing twice."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
        raise ValueError(f"{name}={values!r}: need a list with at least one entry, such as [a,b]")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{name}={list(values)!r}: {twice[0]!r} is there twice")
    return list(values)


def writable(name: str, path: Any, suffixes: Sequence[str] = ()) -> Path:
    """The name of a file that can be written, in a folder that exists, with one of these suffixes if there are any."""
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ValueError(f"{name}={path!r}: need the name of a file")
    file, ends = Path(path), " that ends in " + " or ".join(suffixes) if suffixes else ""
    if file.is_dir() or (suffixes and file.suffix.lower() not in suffixes):
        raise ValueError(f"{name}={str(path)!r}: need the name of a file{ends}")
    if not file.parent.is_dir():
        raise ValueError(f"{name}={str(path)!r}: the folder {file.parent} does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{name}={str(path)!r}: nothing can be written there")
    return file
