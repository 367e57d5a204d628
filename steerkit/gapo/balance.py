"""How objectives are weighed: the settings, and the weights of one optimiser step from its gradients."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import ObjectiveError, TrainingError
from steerkit.gapo.gradients import Gradients
from steerkit.maths.pareto import check_power, check_preference, gapo_weights, split_half_gramian

ESTIMATES = ("full", "split_half")
RESCALES = ("lengths", "update", "none")
_STATIONARY = 1e-6
"""Length of the update, relative to what it is summed from, under which it is rounding."""


@dataclass
class BalanceConfig:
    """What GAPO adds to a trainer's arguments, and the defaults that it changes."""

    power: float = field(
        default=1.0,
        metadata={"help": "p of the norm that each gradient is divided by; at least 0. 1 gives alike pulls."},
    )
    preference: list[float] | None = field(
        default=None, metadata={"help": "One share for each objective, of sum 1: P-GAPO, which has no common descent."}
    )
    weighting: Any = field(
        default="gapo",
        metadata={
            "help": "'gapo'; 'mgda': p = 0; 'linear': fixed weights; 'gdpo' (online): TRL's normalise-then-sum; or a "
            "callable from the Gramian to weights, such as TorchJD's."
        },
    )
    gram_scope: str | None = field(
        default=None,
        metadata={"help": "What the Gramian is taken over: 'trainable', 'lora', 'last_block' or a pattern of names."},
    )
    gram_estimate: str = field(
        default="full",
        metadata={
            "help": "'split_half': angles from products across two halves of the samples, which noise does not turn."
        },
    )
    rescale: str = field(
        default="lengths",
        metadata={
            "help": "'lengths': the weighted sum of the gradients' lengths is that of the linear update, so that the learning "
            "rate means the same for every p, and conflict shortens the step; 'update': the update has the length of the linear "
            "one, also where objectives cancel; 'none': the paper's."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Less memory for one more forward pass an objective; off, other than TRL's."}
    )
    report_to: str | list[str] = field(default="none", metadata={"help": "Nothing leaves the machine unless asked."})
    logging_steps: float = field(default=1, metadata={"help": "Every step is logged."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Where there is a device to copy to."}
    )

    def check_balance(self, weightings: Sequence[str]) -> None:
        """Raise ObjectiveError for settings that say nothing or contradict each other."""
        try:
            check_power(self.power)
            if self.preference is not None:
                check_preference(self.preference)
        except ValueError as error:
            raise ObjectiveError(str(error)) from error
        for name, known in (("gram_estimate", ESTIMATES), ("rescale", RESCALES), ("weighting", weightings)):
            value = getattr(self, name)
            if not (isinstance(value, str) and value in known) and not (name == "weighting" and callable(value)):
                raise ObjectiveError(f"{name} must be one of {', '.join(known)}. Found {value!r}.")
        if self.preference is not None and (self.power != 1 or self.weighting != "gapo"):
            raise ObjectiveError(
                "A preference asks for P-GAPO, which has power=1 and weighting='gapo'. Found "
                f"power={self.power} and weighting={self.weighting!r}. Leave one of them out."
            )
        if self.weighting == "mgda" and self.power not in (0, 1):
            raise ObjectiveError(
                f"Plain multiple-gradient descent has power 0. Found {self.power}. Use weighting='gapo'."
            )

    def check_distribution(self, args: Any) -> None:
        """Raise TrainingError for what keeps gradients to itself: TRL's arguments of sharding and loss scaling."""
        sharded = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
        if args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in (
            "1",
            "true",
            "yes",
        ):
            raise TrainingError(
                "GAPO needs one gradient for each objective. Found DeepSpeed, whose engine keeps gradients to itself. Use DDP."
            )
        if sharded:
            raise TrainingError(
                "GAPO needs one gradient for each objective. Found FSDP: sharded parameters give none outside their own "
                "backward pass. Use DDP."
            )
        checkpointing = args.gradient_checkpointing_kwargs
        if args.gradient_checkpointing and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise TrainingError(
                "Several gradients of one pass need non-reentrant checkpointing: the reentrant kind refuses every backward "
                "pass that names its parameters. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if args.auto_find_batch_size:
            raise TrainingError(
                "A smaller batch would end in the middle of a group or turn. Found auto_find_batch_size."
            )
        if args.fp16:
            raise TrainingError("Norms of gradients overflow under fp16's loss scaling. Found fp16=True. Use bf16.")

    def check_count(self, count: int) -> None:
        """Raise ObjectiveError for a preference of another length than there are objectives."""
        try:
            if self.preference is not None:
                check_preference(self.preference, count)
        except ValueError as error:
            raise ObjectiveError(str(error)) from error


@dataclass(frozen=True)
class Update:
    """The weights of one optimiser step, and what its gradients look like."""

    weights: tuple[float, ...]
    """One for each objective, as they are applied; all 0: no step."""
    gramian: Tensor
    """`"objective objective"`, of the whole batch."""
    signal: Tensor | None
    """`"objective"`, cosine of each objective's gradients over two halves of the samples; None with one half."""
    dropped: tuple[bool, ...]
    """Which objectives had no advantages and left the problem."""
    progress: tuple[float, ...]
    """`<d, g_i>`: by how much each objective improves, to first order, for each unit of step."""
    norm: float
    """Length of the update d over the scope."""

    @property
    def step(self) -> bool:
        """Whether there is an update at all."""
        return self.norm > 0 and any(weight != 0 for weight in self.weights)

    @property
    def applied(self) -> tuple[float, ...]:
        """The weights of the step, 0 where there is none."""
        return self.weights if self.step else (0.0,) * len(self.weights)

    def figures(self, names: Sequence[str]) -> dict[str, float]:
        """Return what is logged, by name."""
        norms = self.gramian.diagonal().clamp(min=0).sqrt().tolist()
        alive = [norm for norm in norms if norm > 0]
        found = {
            "gapo/norm_ratio": max(alive) / min(alive) if alive else math.nan,
            "gapo/update_norm": self.norm,
            # Below rounding, an angle has no sign.
            "gapo/opposed": float(
                any(p < -_STATIONARY * norm * self.norm for p, norm in zip(self.progress, norms, strict=True))
            ),
            "gapo/no_step": float(not self.step),
        }
        for i, name in enumerate(names):
            found[f"gapo/weight/{name}"] = self.weights[i]
            found[f"gapo/norm/{name}"] = norms[i]
            found[f"gapo/progress/{name}"] = self.progress[i]
            found[f"gapo/dropped/{name}"] = float(self.dropped[i])
            if self.signal is not None:
                found[f"gapo/signal/{name}"] = float(self.signal[i])
            for j in range(i + 1, len(names)):
                if norms[i] and norms[j]:
                    found[f"gapo/cosine/{name}/{names[j]}"] = float(self.gramian[i, j]) / norms[i] / norms[j]
        return found


@dataclass(frozen=True)
class Balance:
    """A way of weighing a number of objectives.

    Args:
        config: the settings.
        linear: weights of the linear update, whose length is the measure of every other.
        names: of the objectives.

    Raises:
        ObjectiveError: weights that are not finite, or for anything but a linear update below 0 or all 0.
    """

    config: BalanceConfig
    linear: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        fine = all(map(math.isfinite, self.linear))
        if self.config.weighting not in ("linear", "gdpo"):
            fine = fine and min(self.linear) >= 0 and max(self.linear) > 0
        if not fine:
            raise ObjectiveError(
                f"Weights of objectives must be finite, at least 0, and not all 0. Found {list(self.linear)}. For a cost, let "
                "the objective itself return its negative."
            )

    @property
    def power(self) -> float:
        """The p of the norm; 0 for plain multiple-gradient descent."""
        return 0.0 if self.config.weighting == "mgda" else self.config.power

    def update(self, gradients: Gradients, silent: Sequence[bool] | None = None, own: int | None = None) -> Update:
        """Return the weights of a step.

        Args:
            gradients: of the objectives, and perhaps more behind them.
            silent: which objectives have no advantages: for p above 0 they leave the problem.
            own: index of a gradient that is the update itself, whatever the weights are.

        Raises:
            ObjectiveError: a custom weighting returned another number of weights, or negative or infinite ones.
        """
        count = len(self.linear)
        products = gradients.products()
        gramian = products[:count, :count]
        if not bool(products.diagonal().isfinite().all()):
            index = int((~products.diagonal().isfinite()).nonzero()[0])
            name = self.names[index] if index < count else "the update"
            raise TrainingError(
                f"Gradients must be finite. Found NaN or infinity in that of {name!r}. Lower the learning rate, or look at its "
                "rewards."
            )
        leaves = self.config.weighting not in ("linear", "gdpo", "mgda") and not (
            self.config.weighting == "gapo" and self.power == 0
        )
        gone = [leaves and each for each in silent or [False] * count]
        signal, estimate = None, gramian.clone()
        if gradients.split:
            across = gradients.products(0, 1)[:count, :count]
            lengths = [gradients.products(half, half).diagonal()[:count] for half in (0, 1)]
            signal = across.diagonal() / (lengths[0] * lengths[1]).sqrt().clamp(min=1e-300)
            if self.config.gram_estimate == "split_half" and bool((signal > 0).any()):
                estimate = split_half_gramian(gramian, across)
                # With no signal measured, 0 would be a length, not a point where plain descent stops.
                gone = [each or own <= 0 for each, own in zip(gone, signal.tolist(), strict=True)]
        dropped = tuple(gone) if self.config.weighting not in ("linear", "gdpo") else (False,) * count
        weights = self._weights(estimate, [index for index, out in enumerate(dropped) if not out])
        weights = self._rescaled(weights, gramian)
        if own is None:
            progress, norm = gramian @ weights, math.sqrt(max(float(weights @ gramian @ weights), 0.0))
        else:
            progress, norm = products[:count, own], math.sqrt(max(float(products[own, own]), 0.0))
        return Update(tuple(weights.tolist()), gramian, signal, dropped, tuple(progress.tolist()), norm)

    def _weights(self, gramian: Tensor, live: Sequence[int]) -> Tensor:
        weighting = self.config.weighting
        if weighting in ("linear", "gdpo"):
            return torch.tensor(self.linear, dtype=torch.float64)
        weights = torch.zeros(len(self.linear), dtype=torch.float64)
        if not live:
            return weights
        index = torch.tensor(live)
        part = gramian[index][:, index]
        if not callable(weighting):
            # P-GAPO weighs each objective by itself, so the others keep their shares; a zero gradient gets none.
            if self.config.preference is not None:
                whole = torch.zeros_like(gramian)
                whole[index[:, None], index] = part
                return gapo_weights(whole, preference=self.config.preference)
            weights[index] = gapo_weights(part, power=self.power)
            return weights
        found = torch.as_tensor(weighting(part)).detach().double().flatten().cpu()
        if len(found) != len(live) or not bool(found.isfinite().all()) or bool((found < 0).any()):
            raise ObjectiveError(
                f"A weighting must return one weight of at least 0 for each of {len(live)} objectives. Found {found.tolist()}."
            )
        weights[index] = found
        return weights

    def _rescaled(self, weights: Tensor, gramian: Tensor) -> Tensor:
        if self.config.weighting in ("linear", "gdpo"):
            return weights
        norms = gramian.diagonal().clamp(min=0).sqrt()
        square, lengths = float(weights @ gramian @ weights), float(weights @ norms)
        if square <= (_STATIONARY * lengths) ** 2:
            return torch.zeros_like(weights)
        linear = torch.tensor(self.linear, dtype=torch.float64)
        if self.config.rescale == "lengths":
            return weights * (float(linear @ norms) / lengths)
        if self.config.rescale == "update":
            return weights * math.sqrt(max(float(linear @ gramian @ linear), 0.0) / square)
        return weights


def reduced(gradients: Gradients, accelerator: Any) -> Gradients:
    """Average gradients over processes, so that all of them solve the same problem."""
    if accelerator.num_processes > 1:

        def total(values: Tensor) -> Tensor:
            summed: Tensor = accelerator.reduce(values.to(accelerator.device, torch.float32), reduction="sum")
            return summed.double().cpu()

        mean: Callable[[Tensor], Tensor] = lambda each: accelerator.reduce(each, reduction="mean")  # noqa: E731
        gradients.reduce(mean, total)
    return gradients


def no_loss(device: torch.device) -> Tensor:
    """Return a loss that reaches no parameter: their gradients stay as they are, and an optimiser leaves None alone."""
    return torch.zeros((), device=device, requires_grad=True)
