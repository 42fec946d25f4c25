"""Shared fixtures: the shipped dLLM, tiny random checkpoints, a task with prompts of mixed lengths."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait sleep, other programs run as well

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from dllm_gym import tasks
from dllm_gym.models import DLLM, load, load_dllm
from dllm_gym.models.families.llada import REQUIRED, llada_weights, llama_config
from dllm_gym.tasks import Arithmetic

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A command that a test ran may have asked for more."""
    yield
    torch.set_num_threads(1)


class MixedLengths(Arithmetic):
    """Arithmetic without the blanks that make all prompts equally long."""

    name = "mixed_lengths"

    def prompt(self, example):
        return super().prompt(example).rstrip()


@pytest.fixture
def mixed_task() -> MixedLengths:
    return MixedLengths(sizes={"train": 200, "validation": 10, "test": 200})


@pytest.fixture(scope="session")
def tiny() -> DLLM:
    return load_dllm("tiny")


def llada_fields(**changes) -> dict:
    """A small config.json in LLaDA's own words, with grouped-query attention."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48, "rope_theta": 500.0}
    ids = {"mask_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    other = {"max_sequence_length": 96, "rms_norm_eps": 1e-5, "vocab_size": 20, "embedding_size": 20}
    return {"model_type": "llada", "weight_tying": False, **REQUIRED, **sizes, **ids, **other, **changes}


@pytest.fixture
def checkpoint(tmp_path, tiny) -> Path:
    """A random checkpoint in LLaDA's format, with the shipped tokenizer."""
    torch.manual_seed(0)
    raw = llada_fields()
    model = LlamaForCausalLM(llama_config(raw))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "llada"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(llada_weights(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def registered(monkeypatch):
    """What the programs in examples/ register is gone after the test, and so are they."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(load, "FAMILIES", dict(load.FAMILIES))
    yield
    for path in (Path(__file__).parents[1] / "examples").glob("*.py"):
        sys.modules.pop(path.stem, None)
