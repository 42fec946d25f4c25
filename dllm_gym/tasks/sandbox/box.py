"""The sandboxes: what they promise, their settings, and their verdicts."""

from __future__ import annotations

import logging
import math
import secrets
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_gym.tasks.grading.workers import cores
from dllm_gym.tasks.sandbox.folders import environment, erase, interpreter, links, others, shown, third_party
from dllm_gym.tasks.sandbox.nursery import Nursery

log = logging.getLogger(__name__)

TRIES = 3  # a sandbox that cannot start (no memory, no process left) is tried again
MOST_CORES = 4  # that a program is told of, or a default pool would be larger than it may have
COMMON = (
    "abc bisect collections copy dataclasses datetime enum functools heapq inspect io itertools json linecache math"
)
COMMON += " operator os random re statistics string struct sys tempfile textwrap threading time traceback types typing"


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Attributes:
        passed: the program and then the check ran to their end.
        reason: ``passed``, ``failed`` (an exception, see the end of ``output``), ``timeout``, ``memory``,
            ``processes``, ``killed by signal N``, ``ended early with status N`` or ``meddled with ...``.
        output: the beginning of what it wrote to standard output and error.
    """

    passed: bool
    reason: str
    output: str


class Sandbox(ABC):
    """Runs untrusted Python programs, each in a process tree of its own that ends with the verdict.

    Every program gets: a fork of an interpreter that has run no program, a session of its own, limits on time, memory,
    file size, open files, processes and threads, an empty working directory that is gone afterwards, an environment
    without anything of ours, ``/dev/null`` as its input, and capped output. It is loaded from a file, as a module
    called ``solution``. Sets and dicts of strings have the same order in every run (``PYTHONHASHSEED=0``), so verdicts
    are reproducible up to time. Linux only.

    **What a verdict is worth.** "Passed" means that the process which loaded the program ran the check to its last
    line: it then says a secret that it got with the check. The exit status and what is printed mean nothing, so ending
    early (``os._exit(0)``, ``sys.exit()``, ``exec``, signals) does not help. Nothing looks for forgers: program and
    check share one interpreter, as in every benchmark of this kind, and a program that is written to pass without
    solving (values that equal everything, a search through its callers' frames) does. A frozen dLLM has no reason to
    learn that.

    **Time** is processor time, of all its processes together, so that a busy machine fails nobody; a program that waits
    is ended after eight times as long by the clock. A limit per process (of the kernel) stands behind the watch.

    Args:
        timeout: seconds of processor time per program.
        memory: MiB of private memory per process, and of resident memory of all its processes together.
        processes: how many processes and threads.
        file_size: MiB per file.
        disk: MiB of all files together (in namespaces, ``file_size`` more in ``/dev/shm``).
        files: open files per process.
        output: bytes of output that are kept; the rest is thrown away.
        packages: show the installed third-party packages to the program (standard library only, if not), but those
            with a benchmark's solutions.
        preload: modules that all programs find loaded, for speed.
        workers: programs at once in :meth:`run_all`; by default the cores that this process may use.

    Raises:
        ValueError: a limit makes no sense.

    >>> verdict = RlimitSandbox(timeout=5.0).run("def double(x): return 2 * x", "assert double(4) == 8")
    >>> verdict.passed, verdict.reason
    (True, 'passed')
    """

    name: ClassVar[str]
    advice: ClassVar[str]
    """What a user can do on whose machine it does not work."""
    namespaces: ClassVar[bool]

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        packages: bool = False,
        preload: Sequence[str] = (),
        workers: int | None = None,
        **limits: int,
    ):
        unknown = set(limits) - set(LIMITS)
        if unknown:
            raise ValueError(f"{min(unknown)}={limits[min(unknown)]!r}: no such limit; there are {', '.join(LIMITS)}")
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
            "namespaces": self.namespaces,
            "packages": folders,
            "shown": shown(folders),
            "hidden": others(folders),
            "links": links(),
            "python": interpreter(),
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
            raise ValueError(
                f"sandbox={self.name!r} does not work on this machine: {f'{trial.reason} {trial.output}'.strip()}. "
                f"{self.advice}"
            )
        self._nursery = nursery

    def run(self, program: str, check: str = "") -> Verdict:
        """Whether ``program`` and then ``check``, in the same module (called ``solution``), run to their end.

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
        if not programs:
            return []
        self.prove()
        with ThreadPoolExecutor(min(self.workers, len(programs))) as pool:
            return list(pool.map(self.run, programs, checks))

    @abstractmethod
    def _folder(self) -> AbstractContextManager[str]:
        """Where the program's files go, if not into a file system of its own."""

    def _attempt(self, nursery: Nursery, program: str, check: str) -> Verdict:
        with self._folder() as folder:
            told = nursery.ask(folder.encode(), source(program), source(check))
        reason, _, output = (part.decode(errors="replace") for part in told.partition(b"\n"))
        return Verdict(reason == "passed", reason, output)


LIMITS = {"memory": 512, "processes": 128, "file_size": 16, "disk": 64, "files": 128, "output": 1 << 16}


class NamespaceSandbox(Sandbox):
    """A sandbox of Linux namespaces: what is outside does not exist for the program.

    User, mount, process, network, IPC and host-name namespaces of its own, by ``unshare(2)``; no right of root, and
    none to be had (no nested user namespace, ``no_new_privs``). The file system holds the standard library, shared
    libraries, the system's commands and time zones (read-only), a few devices, an ``/etc`` that names one user and one
    host, and ``/tmp``, ``/src`` and ``/dev/shm`` in memory: no home, no project, no ``/proc``. The network is a
    loopback interface of its own. When the program ends, its time is up, or the scorer is gone, the kernel kills
    everything in the process namespace, daemons too, and files and shared memory go with it; the process that this
    hangs on (init) is not the program's. The keys of the user's session stay outside.

    A filter refuses the system calls that reach beyond namespaces or limits, or are seldom needed and often broken:
    sockets but Unix and internet ones, keys, io_uring, bpf, userfaultfd, perf, tracing, and memory that no limit counts
    (System V shared memory, semaphores and queues, ``memfd_create``); on x86-64 and 64-bit ARM, other processors have
    no filter. The others are as for any container: the kernel is shared. Not limited: what the kernel keeps in the
    buffers of sockets and pipes (less than a MiB for each open file).

    Needs a kernel of 5.12 or newer that allows user namespaces to this user (many container runtimes do not).
    """

    name = "namespace"
    advice = (
        "Allow user namespaces (Linux 5.12 or newer; in containers often a setting of the runtime), or accept weaker "
        "protection by asking for sandbox=rlimit"
    )
    namespaces = True

    def _folder(self) -> AbstractContextManager[str]:
        return nullcontext("")


class RlimitSandbox(Sandbox):
    """Limits only, for machines without namespaces: against accidents, not against intent.

    Held: time, memory, file size, the filter of system calls, capped output, an empty environment and working directory
    (removed afterwards, unless the scorer itself is killed); daemons are found and killed (the supervisor adopts them).

    **Not** held: the program is this user. It may read, change and delete the user's files outside its directory, use
    the network, read ``/proc``, kill the user's processes, the scorer among them, and fill more than ``disk``. The
    number of processes is watched, not enforced for root. A program that kills all processes above it leaves its own
    behind; POSIX shared memory stays as well, and files that only root may remove (a warning says where). Use it where
    the whole machine is a sandbox, such as a container for nothing else.
    """

    name = "rlimit"
    advice = "It needs Linux 5.3 or newer, with /proc"
    namespaces = False

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

    Args:
        name: ``auto``, ``namespace`` or ``rlimit``.
        settings: of :class:`Sandbox`.

    Raises:
        ValueError: no such sandbox, a setting makes no sense, or it does not work on this machine.
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


def source(text: str) -> bytes:
    """A program as bytes; characters that no file can hold (lone surrogates) become question marks."""
    return text.encode(errors="replace")
