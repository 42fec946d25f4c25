"""Who imports whom, what an import drags in, and that the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room of dllm_gym may import of the others: imports run one way. A new room needs a line here.
MAY_IMPORT = {
    "": {"decode"},  # when it is asked for
    **dict.fromkeys(["checks", "noise", "prompt", "render"], set()),
    "replay": {"render"},
    "runs": set(),  # files only
    "deciders": {"runs"},  # tensors, and where they are stored: no environment, no model
    "models": {"noise", "prompt"},
    "tasks": {"prompt"},
    "process": {"models", "tasks", "noise", "render"},
    "envs": {"process", "models", "noise", "render"},
    "decode": {"envs", "process", "models", "tasks", "deciders", "prompt"},
    "harness": {"decode", "models", "deciders", "prompt"},
    **dict.fromkeys(["env", "vector_env", "torchrl_env", "sb3_env"], {"envs"}),  # names of before
}
EVERYWHERE = {"checks"}
TORCHRL = {"dllm_gym.envs.torchrl", "dllm_gym.deciders.player"}
HYDRA = {"hydra", "omegaconf"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file; ``from a import b`` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def part(name: str) -> str:
    """``models`` of ``dllm_gym.models.load``; empty for the package itself."""
    return (name.split(".") + [""])[1]


def test_the_scanner_sees_every_form():
    assert "datasets.Dataset" in imports(ROOT / "dllm_gym/tasks/base.py")  # within a function
    assert "dllm_gym.render" in imports(ROOT / "dllm_gym/envs/single.py")  # from dllm_gym import render
    assert "numpy" in imports(ROOT / "dllm_gym/envs/single.py")  # import numpy as np


@pytest.mark.parametrize("path", files("dllm_gym"), ids=module_name)
def test_the_environment_imports_downwards(path):
    own = part(module_name(path))
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what dllm_gym.{own} may import"
    used = {part(name) for name in imports(path) if name.startswith("dllm_gym.")} - EVERYWHERE
    assert used <= MAY_IMPORT[own] | {own}
    assert packages(path).isdisjoint({"agents", "scripts", "factory", *HYDRA})
    assert "torchrl" not in packages(path) or module_name(path) in TORCHRL


@pytest.mark.parametrize("path", files("agents"), ids=module_name)
def test_agents_know_neither_scripts_nor_hydra(path):
    assert packages(path).isdisjoint({"scripts", "factory", *HYDRA})


LIMITS = {"lines of a function": 50, "lines of a class": 150, "arguments": 6}
ALLOWED = {
    "dllm_gym/envs/single.py DLLMUnmaskEnv": "half of it is the environment's card, which Gymnasium's tools read there",
    "dllm_gym/deciders/policy.py Policy": "what huggingface_hub's mixin wants overridden, with its download arguments",
}


def measures(path: Path) -> list[tuple[str, str, int]]:
    """(where, what, how much) of all functions and classes in a file; constructors may have any number of arguments."""
    found = []

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                visit(child, above)
                continue
            name, lines = f"{above}{child.name}", child.end_lineno - child.lineno + 1
            where = f"{path.relative_to(ROOT).as_posix()} {name}"
            if isinstance(child, ast.ClassDef):
                found.append((where, "lines of a class", lines))
            else:
                names = [arg.arg for arg in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)]
                own = [arg for arg in names if arg not in ("self", "cls")]
                found.append((where, "lines of a function", lines))
                found.append((where, "arguments", 0 if child.name == "__init__" else len(own)))
            visit(child, f"{name}.")

    visit(ast.parse(path.read_text()), "")
    return found


@pytest.mark.parametrize("path", files("dllm_gym", "agents", "scripts"), ids=module_name)
def test_functions_fit_a_screen_and_classes_three(path):
    too_much = [found for found in measures(path) if found[2] > LIMITS[found[1]]]
    assert [found for found in too_much if found[0] not in ALLOWED] == []
    mine = {where for where in ALLOWED if where.startswith(f"{path.relative_to(ROOT).as_posix()} ")}
    assert mine <= {where for where, _, _ in too_much}, "fits by now: take it out of ALLOWED"


def loaded(statement: str, names: list[str]) -> str:
    """What ``statement`` prints in a fresh process, and which of the modules it has loaded."""
    code = f"import sys\n{statement}\nprint([name for name in {names} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_is_light_and_silent():
    heavy = ["torch", "transformers", "torchrl", "datasets", "hydra", "matplotlib"]
    assert loaded("import dllm_gym, dllm_gym.tasks, dllm_gym.render", heavy) == "[]\n"
    assert loaded("import dllm_gym.envs.vector, dllm_gym.deciders", ["torchrl", "hydra"]) == "[]\n"


OPTIONAL = {"sb3": "stable_baselines3", "sb3_env": "stable_baselines3", "harness": "lm_eval"}
FACES = ("single", "vector", "torchrl", "sb3")
SHOWN = [*ROOT.glob("dllm_gym/tasks/*.py"), *(ROOT / f"dllm_gym/envs/{name}.py" for name in FACES)]


@pytest.mark.parametrize("path", files("dllm_gym", "agents"), ids=module_name)
def test_examples_in_docstrings_run(path):
    if path.stem in OPTIONAL:
        pytest.importorskip(OPTIONAL[path.stem], reason="what it adapts is an extra")
    result = doctest.testmod(importlib.import_module(module_name(path)))
    assert result.failed == 0
    assert result.attempted or path not in SHOWN or path.stem in ("__init__", "base"), "show how it is used"


def test_commands_find_their_own_agents_where_another_package_has_that_name(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("raise RuntimeError('agents of another package')")
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), f"runs={tmp_path}"]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=surroundings)
    assert done.returncode == 2 and "no finished run" in done.stderr
    plays = "from dllm_gym.deciders import make_decider\nprint(make_decider('equations-all-speeds'))"
    done = subprocess.run([sys.executable, "-c", plays], capture_output=True, text=True, cwd=tmp_path, env=surroundings)
    assert done.returncode == 0, done.stderr


def test_a_program_whose_extra_is_missing_says_so_in_one_line():
    start = (
        "import runpy, sys\nsys.modules['lm_eval'] = None\nrunpy.run_module('dllm_gym.harness', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "pip install 'dllm_gym[lm-eval]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
COMMANDS = [path for path in SCRIPTS if path.stem == "command" or "command.command" in imports(path)]


HEAVY = ("torch", "torchrl", "tensordict", "transformers", "datasets", "matplotlib", "scipy")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_starts_before_what_takes_seconds(path):
    """It shows its first line, and what lets torch sleep while it waits is set, before whatever imports torch."""
    assert loaded(f"sys.path.insert(0, 'scripts')\nimport {path.stem}", ["prelude", *HEAVY]) == "['prelude']\n"


@pytest.mark.parametrize(
    ("name", "setting", "first"),
    [
        ("train", "agent=ppo", "train: model=own, task=equations, agent=ppo in outputs/train/"),
        ("evaluate", "checkpoint=mine", "evaluate: checkpoint=mine in outputs/evaluate/"),
        ("watch", "task=arithmetic", "watch: model=own, task=arithmetic\n"),
        ("compare", "runs=[a,b]", "compare: runs=['a', 'b']\n"),
        ("plot", "results=a.json", "plot: results=a.json\n"),
        ("reproduce", "folder=mine", "reproduce: folder=mine\n"),
        ("benchmark", "threads=1", "benchmark: measure=['embedded'] in outputs/benchmark/"),
        ("decode", "decider=threshold", "decode: decider=threshold\n"),
        ("pretrain_tiny", "threads=1", "pretrain_tiny: "),
    ],
)
def test_the_first_line_comes_before_the_checks_that_import(name, setting, first):
    stop_there = "import command\ncommand.check_values = lambda settings: sys.exit(0)"
    start = f"sys.stderr = sys.stdout\nsys.path.insert(0, 'scripts')\nsys.argv = ['{name}.py', {setting!r}]\n"
    start += f"{stop_there}\nimport {name}"
    shown = loaded(f"{start}\ntry:\n    {name}.main()\nexcept SystemExit:\n    pass", list(HEAVY))
    assert shown.startswith(first) and shown.endswith("\n[]\n"), shown


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: f"{path.parent.stem}/{path.stem}"
)
def test_every_configuration_says_first_what_it_is(path):
    lines = path.read_text().splitlines()
    first = lines["@package" in lines[0]]  # which Hydra finds nowhere but in the very first line
    assert first.startswith("# ") and len(first.split()) > 3 and "python scripts" not in first


def test_contributing_points_at_what_is_there():
    named = re.findall(r"`([\w.]+/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
