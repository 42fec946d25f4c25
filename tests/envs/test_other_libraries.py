"""Other RL libraries on DLLMUnmask-v0, really run: Stable-Baselines3, sb3-contrib, and the programs in examples/."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch

import dllm_gym  # noqa: F401
from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "seed": 0, "policy_kwargs": {"net_arch": [16]}}
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def sb3():
    return pytest.importorskip("stable_baselines3", reason="needs the extra 'sb3': pip install dllm_gym[sb3]")


@pytest.fixture
def contrib():
    return pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install sb3-contrib")


@pytest.fixture
def make_envs(sb3):
    from dllm_gym.envs.sb3 import DLLMUnmaskSB3VecEnv

    return DLLMUnmaskSB3VecEnv


@pytest.fixture
def recorded(make_envs):
    """Lanes that keep everything that is sent and told: ``sent`` (legal before, action), ``told`` (reward, infos)."""

    class Recorded(make_envs):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.sent, self.told = [], []

        def step_async(self, actions):
            self.sent.append((self.legal.copy(), np.array(actions)))
            super().step_async(actions)

        def step_wait(self):
            result = super().step_wait()
            self.told.append((result[1].copy(), result[3]))  # the algorithm may write into the reward
            return result

    return Recorded


def some(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random actions with illegal bits, and now and then an empty one."""
    return (rng.random(shape) < 0.6).astype(np.int8) * (rng.random((shape[0], 1)) < 0.8)


def close_to(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same observation, up to rounding of the confidences in other company."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_allclose(value, other[name], atol=1e-5 if name == "confidence" else 0, err_msg=name)


# ---- the adapter ----


@pytest.mark.parametrize("settings", [{"block_length": 10, "top_k": 2}, {"max_episode_steps": 3}])
def test_the_lanes_are_what_sb3s_own_dummyvecenv_of_single_environments_is(make_envs, settings):
    from stable_baselines3.common.vec_env import DummyVecEnv

    reference = DummyVecEnv([lambda: DLLMUnmaskEnv(**settings) for _ in range(3)])
    envs = make_envs(num_envs=3, **settings)
    assert envs.observation_space == reference.observation_space and envs.action_space == reference.action_space
    assert envs.seed(5) == reference.seed(5) == [5, 6, 7]
    close_to(envs.reset(), reference.reset())
    rng, cut = np.random.default_rng(0), []
    for _ in range(20):
        action = some(rng, (3, 20))
        observation, reward, done, infos = envs.step(action)
        expected, expected_reward, expected_done, expected_infos = reference.step(action)
        close_to(observation, expected)
        assert (reward.dtype, done.dtype) == (expected_reward.dtype, expected_done.dtype)
        assert reward.tolist() == expected_reward.tolist() and done.tolist() == expected_done.tolist()
        for info, other in zip(infos, expected_infos, strict=True):
            assert info.keys() == other.keys()
            assert info["TimeLimit.truncated"] is other["TimeLimit.truncated"]
            if "episode" in info:
                cut.append(info["TimeLimit.truncated"])
                close_to(info["terminal_observation"], other["terminal_observation"])
                assert info["episode"] == pytest.approx(other["episode"])
                assert type(info["episode"]["r"]) is float and type(info["episode"]["l"]) is int
    assert len(cut) > 3  # lanes were refilled on the way
    assert any(cut) == ("max_episode_steps" in settings) and not all(cut)


def test_every_step_is_the_vector_environments(make_envs):
    vector = gym.make_vec("DLLMUnmask-v0", num_envs=3, max_episode_steps=4)
    envs = make_envs(num_envs=3, max_episode_steps=4)
    envs.seed(2)
    first, _ = vector.reset(seed=2)
    np.testing.assert_equal(envs.reset(), {name: value.numpy() for name, value in first.items()})
    rng = np.random.default_rng(1)
    for _ in range(12):
        action = some(rng, (3, 20))
        observation, reward, done, infos = envs.step(action)
        expected, expected_reward, terminated, truncated, info = vector.step(torch.from_numpy(action))
        np.testing.assert_equal(observation, {name: value.numpy() for name, value in expected.items()})
        assert reward.tolist() == expected_reward.tolist()
        assert done.tolist() == (terminated | truncated).tolist()
        assert [told["TimeLimit.truncated"] for told in infos] == (truncated & ~terminated).tolist()
        for lane, told in enumerate(infos):
            assert ("episode" in told) == ("terminal_observation" in told) == bool(done[lane])
            if done[lane]:
                assert told["episode"] == {name: value[lane].item() for name, value in info["episode"].items()}
                final = {name: value[lane] for name, value in info["final_obs"].items()}
                np.testing.assert_equal(told["terminal_observation"], final)


def test_the_reported_episodes_are_those_that_sb3s_vecmonitor_counts(make_envs):
    from stable_baselines3.common.vec_env import VecMonitor

    plain = make_envs(num_envs=3)
    with pytest.warns(UserWarning, match="already wrapped"):  # the lanes report as a Monitor does, and say so
        counted = VecMonitor(make_envs(num_envs=3))
    for envs in (plain, counted):
        envs.seed(0)
        envs.reset()
    rng, ended = np.random.default_rng(2), 0
    for _ in range(30):
        action = some(rng, (3, 20))
        *_, infos = plain.step(action)
        *_, monitored = counted.step(action)
        for info, other in zip(infos, monitored, strict=True):
            assert ("episode" in info) == ("episode" in other)
            if "episode" in info:
                ended += 1
                assert info["episode"]["r"] == pytest.approx(float(other["episode"]["r"]))
                assert info["episode"]["l"] == other["episode"]["l"]
    assert ended >= 3


def test_seeds_and_chosen_examples_count_for_one_reset(make_envs):
    envs = make_envs(num_envs=2, split="test")

    def examples() -> list[int]:
        *_, infos = envs.step(np.ones((2, 20), np.float32))
        return [info["episode"]["example"] for info in infos]

    envs.seed(3)
    envs.reset()
    seeded = [*examples(), *examples()]
    envs.reset()
    assert [*examples(), *examples()] != seeded  # goes on from where the generators are
    envs.seed(3)
    envs.reset()
    assert [*examples(), *examples()] == seeded
    envs.set_options([{"examples": 4}, {"examples": 9}])
    envs.reset()
    assert examples() == [4, 9]
    assert all(isinstance(text, str) for text in envs.env_method("last_completion"))
    envs.reset()
    assert examples() != [4, 9]
    envs.set_options([{"examples": 4}, {}])
    with pytest.raises(ValueError, match="every lane or for none"):
        envs.reset()
    envs.set_options({"example": 4})
    with pytest.raises(ValueError, match="'example'"):
        envs.reset()


def test_attributes_and_methods_are_addressed_lane_by_lane(make_envs):
    from stable_baselines3.common.monitor import Monitor

    envs = make_envs(num_envs=3, render_mode="rgb_array")
    assert envs.has_attr("action_masks") and not envs.has_attr("nothing_of_this_name")
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        envs.env_method("action_masks")
    envs.set_attr("nickname", "left", indices=0)
    assert envs.get_attr("nickname", indices=[0]) == ["left"] and not envs.has_attr("nickname")
    with pytest.raises(AttributeError, match="alpha=2.0"):
        envs.set_attr("alpha", 2.0)
    assert envs.env_is_wrapped(Monitor, indices=[0, 2]) == [True, True]
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    envs.reset()
    pictures = envs.get_images()
    assert len(pictures) == 3 and pictures[1].ndim == 3
    np.testing.assert_array_equal(envs.env_method("render", indices=1)[0], pictures[1])
    assert envs.render().dtype == np.uint8  # SB3's tiles of all lanes
    envs.close()
    assert envs.vector_env.closed


def test_misuse_of_the_adapter_is_named(make_envs):
    envs = make_envs(num_envs=2)
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        envs.step(np.ones((2, 20)))
    envs.reset()
    with pytest.raises(ValueError, match=r"shape \(2, 19\): need \(2, 20\)"):
        envs.step(np.ones((2, 19)))
    with pytest.raises(ValueError, match="num_envs=0"):
        make_envs(num_envs=0)
    with pytest.raises(TypeError, match="autoreset_mode"):
        make_envs(num_envs=2, autoreset_mode="NextStep")


def test_without_stable_baselines_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.monitor", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "dllm_gym.envs.sb3", raising=False)
    with pytest.raises(ImportError, match=r"pip install dllm_gym\[sb3\]"):
        importlib.import_module("dllm_gym.envs.sb3")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_cuda])])
def test_arrays_are_numpy_wherever_the_dllm_lives(make_envs, device):
    envs = make_envs(num_envs=2, device=device, hidden=True)
    envs.seed(0)
    frames = [envs.reset()]
    observation, reward, done, infos = envs.step(np.ones((2, 20), np.int64))
    frames += [observation, infos[0]["terminal_observation"]]
    assert all(type(value) is np.ndarray for frame in frames for value in frame.values())
    assert type(reward) is np.ndarray and type(done) is np.ndarray and done.all()
    assert all(envs.observation_space.contains({k: v[0] for k, v in frame.items()}) for frame in frames[:2])
    assert envs.observation_space.contains(frames[2])


# ---- Stable-Baselines3 and sb3-contrib train ----


def parameters(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


def test_sb3_ppo_trains_on_the_lanes_and_sees_their_episodes(sb3, recorded):
    from stable_baselines3.common.evaluation import evaluate_policy

    envs = recorded(num_envs=4, alpha=0.5)
    model = sb3.PPO("MultiInputPolicy", envs, **SMALL)
    before = parameters(model)
    model.learn(256)
    assert len(envs.sent) == 64 and model.num_timesteps == 256
    assert torch.isfinite(parameters(model)).all() and not torch.equal(before, parameters(model))
    assert np.isfinite(model.logger.name_to_value["train/loss"])
    episodes = [info["episode"] for _, infos in envs.told for info in infos if "episode" in info]
    assert len(episodes) >= 8 and list(model.ep_info_buffer) == episodes
    assert sum(episode["r"] for episode in episodes) == pytest.approx(sum(reward.sum() for reward, _ in envs.told))
    for episode in episodes:
        assert episode["r"] == pytest.approx(episode["score"] * ((21 - episode["l"]) / 20) ** 0.5)
    assert any((action > legal).any() for legal, action in envs.sent)  # without masks illegal bits are sent (ignored)
    rewards, lengths = evaluate_policy(model, envs, 6, deterministic=False, return_episode_rewards=True)
    assert len(rewards) == 6 and all(0 <= reward <= 1 for reward in rewards)
    assert all(1 <= length <= 20 for length in lengths)


def test_a_seed_makes_sb3_training_reproducible(sb3, make_envs):
    def trained() -> torch.Tensor:
        return parameters(sb3.PPO("MultiInputPolicy", make_envs(num_envs=2), **SMALL).learn(32))

    torch.testing.assert_close(trained(), trained(), rtol=0, atol=0)


def test_maskable_ppo_never_sends_an_illegal_bit(contrib, recorded):
    from sb3_contrib.common.maskable.evaluation import evaluate_policy

    envs = recorded(num_envs=4, block_length=5)
    model = contrib.MaskablePPO("MultiInputPolicy", envs, **SMALL)
    before = parameters(model)
    model.learn(256)
    assert len(envs.sent) == 64 and torch.isfinite(parameters(model)).all()
    assert not torch.equal(before, parameters(model)) and len(model.ep_info_buffer) >= 4
    evaluate_policy(model, envs, 4, deterministic=False)
    assert len(envs.sent) > 64
    for legal, action in envs.sent:
        assert action.shape == legal.shape and (action <= legal).all()
    assert any((legal & (action == 1)).any() for legal, action in envs.sent)
    assert any((legal & (action == 0)).any() for legal, action in envs.sent)


def test_masks_leave_sb3_contribs_bernoulli_exactly_the_legal_bits(contrib, make_envs):
    from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution

    envs = make_envs(num_envs=2, block_length=5)
    observation = envs.reset()
    first = np.zeros((2, 20), np.int8)
    first[0, 1] = first[1, :5] = 1  # lane 0 stays in its first block, lane 1 goes on to the second
    observation, *_ = envs.step(first)
    masks = np.stack(envs.env_method("action_masks"))
    assert masks.dtype == bool and masks.shape == (2, 40)
    distribution = make_masked_proba_distribution(envs.action_space).proba_distribution(torch.zeros(2, 40))
    distribution.apply_masking(masks)
    samples = torch.stack([distribution.sample() for _ in range(64)])  # (64, 2, L)
    assert torch.equal(samples.amax(0), torch.from_numpy(observation["action_mask"]).long())
    assert samples.amin(0).sum() == 0  # every bit may be 0


def test_maskable_ppo_reads_the_masks_of_the_single_environment(contrib):
    env = gym.make("DLLMUnmask-v0", block_length=10)
    sent = []

    class Recorded(gym.Wrapper):
        def step(self, action):
            sent.append((self.env.unwrapped.core.observe()["action_mask"][0].numpy(), np.array(action)))
            return super().step(action)

    contrib.MaskablePPO("MultiInputPolicy", Recorded(env), **SMALL).learn(32)
    assert len(sent) >= 32 and not any((action > legal).any() for legal, action in sent)


def test_sb3_ppo_trains_on_the_single_environment(sb3):
    model = sb3.PPO("MultiInputPolicy", gym.make("DLLMUnmask-v0"), **{**SMALL, "batch_size": 16}).learn(32)
    assert len(model.ep_info_buffer) >= 1
    assert all(0 <= episode["r"] <= 1 and 1 <= episode["l"] <= 20 for episode in model.ep_info_buffer)
    assert torch.isfinite(parameters(model)).all()


# ---- the examples ----


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_cleanrl_example_learns_from_what_the_lanes_pay(monkeypatch, capsys):
    paid, step = [], DLLMUnmaskVectorEnv.step

    def spy(envs, actions):
        result = step(envs, actions)
        paid.append((result[1], result[2] | result[3]))
        return result

    monkeypatch.setattr(DLLMUnmaskVectorEnv, "step", spy)
    module = example("cleanrl_ppo")
    history = module.main(module.Settings(iterations=2, num_envs=8, num_steps=20))
    assert len(paid) == 40 and [told["steps"] for told in history] == [160, 320]
    for told, part in zip(history, (paid[:20], paid[20:]), strict=True):
        rewards = np.concatenate([reward[done] for reward, done in part])
        assert told["reward"] == pytest.approx(float(rewards.mean())) and np.isfinite(told["loss"])
        assert 0 <= told["reward"] <= told["score"] <= 1 <= told["nfe"] <= 20
    assert capsys.readouterr().out.count("reward") == 2


def test_the_cleanrl_examples_advantages_stop_at_the_end_of_an_episode():
    module = example("cleanrl_ppo")
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])  # (T, N)
    dones = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    values = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    settings = module.Settings(gamma=1.0, gae_lambda=1.0)
    advantages = module.gae(rewards, values, dones, torch.tensor([0.9, 100.0]), settings)
    # With lambda = 1: the rest of the episode's reward, or the value where the rollout cuts it, less the state's value.
    returns = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.9, 0.5], [0.9, 0.5]])
    torch.testing.assert_close(advantages, returns - values)
    one_step = module.gae(rewards, values, dones, torch.tensor([0.9, 100.0]), module.Settings(gae_lambda=0.0))
    deltas = torch.tensor([[0.2, 0.2], [0.7, 0.2], [0.2, 0.2], [0.2, -0.3]])
    torch.testing.assert_close(one_step, deltas)


def test_the_cleanrl_example_counts_legal_bits_only():
    module = example("cleanrl_ppo")
    logits, legal = torch.tensor([0.5, -1.0, 3.0]), torch.tensor([1, 1, 0])
    p = logits.sigmoid()
    log_prob, entropy = module.likelihood(logits, legal, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(log_prob, (p[0] * (1 - p[1])).log())
    torch.testing.assert_close(entropy, -(p * p.log() + (1 - p) * (1 - p).log())[:2].sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_torchrl_example_learns_from_what_the_lanes_pay(monkeypatch):
    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    paid, step = [], DLLMUnmaskTorchRLEnv._step

    def spy(env, tensordict):
        result = step(env, tensordict)
        paid.append((result["reward"].clone(), result["done"].clone()))
        return result

    monkeypatch.setattr(DLLMUnmaskTorchRLEnv, "_step", spy)
    history = example("torchrl_ppo").main(batches=2, num_envs=6, num_steps=20)
    paid = paid[-40:]  # the first may be the collector's rehearsal
    assert [told["steps"] for told in history] == [120, 240]
    for told, part in zip(history, (paid[:20], paid[20:]), strict=True):
        rewards = torch.cat([reward[done] for reward, done in part])
        assert told["reward"] == pytest.approx(float(rewards.mean())) and np.isfinite(told["loss"])
        assert 0 <= told["reward"] <= told["score"] <= 1 <= told["nfe"] <= 20


def test_the_own_agent_example_plays_in_fifteen_lines(capsys):
    path = EXAMPLES / "own_agent.py"
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 15
    results = np.array(runpy.run_path(str(path))["results"])  # (20, 2)
    assert capsys.readouterr().out == "accuracy {:.2f} at NFE {:.1f}\n".format(*results.mean(0))
    assert len(results) == 20 and results[:, 0].mean() > 0.3 and (results[:, 1] < 10).all()
