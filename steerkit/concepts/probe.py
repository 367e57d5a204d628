"""One linear probe: fitted, calibrated and measured on texts that the fit never saw.

The only door to scikit-learn. Features are standardised for the fit and the standardisation is folded back, so that
w and b act on raw hidden states: the closed form of GCAV (arXiv:2501.05764, equation 6) is wrong in any other space.
A probability must mean something before an edit can aim at one, so a temperature fitted on held-out texts is folded in
too; without it the same p0 asks for another dose at another regularisation.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import binom, norm
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits
from torch import Tensor

from steerkit.errors import TextsError

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisations that cross-validation chooses from, for standardised features."""

_BINS = 10
_RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Probe:
    """`P(h) = sigmoid(w . h + b)` on raw hidden states (GCAV, equation 1)."""

    weight: Tensor = field(repr=False)
    """`"d_model"` float32."""
    bias: float

    @property
    def cav(self) -> Tensor:
        """The concept activation vector `w / |w|`, `"d_model"`: the unit normal of the probe (equation 2)."""
        return self.weight / self.weight.norm()

    def logit(self, hidden_states: Tensor) -> Tensor:
        """Return `w . h + b` in float32 or better for `"... d_model"`."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return hidden_states.to(wide) @ self.weight.to(hidden_states.device, wide) + self.bias

    def probability(self, hidden_states: Tensor) -> Tensor:
        """Return `sigmoid(w . h + b)` for `"... d_model"`."""
        return self.logit(hidden_states).sigmoid()


@dataclass(frozen=True)
class Figures:
    """What a probe does on held-out texts. Intervals are 95 %."""

    accuracy: float
    """Mean of the two classes' accuracies: chance is 0.5 whatever their sizes."""
    accuracy_interval: tuple[float, float]
    auc: float
    auc_interval: tuple[float, float]
    calibration_error: float
    """Expected calibration error; each half of the held-out texts is measured at the other half's temperature."""
    log_loss: float
    """Mean log loss of the same cross-fitted probabilities; chance is 0.693."""
    standard_error: float
    """Of the accuracy."""
    count: float
    """How many independent held-out texts the figures rest on: all of them, or fewer where groups matter."""


@dataclass(frozen=True)
class Fitted:
    """A probe, its figures, and the unit directions that it could move along."""

    probe: Probe
    figures: Figures
    directions: dict[str, Tensor]
    norm: float
    """Mean norm of the hidden states: the unit in which doses are compared."""


@dataclass(frozen=True)
class Split:
    """Which examples are held out, and which belong together; made once for all layers."""

    held_out: NDArray[np.bool_]
    groups: Labels
    folds: list[tuple[Labels, Labels]]
    """Inner folds of the training part, for the choice of the regularisation."""
    halves: NDArray[np.bool_]
    """Half of the held-out part, for the calibration error."""


def split(labels: Labels, groups: Labels, held_out: float, seed: int) -> Split:
    """Hold out a share of the examples of each class, no group on both sides.

    Raises:
        TextsError: too few examples or groups to hold out a part of each class.
    """
    parts = max(2, round(1 / held_out))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed).split(labels, labels, groups)
            train, test = next(iter(folds))
    except (ValueError, UserWarning) as error:
        raise TextsError(
            f"Each class needs at least {parts} different texts (or groups) to hold out {held_out:g} of them. Found "
            f"{_distinct(groups[labels == 1])} positive and {_distinct(groups[labels == 0])} negative. Add texts."
        ) from error
    mask = np.zeros(len(labels), dtype=bool)
    mask[test] = True
    for name, part in (("held-out", test), ("training", train)):
        counts = np.bincount(labels[part], minlength=2)
        if counts.min() < 1 or (name == "training" and counts.min() < 2):
            raise TextsError(
                f"The {name} part needs texts of both classes. Found {counts[1]} positive and {counts[0]} negative. "
                "Add texts, or make groups smaller."
            )
    inner = min(5, *(_distinct(groups[train][labels[train] == c]) for c in (0, 1)))
    folds_inside: list[tuple[Labels, Labels]] = []
    if inner >= 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            kfold = StratifiedGroupKFold(inner, shuffle=True, random_state=seed)
            folds_inside = [
                (a, b) for a, b in kfold.split(train, labels[train], groups[train]) if len(set(labels[train][a])) == 2
            ]
    halves = np.random.default_rng(seed).permutation(np.unique(groups[test], return_inverse=True)[1].max() + 1)
    half = halves[np.unique(groups[test], return_inverse=True)[1]] % 2 == 0
    return Split(mask, groups, folds_inside, half)


def _distinct(groups: Labels) -> int:
    return len(np.unique(groups))


def fit_probes(
    states: Sequence[Tensor], labels: Labels, parts: Split, *, regularisation: float | None, seed: int
) -> list[Fitted]:
    """Fit a probe a layer. BLAS gets one thread: unbound, small fits on busy cores take 35 to 50 times as long."""
    with threadpool_limits(limits=1, user_api="blas"):
        return [_fit(layer.double().numpy(), labels, parts, regularisation, seed) for layer in states]


def _fit(states: Array, labels: Labels, parts: Split, regularisation: float | None, seed: int) -> Fitted:
    train, test = states[~parts.held_out], states[parts.held_out]
    truth = labels[~parts.held_out]
    strength = regularisation if regularisation is not None else _choose(train, truth, parts.folds)
    weight, bias = _logistic(train, truth, strength)
    raw = test @ weight + bias
    held = labels[parts.held_out]
    figures = _measure(raw, held, parts, seed)
    slope = _slope(raw, held)
    weight, bias = weight * slope, bias * slope
    difference = train[truth == 1].mean(axis=0) - train[truth == 0].mean(axis=0)
    directions = {"probe": weight, "pattern": _pattern(train, weight), "mean_difference": difference}
    return Fitted(
        probe=Probe(torch.tensor(weight, dtype=torch.float32), float(bias)),
        figures=figures,
        directions={name: torch.tensor(_unit(u), dtype=torch.float32) for name, u in directions.items()},
        norm=float(np.linalg.norm(states, axis=1).mean()),
    )


def _logistic(states: Array, labels: Labels, strength: float) -> tuple[Array, float]:
    """Return w and b of an L2-regularised logistic regression with classes weighted equally, on raw states."""
    mean, deviation = states.mean(axis=0), states.std(axis=0)
    deviation[deviation == 0] = 1.0
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((states - mean) / deviation, labels)
    weight = model.coef_[0] / deviation
    return weight, float(model.intercept_[0] - weight @ mean)


def _choose(states: Array, labels: Labels, folds: list[tuple[Labels, Labels]]) -> float:
    """Return the regularisation with the least cross-validated log loss."""
    if not folds:
        return 1e-2
    losses = []
    for strength in _STRENGTHS:
        fold_losses = []
        for fit, check in folds:
            weight, bias = _logistic(states[fit], labels[fit], strength)
            fold_losses.append(_log_loss(states[check] @ weight + bias, labels[check]))
        losses.append(np.mean(fold_losses))
    return _STRENGTHS[int(np.argmin(losses))]


def _log_loss(logits: Array, labels: Labels) -> float:
    """Return the mean log loss, both classes weighted equally."""
    losses = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    return float(np.mean([losses[labels == c].mean() for c in np.unique(labels)]))


def _slope(logits: Array, labels: Labels) -> float:
    """Return the factor (one over the temperature) that calibrates logits: least log loss with a weak prior.

    The prior, a standard normal on the logarithm worth one text, keeps it finite when the held-out texts are separated
    perfectly and positive when the probe is at chance.
    """

    def loss(log_slope: float) -> float:
        return len(labels) * _log_loss(math.exp(log_slope) * logits, labels) + log_slope**2 / 2

    return math.exp(minimize_scalar(loss, bounds=(-6.0, 6.0), method="bounded").x)


def _measure(logits: Array, labels: Labels, parts: Split, seed: int) -> Figures:
    hits = (logits > 0) == (labels == 1)
    accuracy = float(np.mean([hits[labels == c].mean() for c in (0, 1)]))
    count = _independent(hits, accuracy, parts.groups[parts.held_out])
    auc = float(roc_auc_score(labels, logits))
    calibrated = expit(_cross_fitted(logits, labels, parts.halves))
    shrunk = (accuracy * count + 1) / (count + 2)
    return Figures(
        accuracy=accuracy,
        accuracy_interval=_wilson(accuracy, count),
        auc=auc,
        auc_interval=_auc_interval(logits, labels, parts.groups[parts.held_out], seed),
        calibration_error=_calibration_error(calibrated, labels),
        log_loss=_log_loss(np.log(calibrated / (1 - calibrated)).clip(-50, 50), labels),
        standard_error=math.sqrt(shrunk * (1 - shrunk) / count),
        count=count,
    )


def at_chance(figures: Figures, tried: int) -> bool:
    """Return whether the best of so many coins would do as well with a probability above 15 % (Bonferroni's bound).

    The bound is loose, since neighbouring layers see nearly the same, so the level is not the usual 5 %.
    """
    hits = figures.accuracy * figures.count
    return float(binom.sf(math.ceil(hits - 1e-9) - 1, round(figures.count), 0.5)) * tried > 0.15


def _cross_fitted(logits: Array, labels: Labels, half: NDArray[np.bool_]) -> Array:
    """Return logits calibrated on the other half, so that no text is measured at a temperature that it helped to fit."""
    calibrated = logits.copy()
    for part in (half, ~half):
        if part.any() and len(np.unique(labels[~part])) == 2:
            calibrated[part] *= _slope(logits[~part], labels[~part])
    return calibrated.clip(-30, 30)


def _calibration_error(probabilities: Array, labels: Labels) -> float:
    """Return the expected calibration error over bins of equal mass."""
    order = np.argsort(probabilities, kind="stable")
    bins = np.array_split(order, max(1, min(_BINS, len(order) // 5)))
    gaps = [abs(probabilities[b].mean() - labels[b].mean()) * len(b) for b in bins if len(b)]
    return float(sum(gaps) / len(order))


def _independent(hits: NDArray[np.bool_], accuracy: float, groups: Labels) -> float:
    """Return how many independent texts the held-out ones are worth: all if groups do not matter, at least one a group.

    The variance of the accuracy over groups against the binomial one (Kish's design effect).
    """
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=hits - accuracy)
    variance = float((by_group**2).sum()) / len(hits) ** 2
    binomial = accuracy * (1 - accuracy)
    worth = binomial / variance if variance > 0 and binomial > 0 else _distinct(groups)
    return float(np.clip(worth, _distinct(groups), len(hits)))


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` independent texts."""
    z = float(norm.ppf(0.975))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _auc_interval(logits: Array, labels: Labels, groups: Labels, seed: int) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval over groups."""
    generator = np.random.default_rng(seed)
    places = np.unique(groups, return_inverse=True)[1]
    count = places.max() + 1
    order = np.argsort(logits, kind="stable")
    values, truth, places = logits[order], labels[order] == 1, places[order]
    tied = np.unique(values, return_inverse=True)[1]
    aucs = []
    for _ in range(_RESAMPLES):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)[places].astype(float)
        positive = np.bincount(tied, weights * truth)
        negative = np.bincount(tied, weights * ~truth)
        total = positive.sum() * negative.sum()
        if total > 0:
            below = np.cumsum(negative) - negative
            aucs.append(float((positive * (below + negative / 2)).sum() / total))
    low, high = np.quantile(aucs, [0.025, 0.975]) if aucs else (0.0, 1.0)
    return float(low), float(high)


def _pattern(states: Array, weight: Array) -> Array:
    """Return Sigma w, Sigma the Ledoit-Wolf covariance of the states, without forming a d x d matrix.

    The pattern that belongs to a filter (Haufe et al. 2014): how the states move when what the probe reads moves.
    """
    centred = states - states.mean(axis=0)
    shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    spread = float((centred**2).mean())
    return (1 - shrinkage) * (centred.T @ (centred @ weight)) / len(centred) + shrinkage * spread * weight


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector
