"""The hand-made rules on cases worked out by hand."""

import pytest
import torch

from agents.heuristics import Margin, Random, Threshold, TopK

RULES = [Random(1), Random(3), TopK(1), TopK(3), Margin(2), Threshold(0.6)]


def observe(confidence, legal):
    confidence = torch.tensor(confidence)
    if confidence.ndim == 2:
        confidence = confidence[..., None]
    return {"confidence": confidence, "action_mask": torch.tensor(legal, dtype=torch.int8)}


def decide(rule, confidence, legal, noise=None):
    obs = observe(confidence, legal)
    action = rule(obs, torch.zeros(obs["action_mask"].shape) if noise is None else torch.tensor(noise))
    assert action.dtype == torch.int8
    return action.tolist()


def test_top_k_takes_the_most_confident_legal_positions():
    confidence = [[0.9, 0.2, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4]]
    assert decide(TopK(2), confidence, [[0, 1, 1, 1], [1, 1, 1, 1]]) == [[0, 0, 1, 1], [0, 0, 1, 1]]


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


def test_blocks_come_through_the_action_mask():
    confidence = [[0.1, 0.2, 0.9, 0.95]]  # the next block is more confident but not yet legal
    for rule in (TopK(1), Threshold(0.8)):
        assert decide(rule, confidence, [[1, 1, 0, 0]]) == [[0, 1, 0, 0]]


def test_margin_is_the_lead_of_the_best_token():
    confidence = [[[0.6, 0.4], [0.5, 0.1], [0.9, 0.05]]]
    assert decide(Margin(1), confidence, [[1, 1, 0]]) == [[0, 1, 0]]
    with pytest.raises(ValueError, match="top_k"):
        decide(Margin(1), [[0.6, 0.5]], [[1, 1]])


def test_threshold_falls_back_in_its_own_row_only():
    confidence = [[0.3, 0.5, 0.4], [0.95, 0.2, 0.9], [0.99, 0.99, 0.99]]
    legal = [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert decide(Threshold(0.9), confidence, legal) == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_threshold_is_reached_by_equality():
    assert decide(Threshold(0.9), [[0.9, 0.95, 0.1]], [[1, 1, 1]]) == [[1, 1, 0]]
    assert decide(Threshold(1.0), [[1.0, 0.99, 1.0]], [[1, 1, 1]]) == [[1, 0, 1]]


@pytest.mark.parametrize("rule", [TopK(1), Margin(1), Threshold(0.9), Random(1)], ids=str)
def test_ties_fall_to_the_leftmost_legal_position(rule):
    confidence = [[[0.5, 0.2]] * 40]
    assert decide(rule, confidence, [[0, 0, 0] + [1] * 37]) == [[0, 0, 0, 1] + [0] * 36]


def test_random_follows_its_noise_and_is_uniform():
    assert decide(Random(1), [[0.9, 0.1, 0.1]], [[0, 1, 1]], noise=[[0.99, 0.2, 0.7]]) == [[0, 0, 1]]
    noise = torch.rand(8000, 4, generator=torch.Generator().manual_seed(0))
    obs = {"confidence": torch.rand(8000, 4, 1), "action_mask": torch.tensor([1, 1, 0, 1]).expand(8000, 4)}
    share = Random(2)(obs, noise).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([2 / 3, 2 / 3, 0, 2 / 3]), atol=0.03, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_alone_decides_as_in_company(rule):
    generator = torch.Generator().manual_seed(3)
    confidence = torch.rand(40, 10, 2, generator=generator).mul(8).round().div(8).sort(-1, descending=True).values
    legal = (torch.rand(40, 10, generator=generator) < 0.4).to(torch.int8)
    noise = torch.rand(40, 10, generator=generator).mul(8).round().div(8)
    together = rule({"confidence": confidence, "action_mask": legal}, noise)
    for i in range(40):
        alone = rule({"confidence": confidence[i : i + 1], "action_mask": legal[i : i + 1]}, noise[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert torch.equal(together.any(-1), legal.any(-1))
    assert not (together.bool() & (legal == 0)).any()


def test_names():
    assert [str(rule) for rule in RULES[2:]] == ["top_k(1)", "top_k(3)", "margin(2)", "threshold(0.6)"]


@pytest.mark.parametrize(
    "make", [lambda: TopK(0), lambda: Random(1.5), lambda: Threshold(1.2), lambda: Threshold(-0.1)]
)
def test_invalid_settings_raise(make):
    with pytest.raises(ValueError, match="not valid"):
        make()
