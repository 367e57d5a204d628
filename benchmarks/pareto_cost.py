"""Exactness and time of the min-norm weights, beside TorchJD's MGDA on the same Gramians.

    python benchmarks/pareto_cost.py --json benchmarks/results/pareto_cost.json        (about 10 minutes of one core)

Gramians are of integer gradients times powers of ten (norms over six orders of magnitude, often dependent), so that they
are exact in float64; the optimum is found by enumeration of every active set in rational arithmetic. TorchJD (`pip
install --no-deps torchjd`) is read where it is installed and otherwise left out.
"""

import importlib.util
import itertools
import math
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from common import arguments, header, quiet, save, spread, table
from torch import Tensor

from steerkit.maths.pareto import gapo_weights, min_norm_point

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "maths"))


def gramians(count: int, objectives: int, dice: torch.Generator) -> list[Tensor]:
    """Return Gramians that are exact in float64."""
    found = []
    for _ in range(count):
        width = int(torch.randint(1, 2 * objectives + 1, (1,), generator=dice))
        rows = torch.randint(-9, 10, (objectives, width), generator=dice).double()
        rows[rows.norm(dim=1) == 0, 0] = 1.0
        rows *= 10.0 ** torch.randint(0, 7, (objectives, 1), generator=dice)
        found.append(rows @ rows.T)
    return found


def exact(weights: Tensor, gramian: list[list[Fraction]]) -> tuple[Fraction, list[Fraction]]:
    """Return the squared norm of a combination, and its product with each gradient, without rounding."""
    shares = [Fraction(float(w)) for w in weights]
    shares = [share / sum(shares) for share in shares]
    products = [sum((g * s for g, s in zip(row, shares, strict=True)), Fraction(0)) for row in gramian]
    return sum((s * p for s, p in zip(shares, products, strict=True)), Fraction(0)), products


def judged(solve: Any, cases: list[tuple[Tensor, list[list[Fraction]], Fraction]]) -> dict[str, float]:
    """Return the worst excess of the length over the optimum, and the worst violation of optimality.

    Both in units of the length that the chosen gradients would have without cancelling.
    """
    excess = violation = relative = 0.0
    for gramian, rational, best in cases:
        weights = solve(gramian).double()
        square, products = exact(weights, rational)
        norms = gramian.diagonal().sqrt()
        scale = float((weights / weights.sum()) @ norms)
        root, least = math.sqrt(float(square)), math.sqrt(float(best))
        excess = max(excess, (root - least) / scale)
        if least > 1e-6 * scale:
            relative = max(relative, float(square / best) - 1)
        gaps = [float(square - p) / (float(n) * scale) for p, n in zip(products, norms, strict=True)]
        violation = max(violation, *gaps)
    return {"excess of the length": excess, "violation": violation, "excess of the square where positive": relative}


def main() -> None:
    given = arguments(__doc__, problems=1000, rounds=7)
    quiet()
    facts = header(given)
    from test_pareto import least

    solvers: dict[str, Any] = {"steerkit": min_norm_point}
    if importlib.util.find_spec("torchjd") is not None:
        from torchjd.aggregation import MGDAWeighting

        solvers["TorchJD MGDA"] = MGDAWeighting()
    found: dict[str, Any] = {**facts, "problems": given.problems, "solvers": {}}
    rows = []
    for objectives in (2, 3, 5, 8):
        dice = torch.Generator().manual_seed(given.seed + objectives)
        cases = []
        for gramian in gramians(given.problems, objectives, dice):
            rational = [[Fraction(int(value)) for value in row] for row in gramian.tolist()]
            cases.append((gramian, rational, least(rational)))
        times: dict[str, list[float]] = {name: [] for name in solvers}
        for _, (name, solve) in itertools.product(range(given.rounds), solvers.items()):
            start = time.perf_counter()
            for gramian, _, _ in cases[:200]:
                solve(gramian)
            times[name].append((time.perf_counter() - start) / 200)
        for name, solve in solvers.items():
            figures = {**judged(solve, cases), "us": [1e6 * t for t in spread(times[name])]}
            found["solvers"].setdefault(name, {})[str(objectives)] = figures
            rows.append(
                [
                    objectives,
                    name,
                    *(f"{figures[k]:.1e}" for k in list(figures)[:3]),
                    "{1:.0f} [{0:.0f} {2:.0f}]".format(*figures["us"]),
                ]
            )
    dice = torch.Generator().manual_seed(given.seed)
    wide = torch.randn(3, 1000, generator=dice, dtype=torch.float64)
    start = time.perf_counter()
    for _ in range(1000):
        gapo_weights(wide @ wide.T)
    found["gapo_weights, 3, us"] = 1e3 * (time.perf_counter() - start)
    table(rows, ["objectives", "solver", "excess of the length", "violation", "excess of the square", "us a solve"])
    save(given.json, found)


if __name__ == "__main__":
    main()
