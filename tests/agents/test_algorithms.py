"""The algorithms' losses against hand-written ones, and that each of them learns."""

from __future__ import annotations

import copy
from functools import partial

import gymnasium as gym
import pytest
import torch
from test_grpo import GROUP, LENGTHS, REWARD, SGD, E, L, T, gradient, make_batch, make_policy
from toys import PairTask, pair_dllm

from agents.a2c import A2C
from agents.advantages import generalized_advantage, group_advantage, leave_one_out_advantage
from agents.grpo import GRPO
from agents.grpo_es import GRPOWithExpert, mixture_log_prob, shares
from agents.imitation import Demonstration, Imitation
from agents.losses import pack
from agents.ppo import PPO
from agents.reinforce import Reinforce
from agents.rollout import evaluate, join, play_groups
from agents.training import Collector, Prompts
from agents.upo import UPO, MaxConfidence, Softmax, TopK
from dllm_gym.deciders.distributions import DynamicPlackettLuce, MaskedBernoulli, OnePosition, ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.rules import Threshold
from dllm_gym.deciders.rules import TopK as TopKRule

STEP = partial(torch.optim.SGD, lr=1.0)
BIG = 1e9  # a gradient norm that never clips


def learnt_gradient(algorithm, policy, batch, reward=REWARD, group=GROUP):
    """What one update with learning rate 1 subtracts from the policy's parameters."""
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = algorithm.update(batch, reward, group)
    return torch.cat([(a - b).flatten() for a, b in zip(before, policy.parameters(), strict=True)]).detach(), metrics


def expected_gradient(loss, policy):
    policy.zero_grad()
    loss.backward()
    return gradient(policy)


def log_probs(policy, batch, e, distribution=ZeroTruncatedBernoulli, action=None):
    """log pi [T_e] of an episode's actions, step by step."""
    rows = []
    for t in range(int(LENGTHS[e])):
        step = batch[e, t]
        logits = policy(step["confidence"], step["mask"], step["time"])
        rows.append(distribution(logits, step["action_mask"]).log_prob(step["action"] if action is None else action[t]))
    return torch.stack(rows)


def one_position_batch():
    """Ragged episodes of a one-position policy other than the one that is trained."""
    batch = make_batch()
    batch["confidence"] = batch["confidence"].nan_to_num()
    noise = torch.rand(E, T, L, generator=torch.Generator().manual_seed(3))
    batch["action_mask"][..., 0] = 1
    action, log_prob = PolicyDecider(make_policy(seed=1), OnePosition).decide(batch, noise)
    return batch.update({"action": action, "action_log_prob": log_prob})


# ---- advantages ----


def test_normalised_group_advantage_by_hand():
    advantage, _ = group_advantage(REWARD, GROUP, normalize=True)
    half = 0.5**0.5
    torch.testing.assert_close(advantage, torch.tensor([half, -half, 0, 0, -half, half]))


def test_normalised_advantages_of_tiny_rewards_stay_finite():
    reward = torch.tensor([(1 / 256) ** 10, 0.0, 0.0, 0.0])  # alpha 10, one position per step, L = 256
    advantage, informative = group_advantage(reward, torch.zeros(4, dtype=torch.long), normalize=True)
    assert informative.all()
    torch.testing.assert_close(advantage, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_summed_steps_weigh_every_step_alike():
    steps = pack(make_batch(), summed=True)
    torch.testing.assert_close(steps["weight"], torch.full((int(LENGTHS.sum()),), 1 / E))


def test_leave_one_out_advantage_by_hand():
    reward, group = torch.tensor([1.0, 0.0, 0.5, 0.3]), torch.tensor([4, 4, 4, 9])
    torch.testing.assert_close(leave_one_out_advantage(reward, group), torch.tensor([0.75, -0.75, 0.0, 0.3]))


def test_generalized_advantage_by_hand():
    value = torch.tensor([[0.5, 0.25, 9.0], [0.1, 0.2, 0.4]])
    active = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    advantage, target = generalized_advantage(value, torch.tensor([1.0, 0.0]), active, gamma=0.9, lmbda=0.5)
    last = 1 - 0.25
    first = (0.9 * 0.25 - 0.5) + 0.9 * 0.5 * last
    third = 0 - 0.4
    second = (0.9 * 0.4 - 0.2) + 0.45 * third
    expected = torch.tensor([[first, last, 0], [(0.9 * 0.2 - 0.1) + 0.45 * second, second, third]])
    torch.testing.assert_close(advantage[..., 0], expected)
    torch.testing.assert_close(target[..., 0], (expected + value) * active)


def test_monte_carlo_returns_at_lambda_one():
    value, active = torch.rand(E, T), torch.arange(T) < LENGTHS[:, None]
    advantage, target = generalized_advantage(value, REWARD, active, gamma=1.0, lmbda=1.0)
    torch.testing.assert_close(target[..., 0], REWARD[:, None] * active)
    torch.testing.assert_close(advantage[..., 0], (REWARD[:, None] - value) * active)


# ---- GRPO's options ----


def test_clip_higher_bounds_the_two_sides_apart():
    batch, policy = make_batch(), make_policy()
    twin, advantage = copy.deepcopy(policy), group_advantage(REWARD, GROUP)[0]
    total = 0.0
    for e in range(E):
        ratio = (log_probs(twin, batch, e) - batch["action_log_prob"][e, : LENGTHS[e]]).exp()
        clipped = ratio.clamp(1 - 0.1, 1 + 0.6)
        total = total - torch.min(ratio * advantage[e], clipped * advantage[e]).mean() / E
    grpo = GRPO(make_actor(policy, ZeroTruncatedBernoulli), STEP, clip_epsilon=[0.1, 0.6], max_grad_norm=BIG)
    learnt, _ = learnt_gradient(grpo, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)


def test_kl_to_the_reference_by_hand():
    batch, policy = make_batch(), make_policy()
    grpo = GRPO(make_actor(policy, ZeroTruncatedBernoulli), STEP, kl_scale=0.7, clip_epsilon=0.3, max_grad_norm=BIG)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    twin, advantage = copy.deepcopy(policy), group_advantage(REWARD, GROUP)[0]
    total, kls = 0.0, []
    for e in range(E):
        now, old = log_probs(twin, batch, e), batch["action_log_prob"][e, : LENGTHS[e]]
        log_r = log_probs(reference, batch, e).detach() - now
        ratio = (now - old).exp()
        surrogate = torch.min(ratio * advantage[e], ratio.clamp(0.7, 1.3) * advantage[e])
        kl = log_r.exp() - log_r - 1
        kls.append(kl.detach())
        total = total + (0.7 * kl - surrogate).mean() / E
    learnt, metrics = learnt_gradient(grpo, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)
    assert metrics["kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert metrics["gradient_steps"] == 1 and metrics["informative"] == pytest.approx(4 / 6)


def test_the_reference_is_stored_with_the_run():
    policy = make_policy()
    grpo = GRPO(make_actor(policy, ZeroTruncatedBernoulli), SGD, kl_scale=0.1)
    saved = copy.deepcopy(grpo.state_dict())
    other = GRPO(make_actor(make_policy(seed=5), ZeroTruncatedBernoulli), SGD, kl_scale=0.1)
    other.load_state_dict(saved)
    for ours, theirs in zip(grpo.reference.actor.parameters(), other.reference.actor.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not theirs.requires_grad


# ---- expert steering ----


def test_the_mixture_likelihood_by_hand():
    expert = torch.tensor([False, False, True, False, True])
    policy_share, expert_share = shares(expert, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(policy_share, torch.tensor([1, 1, 2 / 3, 1, 1 / 2]))
    torch.testing.assert_close(expert_share, torch.tensor([0, 0, 1 / 3, 0, 1 / 2]))
    log_pi = torch.tensor([0.3, 0.2, 0.1, 0.6, 0.4]).log()
    mixture = mixture_log_prob(log_pi, policy_share, expert_share).exp()
    torch.testing.assert_close(mixture, torch.tensor([0.3, 0.2, 2 / 3 * 0.1 + 1 / 3, 0.6, 0.5 * 0.4 + 0.5]))


def test_expert_steering_learns_under_the_mixture():
    batch, policy = make_batch(), make_policy()
    twin, advantage = copy.deepcopy(policy), group_advantage(REWARD, GROUP)[0]
    expert = torch.tensor([False, True, True, False, False, True])  # one of two in each group
    batch["expert"] = expert[:, None].expand(E, T)
    total = 0.0
    for e in range(E):
        now, old = log_probs(twin, batch, e).exp(), batch["action_log_prob"][e, : LENGTHS[e]].exp()
        ratio = (now / 2 + 1 / 2) / (old / 2 + 1 / 2) if expert[e] else now / old
        total = total - torch.min(ratio * advantage[e], ratio.clamp(0.7, 1.3) * advantage[e]).mean() / E
    actor = make_actor(policy, ZeroTruncatedBernoulli)
    algorithm = GRPOWithExpert(actor, STEP, expert=Threshold(0.9), clip_epsilon=0.3, max_grad_norm=BIG)
    learnt, _ = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)


def test_the_expert_plays_one_episode_of_every_group():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=5)
    policy = PolicyDecider(DiTConfidence(width=16, ffn=16), ZeroTruncatedBernoulli)
    algorithm = GRPOWithExpert(make_actor(policy.policy, ZeroTruncatedBernoulli), SGD, expert=Threshold(0.9))
    episodes = play_groups(envs, algorithm.players(policy, 3), [4, 9], seed=0, observes=algorithm.observes)
    expert = episodes.batch["expert"][:, 0]
    assert torch.bincount(episodes.group).tolist() == [4, 4]
    assert torch.bincount(episodes.group[expert]).tolist() == [1, 1]
    steps = episodes.batch[expert][episodes.batch["active"][expert]]
    assert torch.equal(steps["action"], Threshold(0.9)(steps, torch.zeros(1)))
    assert len(episodes.results) == 1 and len(episodes.results[0].nfe) == 6  # metrics are the policy's own
    assert algorithm.update(episodes.batch, episodes.reward, episodes.group)["informative"] >= 0


# ---- UPO ----


def upo(policy, reference, beta, **settings):
    actor = make_actor(policy, OnePosition)
    return UPO(actor, STEP, reference=reference, beta=beta, clip_epsilon=0.3, max_grad_norm=BIG, **settings)


def plain_clipped_sum(twin, batch):
    advantage = group_advantage(REWARD, GROUP, normalize=True)[0]
    total = 0.0
    for e in range(E):
        ratio = (log_probs(twin, batch, e, OnePosition) - batch["action_log_prob"][e, : LENGTHS[e]]).exp()
        total = total - torch.min(ratio * advantage[e], ratio.clamp(0.7, 1.3) * advantage[e]).sum() / E
    return total


@pytest.mark.parametrize("chunk", [None, 3])
def test_upo_with_max_confidence_equals_the_written_loss(chunk):
    batch, policy = one_position_batch(), make_policy()
    twin, total = copy.deepcopy(policy), 0.0
    for e in range(E):
        confidence = batch["confidence"][e, ..., 0].masked_fill(batch["action_mask"][e] == 0, -1)
        target = torch.nn.functional.one_hot(confidence.argmax(-1), L)
        total = total - log_probs(twin, batch, e, OnePosition, target).sum() / E
    total = plain_clipped_sum(twin, batch) + 0.2 * total
    learnt, _ = learnt_gradient(upo(policy, MaxConfidence(), 0.2, chunk=chunk), policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["softmax", "top_k"])
def test_upo_with_a_divergence_equals_the_written_loss(name):
    batch, policy = one_position_batch(), make_policy()
    twin, total = copy.deepcopy(policy), 0.0
    for e in range(E):
        now, old = log_probs(twin, batch, e, OnePosition), batch["action_log_prob"][e, : LENGTHS[e]]
        reference = 0.0
        for t in range(int(LENGTHS[e])):
            legal = batch["action_mask"][e, t].bool()
            if name == "softmax":
                weights = (batch["confidence"][e, t, :, 0] / 0.3).exp() * legal
                reference += (weights[batch["action"][e, t].bool()] / weights.sum()).log().item()
            else:
                reference -= torch.tensor(min(2, int(legal.sum()))).log().item()
        held = (now.sum() - old.sum()).exp().clamp(0.5, 2) * (1 + now.sum() - reference)
        total = total + held.detach() * now.sum() / E
    total = plain_clipped_sum(twin, batch) + 0.2 * total
    chosen = Softmax(0.3) if name == "softmax" else TopK(2)
    if name == "top_k":
        chosen.check = lambda policy: None  # the written loss is that of the same unrestricted policy
    learnt, _ = learnt_gradient(upo(policy, chosen, 0.2), policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_equally_confident_positions_share_the_target_if_asked(share):
    batch, policy = one_position_batch(), make_policy()
    batch["confidence"][..., 0] = (batch["confidence"][..., 0] * 3).round() / 3  # many are alike
    twin, total, ties = copy.deepcopy(policy), 0.0, 0
    for e in range(E):
        for t in range(int(LENGTHS[e])):
            step = batch[e, t]
            logits = twin(step["confidence"], step["mask"], step["time"])
            legal = [i for i in range(L) if step["action_mask"][i]]
            log_prob = logits[legal].log_softmax(-1)
            confidence = [float(step["confidence"][i, 0]) for i in legal]
            best = [n for n, c in enumerate(confidence) if c == max(confidence)]
            ties += len(best) > 1
            total = total - (log_prob[best].mean() if share else log_prob[best[0]]) / E
    assert ties
    total = plain_clipped_sum(twin, batch) + 0.2 * total
    learnt, _ = learnt_gradient(upo(policy, MaxConfidence(share_ties=share), 0.2), policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("vocabulary", "seen"), [(6, 6), (5_000, 8)])
def test_the_softmax_reference_sums_over_the_whole_vocabulary_if_asked(vocabulary, seen):
    p = (3 * torch.randn(4, L, vocabulary, generator=torch.Generator().manual_seed(0))).softmax(-1)
    weight = (p.double() / 0.05).exp().sum(-1)  # (4, L)
    legal = torch.arange(L) < torch.tensor([[2], [3], [L], [L]])
    expected = (weight / (weight * legal).sum(-1, keepdim=True)).log()[:, 1]
    confidence = p.sort(-1, descending=True).values[..., :seen]
    steps = {"confidence": confidence, "action_mask": legal, "action": torch.eye(L)[[1] * 4]}
    log_prob = Softmax(vocab_size=vocabulary).log_prob(steps)
    torch.testing.assert_close(log_prob, expected.float(), atol=1e-4 if seen == vocabulary else 2e-2, rtol=1e-4)
    assert (Softmax().log_prob(steps) - log_prob).abs().max() > 0.05


def test_upo_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="distribution=one_position"):
        UPO(make_actor(make_policy(), ZeroTruncatedBernoulli), SGD, reference=Softmax())
    with pytest.raises(ValueError, match=r"policy\.candidates=5"):
        UPO(make_actor(make_policy(), OnePosition), SGD, reference=TopK(5))
    with pytest.raises(ValueError, match="beta"):
        UPO(make_actor(make_policy(), OnePosition), SGD, reference=Softmax(), beta=-1.0)


# ---- REINFORCE, A2C, PPO ----


def played_by(policy):
    """Ragged episodes whose recorded likelihoods are the policy's own."""
    batch = make_batch()
    with torch.no_grad():
        for e in range(E):
            batch["action_log_prob"][e, batch["active"][e]] = log_probs(policy, batch, e)
    return batch


def test_reinforce_is_the_policy_gradient():
    policy = make_policy()
    batch = played_by(policy)
    twin, advantage = copy.deepcopy(policy), leave_one_out_advantage(REWARD, GROUP)
    total = sum(-(advantage[e] * log_probs(twin, batch, e)).sum() / E for e in range(E))
    algorithm = Reinforce(make_actor(policy, ZeroTruncatedBernoulli), STEP, max_grad_norm=BIG)
    learnt, _ = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [A2C, PPO])
def test_actor_critic_equals_the_written_loss(cls):
    policy = make_policy()
    batch = make_batch() if cls is PPO else played_by(policy)  # A2C takes one step, on what the policy itself played
    algorithm = cls(
        make_actor(policy, ZeroTruncatedBernoulli), STEP, gamma=0.9, lmbda=0.8, critic_scale=0.4, normalize=False,
        max_grad_norm=BIG,
    )  # fmt: skip
    critic = copy.deepcopy(algorithm.critic.module)
    twin = critic.policy
    rows = [batch[e, : LENGTHS[e]] for e in range(E)]
    values = [critic(row["confidence"], row["mask"], row["time"])[:, 0] for row in rows]
    total = 0.0
    for e, row in enumerate(rows):
        value, n = values[e].detach().tolist(), int(LENGTHS[e])
        advantage, running = [0.0] * n, 0.0
        for t in reversed(range(n)):
            delta = (0.9 * value[t + 1] if t + 1 < n else REWARD[e].item()) - value[t]
            running = advantage[t] = delta + 0.9 * 0.8 * running
        advantage = torch.tensor(advantage)
        target = advantage + values[e].detach()
        now = log_probs(twin, batch, e)
        ratio = (now - row["action_log_prob"]).exp()
        clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        objective = clipped if cls is PPO else advantage * now
        total = total + (0.4 * (target - values[e]) ** 2 - objective).mean() / E
    learnt, metrics = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)
    assert metrics["explained_variance"] <= 1


def test_the_critic_shares_the_trunk_and_is_trained():
    policy = make_policy()
    algorithm = PPO(make_actor(policy, ZeroTruncatedBernoulli), SGD)
    before = copy.deepcopy(algorithm.critic.module.value.state_dict())
    algorithm.update(make_batch(), REWARD, GROUP)
    assert algorithm.critic.module.policy is policy
    assert not torch.equal(before["2.bias"], algorithm.critic.module.value[2].bias)
    assert len(algorithm.descent.parameters) == len(list(policy.parameters())) + 4  # shared ones count once


# ---- imitation ----


def test_imitation_raises_the_likelihood_of_the_expert():
    batch, policy = make_batch(), make_policy()
    twin = copy.deepcopy(policy)
    total = sum(-log_probs(twin, batch, e).mean() / E for e in range(E))
    algorithm = Imitation(make_actor(policy, ZeroTruncatedBernoulli), STEP, expert=Threshold(), max_grad_norm=BIG)
    learnt, metrics = learnt_gradient(algorithm, policy, batch)
    torch.testing.assert_close(learnt, expected_gradient(total, twin), atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)


def test_an_expert_that_the_distribution_cannot_follow_is_refused():
    observation = {
        "confidence": torch.full((1, L, 1), 0.95),
        "mask": torch.ones(1, L, dtype=torch.int8),
        "action_mask": torch.ones(1, L, dtype=torch.int8),
        "time": torch.zeros(1, 1),
    }
    many = Demonstration(Threshold(0.9), PolicyDecider(make_policy(), OnePosition))
    with pytest.raises(ValueError, match="OnePosition never takes"):
        many.decide(observation, torch.zeros(1, L))
    narrow = DiTConfidence(width=8, ffn=16, candidates=2)
    with pytest.raises(ValueError, match="candidates"):
        Demonstration(Threshold(0.9), PolicyDecider(narrow, ZeroTruncatedBernoulli)).decide(
            observation, torch.zeros(1, L)
        )
    one = Demonstration(TopKRule(1), PolicyDecider(make_policy(), OnePosition))
    assert one.decide(observation, torch.zeros(1, L))[0].tolist() == [[1, 0, 0, 0]]


# ---- rounds of episodes ----


def test_joined_episodes_keep_everything_apart():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=4)
    policy = PolicyDecider(DiTConfidence(width=16, ffn=16), ZeroTruncatedBernoulli)
    parts = [play_groups(envs, [(policy, 2)], [i], seed=i) for i in range(2)]
    parts[1].group += 1
    whole = join(parts)
    assert whole.group.tolist() == [0, 0, 1, 1]
    longest = max(part.batch.shape[1] for part in parts)
    for i, part in enumerate(parts):
        steps = part.batch.shape[1]
        assert torch.equal(whole.batch["action"][2 * i : 2 * i + 2, :steps], part.batch["action"])
        assert not whole.batch["active"][2 * i : 2 * i + 2, steps:].any()
    assert whole.batch.shape == (4, longest)
    assert torch.equal(whole.reward, torch.cat([part.reward for part in parts]))


class EveryThird(PairTask):
    """Only a third of the prompts can be answered at all: the others teach nothing."""

    def examples(self, split):
        return super().examples(split).from_list([{"prompt": "=" * (1 + i % 3)} for i in range(12)])

    def grade(self, example, completion):
        return super().grade(example, completion) * (example["prompt"] == "=")


def test_dynamic_sampling_replaces_groups_without_variance():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=8, model=pair_dllm(), task=EveryThird(), alpha=0.0)
    policy = PolicyDecider(DiTConfidence(width=8, ffn=8, output_bias=0.0), ZeroTruncatedBernoulli)
    algorithm = GRPO(make_actor(policy.policy, ZeroTruncatedBernoulli), SGD)
    plain = Collector(envs, Prompts(12, seed=0), 0, 4, 8).collect(algorithm, policy)
    assert len(plain.group) == 32 and not group_advantage(plain.reward, plain.group)[1].all()
    prompts = Prompts(12, seed=0)
    full = Collector(envs, prompts, 0, 4, 8, max_batches=20).collect(algorithm, policy)
    assert group_advantage(full.reward, full.group)[1].all()
    assert len(full.group.unique()) == 4 and (torch.bincount(full.group)[full.group.unique()] == 8).all()
    assert prompts.taken > 4 and sum(len(r.reward) for r in full.results) == 8 * prompts.taken
    none = Collector(envs, Prompts(12, seed=0), 0, 4, 8, max_batches=2)
    envs.core.task.grade = lambda example, completion: 0.0
    nothing = none.collect(algorithm, policy)
    assert len(nothing.group) == 32 and len(nothing.results) == 2
    assert algorithm.update(nothing.batch, nothing.reward, nothing.group)["gradient_steps"] == 0


def test_prompts_go_on_where_they_stopped():
    whole = Prompts(7, seed=3).take(20).tolist()
    first, second = Prompts(7, seed=3), Prompts(7, seed=3, taken=12)
    assert first.take(5).tolist() + first.take(7).tolist() + second.take(8).tolist() == whole
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7))


# ---- learning ----


LEARNERS = {
    "grpo": (GRPO, ZeroTruncatedBernoulli, {"epochs": 2}),
    "reinforce": (Reinforce, ZeroTruncatedBernoulli, {}),
    "a2c": (A2C, ZeroTruncatedBernoulli, {}),
    "ppo": (PPO, ZeroTruncatedBernoulli, {"epochs": 4}),
    "ppo_bernoulli": (PPO, MaskedBernoulli, {"epochs": 4, "entropy_scale": 1e-3}),
    "upo": (UPO, OnePosition, {"epochs": 2, "reference": Softmax(1.0)}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_order_of_two_positions_is_learnt(name):
    """Reward 1 only for committing the less confident position first: every rule on confidence scores 0."""
    cls, distribution, settings = LEARNERS[name]
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=32, model=pair_dllm(), task=PairTask(), alpha=0.0)
    assert evaluate(envs, TopKRule(1), [0]).score.item() == 0
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=16, output_bias=0.0)
    decider = PolicyDecider(policy, distribution)
    adam = partial(torch.optim.AdamW, lr=1e-2)
    algorithm = cls(make_actor(policy, distribution), adam, max_grad_norm=1.0, **settings)
    collector = Collector(envs, Prompts(1, seed=0), 0, 8, 8)
    for _ in range(60):
        episodes = collector.collect(algorithm, decider)
        algorithm.update(episodes.batch, episodes.reward, episodes.group)
        if episodes.reward.mean() > 0.99:
            break
    greedy = PolicyDecider(policy, distribution, greedy=True)
    assert evaluate(envs, greedy, [0]).score.item() == 1
    assert evaluate(envs, decider, [0] * 64).score.mean() > 0.9


def test_expert_steering_finds_what_the_policy_alone_does_not():
    """A policy that never tries the right order learns it from the expert's episode alone."""
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=32, model=pair_dllm(), task=PairTask(), alpha=0.0)

    def expert(observation, noise):
        legal = observation["action_mask"] != 0
        last = torch.arange(legal.shape[-1]) == (legal * torch.arange(1, 3)).argmax(-1, keepdim=True)
        return (last & legal).to(torch.int8)

    scores = {}
    for steer in (False, True):
        torch.manual_seed(0)
        policy = DiTConfidence(width=16, ffn=16, output_bias=10.0)  # takes everything at once, always
        decider = PolicyDecider(policy, ZeroTruncatedBernoulli)
        settings = {"epochs": 2, "max_grad_norm": 1.0}
        adam = partial(torch.optim.AdamW, lr=1e-2)
        actor = make_actor(policy, ZeroTruncatedBernoulli)
        algorithm = GRPOWithExpert(actor, adam, expert=expert, **settings) if steer else GRPO(actor, adam, **settings)
        collector = Collector(envs, Prompts(1, seed=0), 0, 4, 4)
        for _ in range(80):
            episodes = collector.collect(algorithm, decider)
            algorithm.update(episodes.batch, episodes.reward, episodes.group)
        scores[steer] = evaluate(envs, decider, [0] * 64).score.mean().item()
    assert scores[False] < 0.1 and scores[True] > 0.9


ALGORITHMS = {
    "grpo": lambda p: GRPO(make_actor(p, ZeroTruncatedBernoulli), adamw(), kl_scale=0.1, clip_epsilon=[0.2, 0.3]),
    "reinforce": lambda p: Reinforce(make_actor(p, ZeroTruncatedBernoulli), adamw(), entropy_scale=0.01),
    "a2c": lambda p: A2C(make_actor(p, ZeroTruncatedBernoulli), adamw()),
    "ppo": lambda p: PPO(make_actor(p, ZeroTruncatedBernoulli), adamw(), epochs=2),
    "imitation": lambda p: Imitation(make_actor(p, ZeroTruncatedBernoulli), adamw(), expert=Threshold()),
    "upo": lambda p: UPO(make_actor(p, OnePosition), adamw(), reference=Softmax(), epochs=2),
}


def adamw():
    return partial(torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_resumes_bit_for_bit(name):
    batch = one_position_batch() if name == "upo" else make_batch()
    policy = make_policy()
    algorithm = ALGORITHMS[name](policy)
    algorithm.update(batch, REWARD, GROUP)
    saved = copy.deepcopy(algorithm.state_dict())
    expected = algorithm.update(batch, REWARD, GROUP)
    other = make_policy(seed=5)
    resumed = ALGORITHMS[name](other)
    resumed.load_state_dict(saved)
    assert resumed.update(batch, REWARD, GROUP) == expected
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_chunks_change_nothing(name):
    batch = one_position_batch() if name == "upo" else make_batch()
    gradients = []
    for chunk in (None, 3):
        policy = make_policy()
        algorithm = ALGORITHMS[name](policy)
        algorithm.descent.chunk = chunk
        steps = []
        algorithm.descent.step = lambda s, into=steps: into.append(s) or {}  # look at what would be learnt from
        algorithm.update(batch, REWARD, GROUP)
        del algorithm.descent.step
        algorithm.descent.backward(steps[0])
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.descent.parameters]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda actor: GRPO(actor, SGD, clip_epsilon=[0.2, -1.0]), "clip_epsilon"),
        (lambda actor: GRPO(actor, SGD, kl_scale=-1.0), "kl_scale"),
        (lambda actor: PPO(actor, SGD, gamma=1.1), "gamma"),
        (lambda actor: A2C(actor, SGD, epochs=2), "epochs"),
        (lambda actor: Reinforce(actor, SGD, epochs=2), "epochs"),
        (lambda actor: Reinforce(actor, SGD, entropy_scale=float("inf")), "entropy_scale"),
    ],
)
def test_invalid_settings_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make(make_actor(make_policy(), ZeroTruncatedBernoulli))


@pytest.mark.parametrize("cls", [Reinforce, A2C, PPO])
def test_an_entropy_that_cannot_be_computed_gives_no_bonus(cls):
    with pytest.raises(ValueError, match="no closed-form entropy"):
        cls(make_actor(make_policy(), DynamicPlackettLuce), SGD, entropy_scale=0.1)


def test_packed_weights_are_those_of_the_mean_over_episodes():
    assert pack(make_batch())["weight"].sum().item() == pytest.approx(1.0)
