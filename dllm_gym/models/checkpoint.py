"""A checkpoint folder: its raw config, weights and tokenizer, read without any code from the folder."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ID_FIELDS = ("mask_token_id", "eos_token_id", "pad_token_id")
QUANTIZATIONS = ("int8", "int4")
# Fields of config.json that do not describe the network; some of them would choose how, or with whose code, it is run.
NOT_OF_THE_NETWORK = re.compile(
    r"_.*|model_type|architectures|auto_map|transformers_version|quantization_config|return_dict|torchscript"
    r"|output_attentions|output_hidden_states|.*attn_implementation|experts_implementation|gradient_checkpointing"
)
# Fields by which a config says that more, or something else, is computed than by the network that it is named after.
ARITHMETIC = re.compile(
    r"block_(size|length)|bd_size|canvas_length|dlm_.*|rope_scaling|auto_map|.*_multiplier|.*softcap.*|logit_scale"
)


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is wanted, as :func:`~dllm_gym.models.load_dllm` was asked.

    Attributes:
        device: where the weights go. dtype: of the computation; confidences are float32 in any case.
        device_map: spread the weights over several devices instead, as in transformers (``"auto"``, or module names
            to devices); ``device`` has no say then. Needs accelerate.
        quantization: ``"int8"`` or ``"int4"`` weights, computed in ``dtype``. Needs bitsandbytes.
        rope_float32: rotate queries and keys in float32, as LLaDA's own code does in half precision. Off by default:
            the rotation is then done in ``dtype``, which moves bf16 logits by less than bf16 rounding itself does.
        chat_template: put prompts into the tokenizer's chat template. Base models carry a template that they were
            not trained with: turn it off for them.
        mask_token: the mask token's text, for a checkpoint that does not name it.
        shift: the position that predicts token j is j - shift, 0 or 1. For a checkpoint whose config does not say it; a
            family that knows its own refuses another.
        block: a position sees its own block of so many and the blocks before, 0: the whole row. As ``shift``; families
            that were trained with several take it in place of their usual one.
        unused: regular expression of weights in the files that the network has no use for, such as further heads.
        compile: let torch.compile build the network, with CUDA graphs on a GPU. Forwards are then rounded up to shapes
            that come again; the first ones take tens of seconds.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    device_map: str | tuple[tuple[str, Any], ...] | None = None  # a mapping is kept as its items: settings are hashed
    quantization: str | None = None
    rope_float32: bool = False
    chat_template: bool = True
    mask_token: str | None = None
    shift: int | None = None
    block: int | None = None
    unused: str | None = None
    compile: bool = False

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

    def files(self) -> list[Path]:
        """The files with the weights: one, or those that the index lists; others in the folder do not count.

        Raises:
            ValueError: a file that the index lists is not there.
        """
        whole, index = (self.folder / name for name in WEIGHTS)
        if whole.is_file():
            return [whole]
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index} has no weight_map")
        files = [self.folder / name for name in sorted({str(name) for name in listed.values()})]
        for file in files:
            if file.parent != self.folder or not file.is_file():
                raise ValueError(f"{index.name} lists {file.name}, which is not in {self.folder}")
        return files

    def names(self) -> list[str]:
        """The names of the weights in the files."""
        names: list[str] = []
        for file in self.files():
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        return names

    def stored(self) -> dict[str, Tensor]:
        """The weights under the names in the files; ValueError when two files have the same name."""
        refuse_collisions(self.names())
        return {name: value for file in self.files() for name, value in load_file(file).items()}

    def weights(
        self, model_class: type[PreTrainedModel], config: Any, unused: str | None = None, **arguments: Any
    ) -> PreTrainedModel:
        """The network with the checkpoint's weights, on its device and in its dtype.

        Args:
            model_class, config: of transformers; the config is built by the caller, never read from the folder.
            unused: regular expression of weights in the checkpoint that the network has no use for.
            arguments: more arguments of ``from_pretrained``, e.g. ``key_mapping``, or ``state_dict`` with the weights.

        Raises:
            ValueError: a weight is missing, unexpected, mis-shaped, there twice, or not finite.
        """
        if "state_dict" not in arguments:
            refuse_collisions(self.names(), arguments.get("key_mapping") or {})
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
        patterns = [f"(?:{pattern})" for pattern in (unused, self.settings.unused) if pattern is not None]
        refuse_mismatch(report, "|".join(patterns) or None)
        refuse_not_finite(model)
        refuse_two_heads(model)
        return model if self.settings.placed else model.to(self.settings.device)

    def tokenizer(self, otherwise: Any = AutoTokenizer) -> Any:
        """The tokenizer in ``tokenizer.json``; a folder without that file is read by the class ``otherwise``.

        The class that the folder names is not asked for: that of Dream, for one, is code in the folder.

        Raises:
            ValueError: the folder has no vocabulary, only code of its own would read it, or it lacks ``mask_token``.
        """
        whole = (self.folder / "tokenizer.json").is_file()
        reader = PreTrainedTokenizerFast if whole else otherwise
        # Left open, trust_remote_code is a question on the terminal, and a "y" there runs the folder's code.
        try:
            tokenizer = reader.from_pretrained(self.folder, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"the tokenizer of {self.folder} is code in the folder, which is never run: add a tokenizer.json"
            ) from None
        if not whole:
            refuse_without_vocabulary(self.folder, tokenizer)
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
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model folder {path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object but {str(fields)[:40]!r}")
    return fields


def network_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a raw ``config.json`` that say what the network computes, for a configuration of transformers."""
    return {name: value for name, value in raw.items() if not NOT_OF_THE_NETWORK.fullmatch(name)}


def refuse_without_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Without the files that its class reads, a tokenizer knows its special tokens only, and says nothing of it."""
    files = {kind: name for kind, name in tokenizer.vocab_files_names.items() if kind != "tokenizer_file"}
    missing = [name for name in files.values() if not (folder / name).is_file()]
    if missing or not files:
        needed = f" and no {' and '.join(missing)}" if missing else ""
        raise ValueError(f"{folder} has no vocabulary: no tokenizer.json{needed}")


def refuse_collisions(names: Iterable[str], key_mapping: Mapping[str, str] = {}) -> None:
    """Two weights that become the same one: which of them counts would be chance."""
    taken: dict[str, str] = {}
    for name in names:
        renamed = name
        for old, new in key_mapping.items():
            renamed = re.sub(old, new, renamed)
        if renamed in taken:
            raise ValueError(f"two weights for {renamed}: {taken[renamed]} and {name}")
        taken[renamed] = name


def refuse_not_finite(model: PreTrainedModel) -> None:
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            least, largest = weight.detach().aminmax()  # they are nan if one number is
            if not (least.isfinite() and largest.isfinite()):
                raise ValueError(f"the weight {name} is not finite in {weight.dtype}")


def refuse_two_heads(model: PreTrainedModel) -> None:
    """A config that ties the head to the embedding, and a file with another head: one of them is wrong."""
    head = model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None:
        return
    embedding = model.get_input_embeddings()
    if head.weight.is_meta or embedding.weight.is_meta or head.weight is embedding.weight:
        return
    if not torch.equal(head.weight.cpu(), embedding.weight.cpu()):
        raise ValueError("config.json ties the head to the embedding, but the file has a head of its own that differs")


def refuse_mismatch(report: dict[str, Any], unused: str | None = None) -> None:
    """Weights that do not fit the config would be initialised at random with no more than a log line."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(key if isinstance(key, str) else " ".join(map(str, key)) for key in report.get(kind) or ())
        if kind == "unexpected_keys" and unused is not None:
            names = [name for name in names if not re.search(unused, name)]
        if names:
            way = "; weights that are not needed: unused=PATTERN" if kind == "unexpected_keys" else ""
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}{way}")


def require(config: dict[str, Any], family: str, **needed: Any) -> None:
    """Refuse a config that asks for what the family's network does not compute.

    Raises:
        ValueError: a field that is present has another value than ``needed`` says; null, 0 and false are all "off".
    """
    for field, value in needed.items():
        found = config.get(field, value)
        if found != value and (found or value):
            raise ValueError(f"config.json: {field}={config[field]!r} is not supported for {family} (need {value!r})")


def refuse_arithmetic(config: Mapping[str, Any], family: str, known: Collection[str] = ()) -> None:
    """Refuse a config with a field that changes what is computed, unless the family's loader knows it.

    Raises:
        ValueError: such a field is not null, 0, false or empty.
    """
    rope = config.get("rope_parameters")
    scaled = isinstance(rope, dict) and rope.get("rope_type", "default") != "default"
    said = [name for name, value in config.items() if ARITHMETIC.fullmatch(name) and value]
    for name in [*said, *(["rope_parameters"] if scaled else [])]:
        if name not in known:
            raise ValueError(
                f"config.json: {name}={config[name]!r} changes what is computed and is not known for {family}: remove "
                "the field if it does not, or write a loader (dllm_gym.models.register)"
            )


def require_fields(config: Mapping[str, Any], *names: str) -> None:
    """Refuse a config without one of the fields: transformers' default would take its place silently.

    Raises:
        ValueError: a field is missing or null.
    """
    for name in names:
        if config.get(name) is None:
            raise ValueError(f"config.json lacks the field {name!r}")
