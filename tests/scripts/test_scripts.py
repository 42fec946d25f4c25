"""The commands, as a user calls them."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf, open_dict

from dllm_gym.models import load_dllm

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=smoke",
    "task=sudoku",
    "rounds=2",
    "prompts_per_round=2",
    "agent.group_size=4",
    "evaluation.examples=8",
    "heuristics=none",
    "reward.alpha=2.5",
    "evaluation.within=null",
    "threads=1",
]


def run(script: str, *overrides: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT)


def compose_config(name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, list(overrides), return_hydra_config=True)


def call(script: str, folder: Path, *overrides: str):
    """The script's main in this process, as Hydra would call it: spares the seconds of another interpreter."""
    cfg = compose_config(script, *overrides)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        del cfg.hydra
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(script).main(cfg)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
        HydraConfig.instance().cfg = None


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "train"
    run("train.py", "agent=grpo", *SMALL, f"hydra.run.dir={folder}", "checkpoint_every=1")
    return folder


def test_training_leaves_everything_a_user_needs(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "results.json", "results.csv", "results.png"} <= names
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1"]
    results = json.loads((trained / "results.json").read_text())
    assert [row["name"] for row in results] == ["policy(greedy)", "policy(sampled)"]
    assert all(row["examples"] == 8 and 1 <= row["nfe"] <= 20 for row in results)
    rewards = [row["validation_reward"] for row in results]
    assert [row["chosen"] for row in results] == [rewards[0] >= rewards[1], rewards[0] < rewards[1]]


def test_a_checkpoint_evaluates_like_the_run_that_made_it(trained, tmp_path):
    settings = [
        "evaluation.examples=8",
        "evaluation.seeds=[42]",
        "evaluation.num_envs=3",
        "heuristics=none",
        "threads=1",
    ]
    call("evaluate", tmp_path, f"checkpoint={trained}", *settings)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads((trained / "results.json").read_text())


def test_a_run_of_the_previous_layout_evaluates_and_goes_on_as_it_did(trained, tmp_path, caplog):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    as_an_earlier_version_left_it(old)
    saved = yaml.safe_load((old / "config.yaml").read_text())
    for group, settings in (("evaluation", ["within", "baseline"]), ("agent", ["imitation"])):
        for setting in settings:
            del saved[group][setting]  # younger than that layout
    del saved["cut_prompts"]
    text = re.sub(r"dllm_gym\.deciders[\w.]*\.(\w*Bernoulli)", r"agents.distributions.\1", yaml.safe_dump(saved))
    text = re.sub(r"dllm_gym\.deciders[\w.]*\.(DiT\w+)", r"agents.policies.\1", text)
    assert text.count("agents.distributions.") == 2 and text.count("agents.policies.") == 1 and "deciders" not in text
    (old / "config.yaml").write_text(text)
    settings = ["evaluation.examples=8", "evaluation.seeds=[42]", "heuristics=none", "threads=1"]
    call("evaluate", tmp_path / "now", f"checkpoint={old}", *settings)
    results = json.loads((trained / "results.json").read_text())
    assert json.loads((tmp_path / "now" / "results.json").read_text()) == results
    assert "is of an earlier layout: agents.distributions, agents.policies now means dllm_gym.deciders" in caplog.text
    call("train", tmp_path / "on", f"resume={old}", "evaluation.within=null")  # nothing left to do but the report
    assert json.loads((tmp_path / "on" / "results.json").read_text()) == results


def test_an_evaluation_takes_over_what_the_user_did_not_choose(trained, tmp_path, monkeypatch):
    settings = ["evaluation.examples=4", "evaluation.seeds=[42]", "heuristics=none", "temperature=0.5"]
    call("evaluate", tmp_path / "a", f"checkpoint={trained}", *settings, "task=arithmetic", "env.block_length=12")
    used = (tmp_path / "a" / "config.yaml").read_text()
    assert "arithmetic.Arithmetic" in used and "block_length: 12" in used
    assert "alpha: 2.5" in used  # not named above: the run's own
    call("evaluate", tmp_path / "b", f"checkpoint={trained}", *settings[:3], "env.temperature=0.5", "reward.alpha=3")
    used = (tmp_path / "b" / "config.yaml").read_text()
    assert "temperature: 0.5" in used and "alpha: 3" in used and "max_givens: 8" in used  # the rest of the group stays


def test_several_checkpoints_are_evaluated_together_and_gone_on_with_to_the_byte(trained, tmp_path):
    settings = [
        f"checkpoint=[{trained}@first,{trained}@last]",
        "temperature=[0.5,1]",
        "evaluation.examples=8",
        "evaluation.seeds=[42,43]",
        "evaluation.baseline='threshold(0.9)'",
        "evaluation.reward_alpha=3",
        "heuristics=threshold",
        "threads=1",
    ]
    names = ("results.csv", "results.json", "results.md", "fronts.json")
    call("evaluate", tmp_path / "a", *settings, "evaluation.num_envs=5")
    rows = json.loads((tmp_path / "a" / "results.json").read_text())
    decodings = ("greedy", "sampled, temperature=0.5", "sampled, temperature=1")
    first, last = ([f"policy({how}, run=train@{end})" for how in decodings] for end in ("first", "last"))
    assert [row["name"] for row in rows][:6] == [*first, *last]
    assert {row["alpha"] for row in rows} == {3} and all(0 < row["p_value"] <= 1 for row in rows[:6])
    assert [row["chosen"] for row in rows[:3]].count(True) == [row["chosen"] for row in rows[3:6]].count(True) == 1
    file = tmp_path / "a" / "generations.jsonl"
    whole = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[::2]) + b'{"key": "half a li')
    call("evaluate", tmp_path / "a", *settings, "evaluation.num_envs=3")
    assert {name: (tmp_path / "a" / name).read_bytes() for name in names} == whole
    assert len(file.read_bytes().splitlines()) == len(lines)
    before = file.read_bytes()
    call("evaluate", tmp_path / "a", *settings[:-2], "heuristics=none", "evaluation.baseline=null")
    assert file.read_bytes() == before  # all is known
    with pytest.raises(ValueError, match="another reward than .*reward.NAME"):
        call("evaluate", tmp_path / "c", f"checkpoint=[{trained},{another_reward(trained, tmp_path)}]", *settings[1:])
    call("compare", tmp_path, f"runs=[{tmp_path / 'a'},{trained}]", f"table={tmp_path / 'both.md'}")
    table = (tmp_path / "both.md").read_text()
    assert all(f"policy(train@{end})" in table for end in ("first", "last")) and table.count("\n") == 5


def another_reward(run: Path, folder: Path) -> Path:
    """A copy of a run that was paid otherwise."""
    shutil.copytree(run, folder / "other")
    as_an_earlier_version_left_it(folder / "other")
    config = folder / "other" / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 2.5", "alpha: 2.25"))
    return folder / "other"


def test_a_resumed_run_equals_an_unbroken_one(trained, tmp_path):
    half = tmp_path / "half"
    call("train", half, *SMALL, "rounds=1")
    as_an_earlier_version_left_it(half)
    saved = yaml.safe_load((half / "config.yaml").read_text())
    for group, setting in (("evaluation", "alphas"), ("env", "cache"), ("policy", "preference")):
        del saved[group][setting]  # as a run saved it before these settings were there
    (half / "config.yaml").write_text(yaml.safe_dump(saved))
    call("train", half, f"resume={half}", "rounds=2", "evaluation.seeds=[42]")
    assert weights(half / "checkpoints" / "2") == weights(trained / "checkpoints" / "2")
    assert without_seconds(half / "metrics.csv") == without_seconds(trained / "metrics.csv")
    for other in (
        "reward.alpha=1",
        "env=full_diffusion",
        "experiment=lup_llada_bl32",
        "++agent.group_size=4",
        "seed=1",
    ):
        with pytest.raises(ValueError, match=f"it did not begin with {re.escape(other)}; only rounds, "):
            call("train", half, f"resume={half}", other)
    call("train", tmp_path / "copy", *SMALL, f"resume={half}", "rounds=2")  # nothing left to do, but all is there
    assert without_seconds(tmp_path / "copy" / "metrics.csv") == without_seconds(trained / "metrics.csv")
    call("train", tmp_path / "copy", *SMALL, "rounds=1", "resume=auto")  # a fork knows what its run began with
    assert without_seconds(tmp_path / "copy" / "metrics.csv") == without_seconds(trained / "metrics.csv")
    (half / "checkpoints" / "2" / "trainer.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="resume="):
        call("train", tmp_path / "other", *SMALL, f"resume={half}")


def test_what_is_chosen_anew_leaves_the_rest_of_its_group_as_the_run_has_it(tmp_path):
    call("train", tmp_path, *SMALL, "rounds=1", "checkpoints.keep=2")
    call("train", tmp_path, "resume=auto", "rounds=2", "evaluation.seeds=[7]", "logger=none", "heuristics=threshold")
    now = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert now["evaluation"]["examples"] == 8 and now["evaluation"]["seeds"] == [7] and now["threads"] == 1
    assert now["checkpoints"]["keep"] == 2 and now["reward"]["alpha"] == 2.5
    assert now["agent"]["algorithm"]["scheduler"]["num_training_steps"] == 2
    names = {row["name"].partition("(")[0] for row in json.loads((tmp_path / "results.json").read_text())}
    assert names == {"policy", "threshold"}


def as_an_earlier_version_left_it(run: Path) -> None:
    """One checkpoint, no manifest."""
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    last.rename(run / "checkpoint")
    shutil.rmtree(run / "checkpoints")
    for path in (run / "manifest.json", *((run / "checkpoint" / n) for n in ("manifest.json", "config.yaml"))):
        path.unlink()
    (run / "checkpoint" / "metrics.csv").unlink()


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "policy" / "model.safetensors").read_bytes()


def without_seconds(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def listen_to_interrupts() -> None:
    """For a child process: background jobs of a shell ignore SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_leaves_a_usable_checkpoint(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, "rounds=1000", f"hydra.run.dir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=listen_to_interrupts, **pipes)
    try:
        deadline = time.monotonic() + 240  # a guard against hanging, far beyond what it takes
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline, "training did not get going"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in err
    assert not (folder / "results.json").exists()
    assert list(folder.glob("checkpoints/*/trainer.pt"))
    call("watch", tmp_path / "watch", f"checkpoint={folder}", "fps=1000")


def test_watch_replays_one_decoding(tmp_path):
    picture = tmp_path / "replay.gif"
    done = run("watch.py", "example=3", "fps=1000", f"gif={picture}", f"hydra.run.dir={tmp_path}")
    assert "threshold(0.9) on example 3 of test" in done.stdout and "score" in done.stdout
    assert picture.read_bytes().startswith(b"GIF89a")


def test_watch_writes_a_video(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="needs the extra video")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    film = tmp_path / "replay.mp4"
    call("watch", tmp_path, "example=3", "fps=4", f"mp4={film}")
    with av.open(film) as video:
        frames = [frame.to_ndarray(format="gray").astype(int) for frame in video.decode(video=0)]
        seconds = float(video.duration / 1e6)
    changes = sum(abs(one - two).mean() > 1 for one, two in zip(frames, frames[1:], strict=False))
    assert 3 < changes == len(frames) - 10 and seconds == pytest.approx(len(frames) / 4)  # rests for 2.5 s


def test_a_video_without_its_packages_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"mp4=.*pip install -e '\.\[video\]'"):
        call("watch", tmp_path, f"mp4={tmp_path / 'replay.mp4'}")


def test_the_page_of_a_run_shows_how_it_learned(trained, tmp_path):
    file = tmp_path / "race.html"
    call("watch", tmp_path, f"checkpoint={trained}", f"html={file}", 'against=["joint(0.4)"]', "examples=1")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', file.read_text(), re.DOTALL)[1])
    with (trained / "metrics.csv").open() as rows:
        rewards = [float(row["reward"]) for row in csv.DictReader(rows)]
    (curve,) = data["curves"]
    assert data["deciders"] == ["train", "joint(0.4)"] and curve["name"] == "train" and curve["round"] == [0, 1]
    assert curve["reward"] == pytest.approx(rewards, abs=1e-4)


def test_plot_draws_results_again(trained, tmp_path):
    run("plot.py", f"results={trained / 'results.json'}", f"picture={tmp_path / 'again.png'}")
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_counts_what_it_says(tmp_path):
    embedded = ["prompts=2", "group_size=2", "num_envs=4", "growth_rows=2", "caches=[dual]"]
    llada = ["task.count=2", "group_size=2", "num_envs=2", "growth_rows=2", "lockstep_batches=null"]
    llada += ["env.gen_length=8", "block_lengths=[4]", "model.embedding_size=60000", "model.d_model=16"]
    llada += ["model.n_layers=1", "model.n_heads=2", "model.mlp_hidden_size=16"]
    overrides = [f"workloads.embedded.{s}" for s in embedded]
    overrides += [f"workloads.llada_48m.{s}" for s in llada]
    rounds = ["prompts_per_round=2", "agent.group_size=4", "repeats=1", "threads=1"]
    call("benchmark", tmp_path, "measure=[embedded,llada_48m]", *overrides, *rounds)
    measured = json.loads((tmp_path / "benchmark.json").read_text())
    for workload in measured.values():
        for case in workload["cases"].values():
            ours, plain = case["did"]["ours"], case["did"]["lockstep"]
            assert ours["same tokens"] == ours["same NFE"] == 1
            assert ours["row forwards"] < ours["NFE"] * 4 <= plain["row forwards"] + 1e-3
            for ratio, values in case["ratios"].items():
                over, under = ratio.split(" / ")
                assert values == [a / b for a, b in zip(case["seconds"][over], case["seconds"][under], strict=True)]
    assert "dual" in measured["embedded"]["cases"]["BL = 20, threshold"]["did"]
    assert len(measured["embedded"]["training seconds"]) == 1 and "training seconds" not in measured["llada_48m"]
    step = measured["llada_48m"]
    assert step["peak bytes"]["full softmax"] > 5 * step["peak bytes"]["ours"]
    assert step["growth"]["rows"]["peak memory"] == pytest.approx(1, abs=0.1)
    assert step["growth"]["vocabulary"]["peak memory"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agent=gpro"], "agent/gpro"),
        (["distribution=poisson"], "distribution/poisson"),
        (["model.model=nothing"], "model='nothing'"),
        (["env.block_length=7"], "block_length=7 does not divide gen_length=32"),
        (["reward.alpha=-1"], "alpha=-1"),
        (["evaluation.examples=100000"], "evaluation.examples=100000"),
        (["resume=nowhere"], "resume='nowhere'"),
        (["checkpoint_every=0"], "checkpoint_every=0"),
        (["agent.group_size=1"], "agent.group_size must be at least 2"),
        (["device=warp"], "device='warp'"),
        (["agent.max_batches=0"], "agent.max_batches=0"),
        (["agent.warm_start=nowhere"], "agent.warm_start='nowhere'"),
        (["evaluation.seeds=[]"], "evaluation.seeds=[]"),
        (["evaluation.examples=2.5"], "evaluation.examples=2.5"),
        (["seed=-1"], "seed=-1"),
        (["agent.algorithm.epochs=1.5"], "epochs=1.5"),
        (["agent.algorithm.clip_epsilon=[0.1]"], "clip_epsilon=[0.1]"),
        (["agent.algorithm.normalize=no"], "normalize='no'"),
        (["distribution.temperature=0"], "temperature=0"),
        (["agent=ppo", "agent.max_batches=2"], "agent.max_batches=2"),
        (["agent=upo", "agent.group_size=1"], "agent.group_size must be at least 2"),
        (["agent=upo", "distribution=dpls"], "distribution=one_position"),
        (["agent=upo", "reference=top_k", "policy.candidates=3"], "policy.candidates=5"),
    ],
)
def test_bad_input_is_named_before_any_work(overrides, message, tmp_path):
    with pytest.raises((ValueError, MissingConfigException), match=re.escape(message)):
        call("train", tmp_path, *overrides)
    assert not any((tmp_path / name).exists() for name in ("results.json", "checkpoints", "config.yaml"))


def test_a_wrong_setting_ends_the_command_with_its_message(tmp_path):
    done = run("train.py", "env.block_length=7", f"hydra.run.dir={tmp_path / 'run'}", check=False)
    assert done.returncode == 2 and "block_length=7 does not divide gen_length=32" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="checkpoint='nowhere'"):
        call("evaluate", tmp_path, "checkpoint=nowhere")


def test_every_root_config_composes():
    names = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml"))
    assert {"train", "evaluate", "watch", "plot", "compare", "benchmark", "pretrain_tiny"} <= set(names)
    for name in names:
        compose_config(name)


@pytest.mark.parametrize(
    "group", [p.name for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name not in ("experiment", "dllm")]
)
def test_every_choice_of_every_group_composes_and_instantiates(group, tmp_path):
    agents = {"expert": ["agent=imitation"], "reference": ["agent=upo"]}  # who has these groups
    for choice in sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")):
        cfg = compose_config("train", *agents.get(group, []), f"{group}={choice}")
        if group in ("task", "distribution", "heuristics", "agent", "expert", "reference"):
            hydra.utils.instantiate(cfg[group])
        assert cfg[group] is not None or group == "logger"


def test_every_dllm_that_ships_says_how_it_was_made():
    for choice in sorted(path.stem for path in (ROOT / "conf" / "dllm").glob("*.yaml")):
        cfg = compose_config("pretrain_tiny", f"dllm={choice}")
        (lesson,) = cfg.lessons
        task = hydra.utils.instantiate(lesson.task)
        name = OmegaConf.to_container(cfg, resolve=False)["save_to"].rpartition("/")[2]
        assert name == task.dllm and load_dllm(task.dllm).hidden_size == cfg.architecture.d_model


UPO = [  # the published run, with less of everything
    "experiment=upo_sudoku",
    "prompts_per_round=2",
    "agent.group_size=3",
    "agent.imitation.rounds=1",
    "agent.algorithm.epochs=2",
    "evaluation.examples=4",
    "evaluation.validation=4",
    "checkpoints.validation=4",
    "heuristics=none",
    "threads=1",
]


@pytest.mark.parametrize("reference", ["softmax_published", "max_confidence_published"])
def test_upo_as_published_trains_is_evaluated_greedily_and_goes_on(reference, tmp_path, capsys):
    command = [*UPO, f"reference={reference}", "agent=upo"]
    call("train", tmp_path, *command, "rounds=1")
    assert "imitating" in capsys.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in rows] == ["policy(greedy)"]
    call("train", tmp_path, *command, "rounds=2", "resume=auto")
    assert "imitating" not in capsys.readouterr().err
    with (tmp_path / "metrics.csv").open() as file:
        rounds = list(csv.DictReader(file))
    assert [row["gradient_steps"] for row in rounds] == ["2.0", "2.0"]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["agent"]["algorithm"]["normalize"] is False and config["env"]["committed_confidence"] is True


def test_upo_as_published_has_its_counts_and_a_constant_rate():
    cfg = compose_config("train", "experiment=upo_sudoku")
    assert cfg.prompts_per_round * cfg.agent.group_size == 144
    assert cfg.rounds * cfg.agent.algorithm.epochs == pytest.approx(3_500, abs=16)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.agent.algorithm.optimizer.lr)
    schedule = hydra.utils.instantiate(cfg.agent.algorithm.scheduler)(optimizer)
    rates = []
    for _ in range(cfg.rounds):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:12] == pytest.approx([3e-6 * i / 12 for i in range(12)])
    assert set(rates[12:]) == {3e-6}


@pytest.mark.parametrize("greedy", ["true", "false", "null"])
def test_a_policy_is_evaluated_greedily_sampled_or_both(greedy, tmp_path):
    call("train", tmp_path, *SMALL, "rounds=1", f"evaluation.greedy={greedy}", "evaluation.validation=null")
    names = {row["name"] for row in json.loads((tmp_path / "results.json").read_text())}
    expected = {"true": {"policy(greedy)"}, "false": {"policy(sampled)"}}
    assert names == expected.get(greedy, {"policy(greedy)", "policy(sampled)"})


def test_sweeps_over_agents_make_one_table(tmp_path):
    settings = [setting for setting in SMALL if not setting.startswith("reward")]
    sweep = ["-m", *settings, "agent=grpo,upo", "reward.alpha=0", "seed=0,1", "rounds=1", "evaluation.greedy=false"]
    run("train.py", *sweep, f"hydra.sweep.dir={tmp_path}")
    assert len(list(tmp_path.rglob("results.json"))) == 4
    table = tmp_path / "table.csv"
    run("compare.py", f"runs={tmp_path}", f"table={table}", "evaluated=sampled")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["agent"] for row in rows} == {"grpo", "upo"}
    assert "reward.alpha" not in rows[0]  # the same everywhere
    for row in rows:
        runs = [path.parent for path in tmp_path.rglob("results.json") if row["agent"] in overrides_of(path.parent)]
        values = [policy_row(folder, "policy(sampled)")["accuracy"] for folder in runs]
        assert row["seeds"] == "2" and float(row["mean_episodes"]) == 8 and float(row["mean_minutes"]) > 0
        assert float(row["mean_accuracy"]) == pytest.approx(sum(values) / 2)
    call("compare", tmp_path / "compare", f"runs=[{tmp_path}]", f"table={tmp_path / 'table.md'}")
    assert (tmp_path / "table.md").read_text().startswith("| agent | seeds | accuracy |")
    with pytest.raises(ValueError, match="no finished run"):
        call("compare", tmp_path / "compare", f"runs={tmp_path / 'nothing'}")


def overrides_of(folder: Path) -> str:
    return (folder / ".hydra" / "overrides.yaml").read_text()


def policy_row(folder: Path, name: str) -> dict:
    return next(row for row in json.loads((folder / "results.json").read_text()) if row["name"] == name)


def test_a_warm_start_begins_with_the_policy_of_another_run(trained, tmp_path):
    call("train", tmp_path / "warm", *SMALL, f"agent.warm_start={trained}", "agent.algorithm.optimizer.lr=0")
    assert weights(tmp_path / "warm" / "checkpoints" / "2") == weights(trained / "checkpoints" / "2")
    with pytest.raises(ValueError, match="agent.warm_start"):
        call("train", tmp_path / "other", *SMALL, f"agent.warm_start={trained}", "policy=mlp")


def test_hidden_states_reach_a_policy_that_reads_them(tmp_path):
    call("train", tmp_path, *SMALL, "policy=dit_hidden", "agent=ppo", "rounds=1")
    call("evaluate", tmp_path / "again", f"checkpoint={tmp_path}", "evaluation.examples=4", "heuristics=none")
    assert (tmp_path / "again" / "results.json").exists()


def test_a_policy_that_reads_tokens_goes_on_and_knows_its_vocabulary(tmp_path):
    call("train", tmp_path / "run", *SMALL, "policy.vocab_size=null", "policy.bound=1", "policy.blocks=2", "rounds=1")
    call(
        "train", tmp_path / "run", *SMALL, "policy.vocab_size=null", "policy.bound=1", "policy.blocks=2", "resume=auto"
    )
    assert policy_row(tmp_path / "run", "policy(greedy)")["examples"] > 0
    with pytest.raises(ValueError, match="vocab_size=7"):
        call("train", tmp_path / "other", *SMALL, "policy.vocab_size=7")


def test_pretraining_writes_a_checkpoint_that_loads(tmp_path):
    stages = "stages=[{steps:2,cooldown:0},{steps:1,cooldown:1}]"
    small = [stages, "evaluate_every=2", "evaluate_examples=2", "threads=1"]
    run("pretrain_tiny.py", *small, "architecture.n_layers=1", f"hydra.run.dir={tmp_path}")
    from dllm_gym.models import load_dllm

    assert load_dllm(tmp_path / "tiny").vocab_size == 20
    assert (tmp_path / "learning_curve.csv").read_text().startswith("step,loss/sudoku")


def test_a_run_is_decoded_with_as_it_was_trained(trained):
    from dllm_gym import Decoder
    from dllm_gym.deciders import Policy

    policy = Policy.load(trained)
    facts = policy.manner.as_dict()
    assert facts["task"] == "sudoku" and facts["family"] == "llada" and facts["model"]["model"] == "tiny"
    assert facts["env"]["gen_length"] == facts["env"]["block_length"] == 20
    assert facts["recipe"].startswith("python scripts/train.py agent=grpo") and facts["recipe"].endswith("seed=1")
    chosen = next(row["name"] for row in json.loads((trained / "results.json").read_text()) if row["chosen"])
    assert policy.manner.greedy == (chosen == "policy(greedy)") and policy.evidence.picture[:4] == b"\x89PNG"
    assert Policy.load(f"{trained}@1").evidence is None
    task = compose_config("train", "task=sudoku").task
    prompts = [hydra.utils.instantiate(task).prompt({"puzzle": "." * 16})]
    texts = [Decoder(policy=name)(prompts)[0].text for name in (str(trained), f"{trained}@2", policy)]
    assert len(texts[0].split()) == 4 and texts[0] == texts[1] == texts[2]
