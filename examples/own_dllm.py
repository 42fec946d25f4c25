"""A dLLM family of your own, run on the weights of the shipped one: python examples/own_dllm.py

The family here keeps its checkpoints as transformers' Llama does, with attention in both directions. To have one, the
example writes the weights of ``tiny`` in that layout; both then decode the same tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import gymnasium as gym
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dllm_gym.models
from dllm_gym.models import DLLM, load_dllm
from dllm_gym.models.checkpoint import Checkpoint


def load_two_way_llama(checkpoint: Checkpoint) -> DLLM:
    config = LlamaConfig(**checkpoint.config)
    config.is_causal = False
    network = checkpoint.weights(LlamaForCausalLM, config)
    return DLLM(network.model, network.lm_head, checkpoint.tokenizer(), checkpoint.config)


dllm_gym.models.register("two_way_llama", load_two_way_llama)  # by model_type of config.json


def write_checkpoint(folder: Path) -> Path:
    """The weights of ``tiny`` as a checkpoint of the family."""
    tiny = load_dllm("tiny")
    ids = {"mask_token_id": tiny.mask_id, "eos_token_id": tiny.eos_id, "pad_token_id": tiny.pad_id}
    config = {**tiny.backbone.config.to_dict(), **ids, "model_type": "two_way_llama"}
    weights = {f"model.{name}": value for name, value in tiny.backbone.state_dict().items()}
    weights["lm_head.weight"] = tiny.lm_head.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer.save_pretrained(folder)
    return folder


def play(model: str | Path) -> tuple[str, dict]:
    """The completion of one puzzle and how the episode ended."""
    env = gym.make("DLLMUnmask-v0", model=str(model))
    observation, info = env.reset(options={"examples": 9})
    while "episode" not in info:
        sure = observation["confidence"][:, 0] * observation["action_mask"]
        observation, reward, terminated, truncated, info = env.step(sure >= min(0.9, sure.max()))
    return env.unwrapped.last_completion(), info["episode"]


def main() -> list[tuple[str, dict]]:
    with tempfile.TemporaryDirectory() as folder:
        played = [play("tiny"), play(write_checkpoint(Path(folder) / "mine"))]
    for name, (text, episode) in zip(("tiny", "own"), played, strict=True):
        print(f"{name}: {text!r} {episode}")
    return played


if __name__ == "__main__":
    main()
