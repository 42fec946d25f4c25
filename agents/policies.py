"""Policy networks (observation -> one logit per position) and the two ways to act with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.distributions import UnmaskDistribution

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Policy(nn.Module):
    """Base of the policy networks: what they read and how they are stored.

    Subclasses set ``in_keys`` (observation entries, in the order of ``forward``'s arguments), and in ``__init__`` set
    ``self.settings`` to all of its arguments, so that ``type(self)(**self.settings)`` is the same network.
    """

    in_keys: tuple[str, ...] = ("confidence", "mask", "time")
    settings: dict[str, int | float]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder`` (made if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps({"policy": type(self).__name__, **self.settings}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Policy:
        """The network stored in ``folder``, on the CPU.

        Raises:
            ValueError: a file is missing or unreadable, the configuration is of another class or has missing or unknown
                settings, or a weight is missing, unexpected or of another shape. Nothing is ever left at random.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} is not a saved policy: cannot read {_CONFIG} ({error})") from error
        if not isinstance(config, dict) or config.pop("policy", None) != cls.__name__:
            raise ValueError(f"{folder / _CONFIG} does not describe a {cls.__name__}")
        expected = set(cls().settings)
        if set(config) != expected:
            raise ValueError(
                f"{folder / _CONFIG}: missing settings {sorted(expected - set(config))}, "
                f"unknown settings {sorted(set(config) - expected)}"
            )
        policy = cls(**config)
        try:
            policy.load_state_dict(load_file(folder / _WEIGHTS), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{folder / _WEIGHTS} does not hold the weights of this {cls.__name__}: {error}"
            ) from error
        return policy


class DiTConfidence(Policy):
    """LUP's ``dit_confidence``: one DiT block over the completion, fed only with the dLLM's confidences.

    Reads the whole completion: per position its ``top_k`` largest probabilities; the block is modulated (AdaLN) by the
    time and by whether the position is still masked. At the defaults 331,265 parameters (arXiv 2512.09106).

    *Smart init* (LUP): the AdaLN projection is zero, so the block starts as the identity, and the output bias -2 starts
    at 12 % of the positions per step. LUP does not say how the output weight starts; here N(0, 0.02): the logits begin
    within a few tenths of the bias for every seed, and unlike with a zero weight every layer gets a gradient at once.

    Args:
        width: channels; ffn: hidden channels of the feed-forward part; heads: attention heads.
        top_k: confidences read per position; the observation may hold more.
        output_bias: initial logit.
        time_period: longest period of the time embedding (over 2 pi); its frequencies are 1 .. 1 / time_period. The
            default suits t in [0, 1]; LUP's own 1.0 makes all frequencies equal, so the embedding holds two values.
        absolute_positions: also add an embedding of the position to the input. Rotary attention alone (LUP) starts
            blind to position, because the block starts as the identity: equally confident positions then begin with
            equal logits, and only chance tells them apart.

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
    ):
        super().__init__()
        if heads < 1 or width < 1 or width % (2 * heads):
            raise ValueError(
                f"width={width} is not valid with heads={heads}: a multiple of 2 * heads is (rotary halves)"
            )
        if top_k < 1 or ffn < 1:
            raise ValueError(f"top_k={top_k}, ffn={ffn} are not valid: both must be >= 1")
        if not time_period > 0:
            raise ValueError(f"time_period={time_period} is not valid: it must be > 0")
        self.settings = {
            "width": width,
            "ffn": ffn,
            "heads": heads,
            "top_k": top_k,
            "output_bias": output_bias,
            "time_period": time_period,
            "absolute_positions": absolute_positions,
        }
        self.top_k, self.time_period = top_k, time_period
        self.input = nn.Linear(top_k, width)
        self.mask_embedding = nn.Embedding(2, width)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Linear(width, width) if absolute_positions else None
        self.block = DiTBlock(width, ffn, heads)
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.bias, output_bias)

    def forward(self, confidence: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """Logits float32 [.., L] from confidence [.., L, >= top_k], mask [.., L] (1 = masked) and time [.., 1]."""
        if confidence.shape[-1] < self.top_k:
            raise ValueError(
                f"this policy reads top_k={self.top_k} confidences per position but the observation has "
                f"{confidence.shape[-1]}: build the environment with top_k >= {self.top_k}"
            )
        lead, length = confidence.shape[:-2], confidence.shape[-2]
        dtype = self.head.weight.dtype
        x = self.input(confidence[..., : self.top_k].reshape(-1, length, self.top_k).to(dtype))  # (B, L, d)
        if self.place is not None:
            position = torch.arange(length, device=x.device, dtype=torch.float32)[:, None]
            x = x + self.place(sinusoid(position, x.shape[-1], 10_000.0).to(dtype))
        embedded = self.time_mlp(sinusoid(time.reshape(-1, 1), x.shape[-1], self.time_period).to(dtype))  # (B, d)
        condition = (
            embedded[:, None] + self.mask_embedding.weight
        )  # (B, 2, d): one for unmasked, one for masked positions
        x = self.block(x, condition, mask.reshape(-1, length, 1) != 0)
        return self.head(self.final_norm(x)).float().reshape(*lead, length)


class DiTBlock(nn.Module):
    """Pre-norm transformer block with AdaLN modulation and rotary positions; starts as the identity."""

    def __init__(self, width: int, ffn: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, d]; condition [B, 2, d] for mask 0 and 1; mask bool [B, L, 1]. Returns [B, L, d]."""
        # A row has only two conditions: project those (B, 2, 6d) and choose per position, a third less arithmetic.
        unmasked, masked = self.modulation(condition).chunk(2, dim=1)  # (B, 1, 6d) each
        modulation = torch.where(mask, masked, unmasked)  # (B, L, 6d)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        x = x + gate_a * self._attend(self.attention_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_f * self.ffn(self.ffn_norm(x) * (1 + scale_f) + shift_f)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d / heads)
        q, k = rotate(q), rotate(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


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
        distribution_kwargs={"temperature": temperature},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


class PolicyDecider:
    """A policy as a decider: ``decider(observation, noise) -> action``.

    Args:
        policy: the network.
        distribution_class: what its logits mean.
        temperature: divides the logits, > 0.
        greedy: take the distribution's ``deterministic_sample`` and ignore the noise.
    """

    def __init__(
        self,
        policy: Policy,
        distribution_class: type[UnmaskDistribution],
        temperature: float = 1.0,
        greedy: bool = False,
    ):
        self.policy, self.distribution_class = policy, distribution_class
        self.temperature, self.greedy = temperature, greedy

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        return self._act(observation, noise)[0]

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action int8 [.., L] and its log-probability float32 [..] (of the greedy action too)."""
        action, distribution = self._act(observation, noise)
        return action, distribution.log_prob(action)

    @torch.no_grad()
    def _act(self, observation: Mapping[str, Tensor], noise: Tensor) -> tuple[Tensor, UnmaskDistribution]:
        logits = self.policy(*(observation[key] for key in self.policy.in_keys))
        distribution = self.distribution_class(logits, observation["action_mask"], self.temperature)
        action = distribution.deterministic_sample if self.greedy else distribution.from_noise(noise)
        return action, distribution

    def __str__(self) -> str:
        how = "greedy" if self.greedy else f"temperature={self.temperature:g}"
        return f"{type(self.policy).__name__}({self.distribution_class.__name__}, {how})"
