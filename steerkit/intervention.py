"""What may be done to a module's output, as pure functions: the one abstraction that a Controller knows.

An `Intervention` says where it acts (sites, positions), with what amount, and what it does there. All interventions
of one site are applied together by `edit_site`. At a decoder block: additions in the order of the list, then every
constraint and erasure as one problem, so that after the edit each of them holds. At a linear module: all changes of its
weight as one pair of products. Nothing here knows about hooks, which is why the same edit runs in a hook, inside a trace
and in a test without a model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor

from steerkit.errors import AmountError, BaseModelMismatchError, DependentConceptsError, LayerError
from steerkit.maths.lowrank import Delta, Stack, transposed
from steerkit.maths.minimal_edit import OFF, EditProblem
from steerkit.model import Decoder, Fingerprint
from steerkit.types import POSITIONS, Amount, Positions, Where


class Site(NamedTuple):
    """Where an edit acts: on what a decoder block returns, or on what a linear module returns."""

    layer: int | None
    """The decoder block; None for a module outside the blocks."""
    module: str | None = None
    """Path of a linear module in the base model; None for the block itself."""
    transposed: bool = False
    """Whether the module keeps its weight as `"output input"`, as `torch.nn.Linear` does."""


class Amounts(NamedTuple):
    """An amount as numbers: what each sample gets at each layer."""

    values: Tensor
    """`"sample layer"` float64; one row if all samples share it."""
    samples: int | None
    """How many samples it was given for; None if all share it."""

    @classmethod
    def read(cls, amount: Amount, layers: Sequence[int], name: str) -> "Amounts":
        """Return a number, `"sample"`, `"sample layer"` or `{layer: number or "sample"}` in one shape.

        Raises:
            AmountError: another shape, other layers, NaN or infinity.
        """
        if isinstance(amount, Mapping):
            if set(amount) != set(layers):
                raise AmountError(
                    f"`{name}` must name the layers it acts on, {tuple(layers)}. Found {tuple(amount)}. "
                    "Give each layer its amount."
                )
            columns = [cls.read(amount[layer], [layer], name) for layer in layers]
            counts = {column.samples for column in columns if column.samples is not None}
            if len(counts) > 1:
                raise AmountError(f"`{name}` must have as many values at each layer. Found {sorted(counts)} samples.")
            samples = next(iter(counts), None)
            return cls(torch.cat([c.values.expand(samples or 1, 1) for c in columns], dim=1), samples)
        values = _numbers(amount, name)
        if not bool(values.isfinite().all()):
            raise AmountError(f"`{name}` must be finite. Found {_shown(values)}. Use 0 (or a bound of 0 or 1) for off.")
        if values.ndim == 0:
            return cls(values.expand(1, len(layers)).clone(), None)
        if values.ndim == 1 and len(values) > 0:
            return cls(values[:, None].expand(-1, len(layers)).clone(), len(values))
        if values.ndim == 2 and len(values) > 0 and values.shape[1] == len(layers):
            return cls(values.clone(), len(values))
        raise AmountError(
            f"`{name}` must be a number, (samples,), or (samples, {len(layers)}) for layers {tuple(layers)}. Found "
            f"shape {tuple(values.shape)}. Pass one value a sample, or one a sample and layer.",
            shape=tuple(values.shape),
        )


def _numbers(amount: Any, name: str) -> Tensor:
    try:
        if isinstance(amount, str | bytes) or amount is None:
            raise TypeError(type(amount).__name__)
        amount = float(amount) if isinstance(amount, Real) and not isinstance(amount, bool) else amount
        found = torch.as_tensor(amount)
        if found.dtype == torch.bool or found.is_complex():
            raise TypeError(f"values of {found.dtype}")
        exact = found if isinstance(amount, Tensor) else torch.as_tensor(amount, dtype=torch.float64)
        return exact.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AmountError(
            f"`{name}` must be a number. Found {amount!r:.60}. Pass a float, a tensor, or {{layer: number}}."
        ) from error


def _shown(values: Tensor) -> str:
    shown = ", ".join(f"{value:g}" for value in values.flatten()[:8].tolist())
    return f"[{shown}{', ...' if values.numel() > 8 else ''}]"


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
    amount: Amount
    fingerprint: Fingerprint | None = field(repr=False)
    """The base model that it was made on."""

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise AmountError(
                f"`positions` must be one of {', '.join(POSITIONS)}. Found {self.positions!r}. Choose one."
            )
        self.read(self.amount)

    @property
    @abstractmethod
    def off(self) -> float:
        """The amount, as `read` returns it, that edits nothing."""

    @abstractmethod
    def read(self, amount: Amount) -> Amounts:
        """Return an amount in the unit of the edit, checked: a magnitude, or a logit for a bound."""

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

    def read(self, amount: Amount) -> Amounts:
        return Amounts.read(amount, self.layers, "magnitude")

    def at(self, site: Site) -> Shift:
        assert site.layer is not None
        return Shift(self.directions[site.layer])


@final
@dataclass(frozen=True, eq=False)
class Erasure(ResidualIntervention):
    """`h' = h - (u . h) u`: the component along a unit direction is removed; the amount is 1 (on) or 0 (off)."""

    @property
    def off(self) -> float:
        return 0.0

    def read(self, amount: Amount) -> Amounts:
        amounts = Amounts.read(amount, self.layers, self.name)
        if not bool(((amounts.values == 0) | (amounts.values == 1)).all()):
            raise AmountError(f"An erasure is on (1) or off (0). Found {_shown(amounts.values)}. Use `add` for a dose.")
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
    def off(self) -> float:
        return -self.sense * OFF

    def read(self, amount: Amount) -> Amounts:
        word = "at_least" if self.sense > 0 else "at_most"
        amounts = Amounts.read(amount, self.layers, word)
        probability = amounts.values
        if bool(((probability < 0) | (probability > 1)).any()):
            raise AmountError(f"`{word}` must be a probability. Found {_shown(probability)}. Use 0 <= {word} <= 1.")
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

    def read(self, amount: Amount) -> Amounts:
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


class SiteEdit:
    """All interventions after one block, prepared: what does not depend on rows or amounts is computed once."""

    def __init__(self, interventions: Sequence[Intervention], layer: int, device: torch.device | None = None) -> None:
        parts = [intervention.at(Site(layer)) for intervention in interventions]
        self.names = [intervention.name for intervention in interventions]
        self.layer = layer
        self.shifts = [
            (i, part.direction.float().clone().to(device)) for i, part in enumerate(parts) if isinstance(part, Shift)
        ]
        self.bounds = [i for i, part in enumerate(parts) if isinstance(part, Bound)]
        self.problem: EditProblem | None = None
        self.erasures: list[int] = []
        self.caps: Tensor | None = None
        bounds = [part for part in parts if isinstance(part, Bound)]
        if bounds:
            self.problem = EditProblem.build(
                torch.stack([bound.weight.float() for bound in bounds]),
                torch.tensor([bound.bias for bound in bounds]),
                torch.tensor([bound.sense for bound in bounds]),
                torch.stack([bound.direction.float() for bound in bounds]),
            )
            self._refuse_dependent(self.problem)
            self.problem = self.problem.to(device) if device is not None else self.problem
            self.erasures = [k for k, bound in enumerate(bounds) if bound.sense == 0]
            if any(bound.cap is not None for bound in bounds):
                caps = [math.inf if bound.cap is None else bound.cap for bound in bounds]
                self.caps = torch.tensor(caps, dtype=torch.float32, device=device)

    def to(self, device: torch.device) -> None:
        """Move the prepared tensors."""
        self.shifts = [(i, direction.to(device)) for i, direction in self.shifts]
        self.problem = None if self.problem is None else self.problem.to(device)
        self.caps = None if self.caps is None else self.caps.to(device)

    def _refuse_dependent(self, problem: EditProblem) -> None:
        pair = problem.dependent_pair()
        if pair is None:
            return
        first, second = (self.names[self.bounds[k]] for k in pair)
        raise DependentConceptsError(
            f"Bounds at one layer must be independent. Found that {first!r} and {second!r} are not at layer {self.layer}: "
            "moving one moves the other as much. Leave one out, or put them at different layers.",
            pair=(first, second),
            layer=self.layer,
        )

    def refuse_contradiction(self, amounts: Sequence[Tensor]) -> None:
        """Raise if bounds on parallel probes leave no room between them; amounts are `"sample"` in the edit's unit."""
        problem = self.problem
        if problem is None:
            return
        for first, second, _ in problem.parallel:
            axis = F.normalize(problem.weight[first].double().cpu(), dim=0)
            low, high = torch.tensor(-math.inf), torch.tensor(math.inf)
            for k in (first, second):
                slope = float(problem.weight[k].double().cpu() @ axis)
                amount = amounts[self.bounds[k]]
                exact = bool(problem.equality[k])
                place = ((torch.zeros_like(amount) if exact else amount) - float(problem.bias[k])) / slope
                upwards = float(problem.sense[k]) * slope > 0
                off = amount == 0 if exact else amount.abs() >= OFF
                if exact or upwards:
                    low = torch.maximum(low, torch.where(off, -math.inf, place))
                if exact or not upwards:
                    high = torch.minimum(high, torch.where(off, math.inf, place))
            if bool((low > high + 1e-9 * (1 + high.abs())).any()):
                names = tuple(self.names[self.bounds[k]] for k in (first, second))
                raise DependentConceptsError(
                    f"Bounds on one probe must leave room between them. Found that {names[0]!r} and {names[1]!r} "
                    f"contradict each other at layer {self.layer}. Move one bound, leave one out, or use other layers.",
                    pair=names,
                    layer=self.layer,
                )

    def edit(
        self, output: Tensor, amounts: Sequence[Tensor], where: Sequence[Where]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the edited `"batch pos d_model"` and each intervention's signed magnitudes, `"batch pos"` or None."""
        magnitudes: list[Tensor | None] = [None] * len(self.names)
        with torch.autocast(output.device.type, enabled=False):
            hidden = self._shift(output, amounts, where, magnitudes)
            hidden = self._meet_bounds(hidden, amounts, where, magnitudes)
        return hidden, magnitudes

    def _shift(
        self, hidden: Tensor, amounts: Sequence[Tensor], where: Sequence[Where], magnitudes: list[Tensor | None]
    ) -> Tensor:
        steps: list[Tensor] = []
        touched: list[Tensor] = []
        for i, direction in self.shifts:
            here = where[i]
            if here is False:
                continue
            magnitude = amounts[i].float()[:, None]
            if isinstance(here, Tensor):
                touched.append(here)
                magnitude = torch.where(here, magnitude, 0.0)
            magnitudes[i] = magnitude
            steps.append(magnitude[..., None] * direction)
        if not steps:
            return hidden
        moved = hidden + sum(steps[1:], steps[0]).to(hidden.dtype)
        if len(touched) < len(steps):
            return moved
        return torch.where(torch.stack(torch.broadcast_tensors(*touched)).any(dim=0)[..., None], moved, hidden)

    def _meet_bounds(
        self, hidden: Tensor, amounts: Sequence[Tensor], where: Sequence[Where], magnitudes: list[Tensor | None]
    ) -> Tensor:
        problem = self.problem
        if problem is None or all(where[i] is False for i in self.bounds):
            return hidden
        reading = problem.read(hidden)
        logit = torch.stack(torch.broadcast_tensors(*(amounts[i] for i in self.bounds)), dim=-1)[:, None]
        on = torch.ones_like(reading, dtype=torch.bool)
        for k, i in enumerate(self.bounds):
            on[..., k] &= where[i]
        if self.erasures:
            kept = torch.ones_like(logit, dtype=torch.bool)
            kept[..., self.erasures] = logit[..., self.erasures] != 0
            on = on & kept
            logit = torch.where(problem.equality, 0.0, logit)
        wide = torch.promote_types(hidden.dtype, problem.direction.dtype)
        signed = problem.solve(reading, logit, on).to(wide)
        if self.caps is not None:
            limit = self.caps * hidden.to(wide).norm(dim=-1, keepdim=True)
            signed = self._within(limit, signed, reading, logit, on)
        for k, i in enumerate(self.bounds):
            magnitudes[i] = signed[..., k]
        edited = (hidden.to(wide) + signed @ problem.direction.to(wide)).to(hidden.dtype)
        return torch.where((signed != 0).any(dim=-1, keepdim=True), edited, hidden)

    def _within(self, limit: Tensor, signed: Tensor, reading: Tensor, logit: Tensor, on: Tensor) -> Tensor:
        """Hold magnitudes at their caps and solve for the others anew: a cap releases its own bound and no other."""
        problem = self.problem
        assert problem is not None
        effect = problem.direction.to(reading) @ problem.weight.to(reading).T
        fixed, free = torch.zeros_like(reading), on
        for _ in self.bounds:
            over = free & (signed.abs() > limit)
            fixed = torch.where(over, signed.sign() * limit, fixed)
            free = free & ~over
            signed = (problem.solve(reading + fixed @ effect, logit, free) + fixed).to(signed)
        return torch.minimum(torch.maximum(signed, -limit), limit)

    def everywhere(self, amounts: Sequence[Tensor], like: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return the edit of every position with these amounts as a few tensor operations, or None if it takes more.

        This is what decoding runs for each layer and token. It equals `edit` up to the rounding of one logit.
        """
        vector: Tensor | None = None
        if self.shifts:
            steps = [amounts[i].float()[:, None, None] * direction for i, direction in self.shifts]
            vector = sum(steps[1:], steps[0]).to(like.dtype)
            vector = vector[0, 0] if len(vector) == 1 else vector
        if self.problem is None:
            return None if vector is None else lambda hidden: hidden + vector
        off = any(bool((amounts[self.bounds[k]] == 0).any()) for k in self.erasures)
        if self.caps is not None or off or like.dtype == torch.float64:
            return None
        logit = torch.stack(torch.broadcast_tensors(*(amounts[i] for i in self.bounds)), dim=-1)
        logit = torch.where(self.problem.equality, 0.0, logit)
        bound = self.problem.fixed(logit)
        if bound is None:
            return None
        wide, narrow = self.problem.direction.dtype, like.dtype
        whole = bound if vector is None else lambda hidden: bound(hidden + vector)
        return whole if wide == narrow else lambda hidden: whole(hidden).to(narrow)


class LinearEdit:
    """All changes of one linear module, prepared for one device and dtype."""

    def __init__(
        self, interventions: Sequence[Intervention], site: Site, device: torch.device, dtype: torch.dtype
    ) -> None:
        changes = [intervention.at(site) for intervention in interventions]
        assert all(isinstance(change, Change) for change in changes)
        weighty = [(v, c.weight) for v, c in enumerate(changes) if isinstance(c, Change) and c.weight is not None]
        biased = [(v, c.bias) for v, c in enumerate(changes) if isinstance(c, Change) and c.bias is not None]
        self.device, self.dtype = device, dtype
        self.stack = Stack([delta for _, delta in weighty])
        self.stack.to(device, dtype)
        self._weighty = [v for v, _ in weighty]
        self._biased = [v for v, _ in biased]
        self._biases = torch.stack([bias for _, bias in biased]).to(device, dtype) if biased else None

    def mixture(self, coefficients: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `input, output -> output` for coefficients `"group intervention"`; a batch divides into the groups."""
        coefficients = coefficients.to(self.dtype)
        product = self.stack.mixture(coefficients[:, self._weighty]) if self._weighty else None
        bias = None if self._biases is None else (coefficients[:, self._biased] @ self._biases)[:, None]

        def mixed(input: Tensor, output: Tensor) -> Tensor:
            flat = output.reshape(-1, output.shape[-1])
            if product is not None:
                flat = product(input.reshape(-1, input.shape[-1]).to(flat.dtype), flat)
            if bias is not None:
                flat = (flat.view(len(bias), -1, flat.shape[-1]) + bias).view(flat.shape)
            return flat.view(output.shape)

        return mixed

    def edit(
        self, input: Tensor, output: Tensor, amounts: Sequence[Tensor], where: Sequence[Where]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the edited `"batch pos output"` and each intervention's magnitudes, `"batch pos"` or None."""
        rows, length = output.shape[:2]
        magnitudes: list[Tensor | None] = []
        for amount, here in zip(amounts, where, strict=True):
            if here is False:
                magnitudes.append(None)
                continue
            magnitude = amount.float()[:, None]
            magnitudes.append(torch.where(here, magnitude, 0.0) if isinstance(here, Tensor) else magnitude)
        if all(m is None for m in magnitudes):
            return output, magnitudes
        none = torch.zeros(1, 1, device=output.device)
        each = [(none if m is None else m).expand(rows, length) for m in magnitudes]
        with torch.autocast(output.device.type, enabled=False):
            edited = self.mixture(torch.stack(each, dim=-1).view(rows * length, len(each)))(input, output)
        return edited, magnitudes


def edit_site(
    interventions: Sequence[Intervention],
    input: Any,
    output: Tensor,
    amounts: Sequence[Tensor],
    where: Where | Sequence[Where],
    state: Any = None,
    *,
    layer: int | None = None,
    site: Site | None = None,
) -> tuple[Tensor, Any]:
    """Return a site's output as all its interventions together leave it, and the state for the next forward pass.

    Args:
        interventions: those that act at the site, in the order of the Controller's list.
        input: what the module was given, `"batch pos input"`; only changes of weights need it.
        output: `"batch pos output"`, after a block `"batch pos d_model"`.
        amounts: one `"batch"` (or one-entry) tensor an intervention, in the unit of `Intervention.read`.
        where: which positions to edit, `"batch pos"` or True, for all interventions or for each.
        state: what a condition or a schedule carries on; returned as it came for the kinds above.
        layer: the decoder block whose output this is; by default the one layer that all interventions name.
        site: the linear module whose output this is, for changes of weights.
    """
    each = [where] * len(interventions) if isinstance(where, bool | Tensor) else list(where)
    if site is not None and site.module is not None:
        edit = LinearEdit(interventions, site, output.device, output.dtype)
        return edit.edit(input, output, amounts, each)[0], state
    layer = layer if site is None else site.layer
    if layer is None:
        shared = set.intersection(*(set(each.layers) for each in interventions))
        if len(shared) != 1:
            raise AmountError(f"`layer` must be named where interventions share {len(shared)} layers. Pass layer=.")
        [layer] = shared
    edited, _ = SiteEdit(interventions, layer, output.device).edit(output, amounts, each)
    return edited, state
