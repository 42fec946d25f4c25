"""Files that appear whole or not at all, with checksums beside them: what a crash or a bad disk does is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # checksums of the files in its folder
MEBIBYTE = 2**20


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour, then put it in place of ``path``; it is on the disk on return."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp{path.suffix}")  # nobody can link it elsewhere
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or which names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def noted(path: Path, write: Callable[[Path], Any]) -> None:
    """``atomically``, and the folder's manifest has the file's checksum.

    The manifest is written first and keeps the checksum of the old file until the new one is there: a crash leaves a
    file that it knows.
    """

    def write_and_note(temporary: Path) -> None:
        write(temporary)
        try:
            files = read_manifest(path.parent)["files"]
        except ValueError:
            files = {}
        accepted = [checksum(temporary)]
        if path.is_file() and (old := checksum(path)) in files.get(path.name, [old]):
            accepted.append(old)
        write_manifest(path.parent, {"files": {**files, path.name: accepted}})

    atomically(path, write_and_note)
    files = read_manifest(path.parent)["files"]
    write_manifest(path.parent, {"files": {**files, path.name: files[path.name][:1]}})


def read(path: Path, most: int = 64 * MEBIBYTE) -> str:
    """The text of a file, which is what the manifest of its folder says, if that knows it.

    Raises:
        ValueError: there is no such file, or it is no text, larger than ``most`` bytes or damaged.
    """
    text = read_unverified(path, most)
    if (path.parent / MANIFEST).is_file():
        verify(path, read_manifest(path.parent))
    return text


def read_unverified(path: Path, most: int) -> str:
    """The text of a file, whatever a manifest says; a link or a device is none."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is no file: a run folder holds no links")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"{path} has more than {most:,} bytes")
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no text: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def verify(path: Path, manifest: Mapping[str, Any]) -> None:
    """ValueError if a file is not what the manifest says of it; one that the manifest does not know is accepted."""
    known = manifest["files"].get(path.name)
    if known is not None and checksum(path) not in known:
        raise ValueError(f"{path} is damaged: {MANIFEST} beside it has another checksum")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` as the folder's manifest.

    Args:
        facts: ``files`` maps names to the checksums that they may have; the rest is free.
    """
    whole = {**facts, "sha256": seal(facts)}
    atomically(folder / MANIFEST, lambda path: path.write_text(json.dumps(whole, indent=2) + "\n"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``write_manifest`` was given; ValueError if there is none, or it is damaged."""
    path = folder / MANIFEST
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is no file: a run folder holds no links")
    try:
        with path.open("rb") as file:
            facts = json.loads(file.read(MEBIBYTE + 1))
        if facts.pop("sha256") != seal(facts):
            raise ValueError("its own checksum differs")
        if not all(isinstance(known, list) for known in facts["files"].values()):
            raise ValueError("its checksums are no lists")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return facts


def seal(facts: Mapping[str, Any]) -> str:
    """The checksum of a manifest's own content."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
