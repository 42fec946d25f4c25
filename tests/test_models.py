"""Loading and predicting: LLaDA's format against an independent forward, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import llada_fields
from safetensors.torch import load_file, save_file

from dllm_gym.models import Sampling, load_dllm
from dllm_gym.models.llada import llama_config


def llada_forward(weights: dict, raw: dict, tokens: list[int]) -> torch.Tensor:
    """LLaDA in plain float64 torch, written from the published architecture: logits [T, V] of one row."""
    w = {k.removeprefix("model.transformer."): v.double() for k, v in weights.items()}
    heads, kv_heads, width = raw["n_heads"], raw["n_kv_heads"], raw["d_model"]
    size, T = width // heads, len(tokens)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def rope(x):  # (heads, T, size)
        inverse = raw["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(T, dtype=torch.float64), inverse)
        sin, cos = torch.cat([angle, angle], -1).sin(), torch.cat([angle, angle], -1).cos()
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = w["wte.weight"][tokens]
    for i in range(raw["n_layers"]):
        b = f"blocks.{i}."
        h = norm(x, b + "attn_norm")
        q, k, v = (
            (h @ w[f"{b}{n}_proj.weight"].T).view(T, count, size).transpose(0, 1)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        attention = (rope(q) @ rope(k).transpose(1, 2) / math.sqrt(size)).softmax(-1)  # every position sees every other
        x = x + (attention @ v).transpose(0, 1).reshape(T, width) @ w[b + "attn_out.weight"].T
        h = norm(x, b + "ff_norm")
        gate, up = h @ w[b + "ff_proj.weight"].T, h @ w[b + "up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w[b + "ff_out.weight"].T
    return norm(x, "ln_f") @ w["ff_out.weight"].T


def probabilities(checkpoint, tokens: list[int]) -> torch.Tensor:
    raw = json.loads((checkpoint / "config.json").read_text())
    logits = llada_forward(load_file(checkpoint / "model.safetensors"), raw, tokens)
    logits[:, raw["mask_token_id"]] = -torch.inf
    return logits.softmax(-1)


def test_llada_checkpoint_gives_the_published_probabilities(checkpoint):
    dllm = load_dllm(checkpoint)
    prompts = [[9, 3, 4, 12, 15], [17], [2, 5, 5, 8]]
    width = 5 + 6
    tokens = torch.full((3, width), dllm.pad_id)
    attend = torch.zeros(3, width, dtype=torch.bool)
    rows = torch.zeros(3, width, dtype=torch.bool)
    completion = [1, 11, 1, 1, 7, 1]
    for i, prompt in enumerate(prompts):
        tokens[i, width - 6 - len(prompt) :] = torch.tensor(prompt + completion)
        attend[i, width - 6 - len(prompt) :] = True
        rows[i, -6:] = torch.tensor(completion) == dllm.mask_id
    prediction = dllm.predict(tokens, attend, rows, Sampling(top_k=3))
    expected = torch.cat(
        [probabilities(checkpoint, p + completion)[-6:][torch.tensor(completion) == dllm.mask_id] for p in prompts]
    )
    top = expected.topk(3)
    torch.testing.assert_close(prediction.confidence.double(), top.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(prediction.token, top.indices[:, 0])
    assert (top.values[:, 0] - top.values[:, 1]).min() > 1e-4  # no ties: the tokens are a real check


def test_causal_attention_would_be_noticed(checkpoint):
    dllm = load_dllm(checkpoint)
    tokens = torch.tensor([[9, 3, 4, 1, 1, 12, 15]])
    two_way = dllm.predict(tokens, None, tokens == 1).confidence
    dllm.backbone.config.is_causal = True
    causal = dllm.predict(tokens, None, tokens == 1).confidence
    dllm.backbone.config.is_causal = False
    assert (two_way - causal).abs().max() > 1e-2


def test_temperature_samples_the_tempered_distribution(checkpoint):
    dllm = load_dllm(checkpoint)
    n, temperature = 4000, 0.7
    tokens = torch.tensor([[9, 3, 4, 1, 12, 15]]).repeat(n, 1)
    prediction = dllm.predict(tokens, None, tokens == 1, Sampling(20, temperature), key=torch.arange(n))
    p = probabilities(checkpoint, tokens[0].tolist())[3]
    expected = (p.log() / temperature).softmax(-1)
    frequency = prediction.token.bincount(minlength=20) / n
    assert (frequency - expected).abs().max() < 4 * 0.5 / math.sqrt(n)
    torch.testing.assert_close(prediction.confidence[0].double(), p.sort(descending=True).values, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="temperature=0.7"):
        dllm.predict(tokens, None, tokens == 1, Sampling(1, temperature))


def test_shipped_checkpoint_is_frozen_small_and_shared(tiny):
    assert load_dllm("tiny") is tiny and load_dllm(tiny) is tiny
    assert not any(p.requires_grad for p in tiny.backbone.parameters())
    assert tiny.decode(tiny.encode("12.4\n3+5=;#") + [tiny.eos_id] + tiny.encode("9")) == "12.4\n3+5=;#"
    assert tiny.decode([tiny.mask_id, *tiny.encode("7")]) == "7"


def damage(folder, what):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.transformer.blocks.1.k_proj.weight"
    if what == "missing":
        del weights[name]
    elif what == "unexpected":
        weights["model.transformer.blocks.7.k_proj.weight"] = weights[name].clone()
    elif what == "mismatched":
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path)
    if what == "truncated file":
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("what", ["missing", "unexpected", "mismatched", "truncated file"])
def test_damaged_weights_are_refused(checkpoint, what):
    damage(checkpoint, what)
    with pytest.raises(ValueError, match=f"cannot load the checkpoint in .*{checkpoint.name}"):
        load_dllm(checkpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alibi": True}, "alibi=True"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"embedding_size": 10, "vocab_size": 10}, "mis|10"),
    ],
)
def test_foreign_configs_are_refused(checkpoint, fields, message):
    (checkpoint / "config.json").write_text(json.dumps(llada_fields(**fields)))
    with pytest.raises(ValueError, match=message):
        load_dllm(checkpoint)


@pytest.mark.parametrize("field", ["d_model", "mask_token_id", "eos_token_id"])
def test_a_missing_field_is_named(checkpoint, field):
    raw = llada_fields()
    del raw[field]
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=field):
        load_dllm(checkpoint)


def test_broken_folders_are_refused(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_dllm(checkpoint)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        load_dllm(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(llada_fields()))
    with pytest.raises(ValueError, match="holds no weights"):
        load_dllm(checkpoint)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="model='tyni'"):
        load_dllm("tyni")
    with pytest.raises(ValueError, match="dtype='float8'"):
        load_dllm("tiny", dtype="float8")
    with pytest.raises(ValueError, match="device='warp'"):
        load_dllm("tiny", device="warp")


def test_weight_tying_and_defaults():
    raw = llada_fields(weight_tying=True)
    del raw["n_kv_heads"], raw["embedding_size"]
    config = llama_config(raw)
    assert (config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (4, 20, True)


def test_loading_is_silent():
    code = "from dllm_gym.models import load_dllm; load_dllm('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
