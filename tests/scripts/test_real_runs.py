"""The commands for real dLLMs and real tasks, with tiny weights in the families' own formats and local data files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llada_fields
from safetensors.torch import save_file
from test_families import dream
from test_scripts import call, compose_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from dllm_gym.models.families.llada import llada_weights, llama_config

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    """A random LLaDA with room for real prompts, a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("llada")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i + 2 for i, letter in enumerate(letters)} | {"</s>": 0, "<mask>": 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "</s>", "mask_token": "<mask>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    raw = llada_fields(vocab_size=260, embedding_size=260, max_sequence_length=4096)
    model = LlamaForCausalLM(llama_config(raw))
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(llada_weights(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """GSM8K's and MATH's columns, a few rows of our own."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "math"):
        (folder / name).mkdir()
        for split, count in (("train", 12), ("test", 6)):
            rows = [
                {"question": f"{i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i}"}
                if name == "gsm8k"
                else {"problem": f"What is ${i}^2$?", "solution": rf"It is $\boxed{{{i * i}}}$.", "answer": str(i * i)}
                for i in range(count)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


QUICK = ["threads=1", "env.gen_length=16", "evaluation.examples=2", "evaluation.num_envs=2", "evaluation.seeds=[42]"]


def test_evaluation_of_a_real_family_on_a_real_task_runs_end_to_end(llada, data, tmp_path):
    settings = [f"model.model={llada}", "task=gsm8k", f"task.data={data / 'gsm8k'}", "heuristics=threshold"]
    call("evaluate", tmp_path, "model=llada_8b", *settings, *QUICK, "env.block_length=8")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in rows][-1] == "threshold(0.9)" and all(row["examples"] == 2 for row in rows)


def test_an_evaluation_of_a_mixture_tells_its_data_sets_apart(llada, data, tmp_path, capsys):
    files = [f"task.tasks.{n}.data={data / n}" for n in ("gsm8k", "math")]
    quick = [setting for setting in QUICK if "examples" not in setting] + ["evaluation.examples=9"]
    settings = [
        f"model.model={llada}",
        "task=gsm8k_math",
        *files,
        *quick,
        "heuristics=threshold",
        "evaluation.validation=null",
    ]
    call("evaluate", tmp_path, "model=llada_8b", *settings, "evaluation.baseline='threshold(0.9)'")
    rows = json.loads((tmp_path / "datasets.json").read_text())
    whole = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "test"]
    assert {row["dataset"]: row["examples"] for row in rows} == {"gsm8k": 5, "math": 4} and len(rows) == 2 * len(whole)
    for row in rows:
        played = [line for line in lines if line["decider"] == row["name"]]
        own = [line for line in played if ("^2" in str(line["prompt"])) == (row["dataset"] == "math")]
        assert len(own) == row["examples"] and row["nfe"] == pytest.approx(np.mean([line["nfe"] for line in own]))
        assert row["accuracy"] == pytest.approx(np.mean([line["score"] for line in own]))
        assert (row["p_value"] is None) == (row["name"] == "threshold(0.9)")
    for name, row in whole.items():
        parts = [part for part in rows if part["name"] == name]
        assert row["reward"] == pytest.approx(sum(part["examples"] * part["reward"] for part in parts) / 9)
    with (tmp_path / "datasets.csv").open() as file:
        assert [line["dataset"] for line in csv.DictReader(file)] == [row["dataset"] for row in rows]
    assert (tmp_path / "results.md").read_text().count("| math | threshold(0.9) |") == 1
    assert "by data set" in capsys.readouterr().out


def test_before_and_while_it_works_a_command_says_what_it_does(llada, data, tmp_path, capsys):
    files = [f"task.tasks.{n}.data={data / n}" for n in ("gsm8k", "math")]
    whole = ["max_prompt_length=null", "cut_prompts=false"]
    small = [*whole, "rounds=2", "prompts_per_round=1", "agent.group_size=2", "num_envs=2"]
    settings = [f"model.model={llada}", "model.dtype=float32", *files, *small, *QUICK, "env.block_length=8"]
    call("train", tmp_path, "experiment=lup_llada_bl32", *settings)
    said = capsys.readouterr()
    steps = ["loading train examples and", "loading test examples and", "trying 9 deciders, one step each"]
    assert [said.out.find(step) for step in steps] == sorted(said.out.find(step) for step in steps)
    assert all(step in said.out for step in steps)
    doing = ["decoding 2 episodes", "learning from them", "trying and saving a checkpoint", "evaluating on 2 examples"]
    assert all(what in said.err for what in [*doing, "policy(greedy)", "threshold(0.9)"])


def test_the_trial_of_deciders_is_a_step_of_one_episode_each(llada, data, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import factory

    from dllm_gym.envs.vector import DLLMUnmaskVectorEnv

    cfg = compose_config("evaluate", f"model.model={llada}", "task=gsm8k", f"task.data={data / 'gsm8k'}", *QUICK)
    steps = []
    step = DLLMUnmaskVectorEnv.step
    monkeypatch.setattr(DLLMUnmaskVectorEnv, "step", lambda envs, action: steps.append(1) or step(envs, action))
    rules = factory.heuristics(cfg)
    envs = factory.make_evaluation_envs(cfg, rules)
    assert len(steps) == len(rules) > 3 and envs.core.row_forwards <= 2 * len(rules)

    def blind(observation, noise):
        return observation["no such entry"]

    with pytest.raises(KeyError, match="no such entry"):
        factory.make_evaluation_envs(cfg, {"blind": blind})


def test_without_the_weights_the_error_says_how_to_get_them(monkeypatch, data, tmp_path):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"hf auth login") as caught:
        call("evaluate", tmp_path, "model=llada_8b", "task=gsm8k", f"task.data={data / 'gsm8k'}")
    assert "local folder" in str(caught.value) and "GSAI-ML/LLaDA-8B-Instruct" in str(caught.value)


PUBLISHED = {  # what Learning Unmasking Policies trains with
    "seed": 123,
    "prompts_per_round": 16,
    "rounds": 14_973 // 16,
    "max_prompt_length": 200,
    "cut_prompts": True,
    "env.committed_confidence": True,
    "env.gen_length": 256,
    "agent.group_size": 8,
    "agent.algorithm.epochs": 2,
    "agent.algorithm.clip_epsilon": 0.5,
    "agent.algorithm.max_grad_norm": 0.2,
    "agent.algorithm.normalize": False,
    "agent.algorithm.kl_scale": 0.0,
    "agent.algorithm.optimizer.lr": 3e-5,
    "agent.algorithm.optimizer.betas": [0.9, 0.99],
    "agent.algorithm.optimizer.weight_decay": 0.1,
    "agent.algorithm.scheduler.num_warmup_steps": 50,  # rounds of two updates
    "policy.width": 128,
    "policy.ffn": 512,
    "policy.heads": 2,
    "policy.top_k": 1,
    "policy.output_bias": -2.0,
    "policy._target_": "dllm_gym.deciders.lup.DiTConfidenceLUP",
    "policy.time_period": 1.0,
    "distribution.train.path": "dllm_gym.deciders.distributions.MaskedBernoulli",
    "distribution.evaluate.path": "dllm_gym.deciders.distributions.BernoulliArgmax",
    "reward.reward": "multiplicative",
    "evaluation.seeds": [42, 43, 44],
    "task._target_": "dllm_gym.tasks.mixture.Mixture",
}


@pytest.mark.parametrize("block_length", [32, 256])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_published_runs_compose_and_make_two_updates(family, block_length, llada, data, tmp_path):
    name = f"experiment=lup_{family}_bl{block_length}"
    cfg = compose_config("train", name)
    for key, value in PUBLISHED.items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    assert cfg.env.block_length == cfg.env.steps_per_block == block_length
    assert cfg.distribution.evaluate_temperature == (0.5 if block_length == 32 else 1.0)
    assert ("Dream" if family == "dream" else "LLaDA") in cfg.model.model
    model = llada if family == "llada" else dream(tmp_path / "dream", max_position_embeddings=4096)
    files = [f"task.tasks.{n}.data={data / n}" for n in ("gsm8k", "math")]
    small = ["max_prompt_length=150", "rounds=2", "prompts_per_round=2", "agent.group_size=4", "num_envs=8"]
    varied = "reward.reward=additive"  # random weights answer nothing: only the time differs between episodes
    tiny = [f"model.model={model}", "model.dtype=float32", varied, *files, *small, *QUICK, "env.gen_length=32"]
    call("train", tmp_path, name, *tiny, f"env.block_length={min(block_length, 32)}", "heuristics=none")
    with (tmp_path / "metrics.csv").open() as file:
        rounds = list(csv.DictReader(file))
    assert [row["gradient_steps"] for row in rounds] == ["2.0", "2.0"] and float(rounds[1]["grad_norm"]) > 0
    assert (tmp_path / "results.json").exists()


def test_expert_steering_of_the_published_run_composes():
    cfg = compose_config("train", "experiment=lup_llada_bl256", "agent=grpo_es", "expert.block_length=32")
    assert cfg.expert.block_length == 32 and cfg.expert.rule.threshold == 0.9
    assert cfg.agent.algorithm.optimizer.lr == 3e-5 and cfg.agent.algorithm._target_.endswith("GRPOWithExpert")
    assert cfg.distribution.train.path.endswith("MaskedBernoulli")


def test_long_prompts_are_left_out_of_the_training_and_counted(llada, data, tmp_path, caplog):
    (tmp_path / "data").mkdir()
    rows = [{"question": "1 + 1?" * (1 + 30 * (i % 2)), "answer": "#### 2"} for i in range(10)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "test.jsonl").write_text((data / "gsm8k" / "test.jsonl").read_text())
    settings = [f"model.model={llada}", "task=gsm8k", f"task.data={tmp_path / 'data'}", "task.held_out=0"]
    run = ["task.prompt_style=chat", "rounds=1", "prompts_per_round=1", "agent.group_size=2", "heuristics=none"]
    call("train", tmp_path / "run", *settings, *run, *QUICK, "max_prompt_length=150")
    assert "max_prompt_length=150 drops 5 of 10 examples" in caplog.text
    with pytest.raises(ValueError, match=re.escape("max_prompt_length=3: every prompt")):
        call("train", tmp_path / "none", *settings, *run, *QUICK, "max_prompt_length=3")
