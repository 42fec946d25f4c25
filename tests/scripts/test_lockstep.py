"""The environment against the plain loop: the same tokens and NFE, whatever is saved."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Sums

from agents.rollout import Decider, Results, evaluate
from dllm_gym.deciders.distributions import MaskedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import Threshold, TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.unmasking import Unmasking

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from benchmarking.lockstep import Decoded, lockstep  # noqa: E402
from benchmarking.measuring import turns  # noqa: E402
from benchmarking.workloads import RandomLLaDA, RandomPrompts  # noqa: E402


def bernoulli(bias: float = -0.5) -> PolicyDecider:
    """A policy whose logits depend on what it sees and lie on both sides of ``bias``; some actions are empty."""
    torch.manual_seed(3)
    network = DiTConfidence(width=16, ffn=32, heads=2, output_bias=bias)
    for name, parameter in network.named_parameters():
        if name != "head.bias":
            torch.nn.init.normal_(parameter, std=0.3)
    return PolicyDecider(network, MaskedBernoulli)


DECIDERS = [Threshold(0.9), Threshold(0.5), TopK(2), bernoulli()]
IDS = ["threshold .9", "threshold .5", "top-k", "bernoulli"]
ARITHMETIC = {"task": "arithmetic", "gen_length": 24}
IN_BLOCKS = {**ARITHMETIC, "block_length": 8}
TEMPLATES = {"task": Sums(sizes={"train": 40, "validation": 40, "test": 40})}
SETTINGS = [{"task": "sudoku"}, ARITHMETIC, IN_BLOCKS, {**IN_BLOCKS, "lookahead": False}]
SETTINGS += [TEMPLATES, {**TEMPLATES, "block_length": 6}]


def both(decider: Decider, examples: np.ndarray, batch: int = 5, **settings) -> tuple[Results, Decoded]:
    """The same episodes from three lanes of the environment, and from the plain loop in batches of other sizes."""
    settings = {"split": "test", **settings}
    results = evaluate(DLLMUnmaskVectorEnv(num_envs=3, **settings), decider, examples, seed=11)
    return results, lockstep(Unmasking(batch, EnvConfig(**settings)), decider, examples, seed=11)


def assert_same(results: Results, decoded: Decoded) -> None:
    assert results.completions == decoded.completions
    assert torch.equal(results.nfe, decoded.nfe) and torch.equal(results.score, decoded.score)
    assert results.empty_steps == pytest.approx(decoded.empty_steps)


@pytest.mark.parametrize("decider", DECIDERS, ids=IDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_and_nfe_are_those_of_the_plain_loop(settings, decider, tiny):
    verbatim = copy.copy(tiny)  # its texts hold every token, those behind the end, too
    verbatim.decode = lambda tokens: " ".join(map(str, tokens))
    assert_same(*both(decider, np.arange(4).repeat(2), model=verbatim, **settings))


def test_padding_and_a_step_limit_change_nothing(mixed_task):
    settings = {"task": mixed_task, "gen_length": 24, "block_length": 12, "top_k": 2}
    assert_same(*both(Threshold(0.9), np.arange(12), **settings))
    results, decoded = both(bernoulli(bias=-3.0), np.arange(12), batch=12, max_episode_steps=9, **settings)
    assert_same(results, decoded)
    mask = Unmasking(1, EnvConfig()).dllm.mask_id
    assert (decoded.tokens == mask).any() and (decoded.nfe == 9).any()  # some ran into it


def test_what_the_environment_saves_is_there_to_be_saved():
    results, decoded = both(bernoulli(), np.arange(4).repeat(2), batch=8, **IN_BLOCKS)
    assert decoded.empty_steps > 0 and decoded.waiting > 0
    assert decoded.row_forwards > decoded.nfe.sum() > results.row_forwards


def test_any_of_the_episodes_can_be_decoded_alone():
    core = Unmasking(2, EnvConfig(split="test"))
    examples = [0, 0, 1, 1, 2]
    whole = lockstep(core, bernoulli(), examples, seed=5)
    part = lockstep(core, bernoulli(), examples, seed=5, episodes=[4, 1])
    assert torch.equal(part.tokens, whole.tokens[[4, 1]]) and torch.equal(part.nfe, whole.nfe[[4, 1]])
    assert whole.completions[0] != whole.completions[1] or whole.nfe[0] != whole.nfe[1]  # each has its own draws


def test_the_plain_loop_refuses_tokens_at_a_temperature():
    with pytest.raises(ValueError, match="temperature=0.5"):
        lockstep(Unmasking(2, EnvConfig(temperature=0.5)), TopK(2), [0])


@pytest.mark.parametrize("block", [8, 24])
@pytest.mark.parametrize("decider", DECIDERS, ids=IDS)
def test_a_large_vocabulary_changes_nothing(decider, block):
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 32, "max_sequence_length": 64}
    dllm = RandomLLaDA(embedding_size=20_000, logit_std=5.0, **sizes)
    task = RandomPrompts(count=4, shortest=3, longest=9, vocabulary=20_000, gen_length=24)
    results, decoded = both(decider, np.arange(4).repeat(2), model=dllm, task=task, block_length=block, top_k=2)
    assert_same(results, decoded)
    assert decoded.completions[0] == " ".join(map(str, decoded.tokens[0].tolist()))  # no token is lost in the text


def test_every_batch_has_its_turn():
    turn = turns(episodes=7, size=3, batches=2)
    assert [next(turn) for _ in range(3)] == [[0, 1, 2, 3, 4, 5], [6, 0, 1, 2], [3, 4, 5, 6]]
    assert next(turns(episodes=7, size=3, batches=None)) == list(range(7))
