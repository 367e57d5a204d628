"""The interventions: where each acts, with what amount, and what it does at one site."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple, Self, TypeAlias, final

import torch
from torch import Tensor

from steerkit.conditions import Condition, Reading, Scaled, Schedule, checked
from steerkit.errors import AmountError, BaseModelMismatchError, ConditionError, LayerError
from steerkit.intervention.amounts import Amounts, shown
from steerkit.maths.lowrank import Delta, transposed
from steerkit.maths.minimal_edit import OFF
from steerkit.model import Decoder, Fingerprint
from steerkit.types import POSITIONS, Amount, Positions


class Site(NamedTuple):
    """Where an edit acts: on what a decoder block returns, or on what a linear module returns."""

    layer: int | None
    """The decoder block; None for a module outside the blocks."""
    module: str | None = None
    """Path of a linear module in the base model; None for the block itself."""
    transposed: bool = False
    """Whether the module keeps its weight as `"output input"`, as `torch.nn.Linear` does."""


class Shift(NamedTuple):
    """At one site: move along a direction by the amount."""

    direction: Tensor


class Bound(NamedTuple):
    """At one site: hold a probe's logit at least (+1), at most (-1) or exactly (0) at the amount."""

    weight: Tensor
    bias: float
    direction: Tensor
    sense: int
    cap: float | None = None


class Change(NamedTuple):
    """At one linear module: add the amount times `x @ weight + bias`."""

    weight: Delta | None
    """`"input output"`"""
    bias: Tensor | None
    """`"output"`"""


Part: TypeAlias = Shift | Bound | Change


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """What to do, where, and how much; made by `Concept.add`, `.erase` and `.constrain` and by `PreferenceVector.add`."""

    name: str
    """The key for `Controller.using` and `Controller.magnitudes`; unique within a Controller."""
    layers: tuple[int, ...]
    """Decoder blocks at or in which it acts, in order."""
    positions: Positions
    amount: Amount | Scaled
    fingerprint: Fingerprint | None = field(repr=False)
    """The base model that it was made on."""
    condition: Condition | None = field(default=None, kw_only=True)
    """What must hold of a prompt for its sample to be edited; made by `when`."""
    schedule: Schedule | None = field(default=None, kw_only=True)
    """What is left of it as tokens are generated; made by `scheduled`."""

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise AmountError(
                f"`positions` must be one of {', '.join(POSITIONS)}. Found {self.positions!r}. Choose one."
            )
        self.read(self.amount)

    def when(self, condition: Condition) -> Self:
        """Return the same for the samples whose prompt meets a condition; the others are bit for bit what they were.

            harmless.add(1.0).when(harmful_request.reads(at_least=0.5, layer=12))

        The plain model reads the prompt once, in a pass of its own before anything is edited, which costs one prefill. What
        it decides holds for all that is generated (CAST, arXiv:2409.05907, with a calibrated probability for its cosine).
        A bare forward pass is all prompt, and passes that continue its cache keep to what it decided, until other prompts
        begin. Given twice, both must hold.

        Raises:
            ConditionError: no condition, or a reading without a bound.
        """
        condition = checked(condition)
        return replace(self, condition=condition if self.condition is None else self.condition & condition)

    def scheduled(self, schedule: Schedule) -> Self:
        """Return the same with a share of it left at each step of generation: `stop_after`, `linear`, `exponential`.

            sentiment.add(4.0).scheduled(exponential(half_life=20))

        Step 0 is the prompt, whose last token yields the first new one; the t-th new token is step t. A bare forward pass
        is all prompt; one that continues a cache outside of generate is refused.

        Raises:
            ConditionError: no schedule, a second one, positions that it leaves nothing at, or a bound or an erasure (which hold
                or do not) with a schedule that fades.
        """
        if not isinstance(schedule, Schedule):
            raise ConditionError(f"A schedule is required. Found {type(schedule).__name__}. Use stop_after(20).")
        if self.schedule is not None:
            raise ConditionError(f"{self.name!r} can have one schedule. Found {self.schedule}. Leave one out.")
        if self.positions == "prompt":
            raise ConditionError(
                f"A schedule runs over new tokens. Found {self.name!r} at positions='prompt', where it would change nothing. "
                "Use other positions, or leave it out."
            )
        later = schedule.factor(torch.tensor([1, 2**31 - 1]))
        if self.positions == "generated" and not bool(later.any()):
            raise ConditionError(
                f"A schedule must leave something after the prompt. Found {schedule} for {self.name!r} at positions='generated', "
                "which begin at step 1. Use stop_after(2) or more, or positions='last'."
            )
        if not schedule.whole and not self.graded:
            raise ConditionError(
                f"A bound or an erasure holds or does not. Found {schedule} for {self.name!r}. Use stop_after, or concept.add "
                "for a dose that fades."
            )
        return replace(self, schedule=schedule)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What must be read of the prompts before it can act."""
        scaled = [self.amount.reading] if isinstance(self.amount, Scaled) else []
        return (*([] if self.condition is None else self.condition.readings), *scaled)

    @property
    def graded(self) -> bool:
        """Whether a share of its amount means anything."""
        return True

    @property
    @abstractmethod
    def off(self) -> float:
        """The amount, as `read` returns it, that edits nothing."""

    def read(self, amount: Amount | Scaled) -> Amounts:
        """Return an amount in the unit of the edit, checked: a magnitude, or a logit for a bound."""
        if not isinstance(amount, Scaled):
            return self._read(amount)
        for end in (amount.low, amount.high, (amount.low + amount.high) / 2):
            self._read(end)
        return self.nothing._replace(scaled=amount)

    @property
    def nothing(self) -> Amounts:
        """Amounts that edit nothing."""
        return Amounts(torch.full((1, max(len(self.layers), 1)), self.off, dtype=torch.float64), None)

    @abstractmethod
    def _read(self, amount: Amount) -> Amounts:
        """Read an amount that is known beforehand."""

    def decided(self, amounts: Amounts, read: Mapping[Reading, Tensor]) -> Amounts:
        """Return what is left of amounts for as many samples as were read: what follows a reading, and off where gated."""
        if amounts.scaled is not None:
            amounts = self._read(amounts.scaled.of(read))
        if self.condition is None:
            return amounts
        holds = self.condition.holds(read)
        return Amounts(torch.where(holds[:, None], amounts.values, self.off), len(holds))

    @abstractmethod
    def check(self, decoder: Decoder) -> None:
        """Raise unless it fits this model: its depth, its widths, the names that it speaks of."""

    @abstractmethod
    def sites(self, decoder: Decoder) -> tuple[Site, ...]:
        """Return where it edits what a module puts out."""

    @abstractmethod
    def at(self, site: Site) -> Part:
        """Return what it does at one site."""

    def column(self, values: Tensor, layer: int | None) -> Tensor:
        """Return the amounts at one layer, `"sample"`, from `Amounts.values`; outside the blocks all layers agree."""
        return values[:, 0 if layer is None else self.layers.index(layer)]

    def _check_layers(self, decoder: Decoder) -> None:
        for layer in self.layers:
            if layer >= decoder.depth:
                raise LayerError(
                    f"Layer {layer} of {self.name!r} does not exist: the model has {decoder.depth} decoder blocks "
                    f"(0..{decoder.depth - 1}). Fit it on this model, or choose other layers.",
                    layer=layer,
                    depth=decoder.depth,
                )


@dataclass(frozen=True, eq=False)
class ResidualIntervention(Intervention):
    """One that acts on the residual stream after decoder blocks."""

    directions: Mapping[int, Tensor] = field(repr=False)
    """`"d_model"`, by layer: the unit direction that it moves along."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream that it acts on."""
        return len(self.directions[self.layers[0]])

    def check(self, decoder: Decoder) -> None:
        if self.d_model != decoder.d_model:
            raise BaseModelMismatchError(
                f"{self.name!r} acts on a residual stream of width {self.d_model}, this model's has "
                f"{decoder.d_model}. Fit it on this model."
            )
        self._check_layers(decoder)

    def sites(self, decoder: Decoder) -> tuple[Site, ...]:
        return tuple(Site(layer) for layer in self.layers)


@final
@dataclass(frozen=True, eq=False)
class Addition(ResidualIntervention):
    """`h' = h + m u`: a constant step along a unit direction, m in units of the residual stream."""

    @property
    def off(self) -> float:
        return 0.0

    def _read(self, amount: Amount) -> Amounts:
        return Amounts.read(amount, self.layers, "magnitude")

    def at(self, site: Site) -> Shift:
        assert site.layer is not None
        return Shift(self.directions[site.layer])


@final
@dataclass(frozen=True, eq=False)
class Erasure(ResidualIntervention):
    """`h' = h - (u . h) u`: the component along a unit direction is removed; the amount is 1 (on) or 0 (off)."""

    @property
    def graded(self) -> bool:
        return False

    @property
    def off(self) -> float:
        return 0.0

    def _read(self, amount: Amount) -> Amounts:
        amounts = Amounts.read(amount, self.layers, self.name)
        if not bool(((amounts.values == 0) | (amounts.values == 1)).all()):
            raise AmountError(f"An erasure is on (1) or off (0). Found {shown(amounts.values)}. Use `add` for a dose.")
        return amounts

    def at(self, site: Site) -> Bound:
        assert site.layer is not None
        direction = self.directions[site.layer]
        return Bound(direction, 0.0, direction, 0)


@final
@dataclass(frozen=True, eq=False)
class Constraint(ResidualIntervention):
    """`P(h') <= p` or `P(h') >= p` by the least edit along a direction; rows that hold it already are untouched.

    GCAV, arXiv:2501.05764, equations 6 and 7, with any direction u for which w . u > 0.
    """

    sense: int
    """+1: at least, -1: at most."""
    weights: Mapping[int, Tensor] = field(repr=False)
    biases: Mapping[int, float] = field(repr=False)
    max_magnitude: float | None = None
    """Largest edit, as a fraction of the norm of the hidden state; a capped row is out of the promise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.max_magnitude
        if cap is not None and not (isinstance(cap, Real) and math.isfinite(cap) and cap > 0):
            raise AmountError(
                f"`max_magnitude` must be a positive fraction of the residual norm. Found {cap!r}. Try 0.1."
            )

    @property
    def graded(self) -> bool:
        return False

    @property
    def off(self) -> float:
        return -self.sense * OFF

    def _read(self, amount: Amount) -> Amounts:
        word = "at_least" if self.sense > 0 else "at_most"
        amounts = Amounts.read(amount, self.layers, word)
        probability = amounts.values
        if bool(((probability < 0) | (probability > 1)).any()):
            raise AmountError(f"`{word}` must be a probability. Found {shown(probability)}. Use 0 <= {word} <= 1.")
        never = 1.0 if self.sense > 0 else 0.0
        if bool((probability == never).any()):
            raise AmountError(
                f"`{word}={never:g}` asks for an infinite edit. A bound strictly inside (0, 1) is required. "
                f"Use for example {word}={abs(never - 1e-3):g}."
            )
        logit = torch.logit(probability).clamp(-OFF, OFF)
        return Amounts(logit, amounts.samples)

    def at(self, site: Site) -> Bound:
        layer = site.layer
        assert layer is not None
        return Bound(self.weights[layer], self.biases[layer], self.directions[layer], self.sense, self.max_magnitude)


@final
@dataclass(frozen=True, eq=False)
class WeightAddition(Intervention):
    """`W' = W + m dW` for every weight that a preference vector changes, m a magnitude for each sample and layer.

    Preference Vector, arXiv:2504.20106, equation 5. Where a linear module puts out `y = x @ W.T`, the change is added to
    what it puts out, `y' = y + m (x @ dW.T)`, so that rows of one batch have different weights. What is no linear module's
    (norms, embeddings, experts kept as one tensor) takes a magnitude that all samples share, written into the weights
    while a Controller is attached.
    """

    deltas: Mapping[str, Delta] = field(repr=False)
    """Changes by parameter name in the base model, each of its parameter's shape."""
    layer_of: Mapping[str, int | None] = field(repr=False)
    """The decoder block that each parameter lies in; None outside the blocks."""

    @property
    def off(self) -> float:
        return 0.0

    def _read(self, amount: Amount) -> Amounts:
        amounts = Amounts.read(amount, self.layers or (0,), "magnitude")
        outside = next((name for name, layer in self.layer_of.items() if layer is None), None)
        if outside is not None and bool((amounts.values != amounts.values[:, :1]).any()):
            raise AmountError(
                f"A magnitude for each layer needs every changed parameter in a layer. Found {outside!r} outside the "
                "decoder blocks. Pass one magnitude a sample, or leave it out: vector.only(layers=vector.layers)."
            )
        return amounts

    def check(self, decoder: Decoder) -> None:
        self._check_layers(decoder)
        for name, delta in self.deltas.items():
            shape = decoder.shapes.get(name)
            if shape is None or shape != delta.shape:
                found = "no parameter of that name" if shape is None else f"one of shape {tuple(shape)}"
                raise BaseModelMismatchError(
                    f"{self.name!r} changes {name!r} of shape {tuple(delta.shape)}. This model has {found}. Use it on the "
                    "model it was made from."
                )

    def sites(self, decoder: Decoder) -> tuple[Site, ...]:
        found: dict[str, Site] = {}
        for name in self.deltas:
            path = name.rpartition(".")[0]
            if name in decoder.reachable:
                found[path] = Site(self.layer_of[name], path, decoder.reachable[name])
        return tuple(found.values())

    def at(self, site: Site) -> Change:
        weight, bias = self.deltas.get(f"{site.module}.weight"), self.deltas.get(f"{site.module}.bias")
        if weight is not None and site.transposed:
            weight = transposed(weight)
        assert bias is None or isinstance(bias, Tensor)
        return Change(weight, bias)
