"""Grading: what counts as a reply's answer, when two answers are equal, and that no text stalls or breaks a grader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from dllm_gym.tasks import GSM8K, Countdown, Math, SudokuFile
from dllm_gym.tasks.countdown import evaluate
from dllm_gym.tasks.grading import latex, workers
from dllm_gym.tasks.grading.latex import equivalent, equivalent_all
from dllm_gym.tasks.grading.text import boxes, marked, number_answer, numbers, same_number
from dllm_gym.tasks.grading.workers import Pool, Worker, harmless

# ---- numbers ----

NUMBERS = [
    ("#### 72", 72),
    ("The working.\n#### 1,234", 1234),
    ("####72.", 72),
    ("#### $18.50", 18.5),
    ("#### -7", -7),
    ("#### 50%", 50),
    ("#### 3 apples.", 3),
    ("#### Step 2: add\nso we get 9", 9),  # a heading is no mark
    ("#### 2. Multiply\nThe total is 12 now", 12),  # nor is a numbered one
    ("#### 5\nWait.\n#### 6", 6),
    (r"\boxed{72}", 72),
    (r"\boxed{2,000}", 2000),
    (r"\boxed{2{,}000}", 2000),
    (r"\boxed{12\,345}", 12345),
    (r"\boxed{\$5.00}", 5),
    (r"$\boxed{-3}$.", -3),
    (r"\boxed{-\$3.50}", -3.5),
    (r"\boxed{\frac{3}{4}}", 0.75),
    (r"\boxed{\dfrac{10}{4}}", 2.5),
    (r"\boxed{3/4}", 0.75),
    (r"\boxed{25\%}", 25),
    (r"\boxed{40\text{ km}}", 40),
    (r"\boxed{x = 15}", 15),
    (r"\boxed{5 + 10 = 15}", 15),
    (r"\boxed{5*3}", 3),  # an unfinished product is its last number, not 53
    (r"\boxed{1} and then \boxed{2}", 2),
    (r"\boxed{\boxed{8}}", 8),
    (r"\boxed {9}", 9),
    (r"\boxed 9$", 9),
    (r"\fbox{3} \fboxed{4}", 4),
    (r"\boxed{7} follows, see page 99", 7),
    (r"It is 5, \boxed{", 5),  # no complete box: no mark
    (r"\boxed{}, that is 4", 4),
    ("<answer>3,500</answer>", 3500),
    ("<answer>3,500", 3500),
    ("<ANSWER> 12 </ANSWER> of 40", 12),
    ("<answer>\n\\boxed{64}\n</answer>", 64),
    ("<answer>The boy has 6 apples</answer>", 6),
    ("<answer>$1,000,000.25</answer>", 1000000.25),
    ("<answer>1</answer><answer>2</answer>", 2),
    ("<answer>1</answer> sorry <answer></answer>", 1),
    (r"\boxed{3}</reasoning><answer>4</answer>", 4),
    (r"<answer>4</answer> \boxed{3}", 3),
    ("<answer>10</answer>\n#### 11", 11),
    ("<answer>unknown</answer> (5 tries)", None),  # a mark without a number is an answer without one
    (r"\boxed{n}, 5", None),
    ("so 5 * 3 = 15.", 15),
    ("It takes 2 days, 3 hours", 3),
    ("**72**", 72),
    ("-5 degrees", -5),
    ("from 10-4", 4),  # a subtraction is no sign
    ("x-4", 4),
    ("= -4", -4),
    ("\u22124", -4),
    (".5", 0.5),
    ("5.", 5),
    ("1,2", 2),
    ("1,234,567", 1234567),
    ("1e3", 1000),
    ("2 apples cost €4.20!", 4.2),
    ("no number", None),
    ("", None),
    ("7/0", None),
    ("٧٢", None),
    ("９", None),
    ("9" * 65, None),  # longer than any answer
    ("NaN inf", None),
    (r"\boxed{72 \text{ m}^2}", 72),  # the power of a unit is no number
    (r"\boxed{15\,\mathrm{cm}^{3}}", 15),
    ("<answer>72 m^2</answer>", 72),
    ("#### 72 m^2", 72),
    (r"\boxed{\frac12}", 0.5),
    (r"\boxed{\frac{1}2}", 0.5),
    (r"\boxed{\dfrac 3{4}}", 0.75),
    (r"\boxed{-\frac{1}{2}}", -0.5),
    (r"\boxed{\frac{-1}{2}}", -0.5),
    (r"\boxed{2\frac{1}{2}}", 2.5),
    (r"\boxed{2\ \frac12\text{ hours}}", 2.5),
    (r"\boxed{-2\frac{1}{2}}", -2.5),
    ("<answer>2 1/2</answer>", 2.5),
    ("#### 2 1/2", 2.5),
    ("<answer>12 1/2 cups</answer>", 12.5),
    ("<answer>3 5/2</answer>", 2.5),  # no mixed number: its last
    (r"\boxed{3 * \frac{1}{2}}", 0.5),  # nor is a product
    (r"\boxed{12 000}", 12000),
    (r"\boxed{1\ 234\,567.5}", 1234567.5),
    ("<answer>12\u00a0000</answer>", 12000),
    (r"\boxed{1,\!234}", 1234),
    ("#### 12 000", 12000),
    ("<answer>5 12</answer>", 12),  # groups have three digits
    ("in 2024 100", 100),
    (r"\boxed{1.5\times10^3}", 1500),
    (r"\boxed{1.5 \cdot 10^{-3}}", 0.0015),
    ("1.5 × 10^3", 1500),
    ("<answer>- 72</answer>", -72),
    (r"\boxed{- \$72}", -72),
    (r"\boxed{x = - 72}", -72),
    ("- 72 apples", 72),  # outside a mark it is an item of a list
    ("<answer>10 - 4</answer>", 4),
    ("<answer>7\u200b2</answer>", 72),
    (r"\boxed{5:00 PM}", 5),
    (r"\boxed{5{:}00}", 5),
    ("They meet at 5:30 p.m.", 5.5),
    ("<answer>10:15</answer>", 10.25),
    ("12:00", 12),
    ("a ratio of 3:1", 1),
    ("5:60", 60),
    ("72 cm2", 72),
    ("<answer>16 ft2.</answer>", 16),
    ("3\u00bd cups", 3.5),
    ("1'234", 1234),
    ("<answer>1_000</answer>", 1000),
    ("US$15", 15),
    ("Rs.15", 15),
    ("`72`", 72),
    ("<b>72</b>", 72),
    ("**$72.50**", 72.5),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS, ids=[text[:30] for text, _ in NUMBERS])
def test_the_number_that_a_reply_answers(text, expected):
    assert number_answer(text) == (None if expected is None else Fraction(str(expected)))


def test_numbers_are_equal_up_to_a_millionth():
    assert same_number("1,000", "1000.000001") and same_number("0.5", "#### .5") and same_number("-2", "-2.0")
    assert same_number("18", "\\boxed{\\$18.00}")
    for text in ("1000.0000011", "100", "-1000", "10001", "1,000,000", "", "one thousand"):
        assert not same_number("1,000", text), text
    assert not same_number("none", "none")  # a gold answer without a number equals nothing


def test_marks_are_found_whole():
    assert boxes(r"\boxed{a{b}c} {\boxed{\}}} \boxed{\{1\}}") == [(0, "a{b}c"), (15, r"\}"), (27, r"\{1\}")]
    assert boxes(r"\boxed{1 \boxed{2}") == [(9, "2")]  # the outer one is not complete
    assert boxes(r"} } \boxed{3}}") == [(4, "3")]
    assert marked("<answer>a</answer>") == "a" and marked("a") is None and marked("#### 5 km") == "5 km"
    assert marked("#### 5", hashes=False) is None
    assert marked("x" * 100_000 + "<answer>z</answer>") == "z"  # the end is read, however much precedes it
    assert marked("<answer>z</answer>" + "x" * 100_000) is None


# ---- LaTeX ----

EQUAL = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    ("2,000", "2000"),
    ("2000", r"2{,}000"),
    ("12345", r"12\,345"),
    ("0.50", ".5"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)"),
    (r"90^\circ", "90"),
    (r"90^\circ", r"90^{\circ}"),
    (r"\$18.90", "18.90"),
    (r"10\%", "10"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"15\mbox{ cm}^2", "15"),
    ("x=5", "5"),
    ("5", "x = 5"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("6-5i", "-5i+6"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"2k\pi", r"2\pi k"),
    (r"10^{10}", "10000000000"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    ("4210_5", "4210_{5}"),
    ("-4", "\u22124"),
    ("$7$", "7."),
    (r"\frac{3}{2}", "1 1/2"),
    ("1.5", "1 1/2"),
    ("1 1/2", r"1\frac{1}{2}"),
    ("-1.5", r"-1\ 1/2"),
    ("12345", "12 345"),
    ("12", "12 ."),
    ("(1,2)", "( 1 , 2 )"),
    ("72", "7\u200b2"),
    ("4210_5", "$4210_{5}$."),
    ("5", "2+3=5"),
    ("5", "x=5=5.0"),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"1-\frac{1}{\mathrm{e}}", "1-e^{-1}"),
    (r"2+3\text{i}", "2+3i"),
    (r"30^\circ 15'", r"30.25^\circ"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", r"\frac16"),
    ("x**2/3", r"\frac{x^2}{3}"),
    ("sqrt(2)", r"\sqrt{2}"),
    ("pi/2", r"\frac{\pi}{2}"),
    (r"\text{no solution}", "No solution"),
    ("1:2:3", "2:4:6"),
    (r"1, 2, \ldots, n", r"1,2,\ldots,n"),
    (r"28\%", "28 percent"),
    (r"\emptyset", r"\varnothing"),
    (r"\(5\)", "5"),
    ("2, 2, 3", "3,2,2"),
    (r"\angle ABC", r"\angle CBA"),
    (r"\{x: x>0\}", r"\{x:x>0\}"),
    ("12 cm", "12"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", ""),
    ("", ""),
    ("2000", "2"),
    ("(1,2)", "(2,1)"),
    ("[0,1]", "(0,1)"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\sqrt{2}", "2"),
    ("x+1", "x-1"),
    (r"\pi", "3"),
    ("6-5i", "6+5i"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("1,-2", "1"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{(C)}", r"\text{(B)}"),
    ("5", "I do not know"),
    ("5", "5 or 6"),
    ("5", "5, 6"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("7", r"\boxed{"),
    ("x=5", "x=6"),
    ("-4", "4"),
    (r"\frac{11}{2}", "1 1/2"),
    ("11/2", "1 1/2"),
    ("11/2", r"1\ 1/2"),
    ("13", "1 3"),
    ("13", r"1\,3"),
    ("3", "1 3"),
    ("4210_5", "4210_7"),
    ("10_{2}", "10_{16}"),
    ("5", "6=5"),
    ("5", "x=6=5"),
    ("72", "72\u200b27"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    (r"1:2:3:\ldots", r"1:4:9:\ldots"),
    ("1,2,3,...", "1,2,4,..."),
    ("1+2+...+n", "n"),
    (r"x^2+\cdots+1", r"x^3+\cdots+1"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    (r"1-\frac{1}{\mathrm{R}}", r"1-\frac{1}{\mathrm{Q}}"),
    (r"3\mathrm{i}", "3"),
    (r"n\equiv 2\pmod 5", r"n\equiv 3\pmod 5"),
    (r"2k\pi,k\in\mathbb{Z}", "2"),
    (r"\{x\mid x>0\}", r"\{x\mid y>0\}"),
    (r"\{x\mid x>0\}", "0"),
    (r"0.\overline{3}", "0"),
    (r"0.\overline{3}", r"0.\overline{4}"),
    (r"30^\circ 15'", r"45^\circ"),
    ("3 +", "3"),
    (r"\frac{", r"\frac{1"),
    (r"\sqrt{2", "2"),
    (r"\begin{pmatrix}1\\2", "1"),
    (r"\text{listen}", r"\text{silent}"),
    ("listen", "silent"),
    ("1:2:3", "1:1:6"),
    ("1:2:3", "1:6"),
    ("6:05", "12:10"),
    ("2,2", "2"),
    (r"\angle ABC", r"\angle BAC"),
    (r"\(5\) or \(6\)", "6"),
    ("between 5 and 6", "6"),
    (r"3 \text{ remainder } 2", "3"),
    ("[2,3)", "[2,3]"),
    (r"x>3", r"x\ge 3"),
    (r"\emptyset", "0"),
]


@pytest.fixture(scope="module")
def verdicts():
    """All pairs in one go, as in training."""
    pairs = EQUAL + DIFFERENT
    return dict(zip(pairs, equivalent_all(pairs), strict=True))


@pytest.mark.parametrize("pair", EQUAL, ids=str)
def test_equal_formulas(pair, verdicts):
    assert verdicts[pair] is True


@pytest.mark.parametrize("pair", DIFFERENT, ids=str)
def test_different_formulas(pair, verdicts):
    assert verdicts[pair] is False


def test_an_answer_alone_and_in_a_batch_gets_the_same_verdict(verdicts):
    for pair in [*EQUAL[::6], *DIFFERENT[::6]]:
        assert equivalent(*pair) == verdicts[pair]


def test_equal_texts_and_plain_numbers_need_no_worker(monkeypatch):
    monkeypatch.setattr(latex, "POOL", Pool("none", seconds=1.0))  # raises if it is asked
    pairs = [(r"\frac{1}{2}", r"$\dfrac{1}{2}$."), ("2,000", "2000.0"), ("3", "4"), ("3", ""), ("3", "3" * 5000)]
    assert equivalent_all(pairs) == [True, True, False, False, False]
    with pytest.raises(RuntimeError, match="the grader 'none' does not start"):
        equivalent("x+x", "2x")


def test_math_reads_marks_only():
    task = Math()
    example = {"problem": "?", "working": "", "answer": r"\frac{1}{2}"}
    replies = [r"\boxed{1} no, \boxed{\frac{1}{2}}", r"<answer>$\frac{1}{2}$</answer>", r"\frac{1}{2}"]
    replies += [r"\boxed{\frac{1}{2}} or \boxed{2}", "#### 1/2", r"\boxed{\frac{1}{2}"]
    assert task.grade_all([example] * 6, replies) == [1, 1, 0, 0, 0, 0]
    assert task.grade_all([], []) == []


# ---- expressions ----


def test_expressions_are_worked_out_exactly():
    assert evaluate("(1 + 2) / 3 * 4") == (4, [1, 2, 3, 4])
    assert evaluate(r"\left(8 \div 3\right) \times 3") == (8, [3, 3, 8])  # exact: no rounding on the way
    assert evaluate("8/3 = 2.67") == (Fraction(8, 3), [3, 8])
    for text in ("", "1 +", "2 ** 3", "2 // 3", "-5 + 6", "1.5 * 2", "1 / 0", "a + 1", "f(3)", "3(4)", "__import__"):
        assert evaluate(text) is None, text
    for text in ("(" * 190 + "1", "(" * 95 + "1" + ")" * 95, "1+" * 99 + "1", "9" * 10_000, "1 == 1", "007"):
        assert evaluate(text) in (None, (1, [1]), (100, [1] * 100)), text


def test_countdown_wants_every_number_once():
    task, example = Countdown(), {"numbers": [3, 7, 7], "target": 21}
    for text in (
        r"\boxed{(3 * 7) * (7 / 7)}",
        "<answer>3 * 7</answer>",
        "21",
        "21 = 21",
        "21 =",
        "",
        r"\boxed{7 + 7 + 7}",
        "3*7*1",
    ):
        assert task.grade(example, text) == 0, text
    example = {"numbers": [3, 7, 7], "target": 28}
    for text in (r"\boxed{3 * 7 + 7}", "<answer>7+7*3=28</answer>", "28 = 7 * 3 + 7", "Let me see:\n7 + 3 × 7\n"):
        assert task.grade(example, text) == 1, text
    assert task.grade(example, task.reply(example)) == 1


MARKED_UP = [
    "**{}**",
    "***{}***",
    "*{}*",
    "__{}__",
    "`{}`",
    "$ {} $",
    r"\({}\)",
    r"\[{}\]",
    "<b>{}</b>",
    "<code>{}</code>",
]
MARKED_UP += ["```\n{}\n```", "```python\n{}\n```", r"\text{{{}}}", "Expression: {}", "**Answer:** {}", "{}."]


@pytest.mark.parametrize("markup", MARKED_UP)
@pytest.mark.parametrize(
    "place", [r"\boxed{{{}}}", "<answer>{}</answer>", "Let me see.\n{}", "<answer>{} = 46</answer>"]
)
def test_marks_around_an_expression_do_not_belong_to_it(markup, place):
    task, example = Countdown(), {"numbers": [3, 7, 25], "target": 46}
    for right in ("3*7+25", "(3 x 7) + 25", r"3 \times 7 + 25", "25 + 7\u22c53"):
        assert task.grade(example, place.format(markup.format(right))) == 1, right
    for wrong in ("3**7+25", "3*7+25*1", "37+25", "3*7", "46", "3 7 25", "3*7+24"):
        assert task.grade(example, place.format(markup.format(wrong))) == 0, wrong


@pytest.mark.parametrize("said", ["So the expression is **3*7+25**", "It is `3*7+25`, at last.", "Thus $3*7+25 = 46$."])
def test_an_expression_is_found_where_it_is_set_off(said):
    assert Countdown().grade({"numbers": [3, 7, 25], "target": 46}, said) == 1


# ---- hostile texts ----

HOSTILE = ["\\boxed{" * 3000, "{" * 1_000_000, "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", "9" * 1_000_000]
HOSTILE += [
    "<answer>" * 100_000,
    "\\boxed " * 100_000,
    "#### 1" + " " * 1_000_000 + "x",
    "####\t" * 200_000,
    "\x00\ud800",
]
HOSTILE += ["1," * 500_000, "1.1" * 300_000, "-" * 1_000_000, "\\text{" * 200_000, "\\" * 999_999, "\\frac{1" * 100_000]
HOSTILE += ["100 " * 500_000, "\\frac" + " " * 500_000, "= " * 500_000, "=" + " " * 500_000 + "-", "1^" * 500_000]
HOSTILE += ["[1]*" * 500_000, "1" + "-" * 500_000, "row 1" * 200_000, "1 1/" * 300_000, "1~" * 500_000]
HOSTILE += ["1 " * 500_000, "1\n|," * 200_000, "1e999", "\\boxed{1e999}", "(" * 1_000_000, "\\left" * 200_000]


@pytest.mark.parametrize(
    ("task", "example"),
    [
        (GSM8K(), {"question": "", "working": "", "answer": "72"}),
        (Math(), {"problem": "", "working": "", "answer": "72"}),
        (Countdown(), {"numbers": [1, 2], "target": 3}),
        (SudokuFile(), {"puzzle": "0234341221434321", "solution": "1234341221434321"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_long_and_broken_texts_are_graded_fast(task, example):
    for text in HOSTILE:
        start = time.perf_counter()
        assert task.grade(example, text) == 0, text[:30]
        assert numbers(text) is not None
        assert time.perf_counter() - start < 5, text[:30]  # usually milliseconds


ENDLESS = ["10^{10^{10}}", "(10^9)!", "{" * 450 + "1" + "}" * 450]


def test_formulas_without_end_are_cut_off_from_any_thread(monkeypatch):
    pool = Pool("latex", seconds=0.3)
    monkeypatch.setattr(latex, "POOL", pool)
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as other:
        task = other.submit(equivalent_all, [("5", text) for text in ENDLESS] + [(r"\frac{2}{4}", "0.5")])
        assert task.result() == [False] * len(ENDLESS) + [True]
    assert time.perf_counter() - start < 60  # usually 5 s: each costs 0.3 s and a new worker
    assert equivalent(r"\frac{2}{4}", "0.5")  # and the pool goes on
    pool.close()


def test_two_threads_get_their_own_answers():
    pairs = [(f"{n}x+{n}", f"{n}(x+1)" if n % 2 else f"{n}(x+2)") for n in range(2, 14)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda pair: equivalent(*pair), pairs)) == [n % 2 == 1 for n in range(2, 14)]


# ---- workers ----


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
ASK = """
import os, signal, sys
from dllm_gym.tasks.grading import latex
assert latex.equivalent("x+x", "2x")
worker = latex.POOL.idle.get_nowait()
latex.POOL.idle.put(worker)
print(worker.process.pid, "torch" in sys.modules, flush=True)
"""


@needs_proc
def test_a_worker_is_light_and_ends_with_whoever_started_it():
    endings = ("", "os.kill(os.getpid(), signal.SIGKILL)")
    asking = [subprocess.Popen([sys.executable, "-c", ASK + end], stdout=subprocess.PIPE, text=True) for end in endings]
    for process in asking:
        pid, torch = process.communicate()[0].split()
        assert torch == "False" and gone([int(pid)])


@needs_proc
def test_closing_a_pool_ends_its_workers_and_it_starts_new_ones():
    pool = Pool("latex", seconds=2.0)
    assert pool.ask_all([("x+x", "2x"), ("x+x", "3x")]) == [True, False]
    workers = [pool.idle.get_nowait() for _ in range(pool.idle.qsize())]
    for worker in workers:
        assert os.getsid(worker.process.pid) == worker.process.pid  # a Ctrl-C in the terminal does not reach it
        pool.idle.put(worker)
    pool.close()
    assert workers and gone([worker.process.pid for worker in workers])
    pool.idle.put(workers[0])  # one that died while idle is replaced
    assert pool.ask("x+x", "2x") is True
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_uses_workers_of_its_own():
    code = """
import os
from dllm_gym.tasks.grading.workers import WORKERS, Pool
pool = Pool("latex", seconds=2.0)
def worker_used():
    assert pool.ask("x+x", "2x") is True
    worker = pool.idle.get_nowait()
    pool.idle.put(worker)
    return worker.process.pid
mine = worker_used()
for _ in range(WORKERS):
    pool.places.acquire()  # other threads are asking while this one forks
child = os.fork()
if not child:
    os._exit(worker_used() == mine)
pool.places.release(WORKERS)
print(os.waitpid(child, 0)[1], worker_used() == mine)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 True\n", done.stderr


def test_a_job_that_cannot_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="the grader 'alchemy' does not start"):
        Worker("alchemy", 1.0)


def test_what_a_worker_evaluates_cannot_write_or_start_programs(tmp_path):
    file = tmp_path / "written"
    code = f"""
import sys
from dllm_gym.tasks.grading.workers import refuse
sys.addaudithook(refuse)
for attempt in (lambda: open({str(file)!r}, "w"), lambda: __import__("os").system("true"),
                lambda: __import__("os").open({str(file)!r}, 65), lambda: __import__("os").fork(),
                lambda: __import__("subprocess").run("true"), lambda: __import__("socket").socket()):
    try:
        attempt()
        print("done")
    except PermissionError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 6, done.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        ("1 2 3", True),
        ("[[1, 2], ['a', None]]", True),
        ('{"a": [true, null]}', True),
        ("3*x**2/2 - sin(x) + C", True),
        ("(7 * 3) + 25", True),
        ("2 / 3.5", True),
        ("__name__", False),
        ("open(x)", False),
        ("ｏpen(x)", False),
        ("exec (x)", False),
        ("(exec)(x)", False),
        ("[exec][0](x)", False),
        ("x.y", False),
        ("x. y", False),
        ("'exec(x)'", False),
        ("sin('x')", False),
        ("S('open')", False),
        ("f'{x}'", False),
    ],
)
def test_only_formulas_and_literals_are_evaluated(answer, fine):
    assert harmless(answer) is fine


@needs_proc
def test_what_is_asked_apart_cannot_change_the_worker_speak_for_it_or_stay():
    code = """
import os, resource, signal, sys, time
from dllm_gym.tasks.grading.workers import alarm, apart
known = []
alarm(0.2)
print(apart(lambda: known.append(1) or 0.5), known)
print(apart(lambda: 1 / 0), apart(lambda: os._exit(3)), apart(lambda: os.system("true")))
print(apart(lambda: os.write(1, b"forged") and 1.0))
def endless():
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(99)
alarm(0.1)
signal.setitimer(signal.ITIMER_REAL, 20)  # the caller's own alarm comes later
print(apart(endless))
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert done.stdout.split("\n") == ["0.5 []", "None None None", "None", "None", ""]


@needs_proc
def test_a_worker_that_puts_off_its_alarm_is_killed_by_whoever_asked(monkeypatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.1)
    worker = Worker("latex", 0.02)
    os.kill(worker.process.pid, signal.SIGSTOP)  # a stopped process has no alarm
    begin = time.monotonic()
    assert worker.ask(["x+x", "2x"]) is None
    worker.close()
    assert time.monotonic() - begin < 5 and gone([worker.process.pid])


def test_a_system_without_free_processes_is_asked_again(monkeypatch):
    real, failures = subprocess.Popen, [BlockingIOError()]

    def crowded(*arguments, **settings):
        if failures:
            raise failures.pop()
        return real(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", crowded)
    pool = Pool("latex", seconds=2.0)
    assert pool.ask("x+x", "2x") is True and failures == []
    pool.close()


def test_questions_travel_as_json_whatever_they_hold():
    assert json.loads(json.dumps(["\ud800\x00\n"])) == ["\ud800\x00\n"]
    assert equivalent("x+\n1", "1\n+x") and not equivalent("x\ud800", "y\n\x00")
