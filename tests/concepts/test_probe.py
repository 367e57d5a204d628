"""One probe: the numbers of scikit-learn, planted truths, and held-out figures that mean what they say."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from steerkit.concepts import probe as module
from steerkit.concepts.probe import Fitted, Probe, Split, fit_probes, split
from steerkit.errors import TextsError

D_MODEL = 12


def direction(seed: int = 0, d_model: int = D_MODEL) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=d_model)
    return vector / np.linalg.norm(vector)


def gaussians(
    positive: int = 200, negative: int = 200, *, distance: float = 1.5, seed: int = 1, d_model: int = D_MODEL
) -> tuple[np.ndarray, np.ndarray]:
    """States N(+-distance/2 v, 1): the posterior of the first class is sigmoid(distance v.x) for equal classes."""
    generator = np.random.default_rng(seed)
    labels = np.array([1] * positive + [0] * negative)
    states = generator.normal(size=(positive + negative, d_model))
    return states + distance * (labels - 0.5)[:, None] * direction(d_model=d_model), labels


def parts_of(labels: np.ndarray, *, groups: np.ndarray | None = None, held_out: float = 0.2, seed: int = 0) -> Split:
    return split(labels, np.arange(len(labels)) if groups is None else groups, held_out, seed)


def fit(
    states: np.ndarray, labels: np.ndarray, parts: Split | None = None, *, strength: float | None = 1e-2, seed: int = 0
) -> Fitted:
    parts = parts_of(labels) if parts is None else parts
    return fit_probes([torch.tensor(states)], labels, parts, regularisation=strength, seed=seed)[0]


def anisotropic(states: np.ndarray, seed: int = 3) -> np.ndarray:
    """The same states as a residual stream has them: mixed, far from zero, with a few huge coordinates."""
    generator = np.random.default_rng(seed)
    mixed = states @ (np.eye(states.shape[1]) + 0.4 * generator.normal(size=(states.shape[1],) * 2))
    scale = np.exp(generator.normal(size=states.shape[1]))
    scale[0] = 60
    return mixed * scale + 5 * scale * generator.normal(size=states.shape[1])


# --- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("negative", [200, 60], ids=["balanced", "unequal"])
def test_equals_scikit_learn_up_to_the_calibration_slope(strength, negative):
    states, labels = gaussians(200, negative)
    states = anisotropic(states)
    parts = parts_of(labels)
    fitted = fit(states, labels, parts, strength=strength)
    pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-8)
    ).fit(states[~parts.held_out], labels[~parts.held_out])
    golden = pipeline.decision_function(states)
    found = fitted.probe.weight.double().numpy() @ states.T + fitted.probe.bias
    slope = float(golden @ found / (golden @ golden))
    assert slope > 0
    assert np.abs(found - slope * golden).max() < 5e-3 * np.abs(found).max()  # the solver's own tolerance
    raw = golden[parts.held_out]
    assert fitted.figures.auc == pytest.approx(roc_auc_score(labels[parts.held_out], raw), abs=1e-12)


def test_the_calibration_slope_is_the_best_on_the_held_out_part():
    """Least balanced log loss over the temperature, with the prior that the docstring names."""
    states, labels = gaussians(300, 150)
    parts = parts_of(labels)
    fitted = fit(states, labels, parts)
    logits = fitted.probe.logit(torch.tensor(states[parts.held_out])).double().numpy()
    truth = labels[parts.held_out]

    def loss(log_slope: float) -> float:
        each = np.logaddexp(0, np.where(truth == 1, -1, 1) * math.exp(log_slope) * logits)
        return len(truth) * (each[truth == 1].mean() + each[truth == 0].mean()) / 2

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    assert abs(best) < 0.1, "after calibration the best temperature is one, up to a prior worth one text"


def test_the_regularisation_is_the_one_with_the_least_cross_validated_log_loss():
    states, labels = gaussians(100, 100, distance=1.0, d_model=40)
    parts = parts_of(labels)
    train, truth = states[~parts.held_out], labels[~parts.held_out]
    losses = []
    for strength in module._STRENGTHS:
        folds = []
        for a, b in parts.folds:
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
            )
            logits = model.fit(train[a], truth[a]).decision_function(train[b])
            each = np.logaddexp(0, np.where(truth[b] == 1, -logits, logits))
            folds.append((each[truth[b] == 1].mean() + each[truth[b] == 0].mean()) / 2)
        losses.append(np.mean(folds))
    chosen = module._STRENGTHS[int(np.argmin(losses))]
    assert chosen not in (module._STRENGTHS[0], module._STRENGTHS[-1]), "the test needs a choice in the middle"
    free, fixed = fit(states, labels, parts, strength=None), fit(states, labels, parts, strength=chosen)
    assert torch.equal(free.probe.weight, fixed.probe.weight)


@pytest.mark.parametrize("seed", range(3))
def test_the_pattern_is_the_ledoit_wolf_covariance_times_the_weight(seed):
    states, labels = gaussians(80, 80, seed=seed, d_model=30)
    states = anisotropic(states, seed)
    parts = parts_of(labels)
    fitted = fit(states, labels, parts)
    covariance = LedoitWolf().fit(states[~parts.held_out]).covariance_
    wanted = covariance @ fitted.directions["probe"].double().numpy()
    wanted = torch.tensor(wanted / np.linalg.norm(wanted), dtype=torch.float32)
    assert_close(fitted.directions["pattern"], wanted, atol=2e-5, rtol=1e-4)
    assert float(fitted.directions["pattern"] @ fitted.directions["probe"]) < 0.9, "the test needs them to differ"


def test_the_mean_difference_is_of_the_training_part():
    states, labels = gaussians()
    parts = parts_of(labels)
    train, truth = states[~parts.held_out], labels[~parts.held_out]
    wanted = train[truth == 1].mean(axis=0) - train[truth == 0].mean(axis=0)
    found = fit(states, labels, parts).directions["mean_difference"]
    assert_close(found, torch.tensor(wanted / np.linalg.norm(wanted), dtype=torch.float32), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["probe", "pattern", "mean_difference"])
def test_directions_are_unit_and_point_to_the_concept(kind):
    states, labels = gaussians()
    fitted = fit(anisotropic(states), labels)
    found = fitted.directions[kind]
    assert found.dtype == torch.float32
    assert float(found.norm()) == pytest.approx(1, abs=1e-6)
    assert float(found @ fitted.probe.weight) > 0
    if kind == "probe":
        assert_close(found, fitted.probe.cav, atol=1e-6, rtol=1e-5)


def test_the_norm_is_the_mean_over_all_states():
    states, labels = gaussians()
    assert fit(states, labels).norm == pytest.approx(float(np.linalg.norm(states, axis=1).mean()), rel=1e-6)


# --- the probe as a function ------------------------------------------------------------------------------------------


def test_logit_probability_and_cav():
    probe = Probe(torch.tensor([3.0, -4.0]), 0.5)
    assert_close(probe.cav, torch.tensor([0.6, -0.8]))
    hidden = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert_close(probe.logit(hidden), torch.tensor([[-0.5, 0.5]]))
    assert_close(probe.probability(hidden), torch.tensor([[-0.5, 0.5]]).sigmoid())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_states_are_float32(dtype):
    probe = Probe(torch.linspace(-1, 1, 8), 0.25)
    hidden = torch.randn(5, 8).to(dtype)
    assert probe.logit(hidden).dtype == torch.float32
    assert_close(probe.logit(hidden), hidden.float() @ probe.weight + 0.25)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_scaling_w_and_b_keeps_the_cav_and_changes_the_probability(factor):
    """papers.md 3.7, contract 9: (w, b) is more than its CAV."""
    probe = Probe(torch.tensor([3.0, -4.0]), 0.5)
    scaled = Probe(factor * probe.weight, factor * probe.bias)
    hidden = torch.tensor([1.0, 0.2])
    assert_close(scaled.cav, probe.cav)
    assert_close(scaled.logit(hidden), factor * probe.logit(hidden))
    assert abs(float(scaled.probability(hidden) - probe.probability(hidden))) > 0.02


# --- planted truths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_known_direction_is_found(seed):
    states, labels = gaussians(1000, 1000, distance=2.0, seed=seed)
    fitted = fit(states, labels, strength=None)
    planted = torch.tensor(direction(), dtype=torch.float32)
    for kind in fitted.directions:
        assert float(fitted.directions[kind] @ planted) > 0.97, kind
    assert fitted.figures.accuracy == pytest.approx(0.841, abs=0.04)  # Phi(1)


@pytest.mark.parametrize("strength", [None, 1e-4, 1.0])
def test_probabilities_match_the_known_posterior_whatever_the_regularisation(strength):
    """Without calibration the strongly regularised fit would say 0.5 to everything."""
    distance = 2.0
    states, labels = gaussians(1500, 1500, distance=distance)
    fitted = fit(states, labels, strength=strength)
    posterior = expit(distance * states @ direction())
    found = fitted.probe.probability(torch.tensor(states)).numpy()
    assert np.abs(found - posterior).mean() < 0.03
    assert np.abs(found - posterior).max() < 0.3
    assert fitted.figures.calibration_error < 0.06


def test_far_from_the_origin_the_probe_still_finds_its_threshold():
    states, labels = gaussians(1000, 1000, distance=2.0)
    offset = 40 * direction(9)
    fitted = fit(states + offset, labels)
    posterior = expit(2.0 * states @ direction())
    assert np.abs(fitted.probe.probability(torch.tensor(states + offset)).numpy() - posterior).mean() < 0.04


def test_unequal_classes_keep_the_threshold_between_them():
    """Weighted equally, the rare class does not push the threshold away; accuracy is the mean of both classes'."""
    states, labels = gaussians(1500, 150, distance=2.0)
    fitted = fit(states, labels)
    assert fitted.figures.accuracy == pytest.approx(0.841, abs=0.06)
    middle = fitted.probe.bias / float(fitted.probe.weight.norm())
    assert abs(middle) < 0.25
    predicted = fitted.probe.logit(torch.tensor(states)) > 0
    accuracies = [(predicted.numpy()[labels == c] == (c == 1)).mean() for c in (0, 1)]
    assert abs(accuracies[0] - accuracies[1]) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_labels_are_at_chance(seed):
    states, labels = gaussians(200, 200, distance=3.0)
    labels = np.random.default_rng(seed).permutation(labels)
    figures = fit(states, labels, seed=seed).figures
    assert figures.accuracy_interval[0] <= 0.5
    assert figures.auc_interval[0] <= 0.5
    assert figures.accuracy == pytest.approx(0.5, abs=0.2)
    assert figures.log_loss == pytest.approx(math.log(2), abs=0.05)


def test_a_feature_that_never_changes_does_no_harm():
    states, labels = gaussians()
    states[:, 3] = 7.0
    fitted = fit(states, labels)
    assert fitted.probe.weight.isfinite().all()
    assert float(fitted.probe.weight[3]) == pytest.approx(0, abs=1e-9)


def test_perfectly_separated_classes_stay_finite():
    states, labels = gaussians(60, 60, distance=60.0)
    fitted = fit(states, labels, strength=None)
    assert fitted.probe.weight.isfinite().all()
    assert math.isfinite(fitted.probe.bias)
    assert fitted.figures.accuracy == 1.0
    assert fitted.figures.auc_interval == (1.0, 1.0)
    assert fitted.figures.accuracy_interval[0] < 1.0


def test_states_that_are_all_alike_are_at_chance_and_finite():
    """The first layers of some models hand on the same vector whatever the text said."""
    labels = np.array([1] * 20 + [0] * 20)
    fitted = fit(np.ones((40, D_MODEL)), labels)
    assert fitted.probe.weight.isfinite().all()
    assert fitted.figures.auc == 0.5
    assert all(direction.isfinite().all() for direction in fitted.directions.values())


# --- what is held out -------------------------------------------------------------------------------------------------


def test_held_out_examples_never_move_the_direction():
    states, labels = gaussians()
    parts = parts_of(labels)
    other = states.copy()
    other[parts.held_out] = 10 * np.random.default_rng(5).normal(size=(int(parts.held_out.sum()), D_MODEL)) + 3
    first, second = fit(states, labels, parts, strength=None), fit(other, labels, parts, strength=None)
    for kind in first.directions:
        assert_close(first.directions[kind], second.directions[kind], atol=1e-6, rtol=1e-6)
    midpoint = first.probe.bias / float(first.probe.weight.norm())
    assert second.probe.bias / float(second.probe.weight.norm()) == pytest.approx(midpoint, abs=1e-6)
    assert first.figures.accuracy - second.figures.accuracy > 0.1
    assert float(first.probe.weight.norm()) > 1.2 * float(second.probe.weight.norm()), "only the temperature follows"


def test_one_training_example_does_move_the_direction():
    """The counterpart of the test above: it can fail."""
    states, labels = gaussians()
    parts = parts_of(labels)
    other = states.copy()
    other[np.flatnonzero(~parts.held_out)[0]] += 5
    assert float((fit(states, labels, parts).probe.cav - fit(other, labels, parts).probe.cav).abs().max()) > 1e-4


@pytest.mark.parametrize("held_out", [0.1, 0.2, 0.25, 0.5])
@pytest.mark.parametrize(("positive", "negative"), [(100, 100), (200, 40)])
def test_the_share_of_each_class_is_held_out(held_out, positive, negative):
    labels = np.array([1] * positive + [0] * negative)
    mask = parts_of(labels, held_out=held_out).held_out
    assert mask[labels == 1].mean() == pytest.approx(held_out, abs=0.04)
    assert mask[labels == 0].mean() == pytest.approx(held_out, abs=0.04)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(2, 6), mixed=st.booleans())
def test_no_group_is_on_both_sides(seed, size, mixed):
    labels = np.array([1] * 60 + [0] * 60)
    groups = np.arange(120) // size if not mixed else np.arange(120) % 30
    parts = parts_of(labels, groups=groups, seed=seed)
    assert not set(groups[parts.held_out]) & set(groups[~parts.held_out])
    inside = groups[~parts.held_out]
    for fitted_on, checked_on in parts.folds:
        assert not set(inside[fitted_on]) & set(inside[checked_on])
    test_groups = groups[parts.held_out]
    assert not set(test_groups[parts.halves]) & set(test_groups[~parts.halves])
    assert 0 < parts.halves.sum() < len(parts.halves)


def test_seeds_are_reproducible_and_differ():
    states, labels = gaussians()
    first, again, other = (fit(states, labels, parts_of(labels, seed=s), seed=s) for s in (4, 4, 5))
    assert torch.equal(first.probe.weight, again.probe.weight)
    assert first.figures == again.figures
    assert first.probe.bias == again.probe.bias
    assert not torch.equal(first.probe.weight, other.probe.weight)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([1] * 20 + [0] * 20, [0] * 20 + [1] * 20),
        ([1] * 20 + [0] * 3, None),
        ([1] * 2 + [0] * 2, [0, 1, 0, 1]),
    ],
    ids=["one group a class", "three of a class", "two groups"],
)
def test_too_few_to_hold_out_is_refused(labels, groups):
    with pytest.raises(TextsError, match=r"Add texts"):
        parts_of(np.array(labels), groups=None if groups is None else np.array(groups))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.9, 10, 0.5958, 0.9821), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 100, 0.4038, 0.5962)],
)
def test_wilson_against_published_values(share, count, low, high):
    assert module._wilson(share, count) == pytest.approx((low, high), abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), distance=st.floats(0, 4), positive=st.integers(15, 60), negative=st.integers(15, 60))
def test_figures_are_sane(seed, distance, positive, negative):
    states, labels = gaussians(positive, negative, distance=distance, seed=seed)
    figures = fit(states, labels, parts_of(labels, seed=seed), seed=seed).figures
    tiny = 1e-12
    for (low, high), value in ((figures.accuracy_interval, figures.accuracy), (figures.auc_interval, figures.auc)):
        assert 0 <= low <= value + tiny
        assert value - tiny <= high <= 1
    assert 0 <= figures.calibration_error <= 1
    assert 0 < figures.standard_error < 0.5
    assert math.isfinite(figures.log_loss)


def test_the_bootstrap_interval_covers_the_true_auc_and_shrinks():
    """Scores N(1, 1) against N(0, 1): AUC = Phi(1 / sqrt 2) = .760."""
    generator = np.random.default_rng(0)
    covered, widths = 0, {60: 0.0, 600: 0.0}
    for count in widths:
        for trial in range(20):
            labels = np.array([1] * (count // 2) + [0] * (count // 2))
            logits = generator.normal(size=count) + labels
            low, high = module._auc_interval(logits, labels, np.arange(count), trial)
            covered += low <= 0.760 <= high
            widths[count] += (high - low) / 20
    assert covered >= 34
    assert 2 < widths[60] / widths[600] < 5


def test_repeated_texts_of_a_group_do_not_narrow_the_intervals():
    """Five copies of each text are one text: intervals count groups."""
    states, labels = gaussians(150, 150, distance=1.0)
    groups = np.arange(300)
    copies = [np.repeat(a, 5, axis=0) for a in (states, labels, groups)]
    alone = fit(states, labels, parts_of(labels, groups=groups)).figures
    copied = fit(copies[0], copies[1], parts_of(copies[1], groups=copies[2])).figures
    width = alone.accuracy_interval[1] - alone.accuracy_interval[0]
    assert copied.accuracy_interval[1] - copied.accuracy_interval[0] > 0.7 * width
    assert copied.auc_interval[1] - copied.auc_interval[0] > 0.7 * (alone.auc_interval[1] - alone.auc_interval[0])
    assert copied.standard_error > 0.7 * alone.standard_error


def test_ties_count_half_in_the_auc_interval():
    labels = np.array([1, 0] * 10)
    assert module._auc_interval(np.zeros(20), labels, np.arange(20), 0) == (0.5, 0.5)


def test_the_standard_error_is_finite_for_a_perfect_probe():
    states, labels = gaussians(50, 50, distance=50.0)
    figures = fit(states, labels).figures
    assert figures.accuracy == 1.0
    assert figures.standard_error == pytest.approx(math.sqrt((21 / 22) * (1 / 22) / 20), abs=1e-12)


def test_calibration_error_of_a_hand_made_case():
    """Two bins of five: said .2, true .4; said .8, true .8."""
    probabilities = np.array([0.2] * 5 + [0.8] * 5)
    labels = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 0])
    assert module._calibration_error(probabilities, labels) == pytest.approx(0.1)


# --- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_of_the_states_is_irrelevant(factor):
    """Standardised and folded back: scaled states give the same logits, so the same edit in their own unit."""
    states, labels = gaussians()
    plain, scaled = fit(states, labels), fit(factor * states, labels)
    assert_close(scaled.probe.weight * factor, plain.probe.weight, atol=1e-5, rtol=1e-4)
    assert scaled.probe.bias == pytest.approx(plain.probe.bias, abs=1e-4)


def test_the_scale_of_single_coordinates_is_irrelevant_to_what_the_probe_reads():
    states, labels = gaussians()
    scale = np.exp(np.random.default_rng(2).normal(size=D_MODEL))
    plain, scaled = fit(states, labels), fit(states * scale, labels)
    assert_close(
        scaled.probe.logit(torch.tensor(states * scale)), plain.probe.logit(torch.tensor(states)), atol=1e-3, rtol=1e-3
    )


def test_the_fit_is_silent_and_leaves_its_inputs_alone():
    states, labels = gaussians()
    tensor, parts = torch.tensor(states), parts_of(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_probes([tensor, tensor], labels, parts, regularisation=None, seed=0)
    assert torch.equal(tensor, torch.tensor(states))
