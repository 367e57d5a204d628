"""Contract 3: every bound holds, active ones exactly, rows that hold are untouched, and no shorter edit exists."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steerkit.maths.minimal_edit import EditProblem, minimal_edit

ROWS, D_MODEL = 24, 40
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
COUNTS = pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 12])

seeds = st.integers(0, 2**32 - 1)
counts = st.sampled_from([1, 2, 3, 4, 6, 11])
correlations = st.sampled_from([0.0, 0.5, 1.5])
probabilities = st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6]))


class Problem(NamedTuple):
    """Arguments of `minimal_edit`, in its order, and the metric in which its answer is the shortest."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor
    logit: Tensor
    sense: Tensor
    direction: Tensor | None = None
    covariance: Tensor | None = None

    def edit(self) -> Tensor:
        return minimal_edit(*self[:6])

    def only(self, concepts: Any) -> "Problem":
        """The same rows with some of the bounds."""
        direction = None if self.direction is None else self.direction[concepts]
        return Problem(
            self.hidden_states,
            self.weight[concepts],
            self.bias[concepts],
            self.logit[..., concepts],
            self.sense[concepts],
            direction,
            self.covariance,
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.double() @ self.weight.double().T + self.bias.double()

    def shortfall(self, hidden_states: Tensor) -> Tensor:
        """How far each bound is missed, in logits; negative where it is held with room."""
        missing = self.sense * (self.logit.double() - self.logits(hidden_states))
        return torch.where(self.sense == 0, (self.logit.double() - self.logits(hidden_states)).abs(), missing)

    def length(self, edit: Tensor) -> Tensor:
        edit = edit.double()
        if self.covariance is None:
            return edit.norm(dim=-1)
        return torch.linalg.solve(self.covariance, edit.T).T.mul(edit).sum(dim=-1).clamp(min=0).sqrt()


def make(
    count: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    correlation: float = 0.5,
    mahalanobis: bool = False,
    equalities: int = 0,
    rows: int = ROWS,
    d_model: int = D_MODEL,
) -> Problem:
    """Random probes that share a common part, random bounds for each row, about half of them violated."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = (normal(count, d_model) + correlation * normal(d_model)) / math.sqrt(d_model)
    sense = torch.where(normal(count) > 0, 1.0, -1.0)
    sense[:equalities] = 0.0
    root = normal(d_model, d_model) / math.sqrt(d_model)
    covariance = root @ root.T + 0.2 * torch.eye(d_model, dtype=torch.float64)
    given = Problem(normal(rows, d_model), weight, normal(count), 2 * normal(rows, count), sense)
    given = Problem(*(t.to(dtype) for t in given[:5]))  # type: ignore[union-attr]
    if not mahalanobis:
        return given
    return given._replace(direction=(weight @ covariance).to(dtype), covariance=covariance)


def by_quadprog(problem: Problem, row: int) -> np.ndarray:
    """Return the shortest feasible edit of one row by Goldfarb and Idnani's method: an independent solver."""
    weight, sense = problem.weight.double(), problem.sense.double()
    order = sorted(range(len(sense)), key=lambda k: abs(float(sense[k])))  # quadprog wants equalities first
    signed = torch.where(sense == 0, 1.0, sense)[order]
    missing = signed * (problem.logit[row].double() - problem.logits(problem.hidden_states[row]))[order]
    metric = torch.eye(weight.shape[1], dtype=torch.float64)
    if problem.covariance is not None:
        metric = torch.linalg.inv(problem.covariance)
        metric = (metric + metric.T) / 2
    constraints = (signed[:, None] * weight[order]).T
    solved = quadprog.solve_qp(
        metric.numpy(), np.zeros(weight.shape[1]), constraints.numpy(), missing.numpy(), int((sense == 0).sum())
    )
    return solved[0]


# --- bounds hold ------------------------------------------------------------------------------------------------------


@DTYPES
@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=counts, correlation=correlations, mahalanobis=st.booleans())
def test_every_bound_holds_after_the_edit(dtype, seed, count, correlation, mahalanobis):
    problem = make(count, seed=seed, dtype=dtype, correlation=correlation, mahalanobis=mahalanobis)
    after = problem.hidden_states.double() + problem.edit().double()
    assert problem.shortfall(after).max() <= LOGIT_TOLERANCE[dtype]


@DTYPES
@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=counts, correlation=correlations, mahalanobis=st.booleans())
def test_active_bounds_read_exactly(dtype, seed, count, correlation, mahalanobis):
    """The edit is a combination of the directions, and each direction that it uses belongs to a bound met exactly."""
    problem = make(count, seed=seed, dtype=dtype, correlation=correlation, mahalanobis=mahalanobis)
    edit = problem.edit().double()
    directions = (problem.weight if problem.direction is None else problem.direction).double()
    magnitudes = torch.linalg.lstsq(directions.T, edit.T).solution.T
    assert_close(magnitudes @ directions, edit, atol=1e-5, rtol=1e-5)
    used = magnitudes.abs() > 1e-4
    assert used.any()
    assert (magnitudes * problem.sense)[used].min() > 0, "a concept that nobody asked to move drives the edit"
    shortfall = problem.shortfall(problem.hidden_states.double() + edit)
    assert shortfall[used].abs().max() <= LOGIT_TOLERANCE[dtype]


@DTYPES
@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=counts, mahalanobis=st.booleans())
def test_rows_that_meet_all_bounds_get_exactly_no_edit(dtype, seed, count, mahalanobis):
    problem = make(count, seed=seed, dtype=dtype, mahalanobis=mahalanobis)
    held = torch.arange(ROWS) % 3 == 0
    room = torch.rand(ROWS, count, generator=torch.Generator().manual_seed(seed)).to(dtype) + 1e-3
    kept = problem.logits(problem.hidden_states).to(dtype) - problem.sense * room
    problem = problem._replace(logit=torch.where(held[:, None], kept, problem.logit))
    assume(bool((problem.shortfall(problem.hidden_states)[~held] > 0.1).any()))
    edit = problem.edit()
    assert torch.count_nonzero(edit[held]) == 0
    assert torch.count_nonzero(edit[~held]) > 0


@pytest.mark.parametrize("at_least", [True, False], ids=["at_least", "at_most"])
@settings(max_examples=40, deadline=None)
@given(seed=seeds, probability=probabilities)
def test_probabilities_from_one_millionth_to_all_but_one_millionth(at_least, seed, probability):
    problem = make(3, seed=seed, dtype=torch.float32)
    bound = torch.logit(torch.tensor(probability, dtype=torch.float64))
    sense = torch.full((3,), 1.0 if at_least else -1.0)
    problem = problem._replace(logit=bound.expand(3), sense=sense)
    reached = problem.logits(problem.hidden_states + problem.edit())
    assert (sense * (bound - reached)).max() <= 1e-4


@COUNTS
def test_equalities_are_met_from_both_sides(count):
    problem = make(count, seed=3, equalities=count)
    assert (problem.logits(problem.hidden_states) > problem.logit).any()
    assert (problem.logits(problem.hidden_states) < problem.logit).any()
    after = problem.hidden_states + problem.edit()
    assert_close(problem.logits(after), problem.logit, atol=1e-9, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.sampled_from([2, 3, 5, 11]), mahalanobis=st.booleans())
def test_equalities_beside_bounds(seed, count, mahalanobis):
    problem = make(count, seed=seed, equalities=count // 2, mahalanobis=mahalanobis)
    assert problem.shortfall(problem.hidden_states + problem.edit()).max() <= 1e-9


def test_an_infinite_logit_is_no_bound():
    problem = make(3, seed=5, dtype=torch.float32)
    problem = problem._replace(sense=torch.tensor([1.0, -1.0, 1.0]))
    off = problem.logit.clone()
    off[::2, 0] = -math.inf
    off[::2, 1] = math.inf
    edit = problem._replace(logit=off).edit()
    assert edit.isfinite().all()
    assert_close(edit[::2], problem.only([2]).edit()[::2], atol=1e-6, rtol=1e-5)
    assert_close(edit[1::2], problem.edit()[1::2], atol=0, rtol=0)


def test_no_bound_at_all_is_no_edit():
    problem = make(12, seed=5)._replace(sense=torch.ones(12), logit=torch.full((12,), -math.inf))
    assert torch.count_nonzero(problem.edit()) == 0


# --- minimality -------------------------------------------------------------------------------------------------------


@COUNTS
@pytest.mark.parametrize("mahalanobis", [False, True], ids=["euclidean", "mahalanobis"])
@pytest.mark.parametrize("equalities", [0, 1])
def test_equals_an_independent_solver(count, mahalanobis, equalities):
    for seed in range(3):
        problem = make(count, seed=seed, correlation=0.7, mahalanobis=mahalanobis, equalities=equalities)
        edit = problem.edit()
        wanted = np.stack([by_quadprog(problem, row) for row in range(ROWS)])
        assert_close(edit, torch.from_numpy(wanted), atol=1e-8, rtol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.integers(1, 6), mahalanobis=st.booleans())
def test_equals_an_independent_solver_on_free_inputs(seed, count, mahalanobis):
    problem = make(count, seed=seed, mahalanobis=mahalanobis, rows=4, d_model=8)
    assume(float(torch.linalg.cond(problem.weight)) < 50)
    wanted = np.stack([by_quadprog(problem, row) for row in range(4)])
    assert_close(problem.edit(), torch.from_numpy(wanted), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("mahalanobis", [False, True], ids=["euclidean", "mahalanobis"])
@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_no_random_feasible_edit_is_shorter(count, mahalanobis):
    """Perturb the edit at random and push it back to feasibility: every feasible point found is at least as long."""
    problem = make(count, seed=8, mahalanobis=mahalanobis)
    edit = problem.edit()
    shortest = problem.length(edit)
    generator = torch.Generator().manual_seed(1)
    feasible = 0
    for scale in (0.003, 0.03, 0.3, 1.0):
        for _ in range(60):
            other = edit + scale * torch.randn(edit.shape, generator=generator, dtype=torch.float64)
            missing = problem.shortfall(problem.hidden_states + other).clamp(min=0) * problem.sense
            other = other + missing @ torch.linalg.pinv(problem.weight).T
            fine = problem.shortfall(problem.hidden_states + other).amax(dim=-1) <= 1e-9
            feasible += int(fine.sum())
            assert (problem.length(other)[fine] >= shortest[fine] - 1e-7).all()
    assert feasible > 1000


@pytest.mark.parametrize("mahalanobis", [False, True], ids=["euclidean", "mahalanobis"])
def test_any_shorter_step_along_the_same_edit_misses_a_bound(mahalanobis):
    problem = make(4, seed=9, mahalanobis=mahalanobis)
    edit = problem.edit()
    moved = problem.length(edit) > 1e-3
    assert moved.sum() > ROWS / 2
    shorter = problem.hidden_states + 0.999 * edit
    assert (problem.shortfall(shorter).amax(dim=-1)[moved] > 1e-7).all()


# --- symmetries -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.sampled_from([2, 3, 4, 6, 12]), mahalanobis=st.booleans(), data=st.data())
def test_the_order_of_concepts_is_irrelevant(seed, count, mahalanobis, data):
    problem = make(count, seed=seed, mahalanobis=mahalanobis, equalities=count // 3)
    order = data.draw(st.permutations(range(count)))
    assert_close(problem.only(order).edit(), problem.edit(), atol=1e-9, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.sampled_from([1, 2, 4, 11]))
def test_adding_and_removing_are_mirror_images(seed, count):
    """P -> 1 - P: flipped w, b, bound and sense ask for the same edit."""
    problem = make(count, seed=seed)
    mirrored = Problem(problem.hidden_states, -problem.weight, -problem.bias, -problem.logit, -problem.sense)
    assert_close(mirrored.edit(), problem.edit(), atol=1e-12, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_the_scale_of_a_probe_and_of_its_direction_is_irrelevant(seed, factor):
    """w, b and the wanted logit scaled alike describe the same half-space; a direction has no length."""
    problem = make(3, seed=seed, mahalanobis=True)
    assert problem.direction is not None
    scaled = problem._replace(
        weight=factor * problem.weight,
        bias=factor * problem.bias,
        logit=factor * problem.logit,
        direction=torch.tensor([[factor], [1.0], [1 / factor]]) * problem.direction,
    )
    assert_close(scaled.edit(), problem.edit(), atol=1e-8, rtol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.sampled_from([1, 2, 4, 12]), mahalanobis=st.booleans(), tighter=st.floats(0, 5))
def test_a_stricter_bound_never_asks_for_less(seed, count, mahalanobis, tighter):
    problem = make(count, seed=seed, mahalanobis=mahalanobis)
    stricter = problem._replace(logit=problem.logit + tighter * problem.sense)
    assert (problem.length(stricter.edit()) >= problem.length(problem.edit()) - 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds, worse=st.floats(1e-3, 10))
def test_a_larger_violation_asks_for_more(seed, worse):
    problem = make(1, seed=seed)
    pushed = problem._replace(hidden_states=problem.hidden_states - worse * problem.sense * problem.weight[0])
    before, after = problem.edit().norm(dim=-1), pushed.edit().norm(dim=-1)
    assert (after >= before).all()
    violated = before > 0
    assert (after[violated] > before[violated]).all()


def sum_of_singles(problem: Problem) -> Tensor:
    """The naive edit: each bound met as if it were alone, and the edits added up."""
    edits = [problem.only([k]).edit() for k in range(len(problem.sense))]
    return torch.stack(edits).sum(dim=0)


# --- closed forms -----------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("sense", [1.0, -1.0], ids=["amplify (6)", "remove (7)"])
def test_one_probe_is_the_closed_form_of_gcav(dtype, sense):
    """eps = 1[violated] (s0 - b - w.e) / |w|, e' = e + eps w / |w|."""
    problem = make(1, seed=11, dtype=dtype)._replace(sense=torch.tensor([sense], dtype=dtype))
    w, b = problem.weight[0].double(), problem.bias.double()
    eps = (problem.logit[:, 0].double() - b - problem.hidden_states.double() @ w) / w.norm()
    violated = sense * eps > 0
    assert 0 < violated.sum() < ROWS
    wanted = torch.where(violated, eps, 0.0)[:, None] * w / w.norm()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(problem.edit().double(), wanted, atol=tolerance, rtol=tolerance)


def test_one_probe_along_another_direction_is_the_oblique_closed_form():
    problem = make(1, seed=12, mahalanobis=True)._replace(sense=torch.tensor([1.0]))
    assert problem.direction is not None
    w, u = problem.weight[0], problem.direction[0]
    eps = ((problem.logit[:, 0] - problem.bias - problem.hidden_states @ w) / (w @ u)).clamp(min=0)
    assert_close(problem.edit(), eps[:, None] * u, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 4, 12])
def test_orthogonal_concepts_decouple(count):
    problem = make(count, seed=13)
    basis = torch.linalg.qr(problem.weight.T).Q.T
    lengths = torch.linspace(0.5, 3, count, dtype=torch.float64)[:, None]
    problem = problem._replace(weight=lengths * basis)
    assert_close(problem.edit(), sum_of_singles(problem), atol=1e-10, rtol=1e-10)


def test_the_naive_sum_of_single_solutions_misses_where_the_joint_edit_meets():
    """Single solutions summed are off by (C - I) eps, C the cosines between the probes (papers.md 3.5)."""
    problem = make(3, seed=14, correlation=1.0)._replace(sense=torch.zeros(3))
    weight, lengths = problem.weight, problem.weight.norm(dim=-1)
    eps = (problem.logit - problem.logits(problem.hidden_states)) / lengths
    naive = sum_of_singles(problem)
    cosines = (weight / lengths[:, None]) @ (weight / lengths[:, None]).T
    missed = (problem.logits(problem.hidden_states + naive) - problem.logit) / lengths
    assert_close(missed, eps @ (cosines - torch.eye(3, dtype=torch.float64)), atol=1e-9, rtol=1e-9)
    assert missed.abs().amax(dim=-1).min() > 0.05
    assert problem.shortfall(problem.hidden_states + problem.edit()).max() <= 1e-9


def test_the_naive_sum_of_papers_section_3_5_in_probabilities():
    """Targets .99, .9 and .001 are hit by the joint edit; the naive sum overshoots."""
    problem = make(3, seed=15, correlation=1.5, rows=1)
    targets = torch.tensor([0.99, 0.9, 0.001], dtype=torch.float64)
    problem = problem._replace(
        logit=torch.logit(targets)[None], sense=torch.tensor([1.0, 1.0, -1.0]), bias=torch.zeros(3)
    )
    reached = problem.logits(problem.hidden_states + problem.edit()).sigmoid()[0]
    assert (problem.sense * (reached - targets)).min() > -1e-9
    naive = sum_of_singles(problem)
    assert problem.shortfall(problem.hidden_states + naive).max() > 0.1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_active_is_the_inverse_gram_matrix(count):
    problem = make(count, seed=16, equalities=count)
    missing = problem.logit - problem.logits(problem.hidden_states)
    wanted = missing @ torch.linalg.inv(problem.weight @ problem.weight.T) @ problem.weight
    assert_close(problem.edit(), wanted, atol=1e-10, rtol=1e-9)


# --- parallel probes --------------------------------------------------------------------------------------------------


def band(count: int, low: float, high: float, *, flipped: bool = False, seed: int = 17) -> Problem:
    """`count` probes of which the first is bounded on both sides, the second time perhaps as -w."""
    problem = make(count, seed=seed, correlation=0.7)
    problem.bias[0] = 0
    sign = -1.0 if flipped else 1.0
    return Problem(
        problem.hidden_states,
        torch.cat([problem.weight, sign * problem.weight[:1]]),
        torch.cat([problem.bias, sign * problem.bias[:1]]),
        torch.cat(
            [torch.full((ROWS, 1), low), problem.logit[:, 1:], torch.full((ROWS, 1), sign * high)], dim=1
        ).double(),
        torch.cat([torch.ones(1), problem.sense[1:], -sign * torch.ones(1)]).double(),
    )


@pytest.mark.parametrize("flipped", [False, True], ids=["same w", "opposite w"])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_a_band_on_one_probe(count, flipped):
    problem = band(count, -0.3, 0.4, flipped=flipped)
    before = problem.logits(problem.hidden_states)[:, 0]
    assert (before < -0.3).any()
    assert (before > 0.4).any()
    assert problem.shortfall(problem.hidden_states + problem.edit()).max() <= 1e-9


@pytest.mark.parametrize("flipped", [False, True], ids=["same w", "opposite w"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_band_is_met_by_the_shortest_edit(count, flipped):
    problem = band(count, -0.3, 0.4, flipped=flipped)
    wanted = np.stack([by_quadprog(problem, row) for row in range(ROWS)])
    assert_close(problem.edit(), torch.from_numpy(wanted), atol=1e-8, rtol=1e-7)


def test_a_band_of_no_width_is_an_equality():
    problem = band(1, 0.25, 0.25)
    assert_close(problem.logits(problem.hidden_states + problem.edit())[:, 0], torch.full((ROWS,), 0.25).double())


def test_a_bound_and_an_equality_on_one_probe():
    problem = make(1, seed=18)
    both = Problem(
        problem.hidden_states,
        problem.weight.repeat(2, 1),
        problem.bias.repeat(2),
        torch.tensor([0.2, 0.5]),
        torch.tensor([0.0, -1.0]),
    )
    after = problem.hidden_states + both.edit()
    assert_close(problem.logits(after)[:, 0], torch.full((ROWS,), 0.2).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_the_same_equality_twice_is_met(scale):
    """Two requests that agree, such as one concept erased under two names."""
    problem = make(2, seed=19, equalities=2)
    twice = Problem(
        problem.hidden_states,
        torch.cat([problem.weight, scale * problem.weight[:1]]),
        torch.cat([problem.bias, scale * problem.bias[:1]]),
        torch.cat([problem.logit, scale * problem.logit[:, :1]], dim=1),
        torch.zeros(3),
    )
    assert_close(twice.edit(), problem.edit(), atol=1e-9, rtol=1e-8)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.0, -1.0], ids=["orthogonal", "against"])
def test_a_direction_along_which_the_probe_does_not_rise_is_refused(gain):
    problem = make(3, seed=20)
    direction = problem.weight.clone()
    aside = direction[1].roll(1) - (direction[1].roll(1) @ direction[1]) / direction[1].norm() ** 2 * direction[1]
    direction[1] = gain * direction[1] + (aside if gain else 0 * aside)
    with pytest.raises(ValueError, match=r"(?s)w \. u.*probe 1"):
        problem._replace(direction=direction).edit()


def test_a_probe_of_zeros_is_refused():
    problem = make(2, seed=20)
    weight = problem.weight.clone()
    weight[0] = 0
    with pytest.raises(ValueError, match="probe 0"):
        problem._replace(weight=weight).edit()


@pytest.mark.parametrize("count", [3, 4, 11, 12])
def test_dependent_probes_are_refused(count):
    problem = make(count, seed=21)
    weight = problem.weight.clone()
    weight[-1] = weight[:-1].sum(dim=0)
    with pytest.raises(ValueError, match="independent"):
        problem._replace(weight=weight).edit()


def test_the_refusal_names_a_pair_of_the_dependent_group():
    problem = make(4, seed=22)
    weight = problem.weight.clone()
    weight[3] = weight[1] + 0.1 * weight[2]
    with pytest.raises(ValueError, match=r"\b1 and 3\b"):
        problem._replace(weight=weight).edit()


def test_probes_that_move_each_other_more_than_themselves_are_refused():
    """M = [[1, 2], [2, 1]] is no P-matrix: some bounds have no solution, others several."""
    eye = torch.eye(2, dtype=torch.float64)
    direction = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="independent"):
        minimal_edit(torch.zeros(1, 2), eye, torch.zeros(2), torch.ones(2), torch.ones(2), direction)


WRONG_SHAPES = {
    "weight of one dimension": {"weight": (D_MODEL,)},
    "direction of another count": {"direction": (2, D_MODEL)},
    "direction of another width": {"direction": (3, D_MODEL - 1)},
    "bias of another count": {"bias": (2,)},
    "bias of two dimensions": {"bias": (3, 1)},
    "sense of another count": {"sense": (2,)},
    "bias and sense of another count": {"bias": (2,), "sense": (2,)},
    "bias and sense longer": {"bias": (4,), "sense": (4,)},
    "hidden states of another width": {"hidden_states": (ROWS, D_MODEL + 1)},
    "logit of another count": {"logit": (ROWS, 2)},
    "logit of other rows": {"logit": (ROWS + 1, 3)},
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_shapes_that_disagree_raise_value_error(wrong):
    problem = make(3, seed=23)._replace(**{name: torch.ones(shape).double() for name, shape in wrong.items()})
    with pytest.raises(ValueError, match=r"\(concept, d_model\)|shape"):
        problem.edit()


# --- shapes and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_any_leading_shape(shape, count):
    problem = make(count, seed=24, rows=max(1, math.prod(shape)))
    rows = math.prod(shape)
    edit = minimal_edit(
        problem.hidden_states[:rows].reshape(*shape, D_MODEL),
        problem.weight,
        problem.bias,
        problem.logit[:rows].reshape(*shape, count),
        problem.sense,
    )
    assert edit.shape == (*shape, D_MODEL)
    assert_close(edit.reshape(rows, D_MODEL), problem.edit()[:rows], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_batch_equals_its_rows_alone(count):
    problem = make(count, seed=25, rows=6)
    alone = [problem._replace(hidden_states=problem.hidden_states[r], logit=problem.logit[r]).edit() for r in range(6)]
    assert_close(problem.edit(), torch.stack(alone), atol=1e-12, rtol=1e-12)


def test_one_logit_for_all_rows_equals_one_a_row():
    problem = make(3, seed=26)
    shared = problem._replace(logit=problem.logit[0])
    spread = problem._replace(logit=problem.logit[:1].expand(ROWS, 3))
    assert torch.equal(shared.edit(), spread.edit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_half_precision_hidden_states_are_measured_in_float32(dtype, count):
    problem = make(count, seed=27, dtype=torch.float32)
    problem = problem._replace(hidden_states=problem.hidden_states.to(dtype))
    edit = problem.edit()
    assert edit.dtype == torch.float32
    assert problem.shortfall(problem.hidden_states.float() + edit).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("probe", [torch.float32, torch.float64])
def test_the_edit_is_float64_for_float64_hidden_states_and_float32_otherwise(dtype, probe):
    problem = Problem(*(t.to(probe) for t in make(2, seed=28)[:5]))  # type: ignore[union-attr]
    edit = problem._replace(hidden_states=problem.hidden_states.to(dtype)).edit()
    assert edit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_autocast_changes_nothing(count):
    problem = make(count, seed=29, dtype=torch.float32)
    wanted = problem.edit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = problem.edit()
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_arguments_are_not_changed():
    problem = make(3, seed=30, mahalanobis=True, equalities=1)
    before = [t.clone() for t in problem[:6]]  # type: ignore[union-attr]
    problem.edit()
    assert all(torch.equal(a, b) for a, b in zip(before, problem[:6]))  # type: ignore[arg-type]


# --- the prepared problem ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_bounds_left_out_for_a_row_are_as_if_they_were_not_there(count):
    problem = make(count, seed=31, equalities=1)
    prepared = EditProblem.build(problem.weight, problem.bias, problem.sense)
    on = torch.rand(ROWS, count, generator=torch.Generator().manual_seed(0)) > 0.4
    on[0], on[1] = False, True
    magnitudes = prepared.solve(prepared.read(problem.hidden_states), problem.logit, on)
    assert torch.count_nonzero(magnitudes[~on]) == 0
    assert torch.count_nonzero(magnitudes[0]) == 0
    for row in range(8):
        kept = on[row]
        if kept.any():
            alone = problem.only(kept).edit()[row]
            assert_close(magnitudes[row] @ problem.weight, alone, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_solve_compiles_without_a_graph_break(count):
    problem = make(count, seed=32, dtype=torch.float32, equalities=1 if count > 1 else 0)
    prepared = EditProblem.build(problem.weight, problem.bias, problem.sense)

    def edit(hidden: Tensor, logit: Tensor) -> Tensor:
        return prepared.solve(prepared.read(hidden), logit).to(prepared.direction.dtype) @ prepared.direction

    torch._dynamo.reset()
    try:
        compiled = torch.compile(edit, backend="aot_eager", fullgraph=True)
        found = compiled(problem.hidden_states, problem.logit.double())
    finally:
        torch._dynamo.reset()
    assert_close(found, problem.edit(), atol=1e-6, rtol=1e-5)
    assert found.abs().max() > 0.1


def test_enumeration_and_pivoting_agree():
    """The same twelve bounds, of which six are infinitely far away: pivoting. The other six alone: enumeration."""
    problem = make(12, seed=33)
    far = torch.where(problem.sense > 0, -math.inf, math.inf)
    logit = problem.logit.clone()
    logit[:, 6:] = far[6:]
    pivoted = problem._replace(logit=logit).edit()
    listed = problem.only(range(6))
    assert len(EditProblem.build(problem.weight, problem.bias, problem.sense).members) == 0
    assert len(EditProblem.build(listed.weight, listed.bias, listed.sense).members) == 2**6
    assert_close(pivoted, listed.edit(), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("cosine", [0.9, 0.99, 0.9999])
def test_nearly_parallel_probes_that_oppose_each_other(cosine):
    """The hard case for active sets: at least on one, at most on a probe that nearly agrees with it."""
    problem = make(2, seed=34)
    first, other = torch.linalg.qr(problem.weight.T).Q.T
    weight = torch.stack([first, cosine * first + math.sqrt(1 - cosine**2) * other])
    for senses in itertools.product([1.0, -1.0], repeat=2):
        posed = problem._replace(weight=weight, sense=torch.tensor(senses).double())
        assert posed.shortfall(posed.hidden_states + posed.edit()).max() <= 1e-8
        wanted = np.stack([by_quadprog(posed, row) for row in range(ROWS)])
        assert_close(posed.edit(), torch.from_numpy(wanted), atol=1e-6, rtol=1e-6)
