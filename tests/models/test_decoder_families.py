"""The families on transformers' decoders, as :mod:`test_families` has the others: against plain float64 torch.

Every checkpoint is written with the names of weights, the config and the tokenizer of its family, as far as they are
public; what makes it this family (blocks, a shift, experts, a scaled rotation) is written out here once more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import transformers
from test_families import (
    QWEN_CHAT,
    QWEN_SIZES,
    attend,
    bert,
    char_tokenizer,
    conversations,
    dream,
    llada2,
    llada2_forward,
    padded,
    qwen,
    qwen_shapes,
    read,
    rewrite,
    rms,
    write,
)
from torch import Tensor
from torch.nn.functional import silu

import dllm_gym  # noqa: F401 - registers the environment
from dllm_gym.models import DLLM, Sampling, load_dllm
from dllm_gym.prompt import Chat
from dllm_gym.tasks import ProceduralTask

# ---------------------------------------------------------------------------------------------------- plain torch


def frequencies(raw: dict, size: int) -> Tensor:
    """Inverse wave lengths [size / 2] of the rotation: plain, Llama 3's, or YaRN's (arXiv 2309.00071)."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta") or scaling["rope_theta"]
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    kind, old = scaling.get("rope_type", "default"), scaling.get("original_max_position_embeddings")
    if kind == "llama3":
        turns = old * plain / (2 * math.pi)  # in the length that it was trained on
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / scaling["factor"])
    if kind == "yarn":
        fast, slow = (
            size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling["beta_fast"], scaling["beta_slow"])
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), size - 1)
        divided = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - divided) + plain / scaling["factor"] * divided
    return plain


def rotate(x: Tensor, inverse: Tensor) -> Tensor:
    """x (heads, T, size) turned by its position."""
    angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), inverse).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def gated(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return (silu(x @ w[f"{name}.gate_proj.weight"].T) * (x @ w[f"{name}.up_proj.weight"].T)) @ w[
        f"{name}.down_proj.weight"
    ].T


def experts(x: Tensor, w: dict[str, Tensor], name: str, raw: dict) -> Tensor:
    """Each token [T, d] by the experts with the largest softmax; SDAR's weights sum to 1, LLaDA-MoE's do not."""
    share = (x @ w[f"{name}.gate.weight"].T).softmax(-1)
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        value, index = share[t].topk(raw["num_experts_per_tok"])
        value = value / value.sum() if raw.get("norm_topk_prob") else value
        for weight, expert in zip(value, index, strict=True):
            out[t] += weight * gated(token, w, f"{name}.experts.{expert}")
    return out


def forward(w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor) -> Tensor:
    """Llama, Qwen2, Qwen3, Qwen3Moe and Ministral in one, as the names of the weights say: logits [T, V]."""
    w = {n.replace("encoder.", "model.", 1).replace("diffusion_head", "lm_head"): v for n, v in w.items()}
    T, eps, scaling = len(tokens), raw["rms_norm_eps"], raw.get("rope_parameters") or {}
    inverse = frequencies(raw, raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
    longer = 1 + torch.log(1 + (torch.arange(T) // scaling.get("original_max_position_embeddings", T)).double())
    stretch = 1 + scaling.get("llama_4_scaling_beta", 0) * (longer - 1)  # (T,)
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(raw["num_hidden_layers"]):
        b, heads = f"model.layers.{i}.", {}
        h = rms(x, w[b + "input_layernorm.weight"], eps)
        for n, count in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            out = h @ w[f"{b}self_attn.{n}_proj.weight"].T + w.get(f"{b}self_attn.{n}_proj.bias", 0)
            heads[n] = out.view(T, raw[count], -1).transpose(0, 1)
            if f"{b}self_attn.{n}_norm.weight" in w:
                heads[n] = rms(heads[n], w[f"{b}self_attn.{n}_norm.weight"], eps)
        q, k = rotate(heads["q"], inverse) * stretch[:, None], rotate(heads["k"], inverse)
        x = x + attend(q, k, heads["v"], allowed) @ w[b + "self_attn.o_proj.weight"].T
        h = rms(x, w[b + "post_attention_layernorm.weight"], eps)
        x = x + (experts(h, w, b + "mlp", raw) if b + "mlp.gate.weight" in w else gated(h, w, b + "mlp"))
    return rms(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


# ---------------------------------------------------------------------------------------------------- checkpoints

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
SEED = ["<[begin▁of▁sentence]>", "<[PAD▁TOKEN]>", "<[end▁of▁sentence]>", "<[a]>", "<[b]>", "<[MASK]>"]


def checkpoint(folder: Path, raw: dict, *, norms: bool, bias: bool, mask: str = "<|mask|>", rename=None) -> Path:
    """A decoder's folder; ``raw`` on top of the sizes, weights under ``rename`` of Llama's names."""
    raw = {"vocab_size": 52, "tie_word_embeddings": False, "eos_token_id": 2, **QWEN_SIZES, **raw}
    shapes = qwen_shapes(raw, raw.get("head_dim") or 8, norms)
    if not bias:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_proj.bias")}
    width, d = raw.get("expert_intermediate_size") or raw.get("moe_intermediate_size"), raw["hidden_size"]
    if width:
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for i in range(raw["num_hidden_layers"]):
            shapes[f"model.layers.{i}.mlp.gate.weight"] = (raw["num_experts"], d)
            for j in range(raw["num_experts"]):
                b = f"model.layers.{i}.mlp.experts.{j}."
                shapes |= {f"{b}{n}_proj.weight": (width, d) for n in ("gate", "up")}
                shapes[b + "down_proj.weight"] = (d, width)
    write(folder, raw, {rename(name) if rename else name: shape for name, shape in shapes.items()})
    specials = SEED if mask == "<[MASK]>" else [*SPECIALS[:3], mask]
    char_tokenizer(folder, specials, eos_token=specials[2], pad_token=specials[0], chat_template=QWEN_CHAT)
    return folder


def remote(name: str) -> dict[str, str]:
    return {"AutoConfig": f"configuration_{name}.Config", "AutoModelForCausalLM": f"modeling_{name}.Model"}


def llada_moe(folder: Path, **changes) -> Path:
    raw = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "auto_map": remote("lladamoe")}
    raw |= {"num_experts": 6, "num_experts_per_tok": 2, "expert_intermediate_size": 24, "dense_intermediate_size": 40}
    raw |= {"num_key_value_heads": 4, "qk_layernorm": True, "norm_topk_prob": None, "moe_layer_freq": [1, 1]}
    raw |= {"moe_router_score_function": "softmax", "routed_scaling_factor": 1, "shared_expert_intermediate_size": None}
    return checkpoint(folder, {**raw, "partial_rotary_factor": 1, **changes}, norms=True, bias=False)


def sdar(folder: Path, **changes) -> Path:
    raw = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "auto_map": remote("sdar"), "head_dim": 16}
    raw |= {"attention_bias": False, "fuse_cross_entropy": True, "mask_token_id": 3, "max_window_layers": 2}
    return checkpoint(folder, raw | changes, norms=True, bias=False)


def sdar_moe(folder: Path) -> Path:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    names = {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "decoder_sparse_step": 1}
    return sdar(folder, **experts, **names, mlp_only_layers=[])


def fast_dllm(folder: Path, **changes) -> Path:
    raw = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32}
    raw |= {"auto_map": remote("fast"), "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2}
    return checkpoint(folder, raw | changes, norms=False, bias=True, mask="|<MASK>|")


def open_dllm(folder: Path, **changes) -> Path:
    raw = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    return checkpoint(folder, raw | changes, norms=False, bias=True)


def plain_qwen3(folder: Path, **changes) -> Path:
    raw = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
    return checkpoint(folder, raw | changes, norms=True, bias=False)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def a2d_llama(folder: Path, **changes) -> Path:
    raw = {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], "auto_map": remote("llama")}
    return checkpoint(folder, {**raw, "rope_scaling": LLAMA3, **changes}, norms=False, bias=False)


def illada(folder: Path, **changes) -> Path:
    raw = {"model_type": "illada", "auto_map": remote("illada"), "tie_word_embeddings": True, "attention_bias": False}
    return checkpoint(folder, raw | changes, norms=False, bias=False, mask="<[MASK]>")


def diffcoder(folder: Path, **changes) -> Path:
    raw = {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"], "attention_bias": False}
    raw |= {"auto_map": remote("stable_diffcoder"), "mlp_bias": False, "head_dim": 8}
    return checkpoint(folder, raw | changes, norms=False, bias=False, mask="<[MASK]>")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5}


def nemotron(folder: Path, **changes) -> Path:
    raw = {"model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"], "head_dim": 16}
    raw |= {"auto_map": remote("nemotron_labs_diffusion"), "block_size": 32, "dlm_paradigm": "bidirectional"}
    raw |= {"dlm_loss_weight": None, "ar_loss_weight": 1.0, "mask_token_id": 3, "rope_parameters": YARN}
    raw |= {"rope_theta": None, "attention_bias": False, "mlp_bias": False}
    raw |= changes

    def rename(name: str) -> str:
        return name.replace("model.", "encoder.", 1).replace("lm_head", "diffusion_head")

    return checkpoint(folder, raw, norms=False, bias=False, rename=rename)


@dataclass(frozen=True)
class Case:
    """How a family is written, loaded, and what its positions see."""

    make: Callable[..., Path]
    block: int | None = None
    shift: int = 0
    options: dict = field(default_factory=dict)

    def logits(self, w: dict[str, Tensor], raw: dict, tokens: list[int], allowed: Tensor | None = None) -> Tensor:
        position = torch.arange(len(tokens)) // (self.block or len(tokens))
        allowed = position[:, None] >= position if allowed is None else allowed
        logits = forward(w, raw, tokens, allowed)
        return torch.cat([logits[:1], logits[:-1]]) if self.shift else logits


CASES = {
    "LLaDA-MoE": Case(llada_moe),
    "SDAR": Case(sdar, block=4),
    "SDAR of another block": Case(lambda folder: sdar(folder, block_size=8), block=8),
    "SDAR whose block is stated": Case(sdar, block=16, options={"block": 16}),
    "SDAR-MoE": Case(sdar_moe, block=4),
    "Fast-dLLM v2": Case(fast_dllm, block=32, shift=1),
    "Open-dLLM": Case(open_dllm, shift=1, options={"shift": 1, "block": 0}),
    "a plain Qwen3": Case(plain_qwen3, options={"shift": False, "block": None}),
    "a plain Qwen3 in blocks": Case(plain_qwen3, block=8, options={"shift": 0, "block": 8}),
    "A2D-Qwen3 trained as BD3LM": Case(lambda folder: qwen(folder, "qwen3"), block=8, options={"block": 8}),
    "A2D-Llama": Case(a2d_llama),
    "A2D-Llama of an older Llama": Case(lambda folder: a2d_llama(folder, rope_scaling=None)),
    "iLLaDA": Case(illada),
    "Stable-DiffCoder": Case(diffcoder, block=4),
    "Nemotron-Labs-Diffusion": Case(nemotron),
}


by_position = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 4)
if not by_position:
    del CASES["Nemotron-Labs-Diffusion"]


@pytest.mark.skipif(by_position, reason="this transformers scales Ministral's attention by position")
def test_nemotron_is_refused_where_a_padded_row_would_be_scaled_by_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"needs transformers 5\.4 or newer"):
        load_dllm(nemotron(tmp_path))


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[Case, Path]:
    return CASES[request.param], CASES[request.param].make(tmp_path / "checkpoint")


def test_a_family_gives_its_published_probabilities_padded_in_a_batch(case):
    family, folder = case
    dllm = load_dllm(folder, **family.options)
    weights, raw = read(folder)
    expected, causal = [], []
    for prompt, completion in conversations(dllm):
        tokens = prompt + completion
        triangle = torch.ones(len(tokens), len(tokens)).tril().bool()
        for results, allowed in ((expected, None), (causal, triangle)):
            logits = family.logits(weights, raw, tokens, allowed)
            logits[:, list(dllm.forbidden_ids)] = -torch.inf
            results.append(logits.softmax(-1)[torch.tensor(tokens) == dllm.mask_id])
    top = torch.cat(expected).topk(3)
    prediction = dllm.predict(*padded(dllm), Sampling(top_k=3))
    torch.testing.assert_close(prediction.confidence.double(), top.values, atol=2e-5, rtol=1e-4)
    assert (top.values[:, 0] - top.values[:, 1]).min() > 1e-5  # no ties: the tokens are a real check
    assert torch.equal(prediction.token, top.indices[:, 0])
    assert (torch.cat(causal).topk(3).values - top.values).abs().max() > 1e-2  # causal attention would be noticed


def test_a_row_gives_the_same_alone_and_padded(case):
    family, folder = case
    dllm = load_dllm(folder, **family.options)
    together = dllm.predict(*padded(dllm), Sampling(top_k=2, hidden=True))
    alone = []
    for prompt, completion in conversations(dllm):
        tokens = torch.tensor([prompt + completion])
        alone.append(dllm.predict(tokens, None, tokens == dllm.mask_id, Sampling(top_k=2, hidden=True)))
    assert torch.equal(together.token, torch.cat([one.token for one in alone]))
    torch.testing.assert_close(together.hidden, torch.cat([one.hidden for one in alone]), atol=1e-4, rtol=1e-4)


def test_half_precision_is_close_and_the_mask_is_never_proposed(case):
    family, folder = case
    half, full = load_dllm(folder, dtype="bfloat16", **family.options), load_dllm(folder, **family.options)
    said = half.predict(*padded(half), Sampling(1, log_prob=True)), full.predict(*padded(full))
    assert 0 < (said[0].confidence - said[1].confidence).abs().mean() < 0.1
    assert (
        full.mask_id == half.mask_id in half.forbidden_ids and (said[0].log_prob[:, half.mask_id] == -torch.inf).all()
    )


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("how", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(case, how):
    family, folder = case

    def damage(weights):
        name = next(n for n in sorted(weights) if n.endswith("self_attn.q_proj.weight"))
        if how == "missing":
            del weights[name]
        elif how == "unexpected":
            weights[name.replace("0", "9", 1)] = weights[name].clone()
        else:
            weights[name] = weights[name][:-1].clone()

    rewrite(folder, damage)
    with pytest.raises(ValueError, match=f"{how} keys: .*layer"):
        load_dllm(folder, **family.options)


@pytest.mark.parametrize("make", [open_dllm, plain_qwen3])
@pytest.mark.parametrize("options", [{}, {"shift": 1}, {"block": 0}, {"shift": None, "block": 4}])
def test_a_plain_qwen_is_refused_until_it_is_stated_how_it_predicts(tmp_path, make, options):
    with pytest.raises(ValueError, match=r"does not say how it was made a dLLM: state shift=0 .* block=N"):
        load_dllm(make(tmp_path / "checkpoint"), **options)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (open_dllm, {"block_size": 32}),
        (open_dllm, {"bd_size": 32}),
        (open_dllm, {"dlm_paradigm": "block_diff"}),
        (open_dllm, {"auto_map": {"AutoModel": "modeling_own.Own"}}),
        (plain_qwen3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (plain_qwen3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}}),
        (plain_qwen3, {"final_logit_softcapping": 30.0}),
        (dream, {"block_size": 32}),
        (dream, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (lambda f, **c: qwen(f, "qwen2", **c), {"block_size": 32}),
        (sdar, {"dlm_loss_weight": 2.0}),
        (sdar, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        (fast_dllm, {"block_size": 8}),
        (a2d_llama, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (illada, {"block_size": 32}),
        (diffcoder, {"bd_size": 32}),
        (nemotron, {"canvas_length": 256}),
        (nemotron, {"dlm_paradigm": "autoregressive"}),
        (nemotron, {"dlm_paradigm": "block_diff"}),
        (llada_moe, {"block_size": 32}),
        (llada_moe, {"norm_topk_prob": True}),
        (llada_moe, {"routed_scaling_factor": 2.5}),
        (llada_moe, {"moe_layer_freq": [0, 1]}),
        (llada_moe, {"shared_expert_intermediate_size": 20}),
        (llada2, {"bd_size": 16}),
    ],
)
def test_fields_that_change_arithmetic_are_refused_by_name(tmp_path, make, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"config\.json: {name}="):
        load_dllm(make(tmp_path / "checkpoint", **fields), shift=0, block=0)


def test_fields_that_are_off_are_not(tmp_path):
    off = {"rope_scaling": None, "block_size": None, "dlm_loss_weight": 0, "auto_map": {}}
    assert load_dllm(open_dllm(tmp_path / "checkpoint", **off), shift=1, block=0).view.shift == 1


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (dream, {"shift": 0}, "shift=0: .* has shift=1"),
        (dream, {"block": 4}, "block=4: .* has block=0"),
        (sdar, {"shift": 1}, "shift=1: .* has shift=0"),
        (llada_moe, {"block": 32}, "block=32: .* has block=0"),
        (bert, {"shift": 1}, "shift=1: .* has shift=0"),
        (open_dllm, {"shift": 2, "block": 0}, "shift=2: need True or False"),
        (open_dllm, {"shift": 1, "block": -1}, "block=-1: need a whole number"),
        (open_dllm, {"unused": "("}, r"unused='\(' is not valid: give a regular expression"),
        (open_dllm, {"unused": 3}, "unused=3 is not valid"),
    ],
)
def test_a_shift_that_a_family_does_not_have_is_refused(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        load_dllm(make(tmp_path / "checkpoint"), **options)


def test_further_heads_are_named_before_they_are_left_out(tmp_path):
    plain, more = sdar(tmp_path / "plain"), sdar(tmp_path / "more")
    rewrite(more, lambda weights: weights.update({"value_head.weight": torch.ones(1, 32)}))
    with pytest.raises(ValueError, match="unexpected keys: value_head.weight; .*unused=PATTERN"):
        load_dllm(more)
    with pytest.raises(ValueError, match="unexpected keys: value_head.weight"):
        load_dllm(more, unused="^other_head")
    one, other = load_dllm(plain), load_dllm(more, unused=r"^value_head\.")
    assert torch.equal(one.predict(*padded(one)).confidence, other.predict(*padded(other)).confidence)
    rewrite(more, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="missing keys: model.norm.weight"):
        load_dllm(more, unused=".*")


def test_architectures_come_before_the_model_type(tmp_path, monkeypatch):
    from dllm_gym.models import load as loading

    folder = llada_moe(tmp_path / "moe")
    raw = json.loads((folder / "config.json").read_text())
    assert loading.family(raw) is loading.llada_moe.load
    assert loading.family(raw | {"architectures": ["LLaDAModelLM"]}) is loading.llada.load
    assert loading.family({"model_type": "llada"}) is loading.family({"model_type": "llada", "architectures": None})
    assert loading.family({"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]})
    with pytest.raises(ValueError, match="model_type='llama' in config.json is not a supported dLLM family"):
        loading.family({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))
    loading.register("OwnModelLM", loading.dream.load)
    assert loading.family(raw | {"architectures": ["OwnModelLM"]}) is loading.dream.load


def knows_unknown(folder: Path, named: bool) -> None:
    """A token of the vocabulary (``z``) becomes the one for what the vocabulary lacks."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["unk_token"] = "z"
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"unk_token": "z"} if named else {})))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_of_unknown_tokens_is_refused(tmp_path, named, template):
    folder = sdar(tmp_path / "checkpoint")
    knows_unknown(folder, named)
    dllm = load_dllm(folder)
    dllm.tokenizer.chat_template = "a {{ messages[0].content }} b " if template else None
    assert dllm.tokenizer.decode(dllm.encode("xyz")) == ("a xyz b " if template else "xyz")  # the token's own text
    for text in ("abc \u2603", "\u2603", "x\u00e9z"):
        with pytest.raises(ValueError, match=r"tokenizer has no tokens for .* in the prompt '.*"):
            dllm.encode(text)
    with pytest.raises(ValueError, match="tokenizer has no tokens"):
        dllm.encode(Chat((("user", "abc"),), prefill="\u2603"))


def test_a_template_of_a_task_has_no_unknown_tokens_either(tmp_path):
    folder = sdar(tmp_path / "checkpoint")
    knows_unknown(folder, named=True)
    with pytest.raises(ValueError, match="tokenizer has no tokens"):
        load_dllm(folder).spelling.plain("ab\u2603")


# ---------------------------------------------------------------------------------------------------- blocks


def own_generation(logits_of: Callable, dllm: DLLM, prompt: list[int], length: int, block: int) -> tuple:
    """What block-causal dLLMs' own code writes: masks up to a whole block, blocks from position 0, of each block after
    the other all tokens surer than 0.3, or the surest. The tokens in whole blocks of prompt and completion, the steps.
    """
    tokens = prompt + [dllm.mask_id] * (-(-(len(prompt) + length) // block) * block - len(prompt))
    whole, steps = (len(prompt) + length) // block, 0
    for end in range(len(prompt) // block * block + block, whole * block + 1, block):
        while dllm.mask_id in tokens[:end]:
            logits = logits_of(tokens[:end])
            logits[:, list(dllm.forbidden_ids)] = -torch.inf
            sure, token = logits.softmax(-1).max(-1)
            masked = torch.tensor(tokens[:end]) == dllm.mask_id
            chosen = masked & ((sure > 0.3) | (sure == sure[masked].max()))
            for i in chosen.nonzero()[:, 0].tolist():
                tokens[i] = int(token[i])
            steps += 1
    return tokens[len(prompt) : whole * block], steps


class Letters(ProceduralTask):
    """Prompts of 0 to 17 letters."""

    name, gen_length = "letters", 40

    def generate(self, rng):
        return {"letters": "".join(rng.choice("abcdefgh") for _ in range(rng.randint(0, 17)))}

    def prompt(self, example):
        return example["letters"]

    def grade(self, example, completion):
        return 0.0

    def solution(self, example):
        return ""


BLOCKED = {"LLaDA2": Case(llada2, block=32), "Fast-dLLM v2": CASES["Fast-dLLM v2"], "SDAR": CASES["SDAR"]}
BLOCKED |= {"Stable-DiffCoder": CASES["Stable-DiffCoder"]}


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("family", BLOCKED)
def test_block_causal_dllms_decode_as_their_own_code_does(tmp_path, family, cache):
    case = BLOCKED[family]
    folder = case.make(tmp_path / "checkpoint", max_position_embeddings=100)
    dllm, L = load_dllm(folder, chat_template=False), 72 if case.block == 32 else 40
    weights, raw = read(folder)
    task = Letters(sizes={"train": 18, "validation": 1, "test": 1})
    env = gym.make("DLLMUnmask-v0", model=dllm, task=task, gen_length=L, block_length=case.block, cache=cache)
    lengths = set()
    for example in range(18):
        observation, info = env.reset(options={"examples": example})
        steps = []
        while "episode" not in info:
            legal = observation["action_mask"] == 1
            sure = observation["confidence"][:, 0] * legal
            steps.append(legal.nonzero()[0])
            observation, *_, info = env.step((sure > 0.3) | (legal & (sure == sure.max())))
        prompt = dllm.encode(task.prompt(task.examples("train")[example]))

        def logits_of(tokens: list[int]) -> Tensor:
            return llada2_forward(weights, raw, tokens) if family == "LLaDA2" else case.logits(weights, raw, tokens)

        expected, nfe = own_generation(logits_of, dllm, prompt, L, case.block)
        assert env.unwrapped.core.tokens[0, -L:][: len(expected)].tolist() == expected
        assert sum(int(where.max()) < len(expected) for where in steps) == nfe
        lengths.add(len(prompt))
    assert len(lengths) > 8


def test_blocks_are_counted_from_where_it_is_asked(tmp_path):
    dllm = load_dllm(sdar(tmp_path / "checkpoint"), chat_template=False)
    task = Letters(sizes={"train": 30, "validation": 1, "test": 1})
    texts = [task.prompt(example) for example in task.examples("train")]
    example = next(i for i, text in enumerate(texts) if len(text) % 4 == 3)

    def legal(**settings) -> list[int]:
        env = gym.make("DLLMUnmask-v0", model=dllm, task=task, **settings)
        return env.reset(options={"examples": example})[0]["action_mask"].nonzero()[0].tolist()

    assert legal(block_length=4) == legal(block_length=4, block_origin="prompt") == [0]
    assert legal(block_length=4, block_origin="completion") == [0, 1, 2, 3]
    assert legal() == list(range(40))  # no blocks
    assert len(legal(block_length=12)) == 12 - len(texts[example]) % 12  # BL need not divide L
    two_way = gym.make("DLLMUnmask-v0", task="arithmetic", block_length=12)
    assert two_way.reset(seed=0)[0]["action_mask"].sum() == 12
    with pytest.raises(ValueError, match="block_length=12 does not divide gen_length=40"):
        legal(block_length=12, block_origin="completion")
    with pytest.raises(ValueError, match="block_origin='row' is not known: choose one of completion, prompt"):
        legal(block_length=4, block_origin="row")


def test_lanes_with_shorter_first_blocks_decode_as_alone(tmp_path):
    dllm = load_dllm(sdar(tmp_path / "checkpoint"), chat_template=False)
    task = Letters(sizes={"train": 18, "validation": 1, "test": 1})
    settings = {"model": dllm, "task": task, "block_length": 8, "lookahead": False}
    envs, env = gym.make_vec("DLLMUnmask-v0", num_envs=6, **settings), gym.make("DLLMUnmask-v0", **settings)
    together, _ = envs.reset(options={"examples": list(range(6))})
    for _ in range(10):
        together, *_ = envs.step(together["action_mask"])  # block after block, each at once
    for lane in range(6):
        alone, info = env.reset(options={"examples": lane})
        while "episode" not in info:
            alone, *_, info = env.step(alone["action_mask"])
        assert env.unwrapped.last_completion() == envs.unwrapped.core.completions[lane]
