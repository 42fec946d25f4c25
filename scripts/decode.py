"""Decode prompts of one's own: from the command line, a file or a pipe, or in a chat in the terminal.

python scripts/decode.py prompt="3+4-2=" gen_length=48 decider="joint(0.4)"
python scripts/decode.py decider=equations-all-speeds fill=".+3=1.;..-7=0.;"
python scripts/decode.py decider=outputs/train/... file=prompts.jsonl out=texts.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from command import command, console
from omegaconf import DictConfig

from dllm_gym.checks import number, text, writable
from dllm_gym.prompt import Prompt
from dllm_gym.render import LEAST_FPS, MOST_FPS

if TYPE_CHECKING:
    from dllm_gym.decode import Decoded, Decoder

SETTINGS = ("gen_length", "block_length", "block_origin", "temperature", "max_episode_steps", "stop_at_eos")
SETTINGS += ("lookahead", "cache", "distribution", "policy_temperature", "greedy", "alpha", "batch_size", "seed")
FIELDS = ("prompt", "given")  # of a line of JSON


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    text("decider", cfg.decider)
    number("fps", cfg.fps, least=LEAST_FPS, most=MOST_FPS)
    for name in ("prompt", "fill"):
        if cfg[name] is not None and cfg.file is not None:
            raise ValueError(f"{name}={cfg[name]!r} and file={cfg.file!r}: give one of them")
    if cfg.file is not None and not Path(text("file", cfg.file)).is_file():
        raise ValueError(f"file={cfg.file!r}: there is no such file")
    if cfg.out is not None:
        writable("out", cfg.out, (".jsonl",))


@command("decode", to="stderr")
def main(cfg: DictConfig) -> None:
    from factory import make_dllm, prepare

    from dllm_gym import Decoder

    check_settings(cfg)
    prompts = given_prompts(cfg)
    device = prepare(cfg)
    dllm = make_dllm(cfg) if cfg.get("model") else None
    decoder = Decoder(dllm, cfg.decider, device=device, **{name: cfg[name] for name in SETTINGS})
    if prompts is None:
        chat(decoder, cfg.fps)
    elif len(prompts) == 1 and cfg.out is None and sys.stdout.isatty():
        unfold(decoder, prompts[0], cfg.fps)
    else:
        decode_all(decoder, prompts, cfg.out)


# ---- prompts ----


def given_prompts(cfg: DictConfig) -> list[Any] | None:
    """What is asked on the command line, in a file or through a pipe; None: somebody sits at the terminal."""
    if cfg.fill is not None:
        from dllm_gym.tasks.blanks import pieces

        return [Prompt("" if cfg.prompt is None else str(cfg.prompt), pieces(str(cfg.fill)))]
    if cfg.prompt is not None:
        return [str(cfg.prompt)]
    if cfg.file is not None:
        with open(cfg.file, encoding="utf-8") as file:
            return read_prompts(file, cfg.file, as_json=Path(cfg.file).suffix == ".jsonl")
    return None if sys.stdin.isatty() else read_prompts(sys.stdin, "stdin", as_json=False)


def read_prompts(file: IO[str], name: str, as_json: bool) -> list[Any]:
    """A prompt per line that is not empty; ValueError names a line that is none."""
    try:
        lines = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text: {error}") from None
    read: Callable[[str], Any] = from_json if as_json else str
    prompts = []
    for i, line in enumerate(lines, 1):
        try:
            prompts += [read(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {i}: {error}") from None
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts


def from_json(line: str) -> Prompt:
    found = json.loads(line)
    if not isinstance(found, dict) or "prompt" not in found or set(found) - set(FIELDS):
        raise ValueError(f"need an object with {' and, if wanted, '.join(FIELDS)}")
    return Prompt(Prompt.of(found["prompt"]).prompt, found.get("given"))


# ---- what becomes of them ----


def decode_all(decoder: Decoder, prompts: list[Any], out: str | None) -> None:
    """Print the texts in the order of their prompts, or write all about them as they end."""
    if out is None:
        for result in in_order(decoder.as_they_end(prompts)):
            print(result.text, flush=True)
        return
    from tqdm import tqdm

    ended = tqdm(decoder.as_they_end(prompts), total=len(prompts), desc="decoding", unit="prompt")
    with open(out, "w", encoding="utf-8") as file:
        for result in ended:
            asked = Prompt.of(prompts[result.index]).prompt
            file.write(json.dumps({"index": result.index, "prompt": str(asked), **facts(result)}) + "\n")
            file.flush()
    print(f"written: {out}")


def facts(result: Decoded) -> dict[str, Any]:
    return {
        "text": result.text,
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": round(result.seconds, 4),
        "order": result.order,
    }


def in_order(results: Iterable[Decoded]) -> Iterator[Decoded]:
    """The results by their index, each as soon as all before it are there."""
    waiting: dict[int, Decoded] = {}
    following = 0
    for result in results:
        waiting[result.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def unfold(decoder: Decoder, prompt: Any, fps: float) -> str:
    """Show how a text comes about, and what it took; returns it."""
    from rich.live import Live
    from rich.text import Text

    began, committed, shown = time.perf_counter(), 0, ""
    terminal = console()
    with Live(console=terminal, auto_refresh=False) as live:
        for commit in decoder.stream(prompt):
            step, shown = commit.step, commit.text
            committed += len(commit.positions)
            live.update(Text(shown), refresh=True)
            time.sleep(1 / fps if terminal.is_terminal else 0)
    seconds = time.perf_counter() - began
    terminal.print(f"{step} forwards, {committed / step:.1f} tokens each, {seconds:.1f} s", style="dim")
    return shown


def chat(decoder: Decoder, fps: float) -> None:
    """Questions from the terminal, until it ends; a dLLM with a chat template remembers what was said."""
    terminal = console()
    remembers = bool(getattr(decoder.dllm.tokenizer, "chat_template", None))
    turns: list[tuple[str, str]] = []
    terminal.print("ask; an empty line begins anew, Ctrl-D ends", style="dim")
    while True:
        try:
            asked = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not asked.strip():
            turns = []
            continue
        try:
            said = unfold(decoder, [*turns, ("user", asked)] if remembers else asked, fps)
        except ValueError as error:
            terminal.print(f"error: {error}")
            continue
        turns += [("user", asked), ("assistant", said)]


if __name__ == "__main__":
    main()
