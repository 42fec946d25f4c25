"""Imported before torch: its threads sleep while they wait for each other.

By default OpenMP's threads spin. On cores that other programs use as well, a thread that spins takes the time that the
one it waits for would need, and a round of training can take fifty times as long.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads OpenMP
