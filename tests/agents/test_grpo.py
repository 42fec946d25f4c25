"""Group advantages, the per-episode mean, and GRPO's update against a plain hand-written one."""

import copy
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from agents.advantages import group_advantage
from agents.grpo import GRPO
from agents.losses import Descent, GRPOLoss, pack
from dllm_gym.deciders.distributions import MaskedBernoulli, ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor

E, T, L = 6, 5, 4
LENGTHS = torch.tensor([5, 1, 3, 2, 5, 4])
GROUP = torch.tensor([7, 7, 3, 3, 5, 5])
REWARD = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.2, 0.9])
SGD = partial(torch.optim.SGD, lr=0.1)


def make_policy(seed=0):
    torch.manual_seed(seed)
    policy = DiTConfidence(width=8, ffn=16)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


def make_batch():
    """Ragged episodes collected by another policy than the one trained: ratios far from 1."""
    generator = torch.Generator().manual_seed(0)
    obs = {
        "confidence": torch.rand(E, T, L, 1, generator=generator),
        "mask": torch.ones(E, T, L, dtype=torch.int8),
        "action_mask": (torch.rand(E, T, L, generator=generator) < 0.8).to(torch.int8),
        "time": torch.rand(E, T, 1, generator=generator),
    }
    noise = torch.rand(E, T, L, generator=generator)
    action, log_prob = PolicyDecider(make_policy(seed=1), ZeroTruncatedBernoulli).decide(obs, noise)
    active = torch.arange(T) < LENGTHS[:, None]
    batch = TensorDict({**obs, "action": action, "action_log_prob": log_prob, "active": active}, [E, T])
    batch["confidence"][~active] = torch.nan  # what lies behind the end must not matter
    return batch


def plain_loss(policy, batch, advantage, epsilon, summed=False):
    """The clipped objective episode by episode, as one would write it on paper."""
    total = 0.0
    for e in range(E):
        episode = 0.0
        for t in range(int(LENGTHS[e])):
            step = batch[e, t]
            logits = policy(step["confidence"], step["mask"], step["time"])
            ratio = (
                ZeroTruncatedBernoulli(logits, step["action_mask"]).log_prob(step["action"]) - step["action_log_prob"]
            ).exp()
            episode -= torch.min(ratio * advantage[e], ratio.clamp(1 - epsilon, 1 + epsilon) * advantage[e])
        total += episode if summed else episode / int(LENGTHS[e])
    return total / E


def gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def make_grpo(policy, **settings):
    return GRPO(make_actor(policy, ZeroTruncatedBernoulli), **{"optimizer": SGD, "clip_epsilon": 0.3, **settings})


def test_group_advantage_by_hand():
    advantage, informative = group_advantage(REWARD, GROUP)
    torch.testing.assert_close(advantage, torch.tensor([0.5, -0.5, 0.0, 0.0, -0.35, 0.35]))
    assert informative.tolist() == [True, True, False, False, True, True]


def test_group_advantage_of_interleaved_uneven_groups_and_rounding():
    reward = torch.tensor([0.9, 1.0, 0.9, 4.0, 0.9, 0.7])
    advantage, informative = group_advantage(reward, torch.tensor([0, 1, 0, 1, 0, 2]))
    assert informative.tolist() == [False, True, False, True, False, False]
    assert advantage.tolist() == [0, -1.5, 0, 1.5, 0, 0]  # exactly 0, although the float32 mean of three 0.9 is not 0.9
    with pytest.raises(ValueError, match="finite"):
        group_advantage(torch.tensor([0.0, torch.nan]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="shape|\\[E\\]"):
        group_advantage(reward, torch.tensor([0]))


def test_pack_keeps_active_steps_and_weighs_episodes_equally():
    steps = pack(make_batch())
    assert steps.shape == (int(LENGTHS.sum()),) and steps.get("active", None) is None
    torch.testing.assert_close(steps["weight"], (1 / (E * LENGTHS)).repeat_interleave(LENGTHS))
    assert not steps["confidence"].isnan().any()
    kept = pack(make_batch(), keep=torch.tensor([True, False, False, False, False, True]))
    torch.testing.assert_close(kept["weight"], torch.tensor([1 / 30] * 5 + [1 / 24] * 4))


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_loss_and_gradient_equal_the_plain_ones(chunk):
    batch, advantage = make_batch(), group_advantage(REWARD, GROUP)[0]
    policy, twin = make_policy(), make_policy()
    expected = plain_loss(twin, batch, advantage, 0.3)
    expected.backward()
    batch["advantage"] = advantage[:, None, None].expand(E, T, 1)
    loss = GRPOLoss(
        make_actor(policy, ZeroTruncatedBernoulli), None, clip_epsilon=0.3, entropy_bonus=False, functional=False
    )
    metrics = Descent(loss, SGD, chunk=chunk).backward(pack(batch))
    assert metrics["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient(policy), gradient(twin), atol=1e-6, rtol=0)
    assert gradient(twin).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [None, 4])
def test_diagnostics_are_means_over_active_steps(chunk):
    batch, policy = make_batch(), make_policy()
    steps = pack(batch, keep=group_advantage(REWARD, GROUP)[1])
    with torch.no_grad():
        logits = policy(steps["confidence"], steps["mask"], steps["time"])
        log_ratio = (
            ZeroTruncatedBernoulli(logits, steps["action_mask"]).log_prob(steps["action"]) - steps["action_log_prob"]
        )
    metrics = make_grpo(policy, epochs=1, chunk=chunk).update(batch, REWARD, GROUP)
    ratio = log_ratio.exp()
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["clip_fraction"] == pytest.approx(((ratio - 1).abs() > 0.3).float().mean().item())
    assert metrics["kl_approx"] == pytest.approx(-log_ratio.mean().item(), abs=1e-6)
    assert metrics["max_ratio"] == pytest.approx(ratio.max().item(), rel=1e-5)
    assert metrics["mean_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert metrics["informative"] == pytest.approx(4 / 6)
    assert "ESS" not in metrics


@pytest.mark.parametrize("summed", [False, True])
def test_leaving_out_uninformative_groups_changes_nothing(summed):
    batch, policy, twin = make_batch(), make_policy(), make_policy()
    make_grpo(policy, epochs=1, max_grad_norm=1e9, summed=summed).update(batch, REWARD, GROUP)
    expected = plain_loss(twin, batch, group_advantage(REWARD, GROUP)[0], 0.3, summed)
    expected.backward()
    for ours, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, atol=1e-6, rtol=0)


def test_nothing_informative_means_no_step():
    policy = make_policy()
    before = copy.deepcopy(policy.state_dict())
    optimizer = partial(torch.optim.AdamW, weight_decay=0.1)  # a step with zero gradient would still decay
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    grpo = make_grpo(policy, optimizer=optimizer, scheduler=halve)
    metrics = grpo.update(make_batch(), torch.ones(E), GROUP)
    assert metrics == {"informative": 0.0, "gradient_steps": 0.0, "learning_rate": 1e-3}
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert grpo.update(make_batch(), REWARD, GROUP)["learning_rate"] == 5e-4  # the schedule counts rounds


def test_gradient_is_clipped_to_the_norm():
    policy = make_policy()
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    metrics = make_grpo(policy, epochs=1, max_grad_norm=0.05).update(make_batch(), REWARD, GROUP)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert metrics["grad_norm"] > 0.05
    assert (after - before).norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_resumed_run_continues_bit_for_bit():
    def build(policy):
        decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        return make_grpo(policy, optimizer=partial(torch.optim.AdamW, lr=0.01), scheduler=decay)

    policy, batch = make_policy(), make_batch()
    grpo = build(policy)
    grpo.update(batch, REWARD, GROUP)
    saved = copy.deepcopy(grpo.state_dict())
    expected = grpo.update(batch, REWARD, GROUP)
    resumed_policy = make_policy(seed=5)
    resumed = build(resumed_policy)
    resumed.load_state_dict(saved)
    assert resumed.update(batch, REWARD, GROUP) == expected
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), resumed_policy.parameters(), strict=True))
    with pytest.raises(ValueError, match="scheduler"):
        make_grpo(make_policy()).load_state_dict(saved)
    with pytest.raises(ValueError, match="parameters"):
        build(DiTConfidence(width=16)).load_state_dict(saved)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"clip_epsilon": 1.5}, {"max_grad_norm": 0.0}, {"chunk": 0}])
def test_invalid_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_grpo(make_policy(), **settings)


@pytest.mark.parametrize("cls", [MaskedBernoulli, ZeroTruncatedBernoulli])
def test_learns_to_pick_the_confident_positions(cls):
    """One-step bandit: reward = picks of confident positions minus picks of doubtful ones."""
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=32)
    decider = PolicyDecider(policy, cls)
    adam = partial(torch.optim.AdamW, lr=3e-3)
    grpo = GRPO(make_actor(policy, cls), adam, epochs=2, clip_epsilon=0.5)
    rewards = []
    for _ in range(40):
        prompts = torch.rand(16, 1, 6, 1).expand(16, 8, 6, 1).reshape(128, 6, 1)
        ones = torch.ones(128, 6, dtype=torch.int8)
        obs = {"confidence": prompts, "mask": ones, "action_mask": ones, "time": torch.zeros(128, 1)}
        action, log_prob = decider.decide(obs, torch.rand(128, 6))
        reward = (action * (prompts[..., 0] - 0.5).sign()).sum(-1)
        batch = TensorDict({**obs, "action": action, "action_log_prob": log_prob}, [128])[:, None]
        batch["active"] = torch.ones(128, 1, dtype=torch.bool)
        grpo.update(batch, reward, torch.arange(16).repeat_interleave(8))
        rewards.append(reward.mean().item())
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 1.5  # the best policy gets 3
