"""Runs as one table: what is put together, what is kept apart."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from agents.reproduction.comparison import as_text, over_seeds, read_runs


def write_run(folder, overrides, seed=0, accuracy=0.5, **config):
    """A finished run of two rounds."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, f"seed={seed}"]))
    whole = {"seed": seed, "threads": 1, "reward": {"reward": "multiplicative", "alpha": 1.0}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    rows = [
        {"name": f"policy({how})", "family": "policy", "accuracy": accuracy, "nfe": 4.0, "reward": accuracy * share}
        for how, share in (("greedy", 0.8), ("sampled", 0.9))
    ]
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "metrics.csv").write_text("round,episodes,row_forwards,seconds\n0,10,50,30\n1,10,40,30\n")


def table(folder, evaluated="best"):
    return over_seeds(read_runs([folder], evaluated))


def test_a_policy_that_reads_a_preference_counts_by_its_mean_over_alphas(tmp_path):
    write_run(tmp_path / "a", ["agent=grpo"], 0, 0.5)
    rows = [
        {"name": f"policy({how}, alpha={alpha})", "accuracy": accuracy, "nfe": 4.0, "reward": accuracy}
        for how, alpha, accuracy in (("greedy", 1, 0.2), ("greedy", 3, 0.4), ("sampled", 1, 0.9), ("sampled", 3, 0.1))
    ]
    (tmp_path / "a" / "results.json").write_text(json.dumps(rows))
    assert table(tmp_path)[0].mean["accuracy"] == pytest.approx(0.5)
    assert table(tmp_path, "greedy")[0].mean["reward"] == pytest.approx(0.3)


def test_seeds_of_a_configuration_make_a_row(tmp_path):
    for seed, accuracy in ((0, 0.4), (1, 0.6)):
        write_run(tmp_path / f"a{seed}", ["agent=grpo"], seed, accuracy, agent={"name": "grpo"})
    write_run(tmp_path / "b", ["agent=ppo"], 0, 0.9, agent={"name": "ppo"})
    first, second = table(tmp_path)
    assert (first.label, first.seeds) == ({"agent": "ppo"}, 1) and math.isnan(first.deviation["accuracy"])
    assert (second.label, second.seeds) == ({"agent": "grpo"}, 2)
    assert second.mean["accuracy"] == pytest.approx(0.5) and second.mean["reward"] == pytest.approx(0.45)
    assert second.deviation["accuracy"] == pytest.approx(0.02**0.5)
    assert (second.mean["episodes"], second.mean["row_forwards"], second.mean["minutes"]) == (20, 90, 1)
    assert as_text(second)["accuracy"] == "0.500 ± 0.141"
    assert table(tmp_path, "greedy")[1].mean["reward"] == pytest.approx(0.4)


def test_a_setting_called_like_a_measurement_keeps_runs_apart(tmp_path):
    write_run(tmp_path / "a", ["reward=multiplicative"], reward={"reward": "multiplicative", "alpha": 1.0})
    write_run(tmp_path / "b", ["reward=additive"], reward={"reward": "additive", "alpha": 1.0})
    rows = table(tmp_path)
    assert [row.label["reward"] for row in rows] == ["multiplicative", "additive"]  # not sorted: not comparable
    assert [row.seeds for row in rows] == [1, 1]


def test_what_does_not_change_the_outcome_does_not_part_runs(tmp_path):
    write_run(tmp_path / "a", ["agent=grpo", "threads=1"], 0, agent={"name": "grpo"})
    write_run(tmp_path / "b", ["threads=2"], 1, agent={"name": "grpo"})  # the default, said or not
    assert [row.seeds for row in table(tmp_path)] == [2]


def test_configurations_that_differ_outside_the_command_line_stay_apart(tmp_path):
    write_run(tmp_path / "a", ["agent=grpo"], 0, agent={"lr": 1})
    write_run(tmp_path / "b", ["agent=grpo"], 1, agent={"lr": 2})
    assert sorted(row.label["run"] for row in table(tmp_path)) == ["a", "b"]


def test_the_same_run_twice_is_refused(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, ["agent=grpo"])
    with pytest.raises(ValueError, match="same configuration and seed twice"):
        table(tmp_path)


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        table(tmp_path)
    with pytest.raises(ValueError, match="evaluated='both'"):
        table(tmp_path, "both")


HEATS = [("greedy", ""), ("sampled, temperature=1", "")]
HEATS += [("sampled, temperature=2", f", alpha={alpha}") for alpha in (1, 2)]


def write_evaluation(folder, overrides, names, **config):
    """A finished evaluation: the further behind a name stands, the better it is."""
    write_run(folder, overrides, **config)
    (folder / "metrics.csv").unlink()
    rows = [
        {"name": name, "family": name.partition("(")[0], "accuracy": i / 10, "nfe": 4.0, "reward": i / 10}
        for i, name in enumerate(names, 1)
    ]
    (folder / "results.json").write_text(json.dumps(rows))


def test_evaluations_stand_beside_runs_with_their_policies_and_their_best_rule(tmp_path):
    write_run(tmp_path / "a", ["agent=grpo"], 0, 0.4, agent={"name": "grpo"})
    names = [f"policy({how}, run={run}{more})" for run in ("x@1", "x@2") for how, more in HEATS]
    write_evaluation(tmp_path / "b", ["checkpoint=[x@1,x@2]"], ["top_k(1)", *names, "top_k(2)", "eb(1)"])
    rows = {row.label.get("decider"): row for row in table(tmp_path)}
    assert [*rows] == ["eb(1)", "policy(x@2)", "policy(x@1)", ""]  # more reward first
    assert rows["policy(x@1)"].mean["accuracy"] == pytest.approx((0.4 + 0.5) / 2)  # at temperature 2, over both alphas
    assert table(tmp_path, "greedy")[-1].mean["reward"] == pytest.approx(0.2)
    assert as_text(rows["eb(1)"])["minutes"] == "" and as_text(rows[""])["minutes"] == "1.0"
    (tmp_path / "b" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="no list of rows"):
        table(tmp_path)
