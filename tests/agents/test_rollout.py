"""Group rollouts and evaluation through the public vector environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.advantages import group_advantage
from agents.evaluation import bootstrap_interval, save_report, summary
from agents.rollout import Results, evaluate, rollout
from dllm_gym.deciders.distributions import MaskedBernoulli, ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


@pytest.fixture(scope="module")
def decider():
    torch.manual_seed(0)
    return PolicyDecider(DiTConfidence(width=16, ffn=32, output_bias=-0.5), ZeroTruncatedBernoulli)


@pytest.mark.parametrize("num_envs", [3, 7, 40])
def test_a_rollout_records_what_happened(decider, num_envs):
    env = DLLMUnmaskVectorEnv(num_envs=num_envs)
    examples = np.array([4, 9, 2, 30]).repeat(5)
    batch, results = rollout(env, decider, examples, seed=3)
    assert batch.shape == (20, int(results.nfe.max()))
    assert torch.equal(batch["active"].sum(1), results.nfe)
    assert results.example.tolist() == examples.tolist()
    first = batch["active"] & (batch["time"][..., 0] == 0)
    assert first[:, 0].all() and first.sum() == 20  # every episode starts at its column 0 and only there
    active = batch[batch["active"]]
    assert (active["mask"].sum(-1) > 0).all() and ((active["action"] * active["action_mask"]).sum(-1) > 0).all()
    logits = decider.policy(active["confidence"], active["mask"], active["time"])
    again = ZeroTruncatedBernoulli(logits, active["action_mask"]).log_prob(active["action"])
    torch.testing.assert_close(active["action_log_prob"], again, atol=1e-4, rtol=1e-4)
    unmasked = (batch["action"] * batch["action_mask"]).sum((1, 2))
    assert (unmasked == 20).all()  # each position of each episode once
    for text, score, index in zip(results.completions, results.score, examples, strict=True):
        assert score == env.core.task.grade(env.core.examples[index], text)


def test_rollouts_do_not_depend_on_the_number_of_lanes(decider):
    examples = np.arange(6).repeat(4)
    wide, a = rollout(DLLMUnmaskVectorEnv(num_envs=24), decider, examples, seed=8)
    narrow, b = rollout(DLLMUnmaskVectorEnv(num_envs=5), decider, examples, seed=8)
    assert torch.equal(wide["action"], narrow["action"]) and torch.equal(a.reward, b.reward)
    other, _ = rollout(DLLMUnmaskVectorEnv(num_envs=24), decider, examples, seed=9)
    assert other.shape != wide.shape or not torch.equal(wide["action"], other["action"])


def test_members_of_a_group_differ_by_their_draws(decider):
    batch, results = rollout(DLLMUnmaskVectorEnv(num_envs=8), decider, np.zeros(16, int), seed=0)
    assert len({tuple(a.flatten().tolist()) for a in batch["action"]}) > 8
    advantage, _ = group_advantage(results.reward, torch.zeros(16, dtype=torch.int64))
    assert abs(advantage.sum()) < 1e-5


def test_wasted_steps_and_idle_lanes_are_counted():
    torch.manual_seed(0)
    slow = PolicyDecider(DiTConfidence(width=16, ffn=32, output_bias=-4.0), MaskedBernoulli)
    results = evaluate(DLLMUnmaskVectorEnv(num_envs=4), slow, range(6))
    assert 0.3 < results.empty_steps < 0.9 and 0 < results.idle_lanes < 0.5
    assert results.row_forwards < results.nfe.sum()  # an empty step needs no forward
    exact = evaluate(DLLMUnmaskVectorEnv(num_envs=2), TopK(5), range(6))
    assert exact.empty_steps == 0 and exact.idle_lanes == 0 and exact.nfe.tolist() == [4] * 6
    assert exact.row_forwards == 24


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(100) < 0.7).astype(float), resamples=300)
        hits += low <= 0.7 <= high
    assert 180 <= hits <= 199


def results_of(score, nfe) -> Results:
    n = len(score)
    return Results(
        torch.tensor(score),
        torch.tensor(score),
        torch.tensor(nfe),
        torch.arange(n),
        [""] * n,
        torch.zeros(n, dtype=torch.bool),
    )


def test_a_summary_averages_over_examples_and_seeds(tmp_path):
    made = summary("top_k(2)", [results_of([1.0, 0.0], [4, 6]), results_of([1.0, 1.0], [4, 2])])
    assert made["accuracy"] == 0.75 and made["nfe"] == 4.0 and made["family"] == "top_k"
    assert made["accuracy_low"] == 0.5 and made["accuracy_high"] == 1.0 and (made["examples"], made["seeds"]) == (2, 2)
    for name in ("fronts.json", "datasets.csv", "datasets.json"):
        (tmp_path / name).write_text("of an evaluation of a mixture in the same folder")
    save_report([made, {**made, "name": "policy(greedy)", "family": "policy"}], tmp_path, "title")
    names = ["manifest.json", "results.csv", "results.json", "results.md", "results.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
