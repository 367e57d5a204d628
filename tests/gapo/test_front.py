"""Fronts: dominance, hypervolume and spacing of known points."""

import math

import pytest

from steerkit.errors import ObjectiveError
from steerkit.gapo.front import Front

STAIRS = Front.of(["x", "y"], {"a": (1, 3), "b": (2, 2), "c": (3, 1), "inside": (1, 1), "edge": (1, 2)})


def test_a_point_is_dominated_by_one_that_is_nowhere_worse() -> None:
    assert STAIRS.dominated() == (False, False, False, True, True)


def test_equal_points_do_not_dominate_each_other() -> None:
    assert Front.of(["x", "y"], {1: (1, 2), 2: (1, 2)}).dominated() == (False, False)


def test_hypervolume_is_the_area_under_the_stairs() -> None:
    assert STAIRS.hypervolume([0, 0]) == pytest.approx(3 + 2 + 1)
    assert STAIRS.hypervolume([1, 1]) == pytest.approx(1)
    assert STAIRS.hypervolume([5, 5]) == 0


def test_spacing_is_zero_for_even_points_and_undefined_for_two() -> None:
    assert STAIRS.spacing() == 0
    uneven = Front.of(["x", "y"], {"a": (0, 4), "b": (1, 3), "c": (4, 0)})
    assert uneven.spacing() == pytest.approx(math.sqrt(((2 - 10 / 3) ** 2 * 2 + (6 - 10 / 3) ** 2) / 2))
    assert math.isnan(Front.of(["x", "y"], {"a": (0, 1), "b": (1, 0)}).spacing())


def test_the_table_names_what_is_dominated() -> None:
    lines = STAIRS.table().splitlines()
    assert lines[0] == "| point | x | y | dominated |"
    assert lines[2] == "| c | 3 | 1 |  |"
    assert "| inside | 1 | 1 | yes |" in lines


@pytest.mark.parametrize("points", [{}, {"a": (1,)}, {"a": (1, math.nan)}])
def test_points_must_be_whole_and_finite(points: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ObjectiveError, match="Found"):
        Front.of(["x", "y"], points)


def test_a_reference_needs_every_objective() -> None:
    with pytest.raises(ObjectiveError, match="each of 2"):
        STAIRS.hypervolume([0])
