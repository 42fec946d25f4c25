"""Graders that may take for ever or read an answer as code, in processes of their own.

Such a grader cannot be stopped from within: math-verify's time limit works in the main thread only, reasoning-gym's
scorers have none. A worker asks the system to kill it when an answer takes too long, and whoever asked kills it a
little later if that did not help; the next answer gets a new worker. Workers stay for later answers and end with the
process that started them.

Scorers that may evaluate an answer see only text that :func:`harmless` lets through, and each answer is scored by a
process of its own, forked from the worker, which can say one number and is gone: nothing lasts from one answer to the
next. These are two nets, not the walls of a sandbox: a parser with a hole in a scorer of reasoning-gym would run as
this user.

This file is also the program that a worker runs, so it imports no more than the standard library.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import functools
import json
import math
import os
import pickle
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START_SECONDS = 30.0  # processor time for a worker to import its library
GRACE_SECONDS = 2.0  # beyond its wall time, before a worker is killed
PATIENCE = 5  # wall time allowed, in multiples of the processor time: other programs run, too
MEMORY = 2 << 30  # bytes of address space of a worker


def cores() -> int:
    """The processors that this process may use: its affinity, and what a control group gives it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in quotas():
        allowed = min(allowed, max(1, math.ceil(quota)))
    return allowed


def quotas() -> Iterator[float]:
    """Processors' worth of time that the control groups of this process allow (versions 2 and 1, all levels)."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("cpu" if controllers else "")
        for folder in (path for path in ("." + group, *map(str, Path("." + group).parents), ".")):
            try:
                if controllers:
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota, period = ((root / folder / name).read_text() for name in names)
                else:
                    quota, period = (root / folder / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                continue


WORKERS = min(4, cores())


class Worker:
    """A process that does one job on whatever arguments it is asked about, one question at a time."""

    def __init__(self, job: str, seconds: float):
        self.seconds, self.asked, self.heard = seconds, 0, b""
        self.process = start(
            [sys.executable, "-P", __file__, job, str(seconds)],  # -P: the files beside this one are no modules for it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that asks; the worker ends when its input does
        )
        hello = self._receive(PATIENCE * START_SECONDS)
        if hello != ["ready"]:
            self.close()
            raise RuntimeError(f"the grader {job!r} does not start: {hello[0] if hello else 'its process ended'}")

    def _receive(self, seconds: float) -> list[Any] | None:
        """The next message; None when the worker is gone or says nothing for so long."""
        assert self.process.stdout
        end = time.monotonic() + seconds
        while not self.heard.endswith(b"\n"):
            ready = select.poll()
            ready.register(self.process.stdout, select.POLLIN)
            if not ready.poll(max(0.0, 1000 * (end - time.monotonic()))):
                return None
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self.heard += more
        line, self.heard = self.heard, b""
        return json.loads(line)

    def ask(self, arguments: Sequence[Any]) -> list[Any] | None:
        """``[result]``; None if the worker died of the question."""
        assert self.process.stdin
        self.asked += 1
        try:
            self.process.stdin.write(json.dumps([self.asked, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        answer = self._receive(PATIENCE * self.seconds + GRACE_SECONDS)
        return answer[1:] if answer and answer[0] == self.asked else None  # else it is no answer to this question

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # those that it has forked, too
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream:
                    stream.close()
            except OSError:  # what could not be written any more is of no interest
                pass


class Pool:
    """Workers for one job, started when they are needed and kept.

    >>> Pool("latex", seconds=2.0).ask("\\\\frac{1}{2}", "0.5")
    True

    Args:
        job: a name in :data:`JOBS`.
        seconds: processor time for one question, at most; five times that in wall time.
    """

    def __init__(self, job: str, seconds: float):
        self.job, self.seconds = job, seconds
        self._reset()
        atexit.register(self.close)

    def _reset(self) -> None:
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.places = threading.BoundedSemaphore(WORKERS)
        self.owner = os.getpid()

    def ask(self, *arguments: Any) -> Any:
        """What the job returns; None where it fails or takes too long. Any thread may ask.

        Raises:
            RuntimeError: no worker starts (its library is not installed, or the system has no process left).
        """
        if self.owner != os.getpid():  # a forked process: the pipes belong to its parent
            self._reset()
        with self.places:
            worker = self._worker()
            answer = None
            try:
                answer = worker.ask(arguments)
            finally:  # after an interrupt the answer would be left in the pipe: such a worker is not used again
                self.idle.put(worker) if answer else worker.close()
            return answer[0] if answer else None

    def ask_all(self, questions: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers to several questions, in order, worked out side by side."""
        if len(questions) < 2:
            return [self.ask(*arguments) for arguments in questions]
        with ThreadPoolExecutor(min(WORKERS, len(questions))) as threads:
            return list(threads.map(lambda arguments: self.ask(*arguments), questions))

    def _worker(self) -> Worker:
        while True:
            try:
                worker = self.idle.get_nowait()
            except queue.Empty:
                return Worker(self.job, self.seconds)
            if worker.process.poll() is None:
                return worker
            worker.close()  # died while idle

    def close(self) -> None:
        """End all idle workers; a later question starts new ones."""
        while self.owner == os.getpid():
            try:
                self.idle.get_nowait().close()
            except queue.Empty:
                return


def start(command: Sequence[str | os.PathLike[str]], **settings: Any) -> subprocess.Popen[bytes]:
    """A process; tried again for a while where the system has none left.

    Raises:
        RuntimeError: no process starts.
    """
    for seconds in (0.1, 0.5, 2.0, None):
        try:
            return subprocess.Popen(command, **settings)
        except (BlockingIOError, MemoryError) as error:
            if seconds is None:
                raise RuntimeError(f"the system starts no process: {error}") from error
            time.sleep(seconds)
    raise AssertionError


# ---- the worker's side ----


def same_latex(gold: str, answer: str) -> bool:
    """What math-verify says of two texts that it understands to the end; it may take any time."""
    import math_verify  # type: ignore[import-untyped]

    sides = [formula(" ".join(text.replace("$", "").split())) for text in (gold, answer)]
    return bool(all(sides) and math_verify.verify(*sides, timeout_seconds=None))


def formula(text: str) -> list[Any]:
    """A text as math-verify parses it: LaTeX, or all of it an expression such as ``x**2/3``; [] if it is neither.

    Left to itself math-verify takes the last number of what it does not understand, and 1, 2, ..., 2n is 2.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        found, whole = parse(text, [ExprExtractionConfig()], parsing_timeout=None), "".join(text.split())
        found = found[:1] if len(found) > 1 and "".join(str(found[1]).split()) == whole else []
    return found


@functools.lru_cache(maxsize=8)
def puzzles(dataset: str, options: str) -> Any:
    """A generator of reasoning-gym; ``options`` are a JSON object."""
    import reasoning_gym  # type: ignore[import-untyped]

    return reasoning_gym.create_dataset(dataset, **json.loads(options))


def sealed(puzzle: dict[str, Any]) -> str:
    """A puzzle as a text for :func:`score_puzzle`; what describes it may be of any kind, so JSON does not do."""
    return base64.b64encode(pickle.dumps(puzzle)).decode()


def score_puzzle(dataset: str, options: str, puzzle: str, answer: str) -> float:
    """What the dataset's own scorer says, in a process of its own; 0 for text that should not be evaluated.

    The puzzle comes :func:`sealed` from the process that asks. Made again here it could be another one: some generators
    depend on the order of hashes, and some write while they generate, which is forbidden here.
    """
    source, entry = puzzles(dataset, options), pickle.loads(base64.b64decode(puzzle))
    own = "".join(answer.split()) == "".join(str(entry.get("answer")).split())  # may call what no other answer may
    if evaluates(type(source).__module__) and not own and not harmless(answer):
        return 0.0
    return apart(lambda: float(source.score_answer(answer, entry=entry)))


@functools.cache
def evaluates(module: str) -> bool:
    """Whether the file of a dataset reads any text as Python."""
    import inspect

    return re.search(r"\b(eval|parse_expr|sympify)\(", inspect.getsource(sys.modules[module])) is not None


# what an expression may call, in the scorers of puzzles about formulas
CALLS = {"sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "Abs", "abs"}
UNSAFE = re.compile(r"__|[\"'`\\@:=]|\.\s*[^\W\d]|[)\]}]\s*[(\[]")  # strings, attributes, calls of what was computed


def harmless(answer: str) -> bool:
    """Whether a text can be evaluated as Python: a literal, JSON, or names, numbers and a few functions of mathematics.

    >>> harmless("[[1, 2], [3, 4]]"), harmless("x**2 + sin(x)"), harmless("open('x')"), harmless("().__class__")
    (True, True, False, False)
    """
    for read in (ast.literal_eval, json.loads) if not re.search(r"__|[(]", answer) else ():  # strings may be read, too
        try:
            read(answer)
            return True
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return not UNSAFE.search(answer) and all(name in CALLS for name in re.findall(r"([^\W\d]\w*)\s*\(", answer))


def apart(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked process; None if it fails or takes as long as this process has left."""
    seconds = signal.getitimer(signal.ITIMER_PROF)[0] or START_SECONDS
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.closerange(0, mouth)  # the pipes to whoever asks among them
            os.closerange(mouth + 1, mouth + 64)
            alarm(seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (1 + int(seconds),) * 2)  # (an alarm can be put off)
            sys.addaudithook(refuse)
            os.write(mouth, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(mouth)
    ready = select.poll()
    ready.register(ear, select.POLLIN)
    said = os.read(ear, 100) if ready.poll(1000 * PATIENCE * seconds) else b""
    os.close(ear)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(said) if said else None


# name -> (what does the job, a question that loads all that later ones need)
JOBS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "latex": (same_latex, ("\\frac{1}{2}", "0.5")),
    "reasoning": (score_puzzle, ("mini_sudoku", '{"size": 1, "seed": 0}', sealed({}), "1 2 3 4")),
}

FORBIDDEN = ("os.", "shutil.", "socket.", "subprocess.", "ctypes.", "pty.", "signal.", "webbrowser.", "urllib.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HARMLESS = ("os.listdir", "os.scandir", "os.walk")  # imports use them


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook against graders that evaluate an answer: a net beneath them, not a wall around them."""
    if event == "open":
        _, mode, flags = arguments
        writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool(flags & WRITING)
        if writes:
            raise PermissionError(event)
    elif event.startswith(FORBIDDEN) and event not in HARMLESS:
        raise PermissionError(event)


def alarm(seconds: float) -> None:
    """Have the system kill this process after that much processor time, or PATIENCE times as much of the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)


def serve(job: str, seconds: float) -> None:
    """Read ``[number, *arguments]`` per line, write ``[number, result]`` (null on failure), until input ends."""
    import logging

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no result

    def say(*message: Any) -> None:
        alarm(0)
        out.write(json.dumps(message) + "\n")
        out.flush()

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # the alarm kills: even a loop in C ends
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    alarm(START_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    work, warm_up = JOBS[job]
    try:
        work(*warm_up)
    except Exception as error:
        return say(f"{type(error).__name__}: {error}")
    if work is not score_puzzle:  # that one refuses in the processes that it forks
        sys.addaudithook(refuse)
    say("ready")
    for line in sys.stdin:
        number, *arguments = json.loads(line)
        alarm(seconds)
        try:
            result = work(*arguments)
        except Exception:  # of the many ways in which a text can fail to be an answer, none makes it right
            result = None
        say(number, result)
    return None


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
