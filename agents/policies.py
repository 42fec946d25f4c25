"""Policy networks (observation -> one logit per position) and the two ways to act with them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.distributions import UnmaskDistribution
from dllm_gym.checks import flag, number, whole

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
# Settings younger than some stored policies, with what those meant.
_ADDED = {"candidates": None, "preference": False, "joint": False, "odds": 0.0, "haste": 0.0}
_NEVER = -1e6  # logit of a position that is no candidate: finite, and exp gives 0 at any sensible temperature
_DOUBT = 1e-3  # log-odds see no more certainty than this: they end at +-6.9
_CARD = """---
{{ card_data }}
---

Decides which tokens a masked diffusion language model commits at each step, for environments of dllm_gym. To load it:

```python
from agents.policies import {{ policy }}

policy = {{ policy }}.from_pretrained(...)  # this folder or repository
```
"""


class Policy(
    nn.Module,
    ModelHubMixin,
    library_name="dllm_gym",
    tags=["diffusion-language-model", "reinforcement-learning"],
    model_card_template=_CARD,
):
    """Base of the policy networks: per-position features, a linear head, and how both are stored.

    A family sets ``reads`` (the observation entries that its ``trunk`` takes, in this order), writes ``trunk``, and in
    ``__init__`` calls ``super().__init__(**arguments)`` with all of its arguments, so that
    ``type(self)(**self.settings)`` is the same network, and makes ``self.head`` (``smart_head``).

    Every family takes ``candidates`` (K): only the K most confident legal positions (the leftmost of equals) keep
    their logit, all others get one so low that they are never picked. With a categorical distribution the policy is
    then a softmax over the K most confident positions (UPO's top-K realization, arXiv 2510.05725). None: all positions.

    Attributes:
        settings: all arguments of the constructor.
        in_keys: observation entries, in the order of the arguments of ``forward`` and ``features``.
        width: channels of ``features``.
        head: the linear layer from features to logits.
        top_k: confidences per position that it reads; hidden_size: width of the hidden states that it reads (0: none).
    """

    reads: tuple[str, ...] = ("confidence", "mask", "time")
    head: nn.Linear

    def __init__(self, *, candidates: int | None, **settings: Any):
        super().__init__()
        self.settings = {**settings, "candidates": candidates}
        self.candidates = candidates
        if candidates is not None:
            whole("candidates", candidates)
        extra = () if candidates is None else ("confidence", "action_mask")
        self.in_keys = tuple(dict.fromkeys((*self.reads, *extra)))
        self.top_k: int = settings.get("top_k", int("confidence" in self.in_keys))
        self.hidden_size: int = settings.get("hidden_size", 0)

    @property
    def width(self) -> int:
        return self.head.in_features

    @property
    def requires(self) -> dict[str, int]:
        """Settings of the environment that the observation needs, as the least value of each."""
        needs = {"top_k": self.top_k, "hidden": int(self.hidden_size > 0)}
        return {name: least for name, least in needs.items() if least}

    def read(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The arguments of ``forward``.

        Raises:
            ValueError: the observation lacks one; says which setting of the environment provides it.
        """
        present = observation.keys()  # a TensorDict knows no `in`
        missing = [key for key in self.in_keys if key not in present]
        if missing:
            settings = {"hidden": "hidden=True", "preference": "alpha=[low, high]"}
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
        channels = seen["hidden"].shape[-1] if "hidden" in seen else 0
        if channels != self.hidden_size:
            raise ValueError(
                f"this policy reads hidden states of hidden_size={self.hidden_size} but the observation's have "
                f"{channels} channels: build the environment with hidden=True and a model of that width"
            )

    def trunk(self, *rows: Tensor) -> Tensor:
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
        save_file(weights, save_directory / _WEIGHTS)
        config = {"policy": type(self).__name__, **self.settings}
        (save_directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The network stored in a folder or in a repository of the Hugging Face hub, on the CPU.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a repository id.
            revision: branch, tag or commit of the repository; token, cache_dir, force_download, local_files_only: how
                it is downloaded, see ``huggingface_hub.snapshot_download``.

        Raises:
            ValueError: there is no such folder and no such repository can be read, a file is missing or unreadable, the
                configuration is of another class or has missing, unknown or invalid settings, or a weight is missing,
                unexpected or of another shape. Nothing is dropped and nothing is left at random.
        """
        # The mixin's own version would drop settings that the class does not know, hence not `_from_pretrained`.
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(
                str(source),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        policy = cls._from_config(folder / _CONFIG)
        try:
            policy.load_state_dict(load_file(folder / _WEIGHTS), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{folder / _WEIGHTS} does not hold the weights of this {cls.__name__}: {error}"
            ) from error
        return policy

    @classmethod
    def _from_config(cls, path: Path) -> Self:
        """A new network with the settings of a ``config.json``."""
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.parent} is not a saved policy: cannot read {path.name} ({error})") from error
        if not isinstance(config, dict) or config.pop("policy", None) != cls.__name__:
            raise ValueError(f"{path} does not describe a {cls.__name__}")
        expected = set(inspect.signature(cls.__init__).parameters) - {"self"}
        config = {**{name: value for name, value in _ADDED.items() if name in expected}, **config}
        if set(config) != expected:
            missing, unknown = sorted(expected - set(config)), sorted(set(config) - expected)
            raise ValueError(f"{path}: missing settings {missing}, unknown settings {unknown}")
        try:
            return cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved policy."""
        return super().generate_model_card(*args, policy=type(self).__name__, **kwargs)


def _download(repository: str, **settings: Any) -> Path:
    """The folder with a hub repository's two files."""
    try:
        return Path(snapshot_download(repository, allow_patterns=[_CONFIG, _WEIGHTS], **settings))
    except Exception as error:  # of many kinds: no such repository, no right to read it, no network, not an id at all
        raise ValueError(f"{repository!r} is no folder, and no readable repository of the hub: {error}") from error


def smart_head(width: int, output_bias: float) -> nn.Linear:
    """The layer from features to a logit per position, whose logits start near ``output_bias`` (LUP's smart init).

    LUP does not say how the weight starts. Here N(0, 0.02), less beyond 128 channels: for features of unit variance the
    logits begin within a few tenths of the bias, and unlike with a zero weight every layer gets a gradient at once.
    """
    head = nn.Linear(width, 1)
    nn.init.normal_(head.weight, std=0.02 * min(1.0, (128 / width) ** 0.5))
    nn.init.constant_(head.bias, number("output_bias", output_bias))
    return head


def joint_confidence(confidence: Tensor, legal: Tensor) -> Tensor:
    """The chance that everything surer than a position is right, were positions independent.

    At position i the product of c_j over the legal j with c_j > c_i, and over those left of i with c_j = c_i; in log
    space what the entropy-bounded sampler (arXiv 2505.24857) bounds, with -log c in place of the entropy.

    Args:
        confidence: c, float [.., L]. legal: bool [.., L], what may be unmasked now.

    Returns:
        Float [.., L] in [0, 1]; 0 where nothing may be unmasked.
    """
    value, order = confidence.masked_fill(~legal, 0).sort(dim=-1, descending=True, stable=True)
    before = torch.cat([torch.ones_like(value[..., :1]), value[..., :-1]], dim=-1).cumprod(-1)
    return torch.zeros_like(before).scatter(-1, order, before).masked_fill(~legal, 0)


class DiTConfidence(Policy):
    """LUP's ``dit_confidence``: one DiT block over the completion, fed only with the dLLM's confidences.

    Reads the whole completion: per position its ``top_k`` largest probabilities; the block is modulated (AdaLN) by the
    time and by whether the position is still masked. At the defaults 331,265 parameters (arXiv 2512.09106).

    *Smart init* (LUP): the AdaLN projection is zero, so the block starts as the identity, and the output bias -2 starts
    at 12 % of the positions per step.

    >>> sum(p.numel() for p in DiTConfidence().parameters())
    331265

    Args:
        width: channels; ffn: hidden channels of the feed-forward part; heads: attention heads.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit.
        time_period: longest period of the time embedding (over 2 pi); its frequencies are 1 .. 1 / time_period. The
            default suits t in [0, 1]; LUP's own 1.0 makes all frequencies equal, so the embedding holds two values.
        absolute_positions: also add an embedding of the position to the input. Rotary attention alone (LUP) starts
            blind to position, because the block starts as the identity: equally confident positions then begin with
            equal logits, and only chance tells them apart.
        preference: also read the ``preference`` of an environment with a range of alphas: one network for the whole
            front, whose speed is a knob at decoding time. It is embedded and added as the time is, and stands beside
            the confidences, where it can move a threshold from the start.
        joint: also read :func:`joint_confidence` at every position. From it the entropy-bounded sampler's rule (stop
            when what was taken is unsure enough as a whole) is a threshold; from the confidences alone a network has to
            sort them first, and independent picks cannot tell equals apart.
        odds: weight, >= 0, with which the log-odds of the largest confidence are added to the logits. The policy then
            begins as a soft confidence threshold and learns what to change about it; at 0 (LUP) it begins blind, and
            first has to learn that confidence matters.
        haste: weight, >= 0, with which the preference (0: quality, 1: speed) is added to the logits; needs
            ``preference``. The knob then moves the speed from the start, and with ``odds`` it moves the threshold.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is out of range, or (on call) the observation has fewer than ``top_k`` confidences.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        ffn: int = 512,
        heads: int = 2,
        top_k: int = 1,
        output_bias: float = -2.0,
        time_period: float = 0.01,
        absolute_positions: bool = False,
        preference: bool = False,
        joint: bool = False,
        odds: float = 0.0,
        haste: float = 0.0,
        candidates: int | None = None,
    ):
        _check_heads("width", width, heads)
        _check_counts(ffn=ffn, top_k=top_k)
        number("time_period", time_period, above=0)
        for name, weight in (("odds", odds), ("haste", haste)):
            number(name, weight, least=0)
        switches = {"absolute_positions": absolute_positions, "preference": preference, "joint": joint}
        for name, switch in switches.items():
            flag(name, switch)
        if haste and not preference:
            raise ValueError(f"haste={haste} weighs the preference: it needs preference=True")
        self.reads = (*type(self).reads, *["action_mask"] * joint, *["preference"] * preference)
        super().__init__(
            width=width,
            ffn=ffn,
            heads=heads,
            top_k=top_k,
            output_bias=output_bias,
            time_period=time_period,
            absolute_positions=absolute_positions,
            preference=preference,
            joint=joint,
            odds=odds,
            haste=haste,
            candidates=candidates,
        )
        self.time_period, self.joint, self.odds, self.haste = time_period, joint, odds, haste
        self.input = nn.Linear(top_k + joint + preference, width)
        self.mask_embedding = nn.Embedding(2, width)
        self.time_mlp = _time_mlp(width)
        self.preference_mlp = _time_mlp(width) if preference else None
        self.place = nn.Linear(width, width) if absolute_positions else None
        self.block = DiTBlock(width, ffn, heads)
        self.final_norm = nn.LayerNorm(width)
        self.head = smart_head(width, output_bias)

    def trunk(self, confidence: Tensor, mask: Tensor, time: Tensor, *more: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        seen = [confidence[..., : self.top_k]]
        if self.joint:
            seen.append(joint_confidence(confidence[..., 0], more[0] != 0)[..., None])
        if self.preference_mlp is not None:
            seen.append(more[-1][:, None].expand(*mask.shape, 1))
        x = self.input(torch.cat(seen, dim=-1).to(dtype))  # (B, L, d)
        if self.place is not None:
            position = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None]
            x = x + self.place(sinusoid(position, x.shape[-1], 10_000.0).to(dtype))
        condition = _condition(self.time_mlp, self.mask_embedding, sinusoid(time, x.shape[-1], self.time_period))
        if self.preference_mlp is not None:
            wish = sinusoid(more[-1], x.shape[-1], self.time_period).to(dtype)
            condition = condition + self.preference_mlp(wish)[:, None]
        return self.final_norm(self.block(x, condition, mask[..., None] != 0))

    def start(self, seen: Mapping[str, Tensor]) -> Tensor | float:
        start: Tensor | float = 0.0
        if self.odds:
            confidence = seen["confidence"][..., 0].float()  # (.., L)
            start = self.odds * confidence.clamp(_DOUBT, 1 - _DOUBT).logit()
        return start + self.haste * seen["preference"].float() if self.haste else start


class DiTHidden(Policy):
    """LUP's ablation ``dit_hidden``: a transformer block as wide as the dLLM, on its last hidden states.

    Reads the hidden states of the whole completion (nothing of the vocabulary): one DiT block whose layer norms are
    modulated (AdaLN) by the time and by whether the position is still masked, then a last layer norm modulated in the
    same way, then the head (arXiv 2512.09106). All modulation starts at zero, so the block starts as the identity.

    >>> sum(p.numel() for p in DiTHidden(hidden_size=128).parameters())
    364033

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``) and of this network.
        ffn: hidden channels of the feed-forward part; heads: attention heads.
        output_bias: initial logit.
        time_period: as in ``DiTConfidence``.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width.
    """

    reads = ("hidden", "mask", "time")

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        ffn: int = 512,
        heads: int = 2,
        output_bias: float = -2.0,
        time_period: float = 0.01,
        candidates: int | None = None,
    ):
        width = _check_hidden_size(hidden_size)
        _check_heads("hidden_size", width, heads)
        _check_counts(ffn=ffn)
        number("time_period", time_period, above=0)
        super().__init__(
            hidden_size=width,
            ffn=ffn,
            heads=heads,
            output_bias=output_bias,
            time_period=time_period,
            candidates=candidates,
        )
        self.time_period = time_period
        self.mask_embedding = nn.Embedding(2, width)
        self.time_mlp = _time_mlp(width)
        self.block = DiTBlock(width, ffn, heads)
        self.final_norm = nn.LayerNorm(width)
        self.final_modulation = _zero_modulation(width, 2)
        self.head = smart_head(width, output_bias)

    def trunk(self, hidden: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        masked = mask[..., None] != 0  # (B, L, 1)
        condition = _condition(self.time_mlp, self.mask_embedding, sinusoid(time, self.width, self.time_period))
        x = self.block(hidden.to(self.head.weight.dtype), condition, masked)  # (B, L, d)
        shift, scale = _by_mask(self.final_modulation(condition), masked).chunk(2, dim=-1)
        return self.final_norm(x) * (1 + scale) + shift


class UPOPolicy(Policy):
    """UPO's policy: a transformer layer on the dLLM's features, joined by its top probabilities, then an MLP.

    Per position the layer's output, the ``top_k`` largest probabilities and two flags (may be unmasked now; still
    masked) go through an MLP with three hidden layers (linear, layer norm, SiLU) to one logit (arXiv 2510.05725: 10
    such features beside the hidden state). It does not read the time. Differences from the authors' network: the layer
    reads the dLLM's last hidden states, not the input of its last block; it starts at random, not as a copy of that
    block; the first flag is 1 at masked positions of the active block only.

    >>> sum(p.numel() for p in UPOPolicy(hidden_size=128).parameters())
    250241

    Args:
        hidden_size: width of the dLLM's hidden states (``DLLM.hidden_size``) and of the transformer layer.
        width: channels of the MLP; the authors use hidden_size + top_k + 2.
        ffn: hidden channels of the transformer layer's feed-forward part; heads: its attention heads.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit (without effect on a categorical distribution).
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is missing or out of range, or (on call) the hidden states are of another width or there
            are fewer than ``top_k`` confidences.
    """

    reads = ("hidden", "confidence", "mask", "action_mask")

    def __init__(
        self,
        *,
        hidden_size: int | None = None,
        width: int = 128,
        ffn: int = 512,
        heads: int = 2,
        top_k: int = 8,
        output_bias: float = -2.0,
        candidates: int | None = None,
    ):
        hidden_size = _check_hidden_size(hidden_size)
        _check_heads("hidden_size", hidden_size, heads)
        _check_counts(width=width, ffn=ffn, top_k=top_k)
        super().__init__(
            hidden_size=hidden_size,
            width=width,
            ffn=ffn,
            heads=heads,
            top_k=top_k,
            output_bias=output_bias,
            candidates=candidates,
        )
        self.block = TransformerBlock(hidden_size, ffn, heads)
        self.block_norm = nn.LayerNorm(hidden_size)
        sizes = (hidden_size + top_k + 2, width, width, width)
        self.mlp = nn.Sequential(
            *(nn.Sequential(nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU()) for i, o in pairwise(sizes))
        )
        self.head = smart_head(width, output_bias)

    def trunk(self, hidden: Tensor, confidence: Tensor, mask: Tensor, action_mask: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        x = self.block_norm(self.block(hidden.to(dtype)))  # (B, L, d)
        flags = torch.stack([action_mask != 0, mask != 0], dim=-1)  # (B, L, 2)
        return self.mlp(torch.cat([x, flags.to(dtype), confidence[..., : self.top_k].to(dtype)], dim=-1))


class MLPPolicy(Policy):
    """Each position on its own, without attention: what a policy can do that compares no positions (the floor).

    A learned confidence threshold that may vary with the time: an MLP with two hidden layers on the position's
    ``top_k`` largest probabilities, its mask flag and the time.

    >>> sum(p.numel() for p in MLPPolicy().parameters())
    17153

    Args:
        width: channels.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit.
        candidates: see ``Policy``.

    Raises:
        ValueError: a setting is out of range, or (on call) the observation has fewer than ``top_k`` confidences.
    """

    def __init__(self, *, width: int = 128, top_k: int = 1, output_bias: float = -2.0, candidates: int | None = None):
        _check_counts(width=width, top_k=top_k)
        super().__init__(width=width, top_k=top_k, output_bias=output_bias, candidates=candidates)
        self.mlp = nn.Sequential(nn.Linear(top_k + 2, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = smart_head(width, output_bias)

    def trunk(self, confidence: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        flag = (mask != 0)[..., None]  # (B, L, 1)
        x = torch.cat([confidence[..., : self.top_k], flag, time[:, None].expand_as(flag)], dim=-1)  # (B, L, K + 2)
        return self.mlp(x.to(self.head.weight.dtype))


def _check_counts(**settings: int) -> None:
    for name, value in settings.items():
        whole(name, value)


def _check_heads(name: str, width: int, heads: int) -> None:
    if whole(name, width) % (2 * whole("heads", heads)):
        raise ValueError(f"{name}={width} is not valid with heads={heads}: a multiple of 2 * heads is (rotary halves)")


def _check_hidden_size(hidden_size: int | None) -> int:
    if hidden_size is None:
        raise ValueError(
            "hidden_size=None is not valid: it is the width of the dLLM's hidden states (the hidden_size of the "
            "environment's model)"
        )
    return hidden_size


class TransformerBlock(nn.Module):
    """Pre-norm transformer block with rotary positions, [B, L, d] to [B, L, d]."""

    def __init__(self, width: int, ffn: int, heads: int, modulation: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.modulation = modulation
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d / heads)
        q, k = rotate(q), rotate(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class DiTBlock(TransformerBlock):
    """Transformer block with AdaLN modulation; starts as the identity."""

    def __init__(self, width: int, ffn: int, heads: int):
        super().__init__(width, ffn, heads, _zero_modulation(width, 6))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, d]; condition [B, 2, d] for mask 0 and 1; mask bool [B, L, 1]. Returns [B, L, d]."""
        modulation = _by_mask(self.modulation(condition), mask)  # (B, L, 6d)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        x = x + gate_a * self._attend(self.attention_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_f * self.ffn(self.ffn_norm(x) * (1 + scale_f) + shift_f)


def _zero_modulation(width: int, parts: int) -> nn.Sequential:
    """The AdaLN projection of a condition [.., d] to shifts, scales and gates [.., parts * d], at first all zero."""
    projection = nn.Linear(width, parts * width)
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
    return nn.Sequential(nn.SiLU(), projection)


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


def _condition(time_mlp: nn.Module, mask_embedding: nn.Embedding, time: Tensor) -> Tensor:
    """The two conditions of a row, [B, 2, d] for unmasked and masked positions, from its embedded time [B, d]."""
    weight = mask_embedding.weight
    return time_mlp(time.to(weight.dtype))[:, None] + weight


def _by_mask(modulation: Tensor, mask: Tensor) -> Tensor:
    """Each position's own modulation [B, L, c], from those of the two conditions [B, 2, c] and mask bool [B, L, 1].

    Projecting the two conditions first and choosing then saves a third of a block's arithmetic.
    """
    unmasked, masked = modulation.chunk(2, dim=1)  # (B, 1, c) each
    return torch.where(mask, masked, unmasked)


def sinusoid(value: Tensor, width: int, period: float) -> Tensor:
    """Embedding float32 [B, width] (cosines, sines) of value [B, 1]; frequencies period ** -(i / half)."""
    half = width // 2
    frequency = period ** -(torch.arange(half, device=value.device, dtype=torch.float32) / half)
    angle = value.float() * frequency  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (RoFormer, halves convention) of x [B, heads, L, d]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency  # (L, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def make_actor(
    policy: Policy, distribution_class: type[UnmaskDistribution], temperature: float = 1.0
) -> ProbabilisticActor:
    """TorchRL actor for the losses: observation TensorDict -> ``logits``, ``action``, ``action_log_prob``.

    It shares the policy's parameters and samples from torch's global generator; rollouts use ``PolicyDecider``.
    """
    # Imported here: TorchRL takes seconds to import, and acting does not need it.
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import ProbabilisticActor

    return ProbabilisticActor(
        TensorDictModule(policy, in_keys=list(policy.in_keys), out_keys=["logits"]),
        in_keys=["logits", "action_mask"],
        out_keys=["action"],
        distribution_class=distribution_class,
        distribution_kwargs={"temperature": check_temperature(temperature)},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


def check_temperature(temperature: float) -> float:
    """``temperature`` if logits can be divided by it; ValueError otherwise."""
    number("temperature", temperature, above=0)
    return temperature


class PolicyDecider:
    """A policy as a decider: ``decider(observation, noise) -> action``.

    Args:
        policy: the network.
        distribution_class: what its logits mean.
        temperature: divides the logits, > 0.
        greedy: take the distribution's ``deterministic_sample`` and ignore the noise.
        alpha: the speed weight that evaluations ask for, where the environment has a range of them.
    """

    def __init__(
        self,
        policy: Policy,
        distribution_class: type[UnmaskDistribution],
        temperature: float = 1.0,
        greedy: bool = False,
        alpha: float | None = None,
    ):
        self.policy, self.distribution_class, self.alpha = policy, distribution_class, alpha
        self.temperature, self.greedy = check_temperature(temperature), greedy

    @property
    def requires(self) -> dict[str, int]:
        """Settings of the environment that the policy needs."""
        return self.policy.requires

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return self._act(observation, noise)[0]

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action int8 [.., L] and its log-probability float32 [..] (of the greedy action too)."""
        action, distribution = self._act(observation, noise)
        return action, distribution.log_prob(action)

    def distribution(self, observation: Mapping[str, Tensor]) -> UnmaskDistribution:
        """What the policy would draw from, with gradients where they are enabled."""
        logits = self.policy(*self.policy.read(observation))
        return self.distribution_class(logits, observation["action_mask"], self.temperature)

    @torch.no_grad()
    def _act(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, UnmaskDistribution]:
        distribution = self.distribution(observation)
        action = distribution.deterministic_sample if self.greedy else distribution.from_noise(noise)
        return action, distribution

    def __str__(self) -> str:
        how = "greedy" if self.greedy else f"temperature={self.temperature:g}"
        return f"{type(self.policy).__name__}({self.distribution_class.__name__}, {how})"
