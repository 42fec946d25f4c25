"""What people put around the environment: the wrappers and workers of Gymnasium, the adapters of TorchRL and SB3."""

from __future__ import annotations

import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import AsyncVectorEnv
from gymnasium.wrappers import vector

import dllm_gym  # noqa: F401

KEYS = ["confidence", "mask"]


def single(**settings) -> gym.Env:
    return gym.make("DLLMUnmask-v0", **settings)


def many(**settings) -> gym.vector.VectorEnv:
    return gym.make_vec("DLLMUnmask-v0", num_envs=3, **settings)


def play(env, steps: int = 6, everything=np.ones) -> list:
    """The last step's return values; every observation lies in the wrapper's space."""
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    for step in range(steps):
        shape = env.action_space.shape
        action = everything(shape, np.int8) if step == steps - 1 else np.eye(*((3, 20) if len(shape) > 1 else (1, 20)))
        result = env.step(action.reshape(shape).astype(np.int8))
        assert env.observation_space.contains(result[0])
        if len(shape) == 1 and (result[2] or result[3]):
            return result
    return result


# ---- Gymnasium, one environment ----


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: wrappers.FilterObservation(env, KEYS),
        lambda env: wrappers.FlattenObservation(env),
        lambda env: wrappers.NormalizeObservation(wrappers.FlattenObservation(env)),
        lambda env: wrappers.RescaleObservation(wrappers.FlattenObservation(env), np.float32(-1), np.float32(1)),
        lambda env: wrappers.DtypeObservation(wrappers.FlattenObservation(env), np.float64),
        lambda env: wrappers.FrameStackObservation(env, 3),
        lambda env: wrappers.DelayObservation(env, 2),
        lambda env: wrappers.MaxAndSkipObservation(wrappers.FlattenObservation(env), 2),
        lambda env: wrappers.TimeAwareObservation(wrappers.TimeLimit(env, 9), dict_time_key="left"),
        lambda env: wrappers.NormalizeReward(env),
        lambda env: wrappers.ClipReward(env, 0, 0.5),
        lambda env: wrappers.StickyAction(env, 0.5),
        lambda env: wrappers.RecordEpisodeStatistics(env, stats_key="statistics"),
    ],
)
def test_wrappers_of_one_environment(wrap):
    assert np.isfinite(play(wrap(single(kl=2, entropy=True, margin=True)))[1])


# ---- Gymnasium, many lanes ----


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_rewards_ends_and_infos_are_numpy_whatever_observations_are(arrays):
    observation, reward, terminated, truncated, info = play(many(arrays=arrays))
    assert {type(value) for value in observation.values()} == {torch.Tensor if arrays == "torch" else np.ndarray}
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, np.bool_, np.bool_)
    told = [
        *info["episode"].values(),
        *info["final_obs"].values(),
        *(info[f"_{name}"] for name in ("episode", "final_obs")),
    ]
    assert all(isinstance(value, np.ndarray) and len(value) == 3 for value in told)


def test_observations_in_numpy_are_those_in_torch():
    of_torch, of_numpy = play(many(hidden=True, kl=1))[0], play(many(hidden=True, kl=1, arrays="numpy"))[0]
    assert of_torch.keys() == of_numpy.keys()
    assert all((value.numpy() == of_numpy[name]).all() for name, value in of_torch.items())
    with pytest.raises(ValueError, match="arrays='jax' is not known: choose one of torch, numpy"):
        many(arrays="jax")


def test_what_is_returned_is_the_callers():
    envs = many()
    _, reward, terminated, _, info = play(envs)
    paid = envs.unwrapped.core.outcome.reward.copy()
    for array in (reward, terminated, info["episode"]["r"], info["episode"]["score"]):
        array[:] = 0
    assert (envs.unwrapped.core.outcome.reward == paid).all() and envs.unwrapped.core.outcome.terminated.all()


def test_infos_as_a_list_know_each_lanes_episode_and_last_observation():
    envs = vector.DictInfoToList(many())
    envs.reset(seed=0)
    action = np.zeros((3, 20), np.int8)
    action[1] = 1
    *_, infos = envs.step(action)
    assert [sorted(info) for info in infos] == [[], ["episode", "final_info", "final_obs"], []]
    assert infos[1]["episode"]["l"] == 1 and infos[1]["final_obs"]["mask"].sum() == 0


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize(
    "wrap",
    [
        vector.NormalizeReward,
        vector.DictInfoToList,
        lambda envs: vector.ClipReward(envs, 0, 0.5),
        lambda envs: vector.TransformReward(envs, lambda reward: 2 * reward),
        lambda envs: vector.VectorizeTransformReward(envs, wrappers.ClipReward, min_reward=0, max_reward=0.5),
        lambda envs: vector.RecordEpisodeStatistics(envs, stats_key="statistics"),
        lambda envs: vector.TransformAction(envs, lambda action: action, envs.action_space),
    ],
)
def test_vector_wrappers_of_rewards_actions_and_infos(wrap, mode, arrays):
    reward = play(wrap(many(autoreset_mode=mode, arrays=arrays)))[1]
    assert reward.shape == (3,) and np.isfinite(reward).all()


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda envs: vector.FilterObservation(envs, KEYS),
        vector.FlattenObservation,
        lambda envs: vector.NormalizeObservation(vector.FlattenObservation(envs)),
        lambda envs: vector.RescaleObservation(vector.FlattenObservation(envs), -1.0, 1.0),
        lambda envs: vector.DtypeObservation(vector.FlattenObservation(envs), np.float64),
        lambda envs: vector.ReshapeObservation(vector.FlattenObservation(envs), (61, 1)),
        lambda envs: vector.TransformObservation(
            envs, lambda seen: seen["mask"], single_observation_space=envs.single_observation_space["mask"]
        ),
        lambda envs: vector.VectorizeTransformObservation(envs, wrappers.FilterObservation, filter_keys=KEYS),
    ],
)
def test_vector_wrappers_of_observations_need_the_next_step_mode(wrap, arrays):
    assert np.isfinite(play(wrap(many(autoreset_mode="NextStep", arrays=arrays)))[1]).all()
    with pytest.raises(ValueError, match="autoreset_mode"):  # Gymnasium's rule: the last observation would be left out
        wrap(many(arrays=arrays))


# ---- processes ----


def busy_threads() -> None:
    """Have OpenMP start its threads, as any larger tensor operation does."""
    torch.set_num_threads(2)
    torch.ones(600, 600) @ torch.ones(600, 600)
    torch.ones(1 << 20).exp_()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    busy_threads()
    yield
    torch.set_num_threads(before)


def decode(start: gym.Env | None, pipe) -> None:
    env = start or gym.make("DLLMUnmask-v0")
    env.reset(seed=0)
    pipe.send((torch.get_num_threads(), float(torch.ones(1 << 20).exp_().sum()), env.step(np.ones(20, np.int8))[2]))


@pytest.mark.parametrize("inherited", [True, False])
def test_a_forked_environment_computes_after_torch_has_used_threads(two_threads, inherited):
    env = single() if inherited else None
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=decode, args=(env, theirs), daemon=True)
    child.start()
    try:
        assert ours.poll(120), "the forked process waits for ever"
        threads, total, terminated = ours.recv()
    finally:
        child.kill()
        child.join()
    assert threads == 1 and terminated and total == pytest.approx(float(torch.ones(1 << 20).exp_().sum()), rel=1e-4)
    assert torch.get_num_threads() == 2  # here


def test_gymnasiums_workers_answer_after_torch_has_used_threads(two_threads):
    workers = AsyncVectorEnv([single] * 2, context="fork")
    try:
        workers.reset_async(seed=0)
        workers.reset_wait(timeout=120)
        workers.step_async(np.ones((2, 20), np.int8))
        assert workers.step_wait(timeout=120)[2].all()
    finally:
        workers.close(terminate=True)


# ---- TorchRL's and Stable-Baselines3's own adapters ----


@pytest.mark.parametrize(
    "settings", [{}, {"kl": 2, "entropy": True, "margin": True, "hidden": True, "alpha": [0.3, 3]}]
)
def test_torchrls_own_adapters(settings):
    from torchrl.envs import GymEnv, GymWrapper
    from torchrl.envs.utils import check_env_specs

    for env in (GymEnv("DLLMUnmask-v0", **settings), GymWrapper(single(**settings))):
        check_env_specs(env)
        assert env.rollout(25, break_when_any_done=False)["next", "done"].any()


def test_torchrls_wrapper_takes_many_lanes():
    from torchrl.envs import GymWrapper

    for arrays in ("torch", "numpy"):
        lanes = GymWrapper(many(arrays=arrays)).rollout(8, break_when_any_done=False)
        assert lanes.shape == (3, 8) and lanes["next", "reward"].isfinite().all()


@pytest.mark.parametrize("kind", ["DummyVecEnv", "SubprocVecEnv"])
def test_stable_baselines_own_adapters(kind, two_threads):
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env", reason="needs the extra 'sb3'")
    from stable_baselines3.common.monitor import Monitor

    how = {"start_method": "fork"} if kind == "SubprocVecEnv" else {}
    envs = getattr(vec_env, kind)([lambda: Monitor(single(kl=1, entropy=True))] * 2, **how)
    try:
        envs = vec_env.VecNormalize(vec_env.VecCheckNan(envs, raise_exception=True), norm_obs_keys=["confidence", "kl"])
        envs.reset()
        observation, reward, done, infos = envs.step(np.ones((2, 20), np.int8))
        assert done.all() and all(np.isfinite(value).all() for value in (reward, *observation.values()))
        assert all("episode" in info for info in infos)
    finally:
        envs.close()
