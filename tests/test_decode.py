"""The decoder is the environment: the same tokens in as many forwards, for every rule and policy, in any company."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_rules import RULES
from toys import Sums

from agents.rollout import evaluate
from dllm_gym import Decoder
from dllm_gym.deciders import DiTConfidence, Manner, MLPPolicy, Policy, PolicyDecider, Threshold, saved
from dllm_gym.deciders.distributions import ZeroTruncatedBernoulli
from dllm_gym.deciders.player import make_decider
from dllm_gym.envs.vector import DLLMUnmaskVectorEnv
from dllm_gym.models import load_dllm
from dllm_gym.prompt import Chat, Prompt
from dllm_gym.tasks import make_task
from dllm_gym.tasks.blanks import pieces

LENGTH = 48


def manner(**changes) -> Manner:
    env = {"gen_length": LENGTH, "block_length": LENGTH}
    facts = {"model": {"model": "tiny"}, "family": "llada", "vocab_size": load_dllm("tiny").vocab_size, "env": env}
    return Manner(**{"distribution": "ZeroTruncatedBernoulli", "task": "arithmetic", **facts, **changes})


def network(preference: bool = False, **changes) -> DiTConfidence:
    torch.manual_seed(3)
    policy = DiTConfidence(width=16, ffn=32, heads=2, preference=preference)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    policy.manner = manner(**changes)
    return policy


def played(task, decider, count, *, seed=0, alpha=None, span=1.0, **settings):
    """Texts and NFE of the environment."""
    needs = getattr(decider, "requires", {})
    env = DLLMUnmaskVectorEnv(16, task=task, split="test", **{"gen_length": LENGTH, **needs, **settings}, alpha=span)
    results = evaluate(env, decider, range(count), seed, alpha)
    return results.completions, results.nfe.tolist()


def decoded(results):
    return [result.text for result in results], [result.nfe for result in results]


def prompts_of(task, count):
    return [task.prompt(example) for example in task.examples("test").to_list()[:count]]


FITTING = {name: rule for name, rule in RULES.items() if not name.startswith("fixed")}


@pytest.mark.parametrize("name", FITTING)
def test_every_rule_decodes_what_the_environment_does(name, mixed_task):
    settings = {"block_length": 16, "stop_at_eos": True}
    decoder = Decoder("tiny", policy=name, gen_length=LENGTH, batch_size=5, **settings)
    assert str(decoder.decider) == name
    assert decoded(decoder(prompts_of(mixed_task, 12))) == played(mixed_task, FITTING[name], 12, **settings)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_policy_decodes_what_the_environment_does_in_any_batch(greedy, mixed_task):
    policy = network(greedy=greedy, temperature=0.7)
    prompts, settings = prompts_of(mixed_task, 20), {"temperature": 0.5}
    expected = played(mixed_task, PolicyDecider(policy, ZeroTruncatedBernoulli, 0.7, greedy), 20, seed=4, **settings)
    for batch_size in (1, 3, 64):
        decoder = Decoder(policy=policy, batch_size=batch_size, seed=4, **settings)
        assert decoded(decoder(prompts)) == expected


def test_a_policy_with_a_preference_is_played_at_the_alpha_that_is_asked_for(mixed_task):
    policy, prompts = network(True, alpha=[0.3, 10.0]), prompts_of(mixed_task, 8)
    for alpha, said in ((0.3, 0.3), (10, 10.0), (None, 3**0.5)):
        decider = PolicyDecider(policy, ZeroTruncatedBernoulli, greedy=True)
        expected = played(mixed_task, decider, 8, alpha=said, span=[0.3, 10.0])
        assert decoded(Decoder(policy=policy, alpha=alpha)(prompts)) == expected


def test_a_thousand_prompts_of_mixed_length_are_decoded_in_refilled_lanes(mixed_task):
    prompts = [prompt for prompt in prompts_of(mixed_task, 200) for _ in range(5)]
    decoder = Decoder("tiny", "joint(0.2)", gen_length=LENGTH, block_length=LENGTH, batch_size=100, stop_at_eos=True)
    ended = list(decoder.as_they_end(prompts))
    assert sorted(result.index for result in ended) == list(range(1000)) != [result.index for result in ended]
    results = decoder(prompts)
    assert decoded(results[::5]) == decoded(results[4::5])  # equal prompts, whatever they are decoded beside
    assert decoded(results[:10:5]) == decoded(decoder(prompts[:1] + prompts[5:6]))


def test_results_say_how_they_came_about(tiny, mixed_task):
    decoder = Decoder("tiny", "threshold(0.7)", gen_length=LENGTH)
    for result in decoder(prompts_of(mixed_task, 10)):
        positions = [position for step in result.order for position in step]
        assert sorted(positions) == list(range(LENGTH)) and len(result.order) == result.nfe
        assert result.tokens_per_forward == LENGTH / result.nfe and result.seconds > 0
        assert tiny.decode(result.tokens.tolist()) == result.text


def test_a_stream_gives_the_commits_of_every_step(tiny, mixed_task):
    prompt = max(prompts_of(mixed_task, 50), key=len)
    decoder = Decoder("tiny", "top_k(5)", gen_length=LENGTH)
    steps, result = list(decoder.stream(prompt)), decoder([prompt])[0]
    assert [step.positions for step in steps] == result.order
    assert [step.step for step in steps] == list(range(1, result.nfe + 1))
    assert all(result.tokens[step.positions].tolist() == step.tokens for step in steps)
    assert all(0 < sure <= 1 for step in steps for sure in step.confidence)
    assert steps[-1].text == result.text and "░" in steps[0].text


def test_the_text_ends_sooner_where_it_stops_at_its_end(mixed_task):
    prompts = prompts_of(mixed_task, 20)
    whole = Decoder("tiny", "left_to_right(1)", gen_length=LENGTH)(prompts)
    short = Decoder("tiny", "left_to_right(1)", gen_length=LENGTH, stop_at_eos=True)(prompts)
    assert [r.text for r in short] == [r.text for r in whole]
    assert sum(r.nfe for r in short) < sum(r.nfe for r in whole) == 20 * LENGTH


def test_given_pieces_stay_and_blanks_are_filled():
    task = Sums(sizes={"train": 10, "validation": 10, "test": 10})
    examples = task.examples("test").to_list()
    given = [Prompt("", task.template(example)) for example in examples]
    decoder = Decoder("tiny", "threshold(0.9)", gen_length=task.gen_length)
    results = decoder([*given, Prompt("1+2=".ljust(16))])
    for result, example in zip(results, examples, strict=False):
        assert sorted(p for step in result.order for p in step) == example["blanks"]
    assert decoded(results[:10]) == played(task, Threshold(0.9), 10, gen_length=task.gen_length)
    assert results[10].text == "3" and sum(map(len, results[10].order)) == task.gen_length
    assert decoder([Prompt("", pieces("3+.=5"))])[0].text[:2] == "3+"
    for wrong in ("3+.", [], ["3"], [0], [30]):
        with pytest.raises(ValueError, match=r"prompts\[1\]: template"):
            decoder(["1+2=", Prompt("", wrong)])


def test_conversations_are_prompts(tiny):
    turns = [{"role": "user", "content": "1+2="}, ("assistant", "3")]
    assert Prompt.of(turns) == Prompt(Chat((("user", "1+2="),), prefill="3"))
    decoder = Decoder("tiny", gen_length=8)
    assert decoder([[("user", "1+2=".ljust(16))]])[0].text == decoder([Chat((("user", "1+2=".ljust(16)),))])[0].text
    for wrong in ([], [("assistant", "3")], [("robot", "3")], [{"role": "user"}], 7, [7], ["12"]):
        with pytest.raises(ValueError, match=r"prompts\[0\]: "):
            decoder([wrong])
    for wrong in ("1+2=", Prompt("1+2="), 3, None):
        with pytest.raises(ValueError, match="need a list of prompts"):
            decoder(wrong)
    assert decoder([]) == []
    with pytest.raises(ValueError, match=r"prompts\[1\].*no tokens"):
        decoder(["1+2=", "what?"])


# ---- what a policy says about itself ----


def test_a_saved_policy_says_how_it_is_played(tmp_path, mixed_task):
    policy = network(greedy=False, temperature=0.7)
    policy.save_pretrained(tmp_path / "mine")
    loaded = Policy.load(tmp_path / "mine")
    assert type(loaded) is DiTConfidence and loaded.manner == policy.manner and not loaded.training
    assert Policy.load(policy) is policy
    decoder = Decoder(policy=str(tmp_path / "mine"))
    assert decoder.env == {"gen_length": LENGTH, "block_length": LENGTH}
    assert (decoder.decider.greedy, decoder.decider.temperature) == (False, 0.7)
    prompts = prompts_of(mixed_task, 8)
    assert decoded(decoder(prompts)) == decoded(Decoder(policy=policy)(prompts))
    other = Decoder(policy=policy, greedy=True, policy_temperature=2.0, distribution="DynamicPlackettLuce")
    assert other.decider.distribution_class.__name__ == "DynamicPlackettLuce" and other.decider.greedy


def test_a_shipped_policy_is_found_by_name(tmp_path, monkeypatch, mixed_task):
    monkeypatch.setattr(saved, "SHIPPED", tmp_path)
    network().save_pretrained(tmp_path / "sums-quickly")
    assert saved.shipped() == ["sums-quickly"]
    decoder = Decoder(policy="sums-quickly")
    assert decoded(decoder(prompts_of(mixed_task, 4))) == decoded(Decoder(policy=network())(prompts_of(mixed_task, 4)))
    with pytest.raises(ValueError, match="policy='sums-slowly': .*no saved policy.* sums-quickly"):
        Decoder(policy="sums-slowly")


def test_what_a_policy_was_not_trained_with_is_said_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        Decoder(policy=network(), gen_length=LENGTH)
        Decoder(policy="equations-all-speeds", stop_at_eos=True)  # the same text, sooner
        assert not caplog.messages
        Decoder("tiny_shallow", policy=network(family="dream"), gen_length=24, block_length=12)
    (line,) = caplog.messages
    assert "family=dream (here llada)" in line and "gen_length=48 (here 24)" in line
    assert "block_length=48 (here 12)" in line and "\n" not in line


def test_a_policy_that_cannot_read_the_dllm_is_refused():
    reads = DiTConfidence(width=16, ffn=32, heads=2, vocab_size=7)
    reads.manner = manner()
    with pytest.raises(ValueError, match="vocab_size=7"):
        Decoder("tiny", policy=reads)


def test_what_a_policy_says_of_its_dllm_and_environment_is_checked():
    with pytest.raises(ValueError, match="the policy's dLLM.*'speed'"):
        Decoder(policy=network(model={"model": "tiny", "speed": 3}))
    with pytest.raises(ValueError, match="block_length='many'"):
        Decoder(policy=network(env={"gen_length": 20, "block_length": "many"}))


def test_every_setting_of_the_environment_is_one_of_the_decoder_and_of_a_policy():
    published = {"gen_length": 16, "block_length": 8, "steps_per_block": 2, "committed_confidence": True}
    decoder = Decoder(policy=network(env=published))
    assert decoder.env == published and decoder.dllm is Decoder("tiny", "top_k(1)", **published).dllm
    result = Decoder("tiny", "top_k(1)", **published)(["1+2="])[0]
    assert result.nfe == 4 and sum(map(len, result.order)) == 4  # two steps in each of two blocks
    with pytest.raises(TypeError, match="'speed'"):
        Decoder("tiny", gen_length=16, speed=3)


def test_full_diffusion_stays_full_diffusion_at_another_length():
    decoder = Decoder(policy=network(), gen_length=20)
    assert decoder(["1+2=".ljust(16)])[0].tokens.shape == (20,) and "block_length" not in decoder.env


WRONG = [
    ({"policy": "threshold(2)"}, r"threshold\(2\).*threshold=2"),
    ({"policy": "threshold(0.9, 3)"}, "names no rule"),
    ({"policy": "thresh(0.9)"}, r"choose one of .*threshold"),
    ({"policy": "threshold(*[1])"}, "names no rule"),
    ({"policy": "threshold(open('x'))"}, "names no rule"),
    ({"policy": "nowhere"}, "policy='nowhere'"),
    ({"policy": 7}, "policy=7"),
    ({"greedy": True}, "greedy is read by nothing"),
    ({"alpha": 2.0}, "alpha is read by nothing"),
    ({"policy_temperature": 2.0}, "temperature is read by nothing"),
    ({"gen_length": None}, "gen_length=None"),
    ({"gen_length": 0}, "gen_length=0"),
    ({"block_length": 7}, "block_length=7"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"seed": -1}, "seed=-1"),
    ({"cache": "some"}, "cache='some'"),
    ({"model": "nothing"}, "model='nothing'"),
    ({"device": "nothing"}, "device='nothing'"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=str)
def test_a_wrong_setting_is_named(settings, said):
    with pytest.raises(ValueError, match=said) as raised:
        Decoder(**{"gen_length": LENGTH, **settings})
    assert "\n" not in str(raised.value)


def test_a_policys_own_settings_are_checked():
    with pytest.raises(ValueError, match="alpha=2.*reads no preference"):
        Decoder(policy=network(), alpha=2)
    with pytest.raises(ValueError, match="alpha=20"):
        Decoder(policy=network(True, alpha=[0.3, 10.0]), alpha=20)
    with pytest.raises(ValueError, match="distribution='Cauchy'.*ZeroTruncatedBernoulli"):
        Decoder(policy=network(), distribution="Cauchy")
    with pytest.raises(ValueError, match="without its range of alphas"):
        Decoder(policy=network(True))


def changed(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def cut(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def of_before(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["manner"]
    (folder / "config.json").write_text(json.dumps(config))


def reweighted(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({name: change(value) for name, value in weights.items()}, folder / "model.safetensors")

    return spoil


SPOILT = {
    "an earlier layout": (of_before, "/mine': .*how it wants to be played.*distribution="),
    "a size that no file has": (changed(width=10**9), "width=1000000000 does not go with"),
    "blocks that no file has": (changed(blocks=10**9), "blocks=1000000000 does not go with"),
    "another size": (changed(width=8), r"has shape \[.*\], not \[.*\]; .*, and \d+ more$"),
    "weights that are no numbers": (reweighted(lambda value: value * float("nan")), "holds what is not finite"),
    "weights of whole numbers": (reweighted(torch.Tensor.int), "is of dtype int32"),
    "an unknown setting": (changed(layers=2), r"unknown settings \['layers'\]"),
    "an unknown manner": (changed(manner={"distribution": "OnePosition", "haste": 2}), "'haste'"),
    "a wrong manner": (changed(manner={"distribution": "OnePosition", "temperature": 0}), "temperature=0"),
    "an unknown environment": (changed(manner={"distribution": "OnePosition", "env": {"model": "x"}}), "'model'"),
    "no manner at all": (changed(manner=[]), r"manner=\[\]"),
    "an unknown class": (changed(policy="NoSuchPolicy"), "'NoSuchPolicy' is known"),
    "no class": (changed(policy=None), "does not describe a policy"),
    "a config cut short": (cut("config.json"), "cannot read config.json"),
    "weights cut short": (cut("model.safetensors"), "does not hold the weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "an empty folder": (emptied, "no saved policy"),
    "no folder": (shutil.rmtree, "no saved policy"),
    "damaged results": (lambda folder: (folder / "results.json").write_text("[{}]"), "results.json"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_policy_is_refused_in_one_line(spoil, tmp_path):
    folder = tmp_path / "mine"
    network().save_pretrained(folder)
    change, said = SPOILT[spoil]
    change(folder)
    with pytest.raises(ValueError, match=said) as raised:
        Decoder(policy=str(folder))
    assert "\n" not in str(raised.value)


def test_a_policy_of_before_plays_once_it_is_said_how(tmp_path):
    network().save_pretrained(tmp_path)
    of_before(tmp_path)
    assert Policy.load(tmp_path).manner is None
    decider = make_decider(tmp_path, distribution="ZeroTruncatedBernoulli")
    assert decider.greedy and decider.distribution_class is ZeroTruncatedBernoulli


ROWS = [
    {"name": "policy(greedy)", "accuracy": 0.8, "nfe": 2.5, "reward": 0.5, "chosen": False},
    {"name": "policy(sampled)", "accuracy": 0.82, "nfe": 2.5, "reward": 0.51, "chosen": True},
    {"name": "top_k(1)", "accuracy": 1.0, "nfe": 20.0, "reward": 0.0, "chosen": False},
    {"name": "random(4)", "accuracy": 0.1, "nfe": 5.0, "reward": 0.0, "chosen": False},
    {"name": "threshold(0.9)", "accuracy": 1.0, "nfe": 4.7, "reward": 0.4, "chosen": True},
]


def test_the_card_has_the_recipe_the_front_and_three_lines_of_use(tmp_path):
    from dllm_gym.deciders.card import Evidence

    policy = network(recipe="python scripts/train.py task=arithmetic seed=3")
    policy.evidence = Evidence(ROWS, b"picture")
    policy.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "python scripts/train.py task=arithmetic seed=3" in card and "![accuracy against NFE](front.png)" in card
    told = [line.split(" | ")[0].strip("| ") for line in card.partition("## Front")[2].splitlines() if "0 |" in line]
    assert told == ["policy(greedy)", "policy(sampled)", "threshold(0.9)"]
    use = card.partition("```python\n")[2].partition("```")[0].splitlines()
    assert len(use) == 3 and use[0] == "from dllm_gym import Decoder"
    loaded = Policy.load(tmp_path)
    assert loaded.evidence == policy.evidence and loaded.manner == policy.manner
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    MLPPolicy().save_pretrained(tmp_path / "bare")
    assert "Recipe" not in (tmp_path / "bare" / "README.md").read_text()


def test_a_manner_is_itself_again():
    one = manner(alpha=[0.3, 10.0], recipe="python scripts/train.py")
    assert Manner.of(json.loads(json.dumps(one.as_dict()))) == one
    assert make_task(one.task).name == "arithmetic" and replace(one, greedy=False) != one


@pytest.mark.parametrize(("name", "task"), [("equations-all-speeds", "equations"), ("one-way-all-speeds", "one_way")])
def test_the_policies_that_ship_play_their_world_at_all_speeds(name, task):
    world = make_task(task)
    examples = list(world.examples("validation").select(range(64)))
    given = [Prompt("", given=world.template(example)) for example in examples]
    slow, fast = (Decoder(policy=name, alpha=alpha)(given) for alpha in (0.1, 10))
    right = sum(world.grade(e, r.text) for e, r in zip(examples, slow, strict=True)) / 64
    assert right > 0.9 and sum(r.nfe for r in fast) < 64 * 4 and sum(r.nfe for r in fast) < sum(r.nfe for r in slow)
