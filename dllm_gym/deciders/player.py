"""A policy that plays: the network, what its logits mean, and how they are drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from dllm_gym.checks import number
from dllm_gym.deciders.distributions import UnmaskDistribution
from dllm_gym.deciders.manner import Manner
from dllm_gym.deciders.policy import Policy
from dllm_gym.deciders.rules import make_rule
from dllm_gym.deciders.rules.naming import known_rules

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

Decider = Callable[[Mapping[str, Tensor], Tensor], Tensor]
RULE = re.compile(r"\s*\w+\s*\(.*\)\s*", re.DOTALL)


def make_actor(
    policy: Policy, distribution_class: type[UnmaskDistribution], temperature: float = 1.0
) -> ProbabilisticActor:
    """TorchRL actor for the losses: observation TensorDict -> ``logits``, ``action``, ``action_log_prob``.

    It shares the policy's parameters and samples from torch's global generator; rollouts use ``PolicyDecider``.
    """
    # Imported here: TorchRL takes seconds to import, and acting does not need it.
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import ProbabilisticActor

    return ProbabilisticActor(
        TensorDictModule(policy, in_keys=list(policy.in_keys), out_keys=["logits"]),
        in_keys=["logits", "action_mask"],
        out_keys=["action"],
        distribution_class=distribution_class,
        distribution_kwargs={"temperature": check_temperature(temperature)},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


def check_temperature(temperature: float) -> float:
    """``temperature`` if logits can be divided by it; ValueError otherwise."""
    number("temperature", temperature, above=0)
    return temperature


class Gauge:
    """What a policy wanted since it was last asked, as sums on its device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def see(self, distribution: UnmaskDistribution) -> None:
        """A step in n lanes."""
        legal = distribution.action_mask
        wish = distribution.logits.sigmoid() * legal
        now = {"unmask_probability": wish.sum(), "legal": legal.sum(), "steps": legal.any(-1).sum()}
        if type(distribution).entropy is not Distribution.entropy:
            now["entropy"] = distribution.entropy().sum()
        top = wish.amax()
        self.sums["top"] = torch.maximum(self.sums.get("top", top), top)
        for name, value in now.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def take(self) -> dict[str, float]:
        """``unmask_probability`` (mean of sigmoid(logit) at legal positions), ``max_unmask_probability`` and, where it
        has a closed form, ``entropy`` (mean of a step, in nats); {} if nothing was seen. Begins anew."""
        sums, self.sums = {name: float(value) for name, value in self.sums.items()}, {}
        if not sums:
            return {}
        seen = {"unmask_probability": sums["unmask_probability"] / max(sums["legal"], 1)}
        seen["max_unmask_probability"] = sums["top"]
        return seen | ({"entropy": sums["entropy"] / max(sums["steps"], 1)} if "entropy" in sums else {})


class PolicyDecider:
    """A policy as a decider: ``decider(observation, noise) -> action``.

    Args:
        policy: the network.
        distribution_class: what its logits mean.
        temperature: divides the logits, > 0.
        greedy: take the distribution's ``deterministic_sample`` and ignore the noise.
        alpha: the speed weight that evaluations ask for, where the environment has a range of them.
    """

    def __init__(
        self,
        policy: Policy,
        distribution_class: type[UnmaskDistribution],
        temperature: float = 1.0,
        greedy: bool = False,
        alpha: float | None = None,
    ):
        self.policy, self.distribution_class, self.alpha = policy, distribution_class, alpha
        self.temperature, self.greedy = check_temperature(temperature), greedy
        self.gauge = Gauge()

    @property
    def requires(self) -> dict[str, int]:
        """Settings of the environment that the policy needs."""
        return self.policy.requires

    @property
    def draws(self) -> bool:
        """Whether it reads the noise."""
        return not self.greedy

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return self._act(observation, noise)[0]

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action int8 [.., L] and its log-probability float32 [..] (of the greedy action too)."""
        action, distribution = self._act(observation, noise)
        self.gauge.see(distribution)
        return action, distribution.log_prob(action)

    def distribution(self, observation: Mapping[str, Tensor]) -> UnmaskDistribution:
        """What the policy would draw from, with gradients where they are enabled."""
        logits = self.policy(*self.policy.read(observation))
        return self.distribution_class(logits, observation["action_mask"], self.temperature)

    @torch.no_grad()
    def _act(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, UnmaskDistribution]:
        distribution = self.distribution(observation)
        action = distribution.deterministic_sample if self.greedy else distribution.from_noise(noise)
        return action, distribution

    def __str__(self) -> str:
        how = "greedy" if self.greedy else f"temperature={self.temperature:g}"
        return f"{type(self.policy).__name__}({self.distribution_class.__name__}, {how})"


def make_decider(policy: str | Path | Policy | Decider, **chosen: Any) -> Decider:
    """Whoever decides: a rule by its name, a policy as it wants to be played, or a decider as it is.

    Args:
        policy: a rule's name (``"threshold(0.9)"``), what :meth:`Policy.load` takes, or an object that decides.
        chosen: of a policy, in place of what its manner says where they are not None: ``distribution`` (the name of its
            class), ``temperature``, ``greedy``; and ``alpha``, by default the middle of its range.

    Raises:
        ValueError: there is no such rule or policy; something is chosen that it has not, or lacks.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    source = policy if isinstance(policy, str | Path) else None
    if isinstance(policy, str | Path):
        bare = str(policy).strip() in known_rules() and not Path(policy).exists()
        is_rule = bare or RULE.fullmatch(str(policy))
        policy = make_rule(str(policy)) if is_rule else _named(Policy.load, policy)
    if isinstance(policy, Policy):
        try:
            return _play(policy, **chosen)
        except ValueError as error:
            raise error if source is None else ValueError(f"policy={str(source)!r}: {error}") from None
    if not callable(policy):
        raise ValueError(f"policy={policy!r} decides nothing: need a rule, a policy or (observation, noise) -> action")
    if chosen:
        raise ValueError(f"{next(iter(chosen))} is read by nothing here: {policy} is no saved policy")
    return policy


def _named(load: Callable[[str | Path], Policy], source: str | Path) -> Policy:
    try:
        return load(source)
    except ValueError as error:
        else_rule = "" if Path(source).exists() else "no rule such as threshold(0.9), and "
        raise ValueError(f"policy={str(source)!r}: {else_rule}{error}") from None


def _play(policy: Policy, alpha: float | None = None, **chosen: Any) -> PolicyDecider:
    """A policy in its own manner, but for what is chosen."""
    name = type(policy).__name__
    if policy.manner is None and "distribution" not in chosen:
        raise ValueError(
            f"this {name} was saved without how it wants to be played (by an earlier version, or from outside of a "
            "run): say distribution=..., the name of a class such as ZeroTruncatedBernoulli"
        )
    manner = Manner.of({**(policy.manner.as_dict() if policy.manner else {}), **chosen})
    if "preference" in policy.in_keys:
        if manner.alpha is None:
            raise ValueError(f"this {name} reads a preference, but was saved without its range of alphas")
        low, high = manner.alpha
        alpha = math.sqrt(low * high) if alpha is None else number("alpha", alpha, low, high)
    elif alpha is not None:
        raise ValueError(f"alpha={alpha!r} is read by nothing here: this {name} reads no preference")
    return PolicyDecider(policy, manner.distribution_class, manner.temperature, manner.greedy, alpha)
