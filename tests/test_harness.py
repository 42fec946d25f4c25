"""lm-evaluation-harness: the dLLM as one of its models gives the texts of the decoder and the number of the lab."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.rollout import evaluate
from dllm_gym import Decoder
from dllm_gym.deciders import Joint
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.tasks import make_task

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dllm_gym.harness import HarnessDLLM, cut, is_greedy, log_likelihood, masks  # noqa: E402

ROOT = Path(__file__).parents[1]
COUNT, LENGTH = 40, 48
TASK = """
task: {name}
custom_dataset: !function {name}_data.rows
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
"""
GRADED = """
process_results: !function {name}_data.grade
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CHOICES = """
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
"""
DATA = """
import datasets

from dllm_gym.tasks import make_task

TASK = make_task("arithmetic")


def rows(**settings):
    examples = TASK.examples("test").to_list()[:40]
    return {"test": datasets.Dataset.from_list([
        example | {"prompt": TASK.prompt(example), "choices": choices(TASK.solution(example)), "label": 1}
        for example in examples
    ])}


def choices(solution):
    wrong = "".join(str(9 - int(letter)) if letter.isdigit() else letter for letter in solution)
    return [wrong, solution]


def grade(example, texts):
    return {"acc": TASK.grade(example, texts[0])}
"""


@pytest.fixture
def local_tasks(tmp_path):
    """Two tasks of the harness on the questions of ours, in files of their own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, target, more in (
        ("sums", "generate_until", '""', GRADED.format(name="sums")),
        ("which", "multiple_choice", "label", CHOICES),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, target=target, more=more))
        (folder / f"{name}_data.py").write_text(DATA)
    return folder


def harness(tasks, model, which, **settings):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=[which], task_manager=manager, bootstrap_iters=0, **settings)
    return found["results"][which]["acc,none"]


def generate(lm, *requests):
    return lm.generate_until([Instance("generate_until", {}, request, 0) for request in requests])


def likelihood(lm, *requests):
    return lm.loglikelihood([Instance("loglikelihood", {}, request, 0) for request in requests])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_number_is_the_labs_on_the_same_questions(temperature, local_tasks):
    settings = {"gen_length": LENGTH, "temperature": temperature}
    env = DLLMUnmaskVectorEnv(16, model="tiny_shallow", task="arithmetic", split="test", **settings)
    lab = evaluate(env, Joint(0.2), range(COUNT), seed=3)
    lm = HarnessDLLM("tiny_shallow", "joint(0.2)", batch_size=7, seed=3, **settings)
    assert harness(local_tasks, lm, "sums") == pytest.approx(float(lab.score.mean()))
    assert [result.text for result in lm.decoded] == lab.completions
    assert [result.nfe for result in lm.decoded] == lab.nfe.tolist()
    assert 0.2 < float(lab.score.mean()) < 1


def test_answers_are_told_from_wrong_ones_by_their_likelihood(local_tasks):
    assert harness(local_tasks, HarnessDLLM("tiny", mc_num=8, check_greedy=False), "which") > 0.9


def test_the_command_line_knows_the_model(local_tasks, tmp_path):
    arguments = ["--model", "dllm_gym", "--model_args", f"model=tiny,policy=threshold(0.9),gen_length={LENGTH}"]
    arguments += ["--tasks", "sums", "--include_path", str(local_tasks), "--limit", "8", "--batch_size", "8"]
    command = [sys.executable, "-m", "dllm_gym.harness", *arguments, "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    task = make_task("arithmetic")
    examples = task.examples("test").to_list()[:8]
    texts = Decoder("tiny", "threshold(0.9)", gen_length=LENGTH)([task.prompt(example) for example in examples])
    scores = [task.grade(example, result.text) for example, result in zip(examples, texts, strict=True)]
    assert json.loads(written.read_text())["results"]["sums"]["acc,none"] == pytest.approx(np.mean(scores))
    assert "forwards per answer" in done.stderr + done.stdout


def test_a_text_is_cut_where_the_task_says():
    lm = HarnessDLLM("tiny", "joint(0.4)", gen_length=20)
    (whole,) = generate(lm, ("2..4\n.4..\n....\n....\n", {}))
    assert whole.count("\n") == 3
    stops = [["\n"], "\n", ["9", "\n"], ["9"], [], None, [""]]
    cuts = generate(lm, *(("2..4\n.4..\n....\n....\n", {"until": until}) for until in stops))
    assert cuts == [whole[:4]] * 3 + [whole] * 4
    assert cut("abcab", ["ca", "b"]) == "a"


def exact(dllm, context, target):
    """The bound, summed over all sets of masked tokens: the mean over their numbers m of (n / m) sum log p."""
    n, total = len(target), 0.0
    for m in range(1, n + 1):
        for at in itertools.combinations(range(n), m):
            row = torch.tensor([[*context, *target]])
            where = torch.tensor(at) + len(context)
            row[0, where] = dllm.mask_id
            log_prob = dllm.lm_head(dllm.encode_rows(row, None))[0, where].log_softmax(-1)
            total += float(log_prob.gather(1, torch.tensor([target])[0, list(at)][:, None]).sum()) / m / math.comb(n, m)
    return total


def test_the_likelihood_is_lladas_bound(tiny):
    context = tiny.encode("2..4\n.4..\n....\n....\n")
    for text in ("2", "23", "231", "9."):
        target = tiny.spelling.plain(text)
        drawn = [log_likelihood(tiny, context, target, np.random.default_rng(i), 240, 64) for i in range(6)]
        assert np.mean(drawn) == pytest.approx(exact(tiny, context, target), rel=0.03), text
        one, other = (log_likelihood(tiny, context, target, np.random.default_rng(1), 60, b) for b in (1, 64))
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("length", "samples"), [(1, 4), (5, 20), (7, 21), (6, 4)])
def test_every_number_of_masks_is_as_likely(length, samples):
    counts = np.stack([masks(length, samples, np.random.default_rng(i)).sum(1) for i in range(400)])
    assert counts.min() == 1 and counts.max() == length
    assert np.bincount(counts.ravel())[1:] / counts.size == pytest.approx(1 / length, abs=0.05)
    if samples % length == 0:
        assert (np.sort(counts, 1) == np.repeat(np.arange(1, length + 1), samples // length)).all()


def test_greedy_is_what_most_confident_first_writes(tiny):
    prompt = "1+2=".ljust(16)
    text = Decoder("tiny", "top_k(1)", gen_length=6)([prompt])[0]
    context, target = tiny.encode(prompt), text.tokens.tolist()
    assert is_greedy(tiny, context, target)
    for i in range(len(target)):
        assert (
            not is_greedy(tiny, context, [*target[:i], target[i - 1], *target[i + 1 :]]) or target[i] == target[i - 1]
        )
    lm = HarnessDLLM("tiny", mc_num=2, check_greedy=False)
    assert likelihood(lm, (prompt, text.text))[0][1] is False


def test_blanks_between_belong_to_the_continuation():
    lm = HarnessDLLM("tiny", mc_num=16)
    (one, _), (two, _), (empty, _), (nothing, _) = likelihood(
        lm, ("1+2 ", "=3"), ("1+2", " =3"), ("", "1+2"), ("1+2", "")
    )
    assert one == two and empty < 0 and nothing == 0
    rolling = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("1+2",), 0)])
    assert rolling == [empty]


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="policy='nobody'"):
        HarnessDLLM("tiny", "nobody")
    with pytest.raises(ValueError, match="mc_num=0"):
        HarnessDLLM("tiny", mc_num=0)
    with pytest.raises(ValueError, match="batch_size='many'"):
        HarnessDLLM("tiny", batch_size="many")
    assert [HarnessDLLM("tiny", batch_size=size).decoder.batch_size for size in ("8", 8, "auto:4")] == [8, 8, 64]
    with pytest.raises(TypeError, match="'steps'"):
        HarnessDLLM("tiny", steps=3)
    lm = HarnessDLLM("tiny")
    with pytest.raises(ValueError, match="tokens: more than"):
        likelihood(lm, ("1" * lm.dllm.max_positions, "2"))
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "1+2"}])


TEMPLATE = "{% for message in messages %}{{ message['content'] }}={% endfor %}"


def test_a_conversation_goes_through_the_dllms_template_and_a_bare_text_does_not(checkpoint):
    settings = {"gen_length": 8, "policy": "top_k(1)"}
    (plain,) = generate(HarnessDLLM(str(checkpoint), **settings), ("1+2==3", {}))
    lm = HarnessDLLM(str(checkpoint), **settings)
    lm.dllm.tokenizer.chat_template = TEMPLATE
    assert generate(lm, ("1+2==3", {})) == [plain]
    turns = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    written = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert written == "1+2==3" and lm.chat_template(True) == TEMPLATE and not lm.chat_template(False)
    assert generate(lm, (written, {})) == [plain] and lm.dllm.tokenizer.chat_template == TEMPLATE
    bare = HarnessDLLM(str(checkpoint), **settings)
    assert likelihood(lm, (written, "4")) == likelihood(bare, (written, "4"))
    with pytest.raises(ValueError, match="was not written by this model"):
        generate(lm, ("another", {}))
