"""Fronts, areas and verdicts, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from agents.reproduction.claims import (
    COLUMNS,
    Cell,
    Finding,
    area,
    better_decoding,
    blocks,
    cells,
    falls,
    fast,
    knob,
    lead,
    measured,
    needed,
    order,
    over_seeds,
    pareto,
    quality,
    quick,
    reached,
    read_results,
    read_table,
    transfers,
    verdict,
    whole_front,
    write_table,
)


def point(nfe, accuracy, **more):
    whole = {**dict.fromkeys(COLUMNS), "nfe": nfe, "nfe_low": nfe, "nfe_high": nfe, "accuracy": accuracy}
    return {**whole, "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02, "examples": 100, **more}


def at_alphas(*points):
    return [point(nfe, accuracy, alpha=alpha, seed=0) for alpha, nfe, accuracy in points]


FRONT = [point(2, 0.4), point(4, 0.8)]


def test_a_front_holds_what_no_point_beats():
    points = [point(4, 0.8), point(3, 0.3), point(2, 0.4), point(2, 0.2), point(9, 0.8)]
    assert [(p["nfe"], p["accuracy"]) for p in pareto(points)] == [(2, 0.4), (4, 0.8)]


def test_a_front_is_zero_left_of_its_start_linear_between_its_points_and_flat_behind():
    assert [reached(FRONT, x) for x in (1.9, 2, 3, 4, 20)] == pytest.approx([0, 0.4, 0.6, 0.8, 0.8])
    assert [needed(FRONT, y) for y in (0.3, 0.4, 0.6, 0.8, 0.81)] == [2, 2, 3, 4, math.inf]
    assert reached([], 3) == 0 and needed([], 0.1) == math.inf


def test_the_area_is_the_mean_accuracy_over_nfe():
    # (2, .4) to (4, .8): 2 * .6; (4, .8) to (10, .8): 6 * .8; nothing from 1 to 2; over a range of 9.
    assert area(FRONT, 10) == pytest.approx((1.2 + 4.8) / 9)
    # 0.2 x between 2 and 4, over dx / x: 0.2 * 2; then .8 ln(10 / 4); over ln 10.
    assert area(FRONT, 10, log=True) == pytest.approx((0.4 + 0.8 * math.log(2.5)) / math.log(10))
    assert area([point(1, 0.7)], 10) == pytest.approx(0.7) == area([point(1, 0.7)], 10, log=True)
    assert area([point(10, 0.7)], 10) == 0 == area([], 10)


def test_the_fastest_point_of_all_rules_belongs_to_every_front_of_a_cell():
    cell = Cell("sudoku", "full_diffusion", 10, {"top_k": [point(1, 0.2), point(10, 1)], "klass": [point(4, 0.8)]})
    # (1, .2) to (4, .8): 3 * .5; then 6 * .8
    assert cell.area(cell.heuristics["klass"]) == pytest.approx((1.5 + 4.8) / 9)
    assert cell.area(cell.heuristics["klass"], own=True) == pytest.approx(4.8 / 9)


def test_the_best_heuristic_is_the_highest_family_at_that_nfe():
    cell = Cell("sudoku", "full_diffusion", 10, {"a": FRONT, "b": [point(1, 0.3), point(2.5, 0.45), point(10, 1)]})
    at_two, at_three, at_ten = (cell.best_heuristic(x) for x in (2, 3, 10))
    assert (at_two.family, at_two.accuracy, at_two.low) == ("a", 0.4, pytest.approx(0.38))
    assert (at_three.family, at_three.accuracy) == ("a", pytest.approx(0.6))
    assert (at_ten.family, at_ten.low) == ("b", pytest.approx(0.025**0.01))  # 100 of 100: not the bootstrap's 1
    assert cell.best_heuristic(0.5).accuracy == 0


# A threshold front through (1, .2), (4, .8) and (6, 1): threshold 0.9 takes 6 NFE, the fast regime ends at 4.2.
RULES = {"threshold": [point(1, 0.2, setting="0.0"), point(4, 0.8, setting="0.5"), point(6, 1.0, setting="0.9")]}
RULES = {family: [{**p, "family": family} for p in points] for family, points in RULES.items()}


def cell(*points, env="full_diffusion", who="policy", **others):
    return Cell("sudoku", env, 20, RULES, {who: at_alphas(*points), **others}, {who: at_alphas(*points)})


def test_the_fast_claim_is_about_the_margin_at_the_same_nfe():
    (found,) = fast(cell((1, 5.0, 1.0), (3, 4.0, 0.95), (10, 2.5, 0.61)))
    # at 5: too slow; at 4: .95 - .8; at 2.5: .61 - .5
    assert found.holds and found.numbers["margin"] == pytest.approx(0.15) and found.numbers["nfe"] == 4.0
    assert "2 of 2 alphas within the limit reach +10" in found.text
    assert not fast(cell((1, 4.0, 0.89)))[0].holds
    (slow,) = fast(cell((1, 5.0, 1.0)))
    assert not slow.holds and slow.text == "the fastest policy takes 5.00 NFE, the limit is 4.20"
    assert fast(cell((1, 4.0, 1.0), env="semi_autoregressive")) == []


def test_the_quality_claim_compares_with_the_best_heuristic_and_names_the_first():
    (found,) = quality(cell((1, 5.5, 0.995), (3, 4.0, 0.8)))
    # target .99: between (4, .8) and (5.5, .995) at 4 + 1.5 * .19 / .195; threshold 0.9 at 6; its front at 5.9
    assert found.holds and found.numbers["nfe"] == pytest.approx(4 + 1.5 * 0.19 / 0.195)
    assert (found.numbers["best_nfe"], found.numbers["first_nfe"]) == (6, pytest.approx(5.9))
    (slow,) = quality(cell((1, 6.5, 0.99)))
    assert not slow.holds and slow.numbers["nfe"] == 6.5
    (never,) = quality(cell((1, 3.0, 0.9)))
    assert not never.holds and "stays below 0.990 (0.900)" in never.text


def test_the_quality_claim_also_says_what_each_seed_needs_alone():
    place = cell((1, 5.5, 0.99))
    place.seeds = {"policy": [{**p, "seed": seed} for seed, p in enumerate([point(5, 1.0), point(6, 0.98)])]}
    (found,) = quality(place)
    assert found.holds and "reaches 0.990 at NFE 5.50 (seeds alone: 5.00, never);" in found.text


def test_the_claim_about_blocks_looks_at_every_bend_of_both_fronts():
    # lower ends: .18, .78 and 0.025 ** .01 = .9638 at 6; between them straight lines
    (found,) = blocks(cell((1, 6.0, 0.97), (3, 4.0, 0.79), env="semi_autoregressive"))
    assert found.holds and found.numbers["gap"] == pytest.approx(0.97 - 0.025**0.01)
    assert found.numbers["from"] == 4.0
    (below,) = blocks(cell((1, 6.0, 0.97), (3, 3.0, 0.57), env="semi_autoregressive"))  # .77 < .78 at the bend at 4
    assert not below.holds
    assert below.numbers["gap"] == pytest.approx(0.57 + 0.4 / 3 - 0.78) and below.numbers["nfe"] == 4
    assert blocks(cell((1, 6.0, 1.0))) == []


def test_the_claim_about_the_whole_front_wants_area_and_a_monotone_knob():
    separate = at_alphas((1, 4.0, 1.0), (10, 2.0, 0.6))
    good = cell((1, 4.0, 0.99), (10, 2.0, 0.6), who="conditioned", policy=separate)
    (found,) = whole_front(good)
    # shared start (1, .2): 1 * .4 + 2 * .795 + 16 * .99 over 19; with 1.0 instead: 1 * .4 + 2 * .8 + 16
    assert found.numbers["area"] == pytest.approx((0.4 + 1.59 + 15.84) / 19)
    assert found.numbers["ratio"] == pytest.approx((0.4 + 1.59 + 15.84) / 18.0)
    assert found.numbers["heuristic"] == pytest.approx((3 * 0.5 + 2 * 0.9 + 14) / 19)
    assert found.holds and "1 of 1 seeds" in found.text
    assert not whole_front(cell((1, 4.0, 0.95), (10, 2.0, 0.6), who="conditioned", policy=separate))[0].holds
    crossed = cell((1, 4.0, 0.99), (3, 1.9, 0.6), (10, 2.0, 0.6), who="conditioned", policy=separate)
    assert not whole_front(crossed)[0].holds and "does not always fall" in whole_front(crossed)[0].text
    assert whole_front(cell((1, 4.0, 1.0))) == []


def test_the_claim_about_the_knob_wants_the_area_of_all_rules_together_and_every_seed_monotone():
    rules = {"one": [point(1, 0.2), point(4, 0.8)], "other": [point(3, 0.8), point(9, 1.0)]}
    points = at_alphas((1, 5.0, 1.0), (10, 2.0, 0.6))
    crossed = [{**p, "seed": 1, "nfe": 7 - p["nfe"]} for p in points]
    place = Cell("sudoku", "full_diffusion", 10, rules, {"conditioned": points}, {"conditioned": points})
    (found,) = knob(place)
    # rules: (1, .2) to (3, .8) to (9, 1), then 1: 2 * .5 + 6 * .9 + 1. Policy: .4 + 3 * .8 + 5 over 9.
    assert found.numbers["envelope"] == pytest.approx(7.4 / 9)
    assert found.numbers["ratio"] == pytest.approx(7.8 / 7.4)
    assert found.holds and "in 1 of 1 seeds" in found.text
    del place.seeds["conditioned"]
    assert not knob(place)[0].holds and "in 0 of 0 seeds" in knob(place)[0].text
    place.seeds["conditioned"] = [*points, *crossed]
    assert not knob(place)[0].holds and "in 1 of 2 seeds" in knob(place)[0].text
    slower = Cell("sudoku", "full_diffusion", 10, rules, {"conditioned": at_alphas((1, 6.0, 0.9), (10, 4.0, 0.8))})
    assert knob(slower)[0].numbers["ratio"] < 1 and not knob(slower)[0].holds
    assert knob(cell((1, 4.0, 1.0))) == []


def test_a_knob_is_monotone_if_nfe_never_rises_with_alpha():
    assert falls(at_alphas((10, 2, 0), (1, 5, 0), (3, 2, 0)))  # in any order; equal is allowed
    assert not falls(at_alphas((1, 5, 0), (3, 5.1, 0), (10, 2, 0)))
    assert not falls(at_alphas((1, 5, 0), (10, 5, 0)))  # a knob that does nothing


def test_claims_are_measured_against_the_papers_rules_and_against_every_one():
    rules = {"threshold": [point(4, 0.9, family="threshold", setting="0.9")], "eb": [point(2, 0.7)]}
    place = Cell("sudoku", "full_diffusion", 20, rules, {"policy": at_alphas((10, 2, 0.75))})
    found = {f.rules: f for f in measured([place]) if f.claim == "fast"}
    assert found["papers"].numbers["margin"] == pytest.approx(0.75) and found["papers"].holds  # none is that fast
    assert found["every"].numbers["margin"] == pytest.approx(0.05) and not found["every"].holds
    alone = place.against(["threshold"])
    assert list(alone.heuristics) == ["threshold"] and {f.rules for f in measured([alone])} == {"papers"}


def test_a_claim_holds_where_one_way_of_learning_makes_it_hold():
    def found(where, who, holds):
        return Finding("fast", where, who, holds, "", {})

    assert verdict([]) == "not measured"
    assert verdict([found("a", "policy", False), found("a", "conditioned", True)]) == "holds"
    assert verdict([found("a", "policy", True), found("b", "policy", False)]) == "holds for a only"
    assert verdict([found("a", "policy", False)]) == "does not hold"


# Rows


def row(kind="policy", seed=0, split="test", decode="greedy", accuracy=0.5, reward=0.5, alpha=1.0, **more):
    labels = {"task": "sudoku", "env": "full_diffusion", "trained_on": "sudoku", "kind": kind, "family": "policy"}
    labels |= {"seed": seed, "split": split, "decode": decode, "reward": reward, "alpha": alpha, "length": 20}
    return point(more.pop("nfe", 4.0), accuracy, **{**labels, **more})


def test_seeds_are_averaged_with_their_intervals():
    (mean,) = over_seeds([row(seed=0, accuracy=0.4, nfe=3.0), row(seed=1, accuracy=0.6, nfe=4.0)])
    assert (mean["accuracy"], mean["nfe"], mean["seeds"]) == (0.5, 3.5, 2)
    assert (mean["accuracy_low"], mean["accuracy_high"]) == (pytest.approx(0.48), pytest.approx(0.52))
    assert mean["accuracy_sd"] == pytest.approx(0.02**0.5) and mean["nfe_sd"] == pytest.approx(0.5**0.5)
    assert len(over_seeds([row(alpha=1.0), row(alpha=3.0), row(decode="sampled")])) == 3
    assert math.isnan(over_seeds([row()])[0]["accuracy_sd"])


def test_the_validation_split_chooses_between_greedy_and_sampled():
    validation = [
        row(split="validation", decode=how, seed=seed, reward=reward)
        for how, rewards in (("greedy", (0.9, 0.1)), ("sampled", (0.6, 0.6)))
        for seed, reward in enumerate(rewards)
    ]
    test = [row(decode=how, accuracy=accuracy) for how, accuracy in (("greedy", 0.9), ("sampled", 0.2))]
    moved = row(kind="transfer", task="arithmetic", decode="sampled")  # decodes as it would at home
    rule = row(kind="heuristic", trained_on=None, family="top_k", decode=None, reward=None, alpha=None)
    unused = row(kind="transfer", task="arithmetic", decode="greedy")
    assert better_decoding([*validation, *test, moved, rule, unused]) == [test[1], moved, rule]


def test_cells_and_transfers_are_told_apart():
    rule = {"kind": "heuristic", "trained_on": None, "family": "top_k", "decode": None, "reward": None, "alpha": None}
    rows = [row(split="validation"), row(), row(**rule), row(**rule, task="arithmetic", nfe=7.0)]
    rows += [row(kind="transfer", task="arithmetic"), row(kind="transfer", world="long"), row(**rule, world="long")]
    here, there = cells(rows)
    assert (here.task, list(here.learned), list(here.heuristics)) == ("sudoku", ["policy"], ["top_k"])
    assert (there.task, there.learned) == ("arithmetic", {})
    other, long = transfers(rows)
    assert (other.trained_on, other.there.task, other.native) == ("sudoku", "arithmetic", there)
    assert other.there.heuristics["top_k"][0]["nfe"] == 7.0 and len(other.there.learned["policy"]) == 1
    assert (long.world, long.native, len(long.there.heuristics["top_k"])) == ("long", None, 1)


def test_a_run_becomes_rows_of_the_table_and_the_table_survives_its_file(tmp_path):
    numbers = {
        "accuracy": 1 / 3,
        "accuracy_low": 0.3,
        "accuracy_high": 0.4,
        "nfe": 2.0,
        "nfe_low": 1.9,
        "nfe_high": 2.1,
    }
    numbers |= {"reward": 0.25, "examples": 40, "seeds": 1}
    names = ["klass(0.6, 0.1, 1)", "policy(greedy)", "policy(sampled, alpha=0.3)"]
    (tmp_path / "results.json").write_text(json.dumps([{"name": name, **numbers} for name in names]))
    labels = {"task": "sudoku", "kind": "policy", "family": "policy", "alpha": 3, "seed": 0, "length": 20}
    rule, greedy, sampled = read_results(tmp_path, labels)
    assert (rule["family"], rule["setting"], rule["reward"]) == ("klass", "0.6, 0.1, 1", None)
    assert (greedy["decode"], greedy["alpha"], greedy["family"]) == ("greedy", 3.0, "policy")
    assert (sampled["decode"], sampled["alpha"], sampled["reward"]) == ("sampled", 0.3, 0.25)
    write_table([rule, greedy, sampled], tmp_path / "table.csv")
    again = read_table(tmp_path / "table.csv")
    assert again[0] == {**rule, "accuracy": 0.333333}
    write_table(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()


def test_the_quick_version_needs_its_figure_and_its_time():
    rule = {
        "kind": "heuristic",
        "trained_on": None,
        "family": "threshold",
        "decode": None,
        "reward": None,
        "alpha": None,
    }
    rows = [row(split="validation"), row(accuracy=0.6, nfe=3.0), row(**rule, setting="0.9", nfe=5.0, accuracy=1.0)]
    assert quick(rows, 14.0)[0].holds and not quick(rows, 16.0)[0].holds
    rows.append(row(**rule, setting="0.5", nfe=2.0, accuracy=0.7))
    assert not quick(rows, 14.0)[0].holds


def test_the_lead_is_measured_where_some_rule_is_that_fast():
    learned = at_alphas((10, 1.5, 0.3), (1, 3, 0.9), (0.1, 6, 0.95), (0.01, 8, 0.95))
    cell = Cell("sums", "full_diffusion", 10, {"top_k": FRONT}, {"conditioned": learned}, {"conditioned": learned})
    (found,) = lead(cell)  # at 3 the envelope is 0.6; no rule is as fast as 1.5
    assert found.holds and found.numbers["margin"] == pytest.approx(0.3) == pytest.approx(found.numbers["least"])
    slow = Cell("sums", "full_diffusion", 10, {"top_k": [point(9, 1.0)]}, {"conditioned": learned})
    assert lead(slow) == []


def test_a_learned_order_stands_beside_every_rule_of_one_position_per_step():
    rules = {"top_k": [point(9, 0.3, setting="1")], "margin": [point(9, 0.6, setting="1"), point(5, 0.9, setting="2")]}
    rules = {name: [{**p, "family": name} for p in points] for name, points in rules.items()}
    for accuracy, holds in ((0.66, True), (0.64, False)):
        learned = at_alphas((0, 9, accuracy))
        (found,) = order(Cell("sums", "full_diffusion", 10, rules, {"upo": learned}, {"upo": learned}))
        assert found.holds == holds and found.numbers["over_rules"] == pytest.approx(accuracy - 0.6)
