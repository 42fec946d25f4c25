"""Tasks on data: reading files, splits, prompts, mixtures, the registry; all of GSM8K where it is at hand."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dllm_gym.envs.single import DLLMUnmaskEnv
from dllm_gym.prompt import Chat
from dllm_gym.tasks import (
    GSM8K,
    TASKS,
    Arithmetic,
    Countdown,
    Math,
    Mixture,
    PromptStyle,
    ReasoningGym,
    Sudoku,
    SudokuFile,
    make_task,
    register,
)
from dllm_gym.tasks.base import SPLITS
from dllm_gym.tasks.code import MBPP, HumanEval, KodCode
from dllm_gym.tasks.grading.workers import Pool

ROOT = Path(__file__).parents[2]
ROWS = [
    {"question": f"What is {n} + {n}?", "answer": f"We add. {n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
    for n in range(300)
]


def write(path: Path, rows: list[dict]) -> str:
    """``rows`` in the format that the file's name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "train.jsonl", ROWS[:200])
    write(tmp_path / "test.jsonl", ROWS[200:])
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **settings):
        raise ConnectionError(f"no network: {arguments}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def questions(task, split) -> list[str]:
    return [example["question"] for example in task.examples(split)]


# ---- reading ----


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_examples(suffix, tmp_path):
    task = GSM8K(data={"test": write(tmp_path / f"mine.{suffix}", ROWS[:20])})
    examples = task.examples("test")
    assert isinstance(examples, datasets.Dataset) and task.examples("test") is examples
    assert examples.to_list() == [
        {"question": f"What is {n} + {n}?", "working": f"We add. {n} + {n} = {2 * n}", "answer": str(2 * n)}
        for n in range(20)
    ]


def test_a_folder_holds_one_file_per_split_or_pieces_of_it(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:50])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[50:90])
    write(tmp_path / "val.json", ROWS[90:100])
    write(tmp_path / "test.csv", ROWS[100:120])
    (tmp_path / "README.md").write_text("not data")
    write(tmp_path / "train_old.jsonl", ROWS[120:])
    task = GSM8K(data=tmp_path)
    assert [len(task.examples(split)) for split in SPLITS] == [90, 10, 20]
    assert questions(task, "train")[49:51] == ["What is 49 + 49?", "What is 50 + 50?"]


def test_csv_cells_keep_zeros_and_line_breaks(tmp_path):
    rows = [{"Puzzle": "0034341221434321", "Solution": "1234341221434321"}]
    assert SudokuFile(data={"test": write(tmp_path / "a.csv", rows)}).examples("test")[0]["puzzle"] == rows[0]["Puzzle"]
    numbers = [{name: int(cells) for name, cells in rows[0].items()}]  # as pandas writes them
    assert (
        SudokuFile(data={"test": write(tmp_path / "a.json", numbers)}).examples("test")[0]["puzzle"]
        == rows[0]["Puzzle"]
    )


def test_the_hub_is_asked_for_the_right_splits_and_only_when_needed(monkeypatch):
    asked = []

    def load(path, config, *, split, revision):
        asked.append((path, config, split) if revision is None else (path, config, split, revision))
        return datasets.Dataset.from_list(ROWS[:100])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = GSM8K()
    assert not asked
    task.examples("test")
    assert asked == [("openai/gsm8k", "main", "test")]
    task.examples("train")
    task.examples("validation")  # a part of train, which is read already
    assert asked[1:] == [("openai/gsm8k", "main", "train")]
    GSM8K(data="me/copy").examples("test")
    GSM8K(data="me/copy:socratic").examples("train")
    assert asked[2:] == [("me/copy", None, "test"), ("me/copy", "socratic", "train")]
    GSM8K(data="me/copy@v1.0").examples("test")
    GSM8K(data="me/copy@refs/pr/2:main").examples("train")
    assert asked[4:] == [("me/copy", None, "test", "v1.0"), ("me/copy", "main", "train", "refs/pr/2")]


def test_making_any_task_touches_no_network(offline):
    assert {name: make_task(name).gen_length > 0 for name in TASKS} == dict.fromkeys(TASKS, True)
    with pytest.raises(
        ValueError, match=r"cannot load split 'test' of openai/gsm8k.*no network.*hf auth login.*task\.data="
    ):
        make_task("gsm8k").examples("test")


GOOD = {
    GSM8K: {"question": "a", "answer": "1"},
    Math: {"problem": "a", "answer": "1"},
    Countdown: {"numbers": [1, 2], "target": 3},
    SudokuFile: {"Puzzle": "0034341221434321", "Solution": "1234341221434321"},
    MBPP: {"text": "a", "test_list": ["assert f(1)"], "task_id": 601},
    KodCode: {
        "question": "a",
        "test": "from solution import f\ndef test_it(): assert f()",
        "test_info": [{"function_declaration": "def f():"}],
    },
}
BROKEN = [
    (GSM8K, {"answer": None}, "the column 'answer' holds None: need a text"),
    (GSM8K, {"question": ["b"]}, r"the column 'question' holds \['b'\]: need a text"),
    (GSM8K, {"question": " "}, "the column 'question' holds ' ': need a text"),
    (Math, {"problem": None}, "the column 'problem' holds None"),
    (Math, {"answer": float("nan")}, "the column 'answer' holds nan"),
    (Math, {"answer": [1]}, r"the column 'answer' holds \[1\]"),
    (Countdown, {"numbers": 5}, "numbers=5: need a list"),
    (Countdown, {"numbers": []}, r"numbers=\[\]: need a list"),
    (Countdown, {"numbers": [1, None]}, "numbers: None is no whole number of at least 0"),
    (Countdown, {"numbers": [1.5]}, "numbers: 1.5 is no whole number"),
    (Countdown, {"numbers": "1.5,-2"}, "numbers: '1.5' is no whole number"),
    (Countdown, {"numbers": [True]}, "numbers: True is no whole number"),
    (Countdown, {"target": 46.7}, "target: 46.7 is no whole number"),
    (Countdown, {"target": "x"}, "target: 'x' is no whole number"),
    (SudokuFile, {"Puzzle": None}, "'None', '1234341221434321' is no 4x4 puzzle"),
    (MBPP, {"test_list": "['assert f(1)']"}, "test_list=.*: need a list of texts .which CSV files cannot hold"),
    (MBPP, {"test_list": [1]}, r"test_list=\[1\]: need a list of texts"),
    (MBPP, {"text": None}, "the column 'text' holds None"),
    (MBPP, {"test_setup_code": 5}, "test_setup_code=5: need a text"),
    (KodCode, {"test": None}, "need a text as test"),
    (KodCode, {"test_info": "[{}]"}, "need a text as test and a list of objects as test_info"),
    (KodCode, {"test_info": ["x"]}, "AttributeError"),
    (KodCode, {"question": None}, "the column 'question' holds None"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN, ids=[f"{k.name} {c}" for k, c, _ in BROKEN])
def test_a_broken_row_is_named_with_its_file_and_number(kind, change, message, tmp_path):
    settings = {"sandbox": "rlimit"} if kind in (MBPP, KodCode) else {}
    path = write(tmp_path / "a.jsonl", [GOOD[kind], {**GOOD[kind], **change}])
    with pytest.raises(ValueError, match=f"row 2 of '.*a.jsonl': {message}"):
        kind(data={"train": path}, **settings).rows.of("train")
    lacking = {name: value for name, value in GOOD[kind].items() if name != next(iter(change), "")}
    if lacking != GOOD[kind]:
        with pytest.raises(ValueError, match="row 1 of '.*b.jsonl': (lacks the columns|no value for|the problem)"):
            kind(data={"train": write(tmp_path / "b.jsonl", [lacking])}, **settings).rows.of("train")


def test_rows_may_differ_in_their_columns(tmp_path):
    rows = [{**GOOD[MBPP], "test_list": ["assert f(1) == 5"]}] * 2
    rows[1] = {**rows[1], "test_setup_code": "Z = 5"}
    task = MBPP(data=write(tmp_path / "a.jsonl", rows), sandbox="rlimit")
    examples = task.examples("train").to_list()
    assert [example["test_setup_code"] for example in examples] == [None, "Z = 5"]
    assert task.grade_all(examples, ["def f(x):\n    return Z"] * 2) == [0.0, 1.0]
    named = [{**row, "task_id": f"MBPP/{number}"} for number, row in zip((511, 602), rows, strict=True)]
    task = MBPP(data=write(tmp_path / "c.jsonl", named), sandbox="rlimit")
    assert task.examples("train")["task_id"] == ["MBPP/602"]
    with pytest.raises(ValueError, match="without task_id .a number, here 'eleven'. the rows of one file"):
        MBPP(data=write(tmp_path / "b.jsonl", [{**rows[0], "task_id": "eleven"}]), sandbox="rlimit").examples("train")


def test_what_differs_in_type_or_has_cells_too_many_is_refused(tmp_path):
    rows = [{"prompt": "def f():\n", "test": "", "entry_point": "f", "note": note} for note in (1, ["x"])]
    with pytest.raises(ValueError, match="a column of split 'test' holds values of different types"):
        HumanEval(data=write(tmp_path / "a.jsonl", rows), sandbox="rlimit").examples("test")
    (tmp_path / "b.csv").write_text("question,answer\nWhat is 1, 2 and 3?,#### 4\n")
    with pytest.raises(ValueError, match="b.csv' cannot be read as csv .*more cells than the header"):
        GSM8K(data=tmp_path / "b.csv").examples("train")
    (tmp_path / "c.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="c.json' cannot be read as json"):
        GSM8K(data=tmp_path / "c.json").examples("train")


def test_kodcode_leaves_out_tests_that_cannot_be_read(tmp_path):
    deep = GOOD[KodCode]["test"] + " == " + "+".join("1" * 20_000)
    rows = [GOOD[KodCode], {**GOOD[KodCode], "test": deep}, {**GOOD[KodCode], "test_info": [{}]}]
    task = KodCode(data={"train": write(tmp_path / "a.jsonl", rows)}, sandbox="rlimit")
    assert len(task.rows.of("train")) == 1
    assert task.left_out["no function declaration"] == 1 and sum(task.left_out.values()) == 2


# ---- splits ----


def test_missing_splits_are_taken_out_of_train_by_the_question(tmp_path):
    task = GSM8K(data=write(tmp_path / "all.jsonl", ROWS))
    parts = {split: questions(task, split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 300 == len(set().union(*parts.values()))
    assert all(15 <= len(parts[split]) <= 50 for split in ("validation", "test"))
    shuffled = random.Random(0).sample(ROWS, 150)  # other order, other rows: the same questions stay where they were
    again = GSM8K(data=write(tmp_path / "some.jsonl", shuffled))
    for split in SPLITS:
        assert set(questions(again, split)) == set(parts[split]) & {row["question"] for row in shuffled}


@pytest.mark.parametrize(
    ("kind", "file", "split"),
    [
        (GSM8K, "test.jsonl", "test"),
        (GSM8K, "gsm8k_test.json", "test"),
        (GSM8K, "Test-00000-of-00001.parquet", "test"),
        (GSM8K, "val.csv", "validation"),
        (Math, "math500.jsonl", "test"),
        (Math, "MATH-500.jsonl", "test"),
        (Math, "math_500_test.jsonl", "test"),
    ],
)
def test_a_file_named_after_a_split_is_that_split_whole(kind, file, split, tmp_path, caplog):
    rows = ROWS if kind is GSM8K else [{"problem": row["question"], "answer": "1"} for row in ROWS]
    task = kind(data=write(tmp_path / file, rows))
    asked = questions(task, split) if kind is GSM8K else list(task.examples(split)["problem"])
    assert asked == [row["question"] for row in ROWS] and not caplog.records
    with pytest.raises(ValueError, match=f"split='train': .* gives {split}"):
        task.examples("train")


@pytest.mark.parametrize("file", ["all.jsonl", "latest.jsonl", "train_and_test.jsonl", "math500.jsonl", "train.jsonl"])
def test_a_file_that_no_split_names_is_train_and_a_share_of_it_is_called_one(file, tmp_path, caplog):
    task = GSM8K(data=write(tmp_path / file, ROWS))
    count = len(task.examples("test"))
    assert 15 <= count <= 50 and f"split 'test' is {count} of the 300 rows" in caplog.text
    assert {name: len(task.examples(name)) for name in SPLITS} != {"test": 300}


def test_mbpp_has_a_sanitized_edition(tmp_path, monkeypatch):
    edition = {"prompt": "Square a number.", "code": "def f(x):\n    return x**2", "source_file": "a.ipynb"}
    edition |= {"test_imports": ["import math"], "test_list": ["assert math.isclose(f(2), 4)"]}
    rows = [{**edition, "task_id": number} for number in (2, 3, 4, 11, 12, 511, 602)]
    for name, sizes in (("sanitized-mbpp.json", [1, 1, 2]), ("test.jsonl", [0, 0, 7])):
        task = MBPP(data=write(tmp_path / name, rows), shots=0 if sizes[2] == 7 else 3, sandbox="rlimit")
        assert [len(task.examples(split)) if n else 0 for split, n in zip(SPLITS, sizes, strict=True)] == sizes
        (first, *_) = task.examples("test")
        assert "Square a number." in str(task.prompt(first))
        assert task.grade_all([first] * 2, [f"{edition['code']}\n```", "def f(x): return x\n```"]) == [1.0, 0.0]
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k["split"])) or datasets.Dataset.from_list(rows)
    )
    hub = MBPP(data="google-research-datasets/mbpp:sanitized", sandbox="rlimit")
    assert len(hub.examples("test")) == 7
    assert asked == [(("google-research-datasets/mbpp", "sanitized"), "test")]


def test_only_what_is_missing_is_taken(folder):
    task = GSM8K(data=folder)
    assert len(task.examples("test")) == 100
    train, validation = questions(task, "train"), questions(task, "validation")
    assert len(train) + len(validation) == 200 and not set(train) & set(validation) and validation
    assert questions(GSM8K(data=str(folder), held_out=0), "train") == [row["question"] for row in ROWS[:200]]
    assert len(GSM8K(data=folder, held_out=0.4).examples("validation")) > 50
    with pytest.raises(ValueError, match="split='validation': task 'gsm8k' has no such data"):
        GSM8K(data=folder, held_out=0).examples("validation")


def test_the_cap_drops_and_reports(folder, caplog):
    longest = max(len(GSM8K().question(row)) for row in ROWS[200:])
    task = GSM8K(data=folder, max_prompt_chars=longest)
    with caplog.at_level(logging.WARNING):
        assert len(task.examples("test")) == 100 and task.dropped == {"test": 0}
    assert not caplog.text
    task = GSM8K(data=folder, max_prompt_chars=len(GSM8K().question(ROWS[9])))
    with caplog.at_level(logging.WARNING):
        assert questions(task, "train") == [
            q for q in questions(GSM8K(data=folder), "train") if len(q) == len("What is 9 + 9?")
        ]
    dropped = len(GSM8K(data=folder).examples("train")) - len(task.examples("train"))
    assert task.dropped["train"] == dropped > 100 and f"drops {dropped} of" in caplog.text
    with pytest.raises(ValueError, match=r"split='test' of task 'gsm8k' is empty: max_prompt_chars=\d+ drops all 100"):
        task.examples("test")


# ---- prompts ----

XML = """Think before you answer. Write your thoughts between <reasoning> and </reasoning>, then only the result \
between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

"""
ASKED = "What is 6 * 8?\nWork it out step by step and put the final number into \\boxed{}."
EXAMPLE = {"question": "What is 6 * 8?", "working": "6 * 8 = 48", "answer": "48"}


def test_prompts_word_by_word():
    assert GSM8K().prompt(EXAMPLE) == Chat((("user", XML + ASKED),), "<reasoning>\n")
    assert GSM8K(prefilled=False).prompt(EXAMPLE) == Chat((("user", XML + ASKED),))
    assert GSM8K(prompt_style="chat").prompt(EXAMPLE) == Chat((("user", ASKED),))
    style = PromptStyle("Be brief.", prefill="So", reply="{working} {{}} {answer}")
    assert GSM8K(prompt_style=style).prompt(EXAMPLE) == Chat((("user", "Be brief.\n\n" + ASKED),), "So")
    assert style.write("a", "{b}") == "a {} {b}"
    problem = {"problem": "Solve $x=1$.", "working": "Look.", "answer": "1"}
    assert Math(prompt_style="chat").prompt(problem).turns == (
        ("user", "Solve $x=1$.\nDerive the result step by step and put it, in LaTeX, into \\boxed{}."),
    )
    assert Countdown(prompt_style="chat").prompt({"numbers": [3, 7, 25], "target": 46}).turns == (
        (
            "user",
            "Combine the numbers 3, 7, 25 with +, -, *, / and parentheses so that the result is 46. Use every number "
            "exactly once. Put the expression alone, without an equals sign, into \\boxed{}.",
        ),
    )
    assert SudokuFile(prompt_style="chat").prompt({"puzzle": "1204341221404321", "solution": ""}).turns == (
        (
            "user",
            "Fill every 0 of this 4x4 sudoku with a digit from 1 to 4, so that each row, each column and each of the "
            "four 2x2 boxes holds each digit once:\n1204\n3412\n2140\n4321\n"
            "Answer with the full grid in four lines of four digits, between <answer> and </answer>.",
        ),
    )


def test_shots_are_the_first_training_rows_and_no_training_examples(folder):
    plain, task = GSM8K(data=folder), GSM8K(data=folder, shots=2)
    chat = task.prompt(EXAMPLE)
    first, second = plain.examples("train").to_list()[:2]
    assert [role for role, _ in chat.turns] == ["user", "assistant", "user", "assistant", "user"]
    assert chat.turns[0][1] == XML + task.question(first) and chat.turns[2][1] == task.question(second)
    assert chat.turns[4][1] == ASKED and chat.prefill == "<reasoning>\n"
    assert chat.turns[1][1] == (
        f"<reasoning>\n{first['working']}\n</reasoning>\n<answer>\n\\boxed{{{first['answer']}}}\n</answer>"
    )
    assert questions(task, "train") == questions(plain, "train")[2:]
    assert questions(task, "test") == questions(plain, "test")
    assert GSM8K(data=folder, shots=2).prompt(EXAMPLE) == chat


def test_shots_may_have_data_of_their_own(tmp_path):
    data = {"test": write(tmp_path / "a.json", ROWS[:3]), "shots": write(tmp_path / "b.json", ROWS[3:5])}
    chat = GSM8K(data=data, shots=1, prompt_style="chat").prompt(EXAMPLE)
    assert chat.turns[:2] == (
        ("user", "What is 3 + 3?\nWork it out step by step and put the final number into \\boxed{}."),
        ("assistant", "We add. 3 + 3 = 6\n\\boxed{6}"),
    )
    with pytest.raises(ValueError, match="shots=3: task 'gsm8k' has 2 rows"):
        GSM8K(data=data, shots=3).prompt(EXAMPLE)


def test_a_task_may_have_a_system_turn(folder):
    class Polite(GSM8K):
        system = "You are polite."

    assert Polite(data=folder, prompt_style="chat").prompt(EXAMPLE).turns == (
        ("system", "You are polite."),
        ("user", ASKED),
    )


def test_a_completion_is_graded_as_the_end_of_its_prefill():
    style = PromptStyle(prefill="<answer>4")
    assert GSM8K(prompt_style=style).grade(EXAMPLE, "8</answer> (not 9)") == 1
    assert GSM8K(prompt_style=style, prefilled=False).grade(EXAMPLE, "8</answer> (not 9)") == 0


@pytest.mark.parametrize("style", ["xml", "chat"])
def test_every_reply_scores_one(style, tmp_path):
    grid = {"Puzzle": "0034341221434320", "Solution": "1234341221434321"}
    tasks = [
        GSM8K(prompt_style=style, data=write(tmp_path / "g.json", ROWS)),
        Math(
            prompt_style=style,
            data=write(tmp_path / "m.json", [{"problem": "?", "solution": r"So \boxed{\frac{1}{2}}."}]),
        ),
        Countdown(prompt_style=style, data=write(tmp_path / "c.json", [{"input": "44,19,35", "output": "98"}])),
        SudokuFile(prompt_style=style, data=write(tmp_path / "s.csv", [grid])),
    ]
    for task in tasks:
        examples = [example for split in SPLITS for example in task.rows.of(split)][:30]
        for example in examples:
            prefill = task.prompt(example).prefill
            assert task.reply(example).startswith(prefill)
            assert task.grade(example, task.reply(example).removeprefix(prefill)) == 1
        assert examples and task.grade(examples[0], "") == 0


# ---- single tasks ----


def test_math_takes_the_last_box_of_a_solution_where_no_answer_is_given(tmp_path):
    rows = [
        {"problem": "a", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}.", "level": "Level 1"},
        {"problem": "b", "solution": "Nothing boxed.", "answer": "2"},
        {"problem": "c", "answer": 0},
        {"problem": "d", "answer": None, "solution": r"\boxed{0}"},
    ]
    task = Math(data={"test": write(tmp_path / "m.jsonl", rows)})
    assert [example["answer"] for example in task.examples("test")] == [r"\frac{1}{2}", "2", "0", "0"]
    with pytest.raises(ValueError, match="the problem 'b' has no answer and no boxed solution"):
        Math(data={"test": write(tmp_path / "n.jsonl", [{"problem": "b", "solution": "?"}])}).examples("test")


def test_math_asks_for_its_grader_before_the_first_episode(tmp_path, monkeypatch):
    task = Math(data={"test": write(tmp_path / "m.jsonl", [{"problem": "a", "answer": "1"}])})
    monkeypatch.setattr("dllm_gym.tasks.grading.latex.POOL", Pool("none", seconds=1.0))
    with pytest.raises(ValueError, match="task 'math' needs math-verify: pip install math-verify"):
        task.examples("test")


def test_countdown_takes_the_fields_of_several_files(tmp_path):
    rows = [{"input": "3,7,25", "output": "46"}], [{"nums": [3, 7, 25], "target": 46}]
    rows += ([{"numbers": "[3, 7, 25]", "target": "46.0", "more": None}],)
    rows += ([{"numbers": "[ 3  7 25]", "target": 46.0}],)
    for i, row in enumerate(rows):
        task = Countdown(data={"test": write(tmp_path / f"{i}.jsonl", row)})
        assert task.examples("test").to_list() == [{"numbers": [3, 7, 25], "target": 46}]
    with pytest.raises(ValueError, match="row 1 of .*x.jsonl.: no value for target or output among the columns input"):
        Countdown(data={"test": write(tmp_path / "x.jsonl", [{"input": "1,2"}])}).examples("test")


PUZZLE = {"puzzle": "1004341221434320", "solution": "1234341221434321"}
SUDOKU = [
    ("1234\n3412\n2143\n4321", 1, 1),
    ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", 1, 1),
    ("| 1 | 2 | 3 | 4 | 3412, 2143, 4321", 1, 1),
    ("<answer>1234341221434321</answer> 4444444444444444", 1, 1),  # the mark counts
    ("4444444444444444 then 1234341221434321", 1, 1),  # the last grid
    ("1244341221434321", 2 / 3, 0),
    ("1324341221434321", 1 / 3, 0),
    ("1004341221434321", 1 / 3, 0),
    ("9239999999999991", 1, 0),  # cells: only blank ones are looked at
    ("The grid is 1234 3412 2143 4321. Done.", 1, 1),
    ("1234341221434321...", 1, 1),
    ("[[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]", 1, 1),
    ("| 1 | 2 | 3 | 4 |\n|---|:-:|---|---|\n| 3 | 4 | 1 | 2 |\n| 2 | 1 | 4 | 3 |\n| 4 | 3 | 2 | 1 |", 1, 1),
    ("12|34\n34|12\n--+--\n21|43\n43|21", 1, 1),
    ("**1234**\n**3412**\n**2143**\n**4321**", 1, 1),
    (r"\boxed{\begin{matrix}1&2&3&4\\3&4&1&2\\2&1&4&3\\4&3&2&1\end{matrix}}", 1, 1),
    ("Row 1: 1234\nRow 2: 3412\nRow 3: 2143\nRow 4: 4321", 1, 1),
    ("**Step 2**\n1234341221434321", 1, 1),  # the bold text before it is no part of the grid
    ("1004341221434320\n\n[[1,2,3,4],[3,4,1,2],[2,1,4,3],[4,3,2,1]]", 1, 1),
    ("[1,2,3,4],[3,4,1,2],[2,1,4,3],[4,3,2,1] no: 4244444444444444", 1 / 3, 0),
    ("1234 3412 2143 43[21]5", 0, 0),
    ("123434122143432.", 2 / 3, 0),  # sixteen cells, the last one blank
    ("123434122143432", 0, 0),
    ("12343412214343211", 0, 0),
    ("1,2,3," * 100, 0, 0),
    ("", 0, 0),
    ("１２３４３４１２２１４３４３２１", 0, 0),
]


@pytest.mark.parametrize(("text", "cells", "grid"), SUDOKU, ids=[text[:20] for text, *_ in SUDOKU])
def test_sudokus_from_files_are_scored_by_cell_or_as_a_whole(text, cells, grid):
    assert SudokuFile().grade(PUZZLE, text) == pytest.approx(cells)
    assert SudokuFile(score="grid").grade(PUZZLE, text) == grid


D1 = [  # the blanks are the second, the third and the last cell: 2, 3 and 1
    ("<answer>1234341221434321</answer>", 1),
    ("<answer>\n1234\n3412\n2143\n4321\n</answer> done 1", 1),
    ("<answer>1234 3412 | 2143, row 4: 4321.</answer>", 2 / 3),  # whose 4 is a digit as well
    ("<answer>123434122143432</answer>", 2 / 3),  # filled up with zeros
    ("<answer>12</answer>", 1 / 3),
    ("<answer>2</answer>", 0),
    ("<answer>12343412214343219999</answer>", 1),  # cut off
    ("<answer>0123434122143432</answer>", 0),
    ("<answer>1</answer><answer>12</answer>", 1 / 3),  # the last one
    ("<answer>1234341221434321", 0),  # not closed
    ("1234341221434321", 0),
    ("<answer></answer>", 0),
    ("<answer>none</answer>", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "score"), D1, ids=[text[:24] for text, _ in D1])
def test_malformed_grids_score_as_d1_scores_them_if_asked(text, score):
    assert SudokuFile(score="d1").grade(PUZZLE, text) == pytest.approx(score)


# ---- mixtures ----


def small(sudokus=40, chains=120) -> list:
    sizes = [{"train": n, "validation": 5, "test": n // 2} for n in (sudokus, chains)]
    return [Sudoku(sizes=sizes[0]), Arithmetic(sizes=sizes[1])]


def members(task, split="train") -> list[str]:
    return [example["member"] for example in task.examples(split)]


def test_without_weights_every_example_is_there_once():
    task = Mixture(small())
    assert task.name == "sudoku_arithmetic" and task.gen_length == 48
    for split, counts in (("train", (40, 120)), ("test", (20, 60))):
        examples = task.examples(split).to_list()
        assert isinstance(task.examples(split), datasets.Dataset)
        assert Counter(members(task, split)) == {"sudoku": counts[0], "arithmetic": counts[1]}
        assert len({(e["member"], e["index"]) for e in examples}) == len(examples)
        for start in range(0, len(examples), 4):  # evenly interleaved: one in four
            assert members(task, split)[start : start + 4].count("sudoku") == 1
    assert task.examples("train").to_list() == Mixture(small()).examples("train").to_list()


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 1], (40, 40)), ({"arithmetic": 0.75, "sudoku": 0.25}, (40, 120)), ([1, 4], (30, 120)), ([10, 1], (40, 4))],
)
def test_weights_rule_the_training_split_and_leave_evaluation_whole(weights, counts):
    task = Mixture(small(), weights=weights)
    assert Counter(members(task)) == dict(zip(("sudoku", "arithmetic"), counts, strict=True))
    assert Counter(members(task, "test")) == {"sudoku": 20, "arithmetic": 60}
    half = members(task)[: sum(counts) // 2]
    assert abs(half.count("sudoku") - counts[0] / 2) <= 1


def test_members_show_and_grade_their_own():
    sudoku, arithmetic = small()
    task = Mixture({"grids": sudoku, "sums": arithmetic})
    examples = task.examples("test").to_list()
    texts = []
    for example in examples:
        own = {"grids": sudoku, "sums": arithmetic}[example["member"]]
        mine = own.examples("test")[example["index"]]
        assert task.prompt(example) == own.prompt(mine)
        texts.append(own.solution(mine) if example["index"] % 2 else "#")
        assert task.grade(example, texts[-1]) == own.grade(mine, texts[-1]) == example["index"] % 2
    assert task.grade_all(examples, texts) == [example["index"] % 2 for example in examples]
    with pytest.raises(ValueError, match="1 completions for 2 examples"):
        task.grade_all(examples[:2], ["#"])


def test_a_mixture_of_mixtures_of_files(folder):
    inner = Mixture([GSM8K(data=folder), Sudoku(sizes={"train": 10})], name="inner")
    task = Mixture([inner, Arithmetic(sizes={"train": 10})], gen_length=64)
    examples = task.examples("train").to_list()
    assert task.gen_length == 64 and {type(task.prompt(example)) for example in examples} == {Chat, str}
    assert {task.dataset_of(example) for example in examples} == {"inner/gsm8k", "inner/sudoku", "arithmetic"}


def test_an_environment_runs_on_a_mixture():
    env = DLLMUnmaskEnv(task=Mixture(small()), split="test")
    seen = set()
    for example in range(8):
        observation, _ = env.reset(options={"examples": example}, seed=0)
        over = False
        while not over:
            observation, _, terminated, truncated, info = env.step(np.ones(48, np.int8))
            over = terminated or truncated
        seen.add(env.core.examples[info["episode"]["example"]]["member"])
    assert seen == {"sudoku", "arithmetic"}


# ---- reasoning-gym ----


@pytest.fixture(scope="module")
def reasoning() -> ReasoningGym:
    pytest.importorskip("reasoning_gym", reason="the optional extra 'reasoning'")
    return ReasoningGym(options={"min_empty": 2, "max_empty": 6}, sizes={"train": 60, "validation": 15, "test": 15})


def test_reasoning_puzzles_are_reproducible_and_splits_disjoint(reasoning):
    again = ReasoningGym(options=reasoning.options, sizes=reasoning.sizes)
    assert reasoning.examples("test").to_list() == again.examples("test").to_list()
    prompts = {split: {reasoning.prompt(e) for e in reasoning.examples(split)} for split in SPLITS}
    assert all(prompts[a].isdisjoint(prompts[b]) for a, b in combinations(SPLITS, 2))
    other = ReasoningGym(options=reasoning.options, sizes=reasoning.sizes, seed=1)
    assert not set(questions(other, "test")) & set(questions(reasoning, "train"))
    assert all(question.count("_") <= 6 for question in questions(reasoning, "train"))  # options arrive
    example = reasoning.examples("test")[0]
    assert reasoning.prompt(example) == XML + example["question"]


def test_reasoning_answers_are_scored_by_the_generators_own_scorer(reasoning):
    examples = reasoning.examples("test").select(range(5)).to_list()
    assert reasoning.grade_all(examples, [reasoning.solution(e) for e in examples]) == [1.0] * 5
    assert reasoning.grade(examples[0], f"<answer>1</answer> no: <answer>\n{examples[0]['answer']}\n") == 1
    assert reasoning.grade(examples[0], examples[0]["answer"]) == 1  # no tag: the whole reply
    for text in ("", "<answer>1 2 3 4</answer>", "\x00\ud800", "9" * 1_000_000, "<answer>" * 10_000):
        assert 0 <= reasoning.grade(examples[0], text) < 0.1  # a wrong grid of the right form gets 0.01 there


def test_an_answer_that_a_scorer_would_evaluate_neither_runs_nor_lasts(reasoning, tmp_path):
    spiral = ReasoningGym("spiral_matrix", options={"size": 1000}, sizes={"train": 2, "validation": 2, "test": 2})
    example, file = spiral.examples("train")[0], tmp_path / "left"
    attacks = [
        "[__import__('os').write(3, b'[1.0]\\n')]",
        "[exec('im' + 'port os; os.write(4, b\"1.0\")')]",
        "[setattr(type(vars()['self']), 'score_answer', lambda *a, **k: 1.0)]",
        f"[vars(vars()['sys'])['modules']['os'].mknod({str(file)!r})]",
        f"[open({str(file)!r}, 'w')]",
        "[__import__('signal').setitimer(0, 0), any(0 for _ in iter(int, 1))]",
    ]
    for attack in attacks:
        scores = spiral.grade_all(
            [example] * 3, [f"<answer>{text}</answer>" for text in (attack, "1 2", example["answer"])]
        )
        assert scores == [0.0, 0.0, 1.0], attack
    assert not file.exists()


@pytest.mark.parametrize(
    ("dataset", "options"),
    [("n_queens", {"size": 20}), ("countdown", {}), ("simple_integration", {}), ("string_insertion", {})],
)
def test_right_answers_to_evaluating_scorers_count(reasoning, dataset, options):
    task = ReasoningGym(dataset, options=options, sizes={"train": 2, "validation": 2, "test": 2})
    examples = task.examples("train").to_list()
    assert task.grade_all(examples, [task.solution(example) for example in examples]) == [1.0] * 2


def test_the_own_answer_of_every_generator_scores_one(reasoning):
    from reasoning_gym.factory import DATASETS

    without, wrong = [], []
    for dataset in sorted(set(DATASETS) - {"composite"}):  # which asks for datasets of its own
        task = ReasoningGym(dataset, options={"size": 1})
        example = task.generate(random.Random(0))
        try:
            wrong += [dataset] if task.grade(example, task.solution(example)) != 1 else []
        except ValueError as error:
            assert f"dataset={dataset!r}: its generator has puzzles" in str(error)
            without.append(dataset)
    assert wrong == []
    assert without == ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]


@pytest.mark.parametrize("dataset", ["list_functions", "pool_matrix"])
def test_an_item_is_the_same_puzzle_whenever_it_is_made_and_no_stream_of_the_user_moves(reasoning, dataset):
    made = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        task = ReasoningGym(dataset, options={"size": 20}, sizes={"train": 2, "validation": 2, "test": 2})
        made.append([task.generate(random.Random(item)) for item in range(40)])
        drawn = random.random(), np.random.random()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        assert drawn == (random.random(), np.random.random())  # noqa: NPY002
    assert made[0] == made[1]


def test_answers_of_unusual_form_score_one(reasoning):
    for dataset, size, unusual in (
        ("ab", 100, lambda answer: answer == ""),
        ("intermediate_integration", 100, lambda answer: "Integral(" in answer),  # not among what others may call
        ("polynomial_multiplication", 3, bool),  # depends on the order of hashes, which differs between processes
    ):
        task = ReasoningGym(dataset, options={"size": size})
        item = next(i for i in range(size) if unusual(task.generator[i]["answer"]))
        example = {"question": "", "answer": task.generator[item]["answer"], "item": item}
        assert task.grade_all([example] * 2, [task.solution(example), "<answer>Integral(0)</answer>"]) == [1, 0]


def test_reasoning_says_what_is_wrong(reasoning, monkeypatch):
    with pytest.raises(ValueError, match="dataset='chess960'.*reasoning-gym refuses this"):
        ReasoningGym("chess960").examples("test")
    with pytest.raises(ValueError, match="options=.*'colour'.*refuses this"):
        ReasoningGym(options={"colour": 3}).examples("test")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dllm_gym\[reasoning\]'"):
        ReasoningGym().examples("test")


# ---- names and settings ----


def test_a_package_may_register_its_task(monkeypatch):
    monkeypatch.setattr("dllm_gym.tasks.TASKS", dict(TASKS))
    register("mine", lambda: Sudoku(min_givens=11))
    assert make_task("mine").min_givens == 11
    with pytest.raises(ValueError, match="name='mine' is taken"):
        register("mine", Sudoku)
    register("mine", Arithmetic, replace=True)
    assert isinstance(make_task("mine"), Arithmetic)
    register("broken", lambda: 3)
    with pytest.raises(ValueError, match="task='broken': its factory gives 3"):
        make_task("broken")
    for name, factory in (("", Sudoku), (3, Sudoku), ("x", "Sudoku")):
        with pytest.raises(ValueError, match="need a name and a callable"):
            register(name, factory)


@pytest.mark.parametrize("name", ["gsm8k", "math", "gsm8k_math", "countdown", "sudoku4_csv", "reasoning_gym"])
def test_configurations_make_the_task_of_their_name(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        made = instantiate(compose("train", overrides=[f"task={name}"]).task, _convert_="all")
        default = make_task(name)
        assert (
            type(made) is type(default) and made.name == name == default.name and made.gen_length == default.gen_length
        )
        if name == "gsm8k_math":
            chosen = compose("train", overrides=["task=gsm8k_math", "task.weights={gsm8k: 2, math: 1}"]).task
            assert instantiate(chosen, _convert_="all").weights == {"gsm8k": 2, "math": 1}


WRONG = [
    (lambda path: GSM8K(data="nothing.jsonl"), r"'nothing.jsonl' is not an existing file"),
    (lambda path: GSM8K(data="nothing"), "data='nothing' is no file .* and no hub id owner/name"),
    (lambda path: GSM8K(data=path / "empty"), "no file like train.jsonl"),
    (lambda path: GSM8K(data={"dev": "a.json"}), "data=.*'dev'.*: need files by split, train, validation, test, shots"),
    (lambda path: GSM8K(data={}), "data={}: need files by split"),
    (lambda path: GSM8K(data=3), "data=3: need a hub id, a file, a folder"),
    (lambda path: GSM8K(data={"test": path}), "is not an existing file"),
    (
        lambda path: GSM8K(data={"test": write(path / "a.json", ROWS)}).examples("train"),
        "split='train': .* no such data",
    ),
    (lambda path: GSM8K(data=path / "bad.jsonl").examples("train"), "bad.jsonl' cannot be read as jsonl"),
    (lambda path: GSM8K(data=path / "list.json").examples("train"), "list.json' holds something other than rows"),
    (
        lambda path: GSM8K(data=path / "other.json").examples("train"),
        "lacks the columns answer that task 'gsm8k' needs",
    ),
    (
        lambda path: GSM8K(data=path / "wordy.json").examples("train"),
        "row 1 of .*wordy.json': the answer 'none' has no number",
    ),
    (lambda path: SudokuFile(data=path / "grid.json").examples("train"), "'1204', '1234' is no 4x4 puzzle"),
    (lambda path: SudokuFile().examples("test"), r"'sudoku4_csv' has no such data .*task\.data="),
    (lambda path: SudokuFile(score="rows"), "score='rows' is not known: choose one of cells, grid, d1"),
    (lambda path: GSM8K().examples("dev"), "split='dev' .* choose one of train, validation, test"),
    (lambda path: GSM8K(shots=-1), "shots=-1: need"),
    (lambda path: GSM8K(shots=1.5), "shots=1.5: need"),
    (lambda path: GSM8K(gen_length=0), "gen_length=0: need"),
    (lambda path: GSM8K(data=""), "data='': need a hub id, a file, a folder"),
    (lambda path: GSM8K(data="d/k.jsonl.gz"), "data='d/k.jsonl.gz' is no file"),
    (lambda path: GSM8K(data="me/copy@"), "no hub id owner/name, owner/name:config, owner/name@revision"),
    (lambda path: GSM8K(data="me/copy:main@v1"), "no hub id .*owner/name@revision:config"),
    (lambda path: GSM8K(prefilled="false"), "prefilled='false': need True or False"),
    (lambda path: GSM8K(prompt_style=[5]), r"prompt_style=\[5\] is not known: choose one of xml, chat"),
    (lambda path: Mixture(5), "tasks=5: need a list of tasks"),
    (lambda path: Mixture([Sudoku()], weights=5), "weights=5: need a positive number for each of sudoku"),
    (lambda path: GSM8K(max_prompt_chars=True), "max_prompt_chars=True: need"),
    (lambda path: GSM8K(held_out=0.5), "held_out=0.5: need a finite number >= 0 and <= 0.4"),
    (lambda path: GSM8K(prompt_style="yaml"), "prompt_style='yaml' is not known: choose one of xml, chat"),
    (lambda path: PromptStyle(reply="{thought}"), "fields are {working} and {answer}"),
    (lambda path: Mixture([]), r"tasks=\[\]: need tasks"),
    (lambda path: Mixture([Sudoku(), Sudoku()]), "need tasks that differ in their names"),
    (lambda path: Mixture(["sudoku"]), "need tasks"),
    (lambda path: Mixture([Sudoku()], weights=[1, 2]), r"weights=\[1, 2\]: need a positive number for each of sudoku"),
    (lambda path: Mixture([Sudoku()], weights=[0]), r"weights=\[0\]: need a positive number"),
    (lambda path: Mixture([Sudoku()], weights={"chess": 1}), "weights={'chess': 1}: need"),
    (lambda path: Mixture([Sudoku()], weights=[True]), r"weights=\[True\]: need"),
    (lambda path: Mixture([Sudoku()]).examples("dev"), "split='dev' .* choose one of"),
    (lambda path: Mixture([Sudoku()], gen_length=-3), "gen_length=-3: need"),
    (lambda path: ReasoningGym(prompt_style="yaml"), "prompt_style='yaml' is not known"),
    (lambda path: ReasoningGym(options={"size": 1.5}), r"options\['size'\]=1.5: need"),
    (lambda path: ReasoningGym(sizes={"dev": 3}), "'dev': choose among"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_settings_and_files_are_named(make, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"question": "a"')
    write(tmp_path / "list.json", [[1], [2]])
    write(tmp_path / "other.json", [{"question": "a", "solution": "b"}])
    write(tmp_path / "wordy.json", [{"question": "a", "answer": "none"}])
    write(tmp_path / "grid.json", [{"Puzzle": "1204", "Solution": "1234"}])
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


# ---- all of GSM8K ----

REAL = Path(os.environ.get("DLLM_GYM_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))


@pytest.mark.skipif(
    not (REAL / "train.jsonl").is_file() or not (REAL / "test.jsonl").is_file(),
    reason="needs GSM8K as train.jsonl and test.jsonl in the folder that DLLM_GYM_GSM8K names",
)
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_all_gold_answers_of_gsm8k_score_one_and_changed_ones_zero(split, count):
    task = GSM8K(data=REAL, held_out=0)
    examples = task.examples(split).to_list()
    replies = [json.loads(line)["answer"] for line in (REAL / f"{split}.jsonl").read_text().splitlines()]
    assert len(examples) == count and not any("<<" in example["working"] for example in examples)
    wrong = []
    for example, reply in zip(examples, replies, strict=True):
        gold = int(example["answer"].replace(",", ""))
        right = [
            reply,
            task.reply(example),
            f"\\boxed{{\\${gold:,}.00}}",
            f"<answer>{gold:,}</answer>",
            f"It is {gold}.",
        ]
        others = [
            re.sub(r"####.*", f"#### {gold + 1}", reply),
            f"\\boxed{{{gold}0}}",
            f"{gold}, no, {gold - 1}",
            f"{-gold - 1}",
        ]
        others += [f"<answer>{gold}</answer><answer>{gold}.5</answer>"]
        wrong += [text for text in right if task.grade(example, text) != 1]
        wrong += [text for text in others if task.grade(example, text) != 0 and not (gold == 0 and "boxed" in text)]
    assert not wrong


def test_a_style_may_replace_the_whole_question():
    style = PromptStyle(question="Q: {question} {x}\nBe quick.", prefill="So")
    assert GSM8K(prompt_style=style).prompt(EXAMPLE).turns == (("user", f"Q: {EXAMPLE['question']} {{x}}\nBe quick."),)
    with pytest.raises(ValueError, match="question='Q': need a text that holds"):
        PromptStyle(question="Q")


def test_a_reply_may_be_prefilled_in_evaluation_only(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)]
    data = {split: write(tmp_path / f"{split}.json", rows) for split in ("train", "test")}
    tasks = [GSM8K(data=data, held_out=0, prefilled_in_train=False), GSM8K(data=data, held_out=0)]
    begins = [[task.prompt(task.examples(split)[0]).prefill for split in ("train", "test")] for task in tasks]
    assert begins == [["", "<reasoning>\n"], ["<reasoning>\n"] * 2]
    mixed = Mixture([tasks[0]])
    assert [mixed.prompt(mixed.examples(split)[0]).prefill for split in ("train", "test")] == begins[0]


@pytest.mark.parametrize(
    ("gold", "reply", "own", "lup"),
    [
        ("72", r"\boxed{72}", 1, 1),
        ("72", "<answer>72</answer>", 1, 0),
        ("72", r"\boxed{71} \boxed{72 clips}", 1, 1),
        ("72", r"\boxed{72} <answer>71</answer>", 0, 1),
        ("2,125", r"\boxed{2,125}", 1, 0),
        ("-3.5", r"\boxed{-3.50}", 1, 1),
        ("3", "", 0, 0),
    ],
)
def test_lups_grader_reads_the_last_box_alone(gold, reply, own, lup):
    example = {"question": "?", "working": "", "answer": gold}
    assert [GSM8K(grader=grader).grade(example, reply) for grader in ("own", "lup")] == [own, lup]
    with pytest.raises(ValueError, match="grader='strict' is not known: choose one of own, lup"):
        GSM8K(grader="strict")
    with pytest.raises(ValueError, match="grader='lup' is not known: choose one of own"):
        Countdown(grader="lup")


def test_lups_grader_reads_formulas_in_the_last_box_alone():
    example = {"problem": "?", "working": "", "answer": r"\frac{1}{2}"}
    replies = [r"\boxed{3} \boxed{\dfrac12}", r"<answer>\frac12</answer>", r"\boxed{\frac12} <answer>3</answer>"]
    scores = {grader: Math(grader=grader).grade_all([example] * 3, replies) for grader in ("own", "lup")}
    assert scores == {"own": [1, 1, 0], "lup": [1, 0, 1]}
