"""The checkpoints of a run: ``checkpoints/<rounds>``, each with a manifest, the last ones and the best one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_gym.runs.files import MANIFEST, checksum, read_manifest, sync, write_manifest

CHECKPOINTS = "checkpoints"
STATE, POLICY = "trainer.pt", "policy"
CONFIG, METRICS = "config.yaml", "metrics.csv"  # the run's, as they were; a checkpoint alone is enough to go on
NEEDED = (STATE, f"{POLICY}/config.json", f"{POLICY}/model.safetensors", CONFIG, METRICS)
BEFORE = ("checkpoint", "checkpoint.old")  # where runs of earlier versions kept their only one, without a manifest
NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of a run.

    Attributes:
        path: its folder. number: the rounds that were done; -1 for the only one of an earlier version's run.
    """

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name) if NUMBER.fullmatch(self.path.name) else -1

    @property
    def run(self) -> Path:
        return self.path.parent if self.path.name in BEFORE else self.path.parent.parent

    @property
    def config(self) -> Path:
        """The configuration that it was saved with."""
        return (self.run if self.path.name in BEFORE else self.path) / CONFIG

    @property
    def metrics(self) -> Path:
        """The metrics of the rounds before it."""
        return (self.run if self.path.name in BEFORE else self.path) / METRICS

    def check(self) -> dict[str, Any]:
        """What its manifest says, if its files are as the manifest says.

        Raises:
            ValueError: one is missing or damaged; names it.
        """
        if self.path.name in BEFORE:
            files = {f"{POLICY}/config.json", f"{POLICY}/model.safetensors", STATE}
            for name in sorted(files):
                if not (self.path / name).is_file():
                    raise ValueError(f"{self.path / name} does not exist")
            return {"files": {}}
        facts = read_manifest(self.path)
        if missing := sorted(set(NEEDED) - set(facts["files"])):
            raise ValueError(f"{self.path / MANIFEST} does not list {', '.join(missing)}")
        if facts.get("rounds") != self.number:
            raise ValueError(f"{self.path / MANIFEST} belongs to another checkpoint, of round {facts.get('rounds')}")
        for name, known in facts["files"].items():
            file = self.path / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                raise ValueError(f"{file} does not exist")
            if checksum(file) not in known:
                raise ValueError(f"{file} is damaged: {MANIFEST} has another checksum")
        return facts

    def is_whole(self) -> bool:
        try:
            self.check()
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        """How the settings ``checkpoint=`` and ``resume=`` name it."""
        return str(self.path) if self.path.name in BEFORE else f"{self.run}@{self.number}"


class Checkpoints:
    """Those of one run; ``run`` is its folder."""

    def __init__(self, run: Path):
        self.run, self.folder = run, run / CHECKPOINTS

    def all(self) -> list[Checkpoint]:
        """Oldest first, damaged ones among them."""
        old = [Checkpoint(self.run / name) for name in BEFORE if (self.run / name / STATE).is_file()]
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        numbered = [Checkpoint(path) for path in paths if NUMBER.fullmatch(path.name) and path.is_dir()]
        return old[:1] + sorted(numbered, key=lambda checkpoint: checkpoint.number)

    def whole(self) -> Iterator[Checkpoint]:
        """Those that are not damaged, newest first."""
        return (checkpoint for checkpoint in reversed(self.all()) if checkpoint.is_whole())

    def get(self, which: str = "last") -> Checkpoint:
        """The checkpoint ``first``, ``last``, ``best`` or of that number of rounds.

        Raises:
            ValueError: there is none such, or it is damaged; offers another one.
        """
        every = self.all()
        if not every:
            raise ValueError(f"{str(self.run)!r} holds no checkpoint: give a run folder of scripts/train.py")
        if which == "best":
            return self.best()
        ends = {"first": every[:1], "last": every[-1:]}
        found = ends[which] if which in ends else [c for c in every if which == str(c.number)]
        if not found:
            raise ValueError(
                f"{self.run}@{which}: there is no such checkpoint, but first, last, best and "
                f"{', '.join(str(c.number) for c in every if c.number >= 0) or 'no number'}"
            )
        self._check(found[-1])
        return found[-1]

    def best(self) -> Checkpoint:
        """That of the highest validation reward, the newest of equals."""
        rewards, damaged = self._rewards()
        if damaged:
            raise ValueError(f"{damaged[0]}{self._offer()}")
        if not rewards:
            raise ValueError(f"{self.run}@best: no checkpoint was tried on a validation split; give last or a number")
        best = max(rewards, key=lambda checkpoint: rewards[checkpoint])
        self._check(best)
        return best

    def _rewards(self) -> tuple[dict[Checkpoint, tuple[float, int]], list[ValueError]]:
        """Validation reward and number of those that have one, and what is wrong with the manifests of others."""
        rewards, damaged = {}, []
        for checkpoint in self.all():
            try:
                reward = read_manifest(checkpoint.path).get("validation") if checkpoint.number >= 0 else None
            except ValueError as error:
                damaged.append(error)
            else:
                if isinstance(reward, int | float):
                    rewards[checkpoint] = (reward, checkpoint.number)
        return rewards, damaged

    def _check(self, checkpoint: Checkpoint) -> None:
        try:
            checkpoint.check()
        except ValueError as error:
            raise ValueError(f"{error}{self._offer()}") from None

    def _offer(self) -> str:
        other = next(self.whole(), None)
        return "; no checkpoint of this run is whole" if other is None else f"; this one is whole: {other}"

    def save(self, rounds: int, write: Callable[[Path], None], keep: int, validation: float | None = None) -> None:
        """Let ``write`` fill a new checkpoint, then drop all but the last ``keep`` and the best one.

        Args:
            rounds: done until now. validation: mean reward on the validation split, if it was tried there.
        """
        new, path = self.folder / f".{rounds}.new", self.folder / str(rounds)
        self._tidy()
        new.mkdir(parents=True)
        write(new)
        files = sorted(file for file in new.rglob("*") if file.is_file())
        for file in files:
            sync(file)
        checksums = {str(file.relative_to(new)): [checksum(file)] for file in files}
        write_manifest(new, {"rounds": rounds, "validation": validation, "files": checksums})
        for folder in {file.parent for file in files}:
            sync(folder)
        if path.exists():
            path.rename(self.folder / f".{rounds}.old")
        new.rename(path)
        sync(self.folder)
        sync(self.run)
        self._prune(keep)

    def _prune(self, keep: int) -> None:
        numbered = {checkpoint.number: checkpoint for checkpoint in self.all() if checkpoint.number >= 0}
        kept = set(list(numbered)[-keep:])
        if rewards := self._rewards()[0]:
            kept.add(max(rewards.values())[1])
        for number in set(numbered) - kept:
            numbered[number].path.rename(self.folder / f".{number}.old")
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a crash or a pruning left."""
        for path in self.folder.glob(".*"):
            if path.suffix in (".new", ".old"):
                shutil.rmtree(path, ignore_errors=True)

    def refuse_later(self, number: int) -> None:
        """ValueError if a whole checkpoint of later rounds would be written over by a run that goes on from here."""
        if later := [c for c in self.all() if c.number > number and c.is_whole()]:
            raise ValueError(f"{later[-1]} is later: go on from it, or in another folder (hydra.run.dir=...)")

    def set_aside(self, number: int) -> None:
        """Rename the damaged checkpoints of later rounds, which a run that goes on from ``number`` comes to again."""
        for checkpoint in self.all():
            if checkpoint.number > number:
                name = self.folder / f"{checkpoint.number}.damaged"
                shutil.rmtree(name, ignore_errors=True)
                checkpoint.path.rename(name)


def find_checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint that ``RUN@first``, ``RUN@last``, ``RUN@best``, ``RUN@<rounds>`` or its own folder names.

    None if ``name`` is none of these: a run folder, that is.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    path = Path(name)
    run, at, which = name.rpartition("@")
    if (path / STATE).is_file() and path.name in BEFORE:
        return Checkpoint(path)
    if path.parent.name == CHECKPOINTS and NUMBER.fullmatch(path.name):
        return Checkpoints(path.parent.parent).get(path.name)
    return Checkpoints(Path(run)).get(which) if at and not path.is_dir() else None
