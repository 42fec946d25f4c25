"""Runs generated programs where they can do no harm, and says whether they pass a check."""

from __future__ import annotations

import ast
import logging
import marshal
import math
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dllm_gym.tasks.workers import start

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
LIARS = Path(__file__).with_name("liars.py")
MOST_LITERALS, LONGEST_LITERAL = 100, 300  # of a check, that liars are asked about
ERASE_SECONDS = 10.0  # for what one program has left behind
GRACE_SECONDS = 30.0  # beyond its own limits, before the supervisor itself is given up
TRIES = 3  # a supervisor that cannot start (no memory, no process left) is tried again


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Attributes:
        passed: the program and then the check ran to their end.
        reason: ``passed``, ``failed`` (an exception, see the end of ``output``), ``timeout``, ``memory``,
            ``processes``, ``killed by signal N``, ``ended early with status N``, ``meddled with ...`` or
            ``forged: ...``.
        output: the beginning of what it wrote to standard output and error.
    """

    passed: bool
    reason: str
    output: str


class Sandbox(ABC):
    """Runs untrusted Python programs, each in a process tree of its own that ends with the verdict.

    Every program gets: a fresh interpreter in its own session, wall and CPU time, memory, file size, open files,
    number of processes, an empty working directory that is gone afterwards, an environment without anything of ours,
    ``/dev/null`` as its input, and capped output. Sets and dicts of strings have the same order in every run
    (``PYTHONHASHSEED=0``), so verdicts are reproducible up to the clock. Linux only.

    **What a verdict is worth.** The exit status and what the program prints mean nothing. The program is loaded first;
    only then its process is sent the check and a secret, and the verdict is "passed" if the secret comes back, which
    the launcher does after the last line of the check. So ending early (``os._exit(0)``, ``sys.exit()``, ``exec``,
    signals), printing any mark, writing to all descriptors, swallowed exceptions, ``atexit``, replaced builtins and
    trace functions do not help. Program and check share one interpreter, though, as in every benchmark of this kind,
    so a program *can* look for the secret in the frames of its callers. Therefore whatever passes runs twice more,
    with the same check, but an exception at its end, unless the check has met a value that claims to equal everything
    (see :func:`impossible`): passing that is a forgery. This catches stolen secrets, values that equal everything,
    also inside containers, and trace functions that jump over an assert.

    Not excluded: a program that is written against these files (one that knows the second check from the first, or
    steals at random: it gets through in at most 4 of 27 runs, and the check can be read before it has ended); values
    that lie about a few numbers only, about order only, or change when they are converted (``__float__``); and one
    that replaces the tests that come after the first. Where the check itself mentions ``ANY``, liars are not looked
    for. None of this costs an honest program its score: what the second check does to it cannot be a forgery.

    Args:
        timeout: seconds of wall time per program (a passing one runs three times), and of CPU time per process.
        memory: MiB of address space per process, and of resident memory of all its processes together.
        processes: how many processes and threads.
        file_size: MiB per file.
        disk: MiB of all files together (in namespaces, ``file_size`` more in ``/dev/shm``).
        output: bytes of output that are kept; the rest is thrown away.
        packages: show the installed third-party packages to the program (standard library only, if not).
        workers: programs at once in :meth:`run_all`; the number of CPUs by default.

    Raises:
        ValueError: a limit makes no sense.

    >>> verdict = RlimitSandbox(timeout=5.0).run("def double(x): return 2 * x", "assert double(4) == 8")
    >>> verdict.passed, verdict.reason
    (True, 'passed')
    """

    name: ClassVar[str]
    advice: ClassVar[str]
    """What a user can do on whose machine it does not work."""
    sealed: ClassVar[bool]
    """Whether a program cannot reach the supervisor that watches it."""

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory: int = 512,
        processes: int = 16,
        file_size: int = 4,
        disk: int = 16,
        output: int = 1 << 16,
        packages: bool = False,
        workers: int | None = None,
    ):
        workers = os.cpu_count() or 1 if workers is None else workers
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout!r}: need a number of seconds above 0")
        limits = {"memory": memory, "processes": processes, "file_size": file_size, "disk": disk, "output": output}
        for setting, value in {**limits, "workers": workers}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{setting}={value!r}: need a whole number of at least 1")
        self.workers = workers
        self.mark = secrets.token_hex(8)  # stands in the command line of all its processes
        self._settings: dict[str, Any] = {
            **limits,
            "timeout": float(timeout),
            "packages": third_party() if packages else [],
        }
        self._proven = False

    def prove(self) -> None:
        """Make sure, once, that it works here (a tenth of a second); every first run does it.

        Raises:
            ValueError: it does not.
        """
        if self._proven:
            return
        if sys.platform != "linux":
            raise ValueError(f"sandbox={self.name!r} needs Linux, and this is {sys.platform}")
        trial = self._supervise("", "", timeout=GRACE_SECONDS)
        if not trial.passed:
            raise ValueError(
                f"sandbox={self.name!r} does not work on this machine: {f'{trial.reason} {trial.output}'.strip()}. "
                f"{self.advice}"
            )
        self._proven = True

    def run(self, program: str, check: str = "") -> Verdict:
        """Whether ``program`` and then ``check``, in the same module (called ``solution``), run to their end.

        Raises:
            ValueError: the sandbox does not work on this machine.
            RuntimeError: it does not work any more; nothing that a program does causes this.
        """
        self.prove()
        for _ in range(TRIES):
            verdict = self._supervise(program, check)
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
    def _cage(self) -> AbstractContextManager[dict[str, Any]]:
        """The settings of one run that are this kind's own."""

    def _supervise(self, program: str, check: str, **changes: Any) -> Verdict:
        """Start a supervisor for one program, tell it everything, and read what it says."""
        from dllm_gym.tasks.launcher import DECOYS, SECRET, SETUP_SECONDS, frame

        mark = f"{self.mark}-{secrets.token_hex(8)}"
        settings = {**self._settings, **changes}
        patience = (1 + DECOYS) * (settings["timeout"] + SETUP_SECONDS) + GRACE_SECONDS
        checks, password = [check] + [impossible(check)] * DECOYS, secrets.token_bytes(SECRET)
        with self._cage() as own:
            frames = [marshal.dumps({**settings, **own}), source(program)]
            frames += [*(secrets.token_bytes(SECRET) + source(text) for text in checks), password]
            process = start(
                [sys.executable, "-P", "-s", "-S", "-X", "utf8", LAUNCHER, mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,
            )
            try:
                said, errors = process.communicate(b"".join(map(frame, frames)), timeout=patience)
            except subprocess.TimeoutExpired:
                said, errors = b"", b"it hangs"
            finally:  # also when the scorer is being stopped
                if process.poll() != 0:
                    kill_marked(mark)
                    process.wait()
        before, complete, told = said.partition(password)
        line, _, output = told.partition(b"\n")
        reason = line.decode(errors="replace")
        if before or (not complete and process.returncode < 0 and not self.sealed):
            reason, output = "it attacked its supervisor", before
        elif not complete:
            reason, output = f"sandbox: the supervisor ended with status {process.returncode}", errors
        return Verdict(reason == "passed", reason, output.decode(errors="replace"))


class NamespaceSandbox(Sandbox):
    """A sandbox of Linux namespaces: what is outside does not exist for the program.

    User, mount, process, network, IPC and host-name namespaces of its own, by ``unshare(2)``; no right of root, and
    none to be had (no nested user namespace, ``no_new_privs``). The file system holds the standard library and shared
    libraries (read-only; some systems keep executable files there, too, such as the loader and helpers of git), three
    devices, and an empty ``/tmp`` and ``/dev/shm`` in memory: no home, no project, no ``/proc``, no shell. There is no
    network interface, not even localhost. When the program ends or its time is up, the kernel kills everything in the
    process namespace, daemons too, and the files go with it. The keys of the user's session stay outside.

    A filter refuses the system calls that reach beyond namespaces or are seldom needed and often broken: sockets but
    Unix and internet ones, keys, io_uring, bpf, userfaultfd, perf, tracing (on x86-64 and 64-bit ARM; other processors
    have no filter). The others are as for any container: the kernel is shared. Not limited: memory that is neither
    mapped nor on the disk (``memfd_create``: up to ``file_size`` times 64 open files, per process).

    Needs a kernel of 5.12 or newer that allows user namespaces to this user (many container runtimes do not).
    """

    name = "namespace"
    advice = (
        "Allow user namespaces (Linux 5.12 or newer; in containers often a setting of the runtime), or accept weaker "
        "protection by asking for sandbox=rlimit"
    )
    sealed = True

    def _cage(self) -> AbstractContextManager[dict[str, Any]]:
        packages = self._settings["packages"]
        return nullcontext({"namespaces": True, "shown": libraries(packages), "hidden": others(packages)})


class RlimitSandbox(Sandbox):
    """Limits only, for machines without namespaces: against accidents, not against intent.

    Held: wall and CPU time, memory, file size, capped output, an empty environment and working directory (removed
    afterwards, unless the scorer itself is killed); daemons are found and killed (the supervisor adopts them).

    **Not** held: the program is this user. It may read, change and delete the user's files outside its directory, use
    the network, read ``/proc`` (as root the supervisor's memory and descriptors too, and so forge its verdict), kill
    the user's processes, the scorer among them, and fill more than ``disk``. The number of processes is watched every
    0.1 s, not enforced. A program that starts another in a session of its own and then kills its supervisor leaves it
    behind; System V shared memory, semaphores and queues stay as well, and files that only root may remove (a warning
    says where). Use it where the whole machine is a sandbox, such as a container for nothing else.
    """

    name = "rlimit"
    advice = "It needs Linux 5.3 or newer, with /proc"
    sealed = False

    @contextmanager
    def _folder(self) -> Iterator[dict[str, Any]]:
        folder = tempfile.mkdtemp(prefix="dllm_gym-")
        try:
            yield {"namespaces": False, "folder": folder}
        finally:
            if not erase(folder):
                log.warning("sandbox='rlimit': a program has left files in %s that cannot be removed", folder)

    def _cage(self) -> AbstractContextManager[dict[str, Any]]:
        return self._folder()


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


def impossible(check: str) -> str:
    """``check`` changed so that no honest program passes: it ends with an exception, unless it has met a liar.

    Every operand of a comparison, and every value that an ``assert`` takes for true or false, is looked at on its way
    (:class:`~dllm_gym.tasks.liars.Watch`). Nothing else changes: an honest program meets the same calls with the same
    outcomes, up to the last line. A check that mentions ``ANY`` (of ``unittest.mock``) brings a liar along; there, and
    where a text cannot be rewritten, the exception at the end is all.

    >>> print(impossible("assert f(1) == 2, 'no'").splitlines()[-2])  # doctest: +ELLIPSIS
    assert watch_...(f(1)) == 2, 'no'
    """
    name = f"watch_{secrets.token_hex(8)}"
    watched = Watched(name)
    try:
        tree = ast.parse(check)
        if any("ANY" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in ast.walk(tree)):
            raise ValueError("not every liar is the program's")
        future = [isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body]
        begin = len(future) - future[::-1].index(True) if any(future) else 0  # these have to stay in front
        body = [ast.unparse(watched.visit(node)) for node in tree.body]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"{check}\nraise AssertionError"
    tools = f"{name} = {{'__name__': {name!r}}}\nexec({LIARS.read_text()!r}, {name})"
    first = f"{tools}\n{name} = {name}['Watch']([{', '.join(watched.literals[:MOST_LITERALS])}])"
    return "\n".join([*body[:begin], first, *body[begin:], f"{name}.verdict()"])


class Watched(ast.NodeTransformer):
    """Puts a call of the function ``name`` around what decides about an ``assert``; collects the literals around it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.literals: list[str] = []

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        left, *others = (self.watch(side) for side in (node.left, *node.comparators))
        return ast.Compare(left, node.ops, others)

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        return ast.Assert(self.truth(node.test), node.msg)

    def truth(self, node: ast.expr) -> ast.expr:
        match node:
            case ast.BoolOp(op, values):
                return ast.BoolOp(op, [self.truth(value) for value in values])
            case ast.UnaryOp(ast.Not() as negation, operand):
                return ast.UnaryOp(negation, self.truth(operand))
            case ast.Compare():
                return self.visit_Compare(node)
        return self.watch(node)

    def watch(self, node: ast.expr) -> ast.expr:
        try:
            ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            return ast.Call(ast.Name(self.name), [self.visit(node)], [])
        text = ast.unparse(node)
        if len(text) < LONGEST_LITERAL and text not in self.literals:
            self.literals.append(text)
        return node


def source(text: str) -> bytes:
    """A program as bytes; characters that no file can hold (lone surrogates) become question marks."""
    return text.encode(errors="replace")


def third_party() -> list[str]:
    """Folders of the installed packages."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def others(packages: Sequence[str]) -> list[str]:
    """Folders of packages that are not shown although they may lie in one that is.

    A benchmark may be installed there, solutions and all.
    """
    base = [os.path.join(sysconfig.get_path("stdlib"), "site-packages"), "/usr/lib/python3/dist-packages"]
    return [folder for folder in dict.fromkeys((*third_party(), *base)) if folder not in packages]


def libraries(packages: Sequence[str]) -> list[str]:
    """Folders that an interpreter needs, outermost first, none inside another."""
    base = {"platbase": sys.base_exec_prefix}  # a virtual environment has nothing of the standard library
    python = [os.path.join(sys.base_prefix, "lib"), sysconfig.get_path("stdlib")]
    python.append(sysconfig.get_path("platstdlib", vars=base))
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    found: list[str] = []
    for folder in sorted({os.path.abspath(folder) for folder in (*python, *system, *packages)}):
        if os.path.isdir(folder) and not any(Path(folder).is_relative_to(outer) for outer in found):
            found.append(folder)
    return found


def erase(folder: str) -> bool:
    """Remove a folder, however deep or locked what a program has made in it; whether all of it is gone.

    What lies deeper is first moved up: no path gets long, and few files are open at a time.
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


def kill_marked(mark: str) -> None:
    """Kill all processes with ``mark`` in their command line, until there are none."""
    marked = True
    while marked:
        marked = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                # (a zombie has an empty command line)
                if mark.encode() in (process / "cmdline").read_bytes():
                    marked = True
                    os.kill(int(process.name), 9)
            except OSError:
                continue  # it has just ended, or is not ours
