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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

OFF = 1e30
"""Stands for an infinite distance: a bound this far away is inactive, and products with zero stay zero."""

_DEPENDENT = 1e-9
"""Normalised principal minors below this count as zero. Raising it refuses concepts that are further apart."""

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
    docstring. Logits are computed in float32 and the small problem is solved in float64. Runs without host
    synchronisation up to 10 independent probes (1024 active sets); beyond that each pivot reads one flag.

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
    problem = EditProblem.build(weight, bias, sense, direction)
    pair = problem.dependent_pair()
    if pair is not None:
        raise ValueError(
            f"Probes must be independent (or parallel, as in a band on one probe). Found that {pair[0]} and {pair[1]} "
            "are not. Leave one of them out."
        )
    magnitudes = problem.solve(problem.read(hidden_states), logit.to(problem.bias))
    return magnitudes.to(problem.direction.dtype) @ problem.direction


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
        )

    def to(self, device: torch.device) -> "EditProblem":
        """Return the same problem with its tensors on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})

    def dependent_pair(self) -> tuple[int, int] | None:
        """Return two probes that cannot be bounded independently, or None.

        M must be a P-matrix, which does not depend on the senses. Pairs that are parallel in weight and direction
        are left to the caller: one band on one probe is sound, and whether two bounds on it contradict each other
        depends on the amounts.
        """
        matrix = self.matrix.cpu()
        count = len(matrix)
        parallel = self.parallel_pairs()
        worst = (1.0, (0, 1))
        if count <= 10:
            groups = (g for size in range(2, count + 1) for g in itertools.combinations(range(count), size))
            for group in groups:
                if any(pair in parallel for pair in itertools.combinations(group, 2)):
                    continue
                minor = float(torch.linalg.det(matrix[group, :][:, group]))
                if minor < worst[0]:
                    worst = (minor, group)  # type: ignore[assignment]
            if worst[0] >= _DEPENDENT:
                return None
        else:
            symmetric = (matrix + matrix.T) / 2
            if not parallel and float(torch.linalg.eigvalsh(symmetric)[0]) > _DEPENDENT:
                return None
            worst = (0.0, tuple(range(count)))  # type: ignore[assignment]
        group = worst[1]
        return max(itertools.combinations(group, 2), key=lambda pair: abs(float(matrix[pair])))

    def parallel_pairs(self) -> set[tuple[int, int]]:
        """Return the pairs of probes that measure the same thing and move along the same line."""
        unit = torch.nn.functional.normalize(self.weight.double().cpu(), dim=-1)
        along = torch.nn.functional.normalize(self.direction.double().cpu(), dim=-1)
        same = ((unit @ unit.T).abs() > 1 - 1e-9) & ((along @ along.T).abs() > 1 - 1e-9)
        return {(i, j) for i, j in itertools.combinations(range(len(unit)), 2) if bool(same[i, j])}

    def read(self, hidden_states: Tensor) -> Tensor:
        """Return what each probe reads, `"... concept"`, in float32 without autocast, as float64."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = hidden_states.to(self.weight.dtype) @ self.weight.T
        return logits.to(self.bias.dtype) + self.bias

    def solve(self, reading: Tensor, logit: Tensor, on: Tensor | None = None) -> Tensor:
        """Return the signed magnitude along each direction, `"... concept"`.

        Args:
            reading: what the probes read now, `"... concept"`.
            logit: the bounds, broadcastable to `reading`.
            on: `"... concept"` bool, False where a bound is left out for a row.
        """
        bound = logit.clamp(-OFF, OFF)
        violation = self.sense * (bound - reading)
        if on is not None:
            violation = torch.where(on, violation, -OFF)
        violation = violation / self.scale
        required = self.equality.expand(violation.shape) if on is None else self.equality & on
        if len(self.members) > 0:
            solution = self._enumerate(violation, required)
        else:
            solution = _pivot(self.matrix, violation, required, self.equality)
        return self.sense * solution / self.scale

    def _enumerate(self, violation: Tensor, required: Tensor) -> Tensor:
        solutions = torch.einsum("skj,...j->...sk", self.operators, violation)
        slack = solutions @ self.matrix.T - violation[..., None, :]
        # A member's slack is zero by construction; measuring it would only compare rounding errors of large bounds.
        wrong = torch.where(self.members, -solutions, -slack).clamp(min=0)
        wrong = torch.where(self.equality, 0.0, wrong).amax(dim=-1)
        misfit = ((self.members != required[..., None, :]) & self.equality).any(dim=-1)
        best = torch.where(misfit, torch.inf, wrong).argmin(dim=-1)
        return torch.take_along_dim(solutions, best[..., None, None], dim=-2)[..., 0, :]


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
            if abs(float(torch.linalg.det(block))) < _DEPENDENT:
                dependent.append(set(group))
                continue
            index = torch.tensor(group)
            operator[index[:, None], index] = torch.linalg.inv(block)
        members.append(torch.tensor([k in group for k in range(count)]))
        operators.append(operator)
        if len(members) > _MAX_SETS:
            return torch.zeros(0, count, dtype=torch.bool), matrix.new_zeros(0, count, count)
    return torch.stack(members), torch.stack(operators)


def _pivot(matrix: Tensor, violation: Tensor, required: Tensor, equality: Tensor) -> Tensor:
    """Principal pivoting by least index, all rows at once (Murty 1974): finite on P-matrices, one flag read a pivot."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    active = required.clone()
    while True:
        both = active[..., :, None] & active[..., None, :]
        right = torch.where(active, violation, 0.0)
        solution = torch.linalg.solve(torch.where(both, matrix, eye), right[..., None])[..., 0]
        slack = solution @ matrix.T - violation
        tolerance = 1e-12 * (1 + right.abs().amax(dim=-1, keepdim=True))
        wrong = (torch.where(active, solution, slack) < -tolerance) & ~equality
        if not bool(wrong.any()):
            return solution
        first = torch.nn.functional.one_hot(wrong.int().argmax(dim=-1), len(matrix)).bool()
        active = active ^ (first & wrong)
