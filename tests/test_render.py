"""Pictures of an episode: steady in size, telling the states of a position apart, and hard to break."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest

import dllm_gym  # noqa: F401
from dllm_gym import render
from dllm_gym.render import CELL_HEIGHT, CELL_WIDTH, END, Frame, Viewer, ansi, pixels

ODD = ["", " ", "\n", "\r\n", "\t", END, "漢字", "🙂", "é́", "a long token indeed", "\x1b[31m", "\x00", "\ud800"]


def frame(length=20, **changes) -> Frame:
    """Everything masked at confidence 0.5, all legal."""
    fields = {
        "prompt": "1 2 3",
        "tokens": ["7"] * length,
        "masked": np.ones(length, bool),
        "confidence": np.full(length, 0.5, np.float32),
        "fresh": np.zeros(length, bool),
        "legal": np.ones(length, bool),
        "step": 0,
    }
    return Frame(**{**fields, **changes})


def with_state(i=7, masked=False, confidence=0.5, fresh=False, legal=False) -> Frame:
    """A frame in which position ``i`` is as given."""
    made = frame()
    for name, value in {"masked": masked, "confidence": confidence, "fresh": fresh, "legal": legal}.items():
        getattr(made, name)[i] = value
    return made


STATES = {
    "unsure": {"masked": True, "legal": True, "confidence": 0.1},
    "sure": {"masked": True, "legal": True, "confidence": 0.9},
    "not its turn": {"masked": True},
    "fresh": {"fresh": True},
    "done": {},
}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("length", [20, 48, 256])
def test_the_canvas_keeps_its_size(length):
    nothing = np.zeros(length, bool)
    frames = [
        frame(length),
        frame(length, masked=nothing, legal=nothing, fresh=~nothing, step=length, score=1.0, reward=-123.456),
        frame(length, prompt="", tokens=[""] * length),
        frame(length, prompt="a question of many words\n" * 300, tokens=["a long token"] * length),
    ]
    pictures = [pixels(f) for f in frames]
    assert {p.shape for p in pictures} == {pictures[0].shape} and pictures[0].dtype == np.uint8
    assert pictures[0].shape[0] % 16 == pictures[0].shape[1] % 16 == 0 and pictures[0].shape[2] == 3
    assert not np.array_equal(pictures[0], pictures[1])


def test_states_of_a_position_look_different_in_a_picture():
    pictures = {name: pixels(with_state(**state)).astype(int) for name, state in STATES.items()}
    for one in STATES:
        for other in set(STATES) - {one}:
            rows, columns = np.nonzero((pictures[one] != pictures[other]).any(-1)[render.CAPTION_HEIGHT :])
            assert len(rows) > CELL_WIDTH * CELL_HEIGHT / 2, (one, other)  # much of the cell ...
            assert np.ptp(rows) < CELL_HEIGHT and np.ptp(columns) < CELL_WIDTH  # ... and nothing but the cell


def test_states_of_a_position_look_different_in_text():
    texts = {name: ansi(with_state(**state), columns=20) for name, state in STATES.items()}
    shown = {name: plain(text).splitlines()[-1].split()[7] for name, text in texts.items()}
    assert shown == {"unsure": "░", "sure": "█", "not its turn": "·", "fresh": "7", "done": "7"}
    assert texts["fresh"] != texts["done"]


def test_darker_means_surer():
    darkness = [-pixels(with_state(masked=True, legal=True, confidence=c)).mean() for c in (0.0, 0.3, 0.6, 1.0)]
    assert darkness == sorted(darkness) and len(set(darkness)) == 4


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_odd_tokens_are_drawn_on_one_line(masked, fresh):
    n = len(ODD)
    odd = frame(n, tokens=ODD, prompt=" ".join(ODD), masked=np.full(n, masked), fresh=np.full(n, fresh))
    assert pixels(odd).shape == pixels(frame(n)).shape
    text = ansi(odd, columns=n)
    assert len(text.splitlines()) == 6  # caption, three lines of prompt, an empty one, one row of positions
    assert "\x1b[31m" not in text and text.encode()  # a terminal takes it, and is not commanded by it


def test_confidences_out_of_range_are_drawn():
    strange = np.array([np.nan, -1.0, 2.0, np.inf], np.float32)
    assert plain(ansi(frame(4, confidence=strange), columns=4)).splitlines()[-1] == "░ ░ █ █"
    assert pixels(frame(4, confidence=strange)).shape == pixels(frame(4)).shape


@pytest.mark.parametrize("name", ["masked", "confidence", "fresh", "legal"])
def test_fields_must_agree_about_the_length(name):
    for shape in ((19,), (20, 1), ()):
        with pytest.raises(ValueError, match=rf"{name} has shape .* 20 tokens: need \(L,\)"):
            frame(**{name: np.zeros(shape)})


def test_the_caption_counts():
    half = np.arange(20) < 10
    assert frame().caption == "NFE 0   0/20 tokens"
    assert frame(masked=half, step=4).caption == "NFE 4   10/20 tokens   2.5 per step"
    assert frame(masked=half, step=4, score=0.5, reward=0.25).caption.endswith("score 0.50   reward 0.25")


@pytest.mark.parametrize(("task", "columns"), [("sudoku", 5), ("arithmetic", 8)])
def test_a_real_episode(task, columns):
    env = gym.make("DLLMUnmask-v0", render_mode="rgb_array", task=task)
    observation, _ = env.reset(seed=0)
    pictures, over = [env.render()], False
    while not over:
        legal = observation["action_mask"] == 1
        action = legal & (legal.cumsum() <= 7)
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        seen = env.unwrapped.core.frame(0)
        assert np.array_equal(seen.fresh, action) and np.array_equal(seen.masked, observation["mask"] == 1)
        pictures.append(env.render())
    assert len({p.shape for p in pictures}) == 1 and len({p.tobytes() for p in pictures}) == len(pictures)
    assert (seen.score, seen.reward) == (info["episode"]["score"], info["episode"]["r"])
    assert "score" in seen.caption and render.grid_columns(len(seen.tokens)) == columns
    text = "".join(seen.tokens[: seen.tokens.index(END)] if END in seen.tokens else seen.tokens)
    assert text == env.unwrapped.last_completion()


def test_the_viewer_prints_where_no_window_opens(monkeypatch, capsys):
    monkeypatch.setattr(render, "_has_window", lambda: False)
    viewer = Viewer(fps=1000, columns=5)
    viewer.show(frame())
    assert capsys.readouterr().out == ansi(frame(), columns=5) + "\n"
    viewer.close()


@pytest.mark.filterwarnings("ignore:.*non-interactive")
def test_the_viewer_keeps_one_window(monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    monkeypatch.setattr(render, "_has_window", lambda: True)
    before, backend = len(plt.get_fignums()), matplotlib.get_backend()
    plt.switch_backend("agg")
    viewer = Viewer(fps=1000)
    for shown in (frame(), frame(step=3), frame(48)):  # another size: the window is opened anew
        viewer.show(shown)
        assert len(plt.get_fignums()) == before + 1
        assert np.array_equal(viewer._image.get_array(), pixels(shown))
    viewer.close()
    viewer.close()
    assert len(plt.get_fignums()) == before
    plt.switch_backend(backend)
