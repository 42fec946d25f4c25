"""Runs a file of tests beside the program, as pytest does.

The text of this file goes into a check (:func:`dllm_gym.tasks.code.unit_tests`) and runs in the sandbox.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


class Tally:
    """A plugin of pytest: how many tests were found, and how many ran to their end.

    >>> tally = Tally()
    >>> tally.pytest_runtest_logfinish("test_solution.py::test_it", ("test_solution.py", 0, "test_it"))
    >>> tally.found, tally.ended
    (0, 1)
    """

    def __init__(self) -> None:
        self.found = self.ended = 0

    def pytest_collection_finish(self, session) -> None:
        self.found = len(session.items)

    def pytest_runtest_logfinish(self, nodeid, location) -> None:
        self.ended += 1


def run(tests: str) -> None:
    """Write ``tests`` to ``test_solution.py`` beside the program's file and run it.

    Raises:
        AssertionError: pytest does not call it a success, or has left tests out.
    """
    import pytest

    path = Path(sys.modules["solution"].__file__ or "").with_name("test_solution.py")
    path.write_bytes(tests.encode(errors="replace"))
    importlib.invalidate_caches()  # the folder has just been looked at
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # looking for plugins takes longer than most tests
    tally = Tally()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={path.parent}", "-c", "/dev/null"]
    status = pytest.main([*options, str(path)], plugins=[tally])
    assert status == 0, f"pytest ended with status {int(status)}"
    assert tally.ended == tally.found, f"pytest ran {tally.ended} of {tally.found} tests"
