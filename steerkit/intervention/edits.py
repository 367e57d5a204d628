"""What is done at a site: all interventions there together, prepared once and applied as pure functions.

At a decoder block: additions in the order of the list, then every constraint and erasure as one problem, so that after the
edit each of them holds. At a linear module: all changes of its weight as one pair of products. Nothing here knows about
hooks, which is why the same edit runs in a hook, inside a trace and in a test without a model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerkit.errors import AmountError, DependentConceptsError
from steerkit.intervention.kinds import Bound, Change, Intervention, Shift, Site
from steerkit.maths.lowrank import Stack
from steerkit.maths.minimal_edit import OFF, EditProblem
from steerkit.types import Where


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
            magnitude = _by_position(amounts[i])
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
            magnitude = _by_position(amount)
            magnitudes.append(torch.where(here, magnitude, 0.0) if isinstance(here, Tensor) else magnitude)
        if all(m is None for m in magnitudes):
            return output, magnitudes
        none = torch.zeros(1, 1, device=output.device)
        each = [(none if m is None else m).expand(rows, length) for m in magnitudes]
        with torch.autocast(output.device.type, enabled=False):
            edited = self.mixture(torch.stack(each, dim=-1).view(rows * length, len(each)))(input, output)
        return edited, magnitudes


def _by_position(amount: Tensor) -> Tensor:
    """Return `"batch pos"` from `"batch"` or from itself, float32."""
    return amount.float() if amount.ndim == 2 else amount.float()[:, None]


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
        amounts: one `"batch"` (or one-entry) tensor an intervention, in the unit of `Intervention.read`; `"batch pos"` for a
            magnitude that a schedule changes from position to position.
        where: which positions to edit, `"batch pos"` or True, for all interventions or for each.
        state: returned as it came: conditions are amounts and schedules follow from positions, so nothing is carried on.
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
