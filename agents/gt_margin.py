"""Gt-Margin: learning to rank positions by how far the true token leads, with right completions in sight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.algorithm import Algorithm
from agents.losses import Descent, pack
from dllm_gym.checks import number
from dllm_gym.deciders.distributions import OnePosition

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.rollout import Player
    from dllm_gym.deciders.player import PolicyDecider


APART = 0.01  # margins that differ by less are alike to whoever asks how well two orders agree


class Oracle:
    """One position per step, from a softmax of the true tokens' margins: the easy ones first, or nearly so.

    Args:
        spread: the softmax's temperature, > 0; towards 0 it is the oracle's own order.
    """

    def __init__(self, spread: float):
        self.spread = number("spread", spread, above=0)

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action int8 [.., L] and its log-probability float32 [..] under the oracle."""
        distribution = OnePosition(observation["true_margin"], observation["action_mask"], self.spread)
        action = distribution.from_noise(noise)
        return action, distribution.log_prob(action)


def soft_ranks(score: Tensor, legal: Tensor, tau: float) -> Tensor:
    """Which position holds which rank, softly (NeuralSort, arXiv 1903.08850).

    Args:
        score: float [N, L]. legal: bool [N, L], what is ranked. tau: > 0; towards 0 it is the order of the scores.

    Returns:
        float [N, L, L]: row i sums to 1 over the legal positions and is largest at the one of rank i (0: the highest
        score); rows beyond the number of legal positions are 0.
    """
    score = torch.where(legal, score, 0.0)
    apart = (score[:, :, None] - score[:, None]).abs() * legal[:, None]  # (N, L, L)
    n, rank = legal.sum(-1), torch.arange(legal.shape[-1], device=legal.device)
    weight = (n[:, None] - 1 - 2 * rank).to(score.dtype)  # (N, L): n + 1 - 2 i with i counted from 1
    logits = (weight[:, :, None] * score[:, None] - apart.sum(-1)[:, None]) / tau
    soft = logits.masked_fill(~legal[:, None], -1e30).softmax(-1)
    return soft * (rank < n[:, None])[:, :, None]


def relaxed_ndcg(score: Tensor, gain: Tensor, legal: Tensor, tau: float) -> Tensor:
    """Discounted gain of the soft order of scores over that of the best order (PiRank, arXiv 2012.06731).

    Args:
        score, gain: float [N, L], gains >= 0. legal: bool [N, L]. tau: as of :func:`soft_ranks`.

    Returns:
        float [N], about 1 for the order of the gains; 1 where no position has a gain.
    """
    discount = 1 / torch.arange(2, legal.shape[-1] + 2, device=legal.device, dtype=score.dtype).log2()  # (L,)
    gain = torch.where(legal, gain, 0.0)
    reached = (soft_ranks(score, legal, tau) @ gain[..., None])[..., 0] @ discount
    best = gain.sort(-1, descending=True).values @ discount
    return torch.where(best > 0, reached / best.clamp_min(torch.finfo(best.dtype).tiny), 1.0)


def gain_of(margin: Tensor, legal: Tensor) -> Tensor:
    """Float [N, L]: 1 / (1 + rank) of legal positions, the largest margin and the leftmost of equals first; else 0."""
    order = margin.masked_fill(~legal, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return legal / (1.0 + order.argsort(-1))


def concordance(score: Tensor, margin: Tensor, legal: Tensor) -> Tensor:
    """Share of the pairs of legal positions whose margins are ``APART`` that the scores order likewise (ties: half).

    Args:
        score, margin: float [N, L]. legal: bool [N, L].

    Returns:
        float [N]; nan where there is no such pair.
    """
    pairs = legal[:, :, None] & legal[:, None] & (margin[:, :, None] > margin[:, None] + APART)  # (N, L, L)
    ahead = (score[:, :, None] - score[:, None]).sign() / 2 + 0.5
    return (ahead * pairs).sum((-2, -1)) / pairs.sum((-2, -1))


class Ranking(nn.Module):
    """1 - NDCG of the policy's logits for the ranks of the true tokens' margins, and how well the two agree."""

    def __init__(self, actor: ProbabilisticActor, tau: float):
        super().__init__()
        self.actor, self.tau = actor, tau

    def forward(self, steps: TensorDictBase) -> TensorDict:
        legal, margin = steps["action_mask"] != 0, steps["true_margin"]
        logits = self.actor.get_dist(steps.select(*self.actor.in_keys)).logits  # (N, L)
        loss = 1 - relaxed_ndcg(logits, gain_of(margin, legal), legal, self.tau)
        agreement = concordance(logits.detach(), margin, legal).nanmean().nan_to_num(0.5)
        return TensorDict({"loss_ranking": (loss * steps["weight"]).sum(), "agreement": agreement})


class GtMargin(Algorithm):
    """A planner that learns to rank masked positions as *Gt-Margin* does: by p(true token) - max p(any other).

    After *Where-to-Unmask* (Asano, Kozuno, Saito and Baba, arXiv 2602.09501). States are right completions with a part
    of them masked, so it needs no rewards and a task that knows right completions (``Task.gold``); which positions are
    masked follows the oracle's ranks at random, and the loss is PiRank's relaxed NDCG over the masked positions.

    What could be read of the paper does not say, and is chosen here: masks are those of an oracle that unmasks one
    position per step, drawn from a softmax of the margins at the temperature ``spread``, over all steps of its
    episodes; the gain of a position is 1 / (1 + its rank), so that the first ones count most; and ``tau``. Different by
    intention: the planner is whatever policy is chosen (the paper's is a second LLaDA-8B with LoRA and an MLP that
    reads the prompt, the masked completion and the dLLM's guesses; ``policy=all_speeds`` reads these guesses as
    ``tokens``), and it decides in every step (the paper's for the first half of them, the margin of the best token over
    the second after that).

    Args:
        actor: TorchRL actor, trained in place; any distribution. optimizer: factory, parameters -> optimizer.
        tau: temperature of the soft order, > 0. spread: of the oracle's draws, > 0.
        descent: further settings of :class:`~agents.losses.Descent`; a chunk of N steps holds N * L * L numbers.

    Raises:
        ValueError: a setting is out of range.
    """

    requires = {"teacher_forcing": 1}

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        tau: float = 1.0,
        spread: float = 0.1,
        **descent: Any,
    ):
        self.oracle = Oracle(spread)
        super().__init__(actor, Descent(Ranking(actor, number("tau", tau, above=0)), optimizer, **descent))
        self.observes = list(dict.fromkeys([*actor.in_keys, "action_mask", "true_margin"]))

    def players(self, policy: PolicyDecider, group_size: int) -> list[tuple[Player, int]]:
        """The oracle alone; its draws tell the episodes of a prompt apart."""
        return [(self.oracle, group_size)]

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`; ``loss`` is 1 - NDCG per step, ``agreement`` the share of pairs of positions
        with clearly different margins that the policy ranks as they do. Rewards play no part."""
        return self.descent.run(pack(batch.select(*self.actor.in_keys, "action_mask", "true_margin", "active")))
