"""Loading and predicting: LLaDA's format against an independent forward, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from conftest import llada_fields
from safetensors.torch import load_file, save_file

from agents.rollout import evaluate
from dllm_gym.deciders.rules import TopK
from dllm_gym.models import Sampling, load_dllm
from dllm_gym.models.families.llada import llama_config
from dllm_gym.tasks.arithmetic import Arithmetic


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


def test_the_shallow_checkpoint_works_arithmetic_out_step_by_step():
    task = Arithmetic(min_operations=4)
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=64, model="tiny_shallow", task=task, split="validation")
    slow, all_at_once = (evaluate(envs, TopK(k), range(64)).score.mean() for k in (2, 48))
    assert load_dllm("tiny_shallow").config["n_layers"] == 2 and slow > all_at_once + 0.1 > 0.3


DAMAGES = {  # what is done to a weight -> what the error says
    "missing": "missing keys",
    "unexpected": "unexpected keys",
    "mismatched": "mismatched keys",
    "not finite": "k_proj.weight is not finite",
    "there under Llama's name too": "two weights for model.layers.1.self_attn.k_proj.weight",
    "truncated file": "header",
}


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
    elif what == "not finite":
        weights[name][3, 4] = torch.nan
    elif what == "there under Llama's name too":
        weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros_like(weights[name])
    save_file(weights, path)
    if what == "truncated file":
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("what", [*DAMAGES])
def test_damaged_weights_are_refused(checkpoint, what):
    damage(checkpoint, what)
    with pytest.raises(ValueError, match=f"cannot load the checkpoint in .*{checkpoint.name}: .*{DAMAGES[what]}"):
        load_dllm(checkpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alibi": True}, "alibi=True"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"multi_query_attention": True}, "multi_query_attention=True"),
        ({"n_heads": 3}, "cannot load the checkpoint.*d_model=32 is no multiple of n_heads=3"),
        ({"weight_tying": True}, "has a head of its own that differs"),
        ({"model_type": ["llada"]}, "model_type=\\['llada'\\]"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"embedding_size": 10, "vocab_size": 10}, "mis|10"),
    ],
)
def test_foreign_configs_are_refused(checkpoint, fields, message):
    (checkpoint / "config.json").write_text(json.dumps(llada_fields(**fields)))
    with pytest.raises(ValueError, match=message):
        load_dllm(checkpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({f"{name}_token_id": i}, f"{name}_token_id={i}") for name in ("mask", "pad", "eos") for i in (-1, 20)),
        ({"mask_token_id": True}, "mask_token_id=True"),
        ({"mask_token_id": 1.7}, "mask_token_id=1.7"),
        ({"mask_token_id": [1, 2]}, "mask_token_id=\\[1, 2\\]"),
        ({"eos_token_id": [0, "5"]}, "eos_token_id.*'5'"),
        ({"eos_token_id": [0, 1]}, "mask_token_id=1 is not valid: that token ends text"),
    ],
)
def test_special_ids_outside_the_vocabulary_are_refused(checkpoint, fields, message):
    if fields == {"pad_token_id": 20}:
        message = "Padding_idx"  # the embedding refuses it first
    (checkpoint / "config.json").write_text(json.dumps(llada_fields(**fields)))
    with pytest.raises(ValueError, match=message):
        load_dllm(checkpoint)


def test_what_is_null_in_a_llada_config_is_off(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(llada_fields(clip_qkv=None, multi_query_attention=None)))
    assert load_dllm(checkpoint).mask_id == 1


@pytest.mark.parametrize("field", ["d_model", "rope_theta", "max_sequence_length"])
def test_a_missing_field_is_named(checkpoint, field):
    raw = llada_fields()
    for change in (lambda: raw.update({field: None}), lambda: raw.pop(field)):
        change()
        (checkpoint / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=f"config.json lacks the field '{field}'"):
            load_dllm(checkpoint)


def test_broken_folders_are_refused(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_dllm(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
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
    with pytest.raises(ValueError, match="dtype=\\['float32'\\]"):
        load_dllm("tiny", dtype=["float32"])
    for device in ("warp", "meta", [1]):
        with pytest.raises(ValueError, match=re.escape(f"device={str(device)!r} cannot be used here")):
            load_dllm("tiny", device=device)
    for device_map in ([1], {}, {"": ["cpu"]}, 5):
        with pytest.raises(ValueError, match=re.escape(f"device_map={device_map!r} is not valid")):
            load_dllm("tiny", device_map=device_map)
    with pytest.raises(ValueError, match="mask_token=5"):
        load_dllm("tiny", mask_token=5)


def bf16_logits(checkpoint, tokens: list[int], in_float32: bool) -> torch.Tensor:
    """LLaDA's own arithmetic in bfloat16: norms in float32, queries and keys rotated in float32 (or in bfloat16)."""
    raw = json.loads((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    w = {k.removeprefix("model.transformer."): v.bfloat16() for k, v in weights.items()}
    heads, kv_heads, size, T = raw["n_heads"], raw["n_kv_heads"], raw["d_model"] // raw["n_heads"], len(tokens)
    inverse = 1.0 / raw["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(T).float(), inverse).repeat(1, 2)

    def norm(x, name):
        wide = x.float()
        return w[f"{name}.weight"] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + raw["rms_norm_eps"])).to(
            torch.bfloat16
        )

    def rope(x):  # (1, heads, T, size)
        y = x.float() if in_float32 else x
        half = torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1)
        return (y * angle.cos().to(y) + half * angle.sin().to(y)).to(x)

    linear = torch.nn.functional.linear
    x = w["wte.weight"][tokens][None]
    for i in range(raw["n_layers"]):
        b = f"blocks.{i}."
        h = norm(x, b + "attn_norm")
        q, k, v = (
            linear(h, w[f"{b}{n}_proj.weight"]).view(1, T, count, size).transpose(1, 2)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = rope(k).repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
        out = torch.nn.functional.scaled_dot_product_attention(rope(q), k, v)
        x = x + linear(out.transpose(1, 2).flatten(2), w[b + "attn_out.weight"])
        h = norm(x, b + "ff_norm")
        gate = torch.nn.functional.silu(linear(h, w[b + "ff_proj.weight"])) * linear(h, w[b + "up_proj.weight"])
        x = x + linear(gate, w[b + "ff_out.weight"])
    return linear(norm(x, "ln_f"), w["ff_out.weight"])[0].float()


def test_bfloat16_llada_rotates_in_float32_when_asked(checkpoint):
    tokens = [9, 3, 4, 1, 1, 12, 15, 1, 7, 1, 18, 2]
    row = torch.tensor([tokens])
    confidences = {}
    for in_float32 in (True, False):
        dllm = load_dllm(checkpoint, dtype="bfloat16", rope_float32=in_float32)
        prediction = dllm.predict(row, None, row == 1, Sampling(top_k=19))
        logits = bf16_logits(checkpoint, tokens, in_float32)
        logits[:, 1] = -torch.inf
        expected = logits.softmax(-1)[row[0] == 1].topk(19).values
        torch.testing.assert_close(prediction.confidence, expected, atol=1e-6, rtol=1e-5)
        padded = torch.nn.functional.pad(row, (3, 0))
        again = dllm.predict(padded, padded.cumsum(1) > 0, padded == 1, Sampling(top_k=19))
        torch.testing.assert_close(again.confidence, expected, atol=0.02, rtol=0.2)  # its mask adds in another order
        confidences[in_float32] = prediction.confidence
    assert (confidences[True] - confidences[False]).abs().max() > 1e-4  # the two are told apart


LLADA_CHAT = (  # the layout of LLaDA-8B-Instruct's template
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def test_llada_begins_a_prompt_with_one_bos_and_ends_at_the_turn(checkpoint):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<|endoftext|>", "<|mdm_mask|>", "<|startoftext|>", "<|eot_id|>", "<|start_header_id|>"]
    names += ["<|end_header_id|>", *"userastnhi1+\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A", None, [("<|startoftext|>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": names[:6]})
    fast.chat_template = LLADA_CHAT
    fast.save_pretrained(checkpoint)
    dllm = load_dllm(checkpoint)
    tokens = dllm.encode("1+1")
    assert tokens[0] == 2 and tokens.count(2) == 1 and tokens.count(3) == 1
    assert dllm.stop_ids == {0, 3}
    one = vocabulary["1"]
    assert dllm.decode([one, 3, one]) == dllm.decode([one, 0, one]) == "1"


def test_weight_tying_and_defaults():
    raw = llada_fields(weight_tying=True)
    del raw["n_kv_heads"], raw["embedding_size"]
    config = llama_config(raw)
    assert (config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (4, 20, True)


def test_loading_is_silent():
    code = "from dllm_gym.models import load_dllm; load_dllm('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_a_prompt_that_the_vocabulary_cannot_write_is_named(tiny):
    with pytest.raises(ValueError, match="no tokens for the prompt 'What"):
        tiny.encode("What is 2 + 2?")


def test_ids_without_text_are_never_proposed_and_have_no_probability(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {"vocab_size": 32, "embedding_size": 32}
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = load_file(checkpoint / "model.safetensors")
    for name, value in weights.items():
        if value.shape[0] == 20:
            weights[name] = torch.cat([value, 9 * value[:12]])  # the nameless ones look best
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    dllm = load_dllm(checkpoint)
    assert dllm.forbidden_ids == (1, *range(20, 32))
    tokens = torch.full((3, 9), dllm.mask_id)
    for sampling in (Sampling(log_prob=True, top_k=32), Sampling(log_prob=True, temperature=50.0)):
        said = dllm.predict(tokens, None, tokens == dllm.mask_id, sampling, torch.arange(3))
        assert said.token.max() < 20 and (said.log_prob[:, 20:] == -torch.inf).all()
        torch.testing.assert_close(said.log_prob.exp().sum(-1), torch.ones(27))
