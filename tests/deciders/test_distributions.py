"""The unmask distributions, proved by enumerating every action of a few positions."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torchrl.modules import ProbabilisticActor

from dllm_gym.deciders.distributions import (
    BernoulliArgmax,
    DynamicPlackettLuce,
    MaskedBernoulli,
    OnePosition,
    ZeroTruncatedBernoulli,
)

CLASSES = [MaskedBernoulli, BernoulliArgmax, ZeroTruncatedBernoulli]
ACTIONS = torch.tensor(list(itertools.product([0, 1], repeat=5)), dtype=torch.int8)  # (32, 5)
ROWS = {  # logits, action_mask
    "plain": ([0.3, -1.2, 2.0, -0.4, 0.9], [1, 1, 1, 1, 1]),
    "masked": ([0.3, -1.2, 9.0, -0.4, 0.9], [1, 1, 0, 1, 0]),
    "one legal": ([0.3, -1.2, 9.0, -0.4, 0.9], [0, 1, 0, 0, 0]),
    "none legal": ([0.3, -1.2, 9.0, -0.4, 0.9], [0, 0, 0, 0, 0]),
    "rare": ([-9.0, -8.0, -9.5, -12.0, -8.0], [1, 1, 1, 0, 1]),
    "1e-30": ([-69.0, -70.0, -69.5, -72.0, -400.0], [1, 1, 1, 1, 1]),
    "extreme": ([-60.0, 50.0, -1.0, 90.0, -300.0], [1, 1, 1, 1, 1]),
    "ties": ([-1.0, -1.0, -1.0, -1.0, -1.0], [1, 1, 1, 1, 1]),
}


def row(name, requires_grad=False):
    logits, mask = ROWS[name]
    return torch.tensor(logits, requires_grad=requires_grad), torch.tensor(mask, dtype=torch.int8)


def legal_actions(mask):
    return ACTIONS[((ACTIONS == 1) & (mask == 0)).sum(-1) == 0]


def reference(cls, logits, mask, actions):
    """P of each legal action in float64, from the definition."""
    x, legal = logits.double(), mask.bool()
    if not legal.any():
        return torch.ones(len(actions), dtype=torch.float64)
    p = torch.where(legal, torch.where(actions.bool(), x, -x).sigmoid(), 1.0).prod(-1)
    nothing = actions.sum(-1) == 0
    if cls is ZeroTruncatedBernoulli:
        return p.masked_fill(nothing, 0) / p[~nothing].sum()
    if cls is BernoulliArgmax:
        top = x.masked_fill(~legal, -math.inf).argmax()
        only_top = (actions.sum(-1) == 1) & (actions[:, top] == 1)
        return p.masked_fill(nothing, 0) + only_top * p[nothing]
    return p


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("cls", CLASSES)
class TestEnumeration:
    def test_log_prob_is_the_definition_and_sums_to_one(self, cls, name):
        logits, mask = row(name)
        actions = legal_actions(mask)
        log_prob = cls(logits, mask).log_prob(actions)
        assert log_prob.dtype == torch.float32
        assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=2e-6)
        expected = reference(cls, logits, mask, actions).log().float()
        assert torch.equal(log_prob.isinf(), expected.isinf())
        torch.testing.assert_close(log_prob, expected, atol=2e-5, rtol=1e-5)

    def test_entropy(self, cls, name):
        logits, mask = row(name)
        expected = torch.special.entr(reference(cls, logits, mask, legal_actions(mask))).sum().item()
        assert cls(logits, mask).entropy().item() == pytest.approx(expected, rel=2e-5, abs=2e-5)

    def test_mode_is_the_most_likely_action(self, cls, name):
        logits, mask = row(name)
        best = reference(cls, logits, mask, legal_actions(mask)).max().log().item()
        mode = cls(logits, mask).mode
        assert mode.dtype == torch.int8
        assert cls(logits, mask).log_prob(mode).item() == pytest.approx(best, abs=2e-5)
        assert not (mode.bool() & (mask == 0)).any()

    def test_gradients_of_log_prob_and_entropy(self, cls, name):
        (logits, mask), (exact, _) = row(name, requires_grad=True), row(name, requires_grad=True)
        actions = legal_actions(mask)
        p = reference(cls, exact, mask, actions)
        possible = p.detach() > 0
        log_p, weight = p[possible].log(), torch.linspace(-1, 1, int(possible.sum()))
        targets = [(log_p * weight).sum(), -(p[possible] * log_p).sum()]
        distribution = cls(logits, mask)
        results = [(distribution.log_prob(actions[possible]) * weight).sum(), distribution.entropy()]
        for result, target in zip(results, targets, strict=True):
            (gradient,) = torch.autograd.grad(result, logits, retain_graph=True)
            expected = torch.zeros(5)
            if mask.any():
                (expected,) = torch.autograd.grad(target, exact, retain_graph=True)
            torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)

    def test_illegal_positions_have_no_influence(self, cls, name):
        logits, mask = row(name)
        changed = torch.where(mask == 1, logits, torch.tensor([100.0, -torch.inf, torch.inf, -3.0, 0.0]))
        noise, junk = torch.rand(50, 5), torch.randint(0, 2, (50, 5))
        a, b = cls(logits, mask), cls(changed, mask)
        assert torch.equal(a.from_noise(noise), b.from_noise(noise))
        action = a.from_noise(noise)
        assert torch.equal(a.log_prob(action), b.log_prob(torch.where(mask == 1, action, junk)))
        assert torch.equal(a.entropy(), b.entropy())
        assert torch.equal(a.deterministic_sample, b.deterministic_sample)

    def test_samples_have_the_stated_probabilities(self, cls, name):
        logits, mask = row(name)
        distribution = cls(logits, mask)
        n = 40_000
        torch.manual_seed(0)
        action = distribution.sample((n,))
        assert action.dtype == torch.int8 and action.shape == (n, 5)
        code = (action.long() * torch.tensor([16, 8, 4, 2, 1])).sum(-1)
        expected = distribution.log_prob(ACTIONS).exp() * n
        expected[((ACTIONS == 1) & (mask == 0)).any(-1)] = 0
        counts = torch.bincount(code, minlength=32)
        likely = expected > 5
        chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
        freedom = int(likely.sum()) - 1
        assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 1e-3
        assert counts[~likely].sum().item() <= expected[~likely].sum().item() + 5 * math.sqrt(5 * 32)
        assert counts[expected < 1e-9].sum() == 0


def scan(x, legal, noise):
    """Float64 reference of the sequential draw: returns the action and how close a comparison came."""
    p = torch.where(legal, x.double().sigmoid(), 0)
    miss = torch.where(legal, (-x.double()).sigmoid(), 1)
    action, closest = torch.zeros(len(x), dtype=torch.int8), 1.0
    for i in range(len(x)):
        if action.any():
            chance = p[i].item()
        else:  # 1 - prod (1 - p) without cancellation: sum of p_j prod_{k < j} (1 - p_k)
            ahead = torch.cat([torch.ones(1, dtype=torch.float64), miss[i:-1].cumprod(0)])
            total = (p[i:] * ahead).sum().item()
            chance = p[i].item() / total if total else 0.0
        if 0 < chance < 1:
            closest = min(closest, abs(noise[i].item() - chance))
        action[i] = noise[i].item() < chance
    return action, closest


@pytest.mark.parametrize("scale", [0.5, 5.0, 40.0, 200.0])
def test_zero_truncated_draw_equals_the_sequential_definition(scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator) * scale - scale
    legal = torch.rand(200, 12, generator=generator) < 0.7
    noise = torch.rand(200, 12, generator=generator).clamp(2**-24, 1 - 2**-24)
    drawn = ZeroTruncatedBernoulli(x, legal).from_noise(noise)
    checked = 0
    for i in range(200):
        expected, closest = scan(x[i], legal[i], noise[i])
        if closest > 1e-5:
            assert torch.equal(drawn[i], expected)
            checked += 1
    assert checked > 190


@pytest.mark.parametrize("noise", [0.0, 2**-24, 0.5, 1 - 2**-24])
def test_extreme_noise_never_empties_or_leaves_the_legal_set(noise):
    x = torch.tensor([[-300.0, -200.0, 5.0, -69.0], [80.0, -80.0, -80.0, 0.0], [-1e9, -2e9, -3e9, -4e9], [0, 0, 0, 0]])
    legal = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    for cls in (BernoulliArgmax, ZeroTruncatedBernoulli):
        action = cls(x, legal).from_noise(torch.full_like(x, noise))
        assert torch.equal(action.any(-1), legal.any(-1))
        assert not (action.bool() & (legal == 0)).any()
        assert cls(x, legal).log_prob(action).isfinite().all()


def test_last_chance_is_certain_despite_rounding():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * 8 - 12
    legal = torch.rand(2000, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    action = ZeroTruncatedBernoulli(x, legal).from_noise(torch.full_like(x, 1 - 2**-24))
    assert action.any(-1).all()


def test_hopeless_logits_keep_their_order():
    distribution = ZeroTruncatedBernoulli(torch.tensor([-1e6, -1e6 + 1, -2e6]), torch.ones(3))
    log_prob = distribution.log_prob(torch.eye(3))
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(log_prob[:2], expected)
    assert log_prob[2] < -9e5
    assert distribution.entropy().item() == pytest.approx(-(expected.exp() * expected).sum().item(), rel=1e-4)


def test_empty_action_is_impossible_where_a_pick_is_certain():
    logits, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    for cls in (BernoulliArgmax, ZeroTruncatedBernoulli):
        assert cls(logits, mask).log_prob(torch.zeros(2, 3)).tolist() == [-math.inf, 0.0]
    assert MaskedBernoulli(logits, mask).log_prob(torch.zeros(2, 3)).tolist() == pytest.approx([2 * math.log(0.5), 0.0])


def test_ties_fall_to_the_leftmost_legal_position():
    mask = torch.tensor([0, 1, 1, 1])
    for cls in (BernoulliArgmax, ZeroTruncatedBernoulli):
        assert cls(torch.full((4,), -2.0), mask).deterministic_sample.tolist() == [0, 1, 0, 0]
    assert BernoulliArgmax(torch.full((4,), -2.0), mask).from_noise(torch.full((4,), 0.99)).tolist() == [0, 1, 0, 0]


def test_greedy_takes_all_above_one_half_though_the_mode_may_be_one_position():
    distribution = BernoulliArgmax(torch.tensor([0.1, 0.1]), torch.ones(2))
    assert distribution.deterministic_sample.tolist() == [1, 1]
    assert distribution.mode.tolist() == [1, 0]


@pytest.mark.parametrize("cls", CLASSES)
def test_temperature_divides_the_logits(cls):
    logits, mask = row("masked")
    cold, same = cls(logits, mask, temperature=0.5), cls(logits * 2, mask)
    action = legal_actions(mask)[1:]
    assert torch.equal(cold.log_prob(action), same.log_prob(action))
    assert torch.equal(cold.entropy(), same.entropy())
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            cls(logits, mask, temperature=wrong)


@pytest.mark.parametrize("cls", CLASSES)
def test_nan_logits_raise(cls):
    with pytest.raises(ValueError, match="NaN"):
        cls(torch.tensor([0.0, math.nan]), torch.tensor([1, 1]))


@pytest.mark.parametrize("cls", CLASSES)
def test_leading_dimensions_broadcast_and_rows_are_independent(cls):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1, 0, 1, 1, 1])
    noise = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1))
    distribution = cls(logits, mask)
    action = distribution.from_noise(noise)
    assert distribution.batch_shape == (2, 3) and distribution.event_shape == (5,)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == (2, 3)
    assert distribution.sample((4,)).shape == (4, 2, 3, 5)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(cls(logits[i, j], mask).from_noise(noise[i, j]), action[i, j])


@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision_logits_are_computed_in_float32(cls):
    logits, mask = torch.linspace(-3, 2, 256).bfloat16(), torch.ones(256)
    action = (torch.arange(256) % 3 == 0).to(torch.int8)
    log_prob = cls(logits, mask).log_prob(action)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, cls(logits.float(), mask).log_prob(action))


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_in_a_torchrl_actor(cls):
    actor = ProbabilisticActor(
        TensorDictModule(torch.nn.Identity(), in_keys=["x"], out_keys=["logits"]),
        in_keys=["logits", "action_mask"],
        out_keys=["action"],
        distribution_class=cls,
        distribution_kwargs={"temperature": 0.7},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    observation = TensorDict({"x": torch.randn(4, 6), "action_mask": torch.ones(4, 6, dtype=torch.int8)}, [4])
    distribution = cls(observation["x"], observation["action_mask"], 0.7)
    out = actor(observation.clone())
    assert torch.equal(out["action_log_prob"], distribution.log_prob(out["action"]))
    with set_interaction_type(InteractionType.DETERMINISTIC):
        assert torch.equal(actor(observation.clone())["action"], distribution.deterministic_sample)


@pytest.mark.parametrize("kind", [MaskedBernoulli, ZeroTruncatedBernoulli, OnePosition, DynamicPlackettLuce])
def test_extreme_temperatures_are_the_limits_not_ties(kind):
    logits = torch.tensor([[-3.0, -1.0, -2.0, 5.0], [3.0, 0.5, 2.0, 9.0]]).expand(200, 2, 4)
    legal = torch.tensor([1, 1, 1, 0])
    noise = torch.rand(200, 2, 4, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    greedy = (logits > 0) * legal if kind is MaskedBernoulli else kind(logits, legal).deterministic_sample
    for cold in (5e-324, 1e-310, 1e-40, 1e-20):
        assert (kind(logits, legal, cold).from_noise(noise) == greedy).all()
    for hot in (1e20, 1e38, 1.7e308):
        drawn = kind(logits, legal, hot)
        assert torch.equal(drawn.from_noise(noise), kind(0 * logits, legal).from_noise(noise))
        assert drawn.log_prob(drawn.from_noise(noise)).isfinite().all()
