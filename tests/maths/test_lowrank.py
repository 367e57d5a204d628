"""Contracts 5 and 6, the arithmetic below them: factors act as the matrix they stand for, and never become it."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from steerkit.maths import lowrank
from steerkit.maths.lowrank import (
    Delta,
    LowRank,
    Stack,
    add_to,
    compressed,
    decomposition,
    dense,
    inner,
    interference,
    parts,
    scaled,
    total,
    transposed,
)

SHAPES = [(40, 40), (64, 24), (24, 64), (5, 80), (80, 5), (1, 30), (30, 1)]
WHOLE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")

seeds = st.integers(0, 2**31 - 1)
factors = st.floats(-4, 4, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-3)
kinds = st.sampled_from(["thin", "full"])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low(rows: int, columns: int, rank: int, seed: int = 0, scale: float = 1.0) -> LowRank:
    generator = rng(seed)
    return LowRank(
        scale * torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    )


def full(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=rng(seed))


def make(kind: str, rows: int, columns: int, rank: int, seed: int) -> Delta:
    return low(rows, columns, rank, seed) if kind == "thin" else full(rows, columns, seed)


def exact(delta: Delta) -> Tensor:
    """The change in float64."""
    return delta.left.double() @ delta.right.double() if isinstance(delta, LowRank) else delta.double()


def bits(delta: Delta) -> list[bytes]:
    return [part.contiguous().numpy().tobytes() for part in parts(delta)]


def close(found: Delta | Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(wanted.abs().max()) + 1e-12
    assert_close(exact(found) / scale, wanted.double() / scale, rtol=0, atol=tolerance)


class Widest(TorchDispatchMode):
    """Notes the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.numel())
        return out


# --- what factors stand for -------------------------------------------------------------------------------------------


@WHOLE
def test_shape_rank_and_orientation(shape):
    delta = low(*shape, 3)
    assert delta.shape == dense(delta).shape == shape
    assert delta.rank == 3
    assert transposed(delta).shape == shape[::-1]
    close(transposed(delta), exact(delta).T)
    assert bits(transposed(transposed(delta))) == bits(delta)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, factor=factors, kind=kinds)
def test_scaling(seed, factor, kind):
    delta = make(kind, 12, 17, 3, seed)
    before = bits(delta)
    close(scaled(delta, factor), factor * exact(delta))
    assert bits(delta) == before
    assert isinstance(scaled(delta, factor), LowRank) is (kind == "thin")


@settings(deadline=None, max_examples=60)
@given(seed=seeds, first=kinds, second=kinds)
def test_inner_products_are_those_of_the_matrices(seed, first, second):
    one, other = make(first, 12, 17, 3, seed), make(second, 12, 17, 5, seed + 1)
    wanted = float((exact(one) * exact(other)).sum())
    room = 1e-12 * float(exact(one).norm() * exact(other).norm())
    assert abs(inner(one, other) - wanted) <= room
    assert abs(inner(other, one) - wanted) <= room
    assert inner(one, one) == pytest.approx(float(exact(one).square().sum()), rel=1e-12)


def test_inner_products_do_not_lose_what_cancels_in_float32():
    """A large part that is added and taken away again leaves the small one."""
    small, large = low(50, 60, 2, 1, scale=1e-3), low(50, 60, 2, 2, scale=100.0)
    around = total([total([large, small]), scaled(large, -1.0)])
    assert math.sqrt(inner(around, around)) == pytest.approx(float(exact(small).norm()), rel=1e-3)


@settings(deadline=None, max_examples=80)
@given(seed=seeds, chosen=st.lists(kinds, min_size=1, max_size=5), shape=st.sampled_from(SHAPES))
def test_sums(seed, chosen, shape):
    deltas = [make(kind, *shape, 2, seed + i) for i, kind in enumerate(chosen)]
    before = [bits(delta) for delta in deltas]
    summed = total(deltas)
    close(summed, torch.stack([exact(delta) for delta in deltas]).sum(0))
    assert [bits(delta) for delta in deltas] == before
    assert summed.shape == shape
    if isinstance(summed, LowRank):
        assert summed.left.shape[1] == summed.right.shape[0]
        assert len(deltas) == 1 or summed.rank * sum(shape) <= shape[0] * shape[1], "factors larger than the matrix"


@settings(deadline=None, max_examples=60)
@given(seed=seeds, first=factors, second=factors, turned=st.booleans())
def test_multiples_of_one_change_share_its_factors(seed, first, second, turned):
    delta = low(40, 30, 3, seed)
    delta = transposed(delta) if turned else delta
    summed = total([scaled(delta, first), scaled(delta, second)])
    assert isinstance(summed, LowRank)
    assert summed.rank == 3
    room = 1e-6 * (abs(first) + abs(second)) * float(exact(delta).abs().max())
    assert_close(exact(summed), (first + second) * exact(delta), rtol=0, atol=room)


def test_a_change_that_is_taken_from_itself_leaves_exactly_nothing():
    for delta in (low(40, 30, 3), transposed(low(40, 30, 3)), full(8, 9)):
        gone = total([delta, scaled(delta, -1.0)])
        assert not exact(gone).any()
        assert inner(gone, gone) == 0


def test_sharing_looks_at_values_and_not_at_objects_alone():
    one, other = low(40, 30, 3, 1), low(40, 30, 3, 2)
    copied = LowRank(other.left, one.right.clone())
    assert total([one, copied]).rank == 3
    assert total([one, LowRank(one.left.clone(), other.right)]).rank == 3
    assert total([one, other]).rank == 6
    assert total([one, other, scaled(one, 2.0), scaled(other, -1.0)]).rank == 6
    close(total([one, other, scaled(one, 2.0), scaled(other, -1.0)]), 3 * exact(one), 1e-4)


def test_factors_of_other_ranks_are_never_taken_for_the_same():
    one = low(40, 30, 3)
    part = LowRank(one.left[:, :2], one.right[:2])
    close(total([one, part]), exact(one) + exact(part))


# --- decompositions ---------------------------------------------------------------------------------------------------


@WHOLE
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("kind", ["thin", "full"])
def test_a_decomposition_is_that_of_the_matrix(shape, rank, kind):
    delta = make(kind, *shape, rank, 3)
    left, values, right = decomposition(delta)
    close((left * values) @ right, exact(delta), 1e-9)
    count = len(values)
    assert_close(left.T @ left, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(right @ right.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)
    wanted = torch.linalg.svdvals(exact(delta))[:count]
    assert_close(values, wanted, rtol=0, atol=1e-9 * float(wanted[0]))
    assert bool((values[:-1] >= values[1:] - 1e-12).all())


@settings(deadline=None, max_examples=40)
@given(seed=seeds, rank=st.integers(1, 12), shape=st.sampled_from(SHAPES), turned=st.booleans())
def test_the_nearest_change_of_a_rank(seed, rank, shape, turned):
    """Eckart and Young: nothing of that rank is nearer, and the error is that of the singular values left out."""
    delta = low(*shape, 6, seed)
    delta = transposed(delta) if turned else delta
    near, kept, before = compressed(delta, rank=rank)
    values = torch.linalg.svdvals(exact(delta))
    assert near.rank <= min(rank, 6)
    error = float((exact(near) - exact(delta)).square().sum())
    lost = float(values[rank:].square().sum())
    room = 1e-5 * float(values.square().sum())
    assert abs(error - lost) <= room
    assert before == pytest.approx(float(values.square().sum()), rel=1e-9)
    assert kept == pytest.approx(float(values[:rank].square().sum()), rel=1e-9)
    assert kept <= before * (1 + 1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1])
def test_no_neighbour_of_the_same_rank_is_nearer(size):
    delta = low(30, 22, 8, 5)
    near, _, _ = compressed(delta, rank=3)
    best = float((exact(near) - exact(delta)).norm())
    assert best > 0.1 * float(exact(delta).norm()), "the cut takes nothing away"
    generator = rng(1)
    for _ in range(200):
        left = near.left + size * torch.randn(near.left.shape, generator=generator) * near.left.std()
        right = near.right + size * torch.randn(near.right.shape, generator=generator) * near.right.std()
        assert float((exact(LowRank(left, right)) - exact(delta)).norm()) >= best * (1 - 1e-6)
    for columns in itertools.combinations(range(8), 3):
        part = LowRank(delta.left[:, list(columns)], delta.right[list(columns)])
        assert float((exact(part) - exact(delta)).norm()) >= best


@settings(deadline=None, max_examples=60)
@given(seed=seeds, energy=st.floats(0.01, 1.0), kind=kinds)
def test_the_least_rank_that_keeps_an_energy(seed, energy, kind):
    delta = make(kind, 20, 26, 6, seed)
    near, kept, before = compressed(delta, energy=energy)
    squares = torch.linalg.svdvals(exact(delta)).square()
    whole = float(squares.sum())
    assert before == pytest.approx(whole, rel=1e-9)
    assert kept >= energy * whole * (1 - 1e-9)
    assert float(exact(near).square().sum()) == pytest.approx(kept, rel=1e-5)
    assert near.rank == 1 or float(squares[: near.rank - 1].sum()) < energy * whole * (1 + 1e-9), (
        "a lower rank is enough"
    )


@pytest.mark.parametrize(
    "delta", [low(40, 30, 5), full(12, 20), transposed(low(9, 50, 4))], ids=["thin", "full", "wide"]
)
def test_all_of_the_energy(delta):
    near, kept, before = compressed(delta, energy=1)
    close(near, exact(delta), 3e-6)
    assert kept == pytest.approx(before, rel=1e-12)


def test_a_zero_change_compresses():
    for delta in (LowRank(torch.zeros(9, 3), torch.ones(3, 7)), torch.zeros(9, 7)):
        for how in ({"rank": 2}, {"energy": 0.5}):
            near, kept, before = compressed(delta, **how)
            assert not exact(near).any()
            assert bool(exact(near).isfinite().all())
            assert (kept, before) == (0.0, 0.0)


def test_compression_keeps_the_type_and_the_operand():
    delta = low(40, 30, 5)
    before = bits(delta)
    near, _, _ = compressed(delta, rank=2)
    assert near.left.dtype == near.right.dtype == torch.float32
    assert bits(delta) == before


BIG: dict[str, Callable[[LowRank, LowRank], Any]] = {
    "compress by rank": lambda a, b: compressed(a, rank=2),
    "compress by energy": lambda a, b: compressed(a, energy=0.9),
    "sum": lambda a, b: total([a, b]),
    "sum, then compress": lambda a, b: compressed(total([a, scaled(b, -1.0)]), rank=3),
    "inner product": inner,
    "interference": lambda a, b: interference([a, b], 4),
    "transpose and scale": lambda a, b: scaled(transposed(a), 2.0),
}


@pytest.mark.parametrize("call", BIG.values(), ids=BIG.keys())
def test_factors_are_never_multiplied_out(call, monkeypatch):
    """20000 x 20000 would be 1.6 GB in float32 and minutes of decomposition."""

    def never(delta: Delta) -> Tensor:
        raise AssertionError(f"{tuple(delta.shape)} was multiplied out")

    first, second = low(20000, 20000, 4, 1), low(20000, 20000, 4, 2)
    monkeypatch.setattr(lowrank, "dense", never)
    with Widest() as widest:
        start = time.process_time()
        call(first, second)
        spent = time.process_time() - start
    assert widest.entries <= 20000 * 8
    assert spent < 1.5


# --- interference -----------------------------------------------------------------------------------------------------


def naive_interference(deltas: Sequence[Delta], rank: int) -> float:
    """`|| (U^T U - I) S (V^T V - I) ||_1` in numpy, by the dense decomposition of each."""
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(exact(delta).numpy(), full_matrices=False)
        lefts.append(u[:, :rank])
        values.append(s[:rank])
        rights.append(vt[:rank].T)
    u, v, s = np.concatenate(lefts, 1), np.concatenate(rights, 1), np.diag(np.concatenate(values))
    one = np.eye(len(s))
    return float(np.abs((u.T @ u - one) @ s @ (v.T @ v - one)).sum())


def apart(count: int, rank: int, size: int = 48, seed: int = 0) -> list[LowRank]:
    """Changes whose row and column spaces are orthogonal to each other's."""
    left, _ = torch.linalg.qr(torch.randn(size, size, generator=rng(seed), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, generator=rng(seed + 1), dtype=torch.float64))
    found = []
    for index in range(count):
        own = slice(rank * index, rank * (index + 1))
        inside = torch.randn(rank, rank, generator=rng(seed + 2 + index), dtype=torch.float64)
        found.append(LowRank((left[:, own] @ inside).float(), right[:, own].T.float()))
    return found


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", ["thin", "full"])
def test_interference_is_the_formula(rank, count, kind):
    deltas = [make(kind, 30, 26, 4, seed) for seed in range(count)]
    found = interference(deltas, rank)
    assert found > 0.1
    assert found == pytest.approx(naive_interference(deltas, rank), rel=1e-8)


def test_no_interference_between_orthogonal_subspaces():
    deltas = apart(4, 3)
    size = sum(float(exact(delta).norm()) for delta in deltas)
    assert interference(deltas, 3) < 1e-5 * size
    assert interference([deltas[0], deltas[0]], 3) > 0.1


@pytest.mark.parametrize("form", ["dense", "padded", "summed"])
def test_no_interference_between_orthogonal_subspaces_of_less_rank_than_is_looked_at(form):
    """Singular parts of strength zero are no parts: their directions are the decomposition's accident."""
    deltas: list[Delta] = list(apart(4, 3))
    wide: list[Delta] = []
    for index, delta in enumerate(deltas):
        assert isinstance(delta, LowRank)
        if form == "dense":
            wide.append(dense(delta))
        elif form == "padded":
            wide.append(
                LowRank(torch.cat([delta.left, torch.zeros(48, 3)], 1), torch.cat([delta.right, torch.zeros(3, 48)]))
            )
        else:
            mixed = LowRank(delta.left @ full(3, 3, index), delta.right)
            wide.append(
                LowRank(
                    torch.cat([delta.left, mixed.left], 1),
                    torch.cat([delta.right, full(3, 3, index + 9) @ delta.right]),
                )
            )
    size = sum(float(exact(delta).norm()) for delta in wide)
    assert interference(wide, 8) < 1e-4 * size


def test_interference_does_not_depend_on_how_a_change_is_held():
    deltas = [low(40, 36, 2, seed) for seed in range(3)]
    wanted = interference(deltas, 2)
    assert wanted > 1
    assert interference([dense(delta) for delta in deltas], 2) == pytest.approx(wanted, rel=1e-5)
    assert interference([dense(delta) for delta in deltas], 8) == pytest.approx(interference(deltas, 8), rel=1e-4)


def test_interference_is_permutation_invariant_and_grows():
    deltas = [low(30, 26, 4, seed) for seed in range(4)]
    one = interference(deltas, 3)
    for order in itertools.permutations(range(4)):
        assert interference([deltas[i] for i in order], 3) == pytest.approx(one, rel=1e-8)
    counts = [interference(deltas[:count], 3) for count in (2, 3, 4)]
    assert counts == sorted(counts)
    assert counts[0] < 0.9 * counts[1] < 0.9 * counts[2]
    assert interference([scaled(delta, 3.0) for delta in deltas], 3) == pytest.approx(3 * one, rel=1e-5)
    assert interference([scaled(delta, -1.0) for delta in deltas], 3) == pytest.approx(one, rel=1e-5)


# --- writing ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=seeds, amounts=st.lists(factors, min_size=1, max_size=4), rows=st.sampled_from([1, 7, 600]))
def test_writing_a_sum(seed, amounts, rows):
    weight = full(rows, 20, seed)
    changes = [(m, make("thin" if i % 2 else "full", rows, 20, 2, seed + 1 + i)) for i, m in enumerate(amounts)]
    out, before = torch.empty_like(weight), weight.clone()
    add_to(weight, changes, out)
    close(out, weight.double() + sum(m * exact(delta) for m, delta in changes), 1e-6)
    assert torch.equal(weight, before)
    add_to(weight, changes, weight)
    assert torch.equal(weight, out), "in place differs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_nothing_to_write_is_a_copy_of_the_bits(dtype):
    weight = full(40, 20).to(dtype)
    weight[0, :5] = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 0.0], dtype=dtype)
    for changes in ([], [(0.0, full(40, 20))], [(0.0, low(40, 20, 2)), (-0.0, full(40, 20))]):
        out = torch.ones_like(weight)
        add_to(weight, changes, out)
        assert weight.view(torch.uint8).equal(out.view(torch.uint8))


@pytest.mark.parametrize("shape", [(40000,), (3, 50, 70), (70000, 9)], ids=str)
def test_writing_whatever_the_shape(shape):
    weight, change = torch.randn(shape), torch.randn(shape)
    out = torch.empty(shape)
    add_to(weight, [(0.5, change)], out)
    assert_close(out, weight + 0.5 * change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_is_rounded_once(dtype):
    """Four changes that are each half a step of the dtype: rounding after each would lose or double them."""
    weight = torch.ones(64, 32, dtype=dtype)
    step = torch.finfo(dtype).eps
    out = torch.empty_like(weight)
    add_to(weight, [(1.0, torch.full((64, 32), 0.3 * step))] * 4, out)
    assert torch.equal(out, torch.full((64, 32), 1 + 1.2 * step, dtype=torch.float64).to(dtype))
    assert not torch.equal(out, weight)
    weight = full(64, 32).to(dtype)
    changes: list[tuple[float, Delta]] = [(0.7, low(64, 32, 3, 1)), (-0.3, full(64, 32, 2))]
    add_to(weight, changes, out)
    wanted = weight.double() + sum(m * exact(delta) for m, delta in changes)
    spacing = 2.0 ** (wanted.abs().log2().floor()) * step
    assert bool(((out.double() - wanted).abs() <= 0.501 * spacing + 1e-6).all())
    assert float((out == wanted.to(dtype)).float().mean()) > 0.99


# --- mixtures ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=seeds, chosen=st.lists(kinds, min_size=1, max_size=4), groups=st.integers(1, 4), rows=st.integers(1, 3))
def test_a_stack_is_its_mixtures(seed, chosen, groups, rows):
    deltas = [make(kind, 10, 14, 1 + i, seed + i) for i, kind in enumerate(chosen)]
    stack = Stack(deltas)
    stack.to(torch.device("cpu"), torch.float64)
    generator = rng(seed)
    coefficients = torch.randn(groups, len(deltas), generator=generator, dtype=torch.float64)
    x = torch.randn(groups * rows, 10, generator=generator, dtype=torch.float64)
    onto = torch.randn(groups * rows, 14, generator=generator, dtype=torch.float64)
    before = onto.clone()
    found = stack.mixture(coefficients)(x, onto)
    for group in range(groups):
        own = slice(group * rows, (group + 1) * rows)
        change = sum(c * exact(delta) for c, delta in zip(coefficients[group], deltas, strict=True))
        assert_close(found[own], before[own] + x[own] @ change, rtol=1e-9, atol=1e-9)
    assert torch.equal(onto, before)
