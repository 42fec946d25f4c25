"""The confidence policy: size, start, shapes, storage, and agreement of its two ways to act."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from dllm_gym.deciders.distributions import BernoulliArgmax, MaskedBernoulli, ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence, joint_confidence, rotate, sinusoid
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.rules import Joint


def observation(*lead, length=9, k=2):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(*lead, length, generator=generator) < 0.7
    return {
        "confidence": torch.rand(*lead, length, k, generator=generator),
        "mask": mask.to(torch.int8),
        "action_mask": (mask & (torch.arange(length) < 5)).to(torch.int8),
        "time": torch.rand(*lead, 1, generator=generator),
    }


def small(trained=True, **settings):
    torch.manual_seed(0)
    policy = DiTConfidence(width=16, ffn=32, **settings)
    if trained:
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def call(policy, obs):
    return policy(*(obs[key] for key in policy.in_keys))


def test_paper_size():
    assert sum(p.numel() for p in DiTConfidence().parameters()) == 331_265


def test_smart_init_is_slow_nearly_uniform_and_trainable_everywhere():
    torch.manual_seed(0)
    policy, obs = DiTConfidence(), observation(8, length=64)
    logits = call(policy, obs)
    assert (logits + 2).abs().max() < 1
    later = call(policy, {**obs, "time": 1 - obs["time"], "mask": 1 - obs["mask"]})
    assert torch.equal(later, logits)  # gates are zero: neither time nor mask can matter yet
    logits.square().sum().backward()
    assert policy.block.modulation[1].weight.grad.abs().sum() > 0  # with a zero head it would be 0
    assert (call(DiTConfidence(output_bias=0.5), obs) - 0.5).abs().max() < 1


def test_with_odds_a_policy_starts_as_a_soft_threshold():
    obs = observation(1, length=5)
    obs["confidence"][0, :, 0] = torch.tensor([0.5, 0.9, 0.1, 1.0, 0.0])
    started, blind = small(trained=False, odds=0.5), small(trained=False)
    expected = torch.tensor([1, 3, 1 / 3, 999**0.5, 999**-0.5]).log()  # half the log-odds; certainty ends at 0.999
    torch.testing.assert_close((call(started, obs) - call(blind, obs))[0], expected, atol=1e-4, rtol=0)
    call(started, obs).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in started.parameters() if p.grad is not None)


def test_with_bound_a_policy_starts_as_the_joint_rule():
    obs = observation(64, length=12)
    p = 0.3
    policy = small(trained=False, bound=5.0, output_bias=-5.0 * math.log(p))
    torch.nn.init.zeros_(policy.head.weight)
    rule = Joint(p)(obs, torch.rand(64, 12)) == 1
    chosen = (call(policy, obs) >= 0) & (obs["action_mask"] == 1)
    some = chosen.any(1)
    assert torch.equal(chosen[some], rule[some]) and 10 < some.sum() < 64
    assert (rule[~some].sum(1) <= 1).all()  # the rule's fallback; a distribution has its own


def test_tokens_and_deeper_blocks_matter_once_trained():
    obs = observation(3, length=6) | {"tokens": torch.randint(0, 9, (3, 6))}
    policy = small(vocab_size=9, blocks=2)
    assert policy.requires == {"top_k": 1, "tokens": 1} and len(policy.deeper) == 1
    assert not torch.allclose(call(policy, obs), call(policy, obs | {"tokens": obs["tokens"].roll(1, 1)}))
    with pytest.raises(ValueError, match="tokens=True"):
        policy.read({key: value for key, value in obs.items() if key != "tokens"})
    with pytest.raises(ValueError, match="vocab_size=9"):
        call(policy, obs | {"tokens": obs["tokens"] + 9})
    torch.nn.init.zeros_(policy.deeper[0].modulation[1].weight)
    torch.nn.init.zeros_(policy.deeper[0].modulation[1].bias)  # both gates closed
    alone = small(vocab_size=9)
    alone.load_state_dict({k: v for k, v in policy.state_dict().items() if not k.startswith("deeper")})
    torch.testing.assert_close(call(policy, obs), call(alone, obs))


def test_with_haste_the_preference_moves_the_threshold_from_the_start():
    obs = observation(3, length=5) | {"preference": torch.tensor([[0.0], [0.5], [1.0]])}
    settings = {"trained": False, "preference": True, "odds": 1.0}
    moved = call(small(haste=4.0, **settings), obs) - call(small(**settings), obs)
    torch.testing.assert_close(moved, torch.tensor([[0.0], [2.0], [4.0]]).expand(3, 5))
    with pytest.raises(ValueError, match="preference"):
        small(haste=1.0)


def test_leading_dimensions_are_rows():
    policy, obs = small(), observation(3, 4)
    logits = call(policy, obs)
    assert logits.shape == (3, 4, 9) and logits.dtype == torch.float32
    flat = call(policy, {k: v.flatten(0, 1) for k, v in obs.items()})
    torch.testing.assert_close(logits.flatten(0, 1), flat)
    torch.testing.assert_close(call(policy, {k: v[1, 2] for k, v in obs.items()}), logits[1, 2])


def test_every_input_matters_and_positions_are_told_apart():
    policy, obs = small(), observation(1)
    logits = call(policy, obs)
    for key, other in (("confidence", 1 - obs["confidence"]), ("mask", 1 - obs["mask"]), ("time", obs["time"] + 0.1)):
        assert (call(policy, {**obs, key: other}) - logits).abs().max() > 1e-3
    same = {**obs, "confidence": torch.full_like(obs["confidence"], 0.5), "mask": torch.ones_like(obs["mask"])}
    same["confidence"][:, 0] = 0.9
    assert call(policy, same)[0, 1:].std() > 1e-5  # equal but for their distance to position 0


def test_mask_condition_equals_conditioning_each_position():
    policy, obs = small(), observation(2)
    block, width = policy.block, 16
    time = policy.time_mlp(sinusoid(obs["time"], width, policy.time_period))
    condition = time[:, None] + policy.mask_embedding(obs["mask"].long())  # (B, L, d), the textbook form
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = block.modulation(condition).chunk(6, dim=-1)
    x = policy.input(obs["confidence"][..., :1])
    q, k, v = (
        t.unflatten(-1, (2, 8)).transpose(1, 2)
        for t in block.qkv(block.attention_norm(x) * (1 + scale_a) + shift_a).chunk(3, -1)
    )
    score = (rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    x = x + gate_a * block.out((score @ v).transpose(1, 2).flatten(-2))
    x = x + gate_f * block.ffn(block.ffn_norm(x) * (1 + scale_f) + shift_f)
    torch.testing.assert_close(call(policy, obs), policy.head(policy.final_norm(x)).squeeze(-1), atol=1e-4, rtol=1e-4)


def test_rotation_depends_on_distance_only():
    q, k = torch.randn(8), torch.randn(8)
    score = rotate(q.expand(1, 1, 6, 8))[0, 0] @ rotate(k.expand(1, 1, 6, 8))[0, 0].T
    for distance in (-2, 0, 3):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert abs(score[0, 0] - score[0, 3]) > 1e-4


def test_time_embedding_of_period_one_holds_two_values():
    time = torch.tensor([[0.0], [0.25], [1.0]])
    degenerate = sinusoid(time, 128, 1.0)
    assert [len(set(row)) for row in degenerate.tolist()] == [2, 2, 2]
    default = sinusoid(time, 128, DiTConfidence().time_period)
    assert len(set(default[1].tolist())) == 128
    torch.testing.assert_close(default[1, [0, 32]], torch.tensor([0.25, 2.5]).cos())  # frequencies 1 and 10


def test_reads_the_first_top_k_confidences_and_refuses_fewer():
    obs = observation(2, k=3)
    policy = small(top_k=2)
    changed = obs["confidence"].clone()
    changed[..., 2] = 0
    assert torch.equal(call(policy, obs), call(policy, {**obs, "confidence": changed}))
    with pytest.raises(ValueError, match="top_k=2"):
        call(policy, observation(2, k=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 30},
        {"heads": 0},
        {"top_k": 0},
        {"time_period": 0.0},
        {"odds": -1},
        {"bound": -1},
        {"haste": -1},
        {"blocks": 0},
    ],
)
def test_invalid_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiTConfidence(**settings)


def test_saved_policy_returns_bit_for_bit(tmp_path):
    policy, obs = small(top_k=2, time_period=1.0, output_bias=-1.0), observation(2)
    policy.save_pretrained(tmp_path / "new" / "folder")
    loaded = DiTConfidence.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.settings == policy.settings
    assert torch.equal(call(loaded, obs), call(policy, obs))


def drop_weight(weights, config):
    del weights["head.bias"]


def add_weight(weights, config):
    weights["second_head.bias"] = torch.zeros(1)


def reshape_weight(weights, config):
    weights["head.weight"] = weights["head.weight"].T.contiguous()


def other_width(weights, config):
    config["width"] = 32


def unknown_setting(weights, config):
    config["layers"] = 2


def missing_setting(weights, config):
    del config["ffn"]


def other_class(weights, config):
    config["policy"] = "DiTHidden"


@pytest.mark.parametrize(
    "spoil",
    [drop_weight, add_weight, reshape_weight, other_width, unknown_setting, missing_setting, other_class],
)
def test_spoilt_checkpoint_is_refused(tmp_path, spoil):
    small().save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    spoil(weights, config)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        DiTConfidence.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_or_missing_file_is_refused(tmp_path, name):
    small().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        DiTConfidence.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        DiTConfidence.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [MaskedBernoulli, BernoulliArgmax, ZeroTruncatedBernoulli])
def test_actor_and_decider_agree(cls):
    policy, obs = small(), observation(6)
    decider, actor = PolicyDecider(policy, cls, temperature=0.7), make_actor(policy, cls, temperature=0.7)
    noise = torch.rand(6, 9, generator=torch.Generator().manual_seed(2))
    action, log_prob = decider.decide(obs, noise)
    assert torch.equal(decider(obs, noise), action) and not log_prob.requires_grad
    assert not (action.bool() & (obs["action_mask"] == 0)).any()
    batch = TensorDict({**obs, "action": action}, [6])
    torch.testing.assert_close(actor.get_dist(batch).log_prob(action), log_prob, atol=1e-6, rtol=0)
    assert {"logits", "action", "action_log_prob"} <= set(actor(batch.clone()).keys())
    assert {id(p) for p in actor.parameters()} == {id(p) for p in policy.parameters()}


def test_greedy_decider_ignores_the_noise():
    policy, obs = small(), observation(6)
    decider = PolicyDecider(policy, BernoulliArgmax, greedy=True)
    action, log_prob = decider.decide(obs, torch.rand(6, 9))
    expected = BernoulliArgmax(call(policy, obs), obs["action_mask"])
    assert torch.equal(action, expected.deterministic_sample)
    torch.testing.assert_close(log_prob, expected.log_prob(action))
    assert torch.equal(action, decider(obs, torch.rand(6, 9)))
    assert str(decider) == "DiTConfidence(BernoulliArgmax, greedy)"


def test_absolute_positions_tell_equals_apart_from_the_start():
    torch.manual_seed(0)
    same = {"confidence": torch.full((1, 6, 1), 0.25), "mask": torch.ones(1, 6), "time": torch.zeros(1, 1)}
    blind, sighted = DiTConfidence(width=16, ffn=32), DiTConfidence(width=16, ffn=32, absolute_positions=True)
    assert call(blind, same).std() < 1e-6 < 1e-3 < call(sighted, same).std()


def test_joint_confidence_is_the_product_of_what_is_surer_by_hand():
    confidence, legal = torch.tensor([[0.5, 0.9, 0.5, 0.99, 0.8]]), torch.tensor([[1, 1, 1, 0, 1]]) == 1
    # in order: .9 (nothing surer), .8, then of the equals the left one; 0.99 may not be unmasked now
    expected = torch.tensor([[0.9 * 0.8, 1.0, 0.9 * 0.8 * 0.5, 0.0, 0.9]])
    torch.testing.assert_close(joint_confidence(confidence, legal), expected)
    assert not joint_confidence(confidence, torch.zeros_like(legal)).any()


def test_a_policy_that_reads_the_joint_confidence_tells_equals_apart_and_ignores_other_blocks():
    policy, obs = small(joint=True), observation(6)
    assert policy.in_keys == ("confidence", "mask", "time", "action_mask")
    flat = {**obs, "confidence": torch.full_like(obs["confidence"], 0.5), "mask": torch.ones_like(obs["mask"])}
    legal = flat["action_mask"].bool()
    assert all(len(set(row[may].tolist())) == may.sum() for row, may in zip(call(policy, flat), legal, strict=True))
    other = call(policy, {**obs, "action_mask": torch.ones_like(obs["action_mask"])})
    assert not torch.allclose(call(policy, obs), other)  # what may be unmasked is what counts
    told = small(joint=True, preference=True)
    assert told.in_keys == ("confidence", "mask", "time", "action_mask", "preference")
    slow, fast = (call(told, {**obs, "preference": torch.full((6, 1), wish)}) for wish in (0.0, 1.0))
    assert not torch.allclose(slow, fast)


def test_a_player_says_what_it_wanted_since_it_was_asked():
    obs = observation(4)
    player = PolicyDecider(small(), MaskedBernoulli, temperature=2.0)
    assert player.gauge.take() == {}
    for _ in range(2):
        player.decide(obs, torch.rand(4, 9))
    p, legal = (call(player.policy, obs) / 2).sigmoid(), obs["action_mask"] != 0
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()) * legal
    expected = {"unmask_probability": p[legal].mean(), "max_unmask_probability": p[legal].max()}
    expected["entropy"] = entropy.sum() / legal.any(-1).sum()
    assert player.gauge.take() == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    assert player.gauge.take() == {}
