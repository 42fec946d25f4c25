"""Whether a command reads what it is given: a setting that nothing reads is refused, and so is one of another type.

The configuration files say which settings a command has, and by their values of which type; what is passed on to a
constructor or function (what stands beside a ``_target_``, and the groups model, env and reward) is checked against its
signature. What a number may be is said by whoever uses it.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"
# Their entries are the user's.
OWN_NAMES = ("deciders", "workloads", "worlds", "training", "others", "warm_start", "variants")
HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
TRAINED = ("model", "task", "env", "reward")  # groups that come from the run of a checkpoint
ELSEWHERE = {"model": "group model", "task": "group task", "device": "device", "dtype": "model.dtype"}
ELSEWHERE |= {"split": "evaluation.split or split", "reward": "group reward", "alpha": "reward.alpha"}

Settings = tuple[dict[str, Any], dict[str, Any]]  # as given, resolved; as the files declare them


def check_names(cfg: DictConfig, command: str) -> Settings:
    """Check that a command has the settings that it is given, and lacks none; imports nothing for it.

    Args:
        cfg: its configuration, composed. command: the name of its root config.

    Raises:
        ValueError: a setting that no command has, or that is missing.
    """
    refuse_parts(HydraConfig.get().runtime.choices)
    known = declared(command)
    refuse_other_experiments(cfg, known)
    for name in cfg:
        if name not in known:
            raise unknown(str(name), known)
    try:
        given = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key}=??? has to be given: {error.full_key}=...") from None
    if cfg.get("checkpoint") is not None:  # what these are is only known when the checkpoint's run has been read
        for group in TRAINED:
            given.pop(group, None)
            known.pop(group, None)
    return given, known


def check_values(settings: Settings) -> None:
    """Check what the settings are, which imports whatever they name; ValueError for one that nothing takes."""
    check_mapping("", *settings)


def check_groups(cfg: DictConfig) -> None:
    """Check the groups that were taken over from another run, with what the user changed in them."""
    for group in TRAINED:
        check_value(group, OmegaConf.to_container(cfg[group], resolve=True), {})


def refuse_parts(choices: Mapping[str, Any]) -> None:
    """ValueError for a choice that is only a part of other configurations."""
    for group, choice in choices.items():
        if isinstance(choice, str) and choice.startswith("_") and not group.startswith("hydra"):
            others = sorted(path.stem for path in (CONF / group.partition("@")[0]).glob("[!_]*.yaml"))
            raise ValueError(f"{group}={choice} is only a part of other configurations: choose {', '.join(others)}")


def refuse_other_experiments(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """ValueError for an experiment that sets what only another command has."""
    hydra_config = HydraConfig.get()
    experiment = hydra_config.runtime.choices.get("experiment")
    named = {override.lstrip("+").partition("=")[0] for override in hydra_config.overrides.task}
    strange = [name for name in given if name not in known and name not in named]
    if experiment and strange:
        raise ValueError(f"experiment={experiment} is for another command: this one has no {', '.join(strange)}")


def declared(command: str) -> dict[str, Any]:
    """The settings that a command has with the chosen groups: its root config as its files say, unresolved."""
    runtime = HydraConfig.get().runtime
    defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text()).get("defaults", [])
    groups = {name for entry in defaults if isinstance(entry, dict) for name in entry} - {"experiment"}
    chosen = [f"{name}={choice}" for name, choice in runtime.choices.items() if name in groups and choice is not None]
    folders = [source.path for source in runtime.config_sources if source.schema == "file"]
    others = [f"'file://{folder}'" for folder in folders if Path(folder).resolve() != CONF]
    if others:
        chosen.append(f"hydra.searchpath=[{','.join(others)}]")
    with composing():
        return OmegaConf.to_container(compose(command, chosen), resolve=False)


@contextmanager
def composing() -> Iterator[None]:
    """Within it ``hydra.compose`` reads conf/, also in a command, whose Hydra is set aside meanwhile."""
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = running


def chosen_names() -> set[str]:
    """What the command line sets, such as ``env.block_length`` and ``task``."""
    return {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}


def refuse_chosen(names: Iterable[str], why: str) -> None:
    """ValueError if the command line chooses one of these settings (or a part of one), which nothing would read."""
    for chosen in sorted(chosen_names()):
        if any(chosen == name or chosen.startswith(f"{name}.") for name in names):
            raise ValueError(f"{chosen} is read by nothing here: {why}")


# Values beside what the files declare


def check_mapping(path: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    own_names = path in OWN_NAMES
    for name in known:
        if name not in given and not own_names:
            raise ValueError(f"{join(path, name)} is missing: it cannot be left out")
    for name, value in given.items():
        if name in known:
            check_value(join(path, name), value, known[name])
        elif own_names:
            check_value(join(path, name), value, next(iter(known.values())))
        else:
            raise unknown(join(path, name), known)


def check_value(path: str, value: Any, known: Any) -> None:
    """Check a value beside the one that the files have in its place."""
    name = path.rpartition(".")[2]
    if isinstance(value, Mapping) and "_target_" in value:
        check_call(path, value)
    elif isinstance(value, Mapping) and name in ROLES:
        check_arguments(path, value, *ROLES[name]())
    elif isinstance(known, Mapping) and "_target_" in known:
        raise ValueError(f"{path}={value!r}: need {{_target_: ...}}, as {known['_target_']} is named in conf")
    elif isinstance(known, Mapping):
        if value is None and path.partition(".")[0] in OWN_NAMES:
            return
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={value!r}: need the settings {', '.join(map(str, known)) or 'of a group'}")
        check_mapping(path, value, known)
    elif isinstance(known, list):
        check_list(path, value, known)
    elif value is not None and known is not None and not is_open(known):
        check_type(path, value, float if isinstance(known, float) else type(known))


def check_list(path: str, value: Any, known: list[Any]) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{path}={value!r}: need a list, such as [{','.join(map(str, known[:2])) or 'a,b'}]")
    kinds = {type(item) for item in known if item is not None and not is_open(item)}
    kind = float if kinds & {int, float} else next(iter(kinds), None)  # whether whole ones are needed others know
    for i, item in enumerate(value):
        if kind is dict:
            check_value(f"{path}[{i}]", item, known[0])
        elif kind is not None and item is not None:
            check_type(f"{path}[{i}]", item, kind)


def is_open(value: Any) -> bool:
    """Whether a file leaves it to the command line, or to another setting, what a value is."""
    return isinstance(value, str) and ("${" in value or value == "???")


# Values beside a signature


def check_call(path: str, call: Mapping[str, Any]) -> None:
    """Check the arguments of a ``_target_``, and those of what they hold."""
    name = call["_target_"]
    try:
        target = get_object(name)
    except Exception as error:  # whatever the import of a module raises
        raise ValueError(f"{join(path, '_target_')}={name!r}: cannot be found ({error})") from error
    if not callable(target):
        raise ValueError(f"{join(path, '_target_')}={name!r}: cannot be called")
    check_arguments(path, call, *parameters(target))


def check_arguments(path: str, given: Mapping[str, Any], annotations: Mapping[str, Any], more: bool) -> None:
    for name, value in given.items():
        if name in HYDRA_KEYS:
            continue
        if name not in annotations and not more:
            raise unknown(join(path, str(name)), annotations)
        for place, call in calls(join(path, str(name)), value):
            check_call(place, call)
        check_type(join(path, str(name)), value, annotations.get(name, Any))


def calls(path: str, value: Any) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The outermost ``_target_`` mappings in a value, with where they stand."""
    if isinstance(value, Mapping):
        parts = (
            [(path, value)] if "_target_" in value else [x for k, v in value.items() for x in calls(join(path, k), v)]
        )
        yield from parts
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from calls(f"{path}[{i}]", item)


def parameters(target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Names and types of the arguments of a function or class, and whether it takes others as well."""
    try:
        found = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # compiled code that does not say
        return {}, True
    function = target.__init__ if inspect.isclass(target) else target
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    names: dict[str, Any] = {}
    more = False
    for parameter in found:
        kind = resolved(parameter.annotation, vars(module) if module else {})
        if parameter.kind is parameter.VAR_KEYWORD:
            listed = get_args(kind)  # **options: Unpack[a TypedDict] says which there are
            names |= get_type_hints(listed[0]) if listed else {}
            more = not listed
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            names[parameter.name] = kind
    return names, more


def resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation as an object; Any where it is not known (names that only type checkers import)."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def environment() -> tuple[dict[str, Any], bool]:
    """The settings of the environment that the group env may hold."""
    from dllm_gym.process.config import EnvConfig

    annotations, _ = parameters(EnvConfig)
    return {name: kind for name, kind in annotations.items() if name not in ELSEWHERE}, False


def reward() -> tuple[dict[str, Any], bool]:
    from dllm_gym.process.config import EnvConfig

    annotations, _ = parameters(EnvConfig)
    return {"reward": str, "alpha": annotations["alpha"]}, False


def model() -> tuple[dict[str, Any], bool]:
    from dllm_gym.models import load_dllm

    annotations, _ = parameters(load_dllm)
    own = {"model": annotations["model"] | None}  # null: the task's own
    return {name: kind for name, kind in (annotations | own).items() if name != "device"}, False


ROLES = {"env": environment, "reward": reward, "model": model}


# Types

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_type(path: str, value: Any, kind: Any) -> None:
    if not conforms(value, kind):
        raise ValueError(f"{path}={value!r}: need {describe(kind)}")


def conforms(value: Any, kind: Any) -> bool:
    """Whether a value of a configuration can be what an annotation asks for; a ``_target_`` can be anything."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if origin in (Union, types.UnionType):
        return any(conforms(value, part) for part in inner)
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and not (isinstance(value, float) and math.isnan(value))
    base = origin or kind
    if not inspect.isclass(base):
        return True
    if issubclass(base, str | Path):
        return isinstance(value, str)
    if issubclass(base, Mapping):
        return isinstance(value, Mapping) and (len(inner) < 2 or all(conforms(v, inner[1]) for v in value.values()))
    if base is tuple and inner and ... not in inner:
        return isinstance(value, list) and len(value) == len(inner) and all(map(conforms, value, inner))
    if base is Iterable or issubclass(base, Sequence):
        return isinstance(value, list) and (not inner or all(conforms(v, inner[0]) for v in value))
    return not isinstance(value, str | int | float | list | None)


def describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in get_args(kind)))
    base = get_origin(kind) or kind
    if kind in WORDS:
        return WORDS[kind]
    if inspect.isclass(base) and issubclass(base, Mapping):
        return "a mapping {...}"
    if base is Iterable or (inspect.isclass(base) and issubclass(base, Sequence)):
        return "a list [...]"
    return "a text" if base is Path else f"{{_target_: ...}} of a {getattr(base, '__name__', base)}"


# Words


def join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def unknown(path: str, known: Iterable[Any]) -> ValueError:
    """The error for a setting that nothing reads, with the name that was perhaps meant."""
    group, _, name = path.rpartition(".")
    if group.rpartition(".")[2] == "env" and name in ELSEWHERE:
        return ValueError(f"{path} is read by nothing: {name} is chosen with {ELSEWHERE[name]}")
    return ValueError(f"{path} is read by nothing{suggestion(group, name, known)}")


def suggestion(group: str, name: str, known: Iterable[Any]) -> str:
    """Which names are near, or else which there are."""
    names = sorted(str(name) for name in known if not str(name).startswith("_"))
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f": did you mean {join(group, near[0])}?"
    return f": {group or 'this command'} has {', '.join(names) or 'no settings'}"
