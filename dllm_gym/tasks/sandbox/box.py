"""The sandboxes: what they promise, their settings, and their verdicts."""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_gym.tasks.grading.workers import cores
from dllm_gym.tasks.sandbox.folders import SYSTEM, environment, erase, others, shown, third_party
from dllm_gym.tasks.sandbox.nursery import Nursery

log = logging.getLogger(__name__)

TRIES = 3  # a sandbox that cannot start (no memory, no process left, killed) is tried again
MOST_CORES = 4  # that a program is told of, or a default pool would be larger than it may have
LIMITS = {"memory": 512, "processes": 128, "file_size": 16, "disk": 64, "files": 128, "output": 1 << 16}
COMMON = (
    "abc bisect collections copy dataclasses datetime enum functools heapq inspect io itertools json linecache math "
    "operator os random re statistics string struct sys tempfile textwrap threading time traceback types typing"
)


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Attributes:
        passed: the program and then the check ran to their end.
        reason: ``passed``, ``failed`` (an exception, see the end of ``output``), ``timeout``, ``memory``,
            ``processes``, ``killed by signal N`` or ``ended early with status N``.
        output: the beginning of what it wrote to standard output and error.
    """

    passed: bool
    reason: str
    output: str


class Sandbox:
    """Runs untrusted Python programs, each in a process tree of its own that ends with the verdict.

    Every program is loaded from a file, as a module called ``solution``, in a fork of an interpreter that has run no
    program: with limits, an empty working directory that is gone afterwards, nothing of our environment, the same
    order of sets in every run, ``/dev/null`` as its input, and capped output. Linux only.

    "Passed" means that the process which loaded the program ran the check to its last line: it then says a secret.
    Ending early (``os._exit(0)``, ``exec``, signals) does not help. Nothing looks for forgers: program and check share
    one interpreter, as in every benchmark of this kind, and a program that is written to pass without solving (values
    that equal everything, a search through its callers' frames) does.

    Args:
        timeout: seconds of processor time per program, of all its processes together, so that a busy machine fails
            nobody; a program that waits is ended after eight times as long by the clock.
        packages: show the installed third-party packages to the program (standard library only, if not), but those
            with a benchmark's solutions.
        preload: modules that all programs find loaded, for speed.
        workers: programs at once in :meth:`run_all`; by default the cores that this process may use.
        limits: ``memory`` (MiB, private per process, and resident of all together), ``processes`` (and threads),
            ``file_size`` (MiB per file), ``disk`` (MiB of all files; ``file_size`` more in ``/dev/shm``), ``files``
            (open per process), ``output`` (bytes that are kept).

    Raises:
        ValueError: a limit makes no sense.

    >>> verdict = RlimitSandbox(timeout=5.0).run("def double(x): return 2 * x", "assert double(4) == 8")
    >>> verdict.passed, verdict.reason
    (True, 'passed')
    """

    name: ClassVar[str]
    advice: ClassVar[str]
    """What a user can do on whose machine it does not work."""

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        packages: bool = False,
        preload: Sequence[str] = (),
        workers: int | None = None,
        **limits: int,
    ):
        if unknown := sorted(set(limits) - set(LIMITS)):
            raise ValueError(f"{unknown[0]}={limits[unknown[0]]!r}: no such limit; there are {', '.join(LIMITS)}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout!r}: need a number of seconds above 0")
        limits = {**LIMITS, **limits}
        self.workers = cores() if workers is None else workers
        for setting, value in {**limits, "workers": self.workers}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{setting}={value!r}: need a whole number of at least 1")
        self.mark = secrets.token_hex(8)  # stands in the command line of all its processes
        folders = third_party() if packages else []
        self.settings: dict[str, Any] = {
            **limits,
            "timeout": float(timeout),
            "namespaces": isinstance(self, NamespaceSandbox),
            "packages": folders,
            "shown": shown(folders),
            "hidden": others(folders),
            "links": [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path)],
            "python": os.path.realpath(sys.executable),
            "cores": min(cores(), MOST_CORES),
            "preload": [*COMMON.split(), *preload],
            "environment": environment(),
        }
        self._nursery: Nursery | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_nursery": None}  # a copy starts its own

    def prove(self) -> None:
        """Make sure, once, that it works here (a tenth of a second); every first run does it.

        Raises:
            ValueError: it does not.
        """
        if self._nursery is not None and self._nursery.ours:
            return
        if sys.platform != "linux":
            raise ValueError(f"sandbox={self.name!r} needs Linux, and this is {sys.platform}")
        nursery = Nursery(self.settings, self.mark)
        trial = self._attempt(nursery, "", "")
        if not trial.passed:
            why = f"{trial.reason} {trial.output}".strip()
            raise ValueError(f"sandbox={self.name!r} does not work on this machine: {why}. {self.advice}")
        self._nursery = nursery

    def run(self, program: str, check: str = "") -> Verdict:
        """Whether ``program`` and then ``check``, in the same module, run to their end.

        Raises:
            ValueError: the sandbox does not work on this machine.
            RuntimeError: it does not work any more; nothing that a program does causes this.
        """
        self.prove()
        assert self._nursery
        for _ in range(TRIES):
            verdict = self._attempt(self._nursery, program, check)
            if not verdict.reason.startswith("sandbox"):
                return verdict
        raise RuntimeError(f"{type(self).__name__} does not start any more: {verdict.reason} {verdict.output}")

    def run_all(self, programs: Sequence[str], checks: Sequence[str] | None = None) -> list[Verdict]:
        """The verdicts on several programs, in order; ``workers`` of them run at once.

        Raises:
            ValueError: not one check per program, or as :meth:`run`.
            RuntimeError: as :meth:`run`.
        """
        checks = [""] * len(programs) if checks is None else checks
        if len(checks) != len(programs):
            raise ValueError(f"checks: there are {len(checks)} for {len(programs)} programs")
        self.prove()
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.run, programs, checks))

    @contextmanager
    def _folder(self) -> Iterator[str]:
        """Where the program's files go, if not into a file system of its own."""
        yield ""

    def _attempt(self, nursery: Nursery, program: str, check: str) -> Verdict:
        with self._folder() as folder:
            reason, _, output = nursery.ask(folder, program, check).partition("\n")
        return Verdict(reason == "passed", reason, output)


class NamespaceSandbox(Sandbox):
    """A sandbox of Linux namespaces: what is outside does not exist for the program.

    The file system holds the standard library, shared libraries, the system's commands and time zones (read-only), a
    few devices, a bare ``/etc``, and ``/tmp``, ``/src`` and ``/dev/shm`` in memory: no home, no project, no ``/proc``.
    The network is a loopback interface; no right of root is to be had. When the program ends, its time is up, or the
    scorer is gone, the kernel kills all its processes, daemons too, and files and shared memory go with them.

    A filter (x86-64, 64-bit ARM) refuses system calls that reach beyond namespaces and limits, or are seldom needed and
    often broken: sockets but Unix and internet ones, keys, io_uring, bpf, userfaultfd, perf, tracing, memory that no
    limit counts (System V, ``memfd_create``). For the others the kernel is shared, as by containers. Not limited: what
    it keeps in the buffers of sockets and pipes (less than a MiB for each open file).

    Needs a kernel of 5.12 or newer that allows user namespaces to this user (many container runtimes do not).
    """

    name = "namespace"
    advice = (
        "Allow user namespaces (Linux 5.12 or newer; in containers often a setting of the runtime), or accept weaker "
        "protection by asking for sandbox=rlimit"
    )


class RlimitSandbox(Sandbox):
    """Limits only, for machines without namespaces: against accidents, not against intent.

    **Not** held: the program is this user. It may read, change and delete the user's files outside its directory, use
    the network, read ``/proc``, kill the user's processes, the scorer among them, and fill more than ``disk``. The
    number of processes is watched, not enforced for root. A program that kills all processes above it leaves its own
    behind, a scorer that is killed the directory; POSIX shared memory stays as well, and files that only root may
    remove (a warning says where). Use it where the whole machine is a sandbox, such as a container for nothing else.
    """

    name = "rlimit"
    advice = "It needs Linux 5.3 or newer, with /proc"

    @contextmanager
    def _folder(self) -> Iterator[str]:
        folder = tempfile.mkdtemp(prefix="dllm_gym-")
        try:
            yield folder
        finally:
            if not erase(folder):
                log.warning("sandbox='rlimit': a program has left files in %s that cannot be removed", folder)


SANDBOXES: dict[str, type[Sandbox]] = {"namespace": NamespaceSandbox, "rlimit": RlimitSandbox}


def make_sandbox(name: str = "auto", **settings: Any) -> Sandbox:
    """The sandbox of that name, shown to work; ``auto`` is ``namespace``, never the weaker ``rlimit``.

    Raises:
        ValueError: no such sandbox, a setting (of :class:`Sandbox`) makes no sense, or it does not work here.
    """
    sandbox = sandbox_kind(name)(**settings)
    sandbox.prove()
    return sandbox


def sandbox_kind(name: str) -> type[Sandbox]:
    """The class that a setting ``sandbox=...`` names.

    Raises:
        ValueError: no such sandbox.
    """
    if name not in ("auto", *SANDBOXES):
        raise ValueError(f"sandbox={name!r} is not known: choose one of auto, {', '.join(SANDBOXES)}")
    return SANDBOXES["namespace" if name == "auto" else name]
