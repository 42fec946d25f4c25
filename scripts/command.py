"""What every command does around its work: it checks its settings, and says in one line what is wrong with them."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import prelude  # noqa: F401  (before torch and agents)
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from settings import CONF, check_names, check_values, suggestion

REFUSED, BROKEN_PIPE = 2, 141  # exit codes; the second is that of a program that SIGPIPE ends
DEBUG = "DLLM_GYM_DEBUG"  # set to 1: errors in settings come with their traceback, as all others do
ONE_LINE = (ValueError, OSError, MemoryError, HydraException, OmegaConfBaseException)
NO_MEMORY = ("not enough memory", "can't allocate memory")  # RuntimeErrors of torch on a CPU

GROUPS = ("experiment", "model", "task", "agent")  # whose choices the first line names, and the settings that it names
INPUTS = ("checkpoint", "resume", "runs", "results", "folder", "measure")

CALL = re.compile(r"(\w+)\([^'{}]*\)")
HYDRA_FUNCTIONS = ("choice", "range", "interval", "sort", "shuffle", "tag", "glob", "int", "float", "str", "bool")
HYDRA_FUNCTIONS += ("json_str", "extend_list")

Work = Callable[[DictConfig], Any]


def command(name: str, to: str = "stdout") -> Callable[[Work], Callable[..., Any]]:
    """In the place of ``hydra.main``: a command with the root config conf/<name>.yaml.

    Called without arguments it reads the command line. What is wrong with a setting then ends it with one line on
    stderr and exit code 2; anything else that is raised is a defect, and shown in full. Called with a configuration it
    works on that, gives back what the work does, and raises a ValueError for a setting. ``to``: where its first line
    goes.
    """

    def decorate(work: Work) -> Callable[..., Any]:
        @functools.wraps(work)
        def checked(cfg: DictConfig) -> Any:
            refuse_surroundings()
            settings = check_names(cfg, name)
            print(first_line(cfg, name), file=getattr(sys, to), flush=True)
            check_values(settings)
            try:
                return work(cfg)
            except InstantiationException as error:
                raise refusal_of(error) from error

        @functools.wraps(work)
        def task(cfg: DictConfig) -> Any:
            try:
                return checked(cfg)
            except (*ONE_LINE, RuntimeError) as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise  # the other jobs of a sweep go on first
                end(error)

        @functools.wraps(work)
        def main(cfg: DictConfig | None = None) -> Any:
            return checked(cfg) if cfg is not None else run(hydra.main(str(CONF), name, version_base=None)(task))

        return main

    return decorate


def first_line(cfg: DictConfig, name: str) -> str:
    """What is started, on what, and where: shown before the seconds that the imports take."""
    hydra_config = HydraConfig.get()
    inputs = {key: cfg[key] for key in INPUTS if cfg.get(key) is not None}
    if isinstance(cfg.get("decider"), str):
        inputs["decider"] = cfg.decider
    own = {} if {"checkpoint", "measure"} & set(inputs) else hydra_config.runtime.choices  # they bring their own
    chosen = {group: own[group] for group in GROUPS if own.get(group)} | inputs
    folder = Path(hydra_config.runtime.output_dir)
    where = "" if folder == Path.cwd() else f" in {os.path.relpath(folder) if Path.cwd() in folder.parents else folder}"
    return f"{name}: {', '.join(f'{key}={value}' for key, value in chosen.items())}{where}"


def run(main: Callable[[], Any]) -> None:
    """Run Hydra's main on the command line; a reader that goes away ends it quietly."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign shows another
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on as they are
    try:
        sys.argv[1:] = map(as_text, sys.argv[1:])
        refuse_remote_folders(sys.argv[1:])
        main()
        sys.stdout.flush()
    except (*ONE_LINE, RuntimeError) as error:
        end(error)


def as_text(argument: str) -> str:
    """A setting whose value is a text to us and grammar to Hydra, quoted: any prompt, and the name of a rule.

    >>> print(*map(as_text, ["decider=threshold(0.9)", "prompt=1+2=", "seed=range(3)"]))
    decider='threshold(0.9)' prompt='1+2=' seed=range(3)
    """
    name, _, value = argument.partition("=")
    free = name in ("prompt", "fill") and value not in ("", "null") and value[:1] not in "'\""
    call = CALL.fullmatch(value)
    if not free and (call is None or call[1] in HYDRA_FUNCTIONS):
        return argument
    value = re.sub(r"(\\*)(?='|$)", r"\1\1", value).replace("'", "\\'")  # backslashes count before a quote only
    return f"{name}='{value}'"


def end(error: Exception) -> None:
    """End with one line that says what is wrong; without a word if only the reader went away."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(BROKEN_PIPE)
    if not isinstance(error, ONE_LINE) and not is_out_of_memory(error):
        raise error
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    print(f"error: {' '.join(words(error).split())}", file=sys.stderr)
    sys.exit(REFUSED)


def is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # before it is there, it has raised nothing
    return any(words in str(error) for words in NO_MEMORY) or bool(torch and isinstance(error, torch.OutOfMemoryError))


def words(error: BaseException) -> str:
    """What an error says, without what only helps those who know Hydra."""
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        if cause.full_key and cause.parent_node is not None:
            group, _, name = cause.full_key.rpartition(".")
            return f"{cause.full_key} is no setting{suggestion(group, name, cause.parent_node)}"
        return f"{error} ({cause})"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: no valid setting ({str(error).splitlines()[0]})"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    said = str(error).partition("Config search path:")[0] or type(error).__name__
    where = "" if isinstance(error, HydraException | OSError) or ours(error) else f" ({DEBUG}=1 shows where)"
    return said + where


def ours(error: BaseException) -> bool:
    """Whether the error comes from this project, which knows how to say what is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or "site-packages" not in frames[-1].filename and "/lib/python" not in frames[-1].filename


def refusal_of(error: InstantiationException) -> Exception:
    """A ValueError for arguments that a ``_target_`` refuses; any other error of its code as it was."""
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError | ImportError | ValueError | TypeError) or cause is None:
        key = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else ""
        return ValueError(": ".join(filter(None, (key, str(cause or error)))))
    return cause if isinstance(cause, Exception) else error


def refuse_surroundings() -> None:
    """ValueError for what the surroundings ask and no command does."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.strip() not in ("", "1"):
        raise ValueError(f"WORLD_SIZE={processes}: one process works on one device, start it without torchrun")
    hydra_config = HydraConfig.get()
    for name in ("run", "sweep"):
        refuse_remote_folders([f"hydra.{name}.dir={hydra_config[name].dir}"])


def refuse_remote_folders(arguments: list[str]) -> None:
    """ValueError for a run folder that is no local one."""
    for argument in arguments:
        name, _, folder = argument.lstrip("+").partition("=")
        if name.startswith(("hydra.run", "hydra.sweep", "hydra.output_subdir")) and "://" in folder:
            raise ValueError(f"{name}={folder}: need a local folder, nothing is written to a remote one")


def console(width: int | None = None) -> Console:
    """A console that prints texts as they are: names and paths may look like markup."""
    return Console(width=width, markup=False, emoji=False, highlight=False)
