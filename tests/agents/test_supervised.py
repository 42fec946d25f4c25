"""Agents that learn from something else than the reward: losses, targets and rewards as worked out by hand."""

from __future__ import annotations

import copy
from functools import partial

import gymnasium as gym
import pytest
import torch
import torch.nn.functional as F
from test_algorithms import BIG, STEP, expected_gradient, learnt_gradient, log_probs, one_position_batch
from test_grpo import GROUP, LENGTHS, E, L, T, make_batch, make_policy
from toys import RIGHT, PairTask, pair_dllm

from agents.gt_margin import GtMargin, Oracle, concordance, relaxed_ndcg, soft_ranks
from agents.losses import pack
from agents.ontrack import OnTrack, Rejoined
from agents.rollout import evaluate, play_groups
from agents.sas import SAS
from agents.training import Collector, Prompts
from dllm_gym.deciders.distributions import MaskedBernoulli, OnePosition
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.rules import Random, Threshold, TopK

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


# ---- Gt-Margin ----


def test_soft_ranks_of_two_by_hand_and_of_many_at_no_temperature():
    score, legal = torch.tensor([[0.3, 7.0, -0.5, 2.0]]), torch.tensor([[1, 0, 1, 0]]).bool()
    ahead = torch.sigmoid(torch.tensor(0.8 / 0.7))
    soft = soft_ranks(score, legal, 0.7)[0]
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[0, 2], expected[1, 0], expected[1, 2] = ahead, 1 - ahead, 1 - ahead, ahead
    torch.testing.assert_close(soft, expected)
    hard = soft_ranks(torch.tensor([[0.1, 0.4, 9.0, 0.2, 0.3]]), torch.tensor([[1, 1, 0, 1, 1]]).bool(), 1e-3)[0]
    assert hard.argmax(-1)[:4].tolist() == [1, 4, 3, 0] and not hard[4].any() and not hard[:, 2].any()


def test_relaxed_ndcg_by_hand():
    score, gain = torch.tensor([[0.3, -0.5, 4.0]]), torch.tensor([[0.25, 0.75, 9.0]])
    legal = torch.tensor([[1, 1, 0]]).bool()
    first, second = 1.0, 1 / torch.tensor(3.0).log2()
    ahead = torch.sigmoid(torch.tensor(0.8))
    reached = (ahead * 0.25 + (1 - ahead) * 0.75) * first + ((1 - ahead) * 0.25 + ahead * 0.75) * second
    torch.testing.assert_close(relaxed_ndcg(score, gain, legal, 1.0)[0], reached / (0.75 * first + 0.25 * second))
    torch.testing.assert_close(relaxed_ndcg(gain, gain, legal, 1e-3), torch.ones(1))
    assert relaxed_ndcg(score, gain, torch.zeros(1, 3, dtype=torch.bool), 1.0).tolist() == [1.0]


def test_concordance_by_hand():
    truth, legal = torch.tensor([[0.9, 0.1, -0.5, -0.495, 1.0]]), torch.tensor([[1, 1, 1, 1, 0]]).bool()
    score = torch.tensor(
        [[1.0, 3.0, 1.0, 0.0, -9.0]]
    )  # pairs: 0>1 wrong, 0>2 tied, 0>3, 1>2, 1>3 right; 2, 3 are no pair
    assert concordance(score, truth, legal).item() == pytest.approx(3.5 / 5)


def test_the_oracle_takes_the_largest_margin_or_nearly():
    seen = {"true_margin": torch.tensor([[0.2, 0.5, 0.9]]), "action_mask": torch.tensor([[1, 1, 0]])}
    noise = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    many = {name: value.expand(4000, 3) for name, value in seen.items()}
    action, log_prob = Oracle(0.1).decide(many, noise)
    assert action.sum(-1).unique().tolist() == [1] and not action[:, 2].any()
    share = torch.sigmoid(torch.tensor(0.3 / 0.1))
    assert action[:, 1].float().mean().item() == pytest.approx(share.item(), abs=0.01)
    torch.testing.assert_close(log_prob.exp(), torch.where(action[:, 1] == 1, share, 1 - share))
    assert Oracle(1e-4).decide(many, noise)[0][:, 1].all()


def test_gt_margin_descends_the_ranking_loss():
    batch, policy = make_batch(), make_policy()
    batch["true_margin"] = 2 * torch.rand(E, T, L, generator=torch.Generator().manual_seed(2)) - 1
    twin, total = copy.deepcopy(policy), 0.0
    for e in range(E):
        for t in range(int(LENGTHS[e])):
            step = batch[e, t]
            legal = step["action_mask"][None] != 0
            logits = twin(step["confidence"], step["mask"], step["time"])[None] / 0.8  # the actor's own temperature
            margin = torch.where(legal, step["true_margin"][None], -2)
            gain = 1.0 / (1 + (margin[:, None] > margin[:, :, None]).sum(-1))  # how many are ahead
            total = total + (1 - relaxed_ndcg(logits, gain, legal, 0.5)[0]) / LENGTHS[e] / E
    algorithm = GtMargin(make_actor(policy, OnePosition, 0.8), STEP, tau=0.5, max_grad_norm=BIG, chunk=3)
    learnt, metrics = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5) and 0 <= metrics["agreement"] <= 1


def test_gt_margin_learns_to_rank_as_the_margins_do():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=32, task="sudoku", teacher_forcing=True)
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=16)
    algorithm = GtMargin(make_actor(policy, OnePosition), ADAM, epochs=15, max_grad_norm=1.0)
    collector, player = Collector(envs, Prompts(1000, seed=0), 0, 8, 1), PolicyDecider(policy, OnePosition)
    held_out = play_groups(envs, algorithm.players(player, 1), range(2000, 2016), 1, algorithm.observes).batch
    assert (held_out["score"][:, 0] == 1).all()
    states = pack(held_out.select(*policy.in_keys, "action_mask", "true_margin", "active"))
    rates = [algorithm.descent.loss(states)]
    for _ in range(3):
        episodes = collector.collect(algorithm, player)
        algorithm.update(episodes.batch, episodes.reward, episodes.group)
    rates.append(algorithm.descent.loss(states))
    before, after = (rate["agreement"].item() for rate in rates)
    assert before < 0.5 and after > 0.7
    assert rates[1]["loss_ranking"] < 0.75 * rates[0]["loss_ranking"]


# ---- SAS ----


class GoldPair(PairTask):
    def gold(self, example):
        return RIGHT


def test_the_self_aware_reward_is_the_log_likelihood_along_the_path():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=5, teacher_forcing=True)
    core = envs.core
    torch.manual_seed(0)
    policy = PolicyDecider(DiTConfidence(width=8, ffn=8), OnePosition)
    algorithm = SAS(make_actor(policy.policy, OnePosition), STEP)
    episodes = Collector(envs, Prompts(9, seed=0), 0, 3, 2).collect(algorithm, policy)
    dllm, expected = core.dllm, []
    for e in range(6):
        example = core.examples[Prompts(9, seed=0).take(3)[e // 2]]
        prompt, truth = dllm.encode(core.task.prompt(example)), dllm.encode(core.task.gold(example))
        truth = torch.tensor(truth + [dllm.eos_id] * (core.L - len(truth)))
        row, total = torch.tensor([*prompt, *[dllm.mask_id] * core.L]), 0.0
        for action in episodes.batch["action"][e]:
            with torch.no_grad():
                logits = dllm.lm_head(dllm.backbone(input_ids=row[None]).last_hidden_state[0, -core.L :]).double()
            logits[:, dllm.mask_id] = -torch.inf
            place = action.nonzero().item()
            total += logits[place].log_softmax(-1)[truth[place]].clamp_min(-100).item()
            row[len(prompt) + place] = truth[place]
        expected.append(total)
    torch.testing.assert_close(episodes.reward.double(), torch.tensor(expected).double(), atol=1e-3, rtol=1e-4)
    metrics = algorithm.update(episodes.batch, torch.zeros(6), episodes.group)
    assert metrics["log_likelihood"] == pytest.approx(sum(expected) / 6, abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"block_length": 4, "steps_per_block": 1}], ids=str)
def test_who_leaves_masks_has_not_earned_more_than_who_commits_them_at_once(settings):
    """Else the likeliest path would be the one that commits nothing."""

    class Lazy:
        def __init__(self, idle):
            self.idle = idle

        def decide(self, observation, noise):
            action = (observation["action_mask"] != 0).to(torch.int8)
            return action * (not self.idle), torch.zeros(action.shape[0])

    forced = {"num_envs": 16, "teacher_forcing": True}
    algorithm = SAS(make_actor(make_policy(), MaskedBernoulli), STEP)
    cut, whole = (gym.make_vec("DLLMUnmask-v0", **forced, **s) for s in ({"max_episode_steps": 5, **settings}, {}))
    idle = play_groups(cut, [(Lazy(True), 1)], range(16), 0, algorithm.observes)
    busy = play_groups(whole, [(Lazy(False), 1)], range(16), 0, algorithm.observes)
    assert idle.results[0].masked.all() and not busy.results[0].masked.any()
    worth = algorithm.worth(busy.batch, busy.reward)
    assert worth.min() < -5
    torch.testing.assert_close(algorithm.worth(idle.batch, idle.reward), worth, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("to_go", [True, False])
def test_sas_is_grpo_with_the_advantage_of_what_is_earned(to_go):
    batch, policy = one_position_batch(), make_policy()
    batch["true_log_prob"] = -3 * torch.rand(E, T, L, generator=torch.Generator().manual_seed(5))
    twin, total = copy.deepcopy(policy), 0.0
    earned = torch.zeros(E, T)
    for e in range(E):
        for t in range(int(LENGTHS[e])):
            earned[e, t] = batch["true_log_prob"][e, t, batch["action"][e, t].nonzero().item()]
        left = (batch["mask"][e, t] != 0) & (batch["action"][e, t] == 0)
        earned[e, t] += batch["true_log_prob"][e, t][left].sum()
    for e in range(E):
        now = log_probs(twin, batch, e, OnePosition)
        for t in range(int(LENGTHS[e])):
            worth = earned[:, t if to_go else 0 :].sum(1)
            advantage = worth[e] - worth[GROUP[e] == GROUP].mean()
            ratio = (now[t] - batch["action_log_prob"][e, t]).exp()
            total = total - torch.min(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage) / LENGTHS[e] / E
    algorithm = SAS(make_actor(policy, OnePosition), STEP, to_go=to_go, clip_epsilon=0.3, max_grad_norm=BIG)
    learnt, _ = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"to_go": False}, {"normalize": True}], ids=str)
def test_sas_learns_the_order_in_which_the_dllm_knows_the_answer(settings):
    """Without a grader: position 0 is likely only once position 1 is committed, though the dLLM is surer of it."""
    pair = {"num_envs": 32, "model": pair_dllm(), "task": GoldPair(), "alpha": 0.0}
    envs = gym.make_vec("DLLMUnmask-v0", **pair, teacher_forcing=True)
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=16)
    player = PolicyDecider(policy, OnePosition)
    algorithm = SAS(make_actor(policy, OnePosition), ADAM, epochs=2, max_grad_norm=1.0, **settings)
    collector = Collector(envs, Prompts(1, seed=0), 0, 4, 8)
    likelihood = []
    for _ in range(30):
        episodes = collector.collect(algorithm, player)
        likelihood.append(algorithm.update(episodes.batch, episodes.reward, episodes.group)["log_likelihood"])
    assert likelihood[0] < -2 and likelihood[-1] > -0.8  # -0.68 is that of the right order
    free = gym.make_vec("DLLMUnmask-v0", **pair)
    assert evaluate(free, PolicyDecider(policy, OnePosition, greedy=True), [0]).score.item() == 1
    assert evaluate(free, TopK(1), [0]).score.item() == 0
