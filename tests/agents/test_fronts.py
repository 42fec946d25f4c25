"""Fronts of rules, what is chosen on validation, and what a policy is told beside them, worked out by hand."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from agents.evaluation import Played, dataset_rows, evaluate_rows, near
from agents.fronts import envelope, needed, reached, sentences
from agents.pictures import draw
from agents.rollout import Results


def row(name: str, nfe: float, accuracy: float, **more) -> dict:
    ends = {"accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return (
        {"name": name, "family": name.partition("(")[0], "nfe": nfe, "accuracy": accuracy, "reward": 0.0} | ends | more
    )


RULES = [row("a(1)", 6.0, 0.9), row("a(2)", 2.0, 0.4), row("b(1)", 4.0, 0.8), row("b(2)", 4.5, 0.6)]


def test_the_envelope_is_what_no_rule_of_any_family_beats():
    front = envelope([*RULES, row("policy(greedy)", 1.0, 1.0)])
    assert [point["name"] for point in front] == ["a(2)", "b(1)", "a(1)"]
    assert [reached(front, nfe) for nfe in (1.9, 2, 3, 4, 5, 20)] == pytest.approx([0, 0.4, 0.6, 0.8, 0.85, 0.9])
    assert needed(front, 0.6) == pytest.approx(3)


def test_a_further_rule_never_lowers_the_envelope():
    dent = row("c(1)", 3.0, 0.5)  # beaten by no rule, but by a mixture of two
    assert envelope([*RULES, dent]) == envelope(RULES)
    assert reached(envelope([*RULES, row("c(2)", 3.0, 0.7)]), 3) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("nfe", "accuracy", "there", "cost"),
    [
        (3, 0.7, "the best rules there (a(2) mixed with b(1)): 0.600 (+10.0 points)", "3.50 (0.86x)"),
        (4, 0.6, "the best rules there (b(1)): 0.800 (-20.0 points)", "3.00 (1.33x)"),
        (9, 0.95, "the best rules there (a(1)): 0.900 (+5.0 points)", None),
        (1, 0.2, "no rule is that fast (the fastest, a(2): 0.400 at 2.00)", "2.00 (0.50x)"),
    ],
)
def test_a_policy_stands_beside_the_best_of_all_rules(nfe, accuracy, there, cost):
    (sentence,) = sentences([row("policy(greedy)", nfe, accuracy), *RULES])
    needs = (
        f"NFE of the rules at that accuracy: {cost}" if cost else "no rule reaches that accuracy (a(1) comes to 0.900)"
    )
    assert sentence == f"policy(greedy): {accuracy:.3f} at NFE {nfe:.2f}; {there}; {needs}"


def played(score, nfe, alpha=None) -> Played:
    """Two examples, L = 10, paid by score * ((11 - nfe) / 10) ** alpha (1 where none is named)."""
    score, nfe = torch.tensor(score), torch.tensor(nfe)
    reward = score * ((11 - nfe) / 10) ** (1 if alpha is None else alpha)
    return Played([Results(reward, score, nfe, torch.arange(2), ["", ""])], alpha, 10, "multiplicative")


def test_the_rule_and_the_decoding_are_chosen_on_validation_and_told_on_test():
    validation = {
        "policy(greedy)": played([1.0, 0.0], [1, 1]),  # 0.5
        "policy(sampled)": played([1.0, 1.0], [3, 3]),  # 0.8
        "slow(1)": played([1.0, 1.0], [6, 6]),  # 0.5
        "fast(1)": played([1.0, 0.0], [2, 2]),  # 0.45
    }
    test = {
        "policy(greedy)": played([1.0, 1.0], [1, 1]),
        "policy(sampled)": played([1.0, 0.0], [3, 3]),
        "slow(1)": played([1.0, 0.0], [6, 6]),  # 0.25
        "fast(1)": played([1.0, 1.0], [2, 2]),
    }
    rows = evaluate_rows(test, validation)
    assert [row["validation_reward"] for row in rows] == pytest.approx([0.5, 0.8, 0.5, 0.45])
    assert [row["chosen"] for row in rows] == [False, True, True, False]
    assert [row["best_rule"] for row in rows] == ["slow(1)", "slow(1)", None, None]
    first, second, third = sentences(rows)
    assert first == "decoding of the policy, chosen on validation: sampled"
    assert second.startswith("policy(sampled): 0.500 at NFE 3.00; the best rules there (fast(1)): 1.000 (-50.0 points)")
    assert third == "best rule by reward on validation: slow(1): reward 0.250; policy(sampled): 0.400"
    unchosen = evaluate_rows(test)
    assert {row["chosen"] for row in unchosen} == {None} and len(list(sentences(unchosen))) == 2
    (rules_alone,) = sentences(evaluate_rows({"slow(1)": test["slow(1)"]}, {"slow(1)": validation["slow(1)"]}))
    assert rules_alone == "best rule by reward on validation: slow(1): reward 0.250, 0.500 at NFE 6.00"


def test_at_every_alpha_another_rule_may_be_best_though_each_is_decoded_once():
    names = {alpha: f"policy(greedy, alpha={alpha})" for alpha in (1, 8)}
    rules = {"slow(1)": played([1.0, 1.0], [6, 6], 3), "fast(1)": played([1.0, 0.0], [2, 2], 3)}
    # at alpha 1: 0.5 and 0.45; at alpha 8: 0.5 ** 8 and 0.9 ** 8 / 2
    both = {**{name: played([1.0, 1.0], [3, 3], alpha) for alpha, name in names.items()}, **rules}
    rows = {row["name"]: row for row in evaluate_rows(both, both)}
    assert [rows[name]["best_rule"] for name in names.values()] == ["slow(1)", "fast(1)"]
    assert [rows[name]["best_rule_reward"] for name in names.values()] == pytest.approx([0.5, 0.9**8 / 2])
    assert rows["fast(1)"]["chosen"] and not rows["slow(1)"]["chosen"]  # at their own alpha: 0.125 and 0.3645


def test_the_picture_shows_a_policy_as_one_curve_beside_the_envelope_and_no_point_under_the_legend():
    points = ((1, 5, 0.9), (9, 2, 0.5), (3, 3, 0.8))
    curve = [row(f"policy(greedy, alpha={alpha})", nfe, accuracy) for alpha, nfe, accuracy in points]
    figure = draw([*curve, row("policy(sampled)", 3.0, 0.7), *RULES], "title")
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    assert set(labels) == {"policy(greedy), 3 alphas", "policy(sampled)", "all rules, two mixed", "a", "b"}
    assert drawn["policy(greedy), 3 alphas"].lines[0].get_xdata().tolist() == [2, 3, 5]
    line = drawn["all rules, two mixed"]
    assert {2.0, 4.0, 6.0} <= set(line.get_xdata()) and list(line.get_ydata()) == sorted(line.get_ydata())
    figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    plt.close(figure)


def test_what_lies_far_below_the_envelope_on_validation_and_the_worse_decoding_need_not_be_played_on():
    on_validation = {
        "policy(greedy)": played([1.0, 1.0], [3, 3]),  # 0.8
        "policy(sampled)": played([1.0, 0.0], [1, 1]),  # 0.5
        "slow(1)": played([1.0, 1.0], [6, 6]),  # 0.5: the best by reward
        "fast(1)": played([1.0, 0.0], [2, 2]),  # on the envelope
        "poor(1)": played([1.0, 0.0], [4, 4]),  # 0.25 below it
    }
    assert near(on_validation, 0.2) == ["policy(greedy)", "slow(1)", "fast(1)"]
    assert near(on_validation, 0.25) == ["policy(greedy)", "slow(1)", "fast(1)", "poor(1)"]


def test_data_sets_of_a_mixture_have_rows_of_their_own():
    def decider(scores, nfes, lengths=10):
        score, nfe = torch.tensor(scores), torch.tensor(nfes)
        masked, tokens = torch.tensor([False] * 4), torch.tensor([8, 4, 8, 4])
        results = [Results(score, score, nfe, torch.arange(4), ["a", "b", "c", "d"], masked, tokens)] * 2
        return Played(results, 1.0, lengths, "multiplicative")

    test = {
        "slow(1)": decider([1.0, 0.0, 1.0, 1.0], [8, 4, 8, 4]),
        "fast(1)": decider([1.0, 0.0, 0.0, 0.0], [4, 1, 2, 1]),
    }
    rows = dataset_rows(test, ["sums", "grids", "sums", "grids"], "slow(1)")
    assert [(row["dataset"], row["name"]) for row in rows] == [
        ("sums", "slow(1)"), ("sums", "fast(1)"), ("grids", "slow(1)"), ("grids", "fast(1)")
    ]  # fmt: skip
    assert [(row["accuracy"], row["nfe"], row["tokens_per_forward"]) for row in rows] == [
        (1.0, 8.0, 1.0), (0.5, 3.0, 8 / 3), (0.5, 4.0, 1.0), (0.0, 1.0, 4.0)
    ]  # fmt: skip
    assert [row["difference"] for row in rows] == [None, -0.5, None, -0.5] and {row["examples"] for row in rows} == {2}
    assert dataset_rows(test, ["sums"] * 4) == []
    lengths = {"a(1)": decider([1.0] * 4, [2] * 4, torch.tensor([4, 20, 4, 20]))}
    there = {row["dataset"]: row for row in dataset_rows(lengths, ["short", "long", "short", "long"])}
    assert there["short"]["examples"] == there["long"]["examples"] == 2
    assert lengths["a(1)"].part([1, 3]).length.tolist() == [20, 20]
