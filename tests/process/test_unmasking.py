"""The process itself: against a plain loop, alone and in company, and at its edges."""

from __future__ import annotations

import pytest
import torch
from toys import act

from agents.rollout import evaluate
from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import Margin, Random, Threshold, TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.noise import fold, uniform
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.rewards import Additive, Multiplicative, make_reward
from dllm_gym.process.unmasking import Unmasking


def policy(greedy: bool = True) -> PolicyDecider:
    torch.manual_seed(3)
    network = DiTConfidence(width=16, ffn=32, heads=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # logits on both sides of 0
    return PolicyDecider(network, ZeroTruncatedBernoulli, greedy=greedy)


def plain_threshold(core: Unmasking, example: int, threshold: float) -> tuple[list[int], int]:
    """Threshold decoding of one row as a textbook loop: full forward, full softmax, every step."""
    dllm, block = core.dllm, core.block_length
    prompt = dllm.encode(core.task.prompt(core.examples[example]))
    tokens, steps = prompt + [dllm.mask_id] * core.L, 0
    while dllm.mask_id in tokens:
        hidden = dllm.backbone(input_ids=torch.tensor([tokens])).last_hidden_state
        logits = dllm.lm_head(hidden)[0]
        logits[:, dllm.mask_id] = -torch.inf
        confidence, proposal = logits.softmax(-1).max(-1)
        masked = [j for j, token in enumerate(tokens) if token == dllm.mask_id]
        active = (masked[0] - len(prompt)) // block
        legal = [j for j in masked if (j - len(prompt)) // block == active]
        chosen = [j for j in legal if confidence[j] >= threshold] or [max(legal, key=lambda j: confidence[j])]
        for j in chosen:
            tokens[j] = int(proposal[j])
        steps += 1
    return tokens[len(prompt) :], steps


@pytest.mark.parametrize(("task", "block"), [("sudoku", 20), ("sudoku", 5), ("arithmetic", 12)])
def test_threshold_decoding_equals_a_plain_loop(task, block):
    env = DLLMUnmaskVectorEnv(num_envs=4, task=task, block_length=block, split="test")
    results = evaluate(env, Threshold(0.9), range(10))
    for i in range(10):
        tokens, steps = plain_threshold(env.core, i, 0.9)
        assert results.completions[i] == env.core.dllm.decode(tokens)
        assert results.nfe[i] == steps
        assert results.score[i] == env.core.task.grade(env.core.examples[i], results.completions[i])


DECIDERS = [Threshold(0.9), Threshold(0.5), TopK(6), Margin(6), Random(6), policy(), policy(greedy=False)]


@pytest.mark.parametrize("decider", DECIDERS, ids=str)
def test_a_row_alone_equals_the_row_in_a_batch_of_64_mixed_rows(decider, mixed_task):
    settings = {"task": mixed_task, "split": "test", "top_k": 2, "margin": True, "block_length": 12}
    company = evaluate(DLLMUnmaskVectorEnv(num_envs=64, **settings), decider, range(64))
    few = evaluate(DLLMUnmaskVectorEnv(num_envs=7, **settings), decider, range(64))  # lanes are refilled
    alone = evaluate(DLLMUnmaskVectorEnv(num_envs=1, **settings), decider, range(16))
    assert company.completions == few.completions and company.completions[:16] == alone.completions
    assert torch.equal(company.nfe, few.nfe) and torch.equal(company.nfe[:16], alone.nfe)
    assert len({len(mixed_task.prompt(e)) for e in mixed_task.examples("test").select(range(64))}) == 4  # padding


def test_sampled_tokens_do_not_depend_on_company(mixed_task):
    settings = {"task": mixed_task, "split": "test", "temperature": 1.0}
    company = evaluate(DLLMUnmaskVectorEnv(num_envs=16, **settings), TopK(4), range(32), seed=5)
    alone = evaluate(DLLMUnmaskVectorEnv(num_envs=1, **settings), TopK(4), range(32), seed=5)
    other = evaluate(DLLMUnmaskVectorEnv(num_envs=16, **settings), TopK(4), range(32), seed=6)
    assert company.completions == alone.completions != other.completions


def start(**settings) -> Unmasking:
    core = Unmasking(2, EnvConfig(**{"split": "test", **settings}))
    core.begin([0, 1], [0, 1], [0, 0])
    core.predict()
    return core


def test_transition_by_hand():
    core = start(block_length=5, top_k=2)
    proposal = core.predictions.proposal.clone()
    seen = core.observe()
    assert seen["action_mask"].sum(1).tolist() == [5, 5] and seen["mask"].sum(1).tolist() == [20, 20]
    action = torch.zeros(2, 20, dtype=torch.int8)
    action[0, [1, 3, 9]] = 1  # 9 lies outside the active block
    outcome = act(core, action)
    assert not outcome.done.any() and outcome.reward.tolist() == [0, 0]
    assert core.stale.tolist() == [True, False]  # lane 1 wasted its step: its prediction still holds
    core.predict()
    after = core.observe()
    assert after["mask"][0].nonzero().flatten().tolist() == [0, 2, *range(4, 20)]
    assert after["action_mask"][0].nonzero().flatten().tolist() == [0, 2, 4]
    assert core.tokens[0, -20:][[1, 3]].tolist() == proposal[0, [1, 3]].tolist()
    assert after["confidence"][0, 1].tolist() == [1, 0] and after["confidence"][0, 3].tolist() == [1, 0]
    assert torch.equal(after["confidence"][1], seen["confidence"][1])
    torch.testing.assert_close(after["time"], torch.full((2, 1), 1 / 20))
    act(core, torch.ones(2, 20))  # committed positions are not overwritten: only 0, 2, 4 change
    assert core.tokens[0, -20:][[1, 3]].tolist() == proposal[0, [1, 3]].tolist()
    assert core.mask[0].nonzero().flatten().tolist() == list(range(5, 20))


def test_an_empty_action_costs_a_step_and_no_forward():
    core = start()
    before = core.row_forwards
    act(core, torch.zeros(2, 20))
    core.predict()
    assert core.row_forwards == before and core.steps.tolist() == [1, 1]
    outcome = act(core, torch.ones(2, 20))
    assert outcome.terminated.all() and outcome.nfe.tolist() == [2, 2]


def test_the_step_limit_truncates_and_grades_what_stands():
    core = start(max_episode_steps=3)
    for _ in range(2):
        assert not act(core, torch.zeros(2, 20)).done.any()
    outcome = act(core, torch.zeros(2, 20))
    assert outcome.truncated.all() and not outcome.terminated.any()
    assert outcome.nfe.tolist() == [3, 3] and outcome.score.tolist() == [0, 0] and core.completions == ["", ""]
    act(core, torch.ones(2, 20))  # nothing moves after the end
    assert core.mask.all() and core.steps.tolist() == [3, 3]


def test_termination_on_the_last_allowed_step_is_not_truncation():
    core = start(max_episode_steps=1)
    outcome = act(core, torch.ones(2, 20))
    assert outcome.terminated.all() and not outcome.truncated.any()


def test_rewards_by_hand():
    score, steps = torch.tensor([1.0, 1.0, 0.0, 0.5]), torch.tensor([1, 6, 1, 99])
    torch.testing.assert_close(Multiplicative(2.0)(score, steps, 10), torch.tensor([1.0, 0.25, 0.0, 0.005]))
    torch.testing.assert_close(Multiplicative(0.0)(score, steps, 10), score)
    torch.testing.assert_close(Additive(0.5)(score, steps, 10), torch.tensor([0.95, 0.7, -0.05, -4.45]))
    assert make_reward(Additive(2.0), 7.0).alpha == 2.0


def test_hidden_states_are_those_of_the_model(tiny):
    core = start(hidden=True)
    tokens = core.tokens.clone()
    expected = tiny.backbone(input_ids=tokens).last_hidden_state[:, -20:]
    torch.testing.assert_close(core.observe()["hidden"], expected, atol=1e-5, rtol=1e-5)
    act(core, torch.eye(20)[[3, 4]])
    core.predict()
    expected = tiny.backbone(input_ids=core.tokens).last_hidden_state[:, -20:]
    torch.testing.assert_close(core.observe()["hidden"], expected, atol=1e-5, rtol=1e-5)


def given_to_the_last(backbone, tokens):
    """What the block before the last one gives, [1, T, d]."""
    given = []
    hook = backbone.layers[-2].register_forward_hook(lambda _, args, out: given.append(out))
    backbone(input_ids=tokens)
    hook.remove()
    return given[0]


def test_block_inputs_are_what_the_models_last_block_reads(tiny):
    core = start(block_input=True)
    for _ in range(2):
        expected = given_to_the_last(tiny.backbone, core.tokens)[:, -20:]
        torch.testing.assert_close(core.observe()["block_input"], expected, atol=1e-5, rtol=1e-5)
        act(core, torch.eye(20)[[3, 4]])
        core.predict()
    assert "block_input" not in start(hidden=True).observe()


def test_block_inputs_are_those_of_rows_without_their_padding(mixed_task):
    core = start(task=mixed_task, block_input=True, hidden=True)
    padding = [int((tokens == core.dllm.pad_id).int().cumprod(0).sum()) for tokens in core.tokens]
    assert len(set(padding)) == 2
    for lane, left in enumerate(padding):
        expected = given_to_the_last(core.dllm.backbone, core.tokens[lane : lane + 1, left:])[0, -core.L :]
        torch.testing.assert_close(core.observe()["block_input"][lane], expected, atol=1e-4, rtol=1e-4)


def test_callable_rewards_and_lengths_of_ones_own(tiny):
    core = start(gen_length=24, block_length=8, reward=lambda score, steps, length: 1.0 * steps + length)
    assert act(core, torch.ones(2, 24)).done.tolist() == [False, False]
    act(core, torch.ones(2, 24))
    assert act(core, torch.ones(2, 24)).reward.tolist() == [27.0, 27.0]


BAD = [
    ({"model": "nope"}, "model='nope'"),
    ({"task": "chess"}, "task='chess'.*sudoku, arithmetic"),
    ({"split": "dev"}, "split='dev'.*train, validation, test"),
    ({"block_length": 3}, "block_length=3 does not divide gen_length=20"),
    ({"block_length": 40}, "block_length=40 does not divide"),
    ({"block_length": 0}, "block_length=0"),
    ({"gen_length": 0}, "gen_length=0"),
    ({"gen_length": -4}, "gen_length=-4"),
    ({"gen_length": 2.5}, "gen_length=2.5"),
    ({"max_episode_steps": 0}, "max_episode_steps=0"),
    ({"gen_length": 250}, "prompt of task 'sudoku' has 20 tokens.*256 positions"),
    ({"alpha": -1.0}, "alpha=-1.0"),
    ({"alpha": float("nan")}, "alpha=nan"),
    ({"reward": "speedy"}, "reward='speedy'.*multiplicative, additive"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": 99}, "top_k=99 exceeds the vocabulary of 20"),
    ({"temperature": -0.1}, "temperature=-0.1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(s) for s, _ in BAD])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Unmasking(1, EnvConfig(**settings))


def test_noise_is_uniform_and_a_pure_function():
    keys = torch.arange(2000)
    u = uniform(keys, 7, 50)
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() * 12 - 1) < 0.02
    assert torch.equal(u[[5]], uniform(torch.tensor([5]), torch.tensor([7]), 50))
    assert torch.equal(u[:, :10], uniform(keys, 7, 10))
    correlation = torch.corrcoef(torch.stack([u[:, 0], u[:, 1], uniform(keys, 8, 1)[:, 0], u[:, 0].roll(1)]))
    assert (correlation - torch.eye(4)).abs().max() < 0.08
    assert len(fold(keys[:, None], keys[:100]).unique()) == 200_000
