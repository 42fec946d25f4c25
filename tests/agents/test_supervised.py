"""Agents that learn from something else than the reward: losses, targets and rewards as worked out by hand."""

from __future__ import annotations

import copy
from functools import partial

import gymnasium as gym
import pytest
import torch
import torch.nn.functional as F
from test_algorithms import BIG, STEP, expected_gradient, learnt_gradient
from test_grpo import LENGTHS, E, L, T, make_batch, make_policy
from toys import PairTask, pair_dllm

from agents.ontrack import OnTrack, Rejoined
from agents.rollout import play_groups
from dllm_gym.deciders.distributions import MaskedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.rules import Random, Threshold

ADAM = partial(torch.optim.AdamW, lr=1e-2)


class LastFirst:
    """A teacher that does what a rule on confidence would not: the last legal position, one per step."""

    draws = False

    def __call__(self, observation, noise):
        legal = observation["action_mask"] != 0
        place = torch.where(legal, torch.arange(legal.shape[-1]), -1)
        return ((place == place.amax(-1, keepdim=True)) & legal).to(torch.int8)


# ---- OnTrack ----


def test_ontrack_is_the_cross_entropy_with_the_teacher_on_right_episodes():
    batch, policy, teacher = make_batch(), make_policy(), Threshold(0.8)
    right = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    batch["score"] = torch.where(right, 1.0, 0.999)[:, None].expand(E, T).clone()
    twin, total = copy.deepcopy(policy), 0.0
    for e in right.nonzero().flatten().tolist():
        for t in range(int(LENGTHS[e])):
            legal, sure = batch["action_mask"][e, t] != 0, batch["confidence"][e, t, :, 0]
            target = legal & (sure >= 0.8)
            if not target.any() and legal.any():  # else the surest one
                target[torch.where(legal, sure, -1).argmax()] = True
            step = batch[e, t]
            logits = twin(step["confidence"], step["mask"], step["time"])[legal]
            entropy = F.binary_cross_entropy_with_logits(logits, target[legal].float(), reduction="sum")
            total = total + entropy / LENGTHS[e] / right.sum()
    actor = make_actor(policy, MaskedBernoulli)
    algorithm = OnTrack(actor, STEP, expert=teacher, max_grad_norm=BIG)
    learnt, metrics = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5) and metrics["kept"] == 0.5


def test_nothing_is_learnt_from_wrong_answers_alone():
    batch, policy = make_batch(), make_policy()
    batch["score"] = torch.full((E, T), 0.5)
    learnt, metrics = learnt_gradient(
        OnTrack(make_actor(policy, MaskedBernoulli), STEP, expert=Threshold()), policy, batch
    )
    assert not learnt.any() and metrics["gradient_steps"] == 0 and metrics["kept"] == 0


def test_the_student_leads_until_its_share_is_committed_and_the_teacher_rejoins():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.int8)
    seen = {"confidence": torch.full((4, L, 1), 0.5), "mask": mask, "action_mask": mask, "time": torch.zeros(4, 1)}
    student = PolicyDecider(DiTConfidence(width=8, ffn=8, output_bias=30.0), MaskedBernoulli)  # takes everything
    for share, led in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        action, log_prob = Rejoined(LastFirst(), student, share).decide(seen, torch.full((4, L), 0.5))
        expected = torch.where(torch.arange(4)[:, None] < led, mask, LastFirst()(seen, None))
        assert torch.equal(action, expected)
        torch.testing.assert_close(log_prob, student.distribution(seen).log_prob(expected).detach())
    algorithm = OnTrack(make_actor(student.policy, MaskedBernoulli), STEP, expert=LastFirst())
    assert [(player.share, count) for player, count in algorithm.players(student, 4)] == [
        (0.0, 1),
        (0.25, 1),
        (0.5, 1),
        (0.75, 1),
    ]


class HalfRight(PairTask):
    """Two prompts, of which only the first has a right answer."""

    def examples(self, split):
        return super().examples(split).from_list([{"prompt": "="}, {"prompt": "=="}])

    def grade(self, example, completion):
        return super().grade(example, completion) * (example["prompt"] == "=")


def test_ontrack_approaches_its_teacher_where_it_is_right_and_nowhere_else():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=8, model=pair_dllm(), task=HalfRight(), hidden=True, alpha=0.0)
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=16, output_bias=0.0, hidden_size=envs.core.dllm.hidden_size)
    student = PolicyDecider(policy, MaskedBernoulli)
    algorithm = OnTrack(make_actor(policy, MaskedBernoulli), ADAM, expert=LastFirst(), max_grad_norm=1.0)
    before = copy.deepcopy(policy.state_dict())
    wrong = play_groups(envs, algorithm.players(student, 4), [1], 0, algorithm.observes)
    metrics = algorithm.update(wrong.batch, wrong.reward, wrong.group)
    assert metrics["kept"] == 0
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    observation, _ = envs.reset(seed=0, options={"examples": [0] * 8})
    taught = LastFirst()(observation, None)
    kept, likelihood = [], []
    for round_ in range(40):
        episodes = play_groups(envs, algorithm.players(student, 4), [0, 1], round_, algorithm.observes)
        kept.append(algorithm.update(episodes.batch, episodes.reward, episodes.group)["kept"])
        likelihood.append(student.distribution(observation).log_prob(taught)[0].item())
    assert likelihood[0] < -0.5 and likelihood[-1] > -0.1
    assert min(kept) < 0.5 and kept[-1] == 0.5  # of the student's detours at first some end badly, then none
    wrong_teacher = OnTrack(make_actor(policy, MaskedBernoulli), ADAM, expert=Threshold(0.5))
    episodes = play_groups(envs, wrong_teacher.players(student, 1), [0, 1], 0, wrong_teacher.observes)
    assert wrong_teacher.update(episodes.batch, episodes.reward, episodes.group)["kept"] == 0


def test_a_teacher_that_draws_is_refused():
    with pytest.raises(ValueError, match=r"expert=random.*draw"):
        OnTrack(make_actor(make_policy(), MaskedBernoulli), STEP, expert=Random(1))
