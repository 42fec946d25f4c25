"""Hand-made rules, the baselines: deciders ``(observation, noise [.., L]) -> action int8 [.., L]``.

Every rule decides per row from that row alone, picks legal positions only, picks at least one where one is legal, and
breaks ties by the lowest position. ``str(rule)`` is its name in tables, from which ``make_rule`` makes it;
``rule.requires`` are the settings of the environment without which it cannot decide. For every entry that a policy may
read there is a rule that thresholds it.

==================  =====================  =====================================================================
rule                reads                  source
==================  =====================  =====================================================================
a number per step (``counted``)
----------------------------------------------------------------------------------------------------------------
`Random`            the noise              random order of LLaDA, arXiv 2502.09992
`LeftToRight`       nothing                the order of an autoregressive model: a control
`TopK`              confidence             low-confidence remasking of LLaDA; max-confidence of UPO, 2510.05725
`LeastConfident`    confidence             the control of "free choices first"
`Margin`            margin                 UPO's margin; Kim et al., arXiv 2502.06768
`NegativeEntropy`   entropy                UPO's negative entropy
`CertaintyPrior`    confidence, mask       d2Cache, arXiv 2509.23094
`Growing`           confidence, time       ascending step size, arXiv 2509.23924
`Fixed`             time                   a schedule of positions: a control
as many as are sure enough (``bounded``)
----------------------------------------------------------------------------------------------------------------
`Threshold`         confidence             Fast-dLLM, arXiv 2505.22618; LUP, arXiv 2512.09106
`Factor`            confidence             Fast-dLLM's factor rule
`Joint`             confidence             the EB-Sampler with -log c in place of the entropy
`JointButOne`       confidence             the same without the least sure member
`EntropyBounded`    entropy, confidence    EB-Sampler, arXiv 2505.24857
`EntropyThreshold`  entropy                d3LLM
`MarginThreshold`   margin                 per position what Prophet asks on average, arXiv 2508.19982
`Saber`             confidence, committed  Saber's running threshold, arXiv 2510.18165
`Klass`             kl, confidence         KLASS, arXiv 2511.05664
by where positions lie (``placed``)
----------------------------------------------------------------------------------------------------------------
`Blockwise`         what its rule reads    LUP's expert: threshold 0.9 in blocks of 32 under full diffusion
`Hierarchical`      confidence             dInfer's hierarchical decoding
`LocalLeap`         confidence             LocalLeap, arXiv 2510.07081
`Spaced`            confidence, its rule   the spacing of DUS, arXiv 2506.19037
==================  =====================  =====================================================================
"""

from dllm_gym.deciders.rules.base import (
    KL_MOST,
    Observation,
    Rule,
    best_first,
    first_k,
    joint_confidence,
    or_else_one,
)
from dllm_gym.deciders.rules.bounded import (
    EntropyBounded,
    EntropyThreshold,
    Factor,
    Joint,
    JointButOne,
    Klass,
    MarginThreshold,
    Saber,
    Threshold,
)
from dllm_gym.deciders.rules.counted import (
    CertaintyPrior,
    Fixed,
    Growing,
    LeastConfident,
    LeftToRight,
    Margin,
    NegativeEntropy,
    PerStep,
    Random,
    TopK,
)
from dllm_gym.deciders.rules.naming import make_rule
from dllm_gym.deciders.rules.placed import Blockwise, Hierarchical, LocalLeap, Spaced

__all__ = [
    "KL_MOST",
    "Blockwise",
    "CertaintyPrior",
    "EntropyBounded",
    "EntropyThreshold",
    "Factor",
    "Fixed",
    "Growing",
    "Hierarchical",
    "Joint",
    "JointButOne",
    "Klass",
    "LeastConfident",
    "LeftToRight",
    "LocalLeap",
    "Margin",
    "MarginThreshold",
    "NegativeEntropy",
    "Observation",
    "PerStep",
    "Random",
    "Rule",
    "Saber",
    "Spaced",
    "Threshold",
    "TopK",
    "best_first",
    "first_k",
    "joint_confidence",
    "make_rule",
    "or_else_one",
]
