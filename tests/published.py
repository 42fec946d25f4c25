"""LUP's published network from its description: weights under the authors' names, and a forward without any module."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, layer_norm, silu


def random_weights(sizes):
    """Weights and biases (of a pair of sizes: out, in) and embeddings (in brackets), none of them zero."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, (out, into) in sizes.items():
        shape = (out,) if into is None else (out, into)
        weights[f"base_policy.{name}.weight"] = float(into is None) + 0.3 * torch.randn(shape, generator=generator)
        if "embedding" not in name:
            weights[f"base_policy.{name}.bias"] = 0.3 * torch.randn(out, generator=generator)
    return weights


def condition_sizes(d, time_embed_dim):
    return {"time_mlp.0": (d, time_embed_dim), "time_mlp.2": (d, d), "mask_embedding": (2, d), "output_proj": (1, d)}


def confidence_checkpoint(width=128, ffn=512, heads=2, top_k=1, num_blocks=1, time_embed_dim=128, time_period=1.0):
    """``dit_confidence`` of these sizes under the authors' names; None stands for a layer norm."""
    d, sizes = width, condition_sizes(width, time_embed_dim)
    sizes |= {"confidence_proj": (d, top_k), "final_norm": (d, None)}
    for i in range(num_blocks):
        block = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (d, d))
        block |= {"linear1": (ffn, d), "linear2": (d, ffn), "ada_conditioning": (6 * d, d)}
        block |= {"norm1": (d, None), "norm2": (d, None)}
        sizes |= {f"transformer_blocks.{i}.{name}": size for name, size in block.items()}
    turns = 1.0 / (10_000 ** (torch.arange(0, d // heads, 2).float() / (d // heads)))
    buffers = {f"base_policy.transformer_blocks.{i}.inv_freq": turns.clone() for i in range(num_blocks)}
    return random_weights(sizes) | buffers


def as_doubles(weights):
    w = {name.removeprefix("base_policy."): value.double() for name, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    return w, linear, norm


def condition_of(w, linear, obs, time_period):
    dim = w["time_mlp.0.weight"].shape[1]
    half = dim // 2
    angle = obs["time"] * torch.exp(-math.log(time_period) * torch.arange(half) / half)
    embedded = torch.cat([angle.cos(), angle.sin(), torch.zeros(len(angle), dim % 2)], -1).bfloat16().double()
    time = linear(silu(linear(embedded, "time_mlp.0")), "time_mlp.2")
    return time[:, None] + w["mask_embedding.weight"][obs["mask"].long()]


def plain_forward(weights, obs, time_period=1.0):
    """``dit_confidence`` in float64 as the paper and the authors' names tell it, position by position.

    Rotary positions turn pairs of neighbouring channels as complex numbers.
    """
    w, linear, norm = as_doubles(weights)
    condition = condition_of(w, linear, obs, time_period)
    x = linear(obs["confidence"][..., : w["confidence_proj.weight"].shape[1]].double(), "confidence_proj")
    for i in range(sum(name.endswith("ada_conditioning.bias") for name in w)):
        at = f"transformer_blocks.{i}."
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = linear(condition, at + "ada_conditioning").chunk(6, -1)
        y = norm(x, at + "norm1") * (1 + scale_1) + shift_1
        turn = torch.exp(1j * torch.arange(x.shape[1])[:, None] * w[at + "inv_freq"])  # (L, size / 2)
        size = 2 * turn.shape[1]
        heads = []
        for h in range(x.shape[-1] // size):
            own = slice(h * size, (h + 1) * size)
            q, k = (
                torch.view_as_complex(linear(y, at + name)[..., own].unflatten(-1, (-1, 2)).contiguous()) * turn
                for name in ("q_proj", "k_proj")
            )
            score = torch.einsum("bid,bjd->bij", q, k.conj()).real / size**0.5
            heads.append(score.softmax(-1) @ linear(y, at + "v_proj")[..., own])
        x = x + (1 + gate_1) * linear(torch.cat(heads, -1), at + "out_proj")
        y = norm(x, at + "norm2") * (1 + scale_2) + shift_2
        x = x + (1 + gate_2) * linear(gelu(linear(y, at + "linear1")), at + "linear2")
    return linear(norm(x, "final_norm"), "output_proj").squeeze(-1)
