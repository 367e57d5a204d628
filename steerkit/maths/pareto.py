"""From the Gramian of several objectives' gradients to the weights of their losses.

With gradients g_i as rows, `G_ij = <g_i, g_j>` and norms `n_i = sqrt(G_ii)`:

    MGDA     alpha = argmin over the simplex of || sum_i alpha_i g_i ||^2
    GAPO     the same with g_i / n_i^p in the place of g_i; the loss of objective i is weighted by alpha_i / n_i^p
    P-GAPO   lambda_i / n_i, with the user's preference lambda on the simplex: nothing is solved

The update `d = sum_i w_i g_i` of the first two opposes no objective, and `<d, g_i> = ||d||^2 n_i^p` for every objective
with alpha_i > 0: progress in proportion to the p-th power of the norm. (arXiv:2507.01915: section 3, theorems 3.1 and
3.3, equation 8.)

The min-norm point is what `minimal_edit` solves, with gradients as probes: the shortest d with `<d, g_i> >= 1` is
`sum_i z_i g_i` with `z >= 0, G z >= 1, z . (G z - 1) = 0`, and alpha is z over its sum. Two things differ: gradients may
have 0 in their hull, where no such d exists, and there is one small problem a step, for which a call of a tensor library
costs more than the arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING = 1e-14
"""Relative size under which a sum of products is rounding."""

_SLACK = 1e-3
"""By how much a cosine may leave [-1, 1]: products of gradients in a narrow dtype do. Gramians further off are refused."""


def gapo_weights(gramian: Tensor, *, power: float = 1.0, preference: Sequence[float] | Tensor | None = None) -> Tensor:
    """Return the weights w of the objectives' losses: `alpha_i / n_i^power`, or `preference_i / n_i` (P-GAPO).

    GAPO and P-GAPO, arXiv:2507.01915. A power of 0 is plain MGDA, 1 takes unit gradients, 2 inverts their lengths. Where
    gradients are orthogonal, `w_i` is proportional to `n_i^(power - 2)`: 1 gives all objectives the same pull `w_i n_i`,
    2 the same weight, which is linear scalarisation. The weights are not rescaled: `sum_i w_i g_i` is the paper's update, of length about `n^(1 - power)`.

    A zero gradient has no direction: with a power above 0 its objective gets weight 0 and leaves the problem. With power
    0 the point is Pareto-stationary, and the zero gradients get all the weight, so that the update is zero.

    P-GAPO is no descent for all: with two objectives, objective i gets worse where their cosine is under
    `-preference_i / preference_j`.

    Args:
        gramian: `"objective objective"`, inner products of the gradients.
        power: the p of the norm that each gradient is divided by; at least 0.
        preference: at least 0, of sum 1; asks for P-GAPO, which has power 1.

    Returns:
        `"objective"`, float64, on the Gramian's device.

    Raises:
        ValueError: the Gramian is not square, finite, symmetric and positive semidefinite; the power is negative or not
            finite; the preference is not on the simplex, is of another length, or comes with another power.
    """
    check_power(power)
    products = _products(gramian)
    count = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(count)]
    if preference is not None:
        wanted = check_preference(preference, count)
        if power != 1:
            raise ValueError(
                f"P-GAPO divides by the norm itself: a preference needs power=1. Found power={power}. Leave one of both."
            )
        weights = [share / norm if norm else 0.0 for share, norm in zip(wanted, norms, strict=True)]
    else:
        weights = [0.0] * count
        alive = [i for i in range(count) if norms[i] > 0]
        if power == 0 and len(alive) < count:
            weights = [0.0 if norm else 1 / (count - len(alive)) for norm in norms]
        elif alive:
            cosines = [[products[i][j] / norms[i] / norms[j] for j in alive] for i in alive]
            for i, share in zip(alive, _min_norm(cosines, [norms[i] for i in alive], 1 - power), strict=True):
                weights[i] = _over_power(share, norms[i], power)
    return torch.tensor(weights, dtype=torch.float64, device=gramian.device)


def min_norm_point(gramian: Tensor) -> Tensor:
    """Return the point alpha of the simplex where `alpha^T G alpha` is least: MGDA's weights.

    Multiple-gradient descent (Desideri, 2012), exact to rounding: active sets in float64, for any number of objectives
    and any scales. `(G alpha)_i >= alpha^T G alpha` for every i, with equality where alpha_i > 0.

    Args:
        gramian: `"objective objective"`.

    Returns:
        `"objective"`, float64.

    Raises:
        ValueError: as `gapo_weights`.
    """
    return gapo_weights(gramian, power=0.0)


def split_half_gramian(gramian: Tensor, across: Tensor) -> Tensor:
    """Return the Gramian with its angles taken from products across two halves of the batch.

    Noise adds its variance to a gradient's squared length, and objectives that are measured on the same samples share it;
    noise of two halves is independent. With S the symmetrised products across, `S_ij / sqrt(S_ii S_jj)` is therefore the
    cosine without noise. Lengths stay those of the whole batch: the length without noise of an objective that is nothing but
    noise is 0, and dividing by it would hand that objective the update. Where `S_ii <= 0` the halves agree on nothing, and
    row and column are 0. What is left is projected to positive semidefinite, with a ridge of 1e-6 that makes weights unique.

    Args:
        gramian: `"objective objective"`, of the whole batch.
        across: `"objective objective"`, of gradients over one half with those over the other.

    Returns:
        `"objective objective"`, float64.
    """
    both = (across.double() + across.double().T) / 2
    known = both.diagonal() > 0
    roots = both.diagonal().clamp(min=0).sqrt()
    cosines = (both / (roots[:, None] * roots).clamp(min=1e-300)).clamp(-1, 1)
    lengths = gramian.double().diagonal().clamp(min=0).sqrt() * known
    cosines[~known] = cosines[:, ~known] = 0.0
    projected = positive_part(cosines) + 1e-6 * torch.eye(len(both), dtype=torch.float64)
    return projected * lengths[:, None] * lengths


def positive_part(gramian: Tensor) -> Tensor:
    """Return the nearest positive semidefinite matrix to a symmetric one."""
    values, vectors = torch.linalg.eigh(gramian.double())
    return (vectors * values.clamp(min=0)) @ vectors.T


def check_power(power: float) -> None:
    """Raise ValueError unless the power is a finite number of at least 0."""
    if isinstance(power, bool) or not isinstance(power, int | float) or not (math.isfinite(power) and power >= 0):
        raise ValueError(f"The power of the norm must be at least 0. Found {power!r}. The paper has 1 and 2.")


def check_preference(preference: Sequence[float] | Tensor, count: int | None = None) -> list[float]:
    """Return a preference as numbers; raise ValueError unless it lies on the simplex and has one for each objective."""
    values = [float(value) for value in (preference.tolist() if isinstance(preference, Tensor) else preference)]
    if count is not None and len(values) != count:
        raise ValueError(f"A preference needs one number for each of {count} objectives. Found {len(values)}.")
    if not all(value >= 0 for value in values) or not abs(math.fsum(values) - 1) <= 1e-6:
        raise ValueError(
            f"A preference must be at least 0 everywhere and sum to 1. Found {values}, of sum {math.fsum(values):.6g}. "
            "Divide it by its sum."
        )
    return values


def _over_power(share: float, norm: float, power: float) -> float:
    try:
        return share and math.exp(math.log(share) - power * math.log(norm))
    except OverflowError as error:
        raise ValueError(
            f"Weights must fit into float64. Found a norm of {norm:.3g}, divided by to the power {power}. Take a smaller power."
        ) from error


def _products(gramian: Tensor) -> list[list[float]]:
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise ValueError(f"A Gramian must be a square matrix. Found shape {tuple(gramian.shape)}.")
    products: list[list[float]] = gramian.detach().double().tolist()
    norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(products)]
    for i, row in enumerate(products):
        for j in range(i + 1):
            value, other, scale = row[j], products[j][i], norms[i] * norms[j]
            if not (math.isfinite(value) and math.isfinite(other)):
                raise ValueError(f"A Gramian must be finite. Found {value} and {other} for objectives {i} and {j}.")
            if not (abs(value) <= scale * (1 + _SLACK) and abs(value - other) <= _SLACK * scale):
                raise ValueError(
                    f"A Gramian must be symmetric and positive semidefinite. Found {value:.6g} and {other:.6g} for "
                    f"objectives {i} and {j}, whose norms are {norms[i]:.6g} and {norms[j]:.6g}."
                )
    return products


def _min_norm(cosines: list[list[float]], norms: list[float], exponent: float) -> list[float]:
    """Return the min-norm point of vectors with these cosines and with norms raised to the exponent."""
    # In units of the vectors' own lengths, y_i = alpha_i n_i^exponent, the matrix holds cosines however far these lie apart.
    logs = [exponent * math.log(norm) for norm in norms]
    least = min(logs)
    inverse = [math.exp(least - value) for value in logs]
    spread = _two(cosines[0][1], *inverse) if len(norms) == 2 else _complementary(cosines, inverse)
    shares = [z * r for z, r in zip(spread, inverse, strict=True)]
    whole = math.fsum(shares)
    return [share / whole for share in shares]


def _two(cosine: float, one: float, other: float) -> list[float]:
    """Return the two-objective closed form, up to a factor; any point serves where the vectors are equal."""
    first, second = max(one - cosine * other, 0.0), max(other - cosine * one, 0.0)
    return [first, second] if first > 0 or second > 0 else [1.0, 1.0]


def _complementary(cosines: list[list[float]], inverse: list[float]) -> list[float]:
    """Return y >= 0 with `r . y = 1` and least `y^T C y`: `C y >= mu r`, with equality where y > 0.

    Wolfe's active sets, from all vectors if these are independent, else from the shortest. Each accepted set is the least
    of its own affine hull and shorter than the one before, so that none comes twice.
    """
    count = len(inverse)
    everything = list(range(count))
    found = _affine(cosines, inverse, everything)
    if found is not None and min(found) > 0:
        return found
    shortest = inverse.index(max(inverse))
    active = everything if found is not None else [shortest]
    whole = math.fsum(inverse[i] for i in active)
    spread = [1 / whole if i in active else 0.0 for i in range(count)]
    banned: set[int] = set()
    for _ in range(2**count):  # there are no more sets than that, and rounding may not bring one back for ever
        while True:
            found = _affine(cosines, inverse, active)
            if found is None:  # the last one in adds nothing to the others
                last = active.pop()
                spread[last] = 0.0
                banned.add(last)
                continue
            if min(found) > 0:
                for i, value in zip(active, found, strict=True):
                    spread[i] = value
                break
            step, leaving = min(
                (spread[i] / (spread[i] - value) if spread[i] > 0 else 0.0, i)
                for i, value in zip(active, found, strict=True)
                if value <= 0
            )
            for i, value in zip(active, found, strict=True):
                spread[i] = max(spread[i] + step * (value - spread[i]), 0.0)
            spread[leaving] = 0.0
            active = [i for i in active if i != leaving]
        products = [[row[i] * spread[i] for i in active] for row in cosines]
        level = math.fsum(spread[i] * math.fsum(products[i]) for i in active)
        entering, most = -1, _ROUNDING
        for j in range(count):
            if j not in active and j not in banned:
                terms = products[j]
                gap = level * inverse[j] - math.fsum(terms)
                size = level * inverse[j] + max(map(abs, terms))
                if gap > most * size:
                    entering, most = j, gap / size
        if entering < 0:
            break
        active.append(entering)
    return spread


def _affine(cosines: list[list[float]], inverse: list[float], active: list[int]) -> list[float] | None:
    """Return the y with `C y = mu r, r . y = 1` on the active rows and columns; negative entries are allowed.

    Where the last vector depends on the others, y is their dependence: it combines them to 0. None where this has
    `r . y = 0`, for then the last one lies in the affine hull of the others; or where an earlier one is dependent.
    """
    size = len(active)
    lower: list[list[float]] = []
    for a in range(size):
        row = cosines[active[a]]
        line: list[float] = []
        for b in range(a):
            other = lower[b]
            value = row[active[b]]
            for c in range(b):
                value -= line[c] * other[c]
            line.append(value / other[b])
        pivot = row[active[a]]
        for value in line:
            pivot -= value * value
        if pivot <= _ROUNDING * size:
            if a < size - 1:
                return None
            return _dependence(cosines, inverse, active, lower)
        line.append(math.sqrt(pivot))
        lower.append(line)
    right = [inverse[i] for i in active]
    found = _substitute(lower, right)
    missed = [
        math.fsum([r, *(-cosines[i][j] * y for j, y in zip(active, found, strict=True))])
        for i, r in zip(active, right, strict=True)
    ]
    found = [y + more for y, more in zip(found, _substitute(lower, missed), strict=True)]
    whole = math.fsum(r * y for r, y in zip(right, found, strict=True))
    return [y / whole for y in found]


def _dependence(
    cosines: list[list[float]], inverse: list[float], active: list[int], lower: list[list[float]]
) -> list[float] | None:
    *others, last = active
    found = [*(-y for y in _substitute(lower, [cosines[last][i] for i in others])), 1.0]
    parts = [inverse[i] * y for i, y in zip(active, found, strict=True)]
    whole = math.fsum(parts)
    if abs(whole) <= math.sqrt(_ROUNDING) * max(map(abs, parts)):
        return None
    return [y / whole for y in found]


def _substitute(lower: list[list[float]], right: list[float]) -> list[float]:
    values = list(right)
    size = len(values)
    for a in range(size):
        line = lower[a]
        value = values[a]
        for b in range(a):
            value -= line[b] * values[b]
        values[a] = value / line[a]
    for a in reversed(range(size)):
        value = values[a]
        for b in range(a + 1, size):
            value -= lower[b][a] * values[b]
        values[a] = value / lower[a][a]
    return values
