"""Imported first by every command, before torch and before ``agents``.

Waiting threads sleep after some microseconds: by default OpenMP's threads spin for milliseconds, and on cores that
other programs use as well, a thread that spins takes the time that the one it waits for would need.

``agents`` is this checkout's: other packages install one of that name (openai-agents does), which would come first.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads OpenMP; GNU's is told a number:
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of turns; at 0 every small operation would wake its threads anew
sys.path.insert(1, str(Path(__file__).parents[1]))  # right after the folder of the command itself
