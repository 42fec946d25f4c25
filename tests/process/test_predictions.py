"""The fewest forwards: what is saved, and that nothing but the work changes."""

from __future__ import annotations

from threading import Event

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import act

from agents.rollout import evaluate
from dllm_gym.deciders.distributions import MaskedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import EntropyBounded, Factor, Threshold, TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import DLLM, load_dllm
from dllm_gym.models.batches import Batching
from dllm_gym.process import predictions
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.predictions import positions
from dllm_gym.process.unmasking import Unmasking
from dllm_gym.tasks import Sudoku


def envs(lanes: int = 8, **settings) -> DLLMUnmaskVectorEnv:
    return DLLMUnmaskVectorEnv(num_envs=lanes, split="test", **settings)


def published_policy() -> PolicyDecider:
    torch.manual_seed(0)
    return PolicyDecider(DiTConfidence(width=32, ffn=64), MaskedBernoulli)


def outcome(results):
    return results.completions, results.nfe.tolist(), results.score.tolist()


# ---- batches ----


def cost(lengths: np.ndarray, batches: list[np.ndarray], start: int) -> int:
    return sum(int(lengths[batch].max()) * len(batch) + start for batch in batches)


def test_rows_are_split_where_padding_costs_more_than_a_forward():
    batching = Batching(start=256)
    assert [len(batch) for batch in batching.split(np.full(100, 50))] == [100]
    lengths = np.array([100, 10_000, 110, 9_990])
    assert [sorted(batch.tolist()) for batch in batching.split(lengths)] == [[1, 3], [0, 2]]
    assert [len(batch) for batch in Batching(256, most=200).split(np.full(10, 50))] == [4, 3, 3]
    assert [len(batch) for batch in Batching(256, most=200).split(np.array([500, 500]))] == [1, 1]  # no row is cut
    assert list(batching.split(np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_every_row_once_and_cost_no_more_than_one_batch(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 10 ** rng.integers(2, 4), size=int(rng.integers(1, 60)))
    start = int(rng.integers(500))
    batches = list(Batching(start).split(lengths))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert cost(lengths, batches, start) <= cost(lengths, [np.arange(len(lengths))], start)


def test_positions_are_those_of_nonzero():
    for seed in range(10):
        where = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) < seed / 9
        assert torch.equal(positions(where, int(where.sum())), where.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("batching", [Batching(10**9), Batching(0), Batching(0, most=1)], ids=str)
def test_how_rows_are_batched_changes_no_token(mixed_task, batching):
    plain, decider = evaluate(envs(task=mixed_task), published_policy(), range(24)), published_policy()
    other = envs(task=mixed_task)
    other.core.predictions.batching = batching
    assert outcome(evaluate(other, decider, range(24))) == outcome(plain)
    assert (other.core.work.padding > 0) == (batching.start > 0)


def test_rounded_shapes_change_no_token(mixed_task):
    """What a compiled network is given: rows and columns that fill up a shape."""
    dllm = load_dllm("tiny", dtype="float32", chat_template=False)  # an object of its own
    plain = evaluate(envs(5, task=mixed_task, model=dllm), TopK(6), range(12))
    dllm.compiled = True
    rounded = envs(5, task=mixed_task, model=dllm)
    seen = []
    encode = dllm.encode_rows
    dllm.encode_rows = lambda tokens, mask: seen.append(tuple(tokens.shape)) or encode(tokens, mask)
    assert outcome(evaluate(rounded, TopK(6), range(12))) == outcome(plain)
    assert {rows for rows, _ in seen} <= {1, 2, 4, 8} and all(width % 32 == 0 for _, width in seen)


# ---- equal rows ----


@pytest.mark.parametrize("settings", [{}, {"hidden": True, "entropy": True, "margin": True}], ids=str)
def test_a_prompt_is_forwarded_once_however_often_it_begins(settings):
    fresh, env = envs(4, **settings), envs(4, **settings)
    first = evaluate(env, published_policy(), [3] * 12, seed=1)
    assert env.core.work.reused == 11 and env.core.work.lengths[env.core.work.lengths.most_common()[0][0]] > 0
    again = evaluate(env, published_policy(), [3] * 12, seed=1)
    assert env.core.work.reused == 11 + 12 and again.row_forwards == first.row_forwards - 1
    fresh.core.predictions.known.recall = lambda known_by, lanes: {}  # every row is forwarded
    plain = evaluate(fresh, published_policy(), [3] * 12, seed=1)
    assert outcome(plain) == outcome(first) == outcome(again)
    assert plain.row_forwards == first.row_forwards + 11


def test_what_is_observed_of_a_reused_prediction_equals_the_computed_one():
    settings = {"hidden": True, "entropy": True, "margin": True, "top_k": 3}
    computed, _ = envs(3, **settings).reset(options={"examples": [5, 6, 7]})
    reused = envs(3, **settings)
    reused.reset(options={"examples": [7, 5, 5]})
    observation, _ = reused.reset(options={"examples": [5, 6, 7]})
    assert reused.core.work.rows == 3 and reused.core.work.reused == 3
    for name, value in computed.items():
        torch.testing.assert_close(observation[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"kl": 2}], ids=str)
def test_rows_that_are_not_alike_are_not_shared(settings):
    env = envs(4, **settings)
    env.reset(seed=0, options={"examples": [3] * 4})
    assert env.core.work.rows == 4 and env.core.work.reused == 0


def test_first_predictions_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(predictions, "KEPT_BYTES", 9000)  # one takes 20 * (8 + 4) and 2,000
    env = envs(8)
    evaluate(env, TopK(20), range(30))
    assert len(env.core.predictions.known.kept) == 4
    assert env.core.work.rows == 30
    evaluate(env, TopK(20), [29, 28, 0])
    assert env.core.work.rows == 31  # the oldest was forgotten, the latest were not
    kept = [tensor for entry in env.core.predictions.known.kept.values() for tensor in entry]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 4 * 20 * (8 + 4)  # not the batch they came from


def test_work_adds_up(mixed_task):
    env = envs(8, task=mixed_task)
    results = evaluate(env, Threshold(0.9), range(40))
    work = env.core.work
    assert work.rows == sum(work.lengths.values()) == results.row_forwards
    assert work.tokens == sum(length * rows for length, rows in work.lengths.items()) + work.padding
    assert work.rows + work.reused == int(results.nfe.sum())  # the threshold has no empty step


def test_a_lane_takes_what_its_entries_take():
    core = envs(4, top_k=2).core
    each = 8 * 20 + 4 * 2 * 20 + 20 + 8 * 20 + 4 * 8  # proposals, confidences, fresh, blocks; steps, key, block
    prompts = core.tokens.shape[1] - 20
    assert core.bytes_per_lane == each + 8 * (20 + prompts)


# ---- less than everything ----


@pytest.mark.parametrize("rule", [Threshold(0.7), Factor(0.5), TopK(3), EntropyBounded(0.3)], ids=str)
def test_without_lookahead_rules_decode_the_same_from_fewer_positions(rule):
    settings = {"task": "arithmetic", "block_length": 12, **rule.requires}
    counted, results = [], []
    for lookahead in (True, False):
        env = envs(4, lookahead=lookahead, **settings)
        read, seen = env.core.dllm.vocabulary.read, []
        env.core.dllm.vocabulary.read = lambda hidden, *rest, read=read, seen=seen: (
            seen.append(len(hidden)) or read(hidden, *rest)
        )
        try:
            results.append(outcome(evaluate(env, rule, range(12))))
        finally:
            del env.core.dllm.vocabulary.read
        counted.append(sum(seen))
    assert results[0] == results[1]
    assert counted[1] < 0.6 * counted[0]


def test_without_lookahead_positions_ahead_read_nothing():
    names = {"entropy": True, "margin": True, "top_k": 2}
    env = envs(2, task="arithmetic", block_length=12, lookahead=False, **names)
    observation, _ = env.reset(seed=0)
    observation = env.step(observation["action_mask"])[0]
    ahead = (observation["mask"] == 1) & (observation["action_mask"] == 0)
    committed = observation["mask"] == 0
    assert ahead.sum() == 2 * 24 and committed.sum() == 2 * 12
    for name in ("confidence", "entropy", "margin"):
        assert (observation[name][ahead] == 0).all()
    assert (observation["confidence"][committed] == torch.tensor([1.0, 0.0])).all()
    assert (observation["confidence"][observation["action_mask"] == 1] > 0).all()


def test_an_answer_that_ends_early_is_the_same_in_fewer_steps():
    for task in ("arithmetic", "sudoku"):
        plain, early = (
            evaluate(envs(task=task, block_length=4, stop_at_eos=stop), TopK(1), range(20)) for stop in (0, 1)
        )
        assert plain.completions == early.completions and torch.equal(plain.score, early.score)
        assert (early.nfe <= plain.nfe).all()
        assert (early.nfe < plain.nfe).any() == (task == "arithmetic")  # a sudoku's answer fills its completion


def test_an_end_of_text_ends_an_episode_once_nothing_before_it_is_masked():
    core = Unmasking(2, EnvConfig(split="test", stop_at_eos=True))
    core.begin([0, 1], [0, 1], [0, 0])
    core.predict()
    core.predictions.proposal[0, 3] = core.dllm.eos_id
    commit = lambda *places: torch.stack([torch.isin(torch.arange(20), torch.tensor(p)) for p in places])  # noqa: E731
    assert not act(core, commit([3], [3])).done.any()  # masks before it
    core.predict()
    assert not act(core, commit([0, 2], [0, 2])).done.any()
    core.predict()
    outcome = act(core, commit([1], [1]))
    assert outcome.terminated.tolist() == [True, False] and outcome.nfe[0] == 3
    assert len(core.completions[0]) == 3 and core.running.tolist() == [False, True]


def test_a_prediction_that_was_broken_off_is_made_before_the_next_step(monkeypatch, tiny):
    broken, whole = envs(2), envs(2)
    for env in (broken, whole):
        observation, _ = env.reset(seed=0, options={"examples": [0, 1], "queue": [2, 3]})
    encode = tiny.encode_rows
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "encode_rows", lambda *rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.step(observation["action_mask"])  # both lanes are refilled, and not predicted
    assert tiny.encode_rows == encode
    whole.step(observation["action_mask"])
    for env in (broken, whole):
        env.step(observation["action_mask"])
    assert broken.last_completions() == whole.last_completions()


@pytest.mark.parametrize("name", ["hidden_states", "_hidden"])
def test_a_model_of_your_own_overrides_what_everything_is_predicted_from(tiny, name):
    """Shifted hidden states: what the plain model says of position j is said of j + 1."""

    def shifted(self, tokens, attention_mask):
        return getattr(super(Own, self), name)(tokens, attention_mask).roll(1, 1)

    Own = type("Own", (DLLM,), {name: shifted})
    own = Own(tiny.backbone, tiny.lm_head, tiny.tokenizer, tiny.config)
    (plain, _), (moved, _) = (envs(2, model=model, hidden=True).reset(seed=0) for model in (tiny, own))
    for entry in ("confidence", "hidden"):
        assert torch.equal(moved[entry][:, 1:], plain[entry][:, :-1])
        assert not torch.equal(moved[entry], plain[entry])
    tokens = torch.full((1, 4), tiny.mask_id)
    said = [model.predict(tokens, None, tokens == tiny.mask_id).token for model in (tiny, own)]
    assert torch.equal(said[1], said[0].roll(1))


def test_what_would_not_be_called_is_refused(tiny):
    class Own(DLLM):
        def predict(self, *args, **settings):
            return super().predict(*args, **settings)

    with pytest.raises(ValueError, match="Own has a predict of its own"):
        envs(1, model=Own(tiny.backbone, tiny.lm_head, tiny.tokenizer, tiny.config))
    with pytest.raises(ValueError, match="lookahead=False.*kl=2"):
        envs(1, lookahead=False, kl=2)
    compiled = Own.__mro__[1](tiny.backbone, tiny.lm_head, tiny.tokenizer, tiny.config)
    compiled.compiled = True
    with pytest.raises(ValueError, match="cache='dual'.*compile"):
        envs(1, model=compiled, cache="dual")


def test_hooks_of_a_head_are_respected(tiny):
    head = torch.nn.Linear(tiny.hidden_size, tiny.vocab_size, bias=False).requires_grad_(False)
    dllm = DLLM(tiny.backbone, head, tiny.tokenizer, tiny.config)
    tokens = torch.full((1, 4), tiny.mask_id)
    allowed = next(token for token in range(tiny.vocab_size) if token not in dllm.forbidden_ids)
    favour = torch.nn.functional.one_hot(torch.tensor(allowed), tiny.vocab_size) * 1e3
    with head.register_forward_hook(lambda module, inputs, logits: logits + favour):
        assert (dllm.predict(tokens, None, tokens == tiny.mask_id).token == allowed).all()


@pytest.mark.parametrize(("name", "value"), [("lookahead", 2), ("stop_at_eos", "yes"), ("cache", "both")])
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        envs(1, **{name: value})


# ---- keys and values that are kept ----


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_computes_fewer_tokens_and_ends_every_episode(kind, mixed_task):
    plain, cached = (envs(3, task=mixed_task, block_length=8, cache=cache) for cache in ("none", kind))
    expected = evaluate(plain, TopK(2), range(8))
    results = evaluate(cached, TopK(2), range(8))
    assert torch.equal(results.nfe, expected.nfe)  # two positions a step, whatever they hold
    assert cached.core.work.tokens < 0.8 * plain.core.work.tokens
    assert cached.core.bytes_per_lane > plain.core.bytes_per_lane
    alone = evaluate(envs(1, task=mixed_task, block_length=8, cache=kind), TopK(2), range(8))
    assert outcome(alone) == outcome(results)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_the_first_step_of_a_block_is_exact_with_a_cache(kind):
    plain, cached = (envs(2, task="arithmetic", block_length=12, cache=cache) for cache in ("none", kind))
    for env in (plain, cached):
        env.reset(seed=0)
    for _ in range(3):
        legal = plain.core.active.legal(plain.core.mask)
        (one, *_), (other, *_) = (env.step(legal) for env in (plain, cached))  # a whole block at once
        torch.testing.assert_close(one["confidence"], other["confidence"], atol=1e-5, rtol=1e-4)


def test_a_cache_keeps_what_it_does_not_predict_again():
    env = envs(1, task="arithmetic", block_length=12, cache="dual", hidden=True)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(torch.nn.functional.pad(torch.ones(1, 1), (0, 47)))
    active = torch.arange(48) < 12
    for name in ("confidence", "hidden"):
        assert torch.equal(after[name][:, ~active], before[name][:, ~active])
        assert not torch.equal(after[name][:, active], before[name][:, active])


# ---- waiting ----


class Waits(TorchDispatchMode):
    """Notes the operations whose results the host would have to wait for on a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] if index is not None
        )
        if by_mask or name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique"):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"hidden": True, "entropy": True, "top_k": 2}, {"lookahead": False}], ids=str)
@pytest.mark.parametrize("rule", [Threshold(0.9), TopK(2), EntropyBounded(0.1)], ids=str)
def test_nothing_in_a_step_waits_for_the_device_but_the_one_transfer(rule, settings, mixed_task):
    env = envs(4, task=mixed_task, block_length=12, **{**settings, **rule.requires})
    observation, _ = env.reset(seed=0)
    noise = torch.full((4, 48), 0.5)
    observation, *_ = env.step(rule(observation, noise))
    with Waits() as waits:
        _, _, terminated, _, _ = env.step(rule(observation, noise))
    assert waits.found == [] and not terminated.any()
    with Waits() as waits:
        torch.arange(3)[torch.tensor([True, False, True])].sum().item()
    assert waits.found == ["index", "_local_scalar_dense"]  # the watcher sees them


# ---- grading ----


class Patient(Sudoku):
    """Waits with its grade until the dLLM has begun another forward."""

    def __init__(self):
        super().__init__(sizes={"train": 20, "validation": 5, "test": 20})
        self.forward = Event()

    def grade(self, example, completion):
        return float(self.forward.wait(30))


def test_answers_are_graded_while_the_dllm_goes_on(monkeypatch, tiny):
    task = Patient()
    env = envs(2, task=task)
    observation, _ = env.reset(seed=0)
    encode = tiny.encode_rows
    monkeypatch.setattr(tiny, "encode_rows", lambda *rows: task.forward.set() or encode(*rows))
    _, reward, terminated, _, info = env.step(observation["action_mask"])
    assert terminated.all() and (info["episode"]["score"] == 1).all() and (reward == 1).all()


def test_an_error_of_a_grader_reaches_the_caller(monkeypatch):
    task = Sudoku(sizes={"train": 20, "validation": 5, "test": 20})
    monkeypatch.setattr(task, "grade", lambda example, completion: 1 / 0)
    env = envs(2, task=task)
    observation, _ = env.reset(seed=0)
    with pytest.raises(ZeroDivisionError):
        env.step(observation["action_mask"])
