"""Completions that begin partly filled: blanks alone are masked, legal, paid and reused; in every face."""

from __future__ import annotations

from collections import defaultdict

import gymnasium as gym
import numpy as np
import pytest
import torch
from datasets import Dataset
from test_families import FAMILIES
from toys import Sums, act

from agents.evaluation import play
from agents.generations import Lab
from agents.rollout import evaluate, play_groups
from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.networks import DiTConfidence
from dllm_gym.deciders.player import PolicyDecider
from dllm_gym.deciders.rules import LeftToRight, Random, Threshold, TopK
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import load_dllm
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.rewards import Additive, Multiplicative
from dllm_gym.process.unmasking import Unmasking
from dllm_gym.tasks import Arithmetic, Mixture, Sudoku, Task
from dllm_gym.tasks.sudoku import answers

SMALL = {"train": 40, "validation": 40, "test": 40}


class Given(Task):
    """Examples that are (prompt, template) pairs; every answer scores 1."""

    name, gen_length = "given", 12

    def __init__(self, *examples):
        self.pairs = examples

    def examples(self, split):
        return Dataset.from_list([{"index": i} for i in range(len(self.pairs))])

    def prompt(self, example):
        return self.pairs[example["index"]][0]

    def template(self, example):
        return self.pairs[example["index"]][1]

    def grade(self, example, completion):
        return 1.0


def envs(lanes: int = 8, **settings) -> DLLMUnmaskVectorEnv:
    return DLLMUnmaskVectorEnv(num_envs=lanes, **{"task": Sums(sizes=SMALL), "split": "test", **settings})


def policy(greedy: bool = False) -> PolicyDecider:
    torch.manual_seed(3)
    network = DiTConfidence(width=16, ffn=32, heads=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return PolicyDecider(network, ZeroTruncatedBernoulli, greedy=greedy)


def outcome(results):
    return results.completions, results.nfe.tolist(), results.reward.tolist()


# ---- the beginning and the end, by hand ----


def start(*pairs, **settings) -> Unmasking:
    core = Unmasking(len(pairs), EnvConfig(**{"task": Given(*pairs), "split": "test", **settings}))
    core.begin(range(len(pairs)), range(len(pairs)), [0] * len(pairs))
    core.predict()
    return core


def test_blanks_are_masked_and_the_rest_is_given(tiny):
    core = start(("1+1=", ["2", 2, "+=", 1]), ("", [1, "", 1]), ("3", None), block_length=4)
    seen = core.observe()
    blanks = [[1, 2, 5], [0, 1], list(range(12))]
    assert [row.nonzero().flatten().tolist() for row in seen["mask"]] == blanks
    assert [row.nonzero().flatten().tolist() for row in seen["action_mask"]] == [[1, 2], [0, 1], [0, 1, 2, 3]]
    two, plus, equals = tiny.spelling.plain("2+=")
    expected = torch.full((12,), tiny.eos_id)
    expected[[0, 3, 4]] = torch.tensor([two, plus, equals])
    expected[[1, 2, 5]] = tiny.mask_id
    assert core.tokens[0, -12:].tolist() == expected.tolist()
    assert (seen["confidence"][0, :, 0][seen["mask"][0] == 0] == 1).all()
    assert not core.fresh.any() and core.blanks.tolist() == [3, 2, 12]


def test_blocks_without_a_blank_are_skipped_and_ends_are_ends():
    core = start(("1", ["1234", "123", 2, "4"]), ("1", ["1234567", 1]), block_length=4)
    assert [row.nonzero().flatten().tolist() for row in core.observe()["action_mask"]] == [[7], [7]]
    assert core.unmaskable.tolist() == [1, 1] and core.first_mask.tolist() == [7, 7]
    first = act(core, torch.ones(2, 12))
    assert first.terminated.tolist() == [False, True] and first.nfe.tolist() == [1, 1]
    core.predict()
    assert core.observe()["action_mask"][0].nonzero().flatten().tolist() == [8]
    second = act(core, torch.ones(2, 12))
    assert second.terminated.tolist() == [True, False] and second.nfe.tolist()[0] == 2
    assert core.completions[0][:7] == "1234123"


@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_given_ends_neither_end_an_episode_early_nor_keep_it_from_its_end(stop_at_eos):
    settings = {"block_length": 6, "stop_at_eos": stop_at_eos}
    core = start(("1", [3]), ("1", ["12345", 3, "4"]), **settings)
    outcomes = [act(core, torch.tensor([[0, 0, 0] + [0] * 9, [1] * 12]))]
    assert not outcomes[0].done.any() and core.masked.tolist() == [3, 2]
    core.predict()
    assert act(core, torch.ones(2, 12)).terminated.tolist() == [True, True]


def test_the_reward_counts_blanks():
    pairs = [("1", ["12", 4]), ("1", [10, "12"]), ("1", None)]
    for reward, by_hand in {
        "multiplicative": lambda n: ((n - 2 + 1) / n) ** 2,
        "additive": lambda n: 1 - 4 / n,
    }.items():
        core = start(*pairs, reward=reward, alpha=2.0)
        act(core, torch.zeros(3, 12))
        paid = act(core, torch.ones(3, 12))
        assert paid.nfe.tolist() == [2, 2, 2]
        np.testing.assert_allclose(paid.reward, [by_hand(4), by_hand(10), by_hand(12)], rtol=1e-6)
    score, steps, blanks = torch.ones(3), torch.tensor([1, 3, 9]), torch.tensor([3, 3, 3])
    for kind in (Multiplicative(2.0), Additive(0.5)):
        assert torch.equal(kind(score, steps, blanks), kind(score, steps, 3))


def test_a_reward_of_ones_own_gets_blanks_where_there_are_templates_and_l_elsewhere():
    seen = []

    def reward(score, steps, length):
        seen.append(length)
        return score

    act(start(("1", ["12", 4]), ("1", None), reward=reward), torch.ones(2, 12))
    assert seen[0].dtype == torch.int64 and seen.pop().tolist() == [4, 12]
    act(start(("1", None), reward=reward), torch.ones(1, 12))
    assert type(seen[0]) is int and seen == [12]


def test_a_range_of_alphas_pays_by_blanks_too():
    core = Unmasking(1, EnvConfig(task=Given(("1", ["12", 4])), alpha=[1.0, 4.0]))
    core.begin([0], [0], [0], [2.0])
    act(core, torch.zeros(1, 12))
    assert act(core, torch.ones(1, 12)).reward.tolist() == [pytest.approx((3 / 4) ** 2)]


def test_frames_show_given_tokens_as_committed_and_not_fresh():
    core = start(("", ["2", 2, "+"]))
    frame = core.frame(0)
    assert frame.prompt == "" and list(frame.tokens[:1]) + list(frame.tokens[3:5]) == ["2", "+", "∎"]
    assert frame.masked.nonzero()[0].tolist() == [1, 2] and not frame.fresh.any()
    assert frame.caption == "NFE 0   0/2 tokens"
    act(core, torch.ones(1, 12))
    assert core.frame(0).caption.startswith("NFE 1   2/2 tokens   2.0 per step")


def test_a_text_that_spells_a_special_token_stays_text(tmp_path):
    dllm = load_dllm(FAMILIES["Dream"][0](tmp_path / "dream"))
    task = Given(("1", ["<|mask|>", 2]))
    core = Unmasking(1, EnvConfig(model=dllm, task=task, gen_length=24))
    core.begin([0], [0], [0])
    assert core.mask.sum() == 2 and core.source[0].completion.tolist()[:8] == dllm.spelling.plain("<|mask|>")
    assert dllm.tokenizer.chat_template  # the prompt stands in it, the template's texts do not


BAD = [
    ([], "at least one blank"),
    (["123"], "at least one blank"),
    (["123", 0], "holds 0"),
    ([2, -1], "holds -1"),
    ([True, "1"], "holds True"),
    ([1.5], "holds 1.5"),
    ([None], "holds None"),
    ([["1"], 2], r"holds \['1'\]"),
    ("12", "is '12'"),
    (3, "is 3"),
    ([13], "13 blanks.*gen_length=12"),
    (["1234567", 6], "13 tokens.*gen_length=12"),
    (["A", 2], "no tokens"),
]


@pytest.mark.parametrize(("template", "message"), BAD, ids=[str(template) for template, _ in BAD])
def test_wrong_templates_are_refused_by_task_and_example(template, message):
    with pytest.raises(ValueError, match=f"task 'given' for the prompt '7\\+7='.*{message}") as error:
        Unmasking(1, EnvConfig(task=Given(("1", None), ("7+7=", template))))
    assert "\n" not in str(error.value)


# ---- the same in any company ----

DECIDERS = [Threshold(0.5), TopK(2), LeftToRight(1), Random(2), policy(greedy=True), policy()]


@pytest.mark.parametrize("decider", DECIDERS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"block_length": 6}, {"block_length": 8, "lookahead": False}], ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(settings, decider):
    company, few = (evaluate(envs(lanes, **settings), decider, range(40)) for lanes in (40, 7))
    alone = evaluate(envs(1, **settings), decider, range(10))
    assert outcome(company) == outcome(few)
    assert [part[:10] for part in outcome(company)] == [*outcome(alone)]
    assert len({sum(len(p) for p in Sums().template(e) if isinstance(p, str)) for e in envs().core.examples}) > 3


@pytest.mark.parametrize("rule", [Threshold(0.5), TopK(1)], ids=str)
@pytest.mark.parametrize("block", [24, 6])
def test_decoding_equals_a_plain_loop(block, rule, tiny):
    env = envs(5, block_length=block)
    results = evaluate(env, rule, range(12))
    for i in range(12):
        tokens, blanks = [], []
        for piece in env.core.task.template(env.core.examples[i]):
            blanks += [True] * piece if isinstance(piece, int) else [False] * len(piece)
            tokens += [tiny.mask_id] * piece if isinstance(piece, int) else tiny.tokenizer.encode(piece)
        tokens += [tiny.eos_id] * (24 - len(tokens))
        steps = 0
        while tiny.mask_id in tokens:
            logits = tiny.lm_head(tiny.backbone(input_ids=torch.tensor([tokens])).last_hidden_state)[0]
            logits[:, tiny.mask_id] = -torch.inf
            confidence, proposal = logits.softmax(-1).max(-1)
            masked = [j for j, token in enumerate(tokens) if token == tiny.mask_id]
            legal = [j for j in masked if j // block == masked[0] // block]
            best = [max(legal, key=lambda j: confidence[j])]
            chosen = best if isinstance(rule, TopK) else [j for j in legal if confidence[j] >= 0.5] or best
            for j in chosen:
                tokens[j] = int(proposal[j])
            steps += 1
        assert results.completions[i] == tiny.decode(tokens) and results.nfe[i] == steps
        assert steps <= sum(blanks)


def test_sampled_tokens_do_not_depend_on_company():
    company, alone = (evaluate(envs(n, temperature=1.0), TopK(2), range(20), seed=5) for n in (16, 1))
    assert outcome(company) == outcome(alone)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_caches_end_every_episode_and_are_exact_where_nothing_is_kept(kind):
    whole = evaluate(envs(), TopK(24), range(40))  # one step: nothing is taken from the cache
    assert outcome(evaluate(envs(cache=kind), TopK(24), range(40))) == outcome(whole)
    steps = [evaluate(envs(lanes, cache=kind, block_length=6), TopK(1), range(40)) for lanes in (8, 3)]
    blanks = [int(envs().core.source[i].blanks.sum()) for i in range(40)]
    assert outcome(steps[0]) == outcome(steps[1]) and steps[0].nfe.tolist() == blanks


# ---- equal rows ----


def test_equal_prompts_with_other_templates_are_not_the_same_row():
    pairs = [("1+1=", ["2", 3]), ("1+1=", [3, "2"]), ("1+1=", None), ("1+1=", ["2", 3])]
    env = envs(4, task=Given(*pairs))
    observation, _ = env.reset(options={"examples": [0, 1, 2, 3]})
    assert env.core.work.rows == 3 and env.core.work.reused == 1
    assert torch.equal(observation["confidence"][0], observation["confidence"][3])
    for i in range(3):
        alone, _ = envs(1, task=Given(*pairs)).reset(options={"examples": [i]})
        torch.testing.assert_close(alone["confidence"][0], observation["confidence"][i], atol=1e-5, rtol=1e-5)
    env.reset(options={"examples": [3, 0, 2, 1]})
    assert env.core.work.rows == 3 and env.core.work.reused == 5
    env.step(torch.eye(12)[[1, 1, 1, 1]])
    assert env.core.work.rows > 3  # what has been committed to is forwarded again


def test_a_group_of_one_template_is_forwarded_once():
    env = envs(8)
    evaluate(env, TopK(1), [3] * 8)
    assert env.core.work.reused == 7


# ---- mixtures, empty prompts, families ----


def mixture() -> Mixture:
    return Mixture([Sums(sizes=SMALL), Sudoku(template=True, sizes=SMALL), Arithmetic(sizes=SMALL)])


@pytest.mark.parametrize("settings", [{}, {"block_length": 12}, {"block_length": 12, "cache": "dual"}], ids=str)
def test_tasks_with_and_without_templates_share_lanes(settings):
    company, alone = (evaluate(envs(n, task=mixture(), **settings), TopK(6), range(30)) for n in (11, 1))
    assert outcome(company) == outcome(alone)
    env = envs(task=mixture())
    blanks = defaultdict(list)
    for i in range(30):
        example = env.core.examples[i]
        task, own = env.core.task.member(example)
        expected = {"sums": lambda e: len(e["blanks"]), "sudoku": lambda e: e["puzzle"].count(".")}.get(task.name)
        blanks[task.name].append(int(env.core.source[i].blanks.sum()))
        assert blanks[task.name][-1] == (expected(own) if expected else 48)
    assert len(blanks) == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"cache": "dual"}], ids=str)
def test_an_empty_prompt_is_a_row_of_its_completion_in_every_family(name, settings, tmp_path):
    dllm = load_dllm(FAMILIES[name][0](tmp_path / "checkpoint"), chat_template=False)
    if settings and "bert" in name:
        with pytest.raises(ValueError, match="cache='dual'"):
            Unmasking(1, EnvConfig(model=dllm, **settings))
        return
    task = Given(("", None), ("", ["ab", 3, "c", 4]), ("abcdefab", None), ("abc", [2, "ab"]))
    left = LeftToRight(1)  # all masks and nothing else: but for rounding every position is as sure as the others
    company, alone = (
        evaluate(envs(n, model=dllm, task=task, block_length=4, **settings), left, range(4)) for n in (4, 1)
    )
    assert company.nfe.tolist() == alone.nfe.tolist() == [12, 7, 12, 2]
    assert company.completions == alone.completions
    assert company.completions[3].endswith("ab") or len(company.completions[3]) < 4


# ---- every face ----


@pytest.mark.parametrize("settings", [{}, {"block_length": 6, "hidden": True, "kl": 2}], ids=str)
def test_all_faces_tell_the_same_story(settings):
    from tensordict import TensorDict

    from dllm_gym.envs.sb3 import DLLMUnmaskSB3VecEnv
    from dllm_gym.envs.torchrl import DLLMUnmaskTorchRLEnv

    settings = {"task": Sums(sizes=SMALL), **settings}
    singles = [gym.make("DLLMUnmask-v0", **settings) for _ in range(3)]
    vector = gym.make_vec("DLLMUnmask-v0", num_envs=3, **settings)
    torchrl, sb3 = DLLMUnmaskTorchRLEnv(num_envs=3, **settings), DLLMUnmaskSB3VecEnv(num_envs=3, **settings)
    torchrl.set_seed(4)
    sb3.seed(4)
    observation, _ = vector.reset(seed=4)
    masks = [single.reset(seed=4 + lane)[0]["mask"] for lane, single in enumerate(singles)]
    td, other = torchrl.reset(), sb3.reset()
    running = [True] * 3
    for _ in range(30):
        for lane in (lane for lane in range(3) if running[lane]):
            mask = observation["mask"][lane].tolist()
            assert mask == masks[lane].tolist() == td["mask"][lane].tolist() == other["mask"][lane].tolist()
        legal = observation["action_mask"]
        action = torch.nn.functional.one_hot(legal.argmax(1), legal.shape[1]) * legal
        observation, reward, terminated, _, info = vector.step(action)
        td = torchrl.step(TensorDict({"action": action}, [3]))["next"]
        other, paid, _, infos = sb3.step(action.numpy())
        for lane in (lane for lane in range(3) if running[lane]):
            frame, r, over, _, single_info = singles[lane].step(action[lane].numpy())
            masks[lane], running[lane] = frame["mask"], not over
            assert (r, over) == (float(reward[lane]), bool(terminated[lane]))
            assert r == float(td["reward"][lane]) == float(paid[lane])
            if over:
                told = {name: value[lane].item() for name, value in info["episode"].items()}
                assert told == pytest.approx(single_info["episode"])
                assert infos[lane]["episode"]["l"] == told["l"]
                core = vector.unwrapped.core
                blanks = int(core.source[told["example"]].blanks.sum())
                assert told["l"] == blanks  # one at a time: each blank costs a step
                assert r == pytest.approx(told["score"] / blanks)
        if not any(running):
            return
    raise AssertionError("the episodes never ended")


def test_groups_and_experts_play_templates():
    episodes = play_groups(envs(4), [(policy(), 3), (policy(greedy=True), 1)], [0, 5], seed=1)
    blanks = [int(envs().core.source[i].blanks.sum()) for i in (0, 5)]
    masked = episodes.batch["mask"][:, 0].sum(1).tolist()
    assert masked == [blanks[group] for group in episodes.group.tolist()] and len(masked) == 8
    assert (episodes.batch["action"] <= episodes.batch["action_mask"]).all()


def test_an_evaluation_pays_blanks_at_every_alpha():
    env = envs(4, alpha=[0.5, 4.0])
    played = play(Lab(env), {"top": TopK(1)}, range(10), [0])["top"]
    results = played.results[0]
    blanks = torch.tensor([int(env.core.source[i].blanks.sum()) for i in range(10)])
    assert torch.equal(results.nfe, blanks)
    for alpha in (0.5, 4.0):
        by_hand = results.score.double() * (1 / blanks).double() ** alpha  # as many steps as blanks
        assert played.reward(alpha) == pytest.approx(by_hand.mean().item(), rel=1e-6)


# ---- sudoku as UPO has it ----


def test_the_sudoku_template_leaves_the_blank_cells_alone():
    task = Sudoku(template=True, sizes=SMALL)
    assert task.template({"puzzle": "12..............", "grid": ""}) == ["12", 2, "\n", 4, "\n", 4, "\n", 4]
    env = envs(task=task)
    results = evaluate(env, TopK(1), range(40))
    assert results.score.mean() > 0.9
    for i, text in enumerate(results.completions):
        example = env.core.examples[i]
        assert results.nfe[i] == example["puzzle"].count(".")
        assert all(given in (".", cell) for given, cell in zip(example["puzzle"], text.replace("\n", ""), strict=True))


def test_unique_puzzles_have_one_answer_and_cells_are_compared_with_it():
    task = Sudoku(template=True, unique=True, score="cells", max_givens=6, sizes=SMALL)
    for example in task.examples("test"):
        assert answers(example["puzzle"]) == 1 and 4 <= 16 - example["puzzle"].count(".") <= 6
    example = {"puzzle": "1234341221434...", "grid": "1234341221434321"}
    assert task.grade(example, "1234\n3412\n2143\n4321") == 1
    assert task.grade(example, "1234\n3412\n2143\n4311") == pytest.approx(2 / 3)
    assert task.grade(example, "1234\n3412\n2143\n43") == 0  # an end among the blanks cuts the answer
    assert task.grade(example, "") == 0
    twice = {"puzzle": "1...............", "grid": "1234341221434321"}
    assert answers(twice["puzzle"]) == 72 and answers("." * 16) == 288


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unique": True, "max_givens": 3}, "max_givens=3, unique=True"),
        ({"score": "cells"}, "score='cells', unique=False"),
        ({"score": "half"}, "score='half'"),
        ({"template": True, "max_givens": 16}, "max_givens=16, template=True"),
        ({"template": "yes"}, "template='yes'"),
        ({"unique": 2}, "unique=2"),
    ],
)
def test_sudokus_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sudoku(**settings)


def test_examples_without_a_prompt_are_told_apart_by_their_key():
    task = Sums(sizes=SMALL)
    keys = {split: {task.key(example) for example in task.examples(split)} for split in SMALL}
    assert all(len(keys[split]) == 40 for split in SMALL)
    assert not keys["train"] & keys["test"] and not keys["validation"] & keys["test"]
