"""Contract 8: weights from Gramians."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerkit.maths.minimal_edit import minimal_edit
from steerkit.maths.pareto import gapo_weights, min_norm_point, positive_part, split_half_gramian

POWERS = (0.0, 0.5, 1.0, 2.0, 3.0)


@st.composite
def gradients(draw: st.DrawFn, most: int = 8) -> Tensor:
    """Integers times powers of ten: rows of unlike length, often dependent, with products that are exact in float64."""
    count, width = draw(st.integers(2, most)), draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(st.integers(-9, 9), min_size=width, max_size=width), min_size=count, max_size=count))
    scales = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    found = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(scales)[:, None]
    found[found.norm(dim=1) == 0, 0] = 1.0
    return found


def least(gramian: list[list[Fraction]]) -> Fraction:
    """The exact least squared norm in the hull, by every active set in rational arithmetic."""
    best = min(gramian[i][i] for i in range(len(gramian)))
    for size in range(2, len(gramian) + 1):
        for chosen in itertools.combinations(range(len(gramian)), size):
            rows = [[gramian[i][j] for j in chosen] + [Fraction(-1), Fraction(0)] for i in chosen]
            rows.append([Fraction(1)] * size + [Fraction(0), Fraction(1)])
            found = rational_solution(rows)
            if found is not None and min(found[:-1]) >= 0:
                best = min(best, found[-1])
    return best


def rational_solution(rows: list[list[Fraction]]) -> list[Fraction] | None:
    size = len(rows)
    for column in range(size):
        pivot = next((r for r in range(column, size) if rows[r][column] != 0), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for r in range(size):
            if r != column and rows[r][column] != 0:
                factor = rows[r][column]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[column], strict=True)]
    return [row[-1] for row in rows]


def rescaled(rows: Tensor, power: float) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True) ** power


@given(gradients(5))
def test_the_norm_is_the_least_of_all_active_sets_in_exact_arithmetic(rows: Tensor) -> None:
    gramian = rows @ rows.T
    alpha = min_norm_point(gramian)
    exact = [[Fraction(int(value)) for value in row] for row in gramian.tolist()]
    # The value is taken in exact arithmetic too: in float64 it would cancel.
    shares = [Fraction(float(value)) for value in alpha]
    shares = [share / sum(shares) for share in shares]
    found = sum(a * b * g for a, row in zip(shares, exact, strict=True) for b, g in zip(shares, row, strict=True))
    scale = float((alpha * rows.norm(dim=1)).sum())
    root, best = math.sqrt(float(found)), math.sqrt(float(least(exact)))
    assert root - best <= 1e-9 * best + 1e-11 * scale


@given(gradients(), st.sampled_from(POWERS))
def test_weights_lie_on_the_simplex_and_meet_the_conditions_of_optimality(rows: Tensor, power: float) -> None:
    weights = gapo_weights(rows @ rows.T, power=power)
    norms = rows.norm(dim=1)
    alpha = weights * norms**power
    assert bool((alpha >= 0).all())
    assert float(alpha.sum()) == pytest.approx(1, abs=1e-12)
    unit = rescaled(rows, power)
    update = alpha @ unit
    size = float((alpha * unit.norm(dim=1)).sum())
    slack = unit @ update - update @ update
    # In units of each vector's own length, as rounding acts on it.
    assert bool((slack >= -1e-9 * unit.norm(dim=1) * size).all())
    assert bool((slack[alpha > 0].abs() <= 1e-9 * unit.norm(dim=1)[alpha > 0] * size).all())


@given(gradients(), st.sampled_from(POWERS))
def test_no_objective_is_opposed(rows: Tensor, power: float) -> None:
    gramian = rows @ rows.T
    weights = gapo_weights(gramian, power=power)
    size = float((weights * rows.norm(dim=1)).sum())
    assert bool((gramian @ weights >= -1e-9 * rows.norm(dim=1) * size).all())


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_progress_is_proportional_to_the_power_of_the_norm(power: float, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(50):
        rows = torch.randn(count, 12, generator=generator, dtype=torch.float64)
        rows *= 10.0 ** (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
        weights = gapo_weights(rows @ rows.T, power=power)
        norms = rows.norm(dim=1)
        active = weights > 0
        update = weights @ rows
        progress = (rows @ update / norms**power)[active]
        assert torch.allclose(progress, (update @ update).expand_as(progress), rtol=1e-5, atol=0)


@given(gradients(6), st.sampled_from(POWERS), st.randoms())
def test_the_update_does_not_depend_on_the_order(rows: Tensor, power: float, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    mixed = rows[order]
    update = gapo_weights(rows @ rows.T, power=power) @ rows
    again = gapo_weights(mixed @ mixed.T, power=power) @ mixed
    size = float((rescaled(rows, power).norm(dim=1)).max())
    assert torch.allclose(update, again, rtol=0, atol=2e-6 * size)


@given(gradients(5), st.sampled_from(POWERS))
def test_a_duplicate_changes_nothing(rows: Tensor, power: float) -> None:
    twice = torch.cat([rows, rows[:1]])
    update = gapo_weights(rows @ rows.T, power=power) @ rows
    again = gapo_weights(twice @ twice.T, power=power) @ twice
    size = float((rescaled(rows, power).norm(dim=1)).max())
    assert torch.allclose(update, again, rtol=0, atol=2e-6 * size)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-1, 0.999), st.sampled_from(POWERS))
def test_two_objectives_have_a_closed_form(a: float, b: float, cosine: float, power: float) -> None:
    gramian = torch.tensor([[a * a, a * b * cosine], [a * b * cosine, b * b]], dtype=torch.float64)
    one, other, across = a ** (2 - 2 * power), b ** (2 - 2 * power), cosine * (a * b) ** (1 - power)
    share = min(max((other - across) / (one + other - 2 * across), 0.0), 1.0)
    weights = gapo_weights(gramian, power=power)
    assert float(weights[0]) * a**power == pytest.approx(share, abs=1e-9)
    assert float(weights[1]) * b**power == pytest.approx(1 - share, abs=1e-9)


@given(st.floats(1e-20, 1e20), st.floats(1e-20, 1e20), st.floats(-1, 1))
def test_power_one_halves_for_two(a: float, b: float, cosine: float) -> None:
    gramian = torch.tensor([[a * a, a * b * cosine], [a * b * cosine, b * b]], dtype=torch.float64)
    weights = gapo_weights(gramian)
    assert (weights * torch.tensor([a, b], dtype=torch.float64)).tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_orthogonal_gradients_share_by_their_norms() -> None:
    norms = torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64)
    for power in POWERS:
        expected = norms ** (power - 2) / (norms ** (2 * power - 2)).sum()
        assert torch.allclose(gapo_weights(norms.square().diag(), power=power), expected, rtol=1e-12)


@given(gradients(5), st.floats(0.01, 100))
def test_units_of_a_reward_do_not_matter_at_power_one(rows: Tensor, factor: float) -> None:
    other = rows.clone()
    other[0] *= factor
    update, again = gapo_weights(rows @ rows.T) @ rows, gapo_weights(other @ other.T) @ other
    assert torch.allclose(update, again, rtol=0, atol=2e-6)


def test_power_two_inverts_units_and_power_zero_is_plain_multiple_gradient_descent() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.2], [0.0, 3.0, 0.1], [0.3, 0.3, 1.0]], dtype=torch.float64)
    gramian = rows @ rows.T
    assert torch.equal(gapo_weights(gramian, power=0), min_norm_point(gramian))
    unit = rescaled(rows, 2)
    alpha = min_norm_point(unit @ unit.T)
    expected = alpha / rows.norm(dim=1) ** 2
    assert torch.allclose(gapo_weights(gramian, power=2), expected, rtol=1e-10)


def test_outside_its_hull_zero_is_reached_by_the_shortest_edit_too() -> None:
    """The projection of minimal_edit, with gradients as probes, is the same problem."""
    rows = torch.tensor([[1.0, 0.0, 0.2], [0.1, 2.0, 0.1], [0.3, 0.3, 1.0]])
    shortest = minimal_edit(torch.zeros(3), rows, torch.zeros(3), torch.ones(3), torch.ones(3))
    update = min_norm_point(rows @ rows.T).float() @ rows
    assert torch.allclose(shortest / shortest.norm(), update / update.norm(), atol=1e-5)


@pytest.mark.parametrize("power", POWERS)
def test_opposed_gradients_and_a_hull_around_zero_make_no_step(power: float) -> None:
    opposed = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    around = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64) * torch.tensor(
        [[1.0], [5.0], [0.1]]
    )
    for rows in (opposed, around, torch.cat([around, opposed])):
        update = gapo_weights(rows @ rows.T, power=power) @ rows
        assert float(update.norm()) < 1e-7


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_norms_from_tiny_to_huge_stay_finite(power: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponents in itertools.product((-20, 0, 20), repeat=3):
        rows = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True) * 10.0 ** torch.tensor(exponents)[:, None]
        weights = gapo_weights(rows @ rows.T, power=power)
        assert bool(weights.isfinite().all())
        assert float((weights * rows.norm(dim=1) ** power).sum()) == pytest.approx(1, rel=1e-9)
        assert bool((weights @ rows).isfinite().all())


def test_a_zero_gradient_leaves_the_problem_and_stops_plain_descent() -> None:
    gramian = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 9.0]])
    assert gapo_weights(gramian, power=0).tolist() == [0, 1, 0]
    rest = gapo_weights(gramian[[0, 2]][:, [0, 2]])
    assert gapo_weights(gramian).tolist() == [float(rest[0]), 0, float(rest[1])]
    assert gapo_weights(gramian, preference=[0.2, 0.3, 0.5]).tolist() == pytest.approx([0.1, 0, 0.5 / 3])
    for power in (1.0, 2.0):
        assert gapo_weights(torch.zeros(2, 2), power=power).tolist() == [0, 0]


def test_a_preference_weighs_unit_gradients() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    gramian = rows @ rows.T
    assert gapo_weights(gramian, preference=[1, 0]).tolist() == [0.2, 0]
    even = gapo_weights(gramian, preference=[0.5, 0.5])
    assert torch.allclose(even, gapo_weights(gramian), rtol=1e-12)
    assert gapo_weights(gramian, preference=torch.tensor([0.25, 0.75])).tolist() == [0.05, 0.375]


@pytest.mark.parametrize(("cosine", "worse"), [(-0.3, True), (-0.2, False)])
def test_a_preference_promises_no_common_descent(cosine: float, worse: bool) -> None:
    """Objective 0 gets worse where the cosine is under -lambda_0 / lambda_1, here -0.25."""
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]])
    progress = gramian.double() @ gapo_weights(gramian, preference=[0.2, 0.8])
    assert (float(progress[0]) < 0) is worse


def test_a_split_half_gramian_has_the_angles_of_the_means() -> None:
    """Two objectives whose noise is the same on each sample: the plain Gramian takes them for allies."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    mean[1] = mean[1] - 0.5 * mean[0]
    true = float(torch.cosine_similarity(mean[0], mean[1], dim=0))
    plain, split = [], []
    for _ in range(300):
        one, two = (mean + torch.randn(1, 40, generator=generator, dtype=torch.float64) for _ in range(2))
        gramian = (one + two) @ (one + two).T
        for found, kept in ((gramian, plain), (split_half_gramian(gramian, one @ two.T), split)):
            kept.append(float(found[0, 1] / (found[0, 0] * found[1, 1]).sqrt()))
        assert torch.allclose(split_half_gramian(gramian, one @ two.T).diagonal(), gramian.diagonal(), rtol=1e-5)
    assert sum(plain) / 300 - true > 0.2
    assert abs(sum(split) / 300 - true) < 0.1


def test_halves_that_agree_on_nothing_leave_no_gradient() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    two = torch.tensor([[-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = split_half_gramian((one + two) @ (one + two).T + torch.eye(2), one @ two.T)
    assert found[0].tolist() == found[:, 0].tolist() == [0, 0]
    assert float(found[1, 1]) == pytest.approx(9, rel=1e-5)


def test_the_positive_part_has_no_negative_eigenvalue_and_keeps_what_has_none() -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(positive_part(matrix), torch.full((2, 2), 1.5, dtype=torch.float64))
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert torch.allclose(positive_part(good), good, rtol=1e-14)


@pytest.mark.parametrize(
    ("gramian", "given_", "message"),
    [
        ([[1.0, 0.0]], {}, "square"),
        ([[1.0, math.nan], [math.nan, 1.0]], {}, "finite"),
        ([[1.0, 2.0], [2.0, 1.0]], {}, "positive semidefinite"),
        ([[1.0, 0.5], [0.1, 1.0]], {}, "symmetric"),
        ([[-1.0, 0.0], [0.0, 1.0]], {}, "positive semidefinite"),
        ([[1.0, 0.0], [0.0, 1.0]], {"power": -1}, "at least 0"),
        ([[1.0, 0.0], [0.0, 1.0]], {"power": math.nan}, "at least 0"),
        ([[1.0, 0.0], [0.0, 1.0]], {"preference": [0.5, 0.6]}, "sum to 1"),
        ([[1.0, 0.0], [0.0, 1.0]], {"preference": [1.5, -0.5]}, "at least 0"),
        ([[1.0, 0.0], [0.0, 1.0]], {"preference": [1.0]}, "each of 2"),
        ([[1.0, 0.0], [0.0, 1.0]], {"preference": [0.5, 0.5], "power": 2}, "power=1"),
    ],
)
def test_bad_input_is_told(gramian: list[list[float]], given_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gapo_weights(torch.tensor(gramian), **given_)  # type: ignore[arg-type]
