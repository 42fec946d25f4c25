"""The page on which decoders race: what it holds, and, in a browser, what it does when it is clicked."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import hydra
import numpy as np
import pytest
from test_readme import blocks, commands
from test_scripts import ROOT, call, compose_config

from dllm_gym import Decoder
from dllm_gym.render import Frame
from dllm_gym.replay import page

NAMES = ["threshold(0.9)", "joint(0.4)", "random(20)"]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

# What is done on the page, and what is then to be seen: runs behind the page's own script.
CLICKS = """
<pre id="result"></pre><script>
const seen = [], fails = [];
window.onerror = (...error) => { fails.push(String(error[0])); };
const shows = () => [...document.querySelectorAll("section")].map(box => ({
  nfe: Number(box.querySelector("b").textContent),
  text: box.querySelector(".cells").getAttribute("aria-label"),
  fresh: box.querySelectorAll(".fresh").length,
  verdict: box.querySelector(".verdict").textContent,
  wrong: box.className === "wrong",
}));
const colours = canvas => {
  const dots = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from({length: canvas.height}, (_, k) => Array.from({length: canvas.width}, (_, i) =>
    [...dots.slice(4 * (k * canvas.width + i), 4 * (k * canvas.width + i) + 3)].join()));
};
const maps = () => [...document.querySelectorAll("#maps figure")].map(box => {
  const details = box.querySelector("details");
  details.open = true;
  details.ontoggle();
  return {
    colours: colours(box.querySelector("canvas")),
    said: box.querySelector("canvas").getAttribute("aria-label"),
    bars: [...box.querySelectorAll(".bars i")].map(bar => parseInt(bar.style.height)),
    table: [...box.querySelectorAll("tbody tr")].map(row => [...row.children].map(entry => entry.textContent)),
  };
});
const key = name => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const note = name => seen.push([name, at("play").textContent, step, shows()]);
try {
  note("start"); at("play").click(); note("click on play"); at("next").click(); note("click on next");
  at("back").click(); note("click on back"); key("ArrowRight"); key("ArrowRight"); note("two arrows");
  key("End"); note("end"); key("Home"); note("home");
  at("scrub").value = 1; at("scrub").oninput(); note("scrub"); key(" "); note("space"); key(" ");
  const map = document.querySelector("#maps canvas"), box = map.getBoundingClientRect();
  const low = {clientX: box.left + 2, clientY: box.bottom - 2};
  map.dispatchEvent(new MouseEvent("click", low)); note("click on the map");
  map.dispatchEvent(new PointerEvent("pointermove", low));
  seen.push(["maps", map.title, document.querySelector("#learning").hidden, maps()]);
  key("]"); key("End"); note("other prompt");
} catch (error) { fails.push(String(error)); }
document.getElementById("result").textContent = JSON.stringify({seen, fails});
</script>
"""


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    file = tmp_path_factory.mktemp("race") / "race.html"
    decider = "decider={_target_: dllm_gym.deciders.rules.Threshold, threshold: 0.9}"
    call("watch", file.parent, f"html={file}", decider, f"against={json.dumps(NAMES[1:])}", "examples=2", "example=3")
    return file


@pytest.fixture(scope="module")
def ends():
    """Of every prompt what each decider makes of it: text and NFE."""
    task = hydra.utils.instantiate(compose_config("watch").task)
    found = []
    for example in task.examples("test").to_list()[3:5]:
        results = [Decoder("tiny", name, gen_length=20)([task.prompt(example)])[0] for name in NAMES]
        found.append([(result.text, result.nfe, task.grade(example, result.text)) for result in results])
    return found


@pytest.fixture(scope="module")
def commits():
    """Of the first prompt what every forward of each decider commits."""
    task = hydra.utils.instantiate(compose_config("watch").task)
    prompt = task.prompt(task.examples("test")[3])
    return [list(Decoder("tiny", name, gen_length=20).stream(prompt)) for name in NAMES]


def test_the_page_holds_everything_and_asks_for_nothing(race):
    text = race.read_text()
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert data["deciders"] == NAMES and len(data["prompts"]) == 2


def test_what_is_in_a_text_does_not_end_the_script():
    bits = np.zeros(1, bool)
    frame = Frame("</script><b>&", ["<!--"], bits, np.ones(1), bits, bits, 0, score=1.0)
    text = page(["a</script>"], [[[frame]]])
    assert text.count("</script>") == 2 and "<b>&" not in text
    for deciders, races in (([], []), (["a"], []), (["a"] * 5, [[[frame]] * 5]), (["a", "b"], [[[frame]]])):
        with pytest.raises(ValueError, match="1 to 4 deciders"):
            page(deciders, races)


DATA = re.compile(r'(?<=<script id="data" type="application/json">).*?(?=</script>)', re.DOTALL)


def test_the_page_of_the_docs_is_what_its_command_makes_now(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from command import as_text

    told = [words for _, text in blocks(ROOT / "docs" / "decoding.md", "bash") for words in commands(text)]
    (words,) = [words for words in told if "html=docs/race.html" in words]
    new = tmp_path / "race.html"
    assert words[:2] == ["python", "scripts/watch.py"]
    call("watch", tmp_path, *(f"html={new}" if word.startswith("html=") else as_text(word) for word in words[2:]))
    old_text, new_text = (ROOT / "docs" / "race.html").read_text(), new.read_text()
    assert DATA.sub("", old_text) == DATA.sub("", new_text), f"run it again: {' '.join(words)}"
    assert len(old_text) < 400_000
    old, new = (json.loads(DATA.search(text)[0]) for text in (old_text, new_text))
    for prompts in (old["prompts"], new["prompts"]):  # in whole percent, which another processor may round otherwise
        for prompt in prompts:
            prompt["sure"] = [frame.pop("confidence") for run in prompt["runs"] for frame in run["frames"]]
    before, now = (np.concatenate([np.ravel(prompt.pop("sure")) for prompt in d["prompts"]]) for d in (old, new))
    assert old == new and abs(before - now).max() <= 1


WRONG = [
    (["against=[a]"], "against is read by nothing"),
    (["html=x.gif"], "html='x.gif'"),
    (["html=x.html", "against=[a,b,c,d]"], "at most 3"),
    (["html=x.html", "against=[nope]"], "policy='nope'"),
    (["html=x.html", "examples=0"], "examples=0"),
    (["html=x.html", "against=['joint(0.4)','joint(0.4)']"], "some are the same"),
    (["html=x.html", "mp4=x.mp4"], "mp4 is read by nothing"),
    (["mp4=x.gif"], "mp4='x.gif'"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=str)
def test_a_wrong_setting_is_named(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        call("watch", tmp_path, *settings)


def browsed(file: Path, text: str, script: str = CLICKS) -> dict:
    """What a page has in its ``result`` when a browser has opened it with a script behind its own."""
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian package chromium)")
    file.write_text(text.replace("</html>", f"{script}</html>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--force-prefers-reduced-motion", "--dump-dom"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert result["fails"] == []
    return result


@pytest.fixture(scope="module")
def clicked(race):
    result = browsed(race.with_name("clicked.html"), race.read_text())
    return {name: (button, step, lanes) for name, button, step, lanes in result["seen"]}


def test_every_button_and_key_does_what_it_says(clicked, ends):
    steps = {name: step for name, (_, step, _) in clicked.items() if name != "maps"}
    longest = max(nfe for _, nfe, _ in ends[0])
    assert steps == {
        "start": 0, "click on play": 0, "click on next": 1, "click on back": 0, "two arrows": 2,
        "end": longest, "home": 0, "scrub": 1, "space": 1, "other prompt": max(nfe for _, nfe, _ in ends[1]),
        "click on the map": ends[0][0][1],
    }  # fmt: skip
    playing = {name for name, (button, _, _) in clicked.items() if button == "pause"}
    assert playing == {"click on play", "space"}


def test_the_ends_are_the_decoders_own(clicked, ends):
    for name, expected in (("end", ends[0]), ("other prompt", ends[1])):
        for lane, (text, nfe, score) in zip(clicked[name][2], expected, strict=True):
            assert lane["nfe"] == nfe and lane["text"].partition("∎")[0] == text
            assert lane["wrong"] == (score < 1) and ("right" in lane["verdict"]) == (score == 1)
    assert {lane["wrong"] for lane in clicked["end"][2]} == {True, False}
    first = clicked["click on next"][2]
    assert first[2]["fresh"] == 20 and 0 < first[0]["fresh"] < 20 and "_" in first[0]["text"]


CURVES = """
<pre id="result"></pre><script>
document.getElementById("result").textContent = JSON.stringify({fails: [], seen:
  [...document.querySelectorAll("#curves figure")].map(box => [box.querySelector(".field").getAttribute("aria-label"),
    box.querySelector("polyline").getAttribute("points").trim().split(/\\s+/).length])});
</script>
"""
FRESH = "230,159,0"  # the colour of what a forward commits, #e69f00


def test_heat_maps_bars_and_tables_are_what_was_committed(clicked, commits):
    title, no_curves, maps = clicked["maps"]
    assert no_curves and re.fullmatch(r"forward \d+, position 0: .+", title)
    for drawn, steps in zip(maps, commits, strict=True):
        orange = [[i for i, colour in enumerate(row) if colour == FRESH] for row in drawn["colours"]]
        assert orange == [step.positions for step in steps]
        assert drawn["said"].endswith(": " + ", ".join(str(len(step.positions)) for step in steps))
        sure = [zip(step.positions, step.confidence, strict=True) for step in steps]
        when = {i: (k, int(100 * value)) for k, pairs in enumerate(sure) for i, value in pairs}
        assert drawn["bars"] == [when[i][1] for i in range(20)]
        for i, row in enumerate(drawn["table"]):
            k, percent = when[i]
            assert row[0] == str(i) and row[2] == f"forward {k + 1}"
            assert row[3 + k] == f"{percent} %" and not any(row[4 + k :]) and all(row[3 : 3 + k])
    shades = {colour for row in maps[0]["colours"] for colour in row}
    assert len(shades - {FRESH}) > 5  # confidences are told apart


def test_learning_curves_are_drawn(tmp_path):
    bits, rounds = np.zeros(1, bool), 1000
    frames = [
        Frame("a", ["b"], ~bits, np.ones(1), bits, ~bits, 0),
        Frame("a", ["b"], bits, np.ones(1), ~bits, bits, 1, 1.0),
    ]
    curve = [{"round": i, "reward": i / rounds, "accuracy": 0.5, "nfe": 9.0 - i / rounds} for i in range(rounds)]
    gap = {"round": rounds, "reward": float("nan"), "accuracy": 0.5, "nfe": 8.0}  # which no browser could read
    text = page(["mine", "b"], [[frames, frames]] * 2, {"mine": [*curve, gap], "b": [gap]})
    (told,) = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])["curves"]
    assert told["name"] == "mine" and len(told["round"]) == 200 and told["round"][0] == 0 and told["round"][-1] == 999
    assert told["nfe"][-1] == 8.001
    seen = browsed(tmp_path / "curves.html", text, CURVES)["seen"]
    assert [label for label, _ in seen] == [
        "mine: reward from 0.00 to 1.00",
        "mine: accuracy from 0.50 to 0.50",
        "mine: forwards (NFE) from 9.00 to 8.00",
    ]
    assert {points for _, points in seen} == {200}
