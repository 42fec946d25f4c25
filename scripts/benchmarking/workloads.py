"""What the benchmark decodes: a dLLM and prompts, real ones, or a random dLLM of any size and random prompts."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hydra
import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM

from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import DLLM
from dllm_gym.models.families.llada import REQUIRED, llama_config
from dllm_gym.models.load import check_dtype
from dllm_gym.models.vocabulary import Vocabulary
from dllm_gym.tasks import Example, Task


class Numbers:
    """A tokenizer whose texts are the numbers of the tokens: nothing is lost on the way there and back."""

    chat_template = mask_token_id = eos_token_id = pad_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # none has a meaning that a text could spell

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, **_: bool) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


class RandomLLaDA(DLLM):
    """LLaDA's architecture with random weights, made on the device; its texts are the numbers of their tokens.

    Weights are drawn so that activations keep a variance of about 1 at any width: what a position predicts then depends
    on what is around it. EOS (and padding) is token 0, the mask token 1.

    Args:
        device: where the weights are made. dtype: of the weights.
        logit_std: standard deviation of the logits. Beyond sqrt(2 log V) (4.8 for LLaDA's vocabulary) some positions
            are sure and others are not, as in a trained model; far below it none is.
        seed: of the weights.
        sizes: the fields of LLaDA's config.json: ``embedding_size`` (V), ``d_model``, ``n_layers``, ``n_heads``,
            ``mlp_hidden_size``, and ``max_sequence_length``.
        compile: see :meth:`~dllm_gym.models.DLLM.compile`.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        dtype: str = "float32",
        logit_std: float = 1.0,
        seed: int = 0,
        compile: bool = False,
        **sizes: int,
    ):
        config = llama_config({**REQUIRED, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, **sizes})
        config.initializer_range = config.hidden_size**-0.5
        device = torch.device(device)
        with device, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network: Any = AutoModelForCausalLM.from_config(config, dtype=check_dtype(dtype))
        network.lm_head.weight.data.mul_(logit_std)
        ids = {"mask_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
        super().__init__(network.model, network.lm_head, Numbers(), ids)
        if compile:
            self.compile()

    def decode(self, tokens: Sequence[int]) -> str:
        """All of them: those behind an EOS and those still masked, too."""
        return self.tokenizer.decode(tokens)


def with_vocabulary(dllm: DLLM, size: int) -> DLLM:
    """The same backbone under a random head over another number of tokens."""
    other = copy.copy(dllm)
    other.lm_head = nn.Linear(dllm.hidden_size, size, bias=False, device=dllm.device, dtype=dllm.dtype)
    other.lm_head.requires_grad_(False)
    other.vocab_size, other.vocabulary = size, Vocabulary(other.lm_head, size, dllm.forbidden_ids)
    return other


class RandomPrompts(Task):
    """Prompts of random tokens for :class:`RandomLLaDA`; there is nothing to grade.

    Args:
        count: examples of every split. shortest, longest: tokens of a prompt, evenly distributed.
        vocabulary: V. gen_length: L. seed: of the prompts.
    """

    name = "random_prompts"

    def __init__(
        self, *, count: int, shortest: int, longest: int, vocabulary: int, gen_length: int = 64, seed: int = 0
    ):
        self.gen_length = gen_length
        rng = random.Random(seed)
        lengths = [rng.randint(shortest, longest) for _ in range(count)]
        tokens = [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]  # neither EOS nor mask
        self._examples = Dataset.from_list([{"prompt": " ".join(map(str, numbers))} for numbers in tokens])

    def examples(self, split: str) -> Dataset:
        return self._examples

    def prompt(self, example: Example) -> str:
        return example["prompt"]

    def grade(self, example: Example, completion: str) -> float:
        return 0.0


@dataclass
class Workload:
    """What is decoded, and by which dLLM.

    Attributes:
        settings: of the environment. num_envs: lanes, and rows in a batch of the plain loop.
        examples: an index per episode; a group is an example listed repeatedly.
        limit_tokens: most tokens in one forward of the limit; None: no more than ``num_envs`` rows.
    """

    name: str
    dllm: DLLM
    task: Task
    settings: dict[str, Any]
    num_envs: int
    examples: list[int]
    limit_tokens: int | None

    @classmethod
    def of(cls, name: str, cfg: DictConfig, device: torch.device) -> Workload:
        """The workload of that name in a configuration."""
        own = OmegaConf.to_container(cfg.workloads[name], resolve=True)
        model = {"_target_": "dllm_gym.models.load_dllm", **own["model"], "device": device}
        dllm, task = (hydra.utils.instantiate(part, _convert_="all") for part in (model, own["task"]))
        examples = np.repeat(np.arange(own["prompts"]), own["group_size"]).tolist()
        return cls(name, dllm, task, {**own["env"], **cfg.reward}, own["num_envs"], examples, own["limit_tokens"])

    def envs(self, **settings: Any) -> DLLMUnmaskVectorEnv:
        """A new environment, which has predicted nothing yet."""
        return DLLMUnmaskVectorEnv(self.num_envs, model=self.dllm, task=self.task, **{**self.settings, **settings})

    def prompts(self, examples: Sequence[int]) -> list[list[int]]:
        """The tokens of these examples' prompts."""
        rows = self.envs().core.examples
        return [self.dllm.encode(self.task.prompt(rows[i])) for i in examples]
