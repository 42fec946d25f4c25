"""Run folders: what a stranger's may say, what a damaged one leaves, who may write into one, what a stop saves."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_scripts import ROOT, SMALL, call, listen_to_interrupts, weights, without_seconds

from agents.runs.strangers import Allowed, Refused, read_config
from agents.training import read_rounds
from dllm_gym.deciders.networks import MLPPolicy
from dllm_gym.runs.checkpoints import Checkpoints, find_checkpoint
from dllm_gym.runs.files import atomically, noted, read

THREE = [*SMALL, "rounds=3", "checkpoint_every=1", "checkpoints.validation=4"]
EVALUATE = ["evaluation.examples=4", "evaluation.seeds=[1]", "heuristics=none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    call("train", folder, *THREE)
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A stranger's run folder is data

MARK = "evil_package_was_here"


def target(name, **settings):
    return {"_target_": name, **settings}


PAYLOADS = {
    "task": [
        target("numpy.testing.runstring", astr="1", dict={}),
        target("sympy.sympify", a="1"),
        target("os.system", command="true"),
        target("builtins.eval", _args_=["1"]),
        target("evil_package.run"),
        target(" evil_package.run"),
        target(["evil_package.run"]),
        target(None),
        target("hydra.utils.instantiate", config=target("evil_package.run")),
        target("agents.training.shutil.rmtree", path="x"),
        target("agents.evaluation.save_report", rows=[], folder="x", title="x"),
        target("dllm_gym.tasks.dataset.json.loads", s="[]"),
        target("dllm_gym.models.load_dllm", model="tiny"),
        target("torchrl.record.CSVLogger", exp_name="x", log_dir="x"),
        target("dllm_gym.tasks.Mixture", tasks=[target("evil_package.run")]),
        target("dllm_gym.tasks.Arithmetic", _args_=[1]),
        target("dllm_gym.tasks.code.HumanEval", sandbox="rlimit"),
        target("dllm_gym.tasks.reasoning.ReasoningGym", options={"symbols": ["sympify.__globals__['x']('y')"]}),
        target("dllm_gym.tasks.Mixture", tasks=[{"options": {"a": {"b.c": 1}}, **target("dllm_gym.tasks.Arithmetic")}]),
        target("dllm_gym.tasks.code.HumanEval", sandbox=target("dllm_gym.tasks.sandbox.RlimitSandbox")),
    ],
    "policy": [
        target("evil_package.Policy"),
        target("dllm_gym.deciders.networks.DiTConfidence.from_pretrained", source="x"),
    ],
    "model": [target("evil_package.run")],
    "distribution": [
        {"train": target("hydra.utils.get_method", path="evil_package.run")},
        {"train": target("hydra.utils.get_object", path="evil_package.run")},
        {"train": target("hydra.utils.get_class", path="evil_package.Policy")},
        {"train": target("hydra.utils.get_class", _args_=["evil_package.Policy"])},
        {"train": target("hydra.utils.get_class", path="dllm_gym.deciders.networks.DiTConfidence")},
    ],
    "agent": [
        {"algorithm": {"optimizer": target("torch.optim.adam.os.system", command="true")}},
        {"algorithm": {"optimizer": target("torch.optim.lr_scheduler.types.FunctionType")}},
        {"algorithm": {"optimizer": target("functools.partial", _args_=["x"])}},
        {"algorithm": {"scheduler": target("setuptools._distutils.spawn.spawn", cmd=["true"])}},
        {"algorithm": {"scheduler": target("torch.hub.load", repo_or_dir="x", model="x")}},
        {"algorithm": {"scheduler": target("transformers.pipeline", task="x")}},
    ],
    "logger": [
        target("torch.load", f="x", weights_only=False),
        target("pandas.read_pickle", filepath_or_buffer="x"),
        target("torchrl.record.TensorboardLogger", exp_name="../../x", log_dir="x"),
        target("torchrl.record.WandbLogger", exp_name="x", base_url="x"),
        target("torchrl.record.MLFlowLogger", exp_name="x", tracking_uri="https://elsewhere.example"),
        target("torchrl.record.MLFlowLogger", exp_name="x", tracking_uri="sqlite:///x", artifact_location="s3://x/y"),
        target("torchrl.record.loggers.trackio.TrackioLogger", exp_name="x", project="x", space_id="y/z"),
    ],
    "heuristics": [[target("dllm_gym.deciders.rules.Threshold", threshold=target("evil_package.run"))]],
    "evaluation": [{"deep": {"down": [[target("evil_package.run")]]}}],
    "_target_": ["evil_package.run"],
}
CASES = [(group, payload) for group, payloads in PAYLOADS.items() for payload in payloads]


@pytest.fixture
def evil_package(tmp_path, monkeypatch) -> Path:
    """A package that leaves a mark when it is imported."""
    mark = tmp_path / MARK
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "evil_package.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(**_): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    yield mark
    assert "evil_package" not in sys.modules and not mark.exists()


def saying(trained: Path, group: str, payload) -> str:
    """The run's configuration with a payload in it."""
    return yaml.safe_dump({**yaml.safe_load((trained / "config.yaml").read_text()), group: payload})


@pytest.mark.parametrize(("group", "payload"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_a_configuration_may_not_name_is_refused_by_name(group, payload, trained, tmp_path, evil_package):
    path = tmp_path / "config.yaml"
    path.write_text(saying(trained, group, payload))
    with pytest.raises(Refused) as caught:
        Allowed().check(read_config(path), path)
    assert (group in str(caught.value) or group == "_target_") and "\n" not in str(caught.value)


@pytest.mark.parametrize("payload", [target("evil_package.run"), "${oc.env:SECRET_OF_MINE}"], ids=["target", "env"])
def test_every_command_refuses_it(payload, copy, tmp_path, monkeypatch, evil_package, capsys):
    monkeypatch.setenv("SECRET_OF_MINE", "sesame")
    (copy / "config.yaml").write_text(saying(copy, "task", payload))
    commands = [
        ("evaluate", tmp_path / "new", f"checkpoint={copy}"),
        ("watch", tmp_path / "new", f"checkpoint={copy}"),
        ("train", tmp_path / "new", *SMALL, f"agent.warm_start={copy}"),
        ("train", tmp_path / "new", f"resume={copy}"),
        ("train", copy, f"resume={copy}"),
        ("train", copy, "resume=auto"),
        ("compare", tmp_path / "new", f"runs={copy}"),
    ]
    before = content(copy)
    for command in commands:
        with pytest.raises(ValueError, match="evil_package.run|oc.env:SECRET_OF_MINE") as caught:
            call(*command)
        assert "sesame" not in str(caught.value) + "".join(capsys.readouterr())
        assert content(copy) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "x" * 2**19, "more than"),
        ("a: " + "[" * 1000 + "]" * 1000, "deeper"),
        ("a: &a [x]\nb: [*a, *a]\n", "alias"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: '" + "${" * 1000 + "'", "resolved"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!set {x, y}\n", "set"),
        ("a: b: c", "mapping values"),
        ("", "no names"),
        ("[1, 2]", "no names"),
        ("1: 2", "no names"),
        ("\0", "characters"),
        ("a: !!bool foo", "KeyError"),
        ("a: !!int ''", "IndexError"),
        ("a: !!timestamp foo", "no configuration"),
        ("a: " + ":".join(["1"] * 400) + ":59.5", "no configuration"),
        ('a: "\\e]0;title\\a"', "control character"),
    ],
)
def test_what_is_no_configuration_is_refused(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_what_is_no_configuration_is_not_quoted(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("token: 'sesame' sesame")
    with pytest.raises(ValueError) as caught:
        read_config(path)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints", ".hydra", ".lock", "run.log", "checkpoints/9"])
def test_a_run_folder_with_links_is_neither_read_through_nor_written_through(name, copy, tmp_path):
    path = copy / name
    if path.is_dir():
        shutil.copytree(path, tmp_path / "elsewhere")
        shutil.rmtree(path)
    else:
        (tmp_path / "elsewhere").write_text(path.read_text() if path.exists() else "")
        path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is (a link|no file)"):
        call("train", copy, "resume=auto", "rounds=9")
    assert content(tmp_path) == before


def test_a_configuration_reads_as_it_was_saved(trained, tmp_path):
    from omegaconf import OmegaConf

    saved = read_config(trained / "config.yaml")
    assert saved == OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    values = {"lr": 1e-5, "date": "2026-01-01", "text": "1e-5", "none": None, "yes": True, "n": 3}
    OmegaConf.save(OmegaConf.create(values), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == values
    (tmp_path / "config.yaml").write_text("lr: 1e-5\n")
    assert read_config(tmp_path / "config.yaml") == {"lr": 1e-5}


def test_every_choice_of_every_group_may_be_named(tmp_path):
    from omegaconf import OmegaConf
    from test_scripts import compose_config

    for group in ("task", "policy", "distribution", "agent", "expert", "reference", "heuristics", "logger"):
        agents = {"expert": ["agent=imitation"], "reference": ["agent=upo"]}.get(group, [])
        for choice in sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")):
            part = OmegaConf.to_container(compose_config("train", *agents, f"{group}={choice}")[group], resolve=False)
            Allowed().check({group: part}, tmp_path)


def test_a_package_of_ones_own_is_trusted_by_name(tmp_path):
    named = {"task": target("my_package.tasks.Capitals", _args_=["x"])}
    with pytest.raises(Refused, match="my_package"):
        Allowed(["other"]).check(named, tmp_path)
    Allowed(["my_package"]).check(named, tmp_path)
    Allowed(own={"task": target("my_package.tasks.Capitals")}).check(named, tmp_path)
    with pytest.raises(Refused, match="eval"):  # what is trusted in one place is not in another
        Allowed(["my_package"]).check({"task": target("my_package_too.eval")}, tmp_path)
    with pytest.raises(Refused, match="MLPPolicy"):
        Allowed(own={"policy": target("dllm_gym.deciders.networks.MLPPolicy")}).check(
            {"task": target("dllm_gym.deciders.networks.MLPPolicy")}, tmp_path
        )


def test_a_secret_of_the_environment_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    with pytest.raises(ValueError, match="secret"):
        call("train", tmp_path / "run", *SMALL, "model.model=${oc.env:HF_TOKEN}")
    assert not (tmp_path / "run").exists()


# A run folder tells the truth


def flip(path: Path) -> None:
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2] ^= 4
    path.write_bytes(bits)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """With the same file of the checkpoint before."""
    other = Path(str(path).replace("/checkpoints/3/", "/checkpoints/2/"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


READ = ["manifest.json", "config.yaml", "metrics.csv", "trainer.pt", "policy/config.json", "policy/model.safetensors"]
DAMAGES = [(corrupt, name) for corrupt in (flip, cut, empty, delete) for name in READ]
DAMAGES += [(swap, name) for name in READ if not name.endswith(("config.yaml", "config.json"))]  # equal in both


@pytest.mark.parametrize(("corrupt", "name"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(name, corrupt, copy):
    corrupt(copy / "checkpoints" / "3" / name)
    offered = "@1" if corrupt is swap else "@2"
    for which in ("last", "3"):
        with pytest.raises(ValueError, match="damaged|does not exist") as caught:
            Checkpoints(copy).get(which)
        assert str(copy / "checkpoints" / "3") in str(caught.value) and f"{copy}{offered}" in str(caught.value)
    assert str(next(Checkpoints(copy).whole())) == f"{copy}{offered}"


@pytest.mark.parametrize("corrupt", [flip, cut, empty, delete])
@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_a_damaged_run_is_named_and_its_checkpoints_are_not_lost(name, corrupt, copy, tmp_path):
    corrupt(copy / name)
    with pytest.raises(ValueError, match=name) as caught:
        call("evaluate", tmp_path / "new", f"checkpoint={copy}", *EVALUATE)
    assert f"{copy}@3 has a copy" in str(caught.value)
    call("evaluate", tmp_path / "new", f"checkpoint={copy}@3", *EVALUATE)


@pytest.mark.parametrize("name", ["results.json", "metrics.csv", "config.yaml"])
@pytest.mark.parametrize("corrupt", [flip, cut, empty])
def test_a_table_of_runs_names_what_is_damaged(name, corrupt, copy, tmp_path):
    corrupt(copy / name)
    with pytest.raises(ValueError, match=name):
        call("compare", tmp_path, f"runs={copy}")
    if name == "results.json":
        with pytest.raises(ValueError, match=name):
            call("plot", tmp_path, f"results={copy / name}", f"picture={tmp_path / 'p.png'}")


def test_auto_begins_goes_on_and_uses_the_older_good_checkpoint(trained, copy, tmp_path, capsys):
    call("train", tmp_path / "auto", *THREE, "rounds=1", "resume=auto")
    call("train", tmp_path / "auto", *THREE, "resume=auto")
    assert weights(tmp_path / "auto" / "checkpoints" / "3") == weights(trained / "checkpoints" / "3")
    flip(copy / "checkpoints" / "3" / "policy" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        call("train", copy, f"resume={copy}")
    (copy / "metrics.csv").write_text("nonsense")
    cut(copy / "config.yaml")
    call("train", copy, "resume=auto")
    said = capsys.readouterr().out
    assert f"{copy / 'checkpoints' / '3'} is damaged; going on from {copy}@2" in said and "config.yaml" in said
    assert weights(copy / "checkpoints" / "3") == weights(trained / "checkpoints" / "3")
    assert without_seconds(copy / "metrics.csv") == without_seconds(trained / "metrics.csv")
    assert (copy / "checkpoints" / "3.damaged").is_dir()


def test_checkpoints_are_found_by_number_best_and_last(copy, tmp_path):
    assert [checkpoint.number for checkpoint in Checkpoints(copy).all()] == [1, 2, 3]
    rewards = {c.number: c.check()["validation"] for c in Checkpoints(copy).all()}
    best = Checkpoints(copy).get("best").number
    assert rewards[best] == max(rewards.values())
    for name, number in ((f"{copy}@2", 2), (f"{copy}@last", 3), (copy / "checkpoints" / "1", 1)):
        assert find_checkpoint(str(name)).number == number
    assert find_checkpoint(str(copy)) is None
    with pytest.raises(ValueError, match="@7: there is no such checkpoint, but first, last, best and 1, 2, 3"):
        find_checkpoint(f"{copy}@7")
    with pytest.raises(ValueError, match=f"{copy}@3 is later"):
        call("train", copy, f"resume={copy}@2")
    call("train", tmp_path / "fork", f"resume={copy}@2")
    assert weights(tmp_path / "fork" / "checkpoints" / "3") == weights(copy / "checkpoints" / "3")


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    def write(folder: Path) -> None:
        MLPPolicy().save_pretrained(folder / "policy")
        for name in ("trainer.pt", "config.yaml", "metrics.csv"):
            (folder / name).write_text(name)

    checkpoints = Checkpoints(tmp_path)
    for number, reward in enumerate([0.1, 0.9, 0.3, 0.2, 0.1], 1):
        checkpoints.save(number, write, keep=2, validation=reward)
        assert checkpoints.get("last").number == number
    assert [checkpoint.number for checkpoint in checkpoints.all()] == [2, 4, 5]
    assert checkpoints.get("best").number == 2
    (tmp_path / "checkpoints" / ".6.new").mkdir()  # left by a crash
    checkpoints.save(6, write, keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "6"}
    with pytest.raises(RuntimeError):
        checkpoints.save(7, lambda folder: (_ for _ in ()).throw(RuntimeError()), keep=1)
    assert checkpoints.get().number == 6


def test_a_failing_command_leaves_a_finished_run_as_it_is(copy):
    before = content(copy)
    for failing in (
        [*THREE],  # the folder holds a run
        [*THREE, "agent.group_size=1"],
        [f"resume={copy}", "reward.alpha=1"],
        [f"resume={copy}@9"],
        ["resume=auto", "policy=mlp"],
        [f"resume={copy}", "evaluation.examples=100000"],
        [f"resume={copy}", "checkpoints.keep=0"],
        [f"resume={copy}", "checkpoint_minutes=0"],
    ):
        with pytest.raises(ValueError):
            call("train", copy, *failing)
        assert content(copy) == before
    with pytest.raises(ValueError, match="holds a run already"):
        call("evaluate", copy, *EVALUATE, "heuristics=threshold")
    assert content(copy) == before


def test_two_processes_never_share_a_folder(tmp_path, monkeypatch):
    from run_folder import lock

    with lock(tmp_path / ".lock"):
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\nfrom pathlib import Path\n"
        code += f"from run_folder import lock\nlock(Path({str(tmp_path / '.lock')!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert "another process is running in this folder" in done.stderr
        with pytest.raises(ValueError, match="another process"):
            call("train", tmp_path, *SMALL)
    lock(tmp_path / ".lock").close()


def test_default_folders_differ_within_a_second():
    for name in ("train", "evaluate", "benchmark"):
        settings = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())["hydra"]
        assert all("%f" in settings[kind]["dir"] for kind in ("run", "sweep") if kind in settings)


def test_missing_rounds_are_said(copy, tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    path.write_text("round,reward\n0,0.5\n2,0.5\n3")
    rows, missing = read_rounds(path, 4)
    assert [row["round"] for row in rows] == ["0", "2"] and missing == [1, 3]
    assert read_rounds(tmp_path / "none.csv", 2) == ([], [0, 1])
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoint")  # of an earlier version
    shutil.rmtree(copy / "checkpoints")
    (copy / "manifest.json").unlink()
    with (copy / "metrics.csv").open() as file:
        lines = file.readlines()
    (copy / "metrics.csv").write_text("".join([lines[0], lines[2]]))
    call("train", copy, f"resume={copy}")
    assert "lacks rounds 0:" in capsys.readouterr().out
    with (copy / "metrics.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["1", "2"]


def crash_at(path: Path, replace):
    """``os.replace`` that fails when it comes to ``path``."""
    return lambda source, target: 1 / 0 if Path(target) == path else replace(source, target)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    noted(path, lambda new: new.write_text("one"))
    for write in (atomically, noted):
        with pytest.raises(ZeroDivisionError):
            write(path, lambda new: new.write_text("half") and 1 / 0)
        assert read(path) == "one" and {p.name for p in tmp_path.iterdir()} == {"file.txt", "manifest.json"}
    noted(path, lambda new: new.write_text("two"))
    assert read(path) == "two"
    for other in ("one", "three"):  # what it was is not what it is
        path.write_text(other)
        with pytest.raises(ValueError, match=r"file.txt is damaged"):
            read(path)
    path.write_text("two")
    monkeypatch.setattr("os.replace", crash_at(path, os.replace))
    with pytest.raises(ZeroDivisionError):
        noted(path, lambda new: new.write_text("four"))
    assert read(path) == "two"
    facts = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**facts, "files": {}}))
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        read(path)


# A stop


def started(folder: Path, *settings: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, f"hydra.run.dir={folder}", *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=listen_to_interrupts, **pipes)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240  # a guard against hanging, far beyond what it takes
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_sigterm_saves_the_round_and_ends_with_143(tmp_path):
    folder = tmp_path / "run"
    process = started(folder, "rounds=1000", "checkpoint_every=1000", "checkpoint_minutes=0.0001")
    try:
        wait_for(lambda: (folder / "checkpoints" / "2").is_dir(), process)  # long before its thousand rounds
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err
    last = Checkpoints(folder).get()
    assert f"{last} is saved: go on with resume=auto hydra.run.dir={folder}" in out.replace("\n", "")
    with (folder / "metrics.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == [str(i) for i in range(last.number)]
    assert not (folder / "results.json").exists() and not (folder / ".lock").exists()


def test_a_stop_in_the_evaluation_keeps_the_training(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    call("train", folder, *SMALL, "rounds=1")
    before = weights(folder / "checkpoints" / "1")

    def stop(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("training_run.report", stop)
    with pytest.raises(SystemExit) as caught:
        call("train", folder, "resume=auto")
    assert caught.value.code == 143
    assert f"interrupted; {folder}@1 is saved: go on with resume=auto" in capsys.readouterr().out
    assert weights(folder / "checkpoints" / "1") == before
