"""Parts of scripts/benchmark.py: workloads, meters, the lockstep loop that it is compared with."""
