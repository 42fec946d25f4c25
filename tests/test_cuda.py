"""The same bodies on the CPU and on a CUDA device: where tensors live, and that rows stay independent there."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import dllm_gym  # noqa: F401
from agents.grpo import GRPO
from agents.rollout import evaluate, rollout
from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.rules import Threshold
from dllm_gym.noise import fold, uniform

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_cuda])])
def device(request) -> str:
    return request.param


def make_vec(device: str, num_envs: int = 4, **settings):
    return gym.make_vec("DLLMUnmask-v0", num_envs=num_envs, device=device, **settings)


def small_policy(device: str) -> DiTConfidence:
    torch.manual_seed(0)
    return DiTConfidence(width=16, ffn=32, output_bias=-0.5).to(device)


def wild_policy(device: str) -> PolicyDecider:
    """Greedy, with weights that put logits on both sides of 0 (drawn on the CPU: the same for every device)."""
    torch.manual_seed(3)
    policy = DiTConfidence(width=16, ffn=32)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return PolicyDecider(policy.to(device), ZeroTruncatedBernoulli, greedy=True)


@pytest.fixture
def exact_matmul():
    """No TF32: rounding as small as float32's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def leaves(tree) -> list:
    """Everything in nested dicts and tuples that is neither."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, tuple) else [tree]


def assert_on(device: str, *trees) -> None:
    """All leaves are tensors on ``device``."""
    for leaf in leaves(trees):
        assert isinstance(leaf, Tensor) and leaf.device.type == device


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_the_vector_env_returns_observations_on_the_models_device_and_all_else_in_numpy(device, mode, mixed_task):
    settings = {"task": mixed_task, "top_k": 2, "hidden": True, "temperature": 0.7, "max_episode_steps": 5}
    envs = make_vec(device, autoreset_mode=mode, **settings)
    assert envs.device.type == envs.core.dllm.device.type == device
    observation, info = envs.reset(seed=0)
    assert_on(device, observation, info)
    ended = 0
    for step in range(12):
        action = observation["action_mask"] * (torch.rand(4, 48, device=device) < 0.5)
        if step % 2:
            action = action.cpu().numpy()  # actions may come from anywhere
        observation, *flags, info = envs.step(action)
        assert_on(device, observation)
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves((*flags, info)))
        done = flags[1] | flags[2]
        ended += int(done.sum())
        if mode == "Disabled" and done.any():
            observation, info = envs.reset(options={"reset_mask": done})
            assert_on(device, observation, info)
    numpy = make_vec(device, arrays="numpy", **settings).reset(seed=0)[0]
    assert all(isinstance(value, np.ndarray) for value in numpy.values())
    assert ended >= 8 and all(isinstance(text, str) for text in envs.last_completions())


def test_the_single_env_speaks_numpy(device):
    env = gym.make("DLLMUnmask-v0", device=device, render_mode="rgb_array", hidden=True)
    observation, _ = env.reset(seed=0)
    over = False
    while not over:
        assert env.observation_space.contains(observation)
        legal = observation["action_mask"]
        observation, reward, terminated, truncated, info = env.step(legal * (legal.cumsum() <= 6))
        assert isinstance(reward, float) and env.render().dtype == np.uint8
        over = terminated or truncated
    assert info["episode"]["l"] == 4 and env.unwrapped.core.dllm.device.type == device


def test_the_torchrl_env_stays_on_its_device(device):
    from torchrl.envs.utils import check_env_specs

    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    check_env_specs(DLLMUnmaskTorchRLEnv(num_envs=2, device=device, top_k=2, hidden=True))
    env = DLLMUnmaskTorchRLEnv(num_envs=3, device=device)
    env.set_seed(0)
    episodes = env.rollout(30, break_when_any_done=False)
    assert_on(device, episodes.to_dict())
    assert episodes["next", "done"].any()


def test_one_round_of_training(device):
    envs, policy = make_vec(device, num_envs=16), small_policy(device)
    behaviour = PolicyDecider(policy, ZeroTruncatedBernoulli)
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    algorithm = GRPO(make_actor(policy, ZeroTruncatedBernoulli), adamw, epochs=2, chunk=64)
    before = [p.detach().clone() for p in policy.parameters()]
    group = torch.arange(6, device=device).repeat_interleave(8)
    batch, results = rollout(envs, behaviour, np.arange(6).repeat(8), seed=0)
    assert_on(device, batch.to_dict(), results.reward, results.score, results.nfe, results.example)
    metrics = algorithm.update(batch, results.reward, group)
    assert metrics["gradient_steps"] == 2 and np.isfinite(list(metrics.values())).all()
    assert_on(device, *policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["threshold", "greedy policy"])
def test_a_row_alone_equals_the_row_in_a_batch(device, rule, mixed_task, exact_matmul):
    decider = Threshold(0.9) if rule == "threshold" else wild_policy(device)
    settings = {"task": mixed_task, "split": "test", "block_length": 12, "dtype": "float32"}
    company = evaluate(make_vec(device, num_envs=16, **settings), decider, range(16))
    alone = evaluate(make_vec(device, num_envs=1, **settings), decider, range(4))
    assert company.completions[:4] == alone.completions
    assert torch.equal(company.nfe[:4], alone.nfe) and torch.equal(company.reward[:4], alone.reward)
    assert len(set(company.nfe.tolist())) > 1


def test_noise_is_the_same_on_every_device(device):
    keys = fold(torch.arange(50) - 25, 7)
    assert torch.equal(uniform(keys.to(device), 3, 40).cpu(), uniform(keys, 3, 40))


@pytest.mark.cuda
@no_cuda
def test_a_step_waits_for_the_device_once(mixed_task):
    envs = make_vec("cuda", task=mixed_task, block_length=12)
    observation, _ = envs.reset(seed=0)
    decider = PolicyDecider(small_policy("cuda"), ZeroTruncatedBernoulli, greedy=True)
    noise = torch.full((4, 48), 0.5, device="cuda")
    observation, *_ = envs.step(decider(observation, noise))  # what is done once is done
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            observation, _, terminated, truncated, _ = envs.step(decider(observation, noise))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1 and not (terminated | truncated).any()


@pytest.mark.cuda
@no_cuda
def test_a_compiled_network_decodes_the_same(exact_matmul):
    from dllm_gym.models import load_dllm

    plain, compiled = (load_dllm("tiny", "cuda", compile=compile) for compile in (False, True))
    results = [
        evaluate(gym.make_vec("DLLMUnmask-v0", 16, model=m), Threshold(0.9), range(32)) for m in (plain, compiled)
    ]
    assert results[0].completions == results[1].completions and torch.equal(results[0].nfe, results[1].nfe)
