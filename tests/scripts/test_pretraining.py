"""What the shipped dLLMs are trained on: blanks are masked and nothing else; decoding begins from the template."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from toys import Sums

from dllm_gym.tasks import Arithmetic, OneWay, Sudoku

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import pretraining  # noqa: E402

LESSON = OmegaConf.create({"batch_size": 64, "ramp": 0, "left_to_right": 0.5})
SMALL = {"train": 40, "validation": 40, "test": 40}


def batch(task, dllm) -> pretraining.Batch:
    torch.manual_seed(0)
    return pretraining.sample_batch(LESSON, task, dllm, random.Random(0), 0)


@pytest.mark.parametrize("left_to_right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("task", [Sums(), Sudoku(template=True), Sudoku(), Arithmetic()], ids=lambda task: task.name)
def test_blanks_alone_are_masked_and_at_least_one_per_row(task, left_to_right, tiny):
    examples = batch(task, tiny)
    masks = torch.stack([pretraining.random_masks(examples, left_to_right) for _ in range(20)])
    assert masks.any(2).all() and not (masks & ~examples.blanks).any()
    assert (masks.any(0) | ~examples.blanks).float().mean() > 0.95  # every blank has its turn
    assert (~masks & examples.blanks).any()  # and is shown in its turn


def test_the_window_of_rows_from_left_to_right_is_counted_in_blanks(tiny):
    examples = batch(Sums(), tiny)
    for row, blanks in zip(pretraining.random_masks(examples, 1.0), examples.blanks, strict=True):
        inside = row[blanks].int().tolist()  # the blanks alone, in order
        assert all(inside[inside.index(1) + 12 :])


def test_without_templates_everything_is_a_blank(tiny):
    examples = batch(Sudoku(), tiny)
    assert examples.blanks.all() and examples.answer_length.tolist() == [19] * 64


def test_an_empty_prompt_makes_whole_numbers_of_a_batch(tiny):
    examples = batch(Sums(), tiny)
    assert examples.prompts.shape == (64, 0) and examples.prompts.dtype == torch.int64


def test_only_masked_positions_count_in_the_loss(tiny):
    examples = batch(Sums(), tiny)
    network = type("Network", (), {"model": tiny.backbone, "lm_head": tiny.lm_head})()
    masks = pretraining.random_masks(examples, 0.0)
    loss = pretraining.denoising_loss(network, tiny, examples, masks, 0.1)
    row, column = masks.nonzero(as_tuple=True)
    noisy = torch.where(masks, tiny.mask_id, examples.completions)
    logits = tiny.lm_head(tiny.backbone(input_ids=noisy).last_hidden_state)
    each = torch.nn.functional.cross_entropy(logits[masks], examples.completions[masks], reduction="none")
    weight = torch.where(examples.completions[row, column] == tiny.eos_id, 0.1, 1.0) / masks.sum(1)[row].sqrt()
    torch.testing.assert_close(loss, (weight * each).sum() / weight.sum())


class Known(Sums):
    """Of a sum all but ``=`` is given: whoever decodes from the template keeps what it gives."""

    def template(self, example):
        head, _, tail = example["text"].partition("=")
        return [head, 1, tail]


def test_scores_are_decoded_from_the_template(tiny):
    seen = []

    class Seen(Known):
        def grade(self, example, completion):
            seen.append((example["text"], completion))
            return float(completion == example["text"])

    score = pretraining.decode_score(Seen(sizes=SMALL), tiny, 24, 20)
    assert len(seen) == 20 and 0 <= score <= 1
    for text, completion in seen:
        place = text.index("=")
        assert completion[:place] == text[:place] and len(completion) in (place, len(text))
    assert pretraining.decode_score(Sudoku(template=True, sizes=SMALL), tiny, 20, 20) > 0.9
    assert pretraining.decode_score(Sudoku(template=True, sizes=SMALL), tiny, 5, 20) > 0.3


def test_a_solution_that_the_template_contradicts_is_refused(tiny):
    class Wrong(Sums):
        def template(self, example):
            return ["0+0+", 1]

    with pytest.raises(ValueError, match="task 'sums': the solution .* does not have what the template"):
        batch(Wrong(), tiny)


def test_the_tokenizer_has_the_characters_asked_for(tiny):
    cfg = OmegaConf.load(Path(__file__).parents[2] / "conf/pretrain_tiny.yaml")
    shipped = pretraining.build_tokenizer(cfg.characters)
    assert shipped.get_vocab() == tiny.tokenizer.get_vocab()
    longer = pretraining.build_tokenizer(cfg.characters + "*_abc")
    assert longer.encode("a*b=_3") and longer.decode(longer.encode("a*b=_3")) == "a*b=_3"
    assert shipped.get_vocab().items() <= longer.get_vocab().items()


def test_causes_first_masks_what_follows_from_something_masked(tiny):
    text = "12=4*3;7-2=5;"
    follows = torch.zeros(1, 21, 21, dtype=torch.bool)
    for effect, causes in OneWay().causes({"answer": text}).items():
        follows[0, effect, causes] = True
    blanks = torch.tensor([[c.isdigit() for c in text] + [False] * 8])
    examples = pretraining.Batch(torch.zeros(1, 0), torch.zeros(1, 21), torch.tensor([13]), blanks, follows)
    masks = torch.zeros(1, 21, dtype=torch.bool)
    masks[0, [3, 11]] = True  # a factor of 12, and the result 5
    assert pretraining.causes_first(examples, masks, 1.0)[0].nonzero().flatten().tolist() == [0, 1, 3, 11]
    assert torch.equal(pretraining.causes_first(examples, masks, 0.0), masks)
