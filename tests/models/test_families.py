"""Every family against a forward written here from its published architecture, through ``load_dllm(folder)`` only.

A tiny checkpoint is written with the family's names of weights, config fields and tokenizer files; what the dLLM then
says, alone and left-padded in a batch, must be what plain float64 torch says.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu
from transformers import PreTrainedTokenizerFast

from dllm_gym.models import DLLM, Sampling, load_dllm, register
from dllm_gym.models import load as loading
from dllm_gym.models.checkpoint import Settings
from dllm_gym.models.spelling import Spelling, in_template
from dllm_gym.prompt import Chat

WORDS = list("abcdefghijklmnopqrstuvwxyz0123456789+=? \n.")
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------- plain torch


def rope(x: Tensor, theta: float, dims: int | None = None) -> Tensor:
    """Rotate the first ``dims`` of x (heads, T, size) by its position."""
    dims = dims or x.shape[-1]
    turned, kept = x[..., :dims], x[..., dims:]
    inverse = theta ** -(torch.arange(0, dims, 2, dtype=x.dtype) / dims)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), inverse).repeat(1, 2)
    half = torch.cat([-turned[..., dims // 2 :], turned[..., : dims // 2]], -1)
    return torch.cat([turned * angle.cos() + half * angle.sin(), kept], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """(heads, T, size) each, key heads shared by groups of query heads -> (T, heads * size)."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    score = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
    return (score.softmax(-1) @ v).transpose(0, 1).flatten(1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def everything(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool)


def qwen_forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
    """Qwen2 (bias on q, k, v) and Qwen3 (RMS norm of every head's q and k), logits [T, V]."""
    T, eps = len(tokens), raw["rms_norm_eps"]
    allowed = everything(T) if allowed is None else allowed
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(raw["num_hidden_layers"]):
        b = f"model.layers.{i}."
        h = rms(x, w[b + "input_layernorm.weight"], eps)
        heads = {}
        for n, count in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            out = h @ w[f"{b}self_attn.{n}_proj.weight"].T + w.get(f"{b}self_attn.{n}_proj.bias", 0)
            heads[n] = out.view(T, raw[count], -1).transpose(0, 1)
            if f"{b}self_attn.{n}_norm.weight" in w:
                heads[n] = rms(heads[n], w[f"{b}self_attn.{n}_norm.weight"], eps)
        q, k = (rope(heads[n], raw["rope_theta"]) for n in "qk")
        x = x + attend(q, k, heads["v"], allowed) @ w[b + "self_attn.o_proj.weight"].T
        h = rms(x, w[b + "post_attention_layernorm.weight"], eps)
        gate, up = h @ w[b + "mlp.gate_proj.weight"].T, h @ w[b + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[b + "mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def dream_forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
    """Qwen2, then a shift: the logits of position j are those after token j - 1; the first keeps its own."""
    logits = qwen_forward(w, raw, tokens, allowed)
    return torch.cat([logits[:1], logits[:-1]])


def bert_forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
    """BERT: learned positions, layer norm after every block, a transform before the vocabulary."""
    T, d, eps = len(tokens), raw["hidden_size"], raw["layer_norm_eps"]
    allowed = everything(T) if allowed is None else allowed

    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        return layer_norm(x, (d,), w[name + ".LayerNorm.gamma"], w[name + ".LayerNorm.beta"], eps)

    p = "bert.embeddings"
    x = w[f"{p}.word_embeddings.weight"][tokens] + w[f"{p}.position_embeddings.weight"][:T]
    x = norm(x + w[f"{p}.token_type_embeddings.weight"][0], p)
    for i in range(raw["num_hidden_layers"]):
        b = f"bert.encoder.layer.{i}."
        q, k, v = (
            dense(x, f"{b}attention.self.{n}").view(T, raw["num_attention_heads"], -1).transpose(0, 1)
            for n in ("query", "key", "value")
        )
        x = norm(x + dense(attend(q, k, v, allowed), b + "attention.output.dense"), b + "attention.output")
        x = norm(x + dense(gelu(dense(x, b + "intermediate.dense")), b + "output.dense"), b + "output")
    x = norm(gelu(dense(x, "cls.predictions.transform.dense")), "cls.predictions.transform")
    return x @ w[f"{p}.word_embeddings.weight"].T + w["cls.predictions.bias"]


def modernbert_forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
    """ModernBERT (arXiv 2412.13663): pre-norm, gated GELU, rope; every n-th layer is global, the others local."""
    T, d, eps = len(tokens), raw["hidden_size"], raw["norm_eps"]
    allowed = everything(T) if allowed is None else allowed
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()

    def norm(x, name):
        return layer_norm(x, (d,), w[name + ".weight"], eps=eps)

    x = norm(w["model.embeddings.tok_embeddings.weight"][tokens], "model.embeddings.norm")
    for i in range(raw["num_hidden_layers"]):
        b, whole = f"model.layers.{i}.", i % raw["global_attn_every_n_layers"] == 0
        h = x if i == 0 else norm(x, b + "attn_norm")
        qkv = (h @ w[b + "attn.Wqkv.weight"].T).view(T, 3, raw["num_attention_heads"], -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        theta = raw["global_rope_theta" if whole else "local_rope_theta"]
        near = allowed if whole else allowed & (distance <= raw["local_attention"] // 2)
        x = x + attend(rope(q, theta), rope(k, theta), v, near) @ w[b + "attn.Wo.weight"].T
        inner, gate = (norm(x, b + "mlp_norm") @ w[b + "mlp.Wi.weight"].T).chunk(2, -1)
        x = x + (gelu(inner) * gate) @ w[b + "mlp.Wo.weight"].T
    x = norm(gelu(norm(x, "model.final_norm") @ w["head.dense.weight"].T), "head.norm")
    return x @ w["model.embeddings.tok_embeddings.weight"].T + w["decoder.bias"]


def llada2_forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
    """LLaDA2: fused q, k, v with a norm per head, half of each head rotated, experts chosen group by group."""
    T, eps, size = len(tokens), raw["rms_norm_eps"], raw["head_dim"]
    block = torch.arange(T) // 32
    allowed = block[:, None] >= block if allowed is None else allowed
    counts = [raw["num_attention_heads"], raw["num_key_value_heads"], raw["num_key_value_heads"]]

    def mlp(x, name):
        gate, up = x @ w[name + ".gate_proj.weight"].T, x @ w[name + ".up_proj.weight"].T
        return (silu(gate) * up) @ w[name + ".down_proj.weight"].T

    def experts(x, name):  # one token
        score = (x @ w[name + ".gate.weight"].T).sigmoid()
        ranked = (score + w[name + ".gate.expert_bias"]).view(raw["n_group"], -1)
        groups = ranked.topk(2).values.sum(-1).topk(raw["topk_group"]).indices
        open_groups = torch.full_like(ranked, -torch.inf)
        open_groups[groups] = ranked[groups]
        chosen = open_groups.flatten().topk(raw["num_experts_per_tok"]).indices
        share = raw["routed_scaling_factor"] * score[chosen] / score[chosen].sum()
        routed = sum(share[j] * mlp(x, f"{name}.experts.{chosen[j]}") for j in range(len(chosen)))
        return routed + mlp(x, name + ".shared_experts")

    x = w["model.word_embeddings.weight"][tokens]
    for i in range(raw["num_hidden_layers"]):
        b = f"model.layers.{i}."
        h = rms(x, w[b + "input_layernorm.weight"], eps) @ w[b + "attention.query_key_value.weight"].T
        q, k, v = h.view(T, sum(counts), size).transpose(0, 1).split(counts)
        q = rope(rms(q, w[b + "attention.query_layernorm.weight"], eps), raw["rope_theta"], size // 2)
        k = rope(rms(k, w[b + "attention.key_layernorm.weight"], eps), raw["rope_theta"], size // 2)
        x = x + attend(q, k, v, allowed) @ w[b + "attention.dense.weight"].T
        h = rms(x, w[b + "post_attention_layernorm.weight"], eps)
        dense = i < raw["first_k_dense_replace"]
        x = x + (mlp(h, b + "mlp") if dense else torch.stack([experts(token, b + "mlp") for token in h]))
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


# ---------------------------------------------------------------------------------------------------- checkpoints


def write(folder: Path, raw: dict, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    """config.json and random weights: norms near 1, the rest large enough that attention matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3
        + (1.0 if len(shape) == 1 and not name.endswith(("bias", "beta")) else 0.0)
        for name, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def char_tokenizer(folder: Path, specials: list[str], **config) -> None:
    """tokenizer.json with one token per character, and a tokenizer_config.json."""
    vocabulary = {token: i for i, token in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_tokenizer(folder: Path, specials: list[str], **config) -> None:
    """vocab.json and merges.txt without a tokenizer.json, as Dream has it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = {str(len(letters) + i): {"content": token, "special": True} for i, token in enumerate(specials)}
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, **config}))


QWEN_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": None,
    "rope_scaling": None,
}


def qwen_shapes(raw: dict, head: int, norms: bool) -> dict[str, tuple[int, ...]]:
    d, m, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, d)
    for i in range(raw["num_hidden_layers"]):
        b = f"model.layers.{i}."
        shapes |= {b + "input_layernorm.weight": (d,), b + "post_attention_layernorm.weight": (d,)}
        shapes |= {f"{b}mlp.{n}_proj.weight": (m, d) for n in ("gate", "up")} | {b + "mlp.down_proj.weight": (d, m)}
        for n, count in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            shapes[f"{b}self_attn.{n}_proj.weight"] = (raw[count] * head, d)
            if not norms:
                shapes[f"{b}self_attn.{n}_proj.bias"] = (raw[count] * head,)
        shapes[b + "self_attn.o_proj.weight"] = (d, raw["num_attention_heads"] * head)
        if norms:
            shapes |= {f"{b}self_attn.{n}_norm.weight": (head,) for n in "qk"}
    return shapes


def dream(folder: Path, **changes) -> Path:
    """Dream's files: remote code named everywhere, byte-level BPE in two files, ids of its own in the config."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    ids = {"mask_token_id": 260, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": 256}
    remote = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    raw = {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": remote, "vocab_size": 264}
    raw |= {"tie_word_embeddings": False, "use_mrope": False, **QWEN_SIZES, **ids, **changes}
    write(folder, raw, qwen_shapes(raw, 8, norms=False))
    byte_tokenizer(
        folder,
        specials,
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        bos_token="<|beginoftext|>",
        chat_template=QWEN_CHAT,
    )
    for module in ("configuration_dream", "modeling_dream", "tokenization_dream"):
        (folder / f"{module}.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def qwen(folder: Path, kind: str, mask_token: str | None = "<|mask|>", **changes) -> Path:
    """A Qwen adapted by dLLM's A2D: its own model_type, no mask id in the config, tied embeddings for Qwen3."""
    raw = {"model_type": f"a2d-{kind}", "architectures": ["A2DQwenLMHeadModel"], "vocab_size": 50, "eos_token_id": 2}
    raw |= {"auto_map": {"AutoConfig": "modeling_qwen.A2DConfig"}, "tie_word_embeddings": kind == "qwen3"}
    raw |= {"head_dim": 16} if kind == "qwen3" else {}
    raw |= {**QWEN_SIZES, **changes}
    write(folder, raw, qwen_shapes(raw, raw.get("head_dim", 8), norms=kind == "qwen3"))
    named = {} if mask_token is None else {"mask_token": mask_token}
    char_tokenizer(
        folder, QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN_CHAT, **named
    )
    return folder


BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_NAMES = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def bert(folder: Path, **changes) -> Path:
    """BERT as it was pre-trained: gamma and beta, a pooler, a next-sentence head, no word of diffusion."""
    raw = {"model_type": "bert", "architectures": ["BertForPreTraining"], "vocab_size": 50, "pad_token_id": 0}
    raw |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    raw |= {"max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    raw |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **changes}
    d, m, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]

    def norm(name):
        return {f"{name}.LayerNorm.gamma": (d,), f"{name}.LayerNorm.beta": (d,)}

    def dense(name, out=d, into=d):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    p = "bert.embeddings"
    shapes = {f"{p}.word_embeddings.weight": (V, d), f"{p}.token_type_embeddings.weight": (2, d), **norm(p)}
    shapes |= {f"{p}.position_embeddings.weight": (raw["max_position_embeddings"], d), "cls.predictions.bias": (V,)}
    for i in range(raw["num_hidden_layers"]):
        b = f"bert.encoder.layer.{i}."
        for n in ("query", "key", "value"):
            shapes |= dense(f"{b}attention.self.{n}")
        shapes |= dense(b + "attention.output.dense") | norm(b + "attention.output")
        shapes |= dense(b + "intermediate.dense", m, d) | dense(b + "output.dense", d, m) | norm(b + "output")
    shapes |= dense("cls.predictions.transform.dense") | norm("cls.predictions.transform")
    shapes |= dense("bert.pooler.dense") | dense("cls.seq_relationship", 2, d)
    write(folder, raw, shapes)
    char_tokenizer(folder, BERT_SPECIALS, tokenizer_class="BertTokenizer", **BERT_NAMES)
    return folder


def modernbert(folder: Path, **changes) -> Path:
    raw = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "vocab_size": 50}
    raw |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40}
    raw |= {"max_position_embeddings": 64, "norm_eps": 1e-5, "norm_bias": False, "hidden_activation": "gelu"}
    raw |= {"global_attn_every_n_layers": 3, "local_attention": 4, "attention_bias": False, "mlp_bias": False}
    raw |= {"global_rope_theta": 160000.0, "local_rope_theta": 100.0, "classifier_activation": "gelu"}
    raw |= {
        "classifier_bias": False,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "eos_token_id": 3,
        **changes,
    }
    d, m, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    shapes = {"model.embeddings.tok_embeddings.weight": (V, d), "model.embeddings.norm.weight": (d,)}
    for i in range(raw["num_hidden_layers"]):
        b = f"model.layers.{i}."
        shapes |= {b + "attn.Wqkv.weight": (3 * d, d), b + "attn.Wo.weight": (d, d), b + "mlp_norm.weight": (d,)}
        shapes |= {b + "mlp.Wi.weight": (2 * m, d), b + "mlp.Wo.weight": (d, m)}
        shapes |= {b + "attn_norm.weight": (d,)} if i else {}
    shapes |= {"model.final_norm.weight": (d,), "head.dense.weight": (d, d), "head.norm.weight": (d,)}
    shapes |= {"decoder.bias": (V,)}
    write(folder, raw, shapes)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[Question]\n{{ m.content }}\n[/Question]\n\n{% endif %}"
        "{% endfor %}[Answer]\n{# the reply ends with [/Answer] #}"
    )
    char_tokenizer(folder, BERT_SPECIALS, chat_template=template, **BERT_NAMES)
    return folder


def llada2(folder: Path, **changes) -> Path:
    """LLaDA2's files in small: one dense layer, one with experts; the mask is in the vocabulary, nothing names it."""
    raw = {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "vocab_size": 50, "hidden_size": 32}
    raw |= {"auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"}, "num_hidden_layers": 2}
    raw |= {"intermediate_size": 48, "moe_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 4}
    raw |= {"topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    raw |= {"score_function": "sigmoid", "rms_norm_eps": 1e-6, "rope_theta": 600.0, "partial_rotary_factor": 0.5}
    raw |= {"max_position_embeddings": 64, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False}
    raw |= {"hidden_act": "silu", "norm_head": False, "tie_word_embeddings": False, "rope_scaling": None}
    raw |= {"pad_token_id": 0, "eos_token_id": 0, **changes}
    d, size = raw["hidden_size"], raw["head_dim"]

    def mlp(name, width):
        return {f"{name}.{n}_proj.weight": (width, d) for n in ("gate", "up")} | {
            f"{name}.down_proj.weight": (d, width)
        }

    shapes = dict.fromkeys(("model.word_embeddings.weight", "lm_head.weight"), (raw["vocab_size"], d))
    shapes["model.norm.weight"] = (d,)
    for i in range(raw["num_hidden_layers"]):
        b = f"model.layers.{i}."
        fused = raw["num_attention_heads"] + 2 * raw["num_key_value_heads"]
        shapes |= {b + "input_layernorm.weight": (d,), b + "post_attention_layernorm.weight": (d,)}
        shapes |= {
            b + "attention.query_key_value.weight": (fused * size, d),
            b + "attention.dense.weight": (d, 4 * size),
        }
        shapes |= {b + f"attention.{n}_layernorm.weight": (size,) for n in ("query", "key")}
        if i < raw["first_k_dense_replace"]:
            shapes |= mlp(b + "mlp", raw["intermediate_size"])
            continue
        shapes |= {b + "mlp.gate.weight": (raw["num_experts"], d), b + "mlp.gate.expert_bias": (raw["num_experts"],)}
        shapes |= mlp(b + "mlp.shared_experts", raw["moe_intermediate_size"])
        for j in range(raw["num_experts"]):
            shapes |= mlp(f"{b}mlp.experts.{j}", raw["moe_intermediate_size"])
    write(folder, raw, shapes)
    char_tokenizer(folder, ["<|endoftext|>", "<|role_end|>", "<|mask|>"], pad_token="<|endoftext|>")
    return folder


FAMILIES: dict[str, tuple[Callable[[Path], Path], Callable]] = {
    "Dream": (dream, dream_forward),
    "a2d-qwen2": (lambda folder: qwen(folder, "qwen2"), qwen_forward),
    "a2d-qwen3": (lambda folder: qwen(folder, "qwen3"), qwen_forward),
    "llada2": (llada2, llada2_forward),
    "bert": (bert, bert_forward),
    "modernbert": (modernbert, modernbert_forward),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> tuple[Path, Callable]:
    make, forward = FAMILIES[request.param]
    return make(tmp_path / "checkpoint"), forward


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors.torch import load_file

    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    return weights, json.loads((folder / "config.json").read_text())


def conversations(dllm: DLLM) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, completion of six tokens, some of them masks); prompts of unequal lengths, one of them empty."""
    M = dllm.mask_id
    yield [9, 13, 14, 12, 15], [M, 11, M, M, 17, M]
    yield [17], [M, 11, M, M, 7, M]
    yield [12, 25, 25, 8, 30, 31, 32, 9, 20], [M, M, M, M, M, 33]
    yield [], [M, 11, 40, M, 7, M]
    yield [8 + i * 7 % 31 for i in range(29)], [M, 11, M, M, 7, M]


def padded(dllm: DLLM) -> tuple[Tensor, Tensor, Tensor]:
    """The conversations as one left-padded batch: tokens, attention mask, rows to predict."""
    rows = [prompt + completion for prompt, completion in conversations(dllm)]
    width = max(map(len, rows))
    tokens = torch.tensor([[dllm.pad_id] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, attention, attention & (tokens == dllm.mask_id)


def test_a_family_gives_its_published_probabilities_padded_in_a_batch(family):
    folder, forward = family
    dllm = load_dllm(folder)
    weights, raw = read(folder)
    expected, causal = [], []
    for prompt, completion in conversations(dllm):
        tokens = prompt + completion
        triangle = torch.ones(len(tokens), len(tokens)).tril().bool()
        for results, allowed in ((expected, None), (causal, triangle)):
            logits = forward(weights, raw, tokens, allowed)
            logits[:, list(dllm.forbidden_ids)] = -torch.inf
            results.append(logits.softmax(-1)[torch.tensor(tokens) == dllm.mask_id])
    top = torch.cat(expected).topk(3)
    prediction = dllm.predict(*padded(dllm), Sampling(top_k=3))
    torch.testing.assert_close(prediction.confidence.double(), top.values, atol=2e-5, rtol=1e-4)
    assert (top.values[:, 0] - top.values[:, 1]).min() > 1e-4  # no ties: the tokens are a real check
    assert torch.equal(prediction.token, top.indices[:, 0])
    assert (torch.cat(causal).topk(3).values - top.values).abs().max() > 1e-2  # causal attention would be noticed


def test_a_row_gives_the_same_alone_and_padded(family):
    dllm = load_dllm(family[0])
    together = dllm.predict(*padded(dllm), Sampling(top_k=2, hidden=True))
    alone = []
    for prompt, completion in conversations(dllm):
        tokens = torch.tensor([prompt + completion])
        alone.append(dllm.predict(tokens, None, tokens == dllm.mask_id, Sampling(top_k=2, hidden=True)))
    assert torch.equal(together.token, torch.cat([one.token for one in alone]))
    torch.testing.assert_close(together.confidence, torch.cat([one.confidence for one in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.hidden, torch.cat([one.hidden for one in alone]), atol=1e-4, rtol=1e-4)


def test_mask_and_padding_are_never_proposed(family):
    dllm = load_dllm(family[0])
    tokens, attention, rows = padded(dllm)
    prediction = dllm.predict(tokens, attention, rows, Sampling(1, log_prob=True))
    assert dllm.mask_id in dllm.forbidden_ids
    assert (dllm.pad_id in dllm.forbidden_ids) == (dllm.pad_id not in dllm.stop_ids)
    assert (prediction.log_prob[:, list(dllm.forbidden_ids)] == -torch.inf).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(family, dtype):
    folder, _ = family
    half, full = load_dllm(folder, dtype=dtype), load_dllm(folder)
    assert half.dtype == getattr(torch, dtype)
    difference = half.predict(*padded(half)).confidence - full.predict(*padded(full)).confidence
    assert 0 < difference.abs().max() < 0.15


# ---------------------------------------------------------------------------------------------------- ids and text


def test_ids_come_from_the_config_then_the_tokenizer(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"))
    assert (dllm.mask_id, dllm.eos_id, dllm.pad_id) == (260, 256, 256)
    assert dllm.stop_ids == {256, 258} and dllm.forbidden_ids == (260, 261, 262, 263)  # the tokenizer has 261 tokens
    dllm = load_dllm(qwen(tmp_path / "qwen", "qwen3"))
    assert (dllm.mask_id, dllm.eos_id, dllm.pad_id) == (3, 2, 0)
    assert dllm.stop_ids == {0, 2}  # its pads end text: they were targets in training
    assert dllm.forbidden_ids == (3, 46, 47, 48, 49)  # the tokenizer has 46 tokens
    dllm = load_dllm(bert(tmp_path / "bert"))
    assert (dllm.mask_id, dllm.eos_id, dllm.pad_id) == (4, 3, 0)
    assert dllm.stop_ids == {3} and dllm.forbidden_ids == (0, 4, 47, 48, 49)


def test_ids_may_stand_in_the_generation_config(tmp_path):
    folder = qwen(tmp_path / "qwen", "qwen2", mask_token=None, eos_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 40], "mask_token_id": 49}))
    dllm = load_dllm(folder)
    assert (dllm.mask_id, dllm.eos_id) == (49, 1) and {1, 40} <= dllm.stop_ids


def test_a_model_without_a_mask_token_is_refused_until_one_is_named(tmp_path):
    folder = qwen(tmp_path / "qwen", "qwen2", mask_token=None)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    for file in files:
        file.write_text(file.read_text().replace("<|mask|>", "<|fim_pad|>"))
    with pytest.raises(ValueError, match="no mask token"):
        load_dllm(folder)
    with pytest.raises(ValueError, match="mask_token='<|nope|>'"):
        load_dllm(folder, mask_token="<|nope|>")
    assert load_dllm(folder, mask_token="<|fim_pad|>").mask_id == 3


def test_a_completion_ends_at_the_first_stop_token(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"))
    text, rest = dllm.tokenizer.encode("4 + 3", add_special_tokens=False), dllm.tokenizer.encode("no")
    assert dllm.decode([*text, 258, *rest]) == dllm.decode([*text, 256, *rest]) == "4 + 3"
    assert dllm.decode([dllm.mask_id, *text, dllm.mask_id]) == "4 + 3"
    chat = load_dllm(modernbert(tmp_path / "bert"))
    with_end = [chat.tokenizer.get_vocab()[c] for c in "yes. no"]
    assert chat.decode(with_end) == "yes. no"


def test_text_that_closes_an_answer_is_cut(tmp_path, monkeypatch):
    dllm = load_dllm(modernbert(tmp_path / "bert"))
    monkeypatch.setattr(DLLM, "decode", lambda self, tokens: "42\n[/Answer]\n\n[/Answer]")
    assert dllm.decode([5]) == "42\n"
    dllm.tokenizer.chat_template = None
    assert dllm.decode([5]).endswith("[/Answer]")


def test_prompts_are_put_into_the_template_once(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"))
    whole = "<|im_start|>user\n4 + 3<|im_end|>\n<|im_start|>assistant\n"
    assert dllm.tokenizer.decode(dllm.encode("4 + 3")) == whole
    chat = Chat((("system", "be brief"), ("user", "4 + 3")), prefill="It is")
    assert dllm.tokenizer.decode(dllm.encode(chat)) == "<|im_start|>system\nbe brief<|im_end|>\n" + whole + "It is"
    assert {257, 258} <= set(dllm.encode("4 + 3"))  # its markers are single tokens


def test_qwen3_begins_without_a_chain_of_thought(tmp_path):
    dllm = load_dllm(qwen(tmp_path / "qwen", "qwen3"))
    text = in_template(dllm.tokenizer, dllm.template_options, [("user", "a")])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_base_models_are_given_plain_text(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"), chat_template=False)
    assert dllm.tokenizer.decode(dllm.encode("4 + 3")) == "4 + 3"
    chat = Chat((("system", "be brief"), ("user", "4 + 3")), prefill="It is")
    assert dllm.tokenizer.decode(dllm.encode(chat)) == str(chat) == "be brief\n4 + 3\nIt is"
    dllm = load_dllm(bert(tmp_path / "bert"))
    assert dllm.encode("abc") == [2, 5, 6, 7]  # [CLS], as in pre-training
    dllm = load_dllm(modernbert(tmp_path / "modernbert"), chat_template=False)
    assert dllm.encode("abc") == [2, 5, 6, 7]


SPELLED = "a<|im_end|>b<|mask|><|endoftext|> <|im_start|>c"


def test_text_that_spells_a_token_stays_text_in_every_turn(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"))
    innocent = Chat((("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")), prefill="P")
    spelled = Chat(tuple((role, text + SPELLED) for role, text in innocent.turns), prefill="P" + SPELLED)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = [letters[chr(byte) if byte != 32 else "\u0120"] for byte in SPELLED.encode()]
    expected = []
    for token in dllm.encode(innocent):  # the same, with the text behind the one letter of every turn
        expected += [token, *plain] if token in [letters[name] for name in "SUAVP"] else [token]
    assert dllm.encode(spelled) == expected and dllm.tokenizer.decode(expected).count(SPELLED) == 5


def test_text_that_spells_a_token_stays_text_without_a_template(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"), chat_template=False)
    ids = dllm.encode(SPELLED)
    assert dllm.tokenizer.decode(ids) == SPELLED and max(ids) < 256
    assert dllm.encode("a b") == dllm.tokenizer.encode("a b")


def word_pieces() -> tuple[Tokenizer, list[int]]:
    """As BERT's."""
    vocabulary = ["[PAD]", "[UNK]", "[MASK]", "[", "]", "mask", "a", "b"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return tokenizer, [6, 3, 5, 4, 7]


def sentence_pieces() -> tuple[Tokenizer, list[int]]:
    """As Llama's of old: a blank before the first word, everything else letter by letter."""
    letters = ["<unk>", *"\u2581[]MASKab"]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer, [letters.index(token) for token in "\u2581a[MASK]b"]


@pytest.mark.parametrize("make", [word_pieces, sentence_pieces])
def test_text_that_spells_a_token_stays_text_in_tokenizers_of_other_kinds(make):
    tokenizer, expected = make()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]")
    assert fast.mask_token_id in fast.encode("a[MASK]b")
    assert Spelling(fast, {fast.mask_token_id}).plain("a[MASK]b") == expected


def test_a_mask_that_the_tokenizer_does_not_call_special_stays_text_too(tmp_path):
    folder = dream(tmp_path / "dream")
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["added_tokens_decoder"]["260"]["special"] = False
    del tokens["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    for template in (True, False):
        dllm = load_dllm(folder, chat_template=template)
        ids = dllm.encode(SPELLED)
        assert not dllm.tokenizer.added_tokens_decoder[260].special
        assert dllm.mask_id == 260 and 260 not in ids and SPELLED in dllm.tokenizer.decode(ids)


def test_text_that_has_no_other_tokens_is_refused(tmp_path):
    dllm = load_dllm(qwen(tmp_path / "qwen", "qwen2"), chat_template=False)
    tokenizer = Tokenizer(models.WordLevel({"a": 1, "<|im_end|>": 2, "#": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    dllm.spelling.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert dllm.encode("a b ## <|im_end|>") == [1, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="reads '#' in 'a # b'"):
        dllm.encode("a # b")


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
DROPS_SYSTEM = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [(REFUSES_SYSTEM, "no system here"), (DROPS_SYSTEM, "leaves out turns of the role 'system'")],
)
def test_a_role_that_the_template_has_no_place_for_is_refused(tmp_path, template, message):
    dllm = load_dllm(dream(tmp_path / "dream"))
    dllm.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        dllm.encode(Chat((("system", "be brief"), ("user", "4 + 3"))))


# ---------------------------------------------------------------------------------------------------- what is refused


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights, _ = read(folder)
    change(weights)
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("how", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(family, how):
    folder, _ = family

    def damage(weights):
        name = next(n for n in sorted(weights) if "layer" in n and n.endswith(".weight") and weights[n].ndim == 2)
        if how == "missing":
            del weights[name]
        elif how == "unexpected":
            weights[name.replace("0", "9", 1)] = weights[name].clone()
        else:
            weights[name] = weights[name][:-1].clone()

    rewrite(folder, damage)
    with pytest.raises(ValueError, match=f"{how} keys: .*layer"):
        load_dllm(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: dream(f, use_sliding_window=True), "use_sliding_window=True"),
        (lambda f: dream(f, hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda f: qwen(f, "qwen3", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (lambda f: bert(f, is_decoder=True), "does not depend on what follows"),
        (lambda f: bert(f, model_type="gpt2"), "model_type='gpt2'.*register"),
        (lambda f: bert(f, model_type="bart"), "encoder-decoder"),
        (lambda f: dream(f, mask_token_id=999), "mask_token_id=999 is not valid.*0 to 263"),
    ],
)
def test_configs_of_other_architectures_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_dllm(make(tmp_path / "checkpoint"))


@pytest.mark.parametrize("field", ["hidden_size", "rms_norm_eps", "rope_theta", "num_key_value_heads"])
def test_a_size_is_never_left_to_a_default(tmp_path, field):
    folder = dream(tmp_path / "dream")
    raw = json.loads((folder / "config.json").read_text())
    del raw[field]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        load_dllm(folder)


EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n"
LOAD_ALL = """
import sys
from dllm_gym.models import load_dllm
for folder in sys.argv[1:]:
    try:
        load_dllm(folder)
        print("loaded")
    except ValueError as error:
        print(error)
"""


def test_code_of_a_checkpoint_is_not_run_even_if_the_terminal_says_yes(tmp_path):
    folders, ran = [], tmp_path / "ran"
    for name, make in (("llada2", llada2), ("bert", bert), ("qwen", lambda f: qwen(f, "qwen3")), ("dream", dream)):
        for with_json in (True, False):
            folder = make(tmp_path / f"{name}{with_json}")
            if not with_json:
                (folder / "tokenizer.json").unlink(missing_ok=True)
            code = {"AutoTokenizer": ["x.Evil", None]}, {"AutoConfig": "x.Evil"}
            for file, auto_map in zip(("tokenizer_config.json", "config.json"), code, strict=True):
                fields = json.loads((folder / file).read_text())
                fields |= {"auto_map": auto_map, "tokenizer_class": "Evil"}
                (folder / file).write_text(json.dumps(fields))
            (folder / "x.py").write_text(EVIL.format(str(ran)))
            folders.append(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}  # where code would be copied to
    command = [sys.executable, "-c", LOAD_ALL, *map(str, folders)]
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, check=True, env=environment)
    answers = done.stdout.splitlines()
    assert not ran.exists() and "Do you wish" not in done.stdout + done.stderr
    assert answers[0::2] == ["loaded"] * 4  # nothing of the code is needed
    assert "is code in the folder, which is never run: add a tokenizer.json" in answers[1]
    assert answers[7] == "loaded"  # Dream has no tokenizer.json


@pytest.mark.parametrize(
    ("make", "file", "message"),
    [
        (bert, "tokenizer.json", "no tokenizer.json and no vocab.txt"),
        (lambda f: qwen(f, "qwen2"), "tokenizer.json", "no tokenizer.json and no vocab.json and merges.txt"),
        (dream, "vocab.json", ""),
        (dream, "merges.txt", ""),
        (llada2, "tokenizer.json", ""),
    ],
)
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, make, file, message):
    folder = make(tmp_path / "checkpoint")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"cannot load the checkpoint in .*{message}"):
        load_dllm(folder)


@pytest.mark.parametrize(
    ("make", "field", "lacks"),
    [
        (lambda f: bert(f, hidden_size=48), "num_attention_heads", "num_attention_heads"),  # its default 12 would fit
        (bert, "layer_norm_eps", "layer_norm_eps"),
        (bert, "hidden_act", "hidden_act"),
        (modernbert, "local_attention", "local_attention"),
        (modernbert, "local_rope_theta", "local_rope_theta"),
        (modernbert, "global_attn_every_n_layers", "global_attn_every_n_layers"),
        (llada2, "num_experts_per_tok", "num_experts_per_tok"),
        (llada2, "partial_rotary_factor", "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_what_shapes_the_answer_is_never_left_to_a_default(tmp_path, make, field, lacks, how):
    folder = make(tmp_path / "checkpoint")
    _, raw = read(folder)
    raw[field] = None
    if how == "absent":
        del raw[field]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"lacks the field '{lacks}'"):
        load_dllm(folder)


@pytest.mark.parametrize(
    ("make", "head"),
    [(lambda f: qwen(f, "qwen3"), "lm_head.weight"), (bert, "cls.predictions.decoder.weight")],
)
def test_a_tied_head_may_be_stored_but_not_differ(tmp_path, make, head):
    embedding = "model.embed_tokens.weight" if head == "lm_head.weight" else "bert.embeddings.word_embeddings.weight"
    same, other, plain = make(tmp_path / "same"), make(tmp_path / "other"), load_dllm(make(tmp_path / "plain"))
    rewrite(same, lambda weights: weights.update({head: weights[embedding].clone()}))
    rewrite(other, lambda weights: weights.update({head: weights[embedding] + 1}))
    stored = load_dllm(same)
    assert torch.equal(stored.predict(*padded(stored)).confidence, plain.predict(*padded(plain)).confidence)
    with pytest.raises(ValueError, match="has a head of its own that differs"):
        load_dllm(other)


def test_only_the_files_of_the_index_are_read(tmp_path):
    folder, plain = llada2(tmp_path / "with a stray file"), load_dllm(llada2(tmp_path / "plain"))
    weights, _ = read(folder)
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "zz_old.safetensors")
    dllm = load_dllm(folder)
    assert torch.equal(dllm.predict(*padded(dllm)).confidence, plain.predict(*padded(plain)).confidence)
    for i, (files, message) in enumerate(
        [
            ({"a": "part.safetensors", "b": "zz_old.safetensors"}, "two weights for"),
            ({"a": "gone.safetensors"}, "lists gone.safetensors"),
            ({"a": "../plain/model.safetensors"}, "not in"),
            ({}, "no weight_map"),
            (dict.fromkeys(weights, "part.safetensors"), None),
        ]
    ):
        parts = shutil.copytree(folder, tmp_path / f"parts {i}")
        (parts / "model.safetensors").rename(parts / "part.safetensors")
        (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        if message is None:
            dllm = load_dllm(parts)
            assert torch.equal(dllm.predict(*padded(dllm)).confidence, plain.predict(*padded(plain)).confidence)
            continue
        with pytest.raises(ValueError, match=message):
            load_dllm(parts)


def test_a_fused_and_a_split_weight_for_the_same_place_are_refused(tmp_path):
    folder = llada2(tmp_path / "llada2")
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}))
    with pytest.raises(ValueError, match="two weights for model.layers.0.self_attn.q_proj.weight"):
        load_dllm(folder)


@pytest.mark.parametrize("fields", [{"_attn_implementation": "flash_attention_2"}, {"return_dict": False}])
def test_how_a_network_is_run_is_not_the_checkpoints_choice(tmp_path, fields):
    plain, other = (load_dllm(qwen(tmp_path / str(len(f)), "qwen2", **f)) for f in ({}, fields))
    assert torch.equal(plain.predict(*padded(plain)).confidence, other.predict(*padded(other)).confidence)


def roberta(folder: Path) -> Path:
    """BERT's network under RoBERTa's names; positions begin after the padding index."""
    bert(folder, max_position_embeddings=40)
    weights, raw = read(folder)
    moved = {"bert.": "roberta.", "cls.predictions.transform.dense.": "lm_head.dense.", "gamma": "weight"}
    moved |= {"cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.", "cls.predictions.bias": "lm_head.bias"}
    moved |= {"beta": "bias"}
    renamed = {}
    for name, value in weights.items():
        for old, new in moved.items():
            name = name.replace(old, new)
        if "pooler" not in name and "seq_relationship" not in name:
            renamed[name] = value.float()
    positions = "roberta.embeddings.position_embeddings.weight"
    renamed[positions] = torch.cat([torch.zeros(1, 32), renamed[positions]])  # padding index 0: position j is row j + 1
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    raw |= {"model_type": "roberta", "max_position_embeddings": 41}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_roberta_counts_positions_from_behind_its_padding_index(tmp_path):
    plain, moved = load_dllm(bert(tmp_path / "bert", max_position_embeddings=40)), load_dllm(roberta(tmp_path / "r"))
    assert plain.max_positions == moved.max_positions == 40
    for sampling in (Sampling(3), Sampling(50)):
        one, other = (dllm.predict(*padded(dllm), sampling) for dllm in (plain, moved))
        assert torch.equal(one.token, other.token)
        torch.testing.assert_close(one.confidence, other.confidence, atol=1e-5, rtol=1e-4)


def test_an_architecture_that_padding_confuses_is_refused(tmp_path):
    """FNet mixes positions with a Fourier transform: there is no mask that could leave padding out."""
    from transformers import FNetConfig, FNetForMaskedLM

    folder = tmp_path / "fnet"
    torch.manual_seed(0)
    config = FNetConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, intermediate_size=48, pad_token_id=0)
    FNetForMaskedLM(config).save_pretrained(folder)
    char_tokenizer(folder, BERT_SPECIALS, **BERT_NAMES)
    with pytest.raises(ValueError, match="cannot load the checkpoint"):
        load_dllm(folder)


# ---------------------------------------------------------------------------------------------------- ways to load


def test_sharded_checkpoints_give_the_same(tmp_path):
    folder = qwen(tmp_path / "qwen", "qwen2")
    whole = load_dllm(folder)
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (shards / file.name).write_bytes(file.read_bytes())
    weights, _ = read(folder)
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    index = {"metadata": {}, "weight_map": {}}
    for i, half in enumerate(halves):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({k: v.float() for k, v in half.items()}, shards / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half, name)
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = load_dllm(shards)
    assert torch.equal(whole.predict(*padded(whole)).confidence, parts.predict(*padded(parts)).confidence)


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}]
)
def test_a_device_map_places_the_weights(tmp_path, device_map):  # fmt: skip
    pytest.importorskip("accelerate")
    folder = dream(tmp_path / "dream")
    whole, spread = load_dllm(folder), load_dllm(folder, device_map=device_map)
    assert spread.device == torch.device("cpu") and spread is load_dllm(folder, device_map=device_map) is not whole
    assert torch.equal(whole.predict(*padded(whole)).confidence, spread.predict(*padded(spread)).confidence)


@pytest.mark.parametrize(
    ("options", "package"), [({"quantization": "int8"}, "bitsandbytes"), ({"device_map": "auto"}, "accelerate")]
)
def test_a_missing_package_is_named(monkeypatch, options, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_dllm("tiny", **options)


@pytest.mark.parametrize(("name", "field"), [("int8", "load_in_8bit"), ("int4", "load_in_4bit")])
def test_quantization_is_left_to_transformers(monkeypatch, name, field):
    """bitsandbytes needs a GPU; what transformers is asked for can be seen without one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "99")
    placement = Settings(dtype=torch.bfloat16, quantization=name).placement()
    assert getattr(placement["quantization_config"], field) and placement["device_map"] == {"": torch.device("cpu")}
    assert placement["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


def test_options_that_do_not_fit_are_refused(tmp_path, tiny):
    with pytest.raises(TypeError, match="no option 'quantisation': choose from .*quantization"):
        load_dllm("tiny", quantisation="int4")
    with pytest.raises(ValueError, match="quantization='int3'"):
        load_dllm("tiny", quantization="int3")
    with pytest.raises(ValueError, match="rope_float32=True"):
        load_dllm(dream(tmp_path / "dream"), rope_float32=True)
    with pytest.raises(ValueError, match="chat_template=False: the dLLM that was passed is loaded already"):
        load_dllm(tiny, chat_template=False)


def test_hub_ids_are_fetched_at_their_revision(monkeypatch, tmp_path):
    folder, asked = dream(tmp_path / "dream"), []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_dllm("someone/some-dllm@abc123").mask_id == load_dllm("someone/some-dllm").mask_id == 260
    assert asked == [("someone/some-dllm", "abc123"), ("someone/some-dllm", None)]


def test_a_hub_model_that_cannot_be_had_says_how_to_get_it(monkeypatch):
    def fetch(*_, **__):
        raise OSError("401 Client Error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"hf auth login.*model\.model=/path"):
        load_dllm("someone/gated-dllm")


def test_a_family_can_be_added_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))
    folder = qwen(tmp_path / "new", "qwen2", model_type="my-dllm")
    with pytest.raises(ValueError, match="model_type='my-dllm'"):
        load_dllm(folder)

    def load(checkpoint):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        assert checkpoint.settings.dtype == torch.float16
        config = Qwen2Config.from_dict({k: v for k, v in checkpoint.config.items() if k != "auto_map"})
        config.is_causal = False
        network = checkpoint.weights(Qwen2ForCausalLM, config)
        return DLLM(network.model, network.lm_head, checkpoint.tokenizer(), checkpoint.config)

    register("my-dllm", load)
    mine, known = (
        load_dllm(f, dtype="float16") for f in (folder, qwen(tmp_path / "known", "qwen2", model_type="a2d-qwen2"))
    )
    assert torch.equal(mine.predict(*padded(mine)).confidence, known.predict(*padded(known)).confidence)


def test_a_loader_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))
    register("fails", lambda checkpoint: checkpoint.config["wanted"])
    register("gives", lambda checkpoint: "no dLLM")
    with pytest.raises(ValueError, match="cannot load the checkpoint in .*KeyError: 'wanted'"):
        load_dllm(qwen(tmp_path / "fails", "qwen2", model_type="fails"))
    with pytest.raises(ValueError, match="gave a str, not a DLLM"):
        load_dllm(qwen(tmp_path / "gives", "qwen2", model_type="gives"))


def test_a_family_is_replaced_only_on_purpose(monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))
    for arguments in ((5, loading.llada.load), ("", loading.llada.load), ("x", None)):
        with pytest.raises(ValueError, match="need a name and a callable"):
            register(*arguments)
    for name in ("llada", "bert"):
        with pytest.raises(ValueError, match=f"model_type='{name}' is a supported family already.*replace=True"):
            register(name, loading.qwen.load)
        register(name, loading.qwen.load, replace=True)
        assert loading.family({"model_type": name}) is loading.qwen.load


def test_a_relative_path_is_the_folder_that_it_names_now(tmp_path, monkeypatch):
    for where, kind in (("a", "qwen2"), ("b", "qwen3")):
        (tmp_path / where).mkdir()
        qwen(tmp_path / where / "model", kind)
    monkeypatch.chdir(tmp_path / "a")
    first = load_dllm("model")
    monkeypatch.chdir(tmp_path / "b")
    assert load_dllm("model").config["model_type"] == "a2d-qwen3"
    assert load_dllm(tmp_path / "a" / "model") is load_dllm("../a/model") is first


def test_threads_share_one_dllm_and_leave_the_verbosity(tmp_path):
    from transformers.utils import logging

    folder, before, loaded = qwen(tmp_path / "qwen", "qwen2"), logging.get_verbosity(), []
    threads = [threading.Thread(target=lambda: loaded.append(load_dllm(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 4 and len({id(dllm) for dllm in loaded}) == 1 and logging.get_verbosity() == before


def test_llada2_sees_whole_blocks_and_nothing_behind_them(tmp_path):
    folder = llada2(tmp_path / "llada2")
    dllm = load_dllm(folder)
    weights, raw = read(folder)
    tokens = [8 + i * 7 % 31 for i in range(40)]
    tokens[3] = tokens[30] = tokens[35] = dllm.mask_id
    hidden = {}
    for changed in (None, 5, 29, 33):  # 29 and 33: the same block as 30 and 35; 5: the one before
        row = torch.tensor([tokens])
        if changed is not None:
            row[0, changed] = 40
        hidden[changed] = dllm.predict(row, None, row == dllm.mask_id, Sampling(hidden=True)).hidden
    moved = {
        changed: [not torch.equal(a, b) for a, b in zip(hidden[changed], hidden[None], strict=True)]
        for changed in hidden
    }
    assert moved == {None: [False] * 3, 5: [True] * 3, 29: [True] * 3, 33: [False, False, True]}
    whole = llada2_forward(weights, raw, tokens, everything(40))
    blocks = llada2_forward(weights, raw, tokens)
    assert (whole[:32] - blocks[:32]).abs().max() > 1e-2  # full attention would be noticed


CONFIGS = sorted((Path(__file__).parents[2] / "conf/model").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_model_config_holds_arguments_of_load_dllm(path):
    config = OmegaConf.load(path)
    assert set(config) <= {"model", "device", "dtype", *loading.Options.__annotations__}
    hub = r"[\w-]+/[\w.-]+(@[0-9a-f]{40})?"
    assert config.model in (None, *loading.SHIPPED) or re.fullmatch(hub, config.model)


def test_an_environment_decodes_with_another_family(tmp_path):
    dllm = load_dllm(dream(tmp_path / "dream"), chat_template=False)
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=3, model=dllm, task="arithmetic")
    observation, _ = envs.reset(seed=1)
    for _ in range(envs.core.L):
        sure = observation["confidence"][:, :, 0] * observation["action_mask"]
        observation, _, terminated, _, _ = envs.step(torch.nn.functional.one_hot(sure.argmax(1), sure.shape[1]))
    assert terminated.all()
    assert all(text is not None and "<|mask|>" not in text for text in envs.core.completions)
