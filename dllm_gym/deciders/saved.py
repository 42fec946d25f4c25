"""Where saved policies lie: folders, runs, those that ship with the package, repositories of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from dllm_gym.runs.checkpoints import CHECKPOINTS, POLICY, Checkpoint, Checkpoints, find_checkpoint
from dllm_gym.runs.files import read_unverified

CONFIG, WEIGHTS, RESULTS, PICTURE = "config.json", "model.safetensors", "results.json", "front.png"
SHIPPED = Path(__file__).parent / "shipped"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SIZE = 2**20  # bytes of a config.json


def shipped() -> list[str]:
    """The names of the policies that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def checkpoint_of(source: str) -> Checkpoint | None:
    """The checkpoint that ``RUN``, ``RUN@last``, ``RUN@best``, ``RUN@100`` or its own folder names; None if none does.

    Raises:
        ValueError: the run has no such checkpoint, or it is damaged.
    """
    run, at, _ = source.rpartition("@")
    if Path(source).is_dir():
        found = find_checkpoint(source)
        runs = Checkpoints(Path(source))
        return found or (runs.get() if runs.all() or (Path(source) / CHECKPOINTS).is_dir() else None)
    return find_checkpoint(source) if at and Path(run).is_dir() else None


def locate(source: str | Path, **download: Any) -> Path:
    """The folder with a policy's files.

    Args:
        source: a folder that ``save_pretrained`` wrote, the name of a shipped policy, a run (``RUN``, ``RUN@best``,
            ``RUN@100``) or the folder of one of its checkpoints, or a repository of the hub (``owner/name``,
            ``owner/name@revision``).
        download: see ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    name, folder = str(source), Path(source)
    if (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
        return folder
    if name in shipped():
        return SHIPPED / name
    checkpoint = checkpoint_of(name)
    if checkpoint is not None:
        return checkpoint.path / POLICY
    if folder.is_dir():
        raise ValueError(f"{name!r} is no saved policy: the folder holds neither {CONFIG} nor a run's {CHECKPOINTS}/")
    return _download(name, download)


def _download(source: str, settings: dict[str, Any]) -> Path:
    """The folder with a hub repository's files."""
    if not HUB_ID.fullmatch(source):
        raise ValueError(
            f"{source!r} is no saved policy: give a folder, a run, a repository of the hub (owner/name)"
            f"{''.join(f', {name}' for name in shipped())}"
        )
    repository, _, revision = source.partition("@")
    settings = {**settings, **({"revision": revision} if revision else {})}
    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS, RESULTS, PICTURE], **settings))
    except Exception as error:  # of many kinds: no such repository, no right to read it, no network
        said = " ".join(str(error).split())
        raise ValueError(f"{source!r} is no folder, and no readable repository of the hub: {said}") from error


def read_config(folder: Path) -> Mapping[str, Any]:
    """What a policy's ``config.json`` says; it names the policy's class.

    Raises:
        ValueError: there is none, or it is something else.
    """
    path = folder / CONFIG
    try:
        if path.is_symlink():  # a downloaded file is a link into the hub's cache
            path = path.resolve()
        config = json.loads(read_unverified(path, SIZE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not a saved policy: cannot read {CONFIG} ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("policy"), str):
        raise ValueError(f"{folder / CONFIG} does not describe a policy")
    return config
