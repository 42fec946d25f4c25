"""TorchRL losses under the mean the papers use (over an episode's steps, then over episodes), and steps along them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.objectives import ClipPPOLoss

from dllm_gym.checks import number, whole

if TYPE_CHECKING:
    from torchrl.modules import ProbabilisticActor


def pack(batch: TensorDictBase, keep: Tensor | None = None, summed: bool = False) -> TensorDict:
    """The active steps of a batch of episodes, one after the other, each with its ``weight`` in the mean.

    Args:
        batch: [E, T] with ``active`` bool [E, T].
        keep: bool [E], episodes to keep. The others still count in the mean: leaving out episodes whose loss has no
            gradient (advantage 0) is then a pure saving.
        summed: sum over an episode's steps instead of their mean.

    Returns:
        TensorDict [N] with ``weight`` float [N] = 1 / (E * active steps of the episode), or 1 / E if ``summed``;
        without ``active``.
    """
    active = batch["active"]  # (E, T)
    steps_of = torch.ones_like(active[:, :1], dtype=torch.long) if summed else active.sum(-1, keepdim=True)
    weight = 1 / (active.shape[0] * steps_of.clamp_min(1)).expand_as(active)
    chosen = active if keep is None else active & keep[:, None]
    steps = batch.exclude("active")[chosen]
    return steps.set("weight", weight[chosen])


class EpisodeMean:
    """Mixin for a TorchRL loss module: reduces every ``loss_*`` entry of packed steps [N] as sum(loss * weight).

    The input is what ``pack`` returns, or any part of it: the losses of parts add up to the loss of the whole. Other
    entries (``clip_fraction``, ``kl_approx``, ..) are plain means over the steps given. ``ESS`` is left out: it
    compares steps of unrelated states and does not add up over parts.

    >>> class GRPOLoss(EpisodeMean, ClipPPOLoss): ...
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "reduction": "none"})

    def forward(self, steps: TensorDictBase) -> TensorDict:
        weight = steps["weight"]  # (N,)
        out = super().forward(steps)  # type: ignore[misc]  # of the loss that it is mixed into
        reduced = {
            k: (v.reshape(weight.shape) * weight).sum() if k.startswith("loss_") else v
            for k, v in out.items()
            if k != "ESS"
        }
        return TensorDict(reduced)


class GRPOLoss(EpisodeMean, ClipPPOLoss):
    """The clipped objective with one ratio per step, weighted by a given ``advantage`` [N, 1] (LUP).

    The ratio and its clip to 1 - e .. 1 + e are TorchRL's, in the ``forward`` of ``ClipPPOLoss``.

    Built as ``GRPOLoss(actor, None, clip_epsilon=0.5, entropy_bonus=False, functional=False)``.
    """


# ---- settings in the words of TorchRL's losses ----


def check_clip(clip_epsilon: float | Sequence[float]) -> float | tuple[float, float]:
    """``clip_epsilon`` in the form that TorchRL takes; ValueError if it is out of range."""
    single = isinstance(clip_epsilon, int | float) and not isinstance(clip_epsilon, bool)
    pair: Any = (clip_epsilon, clip_epsilon) if single else clip_epsilon
    numbers = (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(e, int | float) and not isinstance(e, bool) for e in pair)
    )
    if not numbers or not 0 < pair[0] < 1 or not 0 < pair[1] < (1 if single else float("inf")):
        raise ValueError(f"clip_epsilon={clip_epsilon!r} is not valid: in (0, 1), or a pair [low in (0, 1), high > 0]")
    return float(pair[0]) if single else (float(pair[0]), float(pair[1]))


def entropy_settings(entropy_scale: float, actor: ProbabilisticActor) -> dict[str, Any]:
    """The entropy bonus in the words of TorchRL's losses."""
    number("entropy_scale", entropy_scale, least=0)
    distribution = actor[-1].distribution_class
    if entropy_scale and distribution.entropy is Distribution.entropy:
        # TorchRL would estimate it from samples, a value without a useful gradient.
        raise ValueError(f"entropy_scale={entropy_scale}: {distribution.__name__} has no closed-form entropy, use 0")
    return {"entropy_bonus": entropy_scale > 0, "entropy_coeff": entropy_scale}


# ---- what TorchRL has no loss for ----


class Likelihood(nn.Module):
    """Weighted log-likelihood of the actions taken: the ``loss_<name>`` of what TorchRL has no loss for.

    (TorchRL's ``BCLoss`` reads an integer action as a class label, which an unmask vector is not.)

    Args:
        actor: TorchRL actor.
        name: of the entry that is returned.
        coefficient: entry of the steps, float [N]: what -log pi(action) is multiplied with; None: 1.
    """

    def __init__(self, actor: ProbabilisticActor, name: str, coefficient: str | None = None):
        super().__init__()
        self.actor, self.name, self.coefficient = actor, name, coefficient

    def forward(self, steps: TensorDictBase) -> TensorDict:
        loss = -log_likelihood(self.actor, steps)  # (N,)
        if self.coefficient:
            loss = loss * steps[self.coefficient]
        return TensorDict({f"loss_{self.name}": (loss * steps["weight"]).sum()})


class ReferenceKL(nn.Module):
    """KL(pi || reference), estimated from the actions taken by r - log r - 1 with r = reference / pi.

    The estimator is unbiased on actions of the current policy and never negative (Schulman, "Approximating KL
    divergence", 2020; used by GRPO, arXiv 2402.03300, eq. 4). ``steps`` hold ``reference_log_prob`` float [N].
    """

    def __init__(self, actor: ProbabilisticActor):
        super().__init__()
        self.actor = actor

    def forward(self, steps: TensorDictBase) -> TensorDict:
        log_r = steps["reference_log_prob"] - log_likelihood(self.actor, steps)  # (N,)
        kl = log_r.exp() - log_r - 1
        return TensorDict({"loss_kl": (kl * steps["weight"]).sum(), "kl": kl.detach().mean()})


class Regularized(nn.Module):
    """A loss plus ``scale`` times another over the same steps."""

    def __init__(self, loss: nn.Module, other: nn.Module, scale: float):
        super().__init__()
        self.losses, self.scale = nn.ModuleList([loss, other]), scale

    def forward(self, steps: TensorDictBase) -> TensorDict:
        entries, others = (dict(loss(steps).items()) for loss in self.losses)
        return TensorDict(entries | {k: v * self.scale if k.startswith("loss_") else v for k, v in others.items()})


def log_likelihood(actor: ProbabilisticActor, steps: TensorDictBase) -> Tensor:
    """log pi(action | observation) float32 [N] under the actor as it is now."""
    return actor.get_dist(steps.select(*actor.in_keys)).log_prob(steps["action"])


@torch.no_grad()
def in_chunks(function: Callable[[TensorDictBase], Tensor], steps: TensorDictBase, chunk: int | None) -> Tensor:
    """``function`` of all steps [N], at most ``chunk`` of them at once, without gradients."""
    return torch.cat([function(part) for part in steps.split(chunk or max(len(steps), 1))])


class Descent:
    """Full-batch gradient steps on a loss over packed steps; what every algorithm does once its loss is defined.

    Args:
        loss: module of packed steps [N] -> TensorDict whose ``loss_*`` entries add up over parts (``EpisodeMean``).
        optimizer: factory, parameters -> optimizer (in Hydra: ``_partial_: true``).
        scheduler: factory, optimizer -> learning-rate scheduler, or None for a constant rate.
        epochs: gradient steps per round.
        max_grad_norm: the gradient is scaled down to this norm.
        chunk: most steps in one forward (bounds memory; the gradient is that of the whole), or None.

    Raises:
        ValueError: ``epochs``, ``max_grad_norm`` or ``chunk`` is not positive.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        epochs: int = 1,
        max_grad_norm: float = 0.2,
        chunk: int | None = None,
    ):
        whole("epochs", epochs)
        if max_grad_norm != math.inf:  # which clips nothing
            number("max_grad_norm", max_grad_norm, above=0)
        if chunk is not None:
            whole("chunk", chunk)
        self.loss, self.epochs, self.max_grad_norm, self.chunk = loss, epochs, max_grad_norm, chunk
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.parameters)
        for group in self.optimizer.param_groups:
            number("optimizer.lr", float(group["lr"]), least=0)
        self.scheduler = scheduler(self.optimizer) if scheduler else None

    def run(
        self, steps: TensorDictBase, renew: Callable[[TensorDictBase], object] = lambda steps: None
    ) -> dict[str, float]:
        """A round: ``epochs`` gradient steps over ``steps`` [N], none if there are no steps.

        Args:
            renew: called before each gradient step, for entries of ``steps`` that depend on the current parameters.

        Returns:
            Metrics of the last gradient step (absent if there was none), ``gradient_steps`` and the round's
            ``learning_rate``.
        """
        metrics: dict[str, float] = {}
        epochs = self.epochs if len(steps) else 0
        for _ in range(epochs):
            renew(steps)
            metrics = self.step(steps)
        return {**metrics, "gradient_steps": float(epochs), "learning_rate": self.end_round()}

    def backward(self, steps: TensorDictBase) -> dict[str, Tensor]:
        """Set the gradient of the summed ``loss_*`` over ``steps`` [N]; returns ``loss`` and the other entries."""
        self.optimizer.zero_grad()
        total: dict[str, Tensor] = {}
        for part in steps.split(self.chunk or len(steps)):
            out = self.loss(part)
            loss = sum(v for k, v in out.items() if k.startswith("loss_"))
            loss.backward()
            for key, value in {"loss": loss, **out}.items():
                _accumulate(total, key, value.detach(), len(part) / len(steps))
        return total

    def step(self, steps: TensorDictBase) -> dict[str, float]:
        """One optimizer step over ``steps`` [N]; returns metrics, ``grad_norm`` before clipping among them."""
        metrics = self.backward(steps)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        return {key: float(value) for key, value in metrics.items()}

    def end_round(self) -> float:
        """Advance the schedule by one round (one batch of episodes); returns the learning rate the round had."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.scheduler:
            with warnings.catch_warnings():
                # A first round without any gradient step is legitimate, PyTorch warns about it.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()
        return learning_rate

    def state_dict(self) -> dict:
        # Parameters only: a TorchRL loss keeps settings (clip_epsilon, ..) in buffers, and those are the new run's.
        parameters = {name: p.detach() for name, p in self.loss.named_parameters()}
        scheduler = self.scheduler.state_dict() if self.scheduler else None
        return {"parameters": parameters, "optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the parameters differ in name or shape, or only one of the two has a scheduler."""
        own, saved = dict(self.loss.named_parameters()), state["parameters"]
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
            raise ValueError("the saved parameters differ from this network's in name or shape")
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ValueError("the saved run and this one differ in having a learning-rate scheduler")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
            # A run that is extended goes on at the rate that its new schedule has here.
            for group, base, factor in zip(
                self.optimizer.param_groups,
                self.scheduler.base_lrs,
                getattr(self.scheduler, "lr_lambdas", []),
                strict=False,
            ):
                group["lr"] = base * factor(self.scheduler.last_epoch)


def _accumulate(total: dict[str, Tensor], key: str, value: Tensor, share: float) -> None:
    """Fold one part's entry into the total: losses add, extremes compare, means are weighted by the part's share."""
    if key.startswith("loss"):
        total[key] = total.get(key, 0) + value
    elif key.startswith("max_"):
        total[key] = torch.maximum(total.get(key, value), value)
    else:
        total[key] = total.get(key, 0) + share * value
