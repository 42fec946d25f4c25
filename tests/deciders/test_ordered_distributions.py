"""Dynamic Plackett-Luce and the one-position categorical, proved by enumerating every outcome of a few positions."""

import itertools
import math

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import PPOLoss

import dllm_gym  # noqa: F401  (registers the environment)
from dllm_gym.deciders.distributions import DynamicPlackettLuce, MaskedBernoulli, OnePosition
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.noise import uniform

CLASSES = [DynamicPlackettLuce, OnePosition]
ROWS = {  # logits, action_mask
    "plain": ([0.3, -1.2, 2.0, -0.4, 0.9], [1, 1, 1, 1, 0]),
    "three legal": ([0.3, -1.2, 9.0, -0.4, 0.9], [1, 1, 0, 1, 0]),
    "two legal": ([9.0, 1.2, 9.0, 9.0, -0.4], [0, 1, 0, 0, 1]),
    "one legal": ([0.3, -1.2, 9.0, -0.4, 0.9], [0, 1, 0, 0, 0]),
    "none legal": ([0.3, -1.2, 9.0, -0.4, 0.9], [0, 0, 0, 0, 0]),
    "smart init": ([-2.0, -2.0, -2.0, -2.0, -2.0], [1, 1, 0, 1, 1]),
    "eager": ([3.0, 4.0, 3.5, 5.0, 2.5], [1, 0, 1, 1, 1]),
    "wide": ([-4.0, 6.0, 0.0, 1.0, -1.0], [1, 1, 1, 1, 0]),
    "never a second": ([-30.0, -29.0, -28.5, 0.0, -30.0], [1, 1, 1, 0, 1]),
    "always all": ([30.0, 29.0, 29.5, 0.0, 28.0], [1, 1, 1, 0, 1]),
}
EXTREME = [-math.inf, -3e38, -1e30, -1e4, 0.0, 1e4, 1e30, math.inf]


def row(name, requires_grad=False):
    logits, mask = ROWS[name]
    return torch.tensor(logits, requires_grad=requires_grad), torch.tensor(mask, dtype=torch.int8)


def ranks(order, length=5):
    action = torch.zeros(length, dtype=torch.int16)
    for place, position in enumerate(order):
        action[position] = place + 1
    return action


def outcomes(cls, mask):
    """Every possible action [n, L] and the picks behind it, in order."""
    legal = mask.nonzero().flatten().tolist()
    longest = min(1, len(legal)) if cls is OnePosition else len(legal)
    lengths = range(1, longest + 1) if legal else [0]
    orders = [order for m in lengths for order in itertools.permutations(legal, m)]
    return torch.stack([ranks(order, len(mask)) for order in orders]), orders


def reference(cls, logits, mask, orders):
    """Log-probability of each outcome in float64: the product over its draws, as the papers state it."""
    x, legal = logits.double(), mask.nonzero().flatten().tolist()
    stop = torch.zeros(1, dtype=torch.float64)
    results = []
    for order in orders:
        left, total = list(legal), torch.zeros((), dtype=torch.float64)
        for draw, position in enumerate(order):
            choices = x[left] if draw == 0 else torch.cat([x[left], stop])
            total = total + x[position] - choices.logsumexp(0)
            left.remove(position)
        if left and order and cls is DynamicPlackettLuce:
            total = total - torch.cat([x[left], stop]).logsumexp(0)
        results.append(total)
    return torch.stack(results)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("cls", CLASSES)
class TestEnumeration:
    def test_log_prob_is_the_product_of_the_draws_and_sums_to_one(self, cls, name):
        logits, mask = row(name)
        actions, orders = outcomes(cls, mask)
        log_prob = cls(logits, mask).log_prob(actions)
        assert log_prob.dtype == torch.float32
        assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=2e-6)
        torch.testing.assert_close(log_prob, reference(cls, logits, mask, orders).float(), atol=4e-6, rtol=1e-6)

    def test_gradients_are_those_of_the_product(self, cls, name):
        (logits, mask), (exact, _) = row(name, requires_grad=True), row(name, requires_grad=True)
        actions, orders = outcomes(cls, mask)
        weight = torch.linspace(-1, 2, len(orders))
        (gradient,) = torch.autograd.grad((cls(logits, mask).log_prob(actions) * weight).sum(), logits)
        expected = torch.zeros(5)
        if mask.any():
            (expected,) = torch.autograd.grad((reference(cls, exact, mask, orders) * weight).sum(), exact)
        torch.testing.assert_close(gradient, expected, atol=5e-5, rtol=1e-5)

    @pytest.mark.parametrize("source", ["torch", "environment"])
    def test_samples_have_the_stated_joint_probabilities(self, cls, name, source):
        logits, mask = row(name)
        n = 100_000
        if source == "torch":
            torch.manual_seed(0)
            drawn = cls(logits, mask).sample((n,))
        else:
            drawn = cls(logits, mask).from_noise(uniform(torch.arange(n), 7, 5))
        actions, orders = outcomes(cls, mask)
        base = 6 ** torch.arange(5)
        codes, counts = torch.unique((drawn.long() * base).sum(-1), return_counts=True)
        seen = dict(zip(codes.tolist(), counts.tolist(), strict=True))
        observed = torch.tensor([seen.pop(code, 0) for code in (actions.long() * base).sum(-1).tolist()])
        assert not seen, "an impossible action was drawn"
        expected = reference(cls, logits, mask, orders).exp() * n
        likely = expected > 5
        chi2 = ((observed - expected)[likely] ** 2 / expected[likely]).sum().item()
        freedom = int(likely.sum()) - 1
        assert chi2 <= freedom + 4 * math.sqrt(2 * freedom) + 1e-3
        rare = expected[~likely].sum().item()
        assert abs(observed[~likely].sum().item() - rare) <= 4 * math.sqrt(rare) + 1

    def test_illegal_positions_have_no_influence(self, cls, name):
        logits, mask = row(name)
        changed = torch.where(mask == 1, logits, torch.tensor([100.0, -torch.inf, torch.inf, -3.0, 0.0]))
        noise, junk = torch.rand(50, 5), torch.randint(0, 5, (50, 5))
        a, b = cls(logits, mask), cls(changed, mask)
        action = a.from_noise(noise)
        assert torch.equal(action, b.from_noise(noise))
        assert not (action.bool() & (mask == 0)).any()
        log_prob = a.log_prob(action)
        assert torch.equal(log_prob, b.log_prob(torch.where(mask == 1, action, junk)))
        assert torch.isfinite(log_prob).all()
        assert torch.equal(a.mode, b.mode)


def test_likelihood_of_a_case_worked_out_by_hand():
    logits, mask = torch.tensor([1.0, 2.0, 3.0, 50.0]).log(), torch.tensor([1, 1, 1, 0])
    cases = {  # ranks: first pick * later picks * STOP
        (0, 0, 1, 0): 3 / 6 * 1 / (1 + 2 + 1),
        (2, 0, 1, 0): 3 / 6 * 1 / (1 + 2 + 1) * 1 / (2 + 1),
        (2, 3, 1, 0): 3 / 6 * 1 / (1 + 2 + 1) * 2 / (2 + 1),
        (1, 3, 2, 0): 1 / 6 * 3 / (2 + 3 + 1) * 2 / (2 + 1),
    }
    for action, probability in cases.items():
        log_prob = DynamicPlackettLuce(logits, mask).log_prob(torch.tensor(action))
        assert log_prob.exp().item() == pytest.approx(probability, rel=1e-6)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_scores_of_samples_average_to_zero_over_many_positions(shift):
    """E[grad log p] = 0 holds only if draws and likelihood agree."""
    generator = torch.Generator().manual_seed(2)
    n, length = 6000, 40
    legal = torch.arange(length) < 32
    logits = (torch.randn(length, generator=generator) + shift).expand(n, length).clone().requires_grad_()
    distribution = DynamicPlackettLuce(logits, legal)
    action = distribution.from_noise(torch.rand(n, length, generator=generator))
    (score,) = torch.autograd.grad(distribution.log_prob(action).sum(), logits)
    deviation = score.mean(0)[legal] / (score.std(0)[legal] / math.sqrt(n))
    assert deviation.abs().max() < 4
    assert (score[:, ~legal] == 0).all()
    assert 1 < action.amax(-1).float().mean() < 32


@pytest.mark.parametrize("scale", [1.0, 8.0, 30.0])
def test_likelihood_and_gradient_over_many_positions_equal_float64(scale):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(256, generator=generator) * scale).clamp(-30, 30).requires_grad_()
    mask = (torch.rand(256, generator=generator) < 0.8).to(torch.int8)
    distribution = DynamicPlackettLuce(logits, mask)
    action = distribution.from_noise(torch.rand(256, generator=generator))
    order = action.argsort()[(action == 0).sum() :].tolist()
    assert len(order) > 50
    exact = logits.detach().double().requires_grad_()
    expected = reference(DynamicPlackettLuce, exact, mask, [order])[0]
    log_prob = distribution.log_prob(action)
    assert log_prob.item() == pytest.approx(expected.item(), abs=5e-4)
    gradients = [torch.autograd.grad(value, x)[0] for value, x in ((log_prob, logits), (expected, exact))]
    torch.testing.assert_close(gradients[0], gradients[1].float(), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "action",
    [
        [0, 0, 0, 0],
        [2, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 3, 0, 0],
        [1, 2, 2, 0],
        [-1, 1, 2, 0],
        [0, 2, 3, 1],
        [32767, 1, 0, 0],
    ],
)
def test_actions_that_are_no_ranking_are_impossible(action):
    distribution = DynamicPlackettLuce(torch.zeros(4), torch.tensor([1, 1, 1, 0]))
    assert distribution.log_prob(torch.tensor(action)).item() == -math.inf


def test_ranks_at_illegal_positions_are_ignored():
    distribution = DynamicPlackettLuce(torch.zeros(4), torch.tensor([1, 1, 1, 0]))
    for dtype in (torch.int8, torch.int16, torch.int64):
        a, b = torch.tensor([2, 0, 1, 3], dtype=dtype), torch.tensor([2, 0, 1, 0], dtype=dtype)
        assert distribution.log_prob(a).item() == distribution.log_prob(b).item() > -math.inf
    bits = torch.tensor([False, True, False, True])
    assert distribution.log_prob(bits).item() == pytest.approx(math.log(1 / 3 * 1 / 3))


def test_one_position_is_impossible_with_no_or_several_bits():
    distribution = OnePosition(torch.zeros(4), torch.tensor([1, 1, 0, 0]))
    actions = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]])
    assert distribution.log_prob(actions).tolist() == pytest.approx([-math.inf, -math.inf, -math.inf, math.log(0.5)])


@pytest.mark.parametrize("cls", CLASSES)
def test_impossible_rows_do_not_touch_the_gradients_of_others(cls):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    actions = torch.tensor([[0, 1, 0, 0, 0], [0, 3, 3, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    log_prob = cls(logits, mask).log_prob(actions)
    assert log_prob[1].item() == -math.inf and log_prob[2:].tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(log_prob.exp().sum(), logits)
    alone = logits.detach()[:1].requires_grad_()
    (expected,) = torch.autograd.grad(cls(alone, mask[:1]).log_prob(actions[:1]).exp().sum(), alone)
    torch.testing.assert_close(gradient[:1], expected)
    assert (gradient[1:] == 0).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_extreme_logits_give_finite_results_and_legal_draws(cls):
    values = torch.tensor(list(itertools.product(EXTREME, repeat=4))).requires_grad_()  # (4096, 4)
    mask = torch.tensor([1, 1, 1, 0])
    distribution = cls(values, mask)
    draws = [torch.full((4,), level) for level in (0.0, 2**-24, 0.5, 1 - 2**-24, 1.0)]
    draws.append(torch.tensor([0.5, 0.5, 1.0, 0.0]))  # the earliest arrival is illegal
    draws.append(torch.rand(len(values), 4, generator=torch.Generator().manual_seed(0)))
    for noise in draws:
        action = distribution.from_noise(noise.expand_as(values))
        assert action.bool().any(-1).all() and not action[:, 3].any()
        log_prob = distribution.log_prob(action)
        assert log_prob.isfinite().all() and (log_prob <= 0).all()
        (gradient,) = torch.autograd.grad(log_prob.sum(), values, retain_graph=True)
        assert gradient.isfinite().all()
    assert distribution.log_prob(distribution.mode).isfinite().all()
    if cls is OnePosition:
        assert distribution.entropy().isfinite().all()
        (gradient,) = torch.autograd.grad(distribution.entropy().sum(), values)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("level", [-1e30, -1e6, 1e6, 1e30])
def test_equal_extreme_logits_are_still_drawn_evenly(level):
    noise = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    ordered = DynamicPlackettLuce(torch.full((4,), level), torch.ones(4)).from_noise(noise)
    single = OnePosition(torch.full((4,), level), torch.ones(4)).from_noise(noise)
    for first in (ordered == 1, single == 1):
        assert ((first.float().mean(0) - 0.25).abs() < 0.03).all()
    assert (ordered.bool().sum(-1) == (4 if level > 0 else 1)).all()


def test_hopeless_logits_keep_their_order():
    logits = torch.tensor([-1e6, -1e6 + 1, -2e6])
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)
    for cls in CLASSES:
        log_prob = cls(logits, torch.ones(3)).log_prob(torch.eye(3).long())
        torch.testing.assert_close(log_prob[:2], expected)
        assert log_prob[2] < -9e5


def test_stop_competes_with_small_logits_beside_a_huge_one():
    noise = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    action = DynamicPlackettLuce(torch.tensor([1e30, 0.0, -1e30]), torch.ones(3)).from_noise(noise)
    assert (action[:, 0] == 1).all() and (action[:, 2] == 0).all()
    assert abs((action[:, 1] == 2).float().mean().item() - 0.5) < 0.015  # against STOP, both with rate 1


@pytest.mark.parametrize("name", ROWS)
def test_one_position_entropy_and_its_gradient(name):
    (logits, mask), (exact, _) = row(name, requires_grad=True), row(name, requires_grad=True)
    entropy = OnePosition(logits, mask).entropy()
    log_p = exact.double()[mask == 1].log_softmax(0)
    expected = -(log_p.exp() * log_p).sum()
    assert entropy.item() == pytest.approx(expected.item(), abs=2e-6)
    gradients = [torch.autograd.grad(value, x)[0] for value, x in ((entropy, logits), (expected, exact))]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-5)


def test_one_position_takes_the_leftmost_of_the_most_likely():
    distribution = OnePosition(torch.tensor([[9.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([0, 1, 1, 1]))
    assert distribution.mode.tolist() == distribution.deterministic_sample.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert distribution.mode.dtype == distribution.sample().dtype == torch.int8


def test_greedy_ranking_takes_the_top_and_what_is_likelier_than_stop():
    logits = torch.tensor([[0.5, 2.0, 0.0, 0.5, 9.0], [-3.0, -1.0, -2.0, -1.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    distribution = DynamicPlackettLuce(logits, torch.tensor([1, 1, 1, 1, 0]))
    expected = [[2, 1, 0, 3, 0], [0, 1, 0, 0, 0], [1, 2, 3, 4, 0]]
    assert distribution.mode.tolist() == distribution.deterministic_sample.tolist() == expected
    assert distribution.mode.dtype == distribution.sample().dtype == torch.int16


@pytest.mark.parametrize("cls", CLASSES)
def test_rows_without_a_legal_position_stay_empty(cls):
    distribution = cls(torch.randn(3, 5), torch.zeros(3, 5))
    for action in (distribution.sample(), distribution.mode):
        assert not action.any()
        assert distribution.log_prob(action).tolist() == [0.0] * 3
    if cls is OnePosition:
        assert distribution.entropy().tolist() == [0.0] * 3


@pytest.mark.parametrize("cls", CLASSES)
def test_temperature_divides_the_logits(cls):
    logits, mask = row("plain")
    cold, same = cls(logits, mask, temperature=0.5), cls(logits * 2, mask)
    actions, orders = outcomes(cls, mask)
    assert torch.equal(cold.log_prob(actions), same.log_prob(actions))
    torch.testing.assert_close(cold.log_prob(actions), reference(cls, logits * 2, mask, orders).float())
    noise = torch.rand(100, 5)
    assert torch.equal(cold.from_noise(noise), same.from_noise(noise))
    with pytest.raises(ValueError, match="temperature"):
        cls(logits, mask, temperature=0.0)
    with pytest.raises(ValueError, match="NaN"):
        cls(torch.tensor([0.0, math.nan]), torch.ones(2))


@pytest.mark.parametrize("cls", CLASSES)
def test_leading_dimensions_broadcast_and_rows_are_independent(cls):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    noise = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1))
    distribution = cls(logits, mask)
    action = distribution.from_noise(noise)
    log_prob = distribution.log_prob(action)
    assert distribution.batch_shape == (2, 3) and distribution.event_shape == (5,)
    assert log_prob.shape == (2, 3)
    samples = distribution.sample((4,))
    assert samples.shape == (4, 2, 3, 5) and distribution.log_prob(samples).shape == (4, 2, 3)
    for i, j in itertools.product(range(2), range(3)):
        alone = cls(logits[i, j], mask[j])
        assert torch.equal(alone.from_noise(noise[i, j]), action[i, j])
        assert torch.equal(alone.log_prob(action[i, j]), log_prob[i, j])
        assert torch.equal(alone.mode, distribution.mode[i, j])


def test_a_long_row_needs_more_than_int8_and_too_long_ones_are_refused():
    logits = torch.full((300,), 20.0)
    distribution = DynamicPlackettLuce(logits, torch.ones(300))
    action = distribution.from_noise(torch.rand(300, generator=torch.Generator().manual_seed(0)))
    assert action.sort().values.tolist() == list(range(1, 301))
    expected = -math.lgamma(301)  # every order of 300 equals is as likely, STOP hardly counts
    assert distribution.log_prob(action).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="32768 positions"):
        DynamicPlackettLuce(torch.zeros(32_768), torch.ones(32_768))


def test_only_ranks_are_ordered():
    assert [cls.ordered for cls in (DynamicPlackettLuce, OnePosition, MaskedBernoulli)] == [True, False, False]


def steps(n=6, length=9):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, length, generator=generator) < 0.7
    mask[-1] = False
    observation = {
        "confidence": torch.rand(n, length, 1, generator=generator),
        "mask": mask.to(torch.int8),
        "action_mask": (mask & (torch.arange(length) < 6)).to(torch.int8),
        "time": torch.rand(n, 1, generator=generator),
    }
    return TensorDict(observation, [n])


def network():
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=32)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_in_a_torchrl_actor_and_survives_a_backward(cls):
    policy = network()
    actor = make_actor(policy, cls, temperature=0.7)
    out = actor(steps())
    distribution = cls(out["logits"], out["action_mask"], 0.7)
    assert out["action"].dtype == (torch.int16 if cls.ordered else torch.int8)
    assert torch.equal(out["action"].bool().any(-1), out["action_mask"].bool().any(-1))
    assert torch.equal(out["action_log_prob"], distribution.log_prob(out["action"]))
    actor.get_dist(steps()).log_prob(out["action"]).sum().backward()
    gradients = [p.grad for p in policy.parameters()]
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)
    noise = torch.rand(6, 9)
    decider = PolicyDecider(policy, cls, temperature=0.7)
    assert torch.equal(decider(steps(), noise), distribution.from_noise(noise))
    assert torch.equal(PolicyDecider(policy, cls, greedy=True)(steps(), noise), distribution.deterministic_sample)


def test_torchrl_estimates_the_missing_entropy_from_samples():
    logits, mask = row("plain")
    with pytest.raises(NotImplementedError):
        DynamicPlackettLuce(logits, mask).entropy()
    loss = PPOLoss(make_actor(network(), DynamicPlackettLuce), None, samples_mc_entropy=2000, functional=False)
    batch = loss.actor_network(steps()).detach()
    batch["advantage"] = torch.linspace(-1, 1, 6)[:, None]
    out = loss(batch)
    (out["loss_objective"] + out["loss_entropy"]).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    exact = []
    for logits, mask in zip(batch["logits"], batch["action_mask"], strict=True):
        log_p = reference(DynamicPlackettLuce, logits, mask, outcomes(DynamicPlackettLuce, mask)[1])
        exact.append(-(log_p.exp() * log_p).sum())
    assert out["entropy"].item() == pytest.approx(torch.stack(exact).mean().item(), abs=0.1)


@pytest.mark.parametrize("cls", CLASSES)
def test_plays_whole_episodes_of_the_environment(cls):
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=2)
    observation, _ = envs.reset(seed=0)
    decider = PolicyDecider(DiTConfidence(), cls)
    finished = torch.zeros(2, dtype=torch.bool)
    for step in range(observation["mask"].shape[1]):
        noise = uniform(torch.arange(2), step, observation["mask"].shape[1])
        action = decider(observation, noise)
        legal = observation["action_mask"].bool()
        assert torch.equal(action.bool().any(-1), legal.any(-1)) and not (action.bool() & ~legal).any()
        before = observation["mask"].bool()
        observation, _, terminated, truncated, _ = envs.step(action)
        going = ~terminated
        assert torch.equal(observation["mask"].bool()[going], (before & ~action.bool())[going])
        assert not truncated.any()
        finished |= terminated
        if finished.all():
            break
    assert finished.all()
    envs.close()
