"""How weights follow from gradients: the three ways of rescaling, halves, silent objectives, callables; and two toy problems."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerkit.errors import ObjectiveError, TrainingError
from steerkit.gapo.balance import Balance, BalanceConfig
from steerkit.gapo.gradients import Gradients, scope_of
from steerkit.maths.pareto import gapo_weights, split_half_gramian


def gradients(rows: Tensor, other: Tensor | None = None) -> Gradients:
    """Gradients over one parameter; with `other` in two halves of one sample each."""
    parameter = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    found = Gradients({"weight": parameter}, frozenset({"weight"}), len(rows))
    for half, each in enumerate([rows] if other is None else [rows, other]):
        found.rows[half] += 1
        for index, row in enumerate(each):
            found.put(half, index, [row.clone()])
    return found


def balance(count: int = 2, linear: tuple[float, ...] | None = None, **given: Any) -> Balance:
    linear = linear or (1.0,) * count
    return Balance(BalanceConfig(**given), linear, tuple("abc"[: len(linear)]))


ROWS = torch.tensor([[3.0, 0.0, 1.0], [-1.0, 0.5, 0.0], [0.0, 0.2, 0.4]], dtype=torch.float64)


def test_by_default_the_weighted_sum_of_lengths_is_that_of_the_linear_update() -> None:
    for power in (0.0, 1.0, 2.0):
        update = balance(3, (0.5, 1.0, 2.0), power=power).update(gradients(ROWS))
        norms = ROWS.norm(dim=1)
        weights = torch.tensor(update.weights, dtype=torch.float64)
        assert float(weights @ norms) == pytest.approx(float(torch.tensor([0.5, 1.0, 2.0]).double() @ norms))
        raw = gapo_weights(ROWS @ ROWS.T, power=power)
        assert torch.allclose(weights / weights.sum(), raw / raw.sum(), rtol=1e-12)


def test_the_update_may_have_the_length_of_the_linear_one_or_the_papers() -> None:
    linear = (0.5, 1.0, 2.0)
    same = balance(3, linear, rescale="update").update(gradients(ROWS))
    assert same.norm == pytest.approx(float((torch.tensor(linear).double() @ ROWS).norm()))
    paper = balance(3, linear, rescale="none").update(gradients(ROWS))
    assert paper.weights == pytest.approx(gapo_weights(ROWS @ ROWS.T).tolist())


def test_near_stationarity_the_default_step_vanishes_and_the_other_does_not() -> None:
    rows = torch.tensor([[1.0, 1e-3], [-2.0, 1e-3]], dtype=torch.float64)
    assert balance().update(gradients(rows)).norm < 3e-3
    assert balance(rescale="update").update(gradients(rows)).norm > 0.9


def test_what_cancels_to_rounding_is_no_step() -> None:
    rows = torch.tensor([[1.0, 1e-9], [-2.0, 1e-9]], dtype=torch.float64)
    for rescale in ("lengths", "update", "none"):
        assert not balance(rescale=rescale).update(gradients(rows)).step


def test_figures_are_of_the_update_that_is_made() -> None:
    update = balance(3).update(gradients(ROWS))
    made = torch.tensor(update.weights, dtype=torch.float64) @ ROWS
    assert update.norm == pytest.approx(float(made.norm()))
    assert update.progress == pytest.approx((ROWS @ made).tolist())
    figures = update.figures(["a", "b", "c"])
    assert figures["gapo/cosine/a/b"] == pytest.approx(float(torch.cosine_similarity(ROWS[0], ROWS[1], dim=0)))
    assert figures["gapo/norm_ratio"] == pytest.approx(float(ROWS.norm(dim=1).max() / ROWS.norm(dim=1).min()))
    assert figures["gapo/opposed"] == 0


def test_a_linear_update_that_opposes_an_objective_is_told() -> None:
    update = balance(3, (1.0, 0.1, 0.1), weighting="linear").update(gradients(ROWS))
    assert update.weights == (1.0, 0.1, 0.1)
    assert update.figures(["a", "b", "c"])["gapo/opposed"] == 1


def test_halves_give_the_signal_and_the_split_half_estimate() -> None:
    dice = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 5, generator=dice, dtype=torch.float64) + 1 for _ in range(2))
    update = balance(3, gram_estimate="split_half", rescale="none").update(gradients(one, two))
    assert update.signal is not None
    assert torch.allclose(update.signal, torch.cosine_similarity(one, two, dim=1))
    gramian = (one + two) @ (one + two).T
    assert update.weights == pytest.approx(gapo_weights(split_half_gramian(gramian, one @ two.T)).tolist())
    assert torch.allclose(update.gramian, gramian)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_an_objective_of_noise_alone_never_gets_the_update(power: float) -> None:
    dice = torch.Generator().manual_seed(1)
    goal = torch.randn(50, generator=dice, dtype=torch.float64)
    dropped = 0
    for _ in range(40):
        halves = [torch.stack([goal, torch.randn(50, generator=dice, dtype=torch.float64)]) for _ in range(2)]
        update = balance(power=power, gram_estimate="split_half").update(gradients(*halves))
        weights, norms = torch.tensor(update.weights), update.gramian.diagonal().sqrt()
        assert float(weights[1] * norms[1]) <= 2.5 * float(weights[0] * norms[0])
        dropped += update.dropped[1]
    assert 5 < dropped < 35


def test_weights_that_say_nothing_and_gradients_that_are_none_are_refused() -> None:
    for linear in ((1.0, -0.5), (0.0, 0.0), (math.inf, 1.0)):
        with pytest.raises(ObjectiveError, match="at least 0"):
            balance(linear=linear)
    assert balance(linear=(1.0, -0.5), weighting="linear").update(gradients(ROWS[:2])).weights == (1.0, -0.5)
    rows = ROWS.clone()
    rows[1, 0] = math.nan
    for weighting in ("gapo", "linear"):
        with pytest.raises(TrainingError, match="'b'"):
            balance(3, weighting=weighting).update(gradients(rows))


def test_a_silent_objective_leaves_the_problem_but_not_plain_descent() -> None:
    update = balance(3).update(gradients(ROWS), [False, True, False])
    assert update.dropped == (False, True, False)
    assert update.weights[1] == 0
    assert min(update.weights[0], update.weights[2]) > 0
    plain = balance(3, weighting="mgda").update(gradients(ROWS), [False, True, False])
    assert plain.dropped == (False,) * 3
    still = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert not balance(weighting="mgda").update(gradients(still), [False, True]).step
    assert balance().update(gradients(still), [False, True]).step


def test_any_callable_from_the_gramian_to_weights_serves() -> None:
    seen: list[Tensor] = []

    def equal(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.ones(len(gramian)) / len(gramian)

    update = balance(3, weighting=equal, rescale="none").update(gradients(ROWS))
    assert update.weights == pytest.approx((1 / 3,) * 3)
    assert torch.allclose(seen[0], ROWS @ ROWS.T)
    for wrong in (lambda g: torch.ones(2), lambda g: -torch.ones(3), lambda g: torch.full((3,), math.nan)):
        with pytest.raises(ObjectiveError, match="each of 3"):
            balance(3, weighting=wrong).update(gradients(ROWS))


def test_a_callable_sees_the_objectives_that_are_left() -> None:
    seen: list[Tensor] = []

    def equal(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.ones(len(gramian))

    update = balance(3, weighting=equal, rescale="none").update(gradients(ROWS), [False, True, False])
    assert seen[0].shape == (2, 2)
    assert update.weights == (1.0, 0.0, 1.0)


def test_a_gradient_behind_the_objectives_may_be_the_update_itself() -> None:
    both = torch.cat([ROWS, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)])
    update = balance(3, weighting="gdpo").update(gradients(both), own=3)
    assert update.norm == 1
    assert update.progress == pytest.approx(ROWS[:, 1].tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"power": -0.5}, "at least 0"),
        ({"preference": [0.5, 0.4]}, "sum to 1"),
        ({"preference": [0.5, 0.5], "power": 2.0}, "P-GAPO"),
        ({"preference": [0.5, 0.5], "weighting": "mgda"}, "P-GAPO"),
        ({"weighting": "mgda", "power": 2.0}, "power 0"),
        ({"weighting": "pareto"}, "one of"),
        ({"gram_estimate": "third"}, "one of"),
        ({"rescale": "length"}, "one of"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        BalanceConfig(**given).check_balance(("gapo", "mgda", "linear"))


def test_a_scope_needs_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(scope_of(model, "trainable")) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(scope_of(model, r"^1\.")) == ["1.weight", "1.bias"]
    for scope in ("lora", "nowhere"):
        with pytest.raises(ObjectiveError, match="trainable parameter"):
            scope_of(model, scope)
    with pytest.raises(ObjectiveError, match="regular expression"):
        scope_of(model, "(")


def ascend(objectives: list[tuple[Tensor, float]], settings: Balance, steps: int = 4000, rate: float = 0.02) -> Tensor:
    """Climb `-scale/2 |x - centre|^2` for each objective."""
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for _ in range(steps):
        rows = torch.stack([scale * (centre - x) for centre, scale in objectives])
        update = settings.update(gradients(rows))
        x = x + rate * torch.tensor(update.weights, dtype=torch.float64) @ rows
    return x


LEFT, RIGHT = torch.tensor([-1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_two_quadratics_end_on_their_pareto_segment(power: float) -> None:
    """The segment joins the two centres, whatever the scales are."""
    x = ascend([(LEFT, 1.0), (RIGHT, 5.0)], balance(power=power))
    assert abs(float(x[1])) < 1e-2
    assert -1 <= float(x[0]) <= 1


def test_preferences_end_at_points_in_their_order() -> None:
    ends = [
        float(ascend([(LEFT, 1.0), (RIGHT, 5.0)], balance(preference=[1 - share, share]), steps=1500)[0])
        for share in (0.2, 0.4, 0.6, 0.8)
    ]
    assert ends == sorted(ends)
    assert ends[-1] - ends[0] > 1.5


def test_three_objectives_end_in_their_triangle() -> None:
    top = torch.tensor([0.0, 1.5], dtype=torch.float64)
    x = ascend([(LEFT, 1.0), (RIGHT, 4.0), (top, 0.3)], balance(3), steps=2500)
    corners = torch.stack([LEFT, RIGHT, top])
    shares = torch.linalg.solve(
        torch.cat([corners.T, torch.ones(1, 3).double()]), torch.cat([x, torch.ones(1).double()])
    )
    assert float(shares.min()) > -1e-2
