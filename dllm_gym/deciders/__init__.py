"""Everything that acts: hand-made rules, policy networks, the distributions that their logits mean, and how both are
played and stored. It knows tensors only: no environment, no model, no task."""

from dllm_gym.deciders.distributions import (
    BernoulliArgmax,
    DynamicPlackettLuce,
    MaskedBernoulli,
    OnePosition,
    UnmaskDistribution,
    ZeroTruncatedBernoulli,
)
from dllm_gym.deciders.networks import DiTConfidence, DiTHidden, MLPPolicy, UPOPolicy
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.policy import Policy
from dllm_gym.deciders.rules import (
    Blockwise,
    EntropyBounded,
    Factor,
    Klass,
    LeftToRight,
    Margin,
    NegativeEntropy,
    PerStep,
    Random,
    Rule,
    Threshold,
    TopK,
)

__all__ = [
    "BernoulliArgmax",
    "Blockwise",
    "DiTConfidence",
    "DiTHidden",
    "DynamicPlackettLuce",
    "EntropyBounded",
    "Factor",
    "Klass",
    "LeftToRight",
    "MLPPolicy",
    "Margin",
    "MaskedBernoulli",
    "NegativeEntropy",
    "OnePosition",
    "PerStep",
    "Policy",
    "PolicyDecider",
    "Random",
    "Rule",
    "Threshold",
    "TopK",
    "UPOPolicy",
    "UnmaskDistribution",
    "ZeroTruncatedBernoulli",
    "make_actor",
]
