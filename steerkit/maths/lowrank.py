"""Differences of weights, dense or as a product of two thin factors, with arithmetic that never multiplies them out.

A difference of two LoRA policies is exactly of rank 2r: `[B+, -B-] @ [A+; A-]`. Sums concatenate, products scale, inner
products and truncated singular value decompositions work on the factors, in float64 where sums would cancel.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_BLOCK = 1 << 19
"""Entries that are summed together: what stays in a cache."""


class LowRank(NamedTuple):
    """`left @ right`, of the shape of the parameter that it changes."""

    left: Tensor
    """`"row rank"`"""
    right: Tensor
    """`"rank column"`"""

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def rank(self) -> int:
        """Number of columns of `left`: an upper bound of the rank of the product."""
        return self.left.shape[1]


Delta: TypeAlias = LowRank | Tensor
"""A change of one parameter: two factors, or the change itself."""


def dense(delta: Delta) -> Tensor:
    """Return the change itself."""
    return delta.left @ delta.right if isinstance(delta, LowRank) else delta


def parts(delta: Delta) -> tuple[Tensor, ...]:
    """Return the tensors that a change is made of."""
    return tuple(delta) if isinstance(delta, LowRank) else (delta,)


def rows_of(delta: Delta, rows: slice) -> Delta:
    """Return the change of some rows."""
    return LowRank(delta.left[rows], delta.right) if isinstance(delta, LowRank) else delta[rows]


def scaled(delta: Delta, factor: float) -> Delta:
    """Return `factor * delta`."""
    return LowRank(factor * delta.left, delta.right) if isinstance(delta, LowRank) else factor * delta


def transposed(delta: Delta) -> Delta:
    """Return the change with rows and columns exchanged."""
    return LowRank(delta.right.T, delta.left.T) if isinstance(delta, LowRank) else delta.T


def total(deltas: Sequence[Delta]) -> Delta:
    """Return the sum: factors are concatenated, and those with one factor in common share it.

    Sharing is what keeps the rank of `a v + b v` that of v. The sum becomes dense where factors would be larger.
    """
    thin: list[LowRank] = []
    full: list[Tensor] = []
    for delta in deltas:
        if not isinstance(delta, LowRank):
            full.append(delta)
            continue
        for index, other in enumerate(thin):
            if _same(other.right, delta.right):
                thin[index] = LowRank(other.left + delta.left, other.right)
                break
            if _same(other.left, delta.left):
                thin[index] = LowRank(other.left, other.right + delta.right)
                break
        else:
            thin.append(delta)
    if not full:
        whole = thin[0]
        if len(thin) > 1:
            whole = LowRank(torch.cat([t.left for t in thin], dim=1), torch.cat([t.right for t in thin], dim=0))
        rows, columns = whole.shape
        if len(thin) == 1 or whole.rank * (rows + columns) <= rows * columns:
            return whole
    everything = [*full, *(dense(t) for t in thin)]
    return sum(everything[1:], everything[0])


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def inner(first: Delta, second: Delta) -> float:
    """Return the sum of products of entries, in float64; `tr((R1 R2^T)(L2^T L1))` for factors."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        across = first.right.double() @ second.right.double().T
        along = second.left.double().T @ first.left.double()
        return float((across * along.T).sum())
    if isinstance(first, LowRank):
        return inner(second, first)
    if isinstance(second, LowRank):
        return float((second.left.double() * (first.double() @ second.right.double().T)).sum())
    return float((first.double() * second.double()).sum())


def decomposition(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and V^T, thin; for factors by QR of each, in O((rows + columns) rank^2)."""
    if not isinstance(delta, LowRank):
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        return left, values, right
    rows, columns = delta.shape
    if delta.rank >= min(rows, columns):
        return decomposition(dense(LowRank(delta.left.double(), delta.right.double())))
    left_basis, left_core = torch.linalg.qr(delta.left.double())
    right_basis, right_core = torch.linalg.qr(delta.right.double().T)
    left, values, right = torch.linalg.svd(left_core @ right_core.T)
    return left_basis @ left, values, right @ right_basis.T


def compressed(delta: Delta, *, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float, float]:
    """Return the nearest change of a rank, or of the least rank that keeps a share of the energy.

    Returns:
        The change, its squared norm, and the squared norm before.
    """
    left, values, right = decomposition(delta)
    squares = values.square()
    before = float(squares.sum())
    if rank is None:
        assert energy is not None
        kept = squares.cumsum(0) >= energy * before * (1 - 1e-12)
        rank = int(kept.int().argmax()) + 1 if bool(kept.any()) else len(values)
    rank = max(1, min(rank, len(values)))
    root = values[:rank].sqrt()
    dtype = parts(delta)[0].dtype
    return (
        LowRank((left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype)),
        float(squares[:rank].sum()),
        before,
    )


def interference(deltas: Sequence[Delta], rank: int) -> float:
    """Return `|| (U^T U - I) S (V^T V - I) ||_1`, U, S and V the concatenated leading singular parts of each change.

    Zero where the changes live in orthogonal subspaces. Subspace task interference, arXiv:2412.00081.
    """
    lefts, values, rights = [], [], []
    for delta in deltas:
        left, value, right = decomposition(delta)
        # Singular vectors of values that are nothing but rounding point anywhere.
        count = min(rank, int((value > 1e-6 * value[:1]).sum()))
        lefts.append(left[:, :count])
        values.append(value[:count])
        rights.append(right[:count])
    left, right, strength = torch.cat(lefts, dim=1), torch.cat(rights, dim=0), torch.cat(values)
    one = torch.eye(len(strength), dtype=strength.dtype)
    return float((((left.T @ left - one) * strength) @ (right @ right.T - one)).abs().sum())


def add_to(weight: Tensor, changes: Sequence[tuple[float, Delta]], out: Tensor) -> None:
    """Write `weight + sum_v m_v D_v` into `out`: summed in float32, rounded once, a block of rows at a time."""
    changes = [(m, delta) for m, delta in changes if m != 0]
    if not changes:
        out.copy_(weight)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    like = weight.new_empty((), dtype=wide)
    thin = [(m * d.left.to(like), d.right.to(like)) for m, d in changes if isinstance(d, LowRank)]
    full = [(m, d) for m, d in changes if not isinstance(d, LowRank)]
    left, right = (torch.cat(each, dim=axis) for each, axis in zip(zip(*thin), (1, 0))) if thin else (None, None)
    rows = max(1, _BLOCK // max(1, weight[:1].numel())) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        whole = weight[block].to(wide, copy=True)
        for m, delta in full:
            whole.add_(delta[block].to(whole), alpha=m)
        if left is not None and right is not None:
            whole.addmm_(left[block], right)
        out[block] = whole


class Stack:
    """Several changes of one weight, prepared so that one pair of products serves every mixture of them.

    `x -> sum_v c_v (x @ D_v)`, with D_v in the orientation `"input output"`; low-rank changes are stacked side by side,
    `((x @ L) * c) @ R` with a coefficient for each stacked column.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        thin = [(v, delta) for v, delta in enumerate(deltas) if isinstance(delta, LowRank)]
        self.full = [(v, delta) for v, delta in enumerate(deltas) if not isinstance(delta, LowRank)]
        self.left = torch.cat([delta.left for _, delta in thin], dim=1).contiguous() if thin else None
        """`"input stacked"`"""
        self.right = torch.cat([delta.right for _, delta in thin], dim=0).contiguous() if thin else None
        """`"stacked output"`"""
        self.owner = torch.cat([torch.full((delta.rank,), v) for v, delta in thin]) if thin else None
        """`"stacked"`: which change each column belongs to."""
        if self.left is not None and self.right is not None:
            # Equal shares of the size for both factors, so that neither leaves the range of a narrow dtype.
            # A power of two, so that nothing is rounded.
            power = ((self.right.norm(dim=1).log2() - self.left.norm(dim=0).log2()) / 2).round()
            ratio = torch.where(power.isfinite(), power, 0.0).exp2()
            self.left, self.right = self.left * ratio, self.right / ratio[:, None]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast."""
        self.full = [(v, delta.to(device, dtype)) for v, delta in self.full]
        if self.left is not None and self.right is not None and self.owner is not None:
            self.left, self.right = self.left.to(device, dtype), self.right.to(device, dtype)
            self.owner = self.owner.to(device)

    def mixture(self, coefficients: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `x, onto -> onto + sum_v c_v (x @ D_v)` for coefficients `"group change"`.

        `x` is `"row input"` and `onto` `"row output"`, rows in groups of equal size that share their coefficients. One group
        has them multiplied into the factors beforehand.
        """
        groups = len(coefficients)
        if groups == 1:
            return self._one_mixture(coefficients[0])
        full = [(coefficients[:, v, None, None], delta) for v, delta in self.full]
        left, right = self.left, self.right
        spread = None if self.owner is None else coefficients[:, self.owner][:, None]

        def product(x: Tensor, onto: Tensor) -> Tensor:
            for coefficient, delta in full:
                onto = onto + ((x @ delta).view(groups, -1, onto.shape[-1]) * coefficient).view(onto.shape)
            if left is None or right is None or spread is None:
                return onto
            inside = x @ left
            return torch.addmm(onto, (inside.view(groups, -1, len(right)) * spread).view(inside.shape), right)

        return product

    def _one_mixture(self, coefficients: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        whole = [coefficients[v] * delta for v, delta in self.full]
        full = sum(whole[1:], whole[0]) if whole else None
        left, right = self.left, self.right
        if left is not None and self.owner is not None:
            left = left * coefficients[self.owner]

        def product(x: Tensor, onto: Tensor) -> Tensor:
            if full is not None:
                onto = torch.addmm(onto, x, full)
            return onto if left is None or right is None else torch.addmm(onto, x @ left, right)

        return product
