"""The programs in examples/ with which somebody adds something of their own, and the tour, on the shipped dLLM."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dllm_gym import tasks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(registered, monkeypatch):
    """Imports one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_the_task_is_asked_played_and_graded_on_the_shipped_dllm(example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it finds its data from anywhere
    own = example("own_task")
    episode = own.main()
    assert episode["l"] == 16 and 0 <= episode["score"] <= 1
    task = tasks.make_task("capitals")
    splits = [{row["country"] for row in task.examples(split)} for split in ("train", "validation", "test")]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits)) == 24
    italy = {"country": "Italy", "capital": "Rome"}
    assert str(task.prompt(italy)).strip() == "0920011225="
    replies = {"18151305": 1.0, "1815": 0.5, "18151306": 7 / 8, "": 0.0, "181513050": 0.0}
    assert {reply: task.grade(italy, reply) for reply in replies} == replies


def test_the_family_decodes_what_the_same_weights_decode_in_their_own(example):
    (shipped, of_shipped), (own, of_own) = example("own_dllm").main()
    assert (own, of_own) == (shipped, of_shipped) and of_own["l"] > 1 and of_own["score"] == 1


def test_the_task_is_played_on_the_family(example, tmp_path):
    example("own_task")
    folder = example("own_dllm").write_checkpoint(tmp_path / "mine")
    env = gym.make("DLLMUnmask-v0", model=str(folder), task="capitals")
    observation, _ = env.reset(seed=0)
    assert observation["mask"].shape == (16,) and env.unwrapped.core.dllm.config["model_type"] == "two_way_llama"
    assert env.step(observation["action_mask"])[4]["episode"]["l"] == 1


def test_the_rule_decides_as_the_same_rule_without_tensors(example):
    own = example("own_rule")
    plain = np.array(runpy.run_path(str(EXAMPLES / "own_agent.py"))["results"])  # (20, 2)
    table = own.main(examples=20)
    assert table["near_best(0.9)"] == pytest.approx(tuple(plain.mean(0)))
    assert len(table) == 4 and table["near_best(0.7)"][1] < table["near_best(0.9)"][1]


def test_the_policy_plays_the_same_after_it_was_saved_and_loaded(example):
    before, after = example("own_policy").main(examples=20)
    assert len(before) == 20 and before == after


def test_the_algorithm_learns_what_the_same_rounds_without_steps_do_not(example):
    own = example("own_algorithm")
    learning, standing = own.main(rounds=4), own.main(rounds=4, lr=0.0)
    assert learning[0] == standing[0] and np.mean(learning[2:]) > np.mean(standing[2:]) + 0.05


def test_the_tour_runs_from_its_first_cell_to_its_last():
    nbformat = pytest.importorskip("nbformat", reason="a notebook needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="a notebook needs nbclient and ipykernel")
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    shown = [output for cell in tour.cells for output in cell.get("outputs", [])]
    assert shown and not any(output.output_type == "error" or output.get("name") == "stderr" for output in shown)
    nbclient.NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    front, replay = (
        cell.outputs[-1].data for cell in tour.cells if "draw(rows" in cell.source or "page(" in cell.source
    )
    assert len(front["image/png"]) > 10_000 and "policy(trained)" in replay["text/html"]
