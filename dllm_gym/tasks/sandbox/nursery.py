"""The scorer's end of the line to :mod:`dllm_gym.tasks.sandbox.cage`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from dllm_gym.tasks.grading.workers import start
from dllm_gym.tasks.sandbox.cage import CHUNK, PATIENCE, SETUP_SECONDS

CAGE = Path(__file__).with_name("cage.py")
GRACE_SECONDS = 60.0  # beyond its own limits, before a supervisor is given up


class Nursery:
    """A process that runs programs in cages, many at a time; started when it is needed, and again if it ends.

    Args:
        settings: what the cage reads, made by :class:`~dllm_gym.tasks.sandbox.box.Sandbox`.
        mark: stands in the command line of all its processes.

    >>> from dllm_gym.tasks.sandbox import RlimitSandbox
    >>> nursery = Nursery(RlimitSandbox().settings, mark="example")
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nursery.ask(folder, "x = 1", "print(x)")
    'passed\\n1\\n'
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

    def ask(self, *request: str) -> str:
        """What is said about (folder, program, check): why it ended, a line feed, its output. Any thread may ask."""
        near, far = socket.socketpair()
        near.settimeout(self.patience)
        with near:
            try:
                with far:
                    self._hand_over(far)
                near.sendall(json.dumps(request).encode())
                near.shutdown(socket.SHUT_WR)
                with near.makefile("rb") as verdict:
                    said = verdict.read().decode(errors="replace")
            except TimeoutError:
                return "sandbox: it hangs\n"
            except OSError:
                said = ""
        return said or f"sandbox: its processes are gone\n{self._complaint()}"

    def _hand_over(self, far: socket.socket) -> None:
        """Send the far end of a line to the process; if it has been killed, the next one gets a new process."""
        with self.lock:
            line = self.line or self._start()
            try:
                socket.send_fds(line, [b"+"], [far.fileno()])
            except OSError:
                self.close()
                raise

    def _start(self) -> socket.socket:
        near, far = socket.socketpair()
        settings = json.dumps({**self.settings, "scorer": os.getpid()})
        with far:
            process = start(
                [sys.executable, "-P", "-s", "-S", "-X", "utf8", CAGE, settings, self.mark],
                stdin=far,
                stdout=subprocess.DEVNULL,
                stderr=far,  # says nothing unless it fails
                env=self.settings["environment"],
                cwd="/",
                start_new_session=True,
            )
        self.line = near
        self._end = weakref.finalize(self, hang_up, near, process, os.getpid())
        return near

    def _complaint(self) -> str:
        """What the process has said on its standard error."""
        with self.lock, contextlib.suppress(OSError):
            return self.line.recv(CHUNK, socket.MSG_DONTWAIT).decode(errors="replace") if self.line else ""
        return ""

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
