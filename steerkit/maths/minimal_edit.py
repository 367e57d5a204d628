"""The smallest edit of a hidden state that meets bounds on linear probes.

One probe is the closed form of GCAV (arXiv:2501.05764, equations 6 and 7). For several the paper calls SciPy's SLSQP
with an L1 objective per token; here the least edit in the metric of the direction is found exactly, because the
matrix of the problem does not depend on the hidden state and can be prepared once for every row.

Bounds `sigma_k (w_k . h + b_k) >= sigma_k s_k` (sigma +1: at least, -1: at most) are met by moving along u_k:

    r_k = sigma_k (s_k - b_k - w_k . h)              how far bound k is violated
    M_kj = sigma_k sigma_j  w_k . u_j                what moving along u_j does to bound k
    z >= 0,  M z >= r,  z . (M z - r) = 0            a linear complementarity problem
    edit = sum_k sigma_k z_k u_k

With u = w this is the Euclidean projection on the polyhedron of allowed states; with u = Sigma w the projection in the
Mahalanobis metric. z >= 0 keeps a concept that nobody asked to move from driving the edit. The problem has exactly one
solution for every r when all principal minors of M are positive. A sense of 0 is an equality, with z free.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

OFF = 1e30
"""Stands for an infinite distance: a bound this far away is inactive, and products with zero stay zero."""

_DEPENDENT = 1e-9
"""A probe that adds less than this to others of norm one depends on them. Raising it refuses concepts further apart."""

_MAX_SETS = 1024
"""Active sets that are enumerated; with more, the batched pivoting takes over."""


def minimal_edit(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    logit: Tensor,
    sense: Tensor,
    direction: Tensor | None = None,
) -> Tensor:
    """Return the edit after which every probe meets its bound; zero, bit for bit, where all bounds hold already.

    For one probe, with the bound violated: `edit = (logit - bias - w . h) / (w . u) * u`. For several see the module
    docstring. Logits are computed in float32 and the small problem is solved in float64. The checks of the probes read
    a few numbers back; prepare an `EditProblem` once to solve for many rows without host synchronisation (up to 1024 active
    sets, 10 independent probes; beyond that each pivot reads one flag).

    Args:
        hidden_states: `"... d_model"`.
        weight: `"concept d_model"`, the probes' weights w.
        bias: `"concept"`.
        logit: `"... concept"` or `"concept"`, the wanted logit of each bound; infinite means no bound.
        sense: `"concept"`: +1 for at least, -1 for at most, 0 for exactly.
        direction: `"concept d_model"`, the directions u that may be moved along; by default the weights.

    Returns:
        The edit, `"... d_model"`, in float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes disagree, some `w . u <= 0`, or the probes depend on each other.
    """
    wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    direction = weight if direction is None else direction
    problem = EditProblem.build(weight.to(wide), bias, sense, direction.to(wide))
    if hidden_states.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"`hidden_states` must be (..., {weight.shape[1]}), as wide as the probes. Found shape "
            f"{tuple(hidden_states.shape)}."
        )
    readings = (*hidden_states.shape[:-1], len(weight))
    fits = logit.shape[-1:] == bias.shape and logit.ndim <= len(readings)
    if not fits or any(have not in (1, want) for have, want in zip(logit.shape[::-1], readings[::-1], strict=False)):
        raise ValueError(
            f"`logit` must be ({len(weight)},) or broadcast to {readings}. Found shape {tuple(logit.shape)}."
        )
    pair = problem.dependent_pair()
    if pair is not None:
        raise ValueError(
            f"Probes must be independent (or parallel, as in a band on one probe). Found that {pair[0]} and {pair[1]} "
            "are not. Leave one of them out."
        )
    magnitudes = problem.solve(problem.read(hidden_states), logit.to(problem.bias))
    with torch.autocast(hidden_states.device.type, enabled=False):
        return magnitudes.to(wide) @ problem.direction


@dataclass(frozen=True)
class EditProblem:
    """What is constant over rows in the problem of the module docstring, prepared once for a site."""

    weight: Tensor
    """`"concept d_model"` float32 (float64 if given so)."""
    bias: Tensor
    """`"concept"` float64."""
    sense: Tensor
    """`"concept"` float64; an equality carries +1 here and is marked in `equality`."""
    direction: Tensor
    """`"concept d_model"`."""
    equality: Tensor
    """`"concept"` bool."""
    scale: Tensor
    """`"concept"`: sqrt(M_kk). Dividing by it makes the diagonal of M one."""
    matrix: Tensor
    """`"concept concept"`: M with unit diagonal."""
    members: Tensor
    """`"set concept"` bool: which bounds are active in each candidate set; the empty set first."""
    operators: Tensor
    """`"set concept concept"`: z = operator @ r for each candidate set."""
    parallel: tuple[tuple[int, int, str], ...]
    """Pairs of probes that measure the same thing and move along the same line, and how their bounds relate."""

    @classmethod
    def build(cls, weight: Tensor, bias: Tensor, sense: Tensor, direction: Tensor | None = None) -> "EditProblem":
        """Check the shapes and prepare the candidate sets; independence is asked for with `dependent_pair`."""
        direction = weight if direction is None else direction
        per_probe = weight.shape[:1]
        if weight.ndim != 2 or direction.shape != weight.shape or bias.shape != per_probe or sense.shape != per_probe:
            raise ValueError(
                "`weight` and `direction` must be (concept, d_model), `bias` and `sense` (concept,). Found shapes "
                f"{tuple(weight.shape)}, {tuple(direction.shape)}, {tuple(bias.shape)}, {tuple(sense.shape)}."
            )
        small = torch.float32 if weight.device.type == "mps" else torch.float64
        sense = sense.to(weight.device, small)
        equality = sense == 0
        sense = torch.where(equality, torch.ones_like(sense), sense.sign())
        gain = weight.to(small) @ direction.to(small).T
        diagonal = gain.diagonal()
        if bool((diagonal <= 0).any()):
            index = int((diagonal <= 0).nonzero()[0])
            raise ValueError(
                f"A probe must rise along its own direction (w . u > 0). Found {float(diagonal[index]):.3g} for "
                f"probe {index}. Use another direction, or flip its sign."
            )
        scale = diagonal.sqrt()
        matrix = sense[:, None] * gain * sense / (scale[:, None] * scale)
        members, operators = _active_sets(matrix.cpu())
        parallel = _parallel_pairs(weight, direction, equality, matrix)
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        return cls(
            weight=weight.to(wide),
            bias=bias.to(weight.device, small),
            sense=sense,
            direction=direction.to(wide),
            equality=equality,
            scale=scale,
            matrix=matrix,
            members=members.to(weight.device),
            operators=operators.to(weight.device),
            parallel=parallel,
        )

    def to(self, device: torch.device) -> "EditProblem":
        """Return the same problem with its tensors on another device."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        if device.type == "mps":  # has no float64
            tensors = {n: part.float() if part.dtype == torch.float64 else part for n, part in tensors.items()}
        moved: dict[str, Any] = {name: part.to(device) for name, part in tensors.items()}
        return replace(self, **moved)

    def dependent_pair(self) -> tuple[int, int] | None:
        """Return two probes that cannot be bounded independently, or None.

        M must be a P-matrix, which does not depend on the senses. Of parallel probes one stands for all: a band is
        sound, and whether two bounds on one line contradict each other depends on the amounts.
        """
        second = {pair[1] for pair in self.parallel}
        kept = [k for k in range(len(self.matrix)) if k not in second]
        matrix = self.matrix.cpu()
        if len(kept) > 10:
            block = matrix[kept, :][:, kept]
            if float(torch.linalg.eigvalsh((block + block.T) / 2)[0]) > _DEPENDENT:
                return None
            groups = [tuple(kept)]
        else:
            sizes = range(2, len(kept) + 1)
            groups = [group for size in sizes for group in itertools.combinations(kept, size)]
            groups = [group for group in groups if _last_pivot(matrix, group) < _DEPENDENT][:1]
        if not groups:
            return None
        return max(itertools.combinations(groups[0], 2), key=lambda pair: abs(float(matrix[pair])))

    def read(self, hidden_states: Tensor) -> Tensor:
        """Return what each probe reads, `"... concept"`, in float32 or better without autocast, as float64."""
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = hidden_states.to(wide) @ self.weight.to(wide).T
        return logits.to(self.bias.dtype) + self.bias

    def solve(self, reading: Tensor, logit: Tensor, on: Tensor | None = None) -> Tensor:
        """Return the signed magnitude along each direction, `"... concept"`.

        Args:
            reading: what the probes read now, `"... concept"`.
            logit: the bounds, broadcastable to `reading`.
            on: `"... concept"` bool, False where a bound is left out for a row.
        """
        bound = logit.clamp(-OFF, OFF)
        on = torch.ones_like(reading, dtype=torch.bool) if on is None else on
        violation = torch.where(on, self.sense * (bound - reading), -OFF) / self.scale
        if self.parallel:
            on = self._one_of_parallel(violation, on)
            violation = torch.where(on, violation, -OFF)
        required = self.equality & on
        if len(self.members) > 0:
            solution = self._enumerate(violation, required)
        else:
            solution = _pivot(self.matrix, violation, required, self.equality)
        return self.sense * solution / self.scale

    def fixed(self, logit: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return the edit for these bounds as a few operations on `"batch pos d_model"`, or None if it takes more.

        It returns the edited states in the dtype of the directions, and is `read` and `solve` with everything that does
        not depend on the states worked out beforehand.

        Args:
            logit: `"batch concept"`, or `"1 concept"` if all rows share it.
        """
        return _one_bound(self, logit) if len(self.scale) == 1 else _several_bounds(self, logit)

    def _one_of_parallel(self, violation: Tensor, on: Tensor) -> Tensor:
        """Switch off what another bound on the same line implies: both active, they would be one equation twice."""
        kept = list(on.unbind(dim=-1))
        for i, j, relation in self.parallel:
            if relation == "first exact":
                kept[j] = kept[j] & ~kept[i]
            elif relation == "second exact":
                kept[i] = kept[i] & ~kept[j]
            elif relation == "alike":
                stricter = violation[..., i] >= violation[..., j]
                kept[i], kept[j] = kept[i] & stricter, kept[j] & ~stricter
        return torch.stack(kept, dim=-1)

    def _enumerate(self, violation: Tensor, required: Tensor) -> Tensor:
        solutions = torch.einsum("skj,...j->...sk", self.operators, violation)
        slack = solutions @ self.matrix.T - violation[..., None, :]
        # A member's slack is zero by construction; measuring it would only compare rounding errors of large bounds.
        wrong = torch.where(self.members, -solutions, -slack).clamp(min=0)
        wrong = torch.where(self.equality, 0.0, wrong).amax(dim=-1)
        misfit = ((self.members != required[..., None, :]) & self.equality).any(dim=-1)
        best = torch.where(misfit, torch.inf, wrong).argmin(dim=-1)
        return torch.take_along_dim(solutions, best[..., None, None], dim=-2)[..., 0, :]


def _one_bound(problem: EditProblem, logit: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the closed form of GCAV for these logits, `"batch 1"` or `"1 1"`, in three operations."""
    wide = problem.direction.dtype
    gain, sense = problem.scale[0] ** 2, problem.sense[0]
    rise = (-sense / gain * problem.weight).to(wide)
    short = (sense / gain * (logit[:, 0] - problem.bias[0])).to(wide)
    step = (sense * problem.direction[0]).to(wide)
    exact, shared = bool(problem.equality[0]), len(short) == 1
    missing = short if shared else short[:, None, None]
    linear, addcmul = torch.nn.functional.linear, torch.addcmul

    def bound(hidden: Tensor) -> Tensor:
        hidden = hidden.to(wide)
        length = linear(hidden, rise, missing) if shared else linear(hidden, rise).add_(missing)
        return addcmul(hidden, length if exact else length.relu_(), step)

    return bound


def _several_bounds(problem: EditProblem, logit: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the joint edit for these logits, `"batch concept"`, with everything that is linear in the state folded.

    For each candidate active set, how wrong it would be is a linear map of the violations, as is its solution.
    """
    fitting = problem.members[:, problem.equality].all(dim=-1)
    members, operators = problem.members[fitting], problem.operators[fitting]
    if len(members) == 0 or any(relation != "opposite" for *_, relation in problem.parallel):
        return None
    wide = problem.direction.dtype
    count = len(problem.scale)
    towards = problem.sense / problem.scale
    rise = (-towards[:, None] * problem.weight).to(wide)
    short = (towards * (logit - problem.bias)).to(wide)[:, None]
    step = (towards[:, None] * problem.direction).to(wide)
    eye = torch.eye(count, dtype=operators.dtype, device=operators.device)
    wrong = torch.where(members[..., None], -operators, eye - problem.matrix @ operators)
    wrong = torch.where(problem.equality[:, None], 0.0, wrong).reshape(-1, count).T.contiguous()
    moves = operators.reshape(-1, count).T.contiguous()
    shape = (len(members), count)

    def bounds(hidden: Tensor) -> Tensor:
        hidden = hidden.to(wide)
        violation = (torch.nn.functional.linear(hidden, rise) + short).to(operators.dtype)
        best = (violation @ wrong).unflatten(-1, shape).amax(dim=-1).clamp_(min=0).argmin(dim=-1)
        moved = (violation @ moves).unflatten(-1, shape)
        solution = moved.take_along_dim(best[..., None, None], dim=-2)[..., 0, :]
        return hidden + solution.to(wide) @ step

    return bounds


def _parallel_pairs(
    weight: Tensor, direction: Tensor, equality: Tensor, matrix: Tensor
) -> tuple[tuple[int, int, str], ...]:
    unit = torch.nn.functional.normalize(weight.cpu().double(), dim=-1)
    along = torch.nn.functional.normalize(direction.cpu().double(), dim=-1)
    same = ((unit @ unit.T).abs() > 1 - 1e-9) & ((along @ along.T).abs() > 1 - 1e-9)
    exact, together = equality.tolist(), matrix.cpu()

    def relation(i: int, j: int) -> str:
        if exact[i] or exact[j]:
            return "first exact" if exact[i] else "second exact"
        return "alike" if float(together[i, j]) > 0 else "opposite"

    pairs = itertools.combinations(range(len(unit)), 2)
    return tuple((i, j, relation(i, j)) for i, j in pairs if bool(same[i, j]))


def _active_sets(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return every candidate active set and its solution operator; none at all if there are too many.

    Sets whose equations are dependent are left out: a solution with an independent set always exists.
    """
    count = len(matrix)
    members: list[Tensor] = []
    operators: list[Tensor] = []
    groups = (g for size in range(count + 1) for g in itertools.combinations(range(count), size))
    dependent: list[set[int]] = []
    for group in groups:
        if any(bad <= set(group) for bad in dependent):
            continue
        operator = torch.zeros_like(matrix)
        if group:
            block = matrix[group, :][:, group]
            if abs(_last_pivot(matrix, group)) < _DEPENDENT:
                dependent.append(set(group))
                continue
            index = torch.tensor(group)
            operator[index[:, None], index] = torch.linalg.inv(block)
        members.append(torch.tensor([k in group for k in range(count)]))
        operators.append(operator)
        if len(members) > _MAX_SETS:
            return torch.zeros(0, count, dtype=torch.bool), matrix.new_zeros(0, count, count)
    return torch.stack(members), torch.stack(operators)


def _last_pivot(matrix: Tensor, group: tuple[int, ...]) -> float:
    """Return what the last of a group adds to the others, whatever their scale: the ratio of two principal minors."""
    minors = [float(torch.linalg.det(matrix[part, :][:, part])) for part in (group, group[:-1]) if part]
    return minors[0] / minors[1] if len(minors) > 1 and minors[1] != 0 else minors[0]


def _pivot(matrix: Tensor, violation: Tensor, required: Tensor, equality: Tensor) -> Tensor:
    """Principal pivoting by least index, all rows at once (Murty 1974): finite on P-matrices, one flag read a pivot."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    active = required.clone()
    while True:
        both = active[..., :, None] & active[..., None, :]
        right = torch.where(active, violation, 0.0)
        solution = torch.linalg.solve(torch.where(both, matrix, eye), right[..., None])[..., 0]
        slack = solution @ matrix.T - violation
        tolerance = 1e4 * torch.finfo(matrix.dtype).eps * (1 + right.abs().amax(dim=-1, keepdim=True))
        wrong = (torch.where(active, solution, slack) < -tolerance) & ~equality
        if not bool(wrong.any()):
            return solution
        first = torch.nn.functional.one_hot(wrong.int().argmax(dim=-1), len(matrix)).bool()
        active = active ^ (first & wrong)
