"""The observation entries on request (entropy, margin, kl): against plain arithmetic, in every face and mode."""

from __future__ import annotations

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import llada_fields
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from toys import act

import dllm_gym  # noqa: F401
from agents.rollout import evaluate
from dllm_gym.deciders.rules import Blockwise, EntropyBounded, Klass, Margin, NegativeEntropy
from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import Sampling, base, load_dllm, vocabulary
from dllm_gym.noise import uniform
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.predictions import KL_MOST
from dllm_gym.process.unmasking import Unmasking

ALL = {"entropy": True, "margin": True, "kl": 3}
NAMES = ("entropy", "margin", "kl")


def some(observation, seed: int) -> torch.Tensor:
    """Random legal positions; in a third of the lanes none."""
    legal = torch.as_tensor(observation["action_mask"]).bool()
    generator = torch.Generator().manual_seed(seed)
    chosen = legal & (torch.rand(legal.shape, generator=generator) < 0.5)
    return (chosen & (torch.rand(legal.shape[0], 1, generator=generator) < 0.67)).to(torch.int8)


class PlainLane:
    """The entries of one lane in float64 from full logits, one forward of that lane alone per step."""

    def __init__(self, core: Unmasking, lane: int):
        self.core, self.lane = core, lane
        self.history: list[torch.Tensor] = []  # p [L, V] of every step of the episode

    def look(self) -> dict[str, torch.Tensor]:
        """What the lane should show now; called once per step."""
        core, dllm = self.core, self.core.dllm
        if core.steps[self.lane] == 0:
            self.history = []
        tokens = core.tokens[self.lane, -(len(core.prompts[self.lane]) + core.L) :]
        hidden = dllm.backbone(input_ids=tokens[None]).last_hidden_state[0, -core.L :]
        logits = dllm.lm_head(hidden).double()
        logits[:, dllm.mask_id] = -torch.inf
        self.history.append(logits.softmax(-1))
        return self.entries(tokens[-core.L :] == dllm.mask_id, core.predictions.drift.kl.shape[-1])

    def entries(self, mask: torch.Tensor, H: int) -> dict[str, torch.Tensor]:
        p = self.history[-1]
        best, second = p.topk(2).values.unbind(-1)
        kl = torch.full((len(p), H), KL_MOST, dtype=torch.float64)
        for h, (new, old) in enumerate(zip(self.history[:0:-1], self.history[-2::-1], strict=True)):
            if h < H:
                kl[:, h] = torch.where(new > 0, new * (new / old).log(), 0).sum(-1).clamp_max(KL_MOST)
        return {
            "entropy": torch.where(mask, torch.where(p > 0, -p * p.log(), 0).sum(-1), 0),
            "margin": torch.where(mask, best - second, 1),
            "kl": torch.where(mask[:, None], kl, 0),
        }


def check(observation, lanes: list[PlainLane]) -> None:
    for lane, plain in enumerate(lanes):
        for name, expected in plain.look().items():
            shown = observation[name][lane]
            assert shown.dtype == torch.float32
            torch.testing.assert_close(shown.double(), expected, atol=2e-5, rtol=1e-3)


SETTINGS = [
    {"block_length": 10, "temperature": 1.0},
    {"autoreset_mode": "NextStep", "max_episode_steps": 6, "hidden": True},
    {"autoreset_mode": "Disabled", "max_episode_steps": 6, "task": "arithmetic"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_entries_equal_a_plain_computation_from_full_logits(settings):
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=3, split="test", **ALL, **settings)
    lanes = [PlainLane(envs.core, lane) for lane in range(3)]
    observation, _ = envs.reset(seed=0)
    check(observation, lanes)
    finished = 0
    for step in range(24):
        observation, _, terminated, truncated, _ = envs.step(some(observation, step))
        assert envs.observation_space.contains({name: value.numpy() for name, value in observation.items()})
        over = terminated | truncated
        finished += int(over.sum())
        check(observation, lanes)
        if envs.autoreset_mode is AutoresetMode.DISABLED and over.any():
            before = observation
            observation, _ = envs.reset(options={"reset_mask": over})
            for lane in range(3):
                if over[lane]:
                    lanes[lane].look()
                for name in NAMES:  # a lane that goes on is left as it was
                    assert over[lane] or torch.equal(observation[name][lane], before[name][lane])
    assert finished >= 3


def start(lanes: int = 2, **settings) -> Unmasking:
    core = Unmasking(lanes, EnvConfig(**{"split": "test", **ALL, **settings}))
    core.begin(range(lanes), range(lanes), [0] * lanes)
    core.predict()
    return core


def test_kl_is_newest_first_the_most_before_and_zero_for_a_wasted_step():
    core = start(1)
    assert (core.observe()["kl"] == KL_MOST).all()
    nothing, one = torch.zeros(1, 20), torch.eye(20)[[7]]
    act(core, nothing)
    core.predict()
    assert core.row_forwards == 1
    assert (core.observe()["kl"] == torch.tensor([0.0, KL_MOST, KL_MOST])).all()
    act(core, one)
    core.predict()
    kl = core.observe()["kl"][0]
    assert (kl[7] == 0).all()  # committed
    left = torch.arange(20) != 7
    assert (kl[left, 0] > 0.1).any() and (kl[left, 0] < KL_MOST).all()
    assert (kl[left, 1] == 0).all() and (kl[left, 2] == KL_MOST).all()
    act(core, nothing)
    core.predict()
    later = core.observe()["kl"][0]
    assert torch.equal(later[left, 1], kl[left, 0]) and (later[left, 0] == 0).all() and (later[left, 2] == 0).all()
    act(core, torch.ones(1, 20))
    assert (core.observe()["kl"] == 0).all() and (core.observe()["entropy"] == 0).all()
    assert (core.observe()["margin"] == 1).all()


def test_a_lane_that_is_over_or_empty_does_not_move_on():
    core = start(max_episode_steps=1)
    act(core, torch.eye(20)[[3, 4]])
    core.predict()
    seen = core.observe()
    act(core, torch.zeros(2, 20))  # both lanes were truncated: no step of an episode
    core.predict()
    assert torch.equal(core.observe()["kl"], seen["kl"]) and (seen["kl"][0, 5, 1:] == KL_MOST).all()
    core.begin([0, 1], [-1, -1], [0, 0])
    core.predict()
    empty = core.observe()
    assert (empty["kl"] == 0).all() and (empty["entropy"] == 0).all() and (empty["margin"] == 1).all()


def test_the_final_observation_has_the_true_entries():
    same = DLLMUnmaskVectorEnv(num_envs=2, max_episode_steps=3, **ALL)
    disabled = DLLMUnmaskVectorEnv(num_envs=2, max_episode_steps=3, autoreset_mode="Disabled", **ALL)
    for envs in (same, disabled):
        envs.reset(seed=3)
    for position in ([1, 4], [2, 5], [3, 3]):
        action = torch.eye(20)[position]
        action[1] *= position[1] != 5  # lane 1 wastes its second step
        observation, _, _, truncated, info = same.step(action)
        expected, _, _, _, _ = disabled.step(action)
    assert truncated.all()
    assert all((info["final_obs"][name] == expected[name].numpy()).all() for name in expected)
    assert (info["final_obs"]["kl"][1] > 0).any(0).tolist() == [True, False, True]
    assert (observation["kl"] == KL_MOST).all()  # the next episode has begun


def test_a_refilled_lane_shows_what_a_fresh_one_does():
    def episode(envs: DLLMUnmaskVectorEnv, observation) -> list[dict[str, torch.Tensor]]:
        seen = [observation]
        for position in ([9, 9], [2, 2], [11, 11]):
            seen.append(envs.step(torch.eye(20)[position])[0])
        return seen

    envs = DLLMUnmaskVectorEnv(num_envs=2, split="test", **ALL)
    fresh = episode(envs, envs.reset(seed=0, options={"examples": [5, 6]})[0])
    observation, _ = envs.reset(seed=0, options={"examples": [8, 9], "queue": [5, 6]})
    for seed in range(3):
        observation, *_ = envs.step(some(observation, seed))
    refilled = episode(envs, envs.step(torch.ones(2, 20))[0])
    for new, old in zip(refilled, fresh, strict=True):
        assert all(torch.equal(new[name], old[name]) for name in NAMES)


def test_entries_describe_the_untempered_distribution():
    cold, hot = start(temperature=0.0), start(temperature=1.5)
    for name in (*NAMES, "confidence"):
        assert torch.equal(cold.observe()[name], hot.observe()[name])
    assert not torch.equal(cold.predictions.proposal, hot.predictions.proposal)


def test_entries_are_off_by_default_and_change_nothing_else():
    plain, asked = start(entropy=False, margin=False, kl=0), start()
    assert plain.predictions.drift is None and set(plain.observe()) == {"confidence", "mask", "action_mask", "time"}
    assert set(asked.observe()) == {*plain.observe(), *NAMES}
    assert asked.observe()["confidence"].shape == (2, 20, 1)
    for _ in range(3):
        for core in (plain, asked):
            act(core, torch.eye(20)[[int(core.steps[0]), 7]])
            core.predict()
        assert torch.equal(plain.tokens, asked.tokens) and torch.equal(
            plain.predictions.proposal, asked.predictions.proposal
        )
        assert torch.equal(plain.observe()["confidence"], asked.observe()["confidence"])


def test_margin_is_the_difference_of_the_two_largest_confidences():
    seen = start(top_k=2).observe()
    assert torch.equal(seen["margin"], seen["confidence"][..., 0] - seen["confidence"][..., 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": -1}, "kl=-1: need a whole number of at least 0"),
        ({"kl": 1.5}, "kl=1.5"),
        ({"kl": True}, "kl=True"),
        ({"entropy": "yes"}, "entropy='yes': need True or False"),
        ({"margin": 2}, "margin=2: need True or False"),
        ({"hidden": None}, "hidden=None"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Unmasking(1, EnvConfig(**settings))


def test_a_requirement_of_1_switches_an_entry_on():
    assert set(NAMES) <= set(start(entropy=1, margin=1, kl=1, hidden=1).observe())


# ---- the prediction ----


def test_forbidden_tokens_have_no_share_in_a_prediction(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(llada_fields(pad_token_id=2)))
    dllm = load_dllm(checkpoint)
    tokens = torch.tensor([[9, 3, 1, 1, 12, 15]])
    sampling = Sampling(entropy=True, margin=True, log_prob=True)
    prediction = dllm.predict(tokens, None, tokens == 1, sampling)
    logits = dllm.lm_head(dllm.backbone(input_ids=tokens).last_hidden_state)[0, 2:4].double()
    allowed = [token for token in range(20) if token not in (1, 2)]
    p = logits[:, allowed].softmax(-1)
    torch.testing.assert_close(prediction.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
    best, second = p.topk(2).values.unbind(-1)
    torch.testing.assert_close(prediction.margin.double(), best - second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.log_prob[:, allowed].double(), p.log(), atol=1e-5, rtol=1e-5)
    assert (prediction.log_prob[:, [1, 2]] == -torch.inf).all()
    bare = dllm.predict(tokens, None, tokens == 1)
    assert (bare.entropy, bare.margin, bare.log_prob, bare.hidden) == (None, None, None, None)


def test_equal_logits_go_to_the_lowest_token_however_much_is_asked_for(tiny):
    flat = torch.nn.Linear(tiny.hidden_size, tiny.vocab_size)
    torch.nn.init.zeros_(flat.weight)
    torch.nn.init.constant_(flat.bias, 0.5)
    dllm = base.DLLM(tiny.backbone, flat, tiny.tokenizer, tiny.config)
    tokens = torch.full((1, 6), tiny.mask_id)
    lowest = min(set(range(tiny.vocab_size)) - set(dllm.forbidden_ids))
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(margin=True), Sampling(top_k=5, entropy=True)):
        prediction = dllm.predict(tokens, None, tokens == tiny.mask_id, sampling)
        assert (prediction.token == lowest).all()
    count = tiny.vocab_size - len(dllm.forbidden_ids)
    torch.testing.assert_close(prediction.entropy, torch.full((6,), math.log(count)))


def test_divergence_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.75, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    expected = torch.tensor([first, 0.0, math.inf, math.inf])
    torch.testing.assert_close(vocabulary.kl_divergence(p.log(), q.log()), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.nn.Linear, lambda *sizes: torch.nn.Sequential(torch.nn.Linear(*sizes))])
def test_a_head_read_in_slices_equals_the_whole_distribution(monkeypatch, kind, temperature):
    """Slices of 4 tokens (one of them all forbidden), pieces of a few rows, against softmax in float64."""
    torch.manual_seed(0)
    head, hidden, forbidden = kind(6, 23).requires_grad_(False), 5 * torch.randn(9, 6), (1, 4, 5, 6, 7)
    monkeypatch.setitem(vocabulary.SLICE, "cpu", 4)
    monkeypatch.setattr(vocabulary, "PART", 25)
    sampling = Sampling(3, temperature, entropy=True, margin=True, log_prob=True)
    stream = torch.arange(9) if temperature else None
    said = vocabulary.Vocabulary(head, 23, forbidden).read(hidden, sampling, stream)
    logits = head(hidden).double()
    logits[:, list(forbidden)] = -torch.inf
    p = logits.softmax(-1)
    best = p.topk(3).values
    torch.testing.assert_close(said.confidence.double(), best, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(said.margin.double(), best[:, 0] - best[:, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(said.entropy.double(), torch.special.entr(p).sum(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(said.log_prob.double(), p.log(), atol=1e-5, rtol=1e-5)
    gumbel = -(-uniform(torch.arange(9), 0, 23).log()).log()
    assert torch.equal(said.token, (logits / temperature + gumbel if temperature else logits).argmax(-1))


def test_confident_positions_have_no_entropy_from_rounding():
    head = torch.nn.Linear(1, 20_000, bias=False).requires_grad_(False)
    torch.nn.init.zeros_(head.weight)
    head.weight[17_000] = 1.0
    said = vocabulary.Vocabulary(head, 20_000, ()).read(torch.tensor([[80.0], [0.0]]), Sampling(entropy=True))
    assert said.token.tolist() == [17_000, 0] and said.entropy[0] < 1e-25
    torch.testing.assert_close(said.entropy[1], torch.tensor(math.log(20_000)))


def test_reductions_in_pieces_give_the_same(monkeypatch):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(vocabulary, "PART", 25)  # two rows at a time
    assert [len(piece) for (piece,) in vocabulary.parts(logits)] == [2, 2, 2, 1]
    monkeypatch.undo()
    pieces = start()
    monkeypatch.undo()
    together = start()
    for core in (pieces, together):
        if core is pieces:
            monkeypatch.setattr(vocabulary, "PART", 25)
        act(core, torch.eye(20)[[3, 4]])
        core.predict()
        monkeypatch.undo()
    for name in NAMES:
        torch.testing.assert_close(pieces.observe()[name], together.observe()[name], atol=1e-5, rtol=1e-5)


# ---- the faces ----


@pytest.mark.parametrize("settings", [{}, {"task": "arithmetic", "block_length": 12, "temperature": 1.0}], ids=str)
def test_gymnasium_accepts_the_single_env(settings):
    env = gym.make("DLLMUnmask-v0", **ALL, **settings).unwrapped
    assert env.observation_space["kl"].shape == (env.core.L, 3) and env.observation_space["kl"].is_bounded()
    check_env(env)


def test_torchrl_accepts_its_face():
    from torchrl.envs.utils import check_env_specs

    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    check_env_specs(DLLMUnmaskTorchRLEnv(num_envs=2, hidden=True, **ALL))
    env = DLLMUnmaskTorchRLEnv(num_envs=3, **ALL)
    env.set_seed(0)
    episodes = env.rollout(30, break_when_any_done=False)
    seen = episodes["next"]
    assert all(env.observation_spec[name].is_in(seen[name][:, step]) for name in NAMES for step in range(30))
    assert (seen["kl"] >= 0).all()
    done = seen["done"].squeeze(-1)
    assert done.sum() >= 3
    after = episodes["kl"][:, 1:][done[:, :-1]]  # (resets, L, H)
    assert (after == KL_MOST).all()


def test_three_faces_show_the_same_entries():
    from tensordict import TensorDict

    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    settings = {"block_length": 10, "max_episode_steps": 8, **ALL}
    singles = [DLLMUnmaskEnv(**settings) for _ in range(3)]
    vector = DLLMUnmaskVectorEnv(num_envs=3, autoreset_mode="Disabled", **settings)
    torchrl = DLLMUnmaskTorchRLEnv(num_envs=3, **settings)
    torchrl.set_seed(4)
    observation, _ = vector.reset(seed=4)
    frames = [single.reset(seed=4 + lane)[0] for lane, single in enumerate(singles)]
    td = torchrl.reset()
    for step in range(8):
        for lane in range(3):
            for name in NAMES:
                for other in (frames[lane][name], td[name][lane].numpy()):
                    np.testing.assert_allclose(other, observation[name][lane].numpy(), atol=2e-5, rtol=1e-3)
        action = some(observation, seed=step)
        observation, _, terminated, truncated, _ = vector.step(action)
        td = torchrl.step(TensorDict({"action": action}, [3]))["next"]
        frames = [single.step(action[lane].numpy())[0] for lane, single in enumerate(singles)]
        if (terminated | truncated).any():
            break
    assert (terminated | truncated).any()


RULES = [Klass(0.6, 0.01), Klass(0.5, 0.1, 1), EntropyBounded(0.5), Blockwise(NegativeEntropy(6), 12), Margin(6)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_alone_equals_the_row_in_company(rule, mixed_task):
    settings = {"task": mixed_task, "split": "test", "block_length": 24, **rule.requires}
    company = evaluate(DLLMUnmaskVectorEnv(num_envs=16, **settings), rule, range(16))
    few = evaluate(DLLMUnmaskVectorEnv(num_envs=5, **settings), rule, range(16))  # lanes are refilled
    alone = evaluate(DLLMUnmaskVectorEnv(num_envs=1, **settings), rule, range(4))
    assert company.completions == few.completions and company.completions[:4] == alone.completions
    assert torch.equal(company.nfe, few.nfe) and torch.equal(company.nfe[:4], alone.nfe)
    assert len(company.nfe.unique()) > 1 or not isinstance(rule, Klass | EntropyBounded)


EXTREMES = [
    {"temperature": 1e-40},
    {"temperature": 5e-324, "dtype": "bfloat16"},
    {"temperature": 1e38, "top_k": 20},
    {"temperature": 1.7e308, "dtype": "bfloat16", "alpha": [1e-3, 1e3]},
    {"dtype": "float16", "block_length": 5, "lookahead": False, "kl": 0},
    {"max_episode_steps": 3, "hidden": True},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_every_entry_is_finite_and_in_its_space_after_every_step(settings):
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=4, arrays="numpy", **{**ALL, "kl": 3, **settings})
    observation, _ = envs.reset(seed=0)
    for step in range(25):
        assert envs.observation_space.contains(observation)
        assert all(np.isfinite(value).all() for value in observation.values())
        action = some({name: torch.from_numpy(value) for name, value in observation.items()}, step)
        observation, _, _, _, info = envs.step(action * (step % 4 > 0))  # some steps do nothing
        last = info.get("final_obs", {})
        assert all(np.isfinite(value).all() for value in last.values())


def test_a_temperature_that_stands_for_greedy_is_greedy_and_a_huge_one_is_uniform():
    def proposals(temperature: float) -> torch.Tensor:
        return start(2, temperature=temperature).predictions.proposal

    greedy = proposals(0.0)
    assert all(torch.equal(proposals(temperature), greedy) for temperature in (5e-324, 1e-310, 1e-40, 1e-20))
    hot = [proposals(temperature) for temperature in (1e31, 1e38, 1.7e308)]
    assert torch.equal(hot[0], hot[1]) and torch.equal(hot[0], hot[2])
    assert len(hot[0].unique()) > 8 and (hot[0] != 1).all()  # tokens of all kinds, but not the mask


def test_a_temperature_draws_as_often_as_softmax_says():
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0], [2.0]])
    hidden, stream = torch.ones(40_000, 1), torch.arange(40_000)
    for temperature in (0.5, 1.0, 2.0):
        token = vocabulary.Vocabulary(head, 3, ()).read(hidden, Sampling(temperature=temperature), stream).token
        share = token.bincount(minlength=3) / len(token)
        torch.testing.assert_close(share, (torch.arange(3) / temperature).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("temperature", [10**400, float("inf"), float("nan"), -1e-300, "hot", True])
def test_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature="):
        gym.make("DLLMUnmask-v0", temperature=temperature)


def test_a_network_that_overflows_is_named():
    head = torch.nn.Linear(1, 3, bias=False)
    with pytest.raises(ValueError, match="logits are not finite in torch.float32"):
        vocabulary.Vocabulary(head, 3, ()).read(torch.tensor([[float("inf")]]), Sampling())
