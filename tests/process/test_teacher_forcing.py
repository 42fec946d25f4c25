"""Teacher forcing: right completions are written, and how likely the dLLM held them is told as a plain forward says."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch import nn
from toys import PairTask, Sums, pair_dllm

import dllm_gym  # noqa: F401
from dllm_gym.models import Sampling, vocabulary
from dllm_gym.models.vocabulary import LOG_LEAST, Vocabulary
from dllm_gym.tasks import GSM8K, Arithmetic, Mixture, Sudoku


def plain_truth(core, lane):
    """Log-probability and margin float64 [L] of a lane's truth where it is masked, from one forward of that lane."""
    dllm = core.dllm
    tokens = core.tokens[lane, -(len(core.prompts[lane]) + core.L) :]
    logits = dllm.lm_head(dllm.backbone(input_ids=tokens[None]).last_hidden_state[0, -core.L :]).double()
    logits[:, dllm.mask_id] = -torch.inf
    p = logits.softmax(-1)
    true = torch.tensor(dllm.encode(core.task.gold(core.examples[core.example[lane]])))
    true = torch.cat([true, torch.full((core.L - len(true),), dllm.eos_id)])
    own = p.gather(1, true[:, None])[:, 0]
    others = p.scatter(1, true[:, None], -1.0).amax(-1)
    mask = tokens[-core.L :] == dllm.mask_id
    return torch.where(mask, own.log().clamp_min(LOG_LEAST), 0), torch.where(mask, own - others, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"block_length": 5, "lookahead": False}, {"block_length": 5, "cache": "dual"}]
)
def test_the_truth_is_written_and_the_dllm_is_asked_about_it(settings, monkeypatch):
    monkeypatch.setitem(vocabulary.SLICE, "cpu", 7)  # of a vocabulary of more tokens: the truth lies in any slice
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=6, teacher_forcing=True, tokens=True, **settings)
    core = envs.core
    seen, _ = envs.reset(seed=0)
    generator, ended = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        legal = seen["action_mask"] != 0
        shown = legal if settings else seen["mask"] != 0
        for lane in range(0 if "cache" in settings else 6):
            log_prob, margin = plain_truth(core, lane)
            there = shown[lane] | (seen["mask"][lane] == 0)
            torch.testing.assert_close(
                seen["true_log_prob"][lane][there].double(), log_prob[there], atol=2e-5, rtol=1e-4
            )
            torch.testing.assert_close(seen["true_margin"][lane][there].double(), margin[there], atol=2e-5, rtol=1e-4)
            assert torch.equal(seen["tokens"][lane][shown[lane]], core.predictions.proposal[lane][shown[lane]])
        seen, _, terminated, _, info = envs.step(legal & (torch.rand(legal.shape, generator=generator) < 0.5))
        ended += terminated.sum()
        assert (info["episode"]["score"][terminated] == 1).all() if terminated.any() else True
    assert ended >= 6


def test_what_a_policy_reads_does_not_know_the_truth():
    """The first observation, before anything is committed, is the same with teacher forcing and without."""
    free, forced = (gym.make_vec("DLLMUnmask-v0", num_envs=3, tokens=True, hidden=True, **s) for s in ({}, FORCED))
    one, other = (envs.reset(seed=4)[0] for envs in (free, forced))
    assert set(other) - set(one) == {"true_log_prob", "true_margin"}
    assert all(torch.equal(value, other[name]) for name, value in one.items())


FORCED = {"teacher_forcing": True}


def test_true_tokens_by_hand():
    head = nn.Linear(3, 3, bias=False)
    nn.init.eye_(head.weight)
    hidden = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, -1.0, 3.0], [0.0, -500.0, 0.0]])
    truth = torch.tensor([0, 2, 2, 1])
    for forbidden in ([], [0]):
        said = Vocabulary(head, 3, forbidden).read(hidden, Sampling(truth=True), None, truth)
        p = hidden.double().index_fill(1, torch.tensor(forbidden, dtype=torch.long), -torch.inf).softmax(-1)
        own = p[torch.arange(4), truth]
        others = torch.stack([row[torch.arange(3) != t].amax() for row, t in zip(p, truth, strict=True)])
        torch.testing.assert_close(said.true_log_prob.double(), own.log().clamp_min(-100), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(said.true_margin.double(), own - others, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="pass them"):
        Vocabulary(head, 3, []).read(hidden, Sampling(truth=True))


class TwoAnswers(PairTask):
    """One prompt, two right completions."""

    def examples(self, split):
        return super().examples(split).from_list([{"prompt": "=", "gold": gold} for gold in ("12", "21")])

    def gold(self, example):
        return example["gold"]


def test_equal_prompts_with_other_truths_are_told_apart():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=4, model=pair_dllm(), task=TwoAnswers(), teacher_forcing=True)
    seen, _ = envs.reset(seed=0, options={"examples": [0, 1, 1, 0]})
    likely = seen["true_log_prob"].exp() > 0.5  # the dLLM begins with "22"
    assert likely.tolist() == [[False, True], [True, False], [True, False], [False, True]]
    envs.step(seen["action_mask"])
    assert envs.last_completions() == ["12", "21", "21", "12"]


class Other(Sums):
    def gold(self, example):
        return "9" * len(example["text"])


class Longer(Arithmetic):
    def gold(self, example):
        return "1" * 1000


def test_gold_completions_are_cut_agree_with_templates_and_are_needed():
    envs = gym.make_vec("DLLMUnmask-v0", num_envs=1, task=Sums(), teacher_forcing=True)
    seen, _ = envs.reset(seed=0, options={"examples": [3]})
    envs.step(seen["action_mask"])
    assert envs.last_completions() == [envs.core.examples[3]["text"]]
    cut = gym.make_vec("DLLMUnmask-v0", num_envs=1, task=Longer(), teacher_forcing=True)
    seen, _ = cut.reset(seed=0)
    cut.step(seen["action_mask"])
    assert cut.last_completions() == ["1" * cut.core.L]
    for task, said in ((Other(), "does not have what the template"), (PairTask(), "task 'pair' has no gold")):
        with pytest.raises(ValueError, match=said):
            gym.make_vec("DLLMUnmask-v0", num_envs=1, task=task, teacher_forcing=True).reset(seed=0)


def test_gold_completions_are_right():
    example = {"question": "What is 6 * 8?", "working": "6 * 8 = 48", "answer": "48"}
    for style in ("xml", "chat"):
        for prefilled in (True, False):
            task = GSM8K(prompt_style=style, prefilled=prefilled)
            gold = task.gold(example)
            assert task.grade(example, gold) == 1 and gold.startswith("<reasoning>") == (
                style == "xml" and not prefilled
            )
    mixed = Mixture([Sudoku(sizes={"train": 3}), Arithmetic(sizes={"train": 3})])
    assert all(mixed.grade(each, mixed.gold(each)) == 1 for each in mixed.examples("train"))
