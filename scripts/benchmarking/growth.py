"""What one prediction step costs in time and memory, and how that grows with rows, length and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log2
from statistics import median
from typing import Any

import torch

from benchmarking.lockstep import left_padded, predict_everything
from benchmarking.meters import peak_bytes, timed
from benchmarking.workloads import with_vocabulary
from dllm_gym.models import DLLM
from dllm_gym.models.vocabulary import Sampling, slice_width


@dataclass(frozen=True)
class Sizes:
    """Of one prediction step: rows of ``prompt`` tokens and ``completion`` masks, and the tokens to choose among."""

    rows: int
    prompt: int
    completion: int
    vocabulary: int

    def doubled(self) -> dict[str, Sizes]:
        names = {"rows": "rows", "L": "completion", "vocabulary": "vocabulary"}
        return {label: replace(self, **{name: 2 * getattr(self, name)}) for label, name in names.items()}


def prediction_step(dllm: DLLM, prompts: list[list[int]], length: int, top_k: int) -> dict[str, Callable[[], Any]]:
    """The first step of rows with these prompts: ours, and the plain loop's, which predicts everything."""
    tokens, attention_mask = left_padded(dllm, prompts, length)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, -length:] = True
    return {
        "ours": lambda: dllm.predict(tokens, attention_mask, where, Sampling(top_k)),
        "full softmax": lambda: predict_everything(dllm, tokens, attention_mask, top_k),
    }


def peak_memory(dllm: DLLM, prompts: list[list[int]], length: int, top_k: int) -> dict[str, int]:
    """Peak bytes of the two steps of :func:`prediction_step`."""
    return {name: peak_bytes(dllm.device, call) for name, call in prediction_step(dllm, prompts, length, top_k).items()}


def growth(dllm: DLLM, sizes: Sizes, repeats: int) -> dict[str, dict[str, float]]:
    """Exponents of a prediction step's time and peak memory when one size is doubled: log2 of the ratio.

    Beside each stands what the arithmetic says: multiplications for the time; for the memory at most in proportion to
    the tokens, and not with a vocabulary that is read in slices.
    """
    before, result = cost(dllm, sizes, repeats), {}
    for name, larger in sizes.doubled().items():
        seconds, peak = cost(dllm, larger, repeats)
        result[name] = {
            "time": log2(seconds / before[0]),
            "multiplications": log2(multiplications(dllm, larger) / multiplications(dllm, sizes)),
            "peak memory": log2(peak / before[1]),
            "at most": 0.0 if name == "vocabulary" and sizes.vocabulary >= slice_width(dllm.device) else 1.0,
        }
    return result


def cost(dllm: DLLM, sizes: Sizes, repeats: int) -> tuple[float, int]:
    """Median seconds and peak bytes of our step."""
    prompts = torch.randint(2, dllm.vocab_size, (sizes.rows, sizes.prompt)).tolist()
    if sizes.vocabulary != dllm.vocab_size:
        dllm = with_vocabulary(dllm, sizes.vocabulary)
    call = prediction_step(dllm, prompts, sizes.completion, 1)["ours"]
    call()  # warm up
    return median(timed(dllm.device, call)[0] for _ in range(repeats)), peak_bytes(dllm.device, call)


def multiplications(dllm: DLLM, sizes: Sizes) -> float:
    """Of a prediction step: the linear layers of the backbone, attention, and the head at the masked positions."""
    backbone, tokens = dllm.backbone, sizes.prompt + sizes.completion
    embedding = backbone.get_input_embeddings().weight.numel()
    linear = sum(parameter.numel() for parameter in backbone.parameters()) - embedding
    attention = 2 * backbone.config.num_hidden_layers * dllm.hidden_size * tokens
    return sizes.rows * (tokens * (linear + attention) + sizes.completion * dllm.hidden_size * sizes.vocabulary)
