"""README.md and docs/: every block of code runs or composes, every link leads somewhere, figures are the table's.

Blocks of Python are executed, the blocks of a page one after the other in an empty folder; two kinds are not:

- one whose first line is ``# examples/...`` stands in that file word for word (the tests run the file);
- one marked ``python hub`` downloads weights: it compiles, and what it imports is there.

Commands in blocks of bash are composed and their settings checked, as the command itself does before any work.
"""

from __future__ import annotations

import ast
import csv
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from agents.fronts import envelope, reached
from dllm_gym.decode import SETTINGS
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.entries import ENTRIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
INLINE = re.compile(r"`((?:\w+=\S+ )?python (?:scripts|examples)/[^`]+)`")
SHOWN_ONLY = ("--cfg", "--hydra-help", "--help", "-sc")  # Hydra answers these itself


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Marks and text of a page's blocks in a language."""
    return [(marks.strip(), text) for kind, marks, text in BLOCK.findall(page.read_text()) if kind == language]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def excerpt_of(text: str) -> Path | None:
    """The file that a block is a part of, as its first line says."""
    found = re.match(r"# (examples/\S+)\n", text)
    return ROOT / found[1] if found else None


@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for marks, text in blocks(page, "python"):
        source = excerpt_of(text)
        if source is not None:
            assert text.partition("\n")[2].rstrip() in source.read_text(), f"{name(page)} is not what {source} says"
        elif marks == "hub":
            tree = ast.parse(text)
            tree.body = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
            exec(compile(tree, name(page), "exec"), {})
        else:
            assert not marks, f"{name(page)}: nobody knows what a block marked {marks!r} is"
            exec(compile(text, name(page), "exec"), names)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name)
def test_the_settings_of_a_page_are_those_of_the_file(page):
    for _, text in blocks(page, "yaml"):
        source, settings = excerpt_of(text), yaml.safe_load(text)
        assert settings and (source is None or settings == yaml.safe_load(source.read_text()))


def commands(text: str) -> list[list[str]]:
    """The commands of a shell script, each as its words; comments are gone."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def told(page: Path) -> list[list[str]]:
    """The commands that a page tells a reader to type, in its blocks and in its sentences."""
    scripts = [text for _, text in blocks(page, "bash")] + INLINE.findall(page.read_text())
    return [command for text in scripts for command in commands(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if told(page)], ids=name)
def test_the_commands_of_a_page_are_accepted(page, registered, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for command in told(page):
        check_command(command, monkeypatch)


def check_command(words: list[str], monkeypatch) -> None:
    """Fails for a command that would end with an error before it does any work."""
    while "=" in words[0] and words[0].partition("=")[0].isupper():
        variable, _, value = words.pop(0).partition("=")
        assert variable != "PYTHONPATH" or (ROOT / value).is_dir()
        monkeypatch.syspath_prepend(ROOT / value)
    match words:
        case ["python", path, *arguments] if path.startswith("scripts/"):
            assert (ROOT / path).is_file()
            check_settings(Path(path).stem, arguments)
        case ["python", path, *arguments] if path.startswith("examples/"):
            assert (ROOT / path).is_file() and not arguments
        case ["pip", "install", "-e", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(filter(None, what.removeprefix(".").strip("[]").split(","))) <= set(extras)
        case ["python", "-m", "dllm_gym.harness", *arguments]:
            check_harness(dict(zip(arguments[::2], arguments[1::2], strict=True)))
        case ["eval", inner]:
            check_command(shlex.split(inner.removeprefix("$(").removesuffix(")")), monkeypatch)
        case _:
            assert words in (["pytest"],), f"nobody checks the command {words}"


def check_harness(options: dict[str, str]) -> None:
    """Of the harness's own options three are used; what goes to the model are its arguments, or the decoder's."""
    assert options.keys() == {"--model", "--model_args", "--tasks"} and options["--model"] == "dllm_gym"
    tree = ast.parse((ROOT / "dllm_gym" / "harness.py").read_text())  # its imports are an extra
    (init,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    own = {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}
    assert {part.partition("=")[0] for part in options["--model_args"].split(",")} <= own | set(SETTINGS)


def check_settings(script: str, arguments: list[str]) -> None:
    from command import as_text
    from settings import check_names, check_values

    arguments = [as_text(argument) for argument in arguments]
    if any(argument in SHOWN_ONLY for argument in arguments):
        return
    folders = []
    if "--config-dir" in arguments:
        at = arguments.index("--config-dir")
        folders = [f"hydra.searchpath=['file://{ROOT / arguments[at + 1]}']"]
        arguments = arguments[:at] + arguments[at + 2 :]
    sweep = "-m" in arguments
    for job in jobs([argument for argument in arguments if argument != "-m"], sweep):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            cfg = compose(script, [*job, *folders], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
        try:
            settings = cfg.copy()
            del settings.hydra
            check_values(check_names(settings, script))
        finally:
            HydraConfig.instance().cfg = None


def jobs(arguments: list[str], sweep: bool) -> list[list[str]]:
    """Jobs of a command, in which every value of a sweep comes up at least once."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [argument]
        for argument, override in zip(arguments, OverridesParser.create().parse_overrides(arguments), strict=True)
    ]
    count = max(map(len, choices), default=1)
    assert sweep == (count > 1), f"{arguments}: several values, and no -m (or the other way round)"
    return [[values[job % len(values)] for values in choices] for job in range(count)]


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}"


def test_every_page_can_be_found_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    assert set(PAGES) <= linked | {ROOT / "README.md"}


def test_the_cheat_sheet_has_twenty_commands():
    assert len(told(ROOT / "docs" / "cheatsheet.md")) == 20


def test_the_readme_is_short_and_its_figures_are_those_of_the_main_job():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    with (ROOT / "docs" / "main_job_results.csv").open() as file:
        results = {row["name"]: row for row in csv.DictReader(file)}
    policies = [name for name in results if name.startswith("policy(")]
    names = {f"learned policy, {name.partition(', ')[2].rstrip(')').replace('=', ' ')}": name for name in policies}
    names |= {"most confident first, one at a time": "top_k(1)"}
    rows = re.findall(r"^\| ([^|]+) \| (\d[\d.]*) \| (\d[\d.]*) \| (\d[\d.]*) \|$", text, re.MULTILINE)
    assert len(rows) == 11
    for told, *numbers in rows:
        setting = re.sub(r"^(\S+) ([\d.]+).*", r"\1(\2)", told.replace("entropy-bounded", "eb"))
        exact = results[names.get(told, setting)]
        assert [float(number) for number in numbers] == pytest.approx(
            [float(exact[name]) for name in ("accuracy", "nfe", "reward")], abs=0.0051
        ), told
        assert "chosen" not in told or exact["chosen"] == "True"
    points = [{**row, **{name: float(row[name]) for name in ("accuracy", "nfe")}} for row in results.values()]
    policy = next(row for row in points if row["name"] == names["learned policy, alpha 10"])
    shares = [f"{100 * x:.0f} %" for x in (policy["accuracy"], reached(envelope(points), policy["nfe"]))]
    assert re.findall(r"\d+ %", text.partition("![")[0]) == shares
    use = [line for line in blocks(ROOT / "README.md", "python")[0][1].splitlines() if line]
    assert len(use) == 8


def column(page: str, head: str, number: int = 1) -> list[str]:
    """The cells of one column of the table under a heading of a page."""
    section = (ROOT / "docs" / page).read_text().partition(f"## {head}\n")[2].partition("\n## ")[0]
    return [line.split(" | ")[number - 1].strip("| ") for line in section.splitlines() if line.startswith("| `")]


def quoted(cells: list[str]) -> list[str]:
    return re.findall(r"`([^`]+)`", " ".join(cells))


def test_the_card_has_every_entry_and_every_argument():
    assert sorted(quoted(column("environment.md", "Observation Space"))) == sorted(entry.name for entry in ENTRIES)
    arguments = [*(field.name for field in fields(EnvConfig)), "render_mode"]
    assert sorted(quoted(column("environment.md", "Arguments"))) == sorted(arguments)


KEYS = {  # of the papers' published configurations -> the section with a table of what they are here
    "LUP as published": """adam_beta1 adam_beta2 alpha_compute_reward alpha_correctness_reward attn_implementation beta
    bf16 block_length confidences_top_p dataset dpls_stop_logit epsilon es_thresholds generation_batch_size
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs learning_rate load_in_4bit
    logging_steps loglikelihood_dtype lr_scheduler_type max_completion_length max_grad_norm max_prompt_length model_path
    num_generations num_iterations num_train_epochs per_device_eval_batch_size per_device_train_batch_size
    policy_dropout policy_feedforward_dim policy_full_context policy_hidden_dim policy_num_blocks policy_num_heads
    policy_smart_init policy_time_embed_dim policy_time_period policy_type remasking resume_from_checkpoint
    reward_functions reward_weights sampling_mode save_best_checkpoint save_steps save_strategy save_total_limit seed
    temperature timestep_batch_size torch_dtype use_vllm vllm_device vllm_gpu_memory_utilization warmup_steps
    weight_decay""",
    "How they compare": """adam_beta1 adam_beta2 attn_implementation beta bf16 block_length dataset diffusion_steps
    divergence epsilon extra_bim_size extra_model_path extra_temperature generation_batch_size
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs learning_rate load_in_4bit
    logging_steps lora_alpha lora_dropout lora_r lr_scheduler_type max_completion_length max_grad_norm
    max_prompt_length max_steps model_path num_generations num_iterations num_train_epochs output_dir p_mask_prompt
    peft_task_type per_device_eval_batch_size per_device_train_batch_size random_masking ref_model_sync_steps remasking
    resume_from_checkpoint run_name save_steps save_strategy save_total_limit seed sync_ref_model temperature
    torch_dtype use_peft use_vllm vllm_device vllm_gpu_memory_utilization warmup_ratio weight_decay""",
}


@pytest.mark.parametrize("section", KEYS)
def test_every_published_key_is_told(section):
    told = {name.partition(":")[0] for name in quoted(column("methods.md", section))}
    assert set(KEYS[section].split()) <= told


def test_the_choices_of_every_group_are_told():
    told = dict(zip(column("runs.md", "Commands"), column("runs.md", "Commands", 2), strict=True))
    for group in ("agent", "distribution", "policy", "task", "env", "reward", "logger"):
        choices = {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}
        assert choices == set(quoted([told[f"`{group}`"]])) & choices, f"docs/runs.md lacks choices of {group}"
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert set(quoted([*told])) == groups
