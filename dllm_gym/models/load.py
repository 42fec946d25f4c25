"""From a name, a folder or a hub id to a frozen dLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from dllm_gym.models import llada
from dllm_gym.models.base import DLLM

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _load_llada(folder: Path, raw: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    model, report = LlamaForCausalLM.from_pretrained(
        folder,
        config=llada.llama_config(raw),
        key_mapping=llada.key_mapping(llada.NAMES),
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    _refuse_mismatch(report)
    return model


# `model_type` of the raw config.json -> loader.
FAMILIES: dict[str, Callable[[Path, dict[str, Any], torch.dtype], PreTrainedModel]] = {"llada": _load_llada}


def load_dllm(
    model: str | Path | DLLM, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> DLLM:
    """Load a frozen dLLM; the same arguments give the same object within a process.

    Args:
        model: ``"tiny"`` (shipped), a local folder, a hub id (``owner/name``, optionally ``@revision``), or a DLLM,
            which is returned as it is.
        device: where the weights go; the CPU by default.
        dtype: ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``; confidences are float32 in any case.

    Raises:
        ValueError: no such model; not a supported family; weights that are missing, unexpected, mis-shaped or
            unreadable; an unknown dtype or device, or another one than a given DLLM has.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    device = None if device is None else check_device(device)
    if isinstance(model, DLLM):
        for name, asked, has in (("device", device, model.device), ("dtype", dtype, model.dtype)):
            if asked is not None and asked != has:
                raise ValueError(f"{name}={str(asked)!r}: the dLLM that was passed has {has}")
        return model
    return _load(str(model), device or torch.device("cpu"), dtype or torch.float32)


@lru_cache(maxsize=4)
def _load(model: str, device: torch.device, dtype: torch.dtype) -> DLLM:
    folder = _folder(model)
    raw = _raw_config(folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model={model!r}: model_type={family!r} in config.json is not a supported dLLM family "
            f"(supported: {', '.join(FAMILIES)})"
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"model={model!r}: {folder} holds no weights (looked for {' or '.join(WEIGHTS)})")
    try:
        with _quiet_transformers():
            network = FAMILIES[family](folder, raw, dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        dllm = DLLM(network.model, network.lm_head, tokenizer, raw)
    except KeyError as missing:
        raise ValueError(f"model={model!r}: config.json lacks the field {missing}") from None
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"model={model!r}: cannot load the checkpoint in {folder}: {error}") from error
    if len(tokenizer) > dllm.vocab_size:
        raise ValueError(
            f"model={model!r}: the tokenizer has {len(tokenizer)} tokens, the model only {dllm.vocab_size}: "
            "they do not belong together"
        )
    network.to(device)
    return dllm


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
        files = ["*.json", "*.safetensors", "*.txt"]  # no code, no pickles
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's client raises many unrelated types; the user needs one answer
        raise ValueError(
            f"model={model!r} is no local folder and could not be fetched from the hub ({type(error).__name__}): "
            "check the name and the connection, log in with `hf auth login` if it is gated, or give a local folder"
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


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"model folder {folder} has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _refuse_mismatch(report: dict[str, Any]) -> None:
    """Weights that do not fit the config would be initialised at random with no more than a log line."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            names = sorted(str(key) for key in report[kind])
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")


def check_device(device: str | torch.device) -> torch.device:
    """The device, with its index, if tensors can be made there; ValueError otherwise."""
    try:
        device = torch.device(device)
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here: {reason}") from None
    return device
