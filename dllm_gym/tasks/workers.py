"""Graders that may take for ever or read an answer as code, in processes of their own.

Such a grader cannot be stopped from within: math-verify's time limit works in the main thread only, reasoning-gym's
scorers have none. A worker asks the system to kill it when an answer takes too long, whatever it is doing; the next
answer gets a new worker. Workers stay for later answers and end with the process that started them.

This file is also the program that a worker runs, so it imports no more than the standard library.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

START_SECONDS = 30.0  # processor time for a worker to import its library
PATIENCE = 5  # wall time allowed, in multiples of the processor time: other programs run, too
MEMORY = 2 << 30  # bytes of address space of a worker
WORKERS = min(4, os.cpu_count() or 1)


class Worker:
    """A process that does one job on whatever arguments it is asked about, one question at a time."""

    def __init__(self, job: str, seconds: float):
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, job, str(seconds)],  # -P: the files beside this one are no modules for it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the process that asks; the worker ends when its input does
        )
        hello = self._receive()
        if hello != ["ready"]:
            self.close()
            raise RuntimeError(f"the grader {job!r} does not start: {hello[0] if hello else 'its process ended'}")

    def _receive(self) -> list[Any] | None:
        """The next message; None when the worker is gone."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def ask(self, arguments: Sequence[Any]) -> list[Any] | None:
        """``[result]``; None if the worker died of the question."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(list(arguments)) + "\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self._receive()

    def close(self) -> None:
        self.process.kill()
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
            RuntimeError: no worker starts (its library is not installed).
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


# ---- the worker's side ----


def same_latex(gold: str, answer: str) -> bool:
    """What math-verify says; it may take any time."""
    import math_verify  # type: ignore[import-untyped]

    extract = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    sides = (math_verify.parse(f"${text.replace('$', '')}$", extract, parsing_timeout=None) for text in (gold, answer))
    return bool(math_verify.verify(*sides, timeout_seconds=None))


@functools.lru_cache(maxsize=8)
def puzzles(dataset: str, options: str) -> Any:
    """A generator of reasoning-gym; ``options`` are a JSON object."""
    import reasoning_gym  # type: ignore[import-untyped]

    return reasoning_gym.create_dataset(dataset, **json.loads(options))


def score_puzzle(dataset: str, options: str, item: int, answer: str) -> float:
    """What the dataset's own scorer says; it may take any time, and some scorers evaluate the answer."""
    source = puzzles(dataset, options)
    return float(source.score_answer(answer, entry=source[item]))


# name -> (what does the job, a question that loads all that later ones need)
JOBS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "latex": (same_latex, ("\\frac{1}{2}", "0.5")),
    "reasoning": (score_puzzle, ("mini_sudoku", '{"size": 1, "seed": 0}', 0, "1 2 3 4")),
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


def serve(job: str, seconds: float) -> None:
    """Read a JSON list of arguments per line, write ``[result]`` per line (``[null]`` on failure), until input ends."""
    import logging
    import resource
    import signal

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no result

    def alarm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)

    def say(message: Any) -> None:
        alarm(0)
        out.write(json.dumps([message]) + "\n")
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
    sys.addaudithook(refuse)
    say("ready")
    for line in sys.stdin:
        arguments = json.loads(line)
        alarm(seconds)
        try:
            result = work(*arguments)
        except Exception:  # of the many ways in which a text can fail to be an answer, none makes it right
            result = None
        say(result)
    return None


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
