"""Tasks whose examples come from files or from the hub: where rows are read, and how a question becomes a prompt."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dllm_gym.checks import choice, flag, number, whole
from dllm_gym.prompt import Chat
from dllm_gym.tasks.base import SPLITS, Example, Task

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SHOTS = "shots"  # a source besides the splits: where examples with their answers are taken from
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
ALIASES = {"validation": ("valid", "val", "dev")}  # other names of a split's file in a folder

HUB_ID = re.compile(
    r"(?P<hub>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@:\s]+))?(?::(?P<config>[^@:]+))?"
)

Row = dict[str, Any]


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


@dataclass(frozen=True)
class PromptStyle:
    """How an answer is asked for, the same in training and evaluation.

    Attributes:
        instructions: stand in front of the first user turn; may be empty.
        prefill: how every reply begins (where the task asks for a prefill).
        reply: an answer with its working, as shots show it; ``{working}`` and ``{answer}`` are filled in, other braces
            are written twice.

    Raises:
        ValueError: ``reply`` has other fields.
    """

    instructions: str = ""
    prefill: str = ""
    reply: str = "{working}\n{answer}"

    def __post_init__(self) -> None:
        try:
            self.write("", "")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"reply={self.reply!r}: fields are {{working}} and {{answer}} ({error})") from error

    def write(self, working: str, answer: str) -> str:
        """A whole reply in this style.

        >>> print(STYLES["xml"].write("48 + 24 = 72", "72"))
        <reasoning>
        48 + 24 = 72
        </reasoning>
        <answer>
        72
        </answer>
        """
        return self.reply.format(working=working, answer=answer)


STYLES: Mapping[str, PromptStyle] = {
    "xml": PromptStyle(
        instructions=(
            "Think before you answer. Write your thoughts between <reasoning> and </reasoning>, then only the result "
            "between <answer> and </answer>:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
        ),
        prefill="<reasoning>\n",
        reply="<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>",
    ),
    "chat": PromptStyle(),
}


class DatasetTask(Task):
    """A task over rows of a dataset; a subclass says which columns there are, how to ask and how to grade.

    Nothing is read or downloaded before the first :meth:`examples` (or the first prompt with shots). A subclass
    defines :attr:`name`, :attr:`gen_length`, :attr:`hub`, :attr:`fields`, :meth:`question`, :meth:`reply` and
    :meth:`grade`; it may override :meth:`prepare`, :meth:`prefill`, :attr:`system` and :attr:`styles`.

    A split that the data lack is taken out of ``train``: examples become ``validation`` or ``test`` where the checksum
    of their question falls into a share ``held_out``. It depends on the question alone, not on its place, a seed or the
    rest, so that equal questions never stand on both sides.

    Args:
        data: where rows come from; None is the task's own place on the hub. A hub id (``owner/name``,
            ``owner/name:config``, and with a branch, tag or commit ``owner/name@revision`` or
            ``owner/name@revision:config``); one file (JSON, JSONL, Parquet or CSV with a header), out of which all
            three splits are taken; a folder with one file per split (``train.jsonl``, ``test.parquet``, ...); or a
            mapping from ``train``, ``validation``, ``test`` (and ``shots``) to files. Cells of CSV files are read as
            text.
        shots: how many examples with their answers precede the question. They are the first rows of ``shots`` data if
            there are any, else the first of ``train``, which are then no training examples.
        gen_length: L; the task's own by default.
        max_prompt_chars: drop examples whose question is longer than this many characters; how many is logged and
            stands in :attr:`dropped`.
        prompt_style: a name among :attr:`styles`, or a :class:`PromptStyle`.
        prefilled: begin the reply with the style's prefill (part of the prompt, not of the L tokens).
        held_out: the share of ``train`` that becomes a missing ``validation`` or ``test`` split, 0 for none.

    Attributes:
        dropped: per split read so far, how many examples ``max_prompt_chars`` took out.
        style: the prompt style in use.

    Raises:
        ValueError: a setting is wrong, or (at the first use) there are no such data or columns.
    """

    name: str
    gen_length: int
    hub: ClassVar[Mapping[str, Source]] = {}
    """Split (or ``"shots"``) -> where it is on the hub."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Columns that every row must have."""
    styles: ClassVar[Mapping[str, PromptStyle]] = STYLES
    """The named prompt styles; the first is the default."""
    system: str = ""
    """Text of a system turn; none if empty."""

    def __init__(
        self,
        *,
        data: str | Path | Mapping[str, str] | None = None,
        shots: int = 0,
        gen_length: int | None = None,
        max_prompt_chars: int | None = None,
        prompt_style: str | PromptStyle | None = None,
        prefilled: bool = True,
        held_out: float = 0.1,
    ):
        self.data = data
        self.shots = whole("shots", shots, least=0)
        self.gen_length = whole("gen_length", type(self).gen_length if gen_length is None else gen_length)
        self.max_prompt_chars = None if max_prompt_chars is None else whole("max_prompt_chars", max_prompt_chars)
        self.style = self._choose(prompt_style)
        self.prefilled = flag("prefilled", prefilled)
        self.held_out = number("held_out", held_out, least=0, most=0.4)
        self.dropped: dict[str, int] = {}
        self._sources = self._locate(data)
        self._rows: dict[str, list[Row]] = {}  # per source, prepared
        self._splits: dict[str, Dataset] = {}
        self._shown: tuple[tuple[str, str], ...] | None = None  # turns of the shots

    # ---- what a subclass says ----

    def prepare(self, row: Row) -> Row | None:
        """The example that a raw row makes (its fields as they are by default); None leaves the row out.

        Raises:
            ValueError: the row makes no example; whoever reads the row adds where it stands.
        """
        return row

    @abstractmethod
    def question(self, example: Example) -> str:
        """The text of the user turn, without the style's instructions."""

    @abstractmethod
    def reply(self, example: Example) -> str:
        """The whole reply that a shot shows, prefill included."""

    def prefill(self, example: Example) -> str:
        """How the reply begins."""
        return self.style.prefill

    def whole_reply(self, example: Example, completion: str) -> str:
        """The reply that ``completion`` ends: prefill and completion."""
        return (self.prefill(example) if self.prefilled else "") + completion

    # ---- prompts ----

    def prompt(self, example: Example) -> Chat:
        turns = [*self._shot_turns(), ("user", self.question(example))]
        if self.style.instructions:
            turns[0] = ("user", f"{self.style.instructions}\n\n{turns[0][1]}")
        if self.system:
            turns.insert(0, ("system", self.system))
        return Chat(tuple(turns), self.prefill(example) if self.prefilled else "")

    def _shot_turns(self) -> tuple[tuple[str, str], ...]:
        if self._shown is None:
            examples = self._shot_examples() if self.shots else []
            if len(examples) < self.shots:
                raise ValueError(f"shots={self.shots}: task {self.name!r} has {len(examples)} rows to choose from")
            pairs = ((("user", self.question(e)), ("assistant", self.reply(e))) for e in examples)
            self._shown = tuple(turn for pair in pairs for turn in pair)
        return self._shown

    def _shot_examples(self) -> list[Row]:
        return (self._read(SHOTS) if SHOTS in self._sources else self._part("train"))[: self.shots]

    def _choose(self, style: str | PromptStyle | None) -> PromptStyle:
        if isinstance(style, PromptStyle):
            return style
        if style is None:
            return next(iter(self.styles.values()))
        return self.styles[choice("prompt_style", style, self.styles)]

    # ---- splits ----

    def examples(self, split: str) -> Dataset:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not a split of task {self.name!r}: choose one of {', '.join(SPLITS)}")
        if split not in self._splits:
            self._splits[split] = self._build(split)
        return self._splits[split]

    def _build(self, split: str) -> Dataset:
        from datasets import Dataset

        rows = self._part(split)
        if split == "train" and SHOTS not in self._sources:
            rows = rows[self.shots :]
        cap = self.max_prompt_chars
        kept = [row for row in rows if cap is None or len(self.question(row)) <= cap]
        self.dropped[split] = len(rows) - len(kept)
        if self.dropped[split]:
            log.warning(
                "task %r: max_prompt_chars=%s drops %d of %d examples of split %r",
                self.name, cap, self.dropped[split], len(rows), split,
            )  # fmt: skip
        if not kept:
            why = f"max_prompt_chars={cap} drops all {len(rows)}" if rows else "the data hold no row for it"
            raise ValueError(f"split={split!r} of task {self.name!r} is empty: {why}")
        columns = dict.fromkeys(column for row in kept for column in row)  # from_list takes those of the first row only
        try:
            return Dataset.from_list([{column: row.get(column) for column in columns} for row in kept])
        except Exception as error:  # Arrow has a kind of its own for every way in which rows can differ
            raise ValueError(
                f"data={self.data!r}: a column of split {split!r} holds values of different types ({error})"
            ) from error

    def _part(self, split: str) -> list[Row]:
        """The rows of a split: its own source, or its share of ``train``."""
        missing = [name for name in ("validation", "test") if name not in self._sources]
        if split in self._sources and split != "train":
            return self._read(split)
        if "train" not in self._sources or (split in missing and not self.held_out):
            raise ValueError(
                f"split={split!r}: task {self.name!r} has no such data (data={self.data!r} gives "
                f"{', '.join(self._sources) or 'nothing'}); name a file, a folder or files by split with task.data=..."
            )
        return [row for row in self._read("train") if self._home(row, missing) == split]

    def _home(self, row: Row, missing: Iterable[str]) -> str:
        """``train``, or the missing split that a row of ``train`` is given to."""
        place = zlib.crc32(self.question(row).encode(errors="replace")) / 2**32
        shares = {name: start for start, name in enumerate(("validation", "test")) if name in missing}
        for name, start in shares.items():
            if start * self.held_out <= place < (start + 1) * self.held_out:
                return name
        return "train"

    # ---- reading ----

    def _read(self, key: str) -> list[Row]:
        """The prepared rows of one source."""
        if key not in self._rows:
            examples = [self._example(row, number) for number, row in enumerate(self._load(key), 1)]
            self._rows[key] = [example for example in examples if example is not None]
        return self._rows[key]

    def _example(self, row: Row, number: int) -> Row | None:
        """The example of a row, checked as far as the prompt needs it."""
        try:
            lacking = [field for field in self.fields if field not in row]
            if lacking:
                raise ValueError(
                    f"lacks the columns {', '.join(lacking)} that task {self.name!r} needs; it has "
                    f"{', '.join(map(str, row))}"
                )
            example = self.prepare(row)
            if example is not None:
                self.question(example)
        except Exception as error:  # cells may hold anything, a subclass may stumble over it in any way
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            place = getattr(row, "place", f"row {number} of {self.data!r}")
            raise ValueError(f"data: {place}: {kind}{str(error)[:500]}") from error
        return example

    def _load(self, key: str) -> list[Row]:
        source = self._sources[key]
        if isinstance(source, Source):
            return self._download(source)
        return [
            FoundRow(row, f"row {number} of {str(path)!r}")
            for path in source
            for number, row in enumerate(read_rows(path), 1)
        ]

    def _download(self, source: Source) -> list[Row]:
        from datasets import load_dataset

        try:
            rows = load_dataset(source.hub, source.config, split=source.split, revision=source.revision).to_list()
        except Exception as error:  # the hub client raises a dozen kinds: offline, gated, unknown, malformed
            raise ValueError(
                f"data={self.data!r}: task {self.name!r} cannot load split {source.split!r} of {source.hub} from the "
                f"hub ({type(error).__name__}: {str(error)[:200]}). Check the connection (for data behind a login, "
                "`hf auth login`), or name local files that exist with task.data=FILE_OR_FOLDER"
            ) from error
        where = f"{source.split!r} of {source.hub}"
        return [FoundRow(row, f"row {number} of split {where}") for number, row in enumerate(rows, 1)]

    def _locate(self, data: Any) -> dict[str, Source | list[Path]]:
        """Split (or ``"shots"``) -> where its rows are; touches no network."""
        if data is None:
            return dict(self.hub)
        if isinstance(data, Mapping):
            unknown = [key for key in data if key not in (*SPLITS, SHOTS)]
            if unknown or not data:
                raise ValueError(f"data={dict(data)!r}: need files by split, {', '.join((*SPLITS, SHOTS))}")
            return {key: [existing(path)] for key, path in data.items()}
        if not isinstance(data, str | Path) or not str(data).strip():
            raise ValueError(f"data={data!r}: need a hub id, a file, a folder, or files by split")
        if Path(data).is_dir():
            return self._in_folder(Path(data))
        if Path(data).suffix in SUFFIXES:
            return {"train": [existing(data)]}
        hub = HUB_ID.fullmatch(str(data))
        if not hub or set(SUFFIXES) & {suffix.lower() for suffix in Path(data).suffixes}:  # k.jsonl.gz is a file
            raise ValueError(
                f"data={data!r} is no file that ends in {', '.join(SUFFIXES)}, no folder that exists and no hub id "
                "owner/name, owner/name:config, owner/name@revision or owner/name@revision:config"
            )
        splits = {key: own.split for key, own in self.hub.items()} or {"train": "train"}
        return {key: Source(split=split, **hub.groupdict()) for key, split in splits.items()}

    def _in_folder(self, folder: Path) -> dict[str, Source | list[Path]]:
        found: dict[str, Source | list[Path]] = {}
        for key in (*SPLITS, SHOTS):
            own = (self.hub[key].split,) if key in self.hub else ()
            for name in dict.fromkeys((*own, key, *ALIASES.get(key, ()))):
                files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and is_shard(p.stem, name))
                if files:
                    found[key] = files
                    break
        if not found:
            raise ValueError(f"data={str(folder)!r}: no file like train.jsonl or test.parquet in this folder")
        return found


def is_shard(stem: str, name: str) -> bool:
    """Whether a file of that stem is ``name`` or one of its pieces, ``name-00000-of-00003``."""
    return stem == name or (stem.startswith(f"{name}-") and "-of-" in stem)


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
