"""The base of the policy networks: what they read, their head, and how they are stored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_gym.checks import number, whole
from dllm_gym.deciders.card import TEMPLATE, Evidence, told_front, told_manner
from dllm_gym.deciders.manner import Manner, kinds_of
from dllm_gym.deciders.saved import CONFIG, PICTURE, WEIGHTS, checkpoint_of, locate, read_config
from dllm_gym.runs.checkpoints import Checkpoints

_MANNER = "manner"  # in config.json beside the settings
# Settings younger than some stored policies, with what those meant.
_ADDED = {
    "candidates": None,
    "preference": False,
    "joint": False,
    "odds": 0.0,
    "bound": 0.0,
    "haste": 0.0,
    "vocab_size": 0,
    "blocks": 1,
    "hidden_size": 0,
    "absolute_positions": False,
}
_SIZE = 2**20  # of a setting, where the file of weights is smaller than that
_NEVER = -1e6  # logit of a position that is no candidate: finite, and exp gives 0 at any sensible temperature


class Policy(
    nn.Module,
    ModelHubMixin,
    library_name="dllm_gym",
    tags=["diffusion-language-model", "reinforcement-learning"],
    model_card_template=TEMPLATE,
):
    """Base of the policy networks: per-position features, a linear head, and how both are stored.

    A family sets ``reads`` (the observation entries that its ``trunk`` takes, in this order), writes ``trunk``, and in
    ``__init__``, whose arguments are its ``settings``, calls ``super().__init__`` with those that the base takes and
    makes ``self.head`` (``smart_head``). ``type(self)(**self.settings)`` is the same network.

    Every family takes ``candidates`` (K): only the K most confident legal positions (the leftmost of equals) keep
    their logit, all others get one so low that they are never picked. With a categorical distribution the policy is
    then a softmax over the K most confident positions (UPO's top-K realization, arXiv 2510.05725). None: all positions.

    Args:
        candidates: see above.
        top_k: confidences per position that it reads; 1 by default, if it reads any.
        hidden_size: width of the hidden states that it reads; 0: none.
        vocab_size: of the tokens that it reads; 0: none.
        settings: a family may hand on its other arguments, as it had to once.

    Attributes:
        settings: all arguments of the constructor.
        in_keys: observation entries, in the order of the arguments of ``forward`` and ``features``.
        width: channels of ``features``.
        head: the linear layer from features to logits.
        top_k: confidences per position that it reads; hidden_size: width of the hidden states that it reads (0: none).
        states: the entry with the hidden states that it reads, if it reads any.
        manner: how it wants to be played, saved with it; None: nobody has said so.
        evidence: how it did beside the rules, saved with it if it is known.
    """

    manner: Manner | None = None
    evidence: Evidence | None = None
    reads: tuple[str, ...] = ("confidence", "mask", "time")
    states: str = "hidden"
    head: nn.Linear
    settings: dict[str, Any]

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        policy = super().__new__(cls, *args, **settings)
        signature = inspect.signature(cls.__init__)
        with suppress(TypeError):  # wrong arguments: the constructor says so itself
            call = signature.bind(policy, *args, **settings)
            call.apply_defaults()
            policy.settings = {name: call.arguments[name] for name in _named(cls)} | settings
        return policy

    def __init__(
        self,
        *,
        candidates: int | None = None,
        top_k: int | None = None,
        hidden_size: int = 0,
        vocab_size: int = 0,
        **settings: Any,
    ):
        super().__init__()
        self.candidates = candidates
        if candidates is not None:
            whole("candidates", candidates)
        extra = () if candidates is None else ("confidence", "action_mask")
        self.in_keys = tuple(dict.fromkeys((*self.reads, *extra)))
        self.top_k = int("confidence" in self.in_keys) if top_k is None else top_k
        self.hidden_size, self.vocab_size = hidden_size, vocab_size

    @property
    def width(self) -> int:
        return self.head.in_features

    @property
    def requires(self) -> dict[str, int]:
        """Settings of the environment that the observation needs, as the least value of each."""
        needs = {"top_k": self.top_k, self.states: int(self.hidden_size > 0), "tokens": int(self.vocab_size > 0)}
        return {name: least for name, least in needs.items() if least}

    def read(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The arguments of ``forward``.

        Raises:
            ValueError: the observation lacks one; says which setting of the environment provides it.
        """
        present = observation.keys()  # a TensorDict knows no `in`
        missing = [key for key in self.in_keys if key not in present]
        if missing:
            settings = {name: f"{name}=True" for name in ("hidden", "block_input", "tokens")}
            settings["preference"] = "alpha=[low, high]"
            needed = [settings[key] for key in missing if key in settings]
            how = f": build the environment with {' and '.join(needed)}" if needed else ""
            raise ValueError(f"{type(self).__name__} reads {', '.join(missing)}, which the observation lacks{how}")
        return tuple(observation[key] for key in self.in_keys)

    def features(self, *observation: Tensor) -> Tensor:
        """What the head reads, [.., L, width] in the parameters' dtype, from the entries ``in_keys``.

        Raises:
            ValueError: an entry does not fit this network; says which setting of the environment changes it.
        """
        seen = dict(zip(self.in_keys, observation, strict=True))
        self._check(seen)
        lead, length = seen["mask"].shape[:-1], seen["mask"].shape[-1]
        rows = (seen[key].flatten(0, len(lead) - 1) if lead else seen[key][None] for key in self.reads)  # (B, ..)
        return self.trunk(*rows).reshape(*lead, length, self.width)

    def _check(self, seen: Mapping[str, Tensor]) -> None:
        confidences = seen["confidence"].shape[-1] if "confidence" in seen else 0
        if confidences < self.top_k:
            raise ValueError(
                f"this policy reads top_k={self.top_k} confidences per position but the observation has {confidences}: "
                f"build the environment with top_k >= {self.top_k}"
            )
        channels = seen[self.states].shape[-1] if self.states in seen else 0
        if channels != self.hidden_size:
            raise ValueError(
                f"this policy reads hidden states of hidden_size={self.hidden_size} but the observation's have "
                f"{channels} channels: build the environment with {self.states}=True and a model of that width"
            )

    def trunk(self, *rows: Any, **_: Any) -> Tensor:
        """Features [B, L, width] from the entries ``reads``, each with one leading dimension."""
        raise NotImplementedError

    def start(self, seen: Mapping[str, Tensor]) -> Tensor | float:
        """What the head's logits are added to, [.., L] or the same everywhere: a rule that training departs from."""
        return 0.0

    def forward(self, *observation: Tensor) -> Tensor:
        """Logits float32 [.., L] from the entries ``in_keys``."""
        seen = dict(zip(self.in_keys, observation, strict=True))
        logits = self.head(self.features(*observation)).squeeze(-1).float() + self.start(seen)  # (.., L)
        if self.candidates is None:
            return logits
        return logits.where(self._most_confident(seen["confidence"][..., 0], seen["action_mask"] != 0), _NEVER)

    def _most_confident(self, confidence: Tensor, legal: Tensor) -> Tensor:
        """bool [.., L]: the ``candidates`` largest of ``confidence`` among legal positions, the leftmost of equals."""
        order = confidence.masked_fill(~legal, -1.0).argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(legal).scatter(-1, order[..., : self.candidates], True) & legal

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (``save_pretrained`` adds a model card)."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS)
        played = {} if self.manner is None else {_MANNER: self.manner.as_dict()}
        config = {"policy": type(self).__name__, **self.settings, **played}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if self.evidence is not None:
            self.evidence.write(save_directory)

    @classmethod
    def load(cls, source: str | Path | Policy, **download: Any) -> Policy:
        """The saved policy, of whatever class it is; a policy is returned as it is.

        Args:
            source: a folder that ``save_pretrained`` wrote, the name of a shipped policy, a run folder (``RUN``,
                ``RUN@best``, ``RUN@100``), a repository of the hub (``owner/name``, ``owner/name@revision``).
            download: see :meth:`from_pretrained`.

        Raises:
            ValueError: it is none of these, its class is not known here, or as of :meth:`from_pretrained`.
        """
        if isinstance(source, Policy):
            return source
        import dllm_gym.deciders  # noqa: F401  (whose classes are then known)

        folder = locate(source, **download)
        name = read_config(folder)["policy"]
        known = {kind.__name__: kind for kind in kinds_of(cls)}
        if name not in known:
            raise ValueError(f"{folder / CONFIG}: no class {name!r} is known here, import the module that defines it")
        policy = known[name].from_pretrained(folder)
        run = checkpoint_of(str(source))
        if run is not None and run == Checkpoints(run.run).all()[-1]:  # results are those of the last one
            policy.evidence = Evidence.beside(run.run, "results.png")
            greedy = policy.evidence.greedy if policy.evidence else None
            if policy.manner is not None and greedy is not None:
                policy.manner = replace(policy.manner, greedy=greedy)
        return policy.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no model_kwargs: nothing is dropped
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The network of this class that is stored in a folder or in a repository of the Hugging Face hub, on the CPU.

        Args:
            source: as for :meth:`load`.
            revision: branch, tag or commit of the repository; token, cache_dir, force_download, local_files_only: how
                it is downloaded, see ``huggingface_hub.snapshot_download``.

        Raises:
            ValueError: there is no such folder and no such repository can be read, a file is missing or unreadable, the
                configuration is of another class or has missing, unknown or invalid settings, or a weight is missing,
                unexpected or of another shape. Nothing is dropped and nothing is left at random.
        """
        # The mixin's own version would drop settings that the class does not know, hence not `_from_pretrained`.
        download = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        folder = locate(source, revision=revision, local_files_only=local_files_only, **download)
        policy = cls._from_config(folder)
        try:
            weights = load_file(folder / WEIGHTS)
            if wrong := _misfits(weights, policy.state_dict()):
                more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ValueError("; ".join(wrong[:3]) + more)
        except (OSError, SafetensorError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder / WEIGHTS} does not hold the weights of this {cls.__name__}: {said}") from error
        policy.load_state_dict(weights)
        policy.evidence = Evidence.beside(folder, PICTURE)
        return policy

    @classmethod
    def _from_config(cls, folder: Path) -> Self:
        """A new network with the settings of a ``config.json``."""
        path, config = folder / CONFIG, dict(read_config(folder))
        if config.pop("policy") != cls.__name__:
            raise ValueError(f"{path} does not describe a {cls.__name__}")
        manner = config.pop(_MANNER, None)
        expected = set(_named(cls))
        config = {**{name: value for name, value in _ADDED.items() if name in expected}, **config}
        if set(config) != expected:
            missing, unknown = sorted(expected - set(config)), sorted(set(config) - expected)
            raise ValueError(f"{path}: missing settings {missing}, unknown settings {unknown}")
        size = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else 0
        for name, value in config.items():  # a network of that size has more weights: it is not even made
            if isinstance(value, int) and value > max(size, _SIZE):
                raise ValueError(f"{path}: {name}={value} does not go with a {WEIGHTS} of {size} bytes")
        try:
            policy = cls(**config)
            policy.manner = None if manner is None else Manner.of(manner)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # of torch: no network is that large
            said = " ".join(str(error).split())
            raise ValueError(f"{path}: {said}") from error
        return policy

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved policy."""
        parts = {"manner": told_manner(self.manner), "front": told_front(self.evidence)}
        return super().generate_model_card(*args, policy=type(self).__name__, **parts, **kwargs)


def _named(policy: type[Policy]) -> list[str]:
    """The arguments of a family's constructor, without ``self``, ``*args`` and ``**settings``."""
    parameters = list(inspect.signature(policy.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _misfits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What of saved weights is not as a network's own."""
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{name} is unexpected" for name in saved if name not in own]
    both = [(name, saved[name], own[name]) for name in own if name in saved]
    shapes = [(name, list(one.shape), list(other.shape)) for name, one, other in both if one.shape != other.shape]
    wrong += [f"{name} has shape {found}, not {needed}" for name, found, needed in shapes]
    kinds = [(name, one) for name, one, other in both if one.is_floating_point() != other.is_floating_point()]
    wrong += [f"{name} is of dtype {str(one.dtype).removeprefix('torch.')}" for name, one in kinds]
    return wrong + [f"{name} holds what is not finite" for name, one, _ in both if not one.isfinite().all()]


def smart_head(width: int, output_bias: float) -> nn.Linear:
    """The layer from features to a logit per position, whose logits start near ``output_bias`` (LUP's smart init).

    LUP does not say how the weight starts. Here N(0, 0.02), less beyond 128 channels: for features of unit variance the
    logits begin within a few tenths of the bias, and unlike with a zero weight every layer gets a gradient at once.
    """
    head = nn.Linear(width, 1)
    nn.init.normal_(head.weight, std=0.02 * min(1.0, (128 / width) ** 0.5))
    nn.init.constant_(head.bias, number("output_bias", output_bias))
    return head
