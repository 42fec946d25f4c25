"""LUP's published process: a plain loop decodes the same tokens in as many steps; every face and cache keeps to it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from published import confidence_checkpoint, plain_forward
from safetensors.torch import save_file
from tensordict.nn import TensorDictModule

from agents.rollout import evaluate
from dllm_gym.deciders.distributions import MaskedBernoulli
from dllm_gym.deciders.lup import DiTConfidenceLUP
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import Threshold
from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import Sampling
from dllm_gym.noise import fold, uniform
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.unmasking import Unmasking
from dllm_gym.tasks import Arithmetic, Sudoku

SEED, ROWS, L = 11, 64, 24
PUBLISHED = {"split": "test", "gen_length": L, "committed_confidence": True}


@pytest.fixture(scope="module")
def weights():
    """A network that sees what it is shown: slow enough for blocks that end with masks, and for empty steps."""
    weights = confidence_checkpoint(width=16, ffn=32, heads=2, top_k=2, time_embed_dim=8)
    weights["base_policy.output_proj.bias"].fill_(1.0)
    return weights


@pytest.fixture(scope="module")
def decider(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("checkpoint-1000") / "model.safetensors"
    save_file(weights, file)
    return PolicyDecider(DiTConfidenceLUP.from_lup(file), MaskedBernoulli)


@pytest.fixture(scope="module")
def verbatim(tiny):
    """Its texts hold every token, masks and what is behind the end included."""
    dllm = copy.copy(tiny)
    dllm.decode = lambda tokens: " ".join(map(str, tokens))
    return dllm


@torch.no_grad()
def plain_loop(dllm, task, weights, rows, block_length, full_context=True):
    """Tokens [B, L] and steps [B] of the first examples of the test split, as the authors' code decodes.

    Block by block, all rows together, at most BL steps in each; every step is a forward over prompt and completion.
    What is proposed and shown follows one softmax; shown are its two largest values at every position, whatever stands
    there. A position of the block that is masked is unmasked where the row's own stream of uniform numbers is below
    sigmoid(logit). A step counts for the rows that have masks in the block.
    """
    mask_id = dllm.mask_id
    prompts = torch.tensor([dllm.encode(task.prompt(example)) for example in task.examples("test").to_list()[:rows]])
    x = torch.cat([prompts, torch.full((rows, L), mask_id)], 1)
    steps = torch.zeros(rows, dtype=torch.int64)
    streams = fold(torch.full((), SEED), torch.arange(rows))
    for start in range(0, L, block_length):
        inside = (torch.arange(L) >= start) & (torch.arange(L) < start + block_length)
        for _ in range(block_length):
            masked = x[:, -L:] == mask_id
            if not (masked & inside).any():
                break
            logits = dllm.lm_head(dllm.backbone(input_ids=x).last_hidden_state[:, -L:])
            logits[..., list(dllm.forbidden_ids)] = -torch.inf
            probabilities = logits.softmax(-1)
            shown = {"confidence": probabilities.topk(2).values, "mask": masked, "time": steps[:, None] / L}
            if not full_context:
                shown = {name: value if name == "time" else value[:, inside] for name, value in shown.items()}
            wish = torch.full((rows, L), -torch.inf, dtype=torch.float64)
            wish[:, inside if not full_context else slice(None)] = plain_forward(weights, shown)
            unmask = masked & inside & (uniform(streams, steps, L) < wish.sigmoid())
            steps += (masked & inside).any(1)
            x[:, -L:] = torch.where(unmask, probabilities.argmax(-1), x[:, -L:])
    return x[:, -L:], steps


def texts(tokens):
    return [" ".join(map(str, row)) for row in tokens.tolist()]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("lookahead", [True, False])
def test_tokens_and_nfe_are_those_of_the_plain_loop(parts, lookahead, verbatim, weights, decider):
    """Without looking ahead, later blocks read 0: then the policy sees the active block alone."""
    task = Arithmetic(sizes={"train": 10, "validation": 10, "test": ROWS})
    block = L // parts
    settings = {**PUBLISHED, "model": verbatim, "task": task, "top_k": 2, "steps_per_block": block}
    settings |= {"block_length": block, "lookahead": lookahead}
    if not lookahead:
        policy = DiTConfidenceLUP(**decider.policy.settings | {"full_context": False, "block_length": block})
        policy.load_state_dict(decider.policy.state_dict())
        decider = PolicyDecider(policy, MaskedBernoulli)
    results = evaluate(DLLMUnmaskVectorEnv(num_envs=7, **settings), decider, range(ROWS), seed=SEED)
    tokens, steps = plain_loop(verbatim, task, weights, ROWS, block, full_context=lookahead)
    assert results.completions == texts(tokens) and torch.equal(results.nfe, steps)
    left = (tokens == verbatim.mask_id).any(1)
    assert torch.equal(results.masked, left)
    assert left.sum() > 0 and len(set(steps.tolist())) > 3 and results.empty_steps > 0
    if parts > 1:
        assert (tokens[:, :block] == verbatim.mask_id).any() and (tokens[left, -block:] != verbatim.mask_id).any()


def prediction(dllm, tokens, prompt):
    """What the dLLM says now at every position of a completion, whatever stands there: float32 [L, K]."""
    row = torch.cat([torch.as_tensor(prompt), torch.as_tensor(tokens)])[None]
    where = torch.arange(row.shape[1])[None] >= len(prompt)
    return dllm.predict(row, None, where, Sampling(2)).confidence


@pytest.mark.parametrize("block_length", [None, 10])
@pytest.mark.parametrize("lookahead", [True, False])
def test_committed_positions_show_the_dllms_own_confidence(block_length, lookahead, tiny):
    settings = {"top_k": 2, "block_length": block_length, "lookahead": lookahead, "entropy": True}
    env = DLLMUnmaskEnv(split="test", committed_confidence=True, **settings)
    plain = DLLMUnmaskEnv(split="test", **settings)
    env.reset(seed=0), plain.reset(seed=0)
    core, doubtful = env.core, 0
    for places in ([0, 3, 5], [9], [], [1, 2, 4, 6, 7, 8], [12]):
        action = np.isin(np.arange(20), places).astype(np.int8)
        observation, *_ = env.step(action)
        other, *_ = plain.step(action)
        seen = (observation["mask"] == 0) | (observation["action_mask"] == 1) | lookahead
        expected = prediction(tiny, core.tokens[0, -20:], core.prompts[0]).numpy() * seen[:, None]
        np.testing.assert_allclose(observation["confidence"], expected, atol=1e-5)
        assert observation in env.observation_space
        masked = observation["mask"] == 1
        assert (observation["confidence"][masked] == other["confidence"][masked]).all()
        assert (other["confidence"][~masked] == [1, 0]).all()
        assert all((observation[name] == other[name]).all() for name in other if name != "confidence")
        doubtful += (observation["confidence"][~masked, 0] < 0.9).sum()
    assert doubtful > 0


@pytest.mark.parametrize(
    "settings", [{}, {"lookahead": False}, {"cache": "prefix"}, {"cache": "dual"}, {"kl": 2}, {"hidden": True}], ids=str
)
def test_a_block_is_left_with_its_masks_after_its_steps(settings):
    env = DLLMUnmaskEnv(split="test", block_length=5, steps_per_block=3, committed_confidence=True, **settings)
    nothing = np.zeros(20, np.int8)
    for _ in range(2):  # the second episode begins as the first one did
        observation, _ = env.reset(seed=0)
        for step in range(12):
            assert np.flatnonzero(observation["action_mask"]).tolist() == [*range(step // 3 * 5, step // 3 * 5 + 5)]
            assert (observation["confidence"][observation["action_mask"] == 1] > 0).all()
            assert observation["mask"].all() and observation in env.observation_space
            observation, reward, terminated, truncated, info = env.step(nothing)
            assert not terminated and truncated == (step == 11)
        assert info["episode"]["l"] == 12 and not observation["action_mask"].any()
    observation, _ = env.reset(seed=0)
    for steps in (1, 3, 2):  # a block that is done early hands its steps to nobody
        for step in range(steps):
            last = steps < 3 and step == steps - 1
            observation, *_ = env.step(observation["action_mask"] if last else nothing)
    assert np.flatnonzero(observation["action_mask"]).tolist() == [15, 16, 17, 18, 19]
    assert np.flatnonzero(observation["mask"]).tolist() == [*range(5, 10), *range(15, 20)]
    for action, over in ((nothing, False), (nothing, False), (np.ones(20, np.int8), True)):
        _, _, terminated, truncated, info = env.step(action)
        assert not terminated and truncated == over  # masks are left in the second block
    assert info["episode"]["l"] == 9


def slow(observation, noise):
    """Takes what is nearly certain, and else nothing."""
    return ((observation["confidence"][..., 0] > 0.97) & (observation["action_mask"] != 0)).to(torch.int8)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lookahead": False}, {"cache": "prefix"}, {"cache": "dual", "committed_confidence": True}, {"kl": 1}],
    ids=str,
)
def test_every_face_keeps_to_it(settings, verbatim):
    settings = {"model": verbatim, "split": "test", "block_length": 10, "steps_per_block": 2, **settings}
    results = evaluate(DLLMUnmaskVectorEnv(num_envs=3, **settings), slow, range(9))
    assert results.masked.any() and not results.masked.all() and results.nfe.max() <= 4
    assert [str(verbatim.mask_id) in text.split() for text in results.completions] == results.masked.tolist()
    env = DLLMUnmaskEnv(**settings)
    native = DLLMUnmaskTorchRLEnv(4, **settings)
    for example in range(9):
        observation, _ = env.reset(options={"examples": example})
        truncated = terminated = False
        while not (truncated or terminated):
            tensors = {name: torch.as_tensor(value) for name, value in observation.items()}
            observation, _, terminated, truncated, info = env.step(slow(tensors, None).numpy())
        assert truncated == results.masked[example] and info["episode"]["l"] == results.nfe[example]
        assert env.last_completion() == results.completions[example]
    player = TensorDictModule(
        lambda sure, legal: slow({"confidence": sure, "action_mask": legal}, None),
        in_keys=["confidence", "action_mask"],
        out_keys=["action"],
    )
    native.set_seed(0)
    native.dealer.count = 9  # of these examples
    played = native.rollout(16, policy=player, break_when_any_done=False)
    over = played["next", "done"][..., 0]
    ends = (played["next", name][over][:, 0].tolist() for name in ("nfe", "truncated"))
    lengths = set(zip(*ends, strict=True))
    assert lengths <= set(zip(results.nfe.tolist(), results.masked.tolist(), strict=True)) and len(lengths) > 1


def test_steps_that_are_never_used_up_change_nothing():
    settings = {"split": "test", "block_length": 10}
    one, other = (
        evaluate(DLLMUnmaskVectorEnv(num_envs=3, **settings, **more), Threshold(0.9), range(9))
        for more in ({}, {"steps_per_block": 10})
    )
    assert one.completions == other.completions and torch.equal(one.nfe, other.nfe) and not other.masked.any()


def test_a_template_and_an_end_go_with_it():
    """Given positions are committed from the start; an end-of-text in front of a mask that was left ends nothing."""
    task = Sudoku(template=True, min_givens=6, sizes={"train": 5, "validation": 5, "test": 20})
    settings = {"task": task, "split": "test", "block_length": 5, "steps_per_block": 1, "committed_confidence": True}
    results = evaluate(DLLMUnmaskVectorEnv(num_envs=3, stop_at_eos=True, **settings), slow, range(20))
    assert results.masked.any() and results.nfe.max() <= 4


def test_long_prompts_are_cut_to_their_last_tokens(mixed_task):
    settings = {"task": mixed_task, "split": "test", "max_prompt_length": 6}
    dropping, cutting = (Unmasking(1, EnvConfig(**settings, cut_prompts=cut)) for cut in (False, True))
    assert dropping.dropped > 0 == cutting.dropped and len(cutting.examples) == 200
    cut = 0
    for index, example in enumerate(cutting.examples):
        whole = cutting.dllm.encode(mixed_task.prompt(example))
        assert cutting.source[index].prompt.tolist() == whole[-6:]
        cut += len(whole) > 6
    assert cut == dropping.dropped
    with pytest.raises(ValueError, match="cut_prompts=True needs max_prompt_length"):
        EnvConfig(cut_prompts=True)
    with pytest.raises(ValueError, match="steps_per_block=0"):
        EnvConfig(steps_per_block=0)
