"""The folder that a command writes into, and the run folders that it reads."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from agents.runs.strangers import Allowed, read_config
from dllm_gym.runs.checkpoints import (
    BEFORE,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    POLICY,
    Checkpoint,
    Checkpoints,
    find_checkpoint,
)
from dllm_gym.runs.files import atomically, noted, read_manifest, verify

if TYPE_CHECKING:
    from dllm_gym.deciders.policy import Policy

LOCK, LOG, OVERRIDES = ".lock", "run.log", ".hydra/overrides.yaml"
GENERATIONS = "generations.jsonl"
RESULTS = ("results.json", "results.csv", "results.md", "results.png", "fronts.json", "datasets.csv", "datasets.json")
GROUPS = ("model", "task", "env", "reward", "policy", "distribution", "agent")  # what every run's configuration has
SECRET = re.compile(r"\$\{\s*oc\.env\s*:[^}]*(TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY)", re.IGNORECASE)


class RunFolder:
    """The folder of the running command. While it is entered, no other process enters it.

    What is written becomes a run with ``begin``; a command that ends before leaves the folder as it was.

    Raises:
        ValueError: another process is in it, or the configuration would write a secret into it.
    """

    def __init__(self, cfg: DictConfig):
        self.path = Path(HydraConfig.get().runtime.output_dir)
        self.cfg = cfg
        self.log: logging.Handler | None = None
        if secret := SECRET.search(OmegaConf.to_yaml(cfg)):
            raise ValueError(f"{secret[0]}}}: a secret of the environment would be written into {CONFIG}")

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        self.lock = lock(self.path / LOCK)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.log:
            logging.getLogger().removeHandler(self.log)
            self.log.close()
        (self.path / LOCK).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()
        self.lock.close()

    def refuse_another_run(self, resumes: str | None = None) -> None:
        """ValueError if the folder holds a run, which this command would write over; not if that has left a file of the
        name ``resumes``, and is no training."""
        if resumes is not None and (self.path / resumes).is_file() and not (self.path / CHECKPOINTS).exists():
            (self.path / OVERRIDES).unlink(missing_ok=True)
            return
        if held := [n for n in (CONFIG, METRICS, CHECKPOINTS, *BEFORE, *RESULTS) if (self.path / n).exists()]:
            raise ValueError(
                f"hydra.run.dir={self.path} holds a run already ({', '.join(held)}): choose another folder, or go on "
                "with it (train.py resume=auto)"
            )

    def begin(self, began: Sequence[str] = ()) -> None:
        """Write what the run is: its resolved configuration, and for a new one the command line: ``began``, which the
        run began with that it goes on from, and what was chosen since."""
        if not (self.path / OVERRIDES).exists():
            (self.path / OVERRIDES).parent.mkdir(exist_ok=True)
            overrides = [*began, *(o for o in HydraConfig.get().overrides.task if o not in began)]
            atomically(self.path / OVERRIDES, lambda path: path.write_text(OmegaConf.to_yaml(overrides)))
        noted(self.path / CONFIG, lambda path: OmegaConf.save(self.cfg, path, resolve=True))
        self.log = logging.FileHandler(self.path / LOG)
        self.log.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
        logging.getLogger().addHandler(self.log)

    def drop_results(self) -> None:
        """Of the rounds before those that come now."""
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """ValueError if something in a run folder is a link: what is written there, or removed, would be elsewhere."""
    for inner in (folder, folder / ".hydra", folder / CHECKPOINTS, *(folder / name for name in BEFORE)):
        for path in inner.iterdir() if inner.is_dir() else ():
            if path.is_symlink():
                raise ValueError(f"{path} is a link: a run folder holds its own files")


def lock(path: Path) -> IO[str]:
    """An open file that no other process has locked; closing it, or the end of the process, gives it free."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file  # else its owner removed it while it ended
        except BlockingIOError:
            file.close()
            raise ValueError(f"hydra.run.dir={path.parent}: another process is running in this folder") from None
        file.close()


@contextmanager
def naming(setting: str, value: Any) -> Iterator[None]:
    """Say which setting a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting}={str(value)!r}: {error}") from None


def allowed(cfg: DictConfig) -> Allowed:
    """What the configurations of run folders may name: what ``cfg`` names and the packages in ``cfg.trust``."""
    trust = cfg.trust
    if not isinstance(trust, ListConfig) or not all(isinstance(name, str) and name for name in trust):
        raise ValueError(f"trust={trust}: need a list of packages, e.g. [my_package]")
    return Allowed(trust, OmegaConf.to_container(cfg, resolve=False))


def load_config(path: Path, may: Allowed) -> DictConfig:
    """The resolved configuration of a run, as data: see ``strangers``.

    Args:
        may: what the run may name.

    Raises:
        ValueError: it is none, names what it may not name, or is damaged.
    """
    saved = read_config(path)
    may.check(saved, path)
    if (path.parent / CHECKPOINTS).is_dir():  # older runs have no manifest
        manifest = read_manifest(path.parent)
        if path.name not in manifest["files"]:
            raise ValueError(f"{path} is not in the manifest beside it")
        verify(path, manifest)
    if lacking := [name for name in GROUPS if not isinstance(saved.get(name), dict)]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: give a run folder of scripts/train.py")
    return OmegaConf.create(saved)


def load_run(name: str | Path, may: Allowed) -> tuple[DictConfig, Checkpoint]:
    """A run's configuration and checkpoint; ValueError if one of them cannot be used.

    Args:
        name: a run folder (its ``config.yaml`` and last checkpoint), or a checkpoint with the configuration that it
            was saved with: ``RUN@last``, ``RUN@best``, ``RUN@<rounds>``, or its folder.
        may: what the run may name.
    """
    checkpoint = find_checkpoint(str(name))
    if checkpoint is not None:
        return load_config(checkpoint.config, may), checkpoint
    folder = Path(name)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{name} {what}; give a run folder of scripts/train.py")
    if not (folder / CONFIG).exists() and not Checkpoints(folder).all():
        raise ValueError(f"{name} is neither a run folder of scripts/train.py (no {CONFIG}) nor a saved policy")
    try:
        saved = load_config(folder / CONFIG, may)
    except ValueError as error:
        other = next(Checkpoints(folder).whole(), None)
        offer = f"; {other} has a copy" if other is not None and other.number >= 0 else ""
        raise ValueError(f"{error}{offer}") from None
    return saved, Checkpoints(folder).get()


def is_alone(name: str) -> bool:
    """Whether a policy is saved without its run: a shipped one, a folder or a repository of the hub."""
    from dllm_gym.deciders.saved import CONFIG as SETTINGS
    from dllm_gym.deciders.saved import HUB_ID, shipped

    here = Path(name).parts[:1]
    remote = HUB_ID.fullmatch(name) and not (here and Path(here[0]).exists())
    return (Path(name) / SETTINGS).is_file() or name in shipped() or bool(remote)


def short(name: str) -> str:
    """How tables and pages call a checkpoint: RUN@100 without the folders above."""
    path = Path(name)
    return f"{path.parents[1].name}@{path.name}" if path.parent.name == CHECKPOINTS else path.name


def config_of(policy: Policy, cfg: DictConfig) -> DictConfig:
    """The part of a run's configuration that a policy knows about itself; ``cfg`` says the rest."""
    manner = policy.manner
    if manner is None:
        raise ValueError("it was saved without how it wants to be played: give the folder of its run")
    same = manner.task in (None, getattr(hydra.utils.get_object(cfg.task._target_), "name", None))
    task = cfg.task if same else {"_target_": "dllm_gym.tasks.make_task", "task": manner.task}
    meaning = {"_target_": "hydra.utils.get_class", "path": f"dllm_gym.deciders.distributions.{manner.distribution}"}
    both = {"train": meaning, "evaluate": meaning}
    heat = {"temperature": manner.temperature, "evaluate_temperature": manner.temperature}
    return OmegaConf.create(
        {
            "model": {**cfg.model, **manner.model},
            "task": task,
            "env": {**cfg.env, **manner.env},
            "reward": {**cfg.reward, **({"alpha": list(manner.alpha)} if manner.alpha else {})},
            "distribution": {**both, **heat},
        }
    )


def load_policy(name: str | Path, cfg: DictConfig, setting: str = "checkpoint") -> tuple[Policy, DictConfig]:
    """The policy that a run saved, and the run's configuration.

    Args:
        name: as for ``load_run``, or of a policy that is saved alone. setting: which one gives the name, for the error.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or its configuration names what it may not name.
    """
    from dllm_gym.deciders.policy import Policy

    with naming(setting, name):
        if is_alone(str(name)):
            policy = Policy.load(name)
            return policy, config_of(policy, cfg)
        saved, checkpoint = load_run(name, allowed(cfg))
        policy_class = hydra.utils.get_class(str(saved.policy.get("_target_")))
        if not issubclass(policy_class, Policy):
            raise ValueError(f"policy._target_={saved.policy._target_!r} is no policy")
        return policy_class.from_pretrained(checkpoint.path / POLICY).eval(), saved
