"""scripts/reproduce.py: what it plans, that it goes on after a kill, and what it writes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[2]

# Stands in for train.py and evaluate.py: six rounds with a checkpoint each, then results that depend on the settings
# alone. A line of `starts` per start, a line of `rounds` per round.
STUB = """
import json, os, signal, sys, time, zlib
from pathlib import Path

settings = dict(text.split("=", 1) for text in sys.argv[1:])
run = Path(settings.pop("hydra.run.dir"))
done = run / "checkpoint" / "trainer.pt"
if settings.pop("resume", None) == "auto" and done.exists():
    settings = json.loads((run / "settings.json").read_text())
(run / "settings.json").write_text(json.dumps(settings))
with (run / "starts").open("a") as file:
    file.write("resumed\\n" if done.exists() else "fresh\\n")
if settings.get("seed") == "13":
    sys.exit("thirteen is not lucky")
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
for round in range(int(done.read_text()) if done.exists() else 0, 6):
    time.sleep(float(os.environ["ROUND"]))
    with (run / "rounds").open("a") as file:
        file.write(f"{round}\\n")
    if "train" in sys.argv[0]:
        done.parent.mkdir(exist_ok=True)
        done.write_text(str(round + 1))
    if asked:
        sys.exit(130)
base = settings
if "checkpoint" in settings:
    base = json.loads((Path(settings["checkpoint"]) / "settings.json").read_text())
alphas = ["0.3", "10"] if "policy.preference" in base else [base.get("reward.alpha")]
rules = ["threshold(0.0)", "threshold(0.5)", "threshold(0.9)", "top_k(1)"]
told = [f", alpha={alpha}" for alpha in alphas] if len(alphas) > 1 else [""]
policies = [f"policy({how}{alpha})" for how in ("greedy", "sampled") for alpha in told]
rows = []
for i, name in enumerate(policies if settings["heuristics"] == "none" else rules):
    x = zlib.crc32(f"{base} {name}".encode()) / 2**32
    nfe = 1.0 + 2 * i if name in rules else 2 + x
    accuracy = min(1.0, 0.1 + nfe / 6) if name in rules else 0.8 + x / 6
    numbers = {"accuracy": accuracy, "accuracy_low": accuracy - 0.01, "accuracy_high": min(1, accuracy + 0.01)}
    rows.append({"name": name, **numbers, "nfe": nfe, "nfe_low": nfe, "nfe_high": nfe, "reward": x, "examples": 9})
(run / "config.yaml").write_text("env: {gen_length: 20}\\n")
columns = "round,reward,nfe,empty_steps,idle_lanes,equal_groups,seconds"
(run / "metrics.csv").write_text(columns + "\\n0,.5,3,0,.25,.25,60\\n")
(run / "results.json").write_text(json.dumps(rows))
"""

SMALL = ["tasks=[sudoku]", "alphas=[1,3]", "seeds=[0,1]", "grids=[threshold]", "examples=9", "transfer.families=[]"]


@pytest.fixture(scope="module")
def reproduce():
    sys.path.insert(0, str(ROOT / "scripts"))
    import reproduce

    yield reproduce
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def stubs(reproduce, tmp_path, monkeypatch):
    """The scripts replaced by stubs."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("train", "evaluate"):
        (folder / f"{name}.py").write_text(STUB)
    monkeypatch.setattr(reproduce, "SCRIPTS", folder)
    monkeypatch.setattr(reproduce, "POLL", 0.02)
    monkeypatch.setenv("ROUND", "0")  # seconds
    return folder


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("reproduce", list(overrides))


def planned(reproduce, *overrides):
    return reproduce.plan(config(*overrides))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# The plan


def test_the_plan_holds_what_the_claims_need(reproduce):
    jobs = planned(reproduce)
    kinds = Counter((job.script, job.labels["kind"]) for job in jobs)
    places, seeds = 4, 3
    policies = places * seeds * 4
    # in full diffusion, policies for two alphas also decode the other task and with the other dLLM; those of
    # arithmetic longer chains as well
    transfers = seeds * 2 * (2 + 3)
    assert kinds == {
        ("evaluate", "heuristic"): places * 3 + 3,
        ("train", "policy"): policies,
        ("train", "conditioned"): places * seeds,
        ("evaluate", "policy"): policies,
        ("evaluate", "conditioned"): places * seeds,
        ("evaluate", "transfer"): transfers,
    }
    assert len({job.folder for job in jobs}) == len(jobs)
    for place, job in enumerate(jobs):
        assert job.base is None or job.base in jobs[:place]
        tested = "evaluation.split=test" in job.settings
        assert tested == (job.script == "evaluate")  # trainings see the validation split only


def test_a_job_is_a_command_in_its_own_folder(reproduce):
    jobs = planned(reproduce, *SMALL, "envs=[full_diffusion]", "folder=runs")
    train = next(job for job in jobs if job.script == "train")
    test = next(job for job in jobs if job.base is train)
    command = train.command()
    assert command[1].endswith("train.py") and f"hydra.run.dir={train.folder}" in command and "threads=1" in command
    assert {"task=sudoku", "env=full_diffusion", "reward.alpha=1", "seed=0"} <= set(command)
    assert test.command()[-1] == f"checkpoint={train.folder}" and "evaluation.examples=9" in test.command()


def test_other_settings_mean_another_folder_and_the_same_ones_the_same(reproduce):
    def folders(*overrides):
        return {job.folder.name for job in planned(reproduce, *SMALL, "envs=[full_diffusion]", *overrides)}

    ours = folders()
    assert folders("workers=7", "folder=elsewhere") == ours
    assert len(ours - folders("examples=10")) == 7  # what is tried on the test split: a grid, six policies
    changed = folders("training.sudoku.full_diffusion=['rounds=9']")
    assert len(ours - changed) == 12  # every training, and every evaluation of what it trained


def test_a_warm_start_is_a_training_of_its_own(reproduce):
    jobs = planned(reproduce, *SMALL, "envs=[full_diffusion]", "warm_start.sudoku.full_diffusion=['agent=imitation']")
    starts = [job for job in jobs if not job.labels]
    assert [job.script for job in starts] == ["train", "train"] and "agent=imitation" in starts[0].settings
    policies = [job for job in jobs if job.base in starts]
    assert len(policies) == 6
    assert all(f"agent.warm_start={job.base.folder}" in job.command() for job in policies)
    assert all(f"seed={job.labels['seed']}" in job.base.settings for job in policies)


def test_every_command_is_one_that_the_scripts_understand(reproduce):
    jobs = planned(reproduce, "alphas=[1]", "seeds=[0]", "grids=[grid_stability]")
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        for job in jobs:
            cfg = compose(job.script, job.settings)
            assert cfg.evaluation.split == job.labels["split"]
            assert job.labels["task"] in cfg.task._target_
            semi = job.labels["env"] == "semi_autoregressive"
            if job.script == "train":
                assert (cfg.policy.preference or False) == (job.labels["kind"] == "conditioned")
            assert cfg.env.block_length == ({"sudoku": 5, "arithmetic": 12}[job.labels["task"]] if semi else None)


@pytest.mark.parametrize("override", ["workers=0", "transfer.families=[polcy]"])
def test_a_setting_that_makes_no_sense_is_named(reproduce, override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        planned(reproduce, override)


# Doing it


def test_jobs_run_behind_what_they_build_on_and_only_once(reproduce, stubs, tmp_path):
    jobs = planned(reproduce, *SMALL, "envs=[full_diffusion]", f"folder={tmp_path / 'runs'}")
    assert reproduce.execute(jobs, 3) == []
    assert all(job.done() for job in jobs)
    assert reproduce.execute(jobs, 3) == []
    assert all(lines(job.folder / "starts") == ["fresh"] for job in jobs)
    for job in jobs:
        if job.base:
            finished = (job.base.folder / "results.json").stat().st_mtime
            assert finished <= (job.folder / "settings.json").stat().st_mtime


def in_the_background(function, *args):
    """A process that can be killed; forked, so that it knows the stubs."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def wait_for(condition, process):
    deadline = time.monotonic() + 60  # a guard against hanging
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_table(reproduce, stubs, tmp_path, monkeypatch, sign):
    monkeypatch.setenv("ROUND", "0.05")

    def cfg(name):
        paths = (f"folder={tmp_path / name}", f"table={tmp_path / name}.csv", f"page={tmp_path / name}.md")
        return config(*SMALL, "alphas=[1]", "envs=[full_diffusion]", f"quick={tmp_path / 'none'}", *paths)

    unbroken, broken = reproduce.plan(cfg("unbroken")), reproduce.plan(cfg("broken"))
    reproduce.execute(unbroken, 4)
    process = in_the_background(reproduce.main.__wrapped__, cfg("broken"))
    first = next(job for job in broken if job.script == "train")
    wait_for(lambda: len(lines(first.folder / "rounds")) >= 2, process)
    os.kill(process.pid, sign)
    process.join(30)
    assert not all(job.done() for job in broken)
    assert process.exitcode == (-signal.SIGKILL if sign == signal.SIGKILL else 130)
    assert reproduce.execute(broken, 4) == []
    for job in broken:  # no round was lost or done twice, whoever was killed: the orphans of a kill finished their job
        if job.script == "train":
            assert lines(job.folder / "rounds") == [str(i) for i in range(6)]
    resumed = [job for job in broken if "resumed" in lines(job.folder / "starts")]
    assert (first in resumed) == (sign != signal.SIGKILL)
    for name, jobs in (("unbroken", unbroken), ("broken", broken)):
        reproduce.tabulate(cfg(name), jobs)
    assert (tmp_path / "broken.csv").read_bytes() == (tmp_path / "unbroken.csv").read_bytes()
    with (tmp_path / "broken.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 + 2 * 2 * (2 + 4)  # rules; splits, seeds, rows of the two


def test_a_failed_job_is_reported_when_the_others_are_done(reproduce, stubs, tmp_path, capsys):
    paths = [f"folder={tmp_path / 'runs'}", f"table={tmp_path / 't.csv'}", f"page={tmp_path / 'p.md'}"]
    cfg = config(*SMALL, "envs=[full_diffusion]", "seeds=[0,13]", f"quick={tmp_path / 'none'}", *paths)
    with pytest.raises(SystemExit, match="6 of 13 jobs failed"):  # three trainings, and what would evaluate them
        reproduce.main.__wrapped__(cfg)
    shown = capsys.readouterr().err
    assert shown.count("thirteen is not lucky") == 3 and "conditioned-sudoku-full_diffusion-seed13" in shown
    jobs = reproduce.plan(cfg)
    assert [job.done() for job in jobs] == ["seed13" not in job.name for job in jobs]
    assert "6 of 13 jobs are not done yet" in (tmp_path / "p.md").read_text()


# The report


def test_the_page_says_what_the_runs_say(reproduce, stubs, tmp_path, capsys):
    paths = [f"folder={tmp_path / 'runs'}", f"table={tmp_path / 'docs/t.csv'}", f"page={tmp_path / 'docs/p.md'}"]
    cfg = config(
        *SMALL,
        "tasks=[sudoku,arithmetic]",
        "alphas=[1]",
        "transfer={families: [policy], envs: [semi_autoregressive]}",
        "workers=4",
        f"quick={tmp_path / 'runs'}",
        "notes.fast=The reason.",
        *paths,
    )
    jobs = reproduce.plan(cfg)
    assert reproduce.session(cfg, jobs) == []
    reproduce.report(cfg, jobs)
    page = (tmp_path / "docs" / "p.md").read_text()
    for task in ("sudoku", "arithmetic"):
        for env in ("full_diffusion", "semi_autoregressive"):
            for picture in ("front", "curves"):
                name = f"figures/{picture}_{task}_{env}.png"
                assert f"({name})" in page
                assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    assert "The reason." in page and "nan" not in page and "None" not in page
    test = next(job for job in jobs if job.labels["kind"] == "policy" and job.script == "evaluate")
    rows = {
        job.labels["seed"]: json.loads((job.folder / "results.json").read_text())
        for job in jobs
        if {**job.labels, "seed": 0} == test.labels
    }
    validation = {
        job.labels["seed"]: json.loads((job.base.folder / "results.json").read_text())
        for job in jobs
        if {**job.labels, "seed": 0} == test.labels
    }
    better = max((0, 1), key=lambda i: sum(result[i]["reward"] for result in validation.values()))
    mean = sum(result[better]["accuracy"] for result in rows.values()) / 2
    assert f"| one policy per alpha | 1 | {('greedy', 'sampled')[better]} | {mean:.3f} ±" in page
    assert "| sudoku, full diffusion | one policy for all alphas | all | 0.0 % | 25.0 % | 25.0 % |  | 1.0 |" in page
    assert "| arithmetic | arithmetic, semi-autoregressive, long | one policy per alpha |" in page
    assert len(lines(tmp_path / "runs" / "sessions.csv")) == len(jobs) and f"{len(jobs)} jobs in 1 session(s)" in page
