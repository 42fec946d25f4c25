"""Where the rows of a dataset come from (the hub, or files), and which split of a task holds which of them."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_gym.tasks.base import SPLITS

if TYPE_CHECKING:
    from datasets import Dataset

    from dllm_gym.tasks.dataset import DatasetTask

SHOTS = "shots"  # a source besides the splits: where examples with their answers are taken from
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
ALIASES = {"validation": ("valid", "val", "dev")}  # other names of a split's file

HUB_ID = re.compile(
    r"(?P<hub>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@:\s]+))?(?::(?P<config>[^@:]+))?"
)

Row = dict[str, Any]

log = logging.getLogger(__name__)


class FoundRow(Row):
    """A row, with the place where it was found for messages about it."""

    __slots__ = ("place",)

    def __init__(self, row: Row, place: str):
        super().__init__(row)
        self.place = place


@dataclass(frozen=True)
class Source:
    """A split of a dataset on the hub.

    Attributes:
        hub: its id, ``owner/name``.
        config: the configuration ("subset") of the dataset, where it has several.
        split: what the dataset calls this split.
        revision: a branch, tag or commit of the dataset; its newest state if None.
    """

    hub: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


Places = dict[str, Source | list[Path]]  # split (or "shots") -> where its rows are


class Rows:
    """The rows of a task by split; each is read once, when it is first asked for.

    Args:
        task: says how a row becomes an example and a question, which columns it has, and which share is held out.

    Attributes:
        places: split (or ``"shots"``) -> where its rows are.

    Raises:
        ValueError: ``task.data`` is no such place.
    """

    def __init__(self, task: DatasetTask):
        self.task = task
        self.places = self.locate(task.data)
        self.prepared: dict[str, list[Row]] = {}  # by place

    def locate(self, data: Any) -> Places:
        """Where the rows are; touches no network."""
        return locate({self.split_of(Path(data)) or "train": data} if is_file(data) else data, self.task.hub)

    def split_of(self, path: Path) -> str | None:
        """The split that the name of a file says it is; None where it says none, or several."""
        stem = path.stem.lower()
        if own := self.task.files.get(re.sub("[^a-z0-9]", "", stem)):
            return own
        words = set(re.split("[^a-z0-9]+", stem))
        named = [split for split in SPLITS if words & {split, *ALIASES.get(split, ())}]
        return named[0] if len(named) == 1 else None

    def load(self, key: str) -> list[Row]:
        """The raw rows of one place."""
        place = self.places[key]
        if isinstance(place, Source):
            return download(place, self.task)
        return [
            FoundRow(row, f"row {number} of {str(path)!r}")
            for path in place
            for number, row in enumerate(read_rows(path), 1)
        ]

    def read(self, key: str) -> list[Row]:
        """The examples that the rows of one place make."""
        if key not in self.prepared:
            examples = [self._example(row, number) for number, row in enumerate(self.load(key), 1)]
            self.prepared[key] = [example for example in examples if example is not None]
        return self.prepared[key]

    def _example(self, row: Row, number: int) -> Row | None:
        """The example of a row, checked as far as the prompt needs it."""
        task = self.task
        try:
            lacking = [field for field in task.fields if field not in row]
            if lacking:
                raise ValueError(
                    f"lacks the columns {', '.join(lacking)} that task {task.name!r} needs; it has "
                    f"{', '.join(map(str, row))}"
                )
            example = task.prepare(row)
            if example is not None:
                task.question(example)
        except Exception as error:  # cells may hold anything, a subclass may stumble over it in any way
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            place = getattr(row, "place", f"row {number} of {task.data!r}")
            raise ValueError(f"data: {place}: {kind}{str(error)[:500]}") from error
        return example

    def of(self, split: str) -> list[Row]:
        """All of a split: its own place, or its share of ``train``."""
        missing = [name for name in ("validation", "test") if name not in self.places]
        if split in self.places and split != "train":
            return self.read(split)
        if "train" not in self.places or (split in missing and not self.task.held_out):
            raise ValueError(
                f"split={split!r}: task {self.task.name!r} has no such data (data={self.task.data!r} gives "
                f"{', '.join(self.places) or 'nothing'}); name a file, a folder or files by split with task.data=..."
            )
        rows = self.read("train")
        share = [row for row in rows if self._home(row, missing) == split]
        if split == "test":
            log.warning(
                "task %r: split 'test' is %d of the %d rows of %s, which are not told apart: name the file "
                "test.jsonl, or say data={test: FILE}, to have them all",
                *(self.task.name, len(share), len(rows), self.task.data or "train"),
            )
        return share

    def _home(self, row: Row, missing: list[str]) -> str:
        """``train``, or the missing split that a row of ``train`` is given to."""
        place = zlib.crc32(self.task.question(row).encode(errors="replace")) / 2**32
        for start, name in enumerate(("validation", "test")):
            if name in missing and start * self.task.held_out <= place < (start + 1) * self.task.held_out:
                return name
        return "train"

    def shots(self, count: int) -> list[Row]:
        """The first ``count`` rows that are there to be shown."""
        return (self.read(SHOTS) if SHOTS in self.places else self.of("train"))[:count]

    def besides_shots(self, split: str, count: int) -> list[Row]:
        """All of a split but the ``count`` rows of it that are shown."""
        shown = count if split == "train" and SHOTS not in self.places else 0
        return self.of(split)[shown:]


def download(source: Source, task: DatasetTask) -> list[Row]:
    """The rows of a split on the hub."""
    from datasets import load_dataset

    try:
        rows = load_dataset(source.hub, source.config, split=source.split, revision=source.revision).to_list()
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, unknown, malformed
        raise ValueError(
            f"data={task.data!r}: task {task.name!r} cannot load split {source.split!r} of {source.hub} from the "
            f"hub ({type(error).__name__}: {str(error)[:200]}). Check the connection (for data behind a login, "
            "`hf auth login`), or name local files that exist with task.data=FILE_OR_FOLDER"
        ) from error
    where = f"{source.split!r} of {source.hub}"
    return [FoundRow(row, f"row {number} of split {where}") for number, row in enumerate(rows, 1)]


def locate(data: Any, hub: Mapping[str, Source]) -> Places:
    """Where the rows of a setting ``data`` are; ``hub`` is the task's own place. Touches no network."""
    if data is None:
        return dict(hub)
    if isinstance(data, Mapping):
        unknown = [key for key in data if key not in (*SPLITS, SHOTS)]
        if unknown or not data:
            raise ValueError(f"data={dict(data)!r}: need files by split, {', '.join((*SPLITS, SHOTS))}")
        return {key: [existing(path)] for key, path in data.items()}
    if not isinstance(data, str | Path) or not str(data).strip():
        raise ValueError(f"data={data!r}: need a hub id, a file, a folder, or files by split")
    if Path(data).is_dir():
        return in_folder(Path(data), hub)
    match = HUB_ID.fullmatch(str(data))
    if not match or set(SUFFIXES) & {suffix.lower() for suffix in Path(data).suffixes}:  # k.jsonl.gz is a file
        raise ValueError(
            f"data={data!r} is no file that ends in {', '.join(SUFFIXES)}, no folder that exists and no hub id "
            "owner/name, owner/name:config, owner/name@revision or owner/name@revision:config"
        )
    splits = {key: own.split for key, own in hub.items()} or {"train": "train"}
    return {key: Source(split=split, **match.groupdict()) for key, split in splits.items()}


def in_folder(folder: Path, hub: Mapping[str, Source]) -> Places:
    """The files of every split in a folder, under the hub's name of the split, our own or another usual one."""
    found: Places = {}
    for key in (*SPLITS, SHOTS):
        own = (hub[key].split,) if key in hub else ()
        for name in dict.fromkeys((*own, key, *ALIASES.get(key, ()))):
            files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and is_shard(p.stem, name))
            if files:
                found[key] = files
                break
    if not found:
        raise ValueError(f"data={str(folder)!r}: no file like train.jsonl or test.parquet in this folder")
    return found


def as_dataset(rows: list[Row], data: Any, split: str) -> Dataset:
    """Rows as a table with the columns that any of them has; ValueError where their types do not go together."""
    from datasets import Dataset

    columns = dict.fromkeys(column for row in rows for column in row)  # from_list takes those of the first row only
    try:
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    except Exception as error:  # Arrow has a kind of its own for every way in which rows can differ
        raise ValueError(
            f"data={data!r}: a column of split {split!r} holds values of different types ({error})"
        ) from error


def is_shard(stem: str, name: str) -> bool:
    """Whether a file of that stem is ``name`` or one of its pieces, ``name-00000-of-00003``."""
    return stem == name or (stem.startswith(f"{name}-") and "-of-" in stem)


def is_file(data: Any) -> bool:
    """Whether a setting ``data`` names one file."""
    return isinstance(data, str | Path) and Path(data).suffix in SUFFIXES and not Path(data).is_dir()


def existing(path: Any) -> Path:
    """``path`` if it is a file of a kind that :func:`read_rows` reads."""
    if not isinstance(path, str | Path) or Path(path).suffix not in SUFFIXES or not Path(path).is_file():
        raise ValueError(f"data: {str(path)!r} is not an existing file that ends in {', '.join(SUFFIXES)}")
    return Path(path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON (a list of objects), JSONL, Parquet or CSV file.

    Raises:
        ValueError: the file does not hold rows.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet  # type: ignore[import-untyped]

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":  # all text: a puzzle such as 0012 keeps its zeros
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            if any(None in row for row in rows):
                raise ValueError("a row has more cells than the header: quote cells that hold commas")
            return rows
        is_list = path.suffix == ".json" and text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, TypeError, NotImplementedError, RecursionError, csv.Error) as error:
        raise ValueError(f"data: {str(path)!r} cannot be read as {path.suffix[1:]} ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data: {str(path)!r} holds something other than rows (objects with named fields)")
    return rows


def cell(row: Row, column: str) -> str:
    """What a cell holds, as a text without blanks around it.

    >>> cell({"answer": 0}, "answer")
    '0'

    Raises:
        ValueError: it is empty, or neither a text nor a number.
    """
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or not str(value).strip():
        raise ValueError(f"the column {column!r} holds {value!r}: need a text")
    return str(value).strip()
