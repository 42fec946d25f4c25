"""A dLLM of two positions whose rules are written down, to see whether an algorithm learns the order."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from datasets import Dataset
from torch import nn

from dllm_gym.models import DLLM, load_dllm
from dllm_gym.tasks import ProceduralTask, Task

RIGHT, WRONG = "12", "21"


class OrderedPair(nn.Module):
    """Hidden states that are the logits: position 1 is always right; position 0 only once position 1 is committed.

    Position 0 is the surer one, so that every rule on confidence takes it first, and errs.
    """

    def __init__(self, vocabulary: dict[str, int], mask_id: int):
        super().__init__()
        self.one, self.two, self.mask_id = vocabulary["1"], vocabulary["2"], mask_id
        size = len(vocabulary)
        self.config = SimpleNamespace(vocab_size=size, hidden_size=size, max_position_embeddings=128)
        self.register_parameter("device_holder", nn.Parameter(torch.zeros(1)))

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        second_is_masked = input_ids[:, -1] == self.mask_id
        first = torch.where(second_is_masked, self.two, self.one)
        logits[torch.arange(len(logits)), -2, first] = 6.0
        logits[:, -1, self.two] = 3.0
        return SimpleNamespace(last_hidden_state=logits)


class PairTask(Task):
    """Write "12"."""

    name = "pair"
    gen_length = 2

    def examples(self, split):
        return Dataset.from_list([{"prompt": "="}])

    def prompt(self, example):
        return example["prompt"]

    def grade(self, example, completion):
        return float(completion == RIGHT)


def pair_dllm() -> DLLM:
    tiny = load_dllm("tiny")
    vocabulary = tiny.tokenizer.get_vocab()
    head = nn.Linear(len(vocabulary), len(vocabulary), bias=False)
    nn.init.eye_(head.weight)
    return DLLM(OrderedPair(vocabulary, tiny.mask_id), head, tiny.tokenizer, tiny.config)


def act(core, action):
    """A step of the process: commit an action, and wait for what it did."""
    core.commit(action)
    return core.settle()


class Sums(ProceduralTask):
    """Fill the blanks of ``a+b=c;`` sums: nothing in the prompt, which ones are given is the template's matter.

    Example fields: ``text`` (the solution), ``blanks`` (positions that are masked).
    """

    name = "sums"
    gen_length = 24

    def generate(self, rng):
        sums = [(rng.randint(0, 4), rng.randint(0, 5)) for _ in range(rng.randint(1, 3))]
        text = ";".join(f"{a}+{b}={a + b}" for a, b in sums)
        return {"text": text, "blanks": sorted(rng.sample(range(len(text)), rng.randint(1, len(text) - 1)))}

    def prompt(self, example):
        return ""

    def key(self, example):
        return str(self.template(example))

    def template(self, example):
        pieces = []
        for i, letter in enumerate(example["text"]):
            pieces.append(1 if i in example["blanks"] else letter)
        return pieces

    def solution(self, example):
        return example["text"]

    def grade(self, example, completion):
        pairs = zip(example["text"], completion, strict=False)
        return sum(a == b for a, b in pairs) / len(example["text"])
