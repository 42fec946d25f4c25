"""A checkpoint folder: its raw config, weights and tokenizer, read without any code from the folder."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ID_FIELDS = ("mask_token_id", "eos_token_id", "pad_token_id")
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is wanted; the fields are those of :func:`~dllm_gym.models.load_dllm`."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    device_map: str | tuple[tuple[str, Any], ...] | None = None  # a mapping is kept as its items: settings are hashed
    quantization: str | None = None
    rope_float32: bool = False
    chat_template: bool = True
    mask_token: str | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is not valid: choose one of {', '.join(QUANTIZATIONS)} or None"
            )
        needed = {"quantization": "bitsandbytes", "device_map": "accelerate"}
        for name, package in needed.items():
            value = getattr(self, name)
            if value is not None and importlib.util.find_spec(package) is None:
                raise ValueError(f"{name}={value!r} needs the package {package}: pip install {package}")

    @property
    def placed(self) -> bool:
        """transformers puts the weights where they belong, nobody moves them afterwards."""
        return self.device_map is not None or self.quantization is not None

    def placement(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` that say where the weights go and how they are stored."""
        if not self.placed:
            return {}
        mapping = {"": self.device} if self.device_map is None else self.device_map
        arguments: dict[str, Any] = {"device_map": mapping if isinstance(mapping, str) else dict(mapping)}
        if self.quantization is not None:
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=self.quantization == "int8",
                load_in_4bit=self.quantization == "int4",
                bnb_4bit_compute_dtype=self.dtype,
            )
        return arguments


@dataclass(frozen=True)
class Checkpoint:
    """What a family's loader makes a dLLM of.

    Attributes:
        folder: holds config.json, safetensors and the tokenizer.
        config: the raw ``config.json``; special ids that it lacks are those of ``generation_config.json``.
        settings: how the dLLM is wanted.
    """

    folder: Path
    config: dict[str, Any]
    settings: Settings

    @classmethod
    def read(cls, folder: Path, settings: Settings) -> Checkpoint:
        """Raises ValueError when the folder has no readable config.json or no safetensors."""
        config = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            generation = read_json(folder / "generation_config.json")
            config |= {name: generation.get(name) for name in ID_FIELDS if config.get(name) is None}
        if settings.mask_token is not None:
            config.pop("mask_token_id", None)  # the tokenizer's counts, which is set below
        if not any((folder / name).is_file() for name in WEIGHTS):
            raise ValueError(f"{folder} holds no weights (looked for {' or '.join(WEIGHTS)})")
        return cls(folder, config, settings)

    def weights(
        self, model_class: type[PreTrainedModel], config: Any, unused: str | None = None, **arguments: Any
    ) -> PreTrainedModel:
        """The network with the checkpoint's weights, on its device and in its dtype.

        Args:
            model_class, config: of transformers; the config is built by the caller, never read from the folder.
            unused: regular expression of weights in the checkpoint that the network has no use for.
            arguments: more arguments of ``from_pretrained``, e.g. ``key_mapping``, or ``state_dict`` with the weights.

        Raises:
            ValueError: a weight is missing, unexpected or mis-shaped.
        """
        model, report = model_class.from_pretrained(
            None if "state_dict" in arguments else self.folder,
            config=config,
            dtype=self.settings.dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their names, and refused below
            **self.settings.placement(),
            **arguments,
        )
        refuse_mismatch(report, unused)
        return model if self.settings.placed else model.to(self.settings.device)

    def tokenizer(self, otherwise: Any = AutoTokenizer) -> Any:
        """The tokenizer in ``tokenizer.json``; a folder without that file is read by the class ``otherwise``.

        The class that the folder names is not asked for: that of Dream, for one, is code in the folder.
        """
        reader = PreTrainedTokenizerFast if (self.folder / "tokenizer.json").is_file() else otherwise
        tokenizer = reader.from_pretrained(self.folder)
        if not self.settings.chat_template:
            tokenizer.chat_template = None
        mask_token = self.settings.mask_token
        if mask_token is not None:
            if mask_token not in tokenizer.get_vocab():
                raise ValueError(f"mask_token={mask_token!r} is not in the tokenizer's vocabulary")
            tokenizer.mask_token = mask_token
        return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model folder {path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def refuse_mismatch(report: dict[str, Any], unused: str | None = None) -> None:
    """Weights that do not fit the config would be initialised at random with no more than a log line."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(key if isinstance(key, str) else " ".join(map(str, key)) for key in report.get(kind) or ())
        if kind == "unexpected_keys" and unused is not None:
            names = [name for name in names if not re.search(unused, name)]
        if names:
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")


def require(config: dict[str, Any], family: str, **needed: Any) -> None:
    """Refuse a config that asks for what the family's network does not compute.

    Raises:
        ValueError: a field that is present has another value than ``needed`` says.
    """
    for field, value in needed.items():
        if config.get(field, value) != value:
            raise ValueError(f"config.json: {field}={config[field]!r} is not supported for {family} (need {value!r})")
