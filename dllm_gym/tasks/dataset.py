"""Tasks whose examples come from files or from the hub: how a question becomes a prompt."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dllm_gym.checks import choice, flag, number, whole
from dllm_gym.prompt import Chat
from dllm_gym.tasks.base import SPLITS, Example, Task
from dllm_gym.tasks.rows import SHOTS, SUFFIXES, Row, Rows, Source, as_dataset, cell, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SHOTS", "STYLES", "SUFFIXES", "DatasetTask", "PromptStyle", "Row", "Source", "cell", "read_rows"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptStyle:
    """How an answer is asked for, the same in training and evaluation.

    Attributes:
        instructions: stand in front of the first user turn; may be empty.
        prefill: how every reply begins (where the task asks for a prefill).
        reply: an answer with its working, as shots show it; ``{working}`` and ``{answer}`` are filled in, other braces
            are written twice.
        question: the user's whole text, in which ``{question}`` stands for the bare question (without what the task
            adds to it); None: the task's own text.

    Raises:
        ValueError: ``reply`` has other fields, or ``question`` lacks its own.
    """

    instructions: str = ""
    prefill: str = ""
    reply: str = "{working}\n{answer}"
    question: str | None = None

    def __post_init__(self) -> None:
        try:
            self.write("", "")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"reply={self.reply!r}: fields are {{working}} and {{answer}} ({error})") from error
        if self.question is not None and "{question}" not in self.question:
            raise ValueError(f"question={self.question!r}: need a text that holds {{question}}")

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


def chosen_style(style: str | PromptStyle | None, styles: Mapping[str, PromptStyle]) -> PromptStyle:
    """A style, or the one of that name among ``styles``; their first for None."""
    if isinstance(style, PromptStyle):
        return style
    return next(iter(styles.values())) if style is None else styles[choice("prompt_style", style, styles)]


def behind(start: str, reply: str, name: str) -> str:
    """A reply without its beginning; ValueError, which names the task, where it begins otherwise."""
    if not reply.startswith(start):
        raise ValueError(
            f"task {name!r}: the reply of the data does not begin with the prefill {start[:40]!r}: say prefilled=false"
        )
    return reply.removeprefix(start)


class DatasetTask(Task):
    """A task over rows of a dataset; a subclass says which columns there are, how to ask and how to grade.

    Nothing is read or downloaded before the first :meth:`examples` (or the first prompt with shots). A subclass
    defines :attr:`name`, :attr:`gen_length`, :attr:`hub`, :attr:`fields`, :meth:`question`, :meth:`reply` and
    :meth:`grade`; it may override :meth:`prepare`, :meth:`prefill`, :attr:`system` and :attr:`styles`.

    A ``validation`` or ``test`` split that the data lack is taken out of ``train``: the examples where the checksum of
    the question falls into a share ``held_out``. It depends on the question alone, not on its place, a seed or the
    rest, so that equal questions never stand on both sides.

    Args:
        data: where rows come from; None is the task's own place on the hub. A hub id (``owner/name``,
            ``owner/name:config``, and with a branch, tag or commit ``owner/name@revision`` or
            ``owner/name@revision:config``); one file (JSON, JSONL, Parquet or CSV with a header), which is the split
            that its name says (``test.jsonl``, ``gsm8k_test.parquet``, ``math500.jsonl``), whole, or, where it says
            none, ``train``; a folder with one file per split (``train.jsonl``, ...); or a mapping from ``train``,
            ``validation``, ``test`` (and ``shots``) to files. Cells of CSV files are read as text.
        shots: how many examples with their answers precede the question. They are the first rows of ``shots`` data if
            there are any, else the first of ``train``, which are then no training examples.
        gen_length: L; the task's own by default.
        max_prompt_chars: drop examples whose question is longer than this many characters; how many is logged and
            stands in :attr:`dropped`.
        prompt_style: a name among :attr:`styles`, or a :class:`PromptStyle`.
        prefilled: begin the reply with the style's prefill (part of the prompt, not of the L tokens).
        prefilled_in_train: False: not in the split ``train`` (as LUP's published code, in evaluation only).
        grader: one of :attr:`graders`.
        held_out: the share of ``train`` that becomes a missing ``validation`` or ``test`` split, 0 for none.

    Attributes:
        dropped: per split read so far, how many examples ``max_prompt_chars`` took out.
        style: the prompt style in use. rows: where examples come from.

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
    files: ClassVar[Mapping[str, str]] = {}
    """Names under which a split is published as one file, in small letters and digits -> split."""
    rows_of: ClassVar[type[Rows]] = Rows
    """Where rows are looked for and how they are read."""
    system: str = ""
    """Text of a system turn; none if empty."""
    graders: ClassVar[tuple[str, ...]] = ("own",)
    """How answers may be read; ``lup``: as LUP's published code reads them, for comparisons."""

    def __init__(
        self,
        *,
        data: str | Path | Mapping[str, str] | None = None,
        shots: int = 0,
        gen_length: int | None = None,
        max_prompt_chars: int | None = None,
        prompt_style: str | PromptStyle | None = None,
        prefilled: bool = True,
        prefilled_in_train: bool = True,
        grader: str = "own",
        held_out: float = 0.1,
    ):
        self.data = data
        self.shots = whole("shots", shots, least=0)
        self.gen_length = whole("gen_length", type(self).gen_length if gen_length is None else gen_length)
        self.max_prompt_chars = None if max_prompt_chars is None else whole("max_prompt_chars", max_prompt_chars)
        self.style = chosen_style(prompt_style, self.styles)
        self.prefilled = flag("prefilled", prefilled)
        self.prefilled_in_train = flag("prefilled_in_train", prefilled_in_train)
        self.grader = choice("grader", grader, self.graders)
        self.held_out = number("held_out", held_out, least=0, most=0.4)
        self.dropped: dict[str, int] = {}
        self.rows = self.rows_of(self)
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

    def bare(self, example: Example) -> str:
        """The question alone, for styles that write the rest themselves."""
        return self.question(example)

    @abstractmethod
    def reply(self, example: Example) -> str:
        """The whole reply that a shot shows, prefill included."""

    def prefill(self, example: Example) -> str:
        """How the reply begins."""
        return self.style.prefill

    def gold(self, example: Example) -> str:
        """The reply that the data hold, behind the prefill."""
        return behind(self.whole_reply(example, ""), self.reply(example), self.name)

    def whole_reply(self, example: Example, completion: str) -> str:
        """The reply that ``completion`` ends: prefill and completion."""
        return (self.prefill(example) if self.is_prefilled(example) else "") + completion

    def is_prefilled(self, example: Example) -> bool:
        """Whether its reply begins with the prefill."""
        return self.prefilled and (self.prefilled_in_train or example.get("split") != "train")

    # ---- prompts ----

    def prompt(self, example: Example) -> Chat:
        turns = [*self._shot_turns(), ("user", self._asked(example))]
        if self.style.instructions:
            turns[0] = ("user", f"{self.style.instructions}\n\n{turns[0][1]}")
        if self.system:
            turns.insert(0, ("system", self.system))
        return Chat(tuple(turns), self.prefill(example) if self.is_prefilled(example) else "")

    def _asked(self, example: Example) -> str:
        whole = self.style.question
        return self.question(example) if whole is None else whole.replace("{question}", self.bare(example))

    def _shot_turns(self) -> tuple[tuple[str, str], ...]:
        if self._shown is None:
            examples = self.rows.shots(self.shots) if self.shots else []
            if len(examples) < self.shots:
                raise ValueError(f"shots={self.shots}: task {self.name!r} has {len(examples)} rows to choose from")
            pairs = ((("user", self._asked(e)), ("assistant", self.reply(e))) for e in examples)
            self._shown = tuple(turn for pair in pairs for turn in pair)
        return self._shown

    # ---- splits ----

    def examples(self, split: str) -> Dataset:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not a split of task {self.name!r}: choose one of {', '.join(SPLITS)}")
        if split not in self._splits:
            self._splits[split] = built(self, split)
        return self._splits[split]


def built(task: DatasetTask, split: str) -> Dataset:
    """The examples of a split, those with a longer question than is wanted left out."""
    rows, cap = task.rows.besides_shots(split, task.shots), task.max_prompt_chars
    kept = [row for row in rows if cap is None or len(task.question(row)) <= cap]
    task.dropped[split] = len(rows) - len(kept)
    if task.dropped[split]:
        counts = task.dropped[split], len(rows)
        log.warning("task %r: max_prompt_chars=%s drops %d of %d examples of split %r", task.name, cap, *counts, split)
    if not kept:
        why = f"max_prompt_chars={cap} drops all {len(rows)}" if rows else "the data hold no row for it"
        raise ValueError(f"split={split!r} of task {task.name!r} is empty: {why}")
    if not task.prefilled_in_train:  # where it comes from has to be known
        kept = [{**row, "split": split} for row in kept]
    return as_dataset(kept, task.data, split)
