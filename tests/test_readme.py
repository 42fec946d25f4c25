"""The Python in README.md runs as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_real_runs import llada  # noqa: F401  (a fixture)

import dllm_gym.models.load as loading
from dllm_gym import tasks
from dllm_gym.models import load_dllm

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def registered(monkeypatch):
    """What the README registers is gone after the test."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))


def test_the_environment_is_used_as_shown(capsys):
    exec(BLOCKS[0], {})
    assert "'score'" in capsys.readouterr().out


def test_a_task_and_a_family_of_ones_own_are_added_as_shown(tmp_path, monkeypatch, registered, llada):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"Land{i},City{i}\n" for i in range(40))
    Path("capitals.csv").write_text("country,capital\n" + rows)
    Path("checkpoints/mine").mkdir(parents=True)
    Path("checkpoints/mine/config.json").write_text(json.dumps({"model_type": "my_family"}))
    Path("checkpoints/mine/model.safetensors").touch()  # MyDLLM reads it, or does not
    dllm = load_dllm(llada)
    names = {"MyDLLM": lambda folder: dllm}
    exec("import gymnasium as gym\n" + BLOCKS[1], names)
    env = names["env"]
    observation, _ = env.reset(seed=0)
    assert observation["mask"].shape == (16,) and env.unwrapped.core.dllm is dllm
    assert len([line for line in BLOCKS[1].splitlines() if line.strip()]) <= 15
