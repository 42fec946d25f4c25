"""The table of observation entries: what is in it is in every face and in the documentation."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import gymnasium as gym
import numpy as np
import pytest
import torch

import dllm_gym  # noqa: F401
from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv
from dllm_gym.process import entries, unmasking
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.entries import COUNTS, ENTRIES, FLAGS, Entry

EVERYTHING = {
    "top_k": 2,
    "entropy": True,
    "margin": True,
    "committed": True,
    "tokens": True,
    "kl": 3,
    "hidden": True,
    "block_input": True,
    "teacher_forcing": True,
    "alpha": [1.0, 3.0],
}


def test_settings_ask_for_entries():
    assert COUNTS == ("top_k", "kl")
    assert FLAGS == ("entropy", "margin", "teacher_forcing", "committed", "tokens", "hidden", "block_input")
    known = {field.name for field in dataclasses.fields(EnvConfig)}
    assert {entry.setting for entry in ENTRIES} - {None} <= known


def test_the_environment_documents_every_entry_with_its_dtype():
    for entry in ENTRIES:
        dtype = str(entry.dtype).removeprefix("torch.")
        assert re.search(rf"``{entry.name}`` {dtype} \[", DLLMUnmaskEnv.__doc__), entry.name


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["few", "all"])
def test_all_faces_show_the_same_entries_within_their_bounds(settings):
    lanes = gym.make_vec("DLLMUnmask-v0", num_envs=2, split="test", **settings)
    native = DLLMUnmaskTorchRLEnv(2, split="test", **settings)
    assert len(lanes.core.entries) == (len(ENTRIES) if settings else 4)
    observation, _ = lanes.reset(seed=0)
    for _ in range(3):
        for entry in lanes.core.entries:
            value = observation[entry.name]
            assert value.dtype == entry.dtype and tuple(value.shape[1:]) == entry.size(lanes.core)
            assert lanes.observation_space[entry.name].contains(value.numpy())
            assert native.observation_spec[entry.name].is_in(value)
        observation, *_ = lanes.step(torch.eye(20)[[3, 4]])
    assert list(observation) == [entry.name for entry in lanes.core.entries]
    assert set(lanes.single_observation_space) == set(observation) == set(native.observation_spec) - {"score", "nfe"}


def test_tokens_are_those_committed_and_those_that_would_be(tiny):
    env = DLLMUnmaskEnv(model=tiny, split="test", tokens=True, block_length=10, lookahead=False)
    observation, _ = env.reset(seed=0)
    for place in (3, 7, 0):
        before = observation["tokens"].copy()
        assert (before[10:] == tiny.mask_id).all() and not (before[:10] == tiny.mask_id).any()
        observation, *_ = env.step(torch.eye(20)[place])
        assert observation["tokens"][place] == before[place] == env.unwrapped.core.tokens[0, -20 + place]


def test_one_line_adds_an_entry_to_every_face(monkeypatch):
    line = Entry("left", ("L",), lambda now: now.mask.cumsum(1).float(), high=20.0, committed=-1.0, low=-1.0)
    for module in (entries, unmasking):
        monkeypatch.setattr(module, "ENTRIES", (*ENTRIES, line))
    env = DLLMUnmaskEnv(split="test")
    observation, _ = env.reset(seed=0)
    assert observation["left"].tolist() == list(range(1, 21)) and observation in env.observation_space
    observation, *_ = env.step(torch.eye(20)[7])
    assert observation["left"][7] == -1 and observation["left"][8] == 8 and observation in env.observation_space
    native = DLLMUnmaskTorchRLEnv(2, split="test")
    assert native.rollout(2)["left"].shape == (2, 2, 20)
    assert native.observation_spec["left"].high.unique().tolist() == [20.0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
def test_an_environment_is_copied_and_pickled_with_its_entries(copied):
    env = DLLMUnmaskEnv(split="test", **EVERYTHING)
    env.reset(seed=0)
    other = copied(env)
    (one, *_), (two, *_) = (each.step(torch.eye(20)[7]) for each in (env, other))
    assert set(one) == {entry.name for entry in ENTRIES}
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("settings", [{}, {"lookahead": False, "block_length": 10}], ids=["full", "active block"])
def test_what_was_committed_reads_how_sure_the_dllm_was_then(settings):
    env = DLLMUnmaskEnv(split="test", committed=True, **settings)
    before, _ = env.reset(seed=0)
    assert (before["committed"] == 0).all()
    middle, *_ = env.step(torch.eye(20)[3] + torch.eye(20)[15])  # 15 is legal in the full environment only
    later, *_ = env.step(torch.eye(20)[4])
    expected = np.where(middle["mask"] == 0, before["confidence"][:, 0], 0)
    assert expected[3] > 0 and np.array_equal(middle["committed"], expected)
    expected[4] = middle["confidence"][4, 0]
    assert np.array_equal(later["committed"], expected) and later in env.observation_space
    assert (env.reset(seed=1)[0]["committed"] == 0).all()
