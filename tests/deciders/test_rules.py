"""The hand-made rules on cases worked out by hand, and each of them through whole episodes."""

from pathlib import Path

import gymnasium as gym
import hydra
import pytest
import torch
import yaml

import dllm_gym  # noqa: F401
from agents.evaluation import summary
from agents.rollout import evaluate
from dllm_gym.deciders.rules import (
    Blockwise,
    CertaintyPrior,
    EntropyBounded,
    EntropyThreshold,
    Factor,
    Fixed,
    Growing,
    Hierarchical,
    Joint,
    JointButOne,
    Klass,
    LeastConfident,
    LeftToRight,
    LocalLeap,
    Margin,
    MarginThreshold,
    NegativeEntropy,
    Random,
    Rule,
    Saber,
    Spaced,
    Threshold,
    TopK,
    make_rule,
)

ROOT = Path(__file__).parents[2]
RULES = {
    "random(1)": Random(1),
    "random(3)": Random(3),
    "left_to_right(2)": LeftToRight(2),
    "top_k(1)": TopK(1),
    "top_k(3)": TopK(3),
    "margin(2)": Margin(2),
    "entropy(2)": NegativeEntropy(2),
    "threshold(0.6)": Threshold(0.6),
    "factor(1.0)": Factor(1),
    "eb(0.1)": EntropyBounded(0.1),
    "klass(0.6, 0.01)": Klass(0.6, 0.01),
    "klass(0.6, 0.01, 1)": Klass(0.6, 0.01, history=1),
    "least_confident(2)": LeastConfident(2),
    "certainty_prior(2.0, 3)": CertaintyPrior(2, 3),
    "growing(2.0)": Growing(2),
    "joint(0.4)": Joint(0.4),
    "joint_but_one(0.6)": JointButOne(0.6),
    "entropy_threshold(0.3)": EntropyThreshold(0.3),
    "margin_threshold(0.7)": MarginThreshold(0.7),
    "saber(2)": Saber(),
    "hier(0.9, 0.4)": Hierarchical(),
    "local_leap(0.9, 2, 0.6)": LocalLeap(0.9, 2, 0.6),
    "spaced(joint(0.1), 3)": Spaced(Joint(0.1), 3),
    "spaced(saber(3), 2)": Spaced(Saber(3), 2),
    "blockwise(threshold(0.9), 4)": Blockwise(Threshold(0.9), 4),
    "blockwise(klass(0.6, 0.01), 3)": Blockwise(Klass(0.6, 0.01), 3),
}
RULES["fixed(0,1,0,1,2,2,3,3,0,1)"] = Fixed([0, 1, 0, 1, 2, 2, 3, 3, 0, 1])
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=str)


def observe(confidence, legal, **entries):
    confidence = torch.tensor(confidence)
    if confidence.ndim == 2:
        confidence = confidence[..., None]
    entries = {name: torch.tensor(value) for name, value in entries.items()}
    return {"confidence": confidence, "action_mask": torch.tensor(legal, dtype=torch.int8), **entries}


def decide(rule, confidence, legal, noise=None, **entries):
    obs = observe(confidence, legal, **entries)
    action = rule(obs, torch.zeros(obs["action_mask"].shape) if noise is None else torch.tensor(noise))
    assert action.dtype == torch.int8
    return action.tolist()


def scored(rule, score, legal):
    """The decision when the k-best rules' own entry is ``score``: 1 - entropy, margin or confidence."""
    return decide(rule, score, legal, margin=score, entropy=[[1 - s for s in row] for row in score])


# ---- k per step ----


@pytest.mark.parametrize("make", [TopK, Margin, NegativeEntropy], ids=["top_k", "margin", "entropy"])
def test_k_rules_take_the_best_legal_positions_of_their_entry(make):
    score = [[0.9, 0.2, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4]]
    assert scored(make(2), score, [[0, 1, 1, 1], [1, 1, 1, 1]]) == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_k_rules_read_their_own_entry():
    observation = observe([[0.9, 0.6, 0.5]], [[1, 1, 1]], margin=[[0.1, 0.5, 0.2]], entropy=[[0.7, 0.6, 0.1]])
    picks = [rule(observation, torch.zeros(1, 3)).argmax().item() for rule in (TopK(), Margin(), NegativeEntropy())]
    assert picks == [0, 1, 2]


def test_left_to_right_takes_the_leftmost_legal_positions():
    assert decide(LeftToRight(2), [[0.1, 0.2, 0.9, 0.8, 0.7]], [[0, 1, 0, 1, 1]]) == [[0, 1, 0, 1, 0]]


def test_top_k_leaves_nothing_over():
    legal = torch.ones(1, 7, dtype=torch.int8)
    confidence = torch.rand(1, 7, 1, generator=torch.Generator().manual_seed(0))
    counts = []
    while legal.any():
        action = TopK(3)({"confidence": confidence, "action_mask": legal}, torch.zeros(1, 7))
        counts.append(int(action.sum()))
        legal = legal - action
    assert counts == [3, 3, 1]


def test_k_beyond_the_length_takes_all_legal():
    assert decide(TopK(9), [[0.5, 0.4, 0.3]], [[1, 0, 1]]) == [[1, 0, 1]]


def test_random_follows_its_noise_and_is_uniform():
    assert decide(Random(1), [[0.9, 0.1, 0.1]], [[0, 1, 1]], noise=[[0.99, 0.2, 0.7]]) == [[0, 0, 1]]
    noise = torch.rand(8000, 4, generator=torch.Generator().manual_seed(0))
    obs = {"confidence": torch.rand(8000, 4, 1), "action_mask": torch.tensor([1, 1, 0, 1]).expand(8000, 4)}
    share = Random(2)(obs, noise).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([2 / 3, 2 / 3, 0, 2 / 3]), atol=0.03, rtol=0)


# ---- threshold ----


def test_threshold_falls_back_in_its_own_row_only():
    confidence = [[0.3, 0.5, 0.4], [0.95, 0.2, 0.9], [0.99, 0.99, 0.99]]
    legal = [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert decide(Threshold(0.9), confidence, legal) == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_threshold_is_reached_by_equality():
    assert decide(Threshold(0.9), [[0.9, 0.95, 0.1]], [[1, 1, 1]]) == [[1, 1, 0]]
    assert decide(Threshold(1.0), [[1.0, 0.99, 1.0]], [[1, 1, 1]]) == [[1, 0, 1]]


def test_blocks_come_through_the_action_mask():
    confidence = [[0.1, 0.2, 0.9, 0.95]]  # the next block is more confident but not yet legal
    for rule in (TopK(1), Threshold(0.8), Factor(1.0)):
        assert decide(rule, confidence, [[1, 1, 0, 0]]) == [[0, 1, 0, 0]]


# ---- factor ----


def test_factor_takes_the_largest_n_that_its_weakest_allows():
    # sorted 0.9, 0.8, 0.75, 0.5: (n + 1)(1 - c_n) = 0.2, 0.6, 1.0, 2.5
    confidence, legal = [[0.5, 0.9, 0.75, 0.8]], [[1, 1, 1, 1]]
    picks = {factor: decide(Factor(factor), confidence, legal)[0] for factor in (0.1, 0.5, 0.7, 1.0, 1.1, 2.4, 2.6)}
    assert picks == {
        0.1: [0, 1, 0, 0],  # not even one is allowed: the most confident
        0.5: [0, 1, 0, 0],
        0.7: [0, 1, 0, 1],
        1.0: [0, 1, 0, 1],  # equality is not below
        1.1: [0, 1, 1, 1],
        2.4: [0, 1, 1, 1],
        2.6: [1, 1, 1, 1],
    }


def test_factor_counts_legal_positions_only():
    # legal sorted 0.75, 0.5: 0.5, 1.5; with the committed 1.0 counted in they would be 0.75 and 2.0
    assert decide(Factor(1.6), [[1.0, 0.5, 0.75]], [[0, 1, 1]]) == [[0, 1, 1]]


def test_factor_equals_a_plain_search_over_n():
    generator = torch.Generator().manual_seed(5)
    confidence = torch.rand(200, 8, generator=generator).mul(16).round().div(16)
    legal = (torch.rand(200, 8, generator=generator) < 0.7).to(torch.int8)
    for factor in (0.4, 1.0, 3.0):
        chosen = Factor(factor)({"confidence": confidence[..., None], "action_mask": legal}, confidence)
        for row in range(200):
            c = sorted((confidence[row, i].item() for i in range(8) if legal[row, i]), reverse=True)
            allowed = [n for n in range(1, len(c) + 1) if (n + 1) * (1 - c[n - 1]) < factor]
            assert chosen[row].sum() == max(allowed, default=min(1, len(c)))
            assert sorted(confidence[row][chosen[row] == 1].tolist(), reverse=True) == c[: chosen[row].sum()]


# ---- entropy bound ----


def test_entropy_bound_takes_the_longest_prefix_within_gamma():
    # by confidence: positions 2, 0, 3, 1 with H = 0.1, 0.5, 0.2, 0.9: sum - max = 0, 0.1, 0.3, 0.8
    confidence, entropy, legal = [[0.8, 0.1, 0.9, 0.7]], [[0.5, 0.9, 0.1, 0.2]], [[1, 1, 1, 1]]
    picks = {g: decide(EntropyBounded(g), confidence, legal, entropy=entropy)[0] for g in (0.0, 0.15, 0.35, 0.85)}
    assert picks == {0.0: [0, 0, 1, 0], 0.15: [1, 0, 1, 0], 0.35: [1, 0, 1, 1], 0.85: [1, 1, 1, 1]}


def test_entropy_bound_is_reached_by_equality_and_certain_positions_are_free():
    legal = [[1, 1, 1, 1]]
    entropy = [[0.25, 0.5, 0.0, 0.0]]  # order 2, 3, 0, 1: sum - max = 0, 0, 0, 0.25
    confidence = [[0.8, 0.7, 1.0, 1.0]]
    assert decide(EntropyBounded(0.25), confidence, legal, entropy=entropy) == [[1, 1, 1, 1]]
    assert decide(EntropyBounded(0.0), confidence, legal, entropy=entropy) == [[1, 0, 1, 1]]


def test_entropy_bound_counts_legal_positions_only():
    entropy = [[3.0, 0.25, 0.25]]
    assert decide(EntropyBounded(0.25), [[0.99, 0.8, 0.7]], [[0, 1, 1]], entropy=entropy) == [[0, 1, 1]]


# ---- KLASS ----


def test_klass_wants_confidence_and_stability_over_its_whole_history():
    inf = float("inf")
    confidence = [[0.95, 0.95, 0.95, 0.95, 0.6, 0.95]]
    kl = [[[0.001, 0.002], [0.001, 0.02], [0.02, 0.001], [0.001, inf], [0.0, 0.0], [0.01, 0.0]]]
    legal = [[1, 1, 1, 1, 1, 1]]
    assert decide(Klass(0.6, 0.01), confidence, legal, kl=kl) == [[1, 0, 0, 0, 0, 0]]  # neither by equality
    assert decide(Klass(0.5, 0.011), confidence, legal, kl=kl) == [[1, 0, 0, 0, 1, 1]]
    assert decide(Klass(0.6, 0.011, history=1), confidence, legal, kl=kl) == [[1, 1, 0, 1, 0, 1]]  # the newest alone


def test_klass_falls_back_to_the_most_confident_in_its_own_row_only():
    inf = float("inf")
    confidence = [[0.7, 0.99, 0.8], [0.7, 0.99, 0.8], [0.5, 0.4, 0.99]]
    legal = [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    kl = [[[inf, inf]] * 3, [[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 3]
    assert decide(Klass(0.6, 0.01), confidence, legal, kl=kl) == [[0, 1, 0], [1, 0, 1], [1, 0, 0]]


# ---- joint ----


def test_joint_takes_the_longest_prefix_that_is_right_together():
    # by confidence 0.9, 0.8, 0.8, 0.5: products 0.9, 0.72, 0.576, 0.288
    confidence, legal = [[0.8, 0.5, 0.9, 0.8]], [[1, 1, 1, 1]]
    picks = {p: decide(Joint(p), confidence, legal)[0] for p in (0.95, 0.8, 0.7, 0.5, 0.2)}
    assert picks == {
        0.95: [0, 0, 1, 0],  # not even one is that likely: the most confident
        0.8: [0, 0, 1, 0],
        0.7: [1, 0, 1, 0],  # of equals the left one
        0.5: [1, 0, 1, 1],
        0.2: [1, 1, 1, 1],
    }


def test_joint_but_one_does_not_count_its_last_member():
    # what stands before a position: 1, 0.9, 0.72, 0.576
    confidence, legal = [[0.8, 0.5, 0.9, 0.8]], [[1, 1, 1, 1]]
    picks = {p: decide(JointButOne(p), confidence, legal)[0] for p in (1.0, 0.95, 0.8, 0.6, 0.5)}
    assert picks == {
        1.0: [0, 0, 1, 0],
        0.95: [0, 0, 1, 0],
        0.8: [1, 0, 1, 0],
        0.6: [1, 0, 1, 1],
        0.5: [1, 1, 1, 1],
    }


def test_joint_is_reached_by_equality_and_counts_legal_positions_only():
    for rule, expected in ((Joint(0.5), [0, 1, 0, 0]), (JointButOne(0.5), [0, 1, 1, 0])):
        assert decide(rule, [[0.25, 0.5, 0.5, 0.25]], [[0, 1, 1, 1]]) == [expected]
    assert decide(Joint(1.0), [[1.0, 0.5, 1.0]], [[1, 1, 1]]) == [[1, 0, 1]]
    assert decide(Joint(0.0), [[0.1, 0.2, 0.3]], [[1, 1, 0]]) == [[1, 1, 0]]


# ---- thresholds on other entries ----


def test_entropy_threshold_takes_all_that_are_low_enough_else_the_lowest():
    entropy, legal = [[0.5, 0.25, 0.75, 0.0]] * 2, [[1, 1, 1, 0], [0, 0, 1, 0]]
    confidence = [[0.1] * 4] * 2
    assert decide(EntropyThreshold(0.5), confidence, legal, entropy=entropy) == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert decide(EntropyThreshold(0.1), confidence, legal, entropy=entropy) == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_margin_threshold_takes_all_that_lead_by_enough_else_the_largest_lead():
    margin, legal = [[0.5, 0.25, 0.75, 1.0]] * 2, [[1, 1, 1, 0], [0, 1, 0, 0]]
    confidence = [[0.1] * 4] * 2
    assert decide(MarginThreshold(0.5), confidence, legal, margin=margin) == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert decide(MarginThreshold(0.9), confidence, legal, margin=margin) == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_saber_asks_for_more_than_the_mean_of_what_is_committed():
    confidence, legal = [[1.0, 0.7, 0.6, 0.8, 0.5]] * 4, [[0, 1, 1, 1, 1]] * 3 + [[0, 0, 0, 0, 1]]
    committed = [[0.0] * 5, [0.55, 0, 0, 0, 0], [0.8, 0, 0, 0, 0], [0.9, 0.5, 0.5, 0.5, 0]]
    assert decide(Saber(2), confidence, legal, committed=committed) == [
        [0, 1, 0, 1, 0],  # nothing committed yet: above 1 is nobody, two all the same
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0],  # 0.8 is not above 0.8
        [0, 0, 0, 0, 1],  # above the mean of 0.6 is nobody, and there is only one
    ]
    # what no action committed reads 0 and is left out of the mean
    assert decide(Saber(1), [[1.0, 1.0, 0.6, 0.7]], [[0, 0, 1, 1]], committed=[[0.0, 0.5, 0, 0]]) == [[0, 0, 1, 1]]


# ---- schedules ----


def test_least_confident_takes_the_least():
    assert decide(LeastConfident(2), [[0.1, 0.9, 0.3, 0.3]], [[0, 1, 1, 1]]) == [[0, 0, 1, 1]]


def test_growing_takes_powers_of_its_factor():
    def count(factor, step, length=16):
        time = torch.tensor([[step / length]])
        observation = observe([[0.5] * length], [[1] * length])
        return int(Growing(factor)({**observation, "time": time}, torch.zeros(1, length)).sum())

    assert [count(2.0, step) for step in range(6)] == [1, 2, 4, 8, 16, 16]
    assert [count(1.5, step) for step in range(6)] == [1, 1, 2, 3, 5, 7]  # 1, 1.5, 2.25, 3.375, 5.06, 7.59
    assert [count(1.0, step) for step in (0, 7, 40)] == [1, 1, 1]


def test_growing_takes_the_most_confident_and_rows_have_their_own_step():
    confidence, legal = [[0.1, 0.4, 0.3, 0.2]] * 2, [[1, 1, 1, 1]] * 2
    assert decide(Growing(2), confidence, legal, time=[[0.0], [0.25]]) == [[0, 1, 0, 0], [0, 1, 1, 0]]


def test_certainty_prior_weighs_confidence_with_what_is_committed_around():
    confidence = [[0.5, 0.5, 0.5, 0.5, 0.5]]
    assert decide(CertaintyPrior(1, 1), confidence, [[1] * 5], mask=[[1] * 5]) == [[1, 0, 0, 0, 0]]  # next to the left
    # at the right end is a committed one; the left has the whole prompt beside it, though
    assert decide(CertaintyPrior(1, 2), confidence, [[1, 1, 1, 1, 0]], mask=[[1, 1, 1, 1, 0]]) == [[1, 0, 0, 1, 0]]
    # sigma 1: weights 1, e^-1/2, e^-2, .. = 1, 0.607, 0.135, 0.011, 0.0003: left of 0 lie 0.753, left of 1 0.147
    for second, expected in ((0.5 * 0.753 / 0.147 - 0.1, [1, 0]), (0.5 * 0.753 / 0.147 + 0.1, [0, 1])):
        assert decide(CertaintyPrior(1, 1), [[0.5, second]], [[1, 1]], mask=[[1, 1]]) == [expected]


def test_fixed_commits_what_is_due_else_what_is_next():
    schedule = Fixed([0, 2, 1, 2])
    confidence = [[0.5] * 4] * 5
    legal = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]]
    time = [[0.0], [0.25], [0.25], [0.5], [0.25]]
    assert decide(schedule, confidence, legal, time=time) == [
        [1, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],  # nothing is due: the next of the schedule, the leftmost of equals
        [0, 1, 0, 1],
        [1, 0, 1, 0],  # what is late goes along
    ]
    with pytest.raises(ValueError, match="those of 4 positions: this completion has 3"):
        decide(schedule, [[0.5] * 3], [[1, 1, 1]], time=[[0.0]])


# ---- where positions lie ----


def test_hierarchical_takes_the_best_of_every_run():
    confidence = [[0.5, 0.6, 1.0, 0.3, 0.2, 1.0, 0.95, 0.92, 0.45]]
    legal = [[1, 1, 0, 1, 1, 0, 1, 1, 1]]
    assert decide(Hierarchical(0.9, 0.4), confidence, legal) == [[0, 1, 0, 0, 0, 0, 1, 1, 0]]
    assert decide(Hierarchical(0.9, 0.25), confidence, legal) == [[0, 1, 0, 1, 0, 0, 1, 1, 0]]
    assert decide(Hierarchical(0.99, 0.97), confidence, legal) == [[0, 0, 0, 0, 0, 0, 1, 0, 0]]  # the top one
    assert decide(Hierarchical(0.9, 0.5), [[0.6, 0.6, 1.0, 0.6]], [[1, 1, 0, 1]]) == [[1, 0, 0, 1]]  # left of equals


def test_local_leap_relaxes_around_its_anchors():
    confidence = [[0.8, 0.8, 0.7, 0.95, 0.5, 0.8, 0.8]]
    assert decide(LocalLeap(0.9, 2, 0.75), confidence, [[1] * 7]) == [[0, 1, 0, 1, 0, 1, 0]]
    assert decide(LocalLeap(0.9, 9, 0.75), confidence, [[1] * 7]) == [[1, 1, 0, 1, 0, 1, 1]]
    assert decide(LocalLeap(0.95, 2, 0.7), confidence, [[1] * 7]) == [[0, 0, 0, 1, 0, 0, 0]]  # no anchor: the best
    assert decide(LocalLeap(0.9, 2, 0.75), confidence, [[1, 1, 1, 0, 1, 1, 1]]) == [[1, 0, 0, 0, 0, 0, 0]]


def test_spaced_keeps_what_lies_apart_best_first():
    confidence = [[0.9, 0.95, 0.8, 0.7, 0.85, 0.1]]
    everything = Threshold(0.0)
    assert decide(Spaced(everything, 1), confidence, [[1] * 6]) == [[1] * 6]
    assert decide(Spaced(everything, 2), confidence, [[1] * 6]) == [[0, 1, 0, 0, 1, 0]]
    assert decide(Spaced(Threshold(0.8), 3), confidence, [[1, 0, 1, 1, 1, 1]]) == [[1, 0, 0, 0, 1, 0]]
    assert decide(Spaced(everything, 2), [[0.5] * 5], [[1] * 5]) == [[1, 0, 1, 0, 1]]


# ---- blockwise ----


def test_blockwise_shows_the_first_block_with_a_legal_position():
    confidence = [[0.2, 0.95, 0.99, 0.99, 0.99, 0.3, 0.99]] * 4
    legal = [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1], [0] * 7]
    assert decide(Blockwise(Threshold(0.9), 3), confidence, legal) == [
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],  # the last block may be shorter
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_blockwise_falls_back_within_its_block():
    assert decide(Blockwise(Threshold(0.9), 2), [[0.1, 0.2, 0.99, 0.99]], [[1, 1, 1, 1]]) == [[0, 1, 0, 0]]


def test_blockwise_under_full_diffusion_is_its_rule_in_a_semi_autoregressive_env():
    full = gym.make_vec("DLLMUnmask-v0", num_envs=8, split="test")
    blocks = gym.make_vec("DLLMUnmask-v0", num_envs=8, split="test", block_length=5)
    wrapped = evaluate(full, Blockwise(Threshold(0.9), 5), range(24))
    plain = evaluate(blocks, Threshold(0.9), range(24))
    free = evaluate(full, Threshold(0.9), range(24))
    assert wrapped.completions == plain.completions and torch.equal(wrapped.nfe, plain.nfe)
    assert not torch.equal(wrapped.nfe, free.nfe)


# ---- every rule ----


@pytest.mark.parametrize(
    "rule",
    [
        TopK(1),
        Margin(1),
        NegativeEntropy(1),
        Threshold(0.9),
        Random(1),
        Factor(0.5),
        Klass(0.9),
        LeftToRight(1),
        LeastConfident(1),
        Growing(1),
        Fixed([7] * 40),
        Joint(0.5),
        JointButOne(0.6),
        EntropyThreshold(0.1),
        MarginThreshold(0.9),
        Saber(1),
        Hierarchical(),
        LocalLeap(),
        Spaced(Threshold(0.0), 40),
    ],
    ids=str,
)
def test_ties_fall_to_the_leftmost_legal_position(rule):
    entries = {"margin": [[0.3] * 40], "entropy": [[0.7] * 40], "kl": [[[0.0, 0.0]] * 40]}
    entries |= {"time": [[0.0]], "committed": [[0.0] * 40]}
    expected = [[0, 0, 0, 1] + [0] * 36]
    assert decide(rule, [[0.5] * 40], [[0, 0, 0] + [1] * 37], **entries) == expected


def test_ties_fall_to_the_left_within_a_prefix():
    legal = [[0, 1, 1, 1, 1]]
    assert decide(Factor(1.6), [[0.5] * 5], legal) == [[0, 1, 1, 0, 0]]  # (n + 1) / 2 < 1.6 up to n = 2
    assert decide(EntropyBounded(0.8), [[0.5] * 5], legal, entropy=[[0.7] * 5]) == [[0, 1, 1, 0, 0]]


def random_observation(rows: int, length: int):
    generator = torch.Generator().manual_seed(3)

    def coarse(*shape):  # many ties
        return torch.rand(*shape, generator=generator).mul(8).round().div(8)

    observation = {
        "confidence": coarse(rows, length, 1),
        "action_mask": (torch.rand(rows, length, generator=generator) < 0.4).to(torch.int8),
        "margin": coarse(rows, length),
        "entropy": coarse(rows, length),
        "kl": coarse(rows, length, 2) / 50,
        "time": torch.randint(0, 6, (rows, 1), generator=generator) / length,
    }
    observation["mask"] = observation["action_mask"] | (torch.rand(rows, length, generator=generator) < 0.3)
    observation["committed"] = coarse(rows, length) * (observation["mask"] == 0)
    return observation, coarse(rows, length)


@every_rule
def test_a_row_alone_decides_as_in_company_legally_and_not_in_vain(rule):
    observation, noise = random_observation(60, 10)
    together = rule(observation, noise)
    for i in range(60):
        alone = rule({name: value[i : i + 1] for name, value in observation.items()}, noise[i : i + 1])
        bare = rule({name: value[i] for name, value in observation.items()}, noise[i])
        assert torch.equal(alone[0], together[i]) and torch.equal(bare, together[i])
    legal = observation["action_mask"] != 0
    assert together.dtype == torch.int8 and torch.equal(together.any(-1), legal.any(-1))
    assert not (together.bool() & ~legal).any()


@every_rule
def test_every_rule_requires_what_it_reads(rule):
    observation, noise = random_observation(4, 10)
    bare = {"confidence", "action_mask", "mask", "time"}  # these are always there
    rule({name: observation[name] for name in bare | rule.requires.keys()}, noise)  # enough
    for name, value in rule.requires.items():
        with pytest.raises(ValueError, match=f"reads '{name}'.*build the environment with {name}={value}"):
            rule({k: entry for k, entry in observation.items() if k != name}, noise)


def test_requirements_are_settings_of_the_environment():
    wanted = {name: rule.requires for name, rule in RULES.items() if rule.requires}
    assert wanted == {
        "margin(2)": {"margin": 1},
        "entropy(2)": {"entropy": 1},
        "eb(0.1)": {"entropy": 1},
        "klass(0.6, 0.01)": {"kl": 2},
        "klass(0.6, 0.01, 1)": {"kl": 1},
        "blockwise(klass(0.6, 0.01), 3)": {"kl": 2},
        "entropy_threshold(0.3)": {"entropy": 1},
        "margin_threshold(0.7)": {"margin": 1},
        "saber(2)": {"committed": 1},
        "spaced(saber(3), 2)": {"committed": 1},
    }
    with pytest.raises(ValueError, match=r"klass\(0.6, 0.01, 3\) looks back 3 steps but .* has 2.*kl=3"):
        decide(Klass(0.6, 0.01, history=3), [[0.9]], [[1]], kl=[[[0.0, 0.0]]])


@every_rule
def test_every_rule_plays_whole_episodes(rule):
    if isinstance(rule, Fixed):  # is made for one length
        rule = Fixed(list(range(20)))
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=4, split="test", block_length=10, **rule.requires)
    results = evaluate(envs, rule, range(10))
    assert ((results.nfe >= 2) & (results.nfe <= 20)).all()  # two blocks
    assert results.empty_steps == 0 and all(len(text) == 19 for text in results.completions)


def test_names_and_families():
    assert {str(rule): rule for rule in RULES.values()} == RULES
    results = evaluate(gym.make_vec("DLLMUnmask-v0", num_envs=1, split="test"), Threshold(0.1), [0])
    families = [summary(name, [results])["family"] for name in RULES]
    assert families == [name.partition("(")[0] for name in RULES] and "blockwise" in families


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0),
        lambda: Random(1.5),
        lambda: LeftToRight(-1),
        lambda: Threshold(1.2),
        lambda: Threshold(-0.1),
        lambda: Factor(0.0),
        lambda: Factor(float("nan")),
        lambda: EntropyBounded(-0.1),
        lambda: Klass(1.5),
        lambda: Klass(0.9, 0.0),
        lambda: Klass(0.9, 0.01, 0),
        lambda: Blockwise(Threshold(), 0),
        lambda: Joint(1.1),
        lambda: JointButOne(-0.1),
        lambda: EntropyThreshold(-0.1),
        lambda: MarginThreshold(float("nan")),
        lambda: Saber(0),
        lambda: LeastConfident(0),
        lambda: CertaintyPrior(0.0),
        lambda: CertaintyPrior(1.0, 0),
        lambda: Growing(0.5),
        lambda: Fixed([]),
        lambda: Fixed("012"),
        lambda: Fixed([0, -1]),
        lambda: Fixed([0, 1.5]),
        lambda: Hierarchical(0.5, 0.6),
        lambda: LocalLeap(0.5, 4, 0.75),
        lambda: LocalLeap(0.9, 0),
        lambda: Spaced(Threshold(), 0),
    ],
)
def test_invalid_settings_raise(make):
    with pytest.raises(ValueError, match="need a"):
        make()


def test_every_rule_is_on_the_grids_and_the_grid_of_all_holds_the_others():
    folder = ROOT / "conf" / "heuristics"
    grids = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    parts = ("confidence", "joint", "thresholds", "places", "schedules", "per_step")
    assert grids["grid_all"] == [rule for part in parts for rule in grids[f"grid_{part}"]]
    families = {type(rule).__name__ for rule in RULES.values()} - {"Fixed"}
    for names in (["all"], ["grid_all", "grid_stability"]):
        assert {rule["_target_"].rpartition(".")[2] for name in names for rule in grids[name]} == families
    for name, rules in grids.items():
        names = [str(hydra.utils.instantiate(rule)) for rule in rules]
        assert len(set(names)) == len(names), name


def test_a_rule_is_called_by_its_label_and_its_arguments():
    class Own(Rule):
        label = "own_for_this_test"

        def __init__(self, rule: Rule, share: float = 0.5, k: int = 2):
            self.rule, self.share, self.k = rule, share, k

    class Hidden(Own):
        label = "hidden_for_this_test"

        def __init__(self, secret: int = 1):
            super().__init__(TopK(secret))

    assert str(Own(Threshold(1))) == "own_for_this_test(threshold(1), 0.5, 2)"
    assert str(make_rule(str(Own(Klass(0.6, 0.015, 3), k=4)))) == "own_for_this_test(klass(0.6, 0.015, 3), 0.5, 4)"
    assert "Hidden object" in str(Hidden())
