"""Tasks: the graders against independent checks, the splits, and what hostile text does to them."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from datasets import Dataset

from dllm_gym.tasks import Arithmetic, Equations, OneWay, Sudoku, make_task
from dllm_gym.tasks.base import SPLITS
from dllm_gym.tasks.sudoku import GRIDS

TASKS = {
    "sudoku": Sudoku,
    "arithmetic": Arithmetic,
    "equations": Equations,
    "one_way": OneWay,
}  # those that make their own examples
SMALL = {"train": 300, "validation": 40, "test": 60}


@pytest.fixture(scope="module", params=list(TASKS))
def task(request):
    return make_task(request.param)


# ---- sudoku ----


def is_answer(puzzle: str, text: str) -> bool:
    """Written without the task's tables: no two cells that see each other are equal, and all givens stand."""
    lines = text.split("\n")
    if len(lines) != 4 or any(len(line) != 4 or set(line) - set("1234") for line in lines):
        return False
    cells = [(r, c, lines[r][c]) for r in range(4) for c in range(4)]
    clash = any(
        x == y and (r == s or c == d or (r // 2, c // 2) == (s // 2, d // 2))
        for (r, c, x), (s, d, y) in combinations(cells, 2)
    )
    return not clash and all(puzzle[4 * r + c] in (".", x) for r, c, x in cells)


def in_lines(grid: str) -> str:
    return "\n".join(grid[i : i + 4] for i in range(0, 16, 4))


def test_there_are_288_grids():
    assert len(GRIDS) == len(set(GRIDS)) == 288  # the number known from the literature
    assert all(is_answer("." * 16, in_lines(grid)) for grid in GRIDS)


def test_the_sudoku_grader_agrees_with_brute_force(rng):
    task, seen = Sudoku(), []
    for _ in range(500):
        example = task.generate(rng)
        one, other = rng.sample("1234", 2)
        grids = [
            example["grid"],
            rng.choice(GRIDS),
            example["grid"].translate(str.maketrans(one + other, other + one)),  # valid, but may break givens
            "".join(rng.sample(example["grid"], 16)),
            "".join(rng.choices("1234", k=16)),
        ]
        for grid in grids:
            expected = is_answer(example["puzzle"], in_lines(grid))
            assert task.grade(example, in_lines(grid)) == expected, (example, grid)
            seen.append(expected)
    assert 600 < sum(seen) < 1900  # both verdicts, often


def test_sudoku_wants_four_lines_and_forgives_blanks_around_them():
    task, grid = Sudoku(), "1234341221434321"
    example = {"puzzle": "1" + "." * 15, "grid": grid}
    right = in_lines(grid)
    for text in (right, right + "\n", right + " \n\n ", "\n" + right):
        assert task.grade(example, text) == 1
    wrong = [grid, right.replace("\n", " "), right.replace("\n", "\n\n"), right.replace("\n", " \n"), right[:-1]]
    wrong += [right + "\n1234", right + "1", "12343\n412\n2143\n4321", right.replace("\n", "\r\n")]
    for text in wrong:
        assert task.grade(example, text) == 0, text


def test_an_eos_cuts_the_answer(tiny):
    for task in (Sudoku(), Arithmetic()):
        example = task.examples("test")[0]
        tokens = tiny.encode(task.solution(example))
        assert task.grade(example, tiny.decode([*tokens, tiny.eos_id, *tokens])) == 1  # what follows is not read
        assert task.grade(example, tiny.decode([*tokens[:-3], tiny.eos_id, *tokens[-3:]])) == 0


# ---- arithmetic ----


@pytest.mark.parametrize("operations", [(1, 4), (1, 1), (7, 12)])
def test_arithmetic_steps_are_right_and_fit(operations, tiny):
    task = Arithmetic(*operations, sizes={"train": 100})
    worst = {"chain": "9" + "+9" * operations[1], "answer": 9 * (operations[1] + 1)}
    for example in [*task.examples("train"), worst]:
        chain, total = example["chain"], int(example["chain"][0])
        steps, _, answer = task.solution(example).partition("#")
        for step, move in zip(steps.split(";"), re.findall(r"[+-]\d", chain), strict=True):
            left, result = step.split("=")
            assert left == f"{total}{move}"
            total += int(move)
            assert int(result) == total >= 0
        assert int(answer) == total == example["answer"] == eval(chain)
        assert operations[0] <= len(chain) // 2 <= operations[1]
        assert len(tiny.encode(task.solution(example))) < task.gen_length  # an EOS fits behind it
        assert len(task.prompt(example)) == 2 * operations[1] + 2 and task.prompt(example).rstrip() == chain + "="
    assert task.gen_length % 12 == 0


def test_only_what_follows_the_last_hash_counts():
    task, example = Arithmetic(), {"chain": "7+8", "answer": 15}
    for text in ("#15", "nonsense#15", "#3#15", "7+8=15# 15\n"):
        assert task.grade(example, text) == 1
    for text in ("15", "7+8=15", "#15#", "#15#3", "#015", "#+15", "#15.0", "#1 5", "#١٥", "#15;"):
        assert task.grade(example, text) == 0, text


# ---- equations ----


def test_any_filling_that_keeps_what_is_shown_and_holds_is_right():
    task, example = Equations(), {"puzzle": ".+3=1.;.4-5=..;2*.=.0;", "answer": "9+3=12;14-5=09;2*5=10;"}
    for text in ("7+3=10;64-5=59;2*0=00;", "9+3=12;14-5=09;2*5=10;"):
        assert task.grade(example, text) == 1
    wrong = ["6+3=09;64-5=59;2*0=00;", "7+3=11;64-5=59;2*0=00;", "7+3=10;64-5=59;2*0=00", "7+3=10;64-5=59;3*0=00;", ""]
    wrong += [".+3=1.;.4-5=..;2*.=.0;", "7+3=10;64-5=59;2*0=00;7+3=10;", "7+3=1\u0660;64-5=59;2*0=00;"]
    assert not any(task.grade(example, text) for text in wrong)


def test_equations_are_as_many_of_the_kinds_as_asked_for_and_fit(rng):
    task = Equations(3, 3, "+-", two_digits=1.0, most_shown=0.0)
    for example in (task.generate(rng) for _ in range(200)):
        assert re.fullmatch(r"(\.\.[+-]\.\.=\.{2,3};){3}", example["puzzle"]) and len(example["answer"]) <= 32
    shown = [Equations(most_shown=1.0).generate(rng)["puzzle"] for _ in range(500)]
    assert all("." in puzzle for puzzle in shown) and any(puzzle.count(".") == 1 for puzzle in shown)


def test_results_of_one_way_stand_on_either_side_and_follow_from_the_operands(rng):
    task = OneWay()
    assert task.causes({"answer": "12=4*3;7-2=5;", "puzzle": ""}) == {0: [3, 5], 1: [3, 5], 11: [7, 9]}
    sides = set()
    for example in (task.generate(rng) for _ in range(200)):
        assert all(example["puzzle"][place] == "." for place in task.causes(example))  # no result is shown
        sides |= {equation.find("=") < 3 for equation in example["puzzle"].split(";")[:-1]}
    assert sides == {True, False}
    example = {"puzzle": "..=.*3;1-.=.;.+.=.;", "answer": ""}
    assert task.grade(example, "12=4*3;1-4=3;6+6=2;") == 1
    for text in ("12=4*4;1-4=3;6+6=2;", "11=4*3;1-4=3;6+6=2;", "12=4*3;1-4=7;6+6=2;", "12=4*3;1-4=3;6+\u0666=2;"):
        assert task.grade(example, text) == 0


# ---- all ----


def test_every_solution_scores_one(task):
    for split in SPLITS:
        assert all(task.grade(example, task.solution(example)) == 1 for example in task.examples(split))


@pytest.mark.parametrize("task", [Sudoku(), Arithmetic()], ids=lambda task: task.name)
def test_any_changed_graded_character_scores_zero(task):
    for example in task.examples("validation").select(range(150)):
        text = task.solution(example)
        for i in range(text.rfind("#") + 1, len(text)):  # sudoku has no '#': all of it is graded
            for character in set("0123456789#.;\n x") - {text[i]}:
                changed = text[:i] + character + text[i + 1 :]
                assert task.grade(example, changed) == 0, changed
                assert "puzzle" not in example or not is_answer(example["puzzle"], changed)


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_share_no_prompt(name):
    prompts = {split: set() for split in SPLITS}
    for seed, sizes in [(0, SMALL), (1, SMALL), (2, {"train": 1000, "validation": 300, "test": 300})]:
        task = TASKS[name](seed=seed, sizes=sizes)
        for split in SPLITS:
            examples = task.examples(split)
            mine = {task.key(example) for example in examples}
            assert isinstance(examples, Dataset) and len(examples) == len(mine) == sizes[split]
            prompts[split] |= mine
    assert all(prompts[a].isdisjoint(prompts[b]) for a, b in combinations(SPLITS, 2))


@pytest.mark.parametrize("name", list(TASKS))
def test_examples_depend_on_seed_and_split_only(name):
    first, again, other = (TASKS[name](seed=seed, sizes=SMALL) for seed in (5, 5, 6))
    again.examples("test")  # the order of asking does not matter
    same = first.examples("train").to_list() == again.examples("train").to_list()
    differs = first.examples("train").to_list() != other.examples("train").to_list()
    assert same and differs  # plain bools: pytest's own comparison of long lists takes minutes


def test_draws_stay_in_their_split(task, rng):
    tests = {task.key(example) for example in task.examples("test")}
    assert not any(task.key(task.draw(rng, "train")) in tests for _ in range(300))


HOSTILE = ["", " ", "\n" * 50, "#", "#" * 100_000, "1234\n" * 5000, "9" * 100_000, "#" + "9" * 100_000, "\x00\ud800"]
HOSTILE += [
    "１２３４\n３４１２\n２１４３\n４３２１",
    "#\u2028１５",
    "🙂" * 16,
    "1234\n3412\n2143\n432\u0661",
    "None",
    "#nan",
]


def test_hostile_text_scores_zero_and_never_raises(task, rng):
    example = task.examples("test")[0]
    for text in HOSTILE:
        assert task.grade(example, text) == 0
    for _ in range(2000):
        text = "".join(rng.choices("1234#+-=;\n .é\u200b🙂", k=rng.randrange(60)))
        score = task.grade(example, text)
        assert isinstance(score, float) and score in (0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sudoku(min_givens=5, max_givens=3), "min_givens=5, max_givens=3: need 0 <= .* <= 16"),
        (lambda: Sudoku(max_givens=17), "max_givens=17: need"),
        (lambda: Sudoku(min_givens=-1), "min_givens=-1.*: need"),
        (lambda: Arithmetic(min_operations=0), "min_operations=0.*: need 1 <= "),
        (lambda: Arithmetic(3, 2), "min_operations=3, max_operations=2: need"),
        (lambda: Equations(3, 2), "min_equations=3, max_equations=2: need"),
        (lambda: Equations(operations="+/"), r"operations='\+/': need some of"),
        (lambda: Equations(two_digits=2), "two_digits=2"),
        (lambda: OneWay(3, 2), "min_equations=3, max_equations=2: need"),
        (lambda: OneWay(most_shown=-1), "most_shown=-1"),
        (lambda: Sudoku(sizes={"dev": 3}), "'dev': choose among train, validation, test"),
        (lambda: Arithmetic(sizes={"test": 0}), r"sizes\['test'\]=0: need a whole number"),
        (lambda: Arithmetic(sizes={"test": 1.5}), r"sizes\['test'\]=1.5: need a whole number"),
        (lambda: Sudoku().examples("dev"), "split='dev' .* choose one of train, validation, test"),
        (lambda: Arithmetic().draw(None, "dev"), "split='dev' .* choose one of train, validation, test"),
        (lambda: make_task("chess"), "task='chess' is not known: choose one of sudoku, arithmetic"),
        (lambda: make_task(None), "task=None is not known"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_examples_than_there_are_prompts_raise():
    task = Arithmetic(max_operations=1, sizes={"test": 100})
    with pytest.raises(ValueError, match=r"sizes\['test'\]=100 is more than task 'arithmetic' has .* \(about \d\d?\)"):
        task.examples("test")
    lonely = Sudoku(max_givens=0, sizes=dict.fromkeys(SPLITS, 1))  # one prompt in all: it belongs to one split
    refused = []
    for split in SPLITS:
        try:
            assert len(lonely.examples(split)) == 1
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) == 2 and all("too few distinct prompts" in message for message in refused)


def test_make_task_takes_names_and_tasks():
    assert {name: type(make_task(name)) for name in TASKS} == TASKS
    assert all(make_task(name).name == name for name in TASKS)
    mine = Sudoku(min_givens=4)
    assert make_task(mine) is mine
