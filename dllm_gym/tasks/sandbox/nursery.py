"""The scorer's end of the line to :mod:`dllm_gym.tasks.sandbox.cage`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

from dllm_gym.tasks.grading.workers import start
from dllm_gym.tasks.sandbox.cage import PATIENCE, SETUP_SECONDS, frame, take

CAGE = Path(__file__).with_name("cage.py")
GRACE_SECONDS = 60.0  # beyond its own limits, before a supervisor is given up


class Nursery:
    """A process that runs programs in cages, many at a time; started when it is needed, and again if it ends.

    Args:
        settings: what the cage reads, made by :class:`~dllm_gym.tasks.sandbox.box.Sandbox`.
        mark: stands in the command line of all its processes.

    >>> from dllm_gym.tasks.sandbox import RlimitSandbox
    >>> nursery = Nursery(RlimitSandbox().settings, mark="example")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nursery.ask(folder.encode(), b"x = 1", b"print(x)")
    b'passed\\n1\\n'
    """

    def __init__(self, settings: dict[str, Any], mark: str):
        self.settings, self.mark = settings, mark
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.line: socket.socket | None = None
        self.patience = PATIENCE * settings["timeout"] + SETUP_SECONDS + GRACE_SECONDS

    @property
    def ours(self) -> bool:
        """Whether this process made it; a forked process makes another."""
        return self.owner == os.getpid()

    def ask(self, folder: bytes, program: bytes, check: bytes) -> bytes:
        """What is said about a program: why it ended, a line feed, its output. Any thread may ask."""
        near, far = socket.socketpair()
        with near:
            near.settimeout(self.patience)
            with far:
                problem = self._hand_over(far)
            if problem:
                return b"sandbox: " + problem
            with contextlib.suppress(OSError):  # if it has ended already, it says why
                near.sendall(b"".join(map(frame, (folder, program, check))))
            try:
                return take(near.fileno(), lambda _, size: near.recv(size))
            except (EOFError, ConnectionError):
                return b"sandbox: its processes are gone\n"
            except TimeoutError:
                return b"sandbox: it hangs\n"

    def _hand_over(self, far: socket.socket) -> bytes:
        """Send the far end of a line to the process; if that fails, what it has said."""
        with self.lock:
            for fresh in (self.line is None, True):
                problem = self._start() if fresh else b""
                if problem or self.line is None:
                    return problem
                try:
                    socket.send_fds(self.line, [b"+"], [far.fileno()])
                    return b""
                except OSError:  # it has been killed
                    self.close()
            return b"it does not stay alive"

    def _start(self) -> bytes:
        self.close()
        near, far = socket.socketpair()
        arguments = json.dumps({**self.settings, "scorer": os.getpid()})
        with far, tempfile.TemporaryFile() as errors:
            process = start(
                [sys.executable, "-P", "-s", "-S", "-X", "utf8", CAGE, arguments, self.mark],
                stdin=far,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=self.settings["environment"],
                cwd="/",
                start_new_session=True,
            )
            far.close()
            near.settimeout(SETUP_SECONDS)
            try:
                ready = near.recv(1)
            except OSError:
                ready = b""
            if not ready:
                near.close()
                process.kill()
                status = process.wait()
                errors.seek(0)
                return f"its process does not start (status {status})\n".encode() + errors.read()
        near.settimeout(None)
        self.line = near
        self._end = weakref.finalize(self, hang_up, near, process, os.getpid())
        return b""

    def close(self) -> None:
        """End the process and all programs that run."""
        if self.line is not None:
            self.line = None
            self._end()


def hang_up(line: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    line.close()
    if os.getpid() == owner:
        process.wait()
    else:
        process.returncode = 0  # it is not ours to wait for
