"""What a sweep over preferences or magnitudes reaches: its Pareto front, and how good the front is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerkit.errors import MissingDependencyError, ObjectiveError


@dataclass(frozen=True)
class Front:
    """Points of a sweep, each with one value for every objective; more is better.

    A point is whatever was set: a preference of P-GAPO, the magnitudes of preference vectors. It is dominated if another is
    at least as good everywhere and better somewhere.

        front = Front.of(["helpful", "harmless"], {eta: measure(eta) for eta in (0.0, 0.5, 1.0)})
        print(front.table())
    """

    objectives: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """`point objective`"""

    @classmethod
    def of(cls, objectives: Sequence[str], points: Mapping[Any, Sequence[float]]) -> "Front":
        """Take points by name.

        Raises:
            ObjectiveError: no points, or values that are not finite or of another number than the objectives.
        """
        values = tuple(tuple(float(value) for value in point) for point in points.values())
        if not values or not objectives:
            raise ObjectiveError("A front needs an objective and a point. Found none.")
        for name, point in zip(points, values, strict=True):
            if len(point) != len(objectives) or not all(map(math.isfinite, point)):
                raise ObjectiveError(
                    f"A point needs one finite value for each of {len(objectives)} objectives. Found {point} for {name!r}."
                )
        return cls(tuple(objectives), tuple(str(name) for name in points), values)

    def dominated(self) -> tuple[bool, ...]:
        """Tell for each point whether another one dominates it; of equal points none does."""
        return tuple(bool(each) for each in ~_moocore().is_nondominated(self._array(), maximise=True, keep_weakly=True))

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Return the volume between a reference and the points that are better than it everywhere.

        Larger is better, in the product of the objectives' units; only fronts with one reference can be compared.

        Raises:
            ObjectiveError: a reference of another length.
        """
        if len(reference) != len(self.objectives):
            raise ObjectiveError(
                f"A reference needs one value for each of {len(self.objectives)} objectives. Found {len(reference)}."
            )
        return float(_moocore().hypervolume(self._array(), ref=list(map(float, reference)), maximise=True))

    def spacing(self) -> float:
        """Return Schott's spacing of the points that are not dominated: 0 for evenly spread ones.

        The standard deviation of each point's distance (L1) to its nearest neighbour. NaN with fewer than three points.
        """
        kept = np.unique(self._array()[[not each for each in self.dominated()]], axis=0)
        if len(kept) < 3:
            return float("nan")
        apart = np.abs(kept[:, None] - kept[None]).sum(axis=2) + np.diag([np.inf] * len(kept))
        return float(apart.min(axis=1).std(ddof=1))

    def table(self) -> str:
        """Return the points as a Markdown table, best first in the first objective."""
        lines = [
            "| point | " + " | ".join(self.objectives) + " | dominated |",
            "|---" * (len(self.objectives) + 2) + "|",
        ]
        rows = sorted(zip(self.names, self.values, self.dominated(), strict=True), key=lambda row: row[1], reverse=True)
        for name, point, beaten in rows:
            lines.append(f"| {name} | " + " | ".join(f"{v:.4g}" for v in point) + f" | {'yes' if beaten else ''} |")
        return "\n".join(lines)

    def _array(self) -> Any:
        return np.asarray(self.values, dtype=float)


def _moocore() -> Any:
    try:
        import moocore
    except ImportError as error:
        raise MissingDependencyError(
            "Fronts are measured by moocore. It is not installed. Run: pip install 'steerkit-sdk[train]'."
        ) from error
    return moocore
