"""Configurations that somebody else may have written: they are data, and name nothing but what they may name."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from dllm_gym.runs.files import read_unverified

log = logging.getLogger(__name__)

SIZE = 2**18  # bytes of a configuration; a run's own has some thousands
DEPTH = 40  # levels of a configuration; a run's own has ten
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
OPTION = re.compile(r"[A-Za-z0-9 ,_+*/-]{0,60}")  # a text that a generator may be given: no call, no attribute
SCHEDULE = re.compile(r"get_\w*schedule\w*")  # factories in transformers.optimization
SCHEDULES = ("transformers", "transformers.optimization")  # where they are
OURS = ("agents", "dllm_gym")
GET_CLASS = "hydra.utils.get_class"  # how a configuration hands over a class instead of an object
MOVED = dict.fromkeys(("agents.distributions", "agents.heuristics", "agents.policies"), "dllm_gym.deciders")
LOGGER_SETTINGS = {"_target_", "exp_name", "project"}
PLACES = {"log_dir", "tracking_uri", "artifact_location"}  # of a logger; a resumed run puts its own there


class Refused(ValueError):
    """A configuration has what no run writes into one."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which 1e-5 is a number, as YAML 1.2 has it, and a date is a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """A resolved configuration as plain data; nothing in it is resolved, imported or called.

    Raises:
        ValueError: there is no such file, or it is larger than ``SIZE``, nested deeper than ``DEPTH``, no YAML mapping
            of plain values, or has an alias or an interpolation.
    """
    text = read_unverified(path, SIZE)
    try:
        check_events(text, resolved=True)
        found = yaml.load(text, Loader)
        check_plain(found)
    except Refused as error:
        raise Refused(f"{path} is no configuration of a run: {error}") from None
    except Exception as error:  # of many kinds: the library hands on what its converters raise
        raise ValueError(f"{path} is no configuration of a run: {reason(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) and key.isidentifier() for key in found):
        raise ValueError(f"{path} is no configuration of a run: it maps no names to settings")
    return with_todays_names(found, path)


def with_todays_names(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration with what has moved since it was saved under its name of today; says so once."""
    old = set()
    for _, node in nodes(config, ""):
        for key in ("_target_", "path"):
            module, _, name = str(node.get(key)).rpartition(".")
            if module in MOVED:
                node[key] = f"{MOVED[module]}.{name}"
                old.add(module)
    if old:
        log.warning("%s is of an earlier layout: %s now means %s", path, ", ".join(sorted(old)), *{*MOVED.values()})
    return config


def reason(error: Exception) -> str:
    """What is wrong with a text, without a word of it: the file may be a link to another."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    said = getattr(error, "problem", None) or getattr(error, "reason", None)
    if said is None and isinstance(error, ValueError):
        said = str(error).partition(":")[0]  # behind it is what was read
    return f"{said or type(error).__name__}{where}"


def check_plain(value: Any) -> None:
    """Raises Refused for anything but mappings, lists, texts, numbers, truth values and null."""
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(part)
    elif not isinstance(value, str | int | float | bool | None):
        raise Refused(f"it holds a {type(value).__name__}")


def read_overrides(path: Path) -> list[str]:
    """The command line that a run was started with; ValueError as in ``read_config``."""
    text = read_unverified(path, SIZE)
    try:
        check_events(text, resolved=False)
        found = yaml.load(text, Loader) or []
    except Refused as error:
        raise Refused(f"{path} is damaged: {error}") from None
    except Exception as error:  # as above
        raise ValueError(f"{path} is damaged: {reason(error)}") from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise ValueError(f"{path} is damaged: it is no list of texts")
    return found


def check_events(text: str, resolved: bool) -> None:
    """Raises Refused for YAML that is deep, repeats itself or (if ``resolved``) asks for a resolver."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise Refused(f"line {line} is nested deeper than {DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise Refused(f"line {line} has the alias *{event.anchor}")
        if resolved and isinstance(event, yaml.ScalarEvent) and ("${" in event.value or event.value == "???"):
            raise Refused(f"line {line} has {event.value[:80]!r}: saved configurations are resolved")
        if isinstance(event, yaml.ScalarEvent) and CONTROL.search(event.value):
            raise Refused(f"line {line} has a control character, which a terminal may obey")
        if not isinstance(event, yaml.NodeEvent) or isinstance(event, yaml.AliasEvent):
            continue
        if event.tag is not None and not event.tag.startswith("tag:yaml.org,2002:") or "python" in (event.tag or ""):
            raise Refused(f"line {line} has the tag {event.tag[:80]!r}")


class Allowed:
    """What a saved configuration may name, by the group in which it stands.

    Args:
        packages: dotted names of packages or modules that the user trusts, whatever stands in them.
        own: the configuration of the user's own command: what it names may be named again.
    """

    def __init__(self, packages: Iterable[str] = (), own: Any = None):
        self.packages = tuple(packages)
        named = [node for _, node in nodes(own, "")]
        self.targets = {node["_target_"] for node in named if isinstance(node.get("_target_"), str)} - {GET_CLASS}
        self.targets |= {node["path"] for node in named if node.get("_target_") == GET_CLASS and "path" in node}
        self.targets = {name for name in self.targets if name.partition(".")[0] not in OURS}  # those have their groups
        self.sandboxes = ["auto", "namespace", *(node["sandbox"] for node in named if "sandbox" in node)]

    def check(self, config: dict[str, Any], path: Path) -> None:
        """Raises Refused, which names the first target or setting that may not be there; imports only our own."""
        for key, node in nodes(config, ""):
            if "_target_" in node:
                self._check_node(key.partition(".")[0], key, node, path)
            if key.rpartition(".")[2] == "options" and not self.trusts(target_of(config, key)):
                check_options(node, key, path)
            if "sandbox" in node and node["sandbox"] not in self.sandboxes:
                what = f"{key}.sandbox={node['sandbox']!r}"
                raise Refused(f"{path}: {what} weakens the sandbox: only your own command line may")

    def _check_node(self, group: str, key: str, node: dict[str, Any], path: Path) -> None:
        target = node["_target_"]
        if self.trusts(target):
            return
        try:
            if target == GET_CLASS and set(node) == {"_target_", "path"}:
                if not self.trusts(node["path"]):
                    resolve(node["path"], "distribution" if group == "distribution" else "")
                return
            resolve(target, group)
        except ValueError as error:
            named = node["path"] if target == GET_CLASS and "path" in node else target
            raise Refused(
                f"{path}: {key} names {named!r}, which is refused: {error}; if you trust its package, say trust=[...]"
            ) from None
        if "_args_" in node:
            raise Refused(f"{path}: {key} has _args_, which is refused: name the arguments of {target}")
        if group == "logger":
            check_logger(node, key, path)

    def trusts(self, target: Any) -> bool:
        return isinstance(target, str) and (
            target in self.targets or any(target.startswith(f"{package}.") for package in self.packages)
        )


def target_of(config: dict[str, Any], key: str) -> Any:
    """The ``_target_`` beside what stands at ``key``."""
    part: Any = config
    for name in key.split(".")[:-1]:
        part = part[int(name) if isinstance(part, list) else name]
    return part.get("_target_") if isinstance(part, dict) else None


def check_options(options: dict[str, Any], key: str, path: Path) -> None:
    """Raises Refused for options whose texts are more than words: scorers of puzzles evaluate what they are given."""
    for name, value in options.items():
        for leaf in leaves(value):
            if not isinstance(leaf, int | float | bool | None) and not OPTION.fullmatch(str(leaf)):
                raise Refused(
                    f"{path}: {key}.{name}={str(leaf)[:40]!r} is refused: only your own command line may set it"
                )


def leaves(value: Any) -> Iterator[Any]:
    """The plain values in a part of a configuration, keys of mappings among them."""
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def nodes(part: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in a part of a configuration, with where it stands."""
    if isinstance(part, dict):
        yield key, part
    pairs = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in pairs:
        yield from nodes(value, f"{key}.{name}" if key else str(name))


def check_logger(node: dict[str, Any], key: str, path: Path) -> None:
    """A logger may be chosen, and what its runs are called, but not where it sends or writes anything else."""
    strange = sorted(set(map(str, node)) - LOGGER_SETTINGS - PLACES)
    strange += [place for place in sorted(PLACES & set(node)) if is_remote(str(node[place]))]
    name = str(node.get("exp_name", ""))
    if strange or "/" in name or "\\" in name or name in ("..", "."):
        what = f"{key}.{strange[0]}" if strange else f"{key}.exp_name={name!r}"
        raise Refused(f"{path}: {what} is refused: only your own command line may set it (logger=...)")


def is_remote(place: str) -> bool:
    """Whether a place is on another machine: any URL but that of a file or of a database in one."""
    return "://" in place and not place.startswith(("file:///", "sqlite:///"))


def resolve(target: Any, group: str) -> Any:
    """The class or function of that name, if it is of a kind that configurations of ``group`` may name.

    Names are looked up in the module that they say, not in what that module imports, and nothing is imported but our
    own modules and those of ``kinds``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(target, str) or not DOTTED.fullmatch(target) or len(target) > 200:
        raise ValueError("no dotted name")
    module, _, name = target.rpartition(".")
    for prefix, kinds in allowed_kinds(group):
        if module != prefix and not module.startswith(f"{prefix}."):
            continue
        if prefix == "transformers" and not (module in SCHEDULES and SCHEDULE.fullmatch(name)):
            continue  # looking a name up there imports it
        found = getattr(loaded(module), name, None)
        own = getattr(found, "__module__", None)
        if not isinstance(own, str) or not (own == prefix or own.startswith(f"{prefix}.")):
            continue
        if isinstance(found, type) and kinds and issubclass(found, kinds):
            return found
        if prefix == "transformers":
            return found
    raise ValueError("no class that a run's configuration may name there")


def loaded(module: str) -> Any:
    """A module of ours, imported if need be; of others only if it is imported already."""
    if module.partition(".")[0] not in OURS or module in sys.modules:
        return sys.modules.get(module)
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def allowed_kinds(group: str) -> list[tuple[str, tuple[type, ...]]]:
    """Package -> the classes whose subclasses in it a configuration's group may name."""
    if group == "distribution":
        from dllm_gym.deciders.distributions import UnmaskDistribution

        return [("dllm_gym.deciders", (UnmaskDistribution,))]
    if group == "task":
        from dllm_gym.tasks import PromptStyle, Source, Task

        return [("dllm_gym", (Task, PromptStyle, Source))]
    if group == "policy":
        from dllm_gym.deciders.policy import Policy

        return [("dllm_gym.deciders", (Policy,))]
    if group == "logger":
        import torchrl.record.loggers.trackio  # noqa: F401
        from torchrl.record.loggers.common import Logger

        return [("torchrl.record", (Logger,))]
    if group in ("agent", "expert", "reference", "heuristics"):
        import torch
        import transformers.optimization  # noqa: F401

        from agents.algorithm import Algorithm
        from agents.grpo import Reference
        from dllm_gym.deciders.rules import Rule

        steps = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        ours = [("agents", (Algorithm, Reference)), ("dllm_gym.deciders", (Rule,))]
        return [*ours, ("torch.optim", steps), ("transformers", ())]
    return []
