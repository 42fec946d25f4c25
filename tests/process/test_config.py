"""The settings of the process say by themselves what is wrong with them, before a task or a dLLM is loaded."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_gym.process.config import EnvConfig

WRONG = [
    ({"gen_length": 0}, "gen_length=0"),
    ({"gen_length": True}, "gen_length=True"),
    ({"block_length": 2.5}, "block_length=2.5"),
    ({"max_prompt_length": -1}, "max_prompt_length=-1"),
    ({"max_episode_steps": "ten"}, "max_episode_steps='ten'"),
    ({"top_k": None}, "top_k=None"),
    ({"kl": -1}, "kl=-1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": -0.5}, "temperature=-0.5"),
    ({"stop_at_eos": "no"}, "stop_at_eos='no'"),
    ({"hidden": 2}, "hidden=2"),
    ({"lookahead": None}, "lookahead=None"),
    ({"lookahead": False, "kl": 2}, "lookahead=False.*kl=2"),
    ({"alpha": [3, 1]}, r"alpha=\[3, 1\]"),
    ({"alpha": [1, 3], "reward": lambda score, steps, length: score}, "a reward of your own"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_named_without_a_model(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(model="no such model", task="no such task", **settings)


def test_numbers_of_numpy_are_taken_as_pythons():
    config = EnvConfig(gen_length=np.int64(24), kl=np.int32(1), temperature=np.float32(0.5), margin=np.True_, hidden=1)
    assert config == EnvConfig(gen_length=24, kl=1, temperature=0.5, margin=True, hidden=True)
    assert type(config.gen_length) is int and config.hidden is True and type(config.temperature) is float
