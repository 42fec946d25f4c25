"""What every policy family promises: shapes, rows, size, training, candidates, storage, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from dllm_gym.deciders.distributions import BernoulliArgmax, ZeroTruncatedBernoulli
from dllm_gym.deciders.lup import DiTConfidenceLUP, DiTHiddenLUP
from dllm_gym.deciders.networks import DiTConfidence, DiTHidden, MLPPolicy, UPOPolicy
from dllm_gym.deciders.player import PolicyDecider, make_actor
from dllm_gym.deciders.policy import Policy
from dllm_gym.deciders.upo import UPOPublished

OWN = {"heads": 3, "kv_heads": 3, "ffn": 32, "rope_theta": 500.0, "norm_eps": 1e-5}
SMALL = {
    DiTConfidence: {"width": 16, "ffn": 32, "top_k": 2},
    DiTHidden: {"hidden_size": 24, "ffn": 32, "heads": 3},
    UPOPolicy: {"hidden_size": 24, "width": 16, "ffn": 32, "heads": 3, "top_k": 4},
    MLPPolicy: {"width": 16, "top_k": 3},
    DiTConfidenceLUP: {"width": 16, "ffn": 32, "top_k": 2, "num_blocks": 2},
    DiTHiddenLUP: {"hidden_size": 24, "own_block": OWN, "time_embed_dim": 10},
    UPOPublished: {"hidden_size": 24, "own_block": OWN, "top_k": 4, "block_length": 3},
}
READS = {
    DiTConfidence: ("confidence", "mask", "time"),
    DiTHidden: ("hidden", "mask", "time"),
    UPOPolicy: ("hidden", "confidence", "mask", "action_mask"),
    MLPPolicy: ("confidence", "mask", "time"),
    DiTConfidenceLUP: ("confidence", "mask", "time"),
    DiTHiddenLUP: ("hidden", "mask", "time"),
    UPOPublished: ("block_input", "confidence", "mask", "action_mask"),
}
each_family = pytest.mark.parametrize("family", SMALL, ids=lambda family: family.__name__)


def observation(*lead, length=9, k=4, d=24):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(*lead, length, generator=generator) < 0.8
    return {
        "confidence": torch.rand(*lead, length, k, generator=generator).sort(-1, descending=True).values,
        "mask": mask.to(torch.int8),
        "action_mask": (mask & (torch.arange(length) < 6)).to(torch.int8),
        "time": torch.rand(*lead, 1, generator=generator),
        "hidden": 3 * torch.randn(*lead, length, d, generator=generator),
        "block_input": 3 * torch.randn(*lead, length, d, generator=generator),
    }


def make(family, trained=True, **settings):
    torch.manual_seed(0)
    policy = family(**{**SMALL[family], **settings})
    if trained:
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def call(policy, obs):
    return policy(*policy.read(obs))


@each_family
def test_leading_dimensions_are_rows(family):
    policy, obs = make(family), observation(3, 4)
    logits = call(policy, obs)
    assert logits.shape == (3, 4, 9) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.flatten(0, 1), call(policy, {k: v.flatten(0, 1) for k, v in obs.items()}))
    alone = call(policy, {k: v[1, 2] for k, v in obs.items()})
    assert alone.shape == (9,)
    torch.testing.assert_close(alone, logits[1, 2])


@each_family
@pytest.mark.parametrize("candidates", [None, 2])
def test_logits_are_the_head_of_the_features(family, candidates):
    policy, obs = make(family, candidates=candidates), observation(3, 4)
    features = policy.features(*policy.read(obs))
    assert features.shape == (3, 4, 9, policy.width) and policy.width == policy.head.in_features
    logits, expected = call(policy, obs), policy.head(features).squeeze(-1)
    kept = logits > -1e5
    torch.testing.assert_close(logits[kept], expected[kept])
    assert kept.all() == (candidates is None)


@each_family
def test_a_half_precision_policy_gives_float32_logits(family):
    policy, obs = make(family), observation(5)
    exact, rounded = call(policy, obs), call(policy.to(torch.bfloat16), obs)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.3, rtol=0.1)


@each_family
def test_it_reads_what_it_says_and_nothing_else(family):
    policy, obs = make(family), observation(4)
    other = {
        "confidence": 1 - obs["confidence"],
        "mask": 1 - obs["mask"],
        "action_mask": 1 - obs["action_mask"],
        "time": obs["time"] + 0.2,
        "hidden": obs["hidden"].flip(0),
        "block_input": obs["block_input"].flip(0),
    }
    logits = call(policy, obs)
    assert policy.in_keys == policy.reads == READS[family]
    for key in obs:
        changed = call(policy, {**obs, key: other[key]})
        assert torch.equal(changed, logits) == (key not in policy.in_keys), key


@each_family
def test_more_confidences_than_it_reads_change_nothing(family):
    policy, obs = make(family), observation(4)
    wider = torch.cat([obs["confidence"], torch.rand(4, 9, 3)], dim=-1)
    assert torch.equal(call(policy, {**obs, "confidence": wider}), call(policy, obs))


@pytest.mark.parametrize("family", [DiTConfidence, DiTHidden, UPOPolicy, DiTConfidenceLUP, DiTHiddenLUP])
def test_positions_see_each_other(family):
    policy, obs = make(family), observation(1)
    changed = {k: v.clone() for k, v in obs.items()}
    changed["confidence"][:, 0], changed["hidden"][:, 0] = 0.5, 0
    assert (call(policy, changed) - call(policy, obs))[:, 1:].abs().max() > 1e-3


def test_the_mlp_compares_no_positions():
    policy, obs = make(MLPPolicy), observation(1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = {k: v if k == "time" else v[:, order] for k, v in obs.items()}
    torch.testing.assert_close(call(policy, moved), call(policy, obs)[:, order])


def test_hidden_states_are_conditioned_on_mask_and_time_as_in_a_textbook():
    """AdaLN around attention and feed-forward, and at the end, with the condition written out per position."""
    policy, obs = make(DiTHidden), observation(2)
    seen = []
    policy.block.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    logits = call(policy, obs)
    ((x, condition, masked), after) = seen[0]
    assert torch.equal(x, obs["hidden"]) and torch.equal(masked, obs["mask"][..., None] != 0)
    own = condition.gather(1, obs["mask"].long()[..., None].expand(-1, -1, 24))  # (B, L, d)
    shift, scale = policy.final_modulation(own).chunk(2, -1)
    expected = policy.head(policy.final_norm(after) * (1 + scale) + shift).squeeze(-1)
    torch.testing.assert_close(logits, expected)


def parameters(policy):
    return sum(p.numel() for p in policy.parameters())


def block_size(d, ffn):
    return 4 * (d * d + d) + (2 * d * ffn + ffn + d) + 4 * d


@pytest.mark.parametrize(("d", "ffn"), [(128, 512), (64, 96)])
def test_sizes_follow_from_the_layers(d, ffn):
    condition = 2 * (d * d + d) + 2 * d  # time MLP, mask embedding
    adaln = (6 + 2) * (d * d + d)
    hidden = block_size(d, ffn) + condition + adaln + 2 * d + (d + 1)
    assert parameters(DiTHidden(hidden_size=d, ffn=ffn)) == hidden
    w, features = d + 10, d + 10  # the authors' width
    mlp = (features * w + w) + 2 * (w * w + w) + 3 * 2 * w
    upo = block_size(d, ffn) + 2 * d + mlp + (w + 1)
    assert parameters(UPOPolicy(hidden_size=d, ffn=ffn, width=w)) == upo
    assert parameters(MLPPolicy(width=d, top_k=3)) == (5 * d + d) + (d * d + d) + (d + 1)


@pytest.mark.parametrize("family", [DiTConfidence, DiTHidden, UPOPolicy, MLPPolicy])
def test_smart_init_is_slow_nearly_uniform_and_for_any_width(family):
    for width in (48, 384):
        name = "hidden_size" if "hidden" in READS[family] else "width"
        policy = make(family, trained=False, **{name: width})
        logits = call(policy, observation(8, length=32, d=width))
        assert (logits + 2).abs().max() < 1.5 and logits.std() < 0.4
    assert (call(make(family, trained=False, output_bias=0.5), observation(8)) - 0.5).abs().max() < 1.5


@each_family
def test_every_parameter_learns_within_two_steps(family):
    policy, obs = make(family, trained=False), observation(8)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(3):  # zero projections move in the first step, the layers behind them from the second on
        optimizer.zero_grad()
        (call(policy, obs) * torch.randn(8, 9, generator=torch.Generator().manual_seed(1))).sum().backward()
        idle = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        optimizer.step()
    assert not idle


@each_family
@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_candidates_are_the_most_confident_legal_positions(family, candidates):
    free, tied = make(family), make(family, candidates=candidates)
    obs = observation(5, 7)
    logits, kept = call(tied, obs), call(tied, obs) > -1e5
    legal = obs["action_mask"].bool()
    assert torch.equal(kept.sum(-1), legal.sum(-1).clamp_max(candidates)) and not (kept & ~legal).any()
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[kept], call(free, obs)[kept])
    top = obs["confidence"][..., 0]
    least = top.masked_fill(~kept, 2).amin(-1, keepdim=True)
    assert (top <= least)[legal & ~kept].all()  # no legal position left out is more confident
    some = legal.any(-1)
    assert (logits.masked_fill(~legal, -1e9).softmax(-1) * ~kept).sum(-1)[some].max() < 1e-6
    assert tied.in_keys[-1] == "action_mask" and len(set(tied.in_keys)) == len(tied.in_keys)


def test_of_equally_confident_positions_the_leftmost_are_candidates():
    policy = make(MLPPolicy, top_k=1, candidates=2)
    obs = observation(1, length=6, k=1)
    obs["confidence"][0, :, 0] = torch.tensor([0.1, 0.7, 0.7, 0.7, 0.9, 0.2])
    for legal, kept in (("111111", "010010"), ("111101", "011000"), ("000101", "000101"), ("000000", "000000")):
        obs["action_mask"] = torch.tensor([[int(bit) for bit in legal]], dtype=torch.int8)
        assert "".join(str(int(x)) for x in (call(policy, obs) > -1e5)[0]) == kept


@each_family
@pytest.mark.parametrize("candidates", [None, 2])
def test_actor_and_decider_agree(family, candidates):
    policy, obs = make(family, candidates=candidates), observation(6)
    decider, actor = PolicyDecider(policy, ZeroTruncatedBernoulli), make_actor(policy, ZeroTruncatedBernoulli)
    assert len(actor.in_keys) == len(set(actor.in_keys))
    assert set(actor.in_keys) == {*policy.in_keys, "action_mask"}
    noise = torch.rand(6, 9, generator=torch.Generator().manual_seed(2))
    action, log_prob = decider.decide(obs, noise)
    assert torch.equal(decider(TensorDict(obs, [6]), noise), action)
    assert candidates is None or action.sum(-1).max() <= candidates
    batch = TensorDict({**obs, "action": action}, [6])
    torch.testing.assert_close(actor.get_dist(batch).log_prob(action), log_prob, atol=1e-5, rtol=0)
    loss = actor.get_dist(batch).log_prob(action).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_requirements_are_the_settings_of_the_environment():
    needs = {family: make(family).requires for family in SMALL}
    assert needs == {
        DiTConfidence: {"top_k": 2},
        DiTHidden: {"hidden": 1},
        UPOPolicy: {"top_k": 4, "hidden": 1},
        MLPPolicy: {"top_k": 3},
        DiTConfidenceLUP: {"top_k": 2},
        DiTHiddenLUP: {"hidden": 1},
        UPOPublished: {"top_k": 4, "block_input": 1},
    }
    assert make(DiTHidden, candidates=3).requires == {"top_k": 1, "hidden": 1}
    assert PolicyDecider(make(UPOPolicy), BernoulliArgmax).requires == {"top_k": 4, "hidden": 1}


REFUSED = [
    (DiTHidden, "hidden", None, "hidden=True"),
    (UPOPolicy, "hidden", None, "hidden=True"),
    (UPOPolicy, "action_mask", None, "action_mask"),
    (MLPPolicy, "time", None, "time"),
    (DiTHidden, "hidden", torch.zeros(2, 9, 16), "hidden_size=24 .* 16 channels: .*model"),
    (UPOPolicy, "hidden", torch.zeros(2, 9, 48), "hidden_size=24 .* 48 channels: .*model"),
    (UPOPolicy, "confidence", torch.zeros(2, 9, 3), "has 3: .*top_k >= 4"),
    (MLPPolicy, "confidence", torch.zeros(2, 9, 2), "has 2: .*top_k >= 3"),
    (DiTConfidence, "confidence", torch.zeros(2, 9, 1), "has 1: .*top_k >= 2"),
]


@pytest.mark.parametrize(("family", "key", "value", "message"), REFUSED)
def test_an_observation_that_does_not_fit_is_refused_by_name(family, key, value, message):
    obs = observation(2)
    if value is None:
        del obs[key]
    else:
        obs[key] = value
    with pytest.raises(ValueError, match=message):
        PolicyDecider(make(family), BernoulliArgmax)(obs, torch.rand(2, 9))


INVALID = [
    *((family, {"candidates": 0}) for family in SMALL),
    *((family, {"hidden_size": None}) for family in (DiTHidden, UPOPolicy)),
    *((family, {"hidden_size": 20}) for family in (DiTHidden, UPOPolicy)),  # not a multiple of 2 * 3 heads
    *((family, {"heads": 0}) for family in (DiTHidden, UPOPolicy)),
    *((family, {"ffn": 0}) for family in (DiTConfidence, DiTHidden, UPOPolicy)),
    *((family, {"top_k": 0}) for family in (UPOPolicy, MLPPolicy)),
    *((family, {"width": 0}) for family in (UPOPolicy, MLPPolicy)),
    *((family, {"time_period": 0.0}) for family in (DiTHidden, DiTConfidenceLUP, DiTHiddenLUP)),
    *((family, {"num_blocks": 0}) for family in (DiTConfidenceLUP, DiTHiddenLUP)),
    *((family, {"time_embed_dim": 1}) for family in (DiTConfidenceLUP, DiTHiddenLUP)),
    *((family, {"block_length": 0}) for family in (DiTConfidenceLUP, DiTHiddenLUP)),
    *((family, {"full_context": "no"}) for family in (DiTConfidenceLUP, DiTHiddenLUP)),
    (DiTConfidenceLUP, {"dropout": 1.5}),
]


@pytest.mark.parametrize(("family", "settings"), INVALID)
def test_invalid_settings_are_named(family, settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make(family, **settings)


# ---- storage ----


@each_family
def test_a_saved_policy_returns_bit_for_bit(family, tmp_path):
    policy, obs = make(family, candidates=3), observation(4)
    policy.save_pretrained(tmp_path / "new" / "folder")
    loaded = family.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.settings == policy.settings
    assert torch.equal(call(loaded, obs), call(policy, obs))
    card = (tmp_path / "new" / "folder" / "README.md").read_text()
    assert f"{family.__name__}.from_pretrained" in card and "library_name: dllm_gym" in card


@each_family
def test_settings_are_all_arguments_of_the_constructor(family):
    policy = make(family)
    assert set(policy.settings) == set(family.__init__.__kwdefaults__)
    assert family(**policy.settings).settings == policy.settings


def edited(change):
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return spoil


def reweighted(change):
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return spoil


SPOILT = {
    "another class": edited(lambda config: {**config, "policy": "Policy"}),
    "no class": edited(lambda config: {k: v for k, v in config.items() if k != "policy"}),
    "unknown setting": edited(lambda config: {**config, "layers": 2}),
    "missing setting": edited(lambda config: {k: v for k, v in config.items() if k != list(config)[1]}),
    "invalid setting": edited(lambda config: {**config, "candidates": 0}),
    "setting of another type": edited(lambda config: {**config, "candidates": "many"}),
    "not a dictionary": edited(list),
    "missing weight": reweighted(lambda weights: weights.pop("head.weight")),
    "unexpected weight": reweighted(lambda weights: weights.update(more=torch.zeros(1))),
    "mis-shaped weight": reweighted(lambda weights: weights.update({"head.weight": torch.zeros(16, 1)})),
    "truncated config": lambda folder: (folder / "config.json").write_text('{"policy": '),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@each_family
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_folder_is_refused_by_file(family, spoil, tmp_path):
    make(family).save_pretrained(tmp_path)
    SPOILT[spoil](tmp_path)
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        family.from_pretrained(tmp_path)


def test_a_policy_stored_before_candidates_existed_has_none(tmp_path):
    policy = make(DiTConfidence)
    policy.save_pretrained(tmp_path)
    edited(lambda config: {k: v for k, v in config.items() if k != "candidates"})(tmp_path)
    assert DiTConfidence.from_pretrained(tmp_path).settings == policy.settings


@pytest.mark.parametrize("source", ["/no/such/folder", "nobody/no-such-policy", "not an id"])
def test_an_unreadable_source_is_named(source, tmp_path):
    with pytest.raises(ValueError, match=source):
        MLPPolicy.from_pretrained(source, cache_dir=tmp_path, local_files_only=True)


def test_an_unreachable_hub_is_said_to_be_so(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("dllm_gym.deciders.saved.snapshot_download", fail)
    with pytest.raises(ValueError, match="'someone/policy' .*no route to host"):
        MLPPolicy.from_pretrained("someone/policy")


class FakeHub:
    """Stands in for ``HfApi``: repositories are folders."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **settings):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **settings):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"hub/{repo_id}"


@each_family
def test_a_policy_goes_to_the_hub_and_back(family, tmp_path, monkeypatch):
    asked = {}

    def download(repository, **settings):
        asked.update(settings, repository=repository)
        return str(tmp_path / repository)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeHub(tmp_path))
    monkeypatch.setattr("dllm_gym.deciders.saved.snapshot_download", download)
    policy, obs = make(family), observation(4)
    assert policy.push_to_hub("someone/policy", private=True) == "hub/someone/policy"
    names = {path.name for path in (tmp_path / "someone/policy").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    loaded = family.from_pretrained("someone/policy", revision="v2")
    assert asked["revision"] == "v2" and asked["repository"] == "someone/policy"
    assert loaded.settings == policy.settings and torch.equal(call(loaded, obs), call(policy, obs))
    other = next(c for c in SMALL if c is not family)
    with pytest.raises(ValueError, match="does not describe"):
        other.from_pretrained("someone/policy")


def test_loading_takes_no_settings_beside_the_stored_ones(tmp_path):
    make(MLPPolicy).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="width"):
        MLPPolicy.from_pretrained(tmp_path, width=32)


class Narrow(DiTConfidence):
    def __init__(self, *, candidates: int | None = 2):
        super().__init__(width=16, ffn=32, top_k=3, candidates=candidates)


class Gathering(DiTConfidence):
    def __init__(self, *, depth: int = 1, **settings):
        super().__init__(**settings)
        self.depth = depth


class Repeating(MLPPolicy):
    """Hands all of its arguments to the base, as families had to once."""

    def __init__(self, *, width: int = 8, top_k: int = 2, candidates: int | None = None):
        Policy.__init__(self, width=width, top_k=top_k, candidates=candidates)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(top_k + 2, width), torch.nn.GELU())
        self.head = torch.nn.Linear(width, 1)


@pytest.mark.parametrize(
    ("made", "settings", "top_k"),
    [
        (Narrow, {"candidates": 2}, 3),
        (lambda: Gathering(width=16, ffn=32, top_k=2), {"depth": 1, "width": 16, "ffn": 32, "top_k": 2}, 2),
        (Repeating, {"width": 8, "top_k": 2, "candidates": None}, 2),
    ],
    ids=["Narrow", "Gathering", "Repeating"],
)
def test_settings_are_the_arguments_of_the_familys_own_constructor(made, settings, top_k, tmp_path):
    policy = made()
    assert policy.settings == settings and policy.top_k == policy.requires["top_k"] == top_k
    again = type(policy)(**policy.settings)
    again.load_state_dict(policy.state_dict())
    obs = observation(4)
    assert torch.equal(call(again, obs), call(policy, obs))
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(again))):
        assert other.settings == settings and torch.equal(call(other, obs), call(policy, obs))
    if type(policy) is not Gathering:  # what it gathers is not told apart in a file
        policy.save_pretrained(tmp_path)
        assert torch.equal(call(type(policy).from_pretrained(tmp_path), obs), call(policy, obs))


def test_a_wrong_argument_is_named_by_the_constructor():
    with pytest.raises(TypeError, match=r"DiTConfidence.__init__\(\) got an unexpected keyword argument 'widht'"):
        DiTConfidence(widht=3)


def test_the_base_class_is_no_policy():
    class Headless(Policy):
        def __init__(self):
            super().__init__(candidates=None)
            self.head = torch.nn.Linear(3, 1)

    with pytest.raises(NotImplementedError):
        call(Headless(), observation(2))
