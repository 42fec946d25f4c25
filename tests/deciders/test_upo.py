"""UPO's published network: a copy of the dLLM's last block, its MLP against a plain forward, its flags."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch.nn import functional as F

import dllm_gym  # noqa: F401
from dllm_gym.deciders.networks import UPOPolicy
from dllm_gym.deciders.upo import UPOPublished
from dllm_gym.models import load_dllm
from dllm_gym.models.base import last_block, own_block


def copy_of(dllm, **settings) -> UPOPublished:
    torch.manual_seed(0)
    policy = UPOPublished(hidden_size=dllm.hidden_size, own_block=own_block(dllm), **settings)
    policy.adopt(last_block(dllm.backbone))
    return policy


@torch.no_grad()
def test_it_begins_with_what_the_dllms_last_block_computes():
    """Where there is no prompt the block sees what the dLLM's saw; its norm then gives the last hidden states."""
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=4, task="one_way", hidden=True, block_input=True, top_k=8)
    dllm = envs.unwrapped.core.dllm
    policy = copy_of(dllm)
    observation, _ = envs.reset(seed=0)
    for _ in range(2):
        out = dllm.backbone.norm(policy.block(observation["block_input"]))
        torch.testing.assert_close(out, observation["hidden"], atol=1e-4, rtol=1e-4)
        observation, *_ = envs.step(torch.eye(envs.unwrapped.core.L)[torch.arange(4)])


def test_the_copy_is_trained_and_the_dllm_stays_as_it_is():
    dllm = load_dllm("tiny")
    policy = copy_of(dllm)
    before = last_block(dllm.backbone).self_attn.q_proj.weight.clone()
    assert torch.equal(policy.block.q.weight, before) and policy.block.q.weight.requires_grad
    with torch.no_grad():
        policy.block.q.weight.add_(1.0)
    assert torch.equal(last_block(dllm.backbone).self_attn.q_proj.weight, before)
    assert not torch.equal(UPOPublished(**policy.settings).block.q.weight, before)  # which adopted nothing


def seen(rows=3, length=8, d=128, k=10):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0, 1], [0] * 8])
    active = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [0] * 8])
    return {
        "block_input": torch.randn(rows, length, d, generator=generator),
        "confidence": torch.rand(rows, length, k, generator=generator).sort(-1, descending=True).values,
        "mask": mask.to(torch.int8),
        "action_mask": (mask * active).to(torch.int8),
    }


def test_the_mlp_reads_block_flag_mask_flag_and_eight_probabilities():
    policy, obs = copy_of(load_dllm("tiny"), block_length=4), seen()
    with torch.no_grad():
        for parameter in policy.mlp.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4, [1.0] * 4 + [0.0] * 4])
    x = policy.block(obs["block_input"]).double()
    x = x / (x.square().mean(-1, keepdim=True) + policy.block_norm.eps).sqrt()
    x = torch.cat([x, block[..., None], (block * obs["mask"])[..., None], obs["confidence"][..., :8]], -1)
    assert x.shape[-1] == 138
    for linear, norm, _ in policy.mlp:
        assert linear.bias is None and tuple(linear.weight.shape) == (138, 138)
        x = F.silu(F.layer_norm(x @ linear.weight.double().T, (138,), norm.weight.double(), norm.bias.double()))
    logits = x @ policy.head.weight.double()[0]
    torch.testing.assert_close(policy(*policy.read(obs)), logits.float(), atol=1e-4, rtol=1e-3)
    assert policy.head.bias is None and len(policy.mlp) == 3


def test_what_does_not_fit_is_named():
    policy, obs = copy_of(load_dllm("tiny")), seen()
    with pytest.raises(ValueError, match="block_input=True"):
        policy.read({key: value for key, value in obs.items() if key != "block_input"})
    with pytest.raises(ValueError, match=r"hidden_size=128 .* 64 channels: .*block_input=True"):
        policy(*policy.read(obs | {"block_input": torch.zeros(3, 8, 64)}))
    for settings, message in (
        ({"own_block": None}, "own_block=None"),
        ({"top_k": 0}, "top_k=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"hidden_size": None}, "hidden_size=None"),
    ):
        with pytest.raises(ValueError, match=message):
            UPOPublished(**policy.settings | settings)
    with pytest.raises(ValueError, match=r"block_input=True: .*cache='prefix'"):
        gym.make("DLLMUnmask-v0", task="arithmetic", block_length=12, cache="prefix", block_input=True)
    with pytest.raises(ValueError, match="block_input=True: a Linear"):
        last_block(torch.nn.Linear(2, 2))


# ---- absolute positions and log-odds of policy=upo ----


def alike(length=8):
    """Positions that nothing tells apart but where they are."""
    return {
        "hidden": torch.ones(1, length, 24),
        "confidence": torch.full((1, length, 4), 0.25),
        "mask": torch.ones(1, length),
        "action_mask": torch.ones(1, length),
    }


@pytest.mark.parametrize("told", [False, True])
def test_absolute_positions_tell_equal_positions_apart(told):
    torch.manual_seed(0)
    policy = UPOPolicy(hidden_size=24, width=16, ffn=32, heads=3, top_k=4, absolute_positions=told)
    logits = policy(*policy.read(alike()))[0]
    assert (logits.std() > 1e-5) == told


def test_odds_begin_as_the_most_confident_position():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "width": 16, "ffn": 32, "heads": 3, "top_k": 4}
    plain, policy = UPOPolicy(**sizes), UPOPolicy(**sizes, odds=2.0)
    policy.load_state_dict(plain.state_dict())
    obs = alike() | {"confidence": torch.rand(5, 8, 4), "hidden": torch.randn(5, 8, 24)}
    obs |= {name: torch.ones(5, 8) for name in ("mask", "action_mask")}
    added = policy(*policy.read(obs)) - plain(*plain.read(obs))
    torch.testing.assert_close(added, 2 * obs["confidence"][..., 0].logit(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="odds=-1"):
        UPOPolicy(**sizes, odds=-1)
