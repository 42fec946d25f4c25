"""From a name, a folder or a hub id to a frozen dLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, TypedDict, Unpack
from weakref import WeakValueDictionary

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from dllm_gym.checks import flag, whole
from dllm_gym.models.base import DLLM
from dllm_gym.models.checkpoint import Checkpoint, Settings
from dllm_gym.models.families import dream, llada, llada2, llada_moe, llama, masked_lm, qwen
from dllm_gym.models.views import View

SHIPPED = {name: Path(__file__).parent / name for name in ("tiny", "tiny_shallow", "tiny_equations", "tiny_one_way")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SWITCHES = ("rope_float32", "chat_template", "compile")

Loader = Callable[[Checkpoint], DLLM]


class Options(TypedDict, total=False):
    """What :func:`load_dllm` takes by name: fields of :class:`~dllm_gym.models.checkpoint.Settings`."""

    device_map: str | Mapping[str, Any] | None
    quantization: str | None
    rope_float32: bool
    chat_template: bool
    mask_token: str | None
    shift: int | None
    block: int | None
    unused: str | None
    compile: bool


# A name among `architectures` of the raw config.json, or else its `model_type` -> loader; what transformers knows as a
# masked language model comes on top.
FAMILIES: dict[str, Loader] = {
    "LLaDAMoEModelLM": llada_moe.load,
    "LLaDAMoEModel": llada_moe.load,
    "StableDiffcoderForCausalLM": llama.load_diffcoder,
    "SDARForCausalLM": qwen.load_sdar,
    "SDARMoeForCausalLM": qwen.load_sdar,
    "Fast_dLLM_QwenForCausalLM": qwen.load_fast_dllm,
    "NemotronLabsDiffusionModel": llama.load_nemotron,
    "llada": llada.load,
    "llada_moe": llada_moe.load,
    "llada2_moe": llada2.load,
    "illada": llama.load_illada,
    "Dream": dream.load,
    "dream": dream.load,
    "a2d-qwen2": qwen.load,
    "a2d-qwen3": qwen.load,
    "a2d-llama": llama.load_a2d,
    "sdar": qwen.load_sdar,
    "sdar_moe": qwen.load_sdar,
    "Fast_dLLM_Qwen": qwen.load_fast_dllm,
    "nemotron_labs_diffusion": llama.load_nemotron,
    "qwen2": qwen.load_plain,
    "qwen3": qwen.load_plain,
}


def register(model_type: str, loader: Loader, *, replace: bool = False) -> None:
    """Add a family of dLLMs; dLLMs that are loaded already stay as they are.

    Args:
        model_type: the field of that name in the raw ``config.json`` of the family's checkpoints, or one of its
            ``architectures``, which are looked at first.
        loader: makes a :class:`DLLM` of a :class:`~dllm_gym.models.checkpoint.Checkpoint`; its ``weights`` and
            ``tokenizer`` methods respect what the user asked for and refuse checkpoints that do not fit.
        replace: take the place of the family of that name.

    Raises:
        ValueError: the name is taken or none, or the loader cannot be called.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> def load_two_way_llama(checkpoint):
    ...     config = LlamaConfig(**checkpoint.config)
    ...     config.is_causal = False
    ...     network = checkpoint.weights(LlamaForCausalLM, config)
    ...     return DLLM(network.model, network.lm_head, checkpoint.tokenizer(), checkpoint.config)
    >>> register("two_way_llama", load_two_way_llama)
    >>> del FAMILIES["two_way_llama"]
    """
    if not isinstance(model_type, str) or not model_type or not callable(loader):
        raise ValueError(f"model_type={model_type!r}, loader={loader!r}: need a name and a callable that gives a DLLM")
    if (model_type in FAMILIES or model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES) and not replace:
        raise ValueError(f"model_type={model_type!r} is a supported family already: say replace=True to replace it")
    FAMILIES[model_type] = loader


def load_dllm(
    model: str | Path | DLLM,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Unpack[Options],
) -> DLLM:
    """Load a frozen dLLM; the same arguments give the same object within a process.

    The family is chosen by ``architectures``, then by ``model_type`` in the raw ``config.json``; no code from a
    checkpoint is ever run.

    Args:
        model: one of :data:`SHIPPED` such as ``"tiny"``, a local folder, a hub id (``owner/name``, optionally
            ``@revision``), or a DLLM, which is returned as it is.
        device: where the weights go; the CPU by default.
        dtype: ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``; confidences are float32 in any case.
        options: ``device_map``, ``quantization``, ``rope_float32``, ``chat_template``, ``mask_token``, ``shift``,
            ``block``, ``unused`` and ``compile``, fields of :class:`~dllm_gym.models.checkpoint.Settings`.

    Raises:
        ValueError: no such model; not a supported family; weights that are missing, unexpected, mis-shaped or
            unreadable; no mask token; an option that is not valid, or whose package is missing; an unknown dtype or
            device, or another one than a given DLLM has.
        TypeError: there is no option of that name.

    >>> dllm = load_dllm("tiny")
    >>> dllm.decode(dllm.encode("1+2="))
    '1+2='
    """
    dtype = None if dtype is None else check_dtype(dtype)
    device = None if device is None else check_device(device)
    checked = check_options(options)
    if isinstance(model, DLLM):
        refuse_another(model, device, dtype, checked)
        return model
    settings = Settings(device or torch.device("cpu"), dtype or torch.float32, **checked)
    name = full_name(model)
    with _loading:  # transformers' verbosity is the process's, and two threads would load twice
        return _load(name, settings)


def check_options(options: Options) -> dict[str, Any]:
    """The fields of ``Settings`` that were asked for; ValueError for a switch or a text that is none."""
    checked: dict[str, Any] = dict(options)
    for name in checked:
        if name not in Options.__annotations__:
            raise TypeError(f"load_dllm() has no option {name!r}: choose from {', '.join(Options.__annotations__)}")
    if "device_map" in checked:
        checked["device_map"] = check_device_map(checked["device_map"])
    if not isinstance(checked.get("mask_token"), str | None):
        raise ValueError(f"mask_token={checked['mask_token']!r} is not valid: give the token's text")
    if checked.get("shift") is not None:
        checked["shift"] = int(flag("shift", checked["shift"]))
    if "block" in checked:  # None, as 0: the whole row
        checked["block"] = whole("block", checked["block"] or 0, least=0)
    check_pattern("unused", checked.get("unused"))
    return checked | {name: flag(name, checked[name]) for name in SWITCHES if name in checked}


def check_pattern(name: str, pattern: Any) -> None:
    """ValueError unless it is a regular expression, or None."""
    try:
        if pattern is None or (isinstance(pattern, str) and re.compile(pattern)):
            return
        raise re.error("need a text")
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is not valid: give a regular expression ({error})") from None


def full_name(model: str | Path) -> str:
    """Of a shipped dLLM, a folder or a hub id; the same relative path is another folder after a chdir."""
    name = str(model) if model is not None else ""
    if not name.strip():
        raise ValueError(f"model={model!r}: give {', '.join(map(repr, SHIPPED))}, a folder or a hub id")
    return str(Path(name).resolve()) if name not in SHIPPED and Path(name).is_dir() else name


def refuse_another(dllm: DLLM, device: torch.device | None, dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    """A dLLM that is there already cannot be had in another form."""
    for name, asked, has in (("device", device, dllm.device), ("dtype", dtype, dllm.dtype)):
        if asked is not None and asked != has:
            raise ValueError(f"{name}={str(asked)!r}: the dLLM that was passed has {has}")
    for name, value in options.items():
        if value != getattr(Settings, name):
            raise ValueError(f"{name}={value!r}: the dLLM that was passed is loaded already, give its name instead")


_loading = RLock()  # a registered loader may load another dLLM
_in_use: WeakValueDictionary[tuple[str, Settings], DLLM] = WeakValueDictionary()


@lru_cache(maxsize=4)  # the latest, in use or not
def _load(model: str, settings: Settings) -> DLLM:
    dllm = _in_use.get((model, settings))
    if dllm is None:
        dllm = _in_use[model, settings] = _read(model, settings)
    return dllm


def _read(model: str, settings: Settings) -> DLLM:
    folder = _folder(model)
    try:
        checkpoint = Checkpoint.read(folder, settings)
        loader = family(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"model={model!r}: {error}") from None
    if settings.rope_float32 and loader is not llada.load:
        raise ValueError(f"rope_float32=True is LLaDA's arithmetic; model={model!r} is of another family")
    try:
        with _quiet_transformers():
            dllm = loader(checkpoint)
    except Exception as error:  # many unrelated types of transformers, or of a registered loader
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())  # transformers' messages have many lines
        raise ValueError(f"model={model!r}: cannot load the checkpoint in {folder}: {reason}") from error
    if not isinstance(dllm, DLLM):
        raise ValueError(f"model={model!r}: the loader of its family gave a {type(dllm).__name__}, not a DLLM")
    refuse_another_view(model, dllm, settings)
    if settings.compile:
        dllm.compile()
    tokens = max(len(dllm.tokenizer), dllm.mask_id + 1)
    if tokens > dllm.vocab_size:
        raise ValueError(
            f"model={model!r}: the tokenizer has {tokens} tokens, the model only {dllm.vocab_size}: "
            "they do not belong together"
        )
    return dllm


def refuse_another_view(model: str, dllm: DLLM, settings: Settings) -> None:
    """ValueError where ``shift`` or ``block`` is stated, and the family is known to do something else."""
    view = getattr(dllm, "view", View())
    for name, stated, has in (("shift", settings.shift, view.shift), ("block", settings.block, view.block or 0)):
        if stated is not None and stated != has:
            raise ValueError(f"{name}={stated!r}: model={model!r} is of a family that has {name}={has}")


def family(config: Mapping[str, Any]) -> Loader:
    """The loader for a raw ``config.json``: by its ``architectures``, then by its ``model_type``."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        raise ValueError(f"config.json: model_type={model_type!r} is not valid: need the name of a family")
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return masked_lm.load
    raise ValueError(
        f"model_type={model_type!r} in config.json is not a supported dLLM family (supported: "
        f"{', '.join(FAMILIES)}, and masked language models of transformers such as bert and modernbert); "
        "add one with dllm_gym.models.register"
    )


def _folder(model: str) -> Path:
    """Where the checkpoint lies: shipped, local, or fetched from the hub."""
    if model in SHIPPED:
        return SHIPPED[model]
    if Path(model).is_dir():
        return Path(model)
    name, _, revision = model.partition("@")
    if name.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(
            f"model={model!r} is not known: give {', '.join(map(repr, SHIPPED))}, an existing local folder, "
            "or a hub id such as 'GSAI-ML/LLaDA-8B-Instruct'"
        )
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # no code, no pickles
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's client raises many unrelated types; the user needs one answer
        raise ValueError(
            f"model={model!r} is no local folder and could not be fetched from the hub ({type(error).__name__}): "
            "check the name, the revision after @ and the connection, log in with `hf auth login` if it is gated, or "
            "give the folder of a copy: model=/path/to/folder (for the scripts model.model=/path/to/folder)"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report: what matters in them is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name; ValueError when it is not one of :data:`DTYPES`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_device(device: str | torch.device) -> torch.device:
    """The device, with its index, if tensors can be made there; ValueError otherwise."""
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("tensors there have no numbers")
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here: {reason}") from None
    return device


def check_device_map(device_map: Any) -> str | tuple[tuple[str, Any], ...] | None:
    """The device map, a mapping as its items; ValueError unless it is a name, or module names to devices."""
    if device_map is None or isinstance(device_map, str):
        return device_map
    if isinstance(device_map, Mapping) and device_map:
        items = tuple(device_map.items())
        if all(isinstance(name, str) and isinstance(place, str | int | torch.device) for name, place in items):
            return items
    raise ValueError(f"device_map={device_map!r} is not valid: give 'auto', or module names to devices")
