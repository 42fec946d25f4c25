"""Keys and values kept between steps, against a forward written here that takes frozen ones from its own list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llada_fields
from safetensors.torch import save_file
from test_decoder_families import fast_dllm
from test_families import attend, bert, dream, everything, llada2, qwen, rms, rope
from torch import Tensor
from torch.nn.functional import silu
from toys import pair_dllm
from transformers import LlamaForCausalLM

from dllm_gym.models import DLLM, load_dllm
from dllm_gym.models.cache import BlockCache
from dllm_gym.models.families.llada import llada_weights, llama_config

L, BL = 12, 4  # of the completions here


def llada(folder: Path, **changes) -> Path:
    """A random checkpoint in LLaDA's format, with the shipped tokenizer."""
    torch.manual_seed(0)
    raw = llada_fields(**changes)
    model = LlamaForCausalLM(llama_config(raw))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(llada_weights(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    load_dllm("tiny").tokenizer.save_pretrained(folder)
    return folder


TWO_WAY = {
    "llada": lambda folder, layers=2: llada(folder, n_layers=layers),
    "dream": lambda folder, layers=2: dream(folder, num_hidden_layers=layers),
    "qwen2": lambda folder, layers=2: qwen(folder, "qwen2", num_hidden_layers=layers),
    "qwen3": lambda folder, layers=2: qwen(folder, "qwen3", num_hidden_layers=layers),
}
# Lane after lane the lengths of the prompts of its episodes: shorter and longer ones follow each other, one is empty.
PROMPTS = [[3, 9], [7, 1, 5], [0, 14], [5, 5]]
LONG_PROMPTS = [[3, 40, 33], [32, 1], [0, 70], [55, 29]]


@dataclass
class Call:
    """One call of ``encode``, its arguments and what came back."""

    lanes: np.ndarray
    rows: list[list[int]]  # each lane's prompt and completion, without padding
    tokens: Tensor
    attention_mask: Tensor
    block: np.ndarray
    new: list[bool]  # the lane's first call of the episode
    hidden: Tensor  # [b, L, d], nan where nothing was returned
    padding: int
    computed: int


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def encode(cache: BlockCache, lanes: np.ndarray, rows: list[list[int]], new: list[bool]) -> Call:
    mask = cache.dllm.mask_id
    block = np.array([row[-cache.L :].index(mask) // cache.block_length for row in rows])
    tokens, attention_mask = left_padded(rows, cache.dllm.pad_id)
    encoded = cache.encode(lanes, tokens, attention_mask.sum(1).numpy(), block)
    assert sorted(row for part in encoded for row in part.rows) == list(range(len(rows)))
    hidden = torch.full((len(rows), cache.L, cache.dllm.hidden_size), torch.nan)
    for part in encoded:
        for row, columns, states in zip(part.rows, part.columns, part.hidden, strict=True):
            where = columns[columns >= 0]
            assert len(where.unique()) == len(where)
            hidden[row, where] = states[columns >= 0].float()
    padding, computed = sum(part.padding for part in encoded), sum(part.columns.numel() for part in encoded)
    return Call(lanes, rows, tokens, attention_mask, block, new, hidden, padding, computed)


def decoding(cache: BlockCache, prompts: list[list[int]], seed: int = 0) -> Iterator[Call]:
    """Episodes of random tokens in lanes that each have their own pace, until every lane has had its prompts."""
    rng = np.random.default_rng(seed)
    mask = cache.dllm.mask_id
    allowed = [t for t in range(5, 20) if t not in (mask, cache.dllm.pad_id)]
    todo = [[list(rng.choice(allowed, n)) for n in lengths] for lengths in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    new = [False] * len(prompts)
    while True:
        for lane, row in enumerate(rows):
            if mask not in row and todo[lane]:
                rows[lane], new[lane] = todo[lane].pop(0) + [mask] * cache.L, True
                cache.forget(np.array([lane]))
        running = [lane for lane, row in enumerate(rows) if mask in row]
        if not running:
            return
        lanes = rng.permutation(running)[: rng.integers(1, len(running) + 1)]
        yield encode(cache, lanes, [list(rows[lane]) for lane in lanes], [new[lane] for lane in lanes])
        for lane in lanes:
            new[lane] = False
            start = rows[lane].index(mask)
            block = (start - len(rows[lane]) + cache.L) // cache.block_length
            end = len(rows[lane]) - cache.L + (block + 1) * cache.block_length
            masked = [i for i in range(start, end) if rows[lane][i] == mask]
            for i in rng.permutation(masked)[: rng.integers(1, max(3, cache.block_length // 4))]:
                rows[lane][i] = int(rng.choice(allowed))


def plain(dllm: DLLM, call: Call) -> Tensor:
    """Hidden states [b, L, d] without a cache."""
    return dllm.hidden_states(call.tokens, call.attention_mask)[:, -call.hidden.shape[1] :].float()


def returned(call: Call) -> Tensor:
    return ~call.hidden[..., 0].isnan()  # (b, L)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- the reference


def frozen_forward(
    dllm: DLLM, tokens: list[int], stored: list[tuple[Tensor, Tensor]], fresh: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Llama, Qwen2 or Qwen3 in float64 on one row of T tokens.

    Keys and values of a position are its own where ``fresh`` (bool [T]), else those of ``stored`` (per layer).
    Hidden states [T, d] mean something where fresh; the keys and values that were used come back, too.
    """
    w = {name: value.double() for name, value in dllm.backbone.state_dict().items()}
    config, T = dllm.backbone.config, len(tokens)
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    counts = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    x, used = w["embed_tokens.weight"][tokens], []
    for i in range(config.num_hidden_layers):
        b = f"layers.{i}."
        h, heads = rms(x, w[b + "input_layernorm.weight"], eps), {}
        for n, count in counts.items():
            out = h @ w[f"{b}self_attn.{n}_proj.weight"].T + w.get(f"{b}self_attn.{n}_proj.bias", 0)
            heads[n] = out.view(T, count, -1).transpose(0, 1)
            if f"{b}self_attn.{n}_norm.weight" in w:
                heads[n] = rms(heads[n], w[f"{b}self_attn.{n}_norm.weight"], eps)
        q, k, v = rope(heads["q"], theta), rope(heads["k"], theta), heads["v"]
        if stored:
            k, v = (torch.where(fresh[:, None], new, old) for new, old in zip((k, v), stored[i], strict=True))
        used.append((k, v))
        x = x + attend(q, k, v, everything(T)) @ w[b + "self_attn.o_proj.weight"].T
        h = rms(x, w[b + "post_attention_layernorm.weight"], eps)
        gate, up = h @ w[b + "mlp.gate_proj.weight"].T, h @ w[b + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[b + "mlp.down_proj.weight"].T
    return rms(x, w["norm.weight"], eps), used


class Reference:
    """Fast-dLLM on one lane, position by position."""

    def __init__(self, dllm: DLLM, kind: str):
        self.dllm, self.kind, self.shift = dllm, kind, dllm.view.shift if hasattr(dllm, "view") else 0
        self.block = -1
        self.stored: list[tuple[Tensor, Tensor]] = []

    def encode(self, row: list[int], block: int, new: bool) -> Tensor:
        """Hidden states [L, d] that predict the completion, nan outside the window."""
        T, prompt = len(row), len(row) - L
        fresh = torch.ones(T, dtype=torch.bool)
        if not new and block == self.block:
            begin, end = prompt + block * BL - self.shift, prompt + (block + 1) * BL if self.kind == "dual" else T
            fresh = torch.tensor([begin <= i < end for i in range(T)])
        self.block = block
        refresh = bool(fresh.all())
        hidden, self.stored = frozen_forward(self.dllm, row, [] if refresh else self.stored, fresh)
        said_by = [max(0, prompt + j - self.shift) for j in range(L)]  # which position predicts token j
        return torch.stack([hidden[i] if fresh[i] else torch.full_like(hidden[i], torch.nan) for i in said_by]).float()


# ---------------------------------------------------------------------------------------------------- two-way models


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", TWO_WAY)
def test_windows_attend_to_what_the_refresh_of_their_lane_left(tmp_path, family, kind):
    dllm = load_dllm(TWO_WAY[family](tmp_path / "checkpoint"))
    cache = BlockCache(dllm, kind, len(PROMPTS), L, BL)
    references = [Reference(dllm, kind) for _ in PROMPTS]
    windows, apart = 0, 0.0
    for call in decoding(cache, PROMPTS):
        blocks, lanes = call.block, call.lanes
        expected = [references[n].encode(*row) for n, *row in zip(lanes, call.rows, blocks, call.new, strict=True)]
        close(call.hidden, torch.stack(expected))
        windows += int((~returned(call).all(1)).sum())
        apart = max(apart, float((call.hidden - plain(dllm, call)).nan_to_num(0).abs().max()))
    assert windows > 20 and apart > 0.01  # what is frozen matters
    assert not cache.exact


@pytest.mark.parametrize("family", TWO_WAY)
def test_a_refresh_is_the_plain_forward(tmp_path, family):
    dllm = load_dllm(TWO_WAY[family](tmp_path / "checkpoint"))
    cache = BlockCache(dllm, "dual", len(PROMPTS), L, BL)
    before = np.full(len(PROMPTS), -1)
    refreshed = 0
    for call in decoding(cache, PROMPTS):
        whole = np.array(call.new) | (before[call.lanes] != call.block)
        assert torch.equal(returned(call).all(1), torch.from_numpy(whole))
        close(call.hidden[whole], plain(dllm, call)[whole])
        before[call.lanes] = call.block
        refreshed += whole.sum()
    assert refreshed == sum(map(len, PROMPTS)) * L // BL  # once per block of an episode


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", TWO_WAY)
def test_with_one_layer_nothing_is_lost(tmp_path, family, kind):
    """Keys and values of the first layer depend on their own token only."""
    dllm = load_dllm(TWO_WAY[family](tmp_path / "checkpoint", layers=1))
    for call in decoding(BlockCache(dllm, kind, len(PROMPTS), L, BL), PROMPTS):
        there = returned(call)
        assert all(there[i, b * BL : (b + 1) * BL].all() for i, b in enumerate(call.block))
        close(call.hidden[there], plain(dllm, call)[there])


def test_one_block_freezes_the_prompt_only(tmp_path):
    dllm = load_dllm(llada(tmp_path / "checkpoint"))
    caches = [BlockCache(dllm, kind, 1, L, L) for kind in ("prefix", "dual")]
    for prefix, dual in zip(*(decoding(cache, [[6]]) for cache in caches), strict=True):
        assert returned(prefix).all()
        close(prefix.hidden, dual.hidden)
    assert prefix.computed == L < len(prefix.rows[0])


# ---------------------------------------------------------------------------------------------------- block-causal ones


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize(("length", "block_length"), [(64, 32), (48, 12), (40, 40)])
@pytest.mark.parametrize("family", [llada2, fast_dllm])  # without and with a shift
def test_block_causal_windows_are_exact(tmp_path, family, kind, length, block_length):
    dllm = load_dllm(family(tmp_path / "checkpoint", max_position_embeddings=160))
    cache = BlockCache(dllm, kind, len(LONG_PROMPTS), length, block_length)
    assert cache.exact
    savings = []
    for call in decoding(cache, LONG_PROMPTS):
        there = returned(call)
        for i, b in enumerate(call.block):
            assert there[i, b * block_length : (b + 1) * block_length if kind == "dual" else length].all()
        close(call.hidden[there], plain(dllm, call)[there])
        savings.append(1 - (call.computed - call.padding) / sum(map(len, call.rows)))
    assert np.mean(savings) > 0.1


# ---------------------------------------------------------------------------------------------------- lanes


@pytest.mark.parametrize("family", [*TWO_WAY, "llada2"])
def test_a_lane_gives_the_same_in_any_company(tmp_path, family):
    dllm = load_dllm({**TWO_WAY, "llada2": llada2}[family](tmp_path / "checkpoint"))
    together = BlockCache(dllm, "prefix", len(PROMPTS), L, BL)
    alone = [BlockCache(dllm, "prefix", 1, L, BL) for _ in PROMPTS]
    for call in decoding(together, PROMPTS):
        for i, lane in enumerate(call.lanes):
            if call.new[i]:
                alone[lane].forget(np.array([0]))
            one = encode(alone[lane], np.array([0]), [call.rows[i]], [call.new[i]])
            torch.testing.assert_close(one.hidden[0], call.hidden[i], atol=2e-5, rtol=1e-5, equal_nan=True)


def test_the_store_grows_with_the_longest_prompt_and_is_counted(tmp_path):
    dllm = load_dllm(llada(tmp_path / "checkpoint"))
    cache = BlockCache(dllm, "dual", 2, L, BL)
    assert cache.bytes_per_lane == 0
    for width in (L + 3, L + 7):
        encode(cache, np.array([0]), [[5] * (width - L) + [1] * L], [True])
        cache.forget(np.array([0]))
        assert cache.bytes_per_lane == 2 * 2 * width * 2 * 8 * 4  # keys, values; layers, W, heads, size, bytes


@pytest.mark.parametrize("rope_float32", [False, True])
def test_half_precision_stores_half_precision(tmp_path, rope_float32):
    dllm = load_dllm(llada(tmp_path / "checkpoint", n_layers=1), dtype="bfloat16", rope_float32=rope_float32)
    cache = BlockCache(dllm, "prefix", len(PROMPTS), L, BL)
    for call in decoding(cache, PROMPTS):
        there = returned(call)
        torch.testing.assert_close(call.hidden[there], plain(dllm, call)[there], atol=0.05, rtol=0.05)
    assert cache.store[0].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_has_no_cache_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="cache='prefix': a MaskedLM has no keys and values"):
        BlockCache(load_dllm(bert(tmp_path / "bert")), "prefix", 2, L, BL)
    with pytest.raises(ValueError, match="cache='dual': a DLLM has no keys and values"):
        BlockCache(pair_dllm(), "dual", 2, 2, 2)
    with pytest.raises(ValueError, match="cache='suffix' is not valid: choose 'none', 'prefix' or 'dual'"):
        BlockCache(tiny, "suffix", 2, L, BL)


@pytest.mark.parametrize("name", ["hidden_states", "_hidden"])
def test_a_family_that_computes_its_own_hidden_states_must_say_how(tiny, name):
    def flipped(self, tokens, attention_mask):
        return getattr(super(Own, self), name)(tokens, attention_mask).flip(1)

    Own = type("Own", (DLLM,), {name: flipped})

    class Same(DLLM):
        pass

    parts = (tiny.backbone, tiny.lm_head, tiny.tokenizer, tiny.config)
    BlockCache(Same(*parts), "dual", 2, L, BL)
    with pytest.raises(ValueError, match="a Own has no keys and values"):
        BlockCache(Own(*parts), "dual", 2, L, BL)
