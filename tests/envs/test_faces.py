"""The three faces: each one's own contract, and that they tell the same story."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import dllm_gym  # noqa: F401
from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv


def make_vec(num_envs=3, **settings) -> DLLMUnmaskVectorEnv:
    return gym.make_vec("DLLMUnmask-v0", num_envs=num_envs, **settings)


def some(observation, share=0.4, seed=0) -> torch.Tensor:
    """A random legal action; every lane with a legal position unmasks something."""
    legal = torch.as_tensor(observation["action_mask"]).bool()
    u = torch.rand(legal.shape, generator=torch.Generator().manual_seed(seed))
    first = legal & (legal.cumsum(-1) == 1)
    return ((u < share) & legal | first).to(torch.int8)


# ---- single ----


@pytest.mark.parametrize("settings", [{}, {"task": "arithmetic", "block_length": 12, "top_k": 3}, {"hidden": True}])
def test_gymnasium_accepts_the_single_env(settings):
    with gym.make("DLLMUnmask-v0", render_mode="rgb_array", **settings) as env:
        check_env(env.unwrapped)


def test_stable_baselines_accepts_the_single_env():
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="needs the extra 'sb3'")
    checker.check_env(gym.make("DLLMUnmask-v0").unwrapped, warn=False)


@pytest.mark.parametrize("mode", ["ansi", "rgb_array", "human"])
def test_every_render_mode_draws(mode, capsys):
    env = gym.make("DLLMUnmask-v0", render_mode=mode)
    observation, _ = env.reset(seed=0)
    env.unwrapped.metadata["render_fps"] = 1000
    env.step(some(observation).numpy())
    picture = env.render()
    env.close()
    if mode == "ansi":
        assert "NFE 1" in picture
    elif mode == "rgb_array":
        assert picture.dtype == np.uint8 and picture.ndim == 3
    else:
        assert picture is None and "NFE 1" in capsys.readouterr().out


def test_an_example_can_be_chosen_and_its_text_read():
    env = gym.make("DLLMUnmask-v0", split="test").unwrapped
    env.reset(seed=0, options={"examples": 7})
    assert env.last_completion() is None
    _, _, terminated, _, info = env.step(np.ones(20, np.int8))
    assert terminated and info["episode"]["example"] == 7 and info["episode"]["l"] == 1
    assert info["episode"]["score"] == env.core.task.grade(env.core.examples[7], env.last_completion())
    for bad in (-1, 10**6, 1.5):
        with pytest.raises(ValueError, match="examples"):
            env.reset(options={"examples": bad})


def test_misuse_of_the_single_env_is_named():
    env = DLLMUnmaskEnv()
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        env.step(np.ones(20, np.int8))
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        env.render()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(19,\): need \(20,\)"):
        env.step(np.ones(19, np.int8))
    with pytest.raises(ValueError, match="dtype torch.float"):
        env.step(np.full(20, 0.5))
    env.step(np.ones(20, np.float32))  # 0.0 and 1.0 are fine: Stable-Baselines3 sends them
    with pytest.raises(gym.error.ResetNeeded, match="over"):
        env.step(np.ones(20, np.int8))
    with pytest.raises(ValueError, match="render_mode='4k'"):
        DLLMUnmaskEnv(render_mode="4k")
    with pytest.raises(TypeError, match="colour"):
        DLLMUnmaskEnv(colour="red")


# ---- vector ----


def contained(envs, observation) -> bool:
    return envs.observation_space.contains({k: v.cpu().numpy() for k, v in observation.items()})


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_contract_in_every_autoreset_mode(mode):
    envs = make_vec(autoreset_mode=mode, task="arithmetic", block_length=12, top_k=2)
    assert envs.metadata["autoreset_mode"] is mode
    observation, _ = envs.reset(seed=0)
    assert contained(envs, observation)
    kept, copies = [], []
    for step in range(60):
        observation, reward, terminated, truncated, info = envs.step(some(observation, seed=step))
        assert contained(envs, observation)
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, np.bool_, np.bool_)
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        done = terminated | truncated
        assert ("episode" in info) == bool(done.any())
        if done.any():
            assert (info["_episode"] == done).all() and (info["episode"]["r"][done] == reward[done]).all()
        assert (reward[~done] == 0).all()
        kept.append(observation)
        copies.append({k: v.clone() for k, v in observation.items()})
        if mode is AutoresetMode.DISABLED and done.any():
            observation, _ = envs.reset(options={"reset_mask": done})
    for old, copy in zip(kept, copies, strict=True):  # nothing returned was written to again
        assert all(torch.equal(old[k], copy[k]) for k in copy)


def finish(envs) -> tuple:
    """Let lane 0 alone end its episode."""
    envs.reset(seed=0)
    action = torch.zeros(3, 20, dtype=torch.int8)
    action[0] = 1
    return envs.step(action)


def test_same_step_returns_the_new_episode_and_keeps_the_last_observation():
    envs = make_vec()
    observation, reward, terminated, _, info = finish(envs)
    assert terminated.tolist() == [True, False, False]
    assert observation["mask"].sum(1).tolist() == [20, 20, 20] and observation["time"][0] == 0
    assert info["_final_obs"].tolist() == [True, False, False]
    assert info["final_obs"]["mask"][0].sum() == 0
    assert (info["final_obs"]["confidence"][0] == 1).all()
    np.testing.assert_allclose(info["final_obs"]["time"], [[0.05], [0], [0]], rtol=1e-6)
    assert info["final_info"]["episode"]["r"][0] == reward[0] == info["episode"]["r"][0]
    assert info["episode"]["l"].tolist() == [1, 0, 0]


def test_next_step_ignores_one_action_and_then_starts():
    envs = make_vec(autoreset_mode="NextStep")
    observation, _, terminated, _, _ = finish(envs)
    assert terminated[0] and observation["mask"][0].sum() == 0
    observation, reward, terminated, _, info = envs.step(torch.ones(3, 20, dtype=torch.int8))
    assert terminated.tolist() == [False, True, True] and reward[0] == 0
    assert observation["mask"][0].sum() == 20 and observation["time"][0] == 0
    assert info["_episode"].tolist() == [False, True, True]


def test_disabled_waits_for_its_reset():
    envs = make_vec(autoreset_mode="Disabled")
    finish(envs)
    with pytest.raises(gym.error.ResetNeeded, match=r"lanes \[0\]"):
        envs.step(torch.ones(3, 20, dtype=torch.int8))
    with pytest.raises(ValueError, match="reset_mask"):
        envs.reset(options={"reset_mask": [True, False]})
    observation, _ = envs.reset(options={"reset_mask": [True, False, False]})
    assert observation["mask"][0].sum() == 20
    envs.step(torch.ones(3, 20, dtype=torch.int8))


def test_the_final_observation_of_a_truncated_lane_has_true_confidences():
    settings = {"max_episode_steps": 2, "num_envs": 1}
    same = make_vec(**settings)
    disabled = make_vec(**settings, autoreset_mode="Disabled")
    for envs in (same, disabled):
        envs.reset(seed=3)
    for _ in range(2):
        action = torch.zeros(1, 20, dtype=torch.int8)
        action[0, 4] = 1
        observation, _, _, truncated, info = same.step(action)
        expected, _, _, _, _ = disabled.step(action)
    assert truncated[0]
    assert all((info["final_obs"][k] == expected[k].numpy()).all() for k in expected)


def test_lanes_draw_independently_of_each_others_timing():
    def examples_of_lane_0(share: float) -> list[int]:
        envs, seen, step = make_vec(), [], 0
        observation, _ = envs.reset(seed=11)
        while len(seen) < 4:
            action = some(observation, share, seed=step)
            action[0] = 1
            observation, _, _, _, info = envs.step(action)
            seen.append(int(info["episode"]["example"][0]))
            step += 1
        return seen

    assert examples_of_lane_0(0.05) == examples_of_lane_0(0.9)


def test_seeding_reproduces_and_differs():
    envs = make_vec()
    first, _ = envs.reset(seed=1)
    again, _ = envs.reset(seed=1)
    other, _ = envs.reset(seed=2)
    free, _ = envs.reset()
    assert torch.equal(first["confidence"], again["confidence"])
    assert not torch.equal(first["confidence"], other["confidence"])
    assert not torch.equal(free["confidence"], other["confidence"])
    listed, _ = envs.reset(seed=[1, 2, 3])
    assert torch.equal(first["confidence"], listed["confidence"])


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_the_info_says_which_item_of_a_queue_each_lane_has_and_each_episode_had(mode):
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=3, split="test", autoreset_mode=mode)
    chosen = {0: 5, 1: 6, 3: 7, 4: 7, 5: 9}  # item 2 is a lane without an episode
    options = {"examples": [5, 6, -1], "queue": [7, 7, 9]}
    observation, info = envs.reset(seed=0, options=options)
    assert info["item"].tolist() == [0, 1, -1] and info["_item"].tolist() == [True, True, False]
    had = {}
    for step in range(200):
        before = info["item"]
        action = observation["action_mask"].clone()
        action[0, step % 2 :] = 0  # lane 0 is the slower one
        observation, _, _, _, info = envs.step(action)
        for lane in np.flatnonzero(info.get("_episode", [])):
            assert info["episode"]["item"][lane] == before[lane]
            had[int(before[lane])] = int(info["episode"]["example"][lane])
        if "item" not in info:
            break
    assert had == chosen
    _, info = envs.reset(seed=0, options={"examples": [5, 6, -1]})
    assert "item" not in info
    *_, info = envs.step(np.ones((3, 20), np.int8))
    assert "item" not in info and "item" not in info["episode"]


def test_a_queue_is_dealt_in_order_and_leaves_lanes_empty():
    envs = make_vec(split="test")
    everything = torch.ones(3, 20, dtype=torch.int8)
    observation, _ = envs.reset(seed=0, options={"examples": [5, 6, -1], "queue": [7, 8, 9]})
    assert observation["action_mask"].sum(1).tolist() == [20, 20, 0]
    seen = []
    for _ in range(3):
        observation, _, _, _, info = envs.step(everything)
        seen.append(info["episode"]["example"].tolist())
    assert seen == [[5, 6, -1], [7, 8, -1], [9, -1, -1]]
    observation, reward, terminated, _, info = envs.step(everything)
    assert info == {} and not terminated.any() and (reward == 0).all()
    assert observation["mask"].sum() == 0


def test_misuse_of_the_vector_env_is_named():
    envs = make_vec()
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        envs.step(torch.ones(3, 20))
    envs.reset(seed=0)
    for bad, message in [
        (torch.ones(3, 19, dtype=torch.int8), r"shape \(3, 19\): need \(3, 20\)"),
        (torch.rand(3, 20), "dtype torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            envs.step(bad)
    for options, message in [
        ({"examples": [1, 2]}, "need a sequence of 3"),
        ({"examples": [1, 2, 10**7]}, "10000000 is not an example"),
        ({"queue": [1]}, "goes with"),
    ]:
        with pytest.raises(ValueError, match=message):
            envs.reset(options=options)
    with pytest.raises(ValueError, match="autoreset_mode='never'"):
        make_vec(autoreset_mode="never")
    with pytest.raises(ValueError, match="num_envs=0"):
        make_vec(num_envs=0)


def test_last_completions_and_vector_rendering():
    envs = make_vec(render_mode="ansi")
    finish(envs)
    assert [text is None for text in envs.last_completions()] == [False, True, True]
    assert len(envs.render()) == 3


# ---- TorchRL, and all three together ----


def test_torchrl_accepts_its_face():
    from torchrl.envs.utils import check_env_specs

    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    check_env_specs(DLLMUnmaskTorchRLEnv(num_envs=2, top_k=2, hidden=True))
    env = DLLMUnmaskTorchRLEnv(num_envs=4)
    env.set_seed(0)
    episodes = env.rollout(60, break_when_any_done=False)
    done = episodes["next", "done"].squeeze(-1)
    assert done.sum() >= 4  # lanes were reset on the way
    assert (episodes["next", "nfe"].squeeze(-1)[done] >= 1).all()
    assert (episodes["next", "reward"].squeeze(-1)[~done] == 0).all()


@pytest.mark.parametrize("settings", [{"block_length": 5, "top_k": 2}, {"task": "arithmetic", "temperature": 0.8}])
def test_three_faces_tell_the_same_story(settings):
    from tensordict import TensorDict

    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    singles = [gym.make("DLLMUnmask-v0", **settings) for _ in range(3)]
    vector = make_vec(**settings)
    torchrl = DLLMUnmaskTorchRLEnv(num_envs=3, **settings)
    torchrl.set_seed(4)
    observation, _ = vector.reset(seed=4)
    frames = [single.reset(seed=4 + lane)[0] for lane, single in enumerate(singles)]
    td = torchrl.reset()
    running = [True] * 3
    for step in range(100):
        for lane in (lane for lane in range(3) if running[lane]):
            for name, value in observation.items():
                # in other company a row differs by rounding in its confidences, and in nothing else
                tolerance = 1e-5 if name == "confidence" else 0
                for other in (frames[lane][name], td[name][lane].numpy()):
                    np.testing.assert_allclose(other, value[lane].numpy(), atol=tolerance, rtol=tolerance)
        action = some(observation, 0.25, seed=step)
        observation, reward, terminated, truncated, info = vector.step(action)
        td = torchrl.step(TensorDict({"action": action}, [3]))["next"]
        for lane in (lane for lane in range(3) if running[lane]):
            frames[lane], r, term, trunc, single_info = singles[lane].step(action[lane].numpy())
            assert (r, term, trunc) == (float(reward[lane]), bool(terminated[lane]), bool(truncated[lane]))
            assert (float(td["reward"][lane]), bool(td["terminated"][lane])) == (r, term)
            running[lane] = not (term or trunc)
            if not running[lane]:
                told = {k: v[lane].item() for k, v in info["episode"].items()}
                assert told == pytest.approx(single_info["episode"])
                assert float(td["score"][lane]) == told["score"] and int(td["nfe"][lane]) == told["l"]
        if not any(running):
            return
    raise AssertionError("the episodes never ended")


def test_every_part_of_the_torchrl_specs_is_made_on_the_dllms_device(monkeypatch):
    from dllm_gym.envs import torchrl as torchrl_env

    settings = {
        "num_envs": 2,
        "kl": 2,
        "tokens": True,
        "entropy": True,
        "margin": True,
        "hidden": True,
        "alpha": [0.3, 3],
    }
    there = torchrl_env.DLLMUnmaskTorchRLEnv(**settings)
    monkeypatch.setattr(torchrl_env, "Unmasking", lambda *_: there.core)
    with torch.device("meta"):  # what names no device is made there, as it is made on the CPU beside a dLLM on CUDA
        env = torchrl_env.DLLMUnmaskTorchRLEnv(**settings)
    leaves = [spec for _, spec in env.specs.items(True, True)]
    assert len(leaves) > 12 and {spec.device.type for spec in leaves} == {"cpu"}
    bounds = [spec.space for spec in leaves if hasattr(spec.space, "low")]
    assert bounds and {end.device.type for space in bounds for end in (space.low, space.high)} == {"cpu"}
