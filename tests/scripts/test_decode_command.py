"""scripts/decode.py: prompts from everywhere, and what becomes of them."""

from __future__ import annotations

import builtins
import io
import json
import sys

import pytest
from test_scripts import call

from dllm_gym import Decoder
from dllm_gym.deciders import DiTConfidence, Manner, saved
from dllm_gym.prompt import Prompt

GRIDS = ["2..4\n.4..\n....\n....\n", "...1\n....\n..2.\n....\n", "....\n.3..\n....\n1...\n"]
SUM = "4+3-0+0=  "
SET = ["gen_length=20", "decider='joint(0.4)'"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def texts() -> list[str]:
    return [result.text for result in Decoder("tiny", "joint(0.4)", gen_length=20, stop_at_eos=True)(GRIDS)]


def test_a_prompt_of_the_command_line_is_decoded(tmp_path, capsys, texts):
    call("decode", tmp_path, f"prompt='{GRIDS[0]}'", *SET)
    out, err = capsys.readouterr()
    assert out == f"{texts[0]}\n" and err.startswith("decode: decider=joint(0.4)")


def test_a_text_with_blanks_is_filled_in(tmp_path, capsys):
    from dllm_gym.tasks.blanks import pieces

    asked = ".+3=1.;..-7=0.;"
    call("decode", tmp_path, f"fill='{asked}'", "decider=equations-all-speeds", "alpha=0.1")
    text = capsys.readouterr().out.strip()
    assert [a for a, b in zip(text, asked, strict=True) if b != "."] == [
        b for b in asked if b != "."
    ] and "." not in text
    assert text == Decoder(policy="equations-all-speeds", alpha=0.1)([Prompt("", pieces(asked))])[0].text.strip()
    call("decode", tmp_path, f"prompt='{GRIDS[0]}'", f"fill='2314{'.' * 16}'", *SET)
    assert capsys.readouterr().out.startswith("2314")
    with pytest.raises(ValueError, match="fill='a.' and file='x': give one of them"):
        call("decode", tmp_path, "fill='a.'", "file=x")


@pytest.mark.parametrize("command", ["evaluate", "watch"])
def test_a_checkpoint_that_is_none_is_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    odd = DiTConfidence(width=16, ffn=32)
    odd.manner = Manner("ZeroTruncatedBernoulli", model={"model": "tiny"}, env={"gen_length": 20, "colour": "red"})
    odd.save_pretrained(tmp_path / "odd")
    said = {"empty": "neither a run folder", "file": "is a file", "missing": "does not exist", "odd": "env.colour"}
    for name, words in said.items():
        with pytest.raises(ValueError, match=f"^checkpoint='{tmp_path / name}': .*{words}") as raised:
            call(command, tmp_path / "out", f"checkpoint={tmp_path / name}")
        assert "\n" not in str(raised.value)


def test_prompts_of_a_file_are_decoded_and_written(tmp_path, texts):
    lines = [{"prompt": GRIDS[0]}, {"prompt": [{"role": "user", "content": GRIDS[1][:-1]}]}]
    lines += [{"prompt": GRIDS[2], "given": [texts[2][:5], 15]}]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    call("decode", tmp_path, f"file={file}", f"out={out}", "batch_size=2", *SET)
    rows = sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda row: row["index"])
    assert [row["text"] for row in rows[:2]] == texts[:2] and rows[2]["text"].startswith(texts[2][:5])
    assert [row["prompt"] for row in rows] == GRIDS
    assert all(row["nfe"] == len(row["order"]) and row["seconds"] >= 0 for row in rows)


def test_a_pipe_is_read_line_by_line_and_answered_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"1+2+3+4=  \n\n{SUM}\r\n" * 3))
    call("decode", tmp_path, "gen_length=48", "batch_size=2", "decider='threshold(0.9)'")
    out = capsys.readouterr().out.splitlines()
    expected = Decoder("tiny", gen_length=48, stop_at_eos=True)(["1+2+3+4=  ", SUM])
    assert out == [result.text for result in expected] * 3


def test_in_a_chat_the_text_unfolds_and_a_wrong_question_is_no_end(tmp_path, monkeypatch, capsys):
    asked = iter([SUM, "", "what?", SUM])

    def answer(_):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", answer)
    call("decode", tmp_path, "gen_length=48", "decider='top_k(8)'", "stop_at_eos=false")
    out = capsys.readouterr().out
    text = Decoder("tiny", "top_k(8)", gen_length=48)([SUM])[0].text
    assert out.count(text) == 2 and out.count("6 forwards, 8.0 tokens each") == 2
    assert out.count("error: prompts[0]: ") == 1


WRONG = [
    (["prompt=x", "file=y"], "give one of them"),
    (["file=nowhere"], "file='nowhere'"),
    (["prompt=x", "out=x.csv"], "out='x.csv'"),
    (["prompt=x", "fps=0"], "fps=0"),
    (["prompt=x", "decider=nope"], "policy='nope'"),
    (["prompt=x", "decider='top_k(0)'"], "k=0"),
    (["prompt=x", "gen_length=0"], "gen_length=0"),
    (["prompt=what"], r"prompts\[0\].*no tokens"),
    (["prompt=x", "speed=3"], "speed"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=str)
def test_a_wrong_setting_is_named(settings, said, tmp_path):
    settings = [f"+{name}" if name.startswith("speed") else name for name in settings]
    with pytest.raises(ValueError, match=said):
        call("decode", tmp_path, *({"gen_length=20"} if "gen_length=0" not in settings else []), *settings)


@pytest.mark.parametrize("line", ["[1]", "{", "{}", '{"prompt": "x", "more": 1}', '{"prompt": 3}', '"text"'])
def test_a_line_that_is_no_prompt_is_named(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "1+2="}}\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: "):
        call("decode", tmp_path, f"file={file}", "gen_length=20")


def test_texts_need_no_second_quotes(monkeypatch):
    monkeypatch.syspath_prepend("scripts")
    from command import as_text
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for text in ("1+2=", "it's", "a\\b", "a\\", "\\'", "x\ny", "[1,2]", "{a}", "a,b", 'what "now"?', "50%"):
        assert parser.parse_override(as_text(f"prompt={text}")).value() == text
    assert parser.parse_override(as_text("decider=spaced(joint(0.1), 3)")).value() == "spaced(joint(0.1), 3)"
    for plain in ("prompt=null", "prompt='a'", "seed=range(3)", "seed=choice(1,2)", "decider=outputs/x", "-m"):
        assert as_text(plain) == plain


def test_a_policy_that_is_saved_alone_is_watched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saved, "SHIPPED", tmp_path)
    policy = DiTConfidence(width=16, ffn=32)
    policy.manner = Manner("ZeroTruncatedBernoulli", model={"model": "tiny"}, task="arithmetic", env={"gen_length": 48})
    policy.save_pretrained(tmp_path / "sums")
    for name in ("sums", str(tmp_path / "sums")):
        call("watch", tmp_path, f"checkpoint={name}", "fps=1000")
        out = capsys.readouterr().out
        assert "DiTConfidence(ZeroTruncatedBernoulli, greedy) on example 0 of test" in out and "48/48 tokens" in out
    policy.manner = None
    policy.save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match="checkpoint='old': .*how it wants to be played"):
        call("watch", tmp_path, "checkpoint=old")
