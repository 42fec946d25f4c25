"""The published networks: every number of them against a plain forward under the authors' names, and their files."""

from __future__ import annotations

import pytest
import torch
from published import as_doubles, condition_of, condition_sizes, confidence_checkpoint, plain_forward, random_weights
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from dllm_gym.deciders.lup import DiTConfidenceLUP, DiTHiddenLUP
from dllm_gym.models.base import own_block
from dllm_gym.models.families.llada import NAMES as LLADA

OWN = {"heads": 4, "kv_heads": 2, "ffn": 24, "rope_theta": 500.0, "norm_eps": 1e-5}
SIZES = [
    {},
    {"width": 24, "ffn": 40, "heads": 3, "top_k": 2, "num_blocks": 3, "time_embed_dim": 10},
    {"width": 16, "ffn": 20, "heads": 4, "num_blocks": 2, "time_embed_dim": 7, "time_period": 50.0},
]


def observation(rows=6, length=12, k=2, d=16, block=None):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    if block is None:
        legal = mask
    else:
        mask[:, block - 1] = mask[:, -1] = True
        mask[::2, :block] = False  # the first block of every other row is done
        first = (
            torch.arange(length) // block == torch.where(mask, torch.arange(length) // block, length).amin(1)[:, None]
        )
        legal = mask & first
    return {
        "confidence": torch.rand(rows, length, k, generator=generator).sort(-1, descending=True).values,
        "mask": mask.to(torch.int8),
        "action_mask": legal.to(torch.int8),
        "time": torch.rand(rows, 1, generator=generator),
        "hidden": 3 * torch.randn(rows, length, d, generator=generator),
    }


def call(policy, obs):
    return policy(*policy.read(obs))


def hidden_checkpoint(d=16, num_blocks=1, time_embed_dim=128):
    """``dit_hidden`` with blocks as ``OWN``."""
    sizes = condition_sizes(d, time_embed_dim)
    for i in range(num_blocks + 1):
        sizes |= {f"norms.{i}": (d, None), f"ada_linears.{i}": (2 * d, d)}
    weights, generator = random_weights(sizes), torch.Generator().manual_seed(1)
    keys = d // OWN["heads"] * OWN["kv_heads"]
    block = {"q_proj": (d, d), "k_proj": (keys, d), "v_proj": (keys, d), "attn_out": (d, d), "ff_proj": (OWN["ffn"], d)}
    block |= {"up_proj": (OWN["ffn"], d), "ff_out": (d, OWN["ffn"]), "attn_norm": (d,), "ff_norm": (d,)}
    for i in range(num_blocks):
        for name, shape in block.items():
            value = float(len(shape) == 1) + 0.3 * torch.randn(shape, generator=generator)
            weights[f"base_policy.transformer_blocks.{i}.{name}.weight"] = value
    return weights


def stored(tmp_path, weights, name="model.safetensors"):
    tmp_path.mkdir(exist_ok=True)
    save_file(weights, tmp_path / name)
    return tmp_path / name


def period(settings):
    return {name: value for name, value in settings.items() if name == "time_period"}


@pytest.mark.parametrize("settings", SIZES, ids=str)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_checkpoint_gives_the_logits_of_a_plain_forward(settings, prefix, tmp_path):
    weights, obs = confidence_checkpoint(**settings), observation()
    file = stored(tmp_path / "checkpoint-1000", {prefix + name: value for name, value in weights.items()})
    expected = plain_forward(weights, obs, **period(settings))
    assert expected.std() > 0.1
    for path in (file, str(file.parent)):
        policy = DiTConfidenceLUP.from_lup(path, **period(settings))
        assert policy.settings == DiTConfidenceLUP(**settings).settings
        torch.testing.assert_close(call(policy, obs).double(), expected, atol=1e-5, rtol=1e-5)
    more = {**weights, "base_policy.time_mlp.0.weight": weights["base_policy.time_mlp.0.weight"].bfloat16()}
    assert DiTConfidenceLUP.from_lup(stored(tmp_path, more)).head.weight.dtype == torch.float32


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_hidden_states_go_through_the_dllms_own_kind_of_block(num_blocks, tmp_path):
    """The blocks are transformers' Llama layers, looking both ways."""
    weights, obs = hidden_checkpoint(num_blocks=num_blocks), observation()
    policy = DiTHiddenLUP.from_lup(stored(tmp_path, weights), own_block=OWN)
    assert policy.settings == DiTHiddenLUP(hidden_size=16, own_block=OWN, num_blocks=num_blocks).settings
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=OWN["ffn"],
        num_attention_heads=OWN["heads"],
        num_key_value_heads=OWN["kv_heads"],
        rms_norm_eps=OWN["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": OWN["rope_theta"]},
    )
    config._attn_implementation, config.is_causal = "eager", False
    turns = LlamaRotaryEmbedding(config)(obs["hidden"], torch.arange(12)[None])
    w, linear, norm = as_doubles(weights)
    condition, x = condition_of(w, linear, obs, 1.0), obs["hidden"].double()
    for i in range(num_blocks + 1):
        scale, shift = linear(condition, f"ada_linears.{i}").chunk(2, -1)
        x = norm(x, f"norms.{i}") * (1 + scale) + shift
        if i < num_blocks:
            layer = LlamaDecoderLayer(config, i).double()
            names = {name.removeprefix("model.transformer."): llama for name, llama in LLADA.items()}
            own = {
                llama.removeprefix("model.layers.{}.") + ".weight": w[f"transformer_{name.format(i)}.weight"]
                for name, llama in names.items()
                if name.startswith("blocks")
            }
            layer.load_state_dict(own)
            x = layer(x, position_embeddings=tuple(turn.double() for turn in turns))
    expected = linear(x, "output_proj").squeeze(-1)
    torch.testing.assert_close(call(policy, obs).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [DiTConfidenceLUP, DiTHiddenLUP])
def test_without_full_context_a_policy_sees_its_active_block_alone(family):
    """As if the block were the whole completion; what lies outside changes nothing."""
    torch.manual_seed(0)
    settings = {"output_bias": None, **({} if family is DiTConfidenceLUP else {"hidden_size": 16, "own_block": OWN})}
    whole, blind = family(**settings), family(**settings, full_context=False, block_length=4)
    blind.load_state_dict(whole.state_dict())
    obs = observation(block=4)
    legal, logits = obs["action_mask"] != 0, call(blind, obs)
    for row in range(6):
        first = int(legal[row].int().argmax()) // 4 * 4
        own = {name: x[row] if name == "time" else x[row, first : first + 4] for name, x in obs.items()}
        torch.testing.assert_close(logits[row, first : first + 4], call(whole, own))
    assert (call(whole, obs) - logits)[legal].abs().max() > 1e-3
    assert torch.equal(call(family(**settings, full_context=False), obs).isfinite(), torch.ones_like(legal))
    with pytest.raises(ValueError, match="block_length=3: legal positions lie outside"):
        call(family(**settings, full_context=False, block_length=3), obs)
    empty = {**obs, "action_mask": torch.zeros_like(obs["action_mask"])}
    assert call(blind, empty).isfinite().all()


def test_it_starts_as_an_ordinary_random_block_near_the_bias():
    """Published over seeds: mean logit -2.02, spread .54; time and mask do not count yet, confidences do."""
    obs = observation(k=1)
    starts = []
    for seed in range(40):
        torch.manual_seed(seed)
        policy = DiTConfidenceLUP()
        starts.append(call(policy, obs).detach())
        later = call(policy, {**obs, "time": 1 - obs["time"], "mask": 1 - obs["mask"]})
        assert torch.equal(later.detach(), starts[-1])
    means = torch.stack(starts).mean((1, 2))
    assert means.mean() == pytest.approx(-2, abs=0.25) and 0.3 < means.std() < 0.8
    assert torch.stack(starts).std(2).mean() > 0.01
    free = DiTConfidenceLUP(output_bias=None)
    assert free.blocks[0].modulation.weight.abs().sum() > 0 and free.head.bias.item() > -0.1


def test_dropout_is_for_training_alone():
    obs = observation(k=1)
    torch.manual_seed(0)
    policy = DiTConfidenceLUP(dropout=0.5)
    assert not torch.equal(call(policy, obs), call(policy, obs))
    policy.eval()
    assert torch.equal(call(policy, obs), call(policy, obs))


def without(name):
    return lambda weights: weights.pop(f"base_policy.{name}")


SPOILT = {
    "missing weight": (without("final_norm.bias"), "final_norm.bias"),
    "no head": (without("output_proj.weight"), "head.weight"),
    "unknown part": (lambda w: w.update({"base_policy.value_head.weight": torch.zeros(1)}), "value_head"),
    "other shape": (lambda w: w.update({"base_policy.output_proj.bias": torch.zeros(3)}), "head.bias"),
    "other positions": (lambda w: w["base_policy.transformer_blocks.0.inv_freq"].mul_(2), "inv_freq"),
    "nothing published": (lambda w: [w.pop(name) for name in list(w)] and w.update(a=torch.zeros(1)), "base_policy"),
    "two policies": (lambda w: w.update({"old.base_policy.output_proj.bias": torch.zeros(1)}), "base_policy"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_holds_something_else_is_refused(spoil, tmp_path):
    weights = confidence_checkpoint(width=16, ffn=20)
    change, named = SPOILT[spoil]
    change(weights)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{named}"):
        DiTConfidenceLUP.from_lup(stored(tmp_path, weights))


def test_a_file_that_cannot_be_read_or_is_of_the_other_network_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("no weights")
    for path in (tmp_path, tmp_path / "nowhere.safetensors"):
        with pytest.raises(ValueError, match="safetensors does not hold the weights of a published DiTConfidenceLUP"):
            DiTConfidenceLUP.from_lup(path)
    with pytest.raises(ValueError, match="published DiTConfidenceLUP"):
        DiTConfidenceLUP.from_lup(stored(tmp_path, hidden_checkpoint(), "hidden.safetensors"))
    with pytest.raises(ValueError, match="own_block=None"):
        DiTHiddenLUP.from_lup(tmp_path / "hidden.safetensors")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (None, "own_block=None"),
        ({**OWN, "bias": 1}, "own_block="),
        ({**OWN, "kv_heads": 3}, "kv_heads=3"),
        ({**OWN, "ffn": 0}, "own_block.ffn=0"),
        ({**OWN, "heads": 3}, "heads=3"),
        ({**OWN, "norm_eps": 0}, "norm_eps=0"),
    ],
)
def test_a_wrong_block_is_named(own, message):
    with pytest.raises(ValueError, match=message):
        DiTHiddenLUP(hidden_size=16, own_block=own)


def test_the_block_of_a_dllm_is_that_of_its_backbone(tiny):
    own = own_block(tiny)
    assert own == {"heads": 4, "kv_heads": 4, "ffn": 384, "rope_theta": 10_000.0, "norm_eps": 1e-5}
    policy = DiTHiddenLUP(hidden_size=tiny.hidden_size, own_block=own)
    layer = tiny.backbone.layers[0]
    assert sum(p.numel() for p in policy.blocks[0].parameters()) == sum(p.numel() for p in layer.parameters())
