"""A range of alphas: every episode has its own, sees where it lies, and is paid by it."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torchrl.envs.utils import check_env_specs

from agents.rollout import evaluate, play_groups
from dllm_gym.deciders.distributions import MaskedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import TopK
from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.process.rewards import AlphaRange, Multiplicative

RANGE = [0.3, 10.0]


def envs(lanes: int = 4, **settings) -> DLLMUnmaskVectorEnv:
    return DLLMUnmaskVectorEnv(num_envs=lanes, split="test", **{"alpha": RANGE, **settings})


def policy(**settings) -> PolicyDecider:
    torch.manual_seed(0)
    network = DiTConfidence(width=16, ffn=32, preference=True, **settings)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return PolicyDecider(network, MaskedBernoulli)


def test_a_preference_is_the_place_of_alpha_on_a_logarithmic_scale():
    alphas = AlphaRange(1.0, 100.0)
    of = alphas.preference(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    torch.testing.assert_close(of, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(alphas.at(of), torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))


def test_every_episode_draws_its_own_alpha_and_is_paid_by_it():
    env = envs(32)
    seen, paid = [], 0
    observation, _ = env.reset(seed=0)
    for _ in range(8):
        alpha = torch.tensor(env.core.alpha)
        expected = (alpha / 0.3).log() / math.log(10 / 0.3)
        torch.testing.assert_close(observation["preference"][:, 0].double(), expected, atol=1e-6, rtol=0)
        seen.append(observation["preference"])
        half = observation["action_mask"] * (torch.arange(20) % 2 == int(env.core.steps[0]) % 2)
        observation, reward, terminated, _, info = env.step(half)
        if terminated.any():
            episode = info["episode"]
            assert (episode["alpha"] == alpha.float().numpy()).all()
            speed = (20 - episode["l"] + 1) / 20
            np.testing.assert_allclose(reward, episode["score"] * speed ** alpha.numpy(), rtol=1e-6)
            paid += int((reward > 0).sum())
    drawn = torch.cat(seen).unique()
    assert len(drawn) == 32 * 4 and 0.4 < drawn.mean() < 0.6 and drawn.min() < 0.1 and drawn.max() > 0.9
    assert paid > 10


def test_alphas_of_a_tensor_pay_like_single_ones():
    score, steps, alpha = torch.ones(3), torch.tensor([1, 5, 20]), torch.tensor([0.5, 1.0, 3.0]).double()
    each = [Multiplicative(float(a))(score[i : i + 1], steps[i : i + 1], 20) for i, a in enumerate(alpha)]
    assert torch.equal(Multiplicative(alpha)(score, steps, 20), torch.cat(each))


def test_alphas_can_be_chosen_for_lanes_and_queue():
    env = envs(2)
    options = {"examples": [0, 1], "queue": [2, 3], "alpha": [0.3, 10, 1, 3]}
    observation, _ = env.reset(seed=0, options=options)
    assert observation["preference"][:, 0].tolist() == [0.0, 1.0]
    env.step(observation["action_mask"])
    assert env.core.alpha.tolist() == [1.0, 3.0]
    env.reset(options={"reset_mask": np.array([False, True]), "alpha": 2})
    assert env.core.alpha.tolist() == [1.0, 2.0]
    env.reset(options={"alpha": 5})
    env.step(observation["action_mask"])
    assert env.core.alpha.tolist() == [5.0, 5.0]  # of the next episodes, too
    env.reset()
    assert 5.0 not in env.core.alpha


def test_lanes_that_are_reset_by_themselves_leave_the_queue_as_it_is():
    env = envs(2, autoreset_mode="Disabled")
    observation, _ = env.reset(seed=0, options={"examples": [0, 1], "queue": [2, 3, 4], "alpha": [1, 2, 3, 4, 5]})
    env.step(observation["action_mask"])
    env.reset(options={"reset_mask": np.array([True, False]), "examples": [9, 9], "alpha": 7})
    assert (env.core.example[0], env.core.alpha[0]) == (9, 7.0)
    env.reset(options={"reset_mask": np.array([False, True])})
    assert (env.core.example[1], env.core.alpha[1]) == (2, 3.0)


def test_an_evaluation_turns_the_knob_for_every_episode():
    for alpha in (0.3, 10):
        results = evaluate(envs(4), TopK(4), range(10), alpha=alpha)
        assert (results.nfe == 5).all()
        torch.testing.assert_close(results.reward, Multiplicative(alpha)(results.score, results.nfe, 20))


def test_a_policy_decides_by_the_preference():
    nfe = {alpha: evaluate(envs(4), policy(), range(20), alpha=alpha).nfe for alpha in (0.3, 10)}
    assert not torch.equal(nfe[0.3], nfe[10])


def test_a_group_has_one_alpha_and_all_groups_cover_the_range():
    episodes = play_groups(envs(8), [(policy(), 3), (policy(), 1)], list(range(10)), seed=0)
    preference = episodes.batch["preference"][:, 0, 0]
    of_group = torch.stack([preference[episodes.group == g] for g in range(10)])
    assert (of_group == of_group[:, :1]).all() and of_group.shape == (10, 4)
    ordered = of_group[:, 0].sort().values
    assert ((ordered * 10).floor() == torch.arange(10)).all()  # one in each tenth
    again = play_groups(envs(8), [(policy(), 3), (policy(), 1)], list(range(10)), seed=1)
    assert not torch.equal(again.batch["preference"][:, 0, 0], preference)


def test_the_other_faces_show_the_preference():
    env = gym.make("DLLMUnmask-v0", alpha=RANGE)
    check_env(env.unwrapped, skip_render_check=True)
    observation, _ = env.reset(options={"alpha": 10})
    assert observation["preference"] == 1
    *_, info = env.step(observation["action_mask"])
    assert info["episode"]["alpha"] == 10
    check_env_specs(DLLMUnmaskTorchRLEnv(num_envs=2, alpha=RANGE))
    assert "preference" not in gym.make("DLLMUnmask-v0", alpha=1.0).reset()[0]


@pytest.mark.parametrize("alpha", [[1.0], [0, 1], [2, 1], [1, float("inf")], "39", [1, 2, 3], {1: 0, 2: 0}], ids=str)
def test_no_other_pair_is_a_range(alpha):
    with pytest.raises(ValueError, match="alpha="):
        envs(1, alpha=alpha)


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="alpha=.*a reward of your own"):
        envs(1, reward=lambda score, steps, length: score)
    with pytest.raises(ValueError, match=r"options\['alpha'\]=1: make the environment with a range"):
        envs(1, alpha=1.0).reset(options={"alpha": 1})
    for alpha in (0.1, 11, [1, 2, 3], float("nan"), "x"):
        with pytest.raises(ValueError, match=r"options\['alpha'\].*from 0.3 to 10, or 2 of them"):
            envs(2).reset(options={"alpha": alpha})
    with pytest.raises(ValueError, match=r"reads preference.*alpha=\[low, high\]"):
        evaluate(envs(1, alpha=1.0), policy(), [0])
