"""OnTrack: teacher forcing on a rule's decodings that end well, the student's own detours among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.imitation import Demonstration, Expert, Imitation
from agents.losses import pack
from dllm_gym.deciders.rules.base import draws

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

    from agents.rollout import Player
    from dllm_gym.deciders.player import PolicyDecider

RIGHT = 1.0  # the score of an answer that is right


class Rejoined:
    """The student decides until a share of the completion is committed, then the teacher rejoins and ends the episode.

    Args:
        teacher: a heuristic. student: the policy as it draws in training. share: in [0, 1); 0: the teacher from the
            first step on.
    """

    def __init__(self, teacher: Expert, student: PolicyDecider, share: float):
        self.teaching, self.student, self.share = Demonstration(teacher, student), student, share

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Whoever's turn it is: the action int8 [.., L] and its log-probability float32 [..] under the policy.

        Raises:
            ValueError: the policy's distribution cannot emit what the teacher would do.
        """
        taught, of_taught = self.teaching.decide(observation, noise)
        if not self.share:
            return taught, of_taught
        own, of_own = self.student.decide(observation, noise)
        alone = (observation["mask"] == 0).float().mean(-1) < self.share  # (..,)
        return torch.where(alone[..., None], own, taught.to(own.dtype)), torch.where(alone, of_own, of_taught)


class OnTrack(Imitation):
    """The likelihood of a teacher's decisions in all states of episodes whose answer is right; wrong ones are ignored.

    After *What Makes a Good Unmasking Policy?* (Sakurai, Xu and Yoon, 2026), of which the model card of the published
    weights alone could be read: a network of about 0.8M parameters on the largest confidence and the last hidden state,
    "one epoch of offline teacher forcing on student-rejoin teacher trajectories" of the deterministic threshold 0.9 in
    blocks of 32, "keeping only trajectories with a correct final answer" (9,169 of them for LLaDA, 9,776 for Dream).

    What it does not say is filled in here. *Student-rejoin*: of the ``group_size`` episodes of a prompt, number k has
    the student decide until k / group_size of the completion is committed; the teacher then rejoins and finishes, and
    what the teacher would have done is the target in every state, the student's included (so the states are those that
    a student comes to, and the kept ones those from which the teacher still ends well). *The loss*: that of the
    distribution; with independent Bernoullis it is the binary cross-entropy per position, as a mean over an episode's
    steps, then over the episodes kept. The teacher is asked anew in every round, with the student of that round.

    Args:
        actor, optimizer, descent: as of :class:`~agents.imitation.Imitation`.
        expert: the teacher; one that draws nothing, because it is asked again for the student's states.

    Raises:
        ValueError: the teacher draws at random.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        expert: Expert,
        **descent: Any,
    ):
        if draws(expert):
            raise ValueError(
                f"expert={expert} may draw at random: OnTrack asks it again, its class must say draws=False"
            )
        super().__init__(actor, optimizer, expert=expert, **descent)
        self.observes = None  # whatever the teacher reads is recorded

    def players(self, policy: PolicyDecider, group_size: int) -> list[tuple[Player, int]]:
        """The teacher alone, then the student with the teacher rejoining later and later."""
        return [(Rejoined(self.expert, policy, k / group_size), 1) for k in range(group_size)]

    def update(self, batch: TensorDictBase, reward: Tensor, group: Tensor) -> dict[str, float]:
        """See :meth:`Algorithm.update`; ``kept`` is the share of episodes with a right answer.

        If there is none nothing is learnt, and the metrics of a gradient step are absent.
        """
        right = batch["score"][:, 0] >= RIGHT  # (E,)
        steps = pack(batch[right])
        steps["action"] = self.taught(dict(steps.items()))
        steps = steps.select(*self.actor.in_keys, "action", "weight")
        return {**self.descent.run(steps), "kept": float(right.float().mean())}

    @torch.no_grad()
    def taught(self, seen: Mapping[str, Tensor]) -> Tensor:
        """int8 [N, L]: what the teacher would do in N states."""
        legal = seen["action_mask"] != 0
        action = self.expert(seen, torch.full(legal.shape, 0.5, device=legal.device))
        return ((action != 0) & legal).to(torch.int8)
