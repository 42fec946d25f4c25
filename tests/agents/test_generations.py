"""Episodes that are written down: the same as played at once, played once, and gone on with."""

from __future__ import annotations

import json

import pytest
import torch

from agents.evaluation import paired
from agents.fronts import aup, front_rows
from agents.generations import Generations, Lab, described, digest
from agents.rollout import Results, evaluate
from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import Blockwise, Random, Spaced, Threshold, TopK
from dllm_gym.deciders.rules.base import draws
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


def policy(greedy: bool = False, heat: float = 1.0, seed: int = 0) -> PolicyDecider:
    torch.manual_seed(seed)
    return PolicyDecider(DiTConfidence(width=16, ffn=32, output_bias=-0.5), ZeroTruncatedBernoulli, heat, greedy)


def envs(lanes: int, **settings) -> DLLMUnmaskVectorEnv:
    return DLLMUnmaskVectorEnv(num_envs=lanes, split="test", alpha=2.0, **settings)


EXAMPLES = [4, 9, 2, 30, 7, 8, 1, 0, 3]


def facts(results: Results) -> list:
    return [r.tolist() for r in (results.score, results.nfe, results.reward, results.example)] + [results.completions]


@pytest.mark.parametrize("decider", [Random(3), TopK(5), policy(), policy(greedy=True)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}], ids=["greedy tokens", "drawn tokens"])
def test_a_lab_plays_as_an_evaluation_does_whatever_it_knows_already(decider, settings, tmp_path):
    whole = evaluate(envs(4, **settings), decider, EXAMPLES, seed=5)
    with Generations(tmp_path / "all.jsonl") as known:
        played = Lab(envs(4, **settings), known).results("it", decider, EXAMPLES, 5, None)
    assert facts(played) == facts(whole)
    assert played.tokens.tolist() == [20] * len(EXAMPLES)
    lines = (tmp_path / "all.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(EXAMPLES)
    (tmp_path / "some.jsonl").write_bytes(b"".join(lines[1:6]) + lines[6][:40])  # killed while it wrote
    with Generations(tmp_path / "some.jsonl") as known:
        env = envs(3, **settings)
        rest = Lab(env, known).results("it", decider, EXAMPLES, 5, None)
    assert facts(rest) == facts(whole) and len((tmp_path / "some.jsonl").read_bytes().splitlines()) == len(EXAMPLES)
    for line in map(json.loads, lines):
        assert line["nfe"] == len(line["sizes"]) and sum(line["sizes"]) == 20 and line["seconds"] > 0


def test_a_lab_in_which_all_answers_are_right_is_refused():
    with pytest.raises(ValueError, match="teacher_forcing=True"):
        Lab(envs(1, teacher_forcing=True))


def test_what_is_known_costs_no_forward_and_what_decides_it_parts_it(tmp_path):
    path = tmp_path / "generations.jsonl"

    def rows(decider, seed=0, lanes=4, **settings) -> int:
        """Forwarded rows."""
        with Generations(path) as known:
            env = envs(lanes, **settings)
            Lab(env, known).results("it", decider, EXAMPLES[:4], seed, None)
            return env.core.row_forwards

    assert rows(TopK(5)) > 0
    assert rows(TopK(5), lanes=2) == 0
    assert rows(TopK(5), seed=1) == 0  # nothing is drawn
    assert rows(TopK(5), reward="additive", top_k=3, entropy=True) == 0  # neither pay nor what others see
    assert rows(TopK(4)) > 0
    assert rows(TopK(5), block_length=10) > 0
    assert rows(TopK(5), temperature=0.5) > 0
    assert rows(TopK(5), temperature=0.5, seed=1) > 0
    assert rows(policy()) > 0
    assert rows(policy(seed=1)) > 0  # other weights
    assert rows(policy(heat=0.5)) > 0
    assert rows(policy(greedy=True)) > 0
    assert rows(policy(greedy=True), seed=1) == 0
    assert rows(policy(), seed=1) > 0


class Mine(Threshold):
    """A rule of somebody's own, which may read the noise."""


def test_who_draws_says_so_and_rules_of_ones_own_are_taken_to():
    deciders = [Threshold(), Blockwise(TopK()), Random(), Spaced(Random()), Mine(), policy(), policy(greedy=True)]
    assert [draws(d) for d in deciders] == [False, False, True, True, True, True, False]
    assert digest(described(Blockwise(TopK(1)))) != digest(described(Blockwise(TopK(2))))


def test_a_file_that_is_damaged_before_its_end_is_refused(tmp_path):
    path = tmp_path / "generations.jsonl"
    with Generations(path) as known:
        Lab(envs(4), known).results("it", TopK(5), [0, 1], 0, None)
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (b"{}\n", b'{"key": \n', b"\xff\n", lines[0].replace(b'"score": ', b'"score": null, "x": ')):
        path.write_bytes(lines[0] + wrong + lines[1])
        with pytest.raises(ValueError, match="damaged in line 2"):
            Generations(path)


def results(score: list[float]) -> Results:
    count = len(score)
    return Results(torch.zeros(count), torch.tensor(score), torch.ones(count), torch.arange(count), [""] * count)


def test_a_paired_difference_has_the_p_value_of_exchanging_the_two():
    one, other = results([1.0] * 6 + [0.0] * 4), results([0.0] * 5 + [1.0] + [0.0] * 4)
    difference, p = paired([one], [other])
    assert difference == pytest.approx(0.5) and p == pytest.approx(2 / 2**5, abs=0.01)  # five differ, all one way
    assert paired([one], [one]) == (0.0, 1.0)
    assert paired([one, other], [other, one]) == (0.0, 1.0)  # over the seeds they are equal


def test_aup_is_the_leaderboards_worked_out_by_hand():
    points = [{"tokens_per_forward": rho, "accuracy": y} for rho, y in ((2.0, 0.8), (4.0, 0.76), (8.0, 0.5))]
    # exp(-3 (1 - 0.76 / 0.8)) = exp(-0.15); 0.5 lies more than five points below the first
    assert aup(points, 0.8) == pytest.approx(2 * 80 + 2 * (76 * 0.860708 + 80) / 2, rel=1e-5)
    assert aup(points[:1], 1.0) == pytest.approx(160) and aup([], 1.0) == 0


def test_fronts_are_of_all_rules_of_families_and_of_every_decoding():
    def row(name: str, nfe: float, accuracy: float) -> dict:
        own = {"name": name, "family": name.partition("(")[0], "nfe": nfe, "accuracy": accuracy}
        return own | {"tokens_per_forward": 10 / nfe}

    names = ["a(1)", "b(1)", "policy(greedy, run=x@1, alpha=1)", "policy(greedy, run=x@1, alpha=2)"]
    rows = [row(name, nfe, 0.5) for name, nfe in zip(names, (5, 10, 5, 4), strict=True)]
    found = {each["front"]: each for each in front_rows(rows, 10)}
    assert list(found) == ["all rules", "a", "b", "policy(greedy, run=x@1)"]
    assert found["all rules"]["points"] == 1 and found["policy(greedy, run=x@1)"]["area"] == pytest.approx(0.5 * 6 / 9)
    assert found["b"]["aup"] == pytest.approx(50) and found["a"]["aup"] == pytest.approx(100)


@pytest.mark.parametrize("settings", [{}, {"block_length": 5}, {"block_length": 5, "lookahead": False}], ids=str)
def test_states_that_another_decider_came_to_are_not_forwarded_again(settings):
    rules = [TopK(5), Threshold(0.9), Threshold(0.8), TopK(5)]
    env = envs(4, **settings)
    lab = Lab(env)
    for rule in rules:
        alone = envs(4, **settings)
        whole = evaluate(alone, rule, EXAMPLES)
        before = env.core.row_forwards
        lab.known.forget()
        assert facts(lab.results("it", rule, EXAMPLES, 0, None)) == facts(whole)
        saved = alone.core.row_forwards - (env.core.row_forwards - before)
    assert saved == alone.core.row_forwards  # the last one comes to nothing new
    assert env.core.work.reused > 3 * len(EXAMPLES)
