"""How fast rollouts are: against a plain lockstep loop, and against the forwards that cannot be avoided.

    python scripts/benchmark.py                                         # the embedded model
    python scripts/benchmark.py measure=[llada_48m] threads=2           # LLaDA's shape and vocabulary on a CPU
    python scripts/benchmark.py measure=[llada_8b]                      # LLaDA-8B's sizes in bf16 on a GPU

On the same model, prompts, deciders and seeds, in turn, ``repeats`` times:

- *ours*: :func:`agents.rollout.evaluate` in ``num_envs`` lanes of a new environment, which knows no prediction yet;
- *limit*: the backbone alone, no head, over rows of just those lengths that ours forwarded, without padding;
- *lockstep*: the plain loop of scripts/benchmarking/lockstep.py in batches of ``num_envs`` rows;
- *prefix*, *dual*: ours with these approximate caches, where ``caches`` asks for them.

Beside the times: what each of them did (lanes used: share of lane-steps with an episode, of the plain loop's rows those
with something to unmask; reused: rows predicted without a forward; deciding: share of the time that the decider took;
same: of the plain loop's tokens and NFE, 1 without an approximate cache), the peak memory of a prediction step, how its
cost grows with the sizes, and training rounds. All of it is in benchmark.json in the run folder.
"""

from __future__ import annotations

from command import command
from omegaconf import DictConfig


@command("benchmark")
def main(cfg: DictConfig) -> None:
    from benchmarking.measuring import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    main()
