"""A concept: what it is fitted on, what it reports, the interventions it gives, and a truth planted in a model."""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tiny import D_MODEL, DEPTH, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.testing import assert_close

from steerkit import Concept, Controller, record
from steerkit.activations import Activations
from steerkit.concepts import probe
from steerkit.concepts.probe import Figures, Probe
from steerkit.errors import (
    AmountError,
    BaseModelMismatchError,
    LayerError,
    SteerkitWarning,
    TextsError,
    UnsupportedModelError,
)
from steerkit.model import find_decoder
from steerkit.types import DIRECTIONS

LAYERS = (0, 2, 3)
WIDTH = 8


def planted(
    positive: int = 60, negative: int = 60, *, distance: float = 3.0, seed: int = 0, layers: tuple[int, ...] = LAYERS
) -> tuple[Activations, Activations]:
    """Recordings of which the first coordinate carries the concept; the higher the layer, the more clearly."""
    generator = torch.Generator().manual_seed(seed)

    def side(count: int, sign: float) -> Activations:
        states = {layer: torch.randn(count, WIDTH, generator=generator) for layer in layers}
        for rank, layer in enumerate(layers):
            states[layer][:, 0] += sign * distance / 2 * (rank + 1) / len(layers)
        return Activations(states, "last")

    return side(positive, 1.0), side(negative, -1.0)


@pytest.fixture(scope="module")
def concept() -> Concept:
    return Concept.from_activations("planted", *planted(200, 200))


def with_accuracies(
    concept: Concept, accuracies: dict[int, float], *, error: float = 0.05, losses: Any = None
) -> Concept:
    """The same concept with other figures."""
    figures = {
        layer: dataclasses.replace(
            concept.figures[layer], accuracy=accuracy, standard_error=error, log_loss=(losses or {}).get(layer, 0.5)
        )
        for layer, accuracy in accuracies.items()
    }
    return dataclasses.replace(concept, figures=figures)


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_one_probe_a_layer(concept):
    assert concept.layers == LAYERS
    assert set(concept.accuracy) == set(concept.auc) == set(concept.calibration_error) == set(LAYERS)
    for layer in LAYERS:
        assert isinstance(concept[layer], Probe)
        assert concept[layer].weight.shape == (WIDTH,)
        assert concept[layer].weight.dtype == torch.float32
        assert isinstance(concept.figures[layer], Figures)
        assert concept.norms[layer] > 0


def test_layers_count_from_the_end(concept):
    assert concept.depth == 4
    assert concept[-1] is concept[3]
    assert concept[-2] is concept[2]


@pytest.mark.parametrize("layer", [1, -3, 4, -5, 99])
def test_a_layer_without_a_probe_is_an_index_error(concept, layer):
    with pytest.raises(LayerError, match=r"Layer -?\d+"):
        concept[layer]
    with pytest.raises(LayerError):
        concept.erase(layers=[2, layer])


@pytest.mark.parametrize("layer", ["2", 2.0, None, True])
def test_a_layer_is_an_integer(concept, layer):
    with pytest.raises(LayerError):
        concept.constrain(at_most=0.1, layers=[layer])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_are_unit_and_along_chooses_one(concept, direction):
    chosen = concept.along(direction)
    assert chosen.direction == direction
    assert concept.direction == "pattern", "along returns another concept"
    assert chosen.probes is concept.probes
    assert set(chosen.mover) == set(LAYERS)
    for layer in LAYERS:
        assert float(chosen.mover[layer].norm()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(chosen.mover[layer], concept.directions[direction][layer])
        assert float(chosen.mover[layer] @ concept[layer].weight) > 0


def test_the_probe_direction_is_the_cav(concept):
    for layer in LAYERS:
        assert_close(concept.along("probe").mover[layer], concept[layer].cav, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", ["cav", "", None, "Probe"])
def test_another_direction_is_refused(concept, direction):
    with pytest.raises(AmountError, match="probe, pattern, mean_difference"):
        concept.along(direction)
    with pytest.raises(AmountError, match="probe, pattern, mean_difference"):
        Concept.from_activations("c", *planted(), direction=direction)


def test_it_says_what_it_is(concept):
    text = repr(concept)
    for part in ("planted", "pattern", "best layer 3", "steering_layers", f"{concept.made['held_out']} held-out"):
        assert part in text


def test_a_concept_is_frozen(concept):
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.name = "other"


# --- which layers -----------------------------------------------------------------------------------------------------


def test_the_planted_layers_rank_as_planted(concept):
    assert concept.best_layer == 3
    assert concept.accuracy[3] > concept.accuracy[0]


@pytest.mark.parametrize(
    ("accuracies", "error", "wanted"),
    [
        ({0: 0.6, 2: 0.9, 3: 0.86}, 0.05, (2, 3)),
        ({0: 0.6, 2: 0.9, 3: 0.84}, 0.05, (2,)),
        ({0: 0.9, 2: 0.9, 3: 0.9}, 0.01, (0, 2, 3)),
        ({0: 0.9, 2: 0.9, 3: 0.9}, 0.0, (0, 2, 3)),
        ({0: 0.4, 2: 0.3, 3: 0.5}, 0.0, (3,)),
        ({0: 0.2, 2: 0.1, 3: 0.0}, 0.3, (0, 2, 3)),
    ],
)
def test_steering_layers_are_within_one_standard_error_of_the_best(concept, accuracies, error, wanted):
    assert with_accuracies(concept, accuracies, error=error).steering_layers == wanted


def test_among_equal_accuracies_the_best_has_the_least_log_loss(concept):
    accuracies = {0: 0.8, 2: 0.8, 3: 0.7}
    assert with_accuracies(concept, accuracies, losses={0: 0.4, 2: 0.3, 3: 0.1}).best_layer == 2
    assert with_accuracies(concept, accuracies, losses={0: 0.2, 2: 0.3, 3: 0.1}).best_layer == 0


@pytest.mark.parametrize("seed", range(3))
def test_steering_layers_follow_the_formula_and_are_never_empty(seed):
    fitted = Concept.from_activations("c", *planted(80, 90, distance=2.5, seed=seed), seed=seed, regularisation=0.01)
    best = max(fitted.figures.values(), key=lambda f: f.accuracy)
    least = best.accuracy - max(f.standard_error for f in fitted.figures.values() if f.accuracy == best.accuracy)
    assert fitted.steering_layers
    assert fitted.steering_layers == tuple(layer for layer in LAYERS if fitted.accuracy[layer] >= least)


# --- fitting from recordings ------------------------------------------------------------------------------------------


def test_held_out_texts_never_move_a_direction(concept):
    """Change a text: either all directions change, or it was held out and none does."""
    positive, negative = planted()
    original = Concept.from_activations("c", positive, negative, regularisation=0.01)
    untouched = 0
    for index in range(20):
        states = {layer: positive[layer].clone() for layer in LAYERS}
        for layer in LAYERS:
            states[layer][index] += 7.0
        changed = Concept.from_activations("c", Activations(states, "last"), negative, regularisation=0.01)
        same = [
            torch.allclose(changed.directions[kind][layer], original.directions[kind][layer], atol=1e-6)
            for kind in DIRECTIONS
            for layer in LAYERS
        ]
        assert all(same) or not any(same)
        untouched += all(same)
    assert 1 <= untouched <= 9, "about a fifth of 20 texts is held out"


def test_seeds_are_reproducible_and_differ():
    first, again = (Concept.from_activations("c", *planted(), seed=3) for _ in range(2))
    other = Concept.from_activations("c", *planted(), seed=4)
    assert first.figures == again.figures
    assert first.made["seed"] == 3
    for layer in LAYERS:
        assert torch.equal(first[layer].weight, again[layer].weight)
        assert first[layer].bias == again[layer].bias
        assert not torch.equal(first[layer].weight, other[layer].weight)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Concept.from_activations("c", *planted(20, 20))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_shuffled_labels_warn_and_are_never_refused():
    positive, negative = planted(distance=0.0)
    with pytest.warns(SteerkitWarning, match=r"No probe of 'noise' is better than chance on \d+ held-out texts"):
        noise = Concept.from_activations("noise", positive, negative)
    assert noise.steering_layers
    noise.constrain(at_most=0.1)


@pytest.mark.parametrize("layers", [1, 24])
def test_chance_is_warned_about_however_many_layers_were_tried(layers, monkeypatch):
    """The best of many probes of noise looks better than one of them; 5 % of false silence would be fair."""
    monkeypatch.setattr(probe, "_RESAMPLES", 20)  # of an interval that nothing here reads
    silent = 0
    for seed in range(12):
        positive, negative = planted(distance=0.0, seed=seed, layers=tuple(range(layers)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Concept.from_activations("noise", positive, negative, regularisation=0.01)
        silent += not any(issubclass(warning.category, SteerkitWarning) for warning in caught)
    assert silent <= 2


def test_a_clear_concept_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Concept.from_activations("clear", *planted())


def test_unequal_class_sizes():
    fitted = Concept.from_activations("c", *planted(200, 40, distance=4.0))
    assert fitted.made["positive"] == 200
    assert fitted.made["negative"] == 40
    assert fitted.accuracy[3] > 0.9
    assert abs(fitted[3].bias) / float(fitted[3].weight.norm()) < 0.6


def labelled(count: int, sign: float, digests: list[str], seed: int) -> Activations:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, WIDTH, generator=generator) + sign * torch.eye(WIDTH)[0]
    return Activations({0: states}, "last", None, tuple(digests))


def sides(monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> np.ndarray:
    """Which examples were held out, as `split` decided."""
    from steerkit.concepts import concept as module

    seen: list[Any] = []
    original = module.split

    def spy(*inner: Any, **named: Any) -> Any:
        seen.append(original(*inner, **named))
        return seen[-1]

    monkeypatch.setattr(module, "split", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerkitWarning)
        Concept.from_activations("c", *args, **settings)
    return seen[0].held_out


@pytest.mark.parametrize("seed", range(3))
def test_equal_texts_stay_on_one_side(monkeypatch, seed):
    digests = [f"text {index // 3}" for index in range(60)]
    positive = labelled(60, 1, digests, 1)
    negative = labelled(60, -1, [f"other {index // 3}" for index in range(60)], 2)
    held_out = sides(monkeypatch, positive, negative, seed=seed).reshape(40, 3)
    assert (held_out.all(axis=1) == held_out.any(axis=1)).all()
    assert 0 < held_out.sum() < 120


@pytest.mark.parametrize("seed", range(3))
def test_equal_texts_stay_on_one_side_across_classes(monkeypatch, seed):
    """The same text under both labels: a leak if one copy is fitted on and the other measured."""
    digests = [f"text {index}" for index in range(40)]
    held_out = sides(monkeypatch, labelled(40, 1, digests, 1), labelled(40, -1, digests, 2), seed=seed)
    assert (held_out[:40] == held_out[40:]).all()


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_on_one_side(monkeypatch, seed):
    groups = ([f"pair {index}" for index in range(60)], [f"pair {index}" for index in range(60)])
    held_out = sides(monkeypatch, *planted(), groups=groups, seed=seed)
    assert (held_out[:60] == held_out[60:]).all()
    assert 0 < held_out.sum() < 120


def test_equal_texts_stay_on_one_side_also_where_groups_are_given(monkeypatch):
    """`Concept.fit` on `groups`: equal texts always do."""
    positive = labelled(40, 1, [f"text {index // 2}" for index in range(40)], 1)
    negative = labelled(40, -1, [f"other {index}" for index in range(40)], 2)
    groups = (list(range(40)), list(range(40, 80)))
    pairs = sides(monkeypatch, positive, negative, groups=groups)[:40].reshape(20, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()


@pytest.mark.parametrize(
    "groups", [([1] * 60,), ([1] * 59, [2] * 60), ([1] * 60, [2] * 61)], ids=["one", "short", "long"]
)
def test_groups_are_a_pair_of_one_label_a_text(groups):
    with pytest.raises(TextsError, match=r"60 positive and 60 negative"):
        Concept.from_activations("c", *planted(), groups=groups)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "held_out 0": ({"held_out": 0}, "`held_out` must be a share"),
    "held_out 1": ({"held_out": 1.0}, "`held_out` must be a share"),
    "held_out NaN": ({"held_out": math.nan}, "`held_out` must be a share"),
    "regularisation 0": ({"regularisation": 0}, "`regularisation` must be positive"),
    "regularisation NaN": ({"regularisation": math.nan}, "`regularisation` must be positive"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_are_checked(settings, message):
    with pytest.raises(TextsError, match=message):
        Concept.from_activations("c", *planted(), **settings)


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_concept_needs_a_name(name):
    with pytest.raises(TextsError, match="needs a name"):
        Concept.from_activations(name, *planted())


@pytest.mark.parametrize(("positive", "negative", "side"), [(5, 60, "positive"), (60, 5, "negative")])
def test_too_few_texts(positive, negative, side):
    with pytest.raises(TextsError, match=f"At least 6 {side} texts.*Found 5") as caught:
        Concept.from_activations("c", *planted(positive, negative))
    assert (caught.value.required, caught.value.found) == (6, 5)


def test_the_least_number_of_texts_is_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerkitWarning)
        Concept.from_activations("c", *planted(6, 6))


def test_recordings_of_other_layers_are_refused():
    positive, negative = planted()
    fewer = Activations({0: negative[0]}, "last")
    with pytest.raises(LayerError, match="same layers"):
        Concept.from_activations("c", positive, fewer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value):
    positive, negative = planted()
    positive[2][7, 1] = value
    with pytest.raises(TextsError, match="layer 2"):
        Concept.from_activations("c", positive, negative)


def test_recordings_of_two_models_are_refused():
    first = record(tiny_model("llama"), tiny_tokenizer(), [f"w{i} w{i + 1}" for i in range(8)])
    second = record(tiny_model("gpt2"), tiny_tokenizer(), [f"w{i} w{i + 1}" for i in range(8)])
    with pytest.raises(BaseModelMismatchError):
        Concept.from_activations("c", first, second)


# --- the interventions ------------------------------------------------------------------------------------------------


def test_default_layers_and_positions(concept):
    fitted = with_accuracies(concept, {0: 0.5, 2: 0.9, 3: 0.88})
    assert fitted.add(1.0).layers == (2,)
    assert fitted.erase().layers == (2, 3)
    assert fitted.constrain(at_most=0.1).layers == (2, 3)
    assert (fitted.add(1.0).positions, fitted.erase().positions) == ("all", "all")
    assert fitted.constrain(at_most=0.1).positions == "last"


def test_names_default_to_the_concept(concept):
    assert concept.add(1.0).name == concept.erase().name == concept.constrain(at_least=0.9).name == "planted"
    assert concept.constrain(at_least=0.9, name="low").name == "low"


def test_layers_are_resolved_in_the_order_given(concept):
    assert concept.add(1.0, layers=-1).layers == (3,)
    assert concept.erase(layers=[-1, 0]).layers == (3, 0)
    assert concept.constrain(at_most={-1: 0.1, 0: 0.2}).layers == (3, 0)
    bounds = concept.constrain(at_most={-1: 0.1, 0: 0.2})
    assert_close(bounds.read(bounds.amount).values.sigmoid(), torch.tensor([[0.1, 0.2]]).double())
    assert concept.add({2: 1.0, 0: [1.0, 2.0]}).layers == (2, 0)
    columns = concept.add([[5.0, 7.0]], layers=[3, 0])
    assert columns.read(columns.amount).values[:, columns.layers.index(3)].tolist() == [5.0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_interventions_carry_the_probe_and_the_mover(concept, direction):
    chosen = concept.along(direction)
    bounded = chosen.constrain(at_least=0.9, layers=LAYERS)
    added, erased = chosen.add(1.0, layers=LAYERS), chosen.erase(layers=LAYERS)
    assert bounded.sense == 1
    assert concept.constrain(at_most=0.9).sense == -1
    for layer in LAYERS:
        assert torch.equal(bounded.weights[layer], concept[layer].weight)
        assert bounded.biases[layer] == concept[layer].bias
        for each in (bounded, added, erased):
            assert torch.equal(each.directions[layer], chosen.mover[layer])


@pytest.mark.parametrize(
    ("bounds", "found"), [({}, "neither"), ({"at_most": 0.1, "at_least": 0.05}, "both"), ({"at_most": None}, "neither")]
)
def test_exactly_one_bound(concept, bounds, found):
    with pytest.raises(AmountError, match=f"Exactly one of.*Found {found}"):
        concept.constrain(**bounds)


WRONG_BOUNDS = [
    {"at_most": 0},
    {"at_least": 1},
    {"at_most": -0.1},
    {"at_least": 1.5},
    {"at_most": math.nan},
    {"at_most": [0.1, math.nan]},
    {"at_least": "0.5"},
    {"at_most": True},
    {"at_most": torch.tensor([[0.1, 0.2, 0.3, 0.4]])},
    {"at_most": {0: 0.1, 2: -1}},
    {"at_least": 0.5, "max_magnitude": 0},
    {"at_least": 0.5, "positions": "first"},
]


@pytest.mark.parametrize("arguments", WRONG_BOUNDS, ids=str)
def test_wrong_bounds_are_refused(concept, arguments):
    with pytest.raises(AmountError):
        concept.constrain(**arguments)


@pytest.mark.parametrize("magnitude", [math.nan, math.inf, "1", None, True, [[[1.0]]], {}], ids=str)
def test_wrong_magnitudes_are_refused(concept, magnitude):
    with pytest.raises((AmountError, LayerError)):
        concept.add(magnitude)


@pytest.mark.parametrize(
    "make",
    [
        lambda c, l: c.add({l: 1.0}),
        lambda c, l: c.constrain(at_most={l: 0.1}),
        lambda c, l: c.erase(layers=l),
        lambda c, l: c.add(1.0, layers=[0, l]),
    ],
    ids=["add", "constrain", "erase", "layers"],
)
@pytest.mark.parametrize("layer", [1, 4, -5])
def test_a_layer_without_a_probe_is_refused_everywhere(concept, make, layer):
    with pytest.raises(LayerError) as caught:
        make(concept, layer)
    assert caught.value.layer in (layer, layer % 4)


def test_layers_and_the_layers_of_an_amount_must_agree(concept):
    with pytest.raises(AmountError, match=r"must name the layers it acts on, \(0, 2\)"):
        concept.add({0: 1.0, 3: 1.0}, layers=[0, 2])


def test_the_same_layer_named_twice_is_refused(concept):
    with pytest.raises((LayerError, AmountError)):
        concept.add({3: 1.0, -1: 2.0})


def test_a_probe_that_falls_along_its_direction_is_refused_by_layer(concept):
    flipped = {kind: {layer: -u for layer, u in of.items()} for kind, of in concept.directions.items()}
    broken = dataclasses.replace(concept, directions=flipped, direction="pattern")
    with pytest.raises(AmountError, match=r"w \. u = -.* at layer 2"):
        broken.constrain(at_most=0.1, layers=[2])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_constraint_lands_the_probe_on_its_bound(concept, direction):
    from steerkit.intervention import edit_site

    bounded = concept.along(direction).constrain(at_least=0.97, layers=[2])
    hidden = planted()[1][2][:, None]
    edited, _ = edit_site([bounded], None, hidden, [bounded.read(0.97).values[:, 0]], True, layer=2)
    reached = concept[2].probability(edited)
    violated = concept[2].probability(hidden) < 0.97
    assert violated.any()
    assert_close(reached[violated], torch.full_like(reached[violated], 0.97), atol=1e-5, rtol=0)


def test_the_edit_does_not_depend_on_the_unit_of_the_states():
    """papers.md 3.7, contract 9: probes of scaled states, folded back, give the same edit in their own unit."""
    from steerkit.intervention import edit_site

    def edited(factor: float) -> Tensor:
        positive, negative = (Activations({2: factor * side[2]}, "last") for side in planted())
        fitted = Concept.from_activations("c", positive, negative, regularisation=0.01)
        bounded = fitted.constrain(at_most=0.05, layers=[2])
        return edit_site([bounded], None, positive[2][:, None], [bounded.read(0.05).values[:, 0]], True, layer=2)[0]

    assert_close(edited(64.0) / 64, edited(1.0), atol=1e-3, rtol=1e-3)


# --- fitting on a model -----------------------------------------------------------------------------------------------

STEP = 1.5
POSITIVE_WORDS, NEGATIVE_WORDS = range(10, 40), range(40, 70)


def concept_model() -> tuple[Any, Tensor]:
    """A llama whose embeddings carry a concept: some words lie on one side of a direction, some on the other."""
    model = tiny_model("llama")
    planted_direction = normalize(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(11)), dim=0)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.mul_(0.5)
        for words, sign in ((POSITIVE_WORDS, 1), (NEGATIVE_WORDS, -1)):
            rows = torch.tensor([4 + word for word in words])
            table[rows] += sign * STEP * planted_direction
        for block in model.model.layers:  # a residual stream that its blocks change a little, as in trained models
            block.mlp.down_proj.weight.mul_(0.05)
            block.self_attn.o_proj.weight.mul_(0.05)
    return model, planted_direction


def sentences(words: range, count: int = 60, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{w}" for w in generator.choice(list(words), size=generator.integers(2, 7))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Tensor, Concept]:
    model, planted_direction = concept_model()
    concept = Concept.fit(
        "planted",
        model,
        tiny_tokenizer(),
        positive=sentences(POSITIVE_WORDS),
        negative=sentences(NEGATIVE_WORDS, 50, 1),
    )
    return model, planted_direction, concept


def test_fit_finds_the_planted_direction(fitted):
    _, planted_direction, concept = fitted
    assert concept.layers == tuple(range(DEPTH))
    assert concept.accuracy[0] > 0.95
    assert float(cosine_similarity(concept.directions["mean_difference"][0], planted_direction, dim=0)) > 0.9
    assert float(cosine_similarity(concept.directions["pattern"][0], planted_direction, dim=0)) > 0.85
    assert float(cosine_similarity(concept[0].cav, planted_direction, dim=0)) > 0.5
    assert concept.made["positive"] == 60
    assert concept.made["negative"] == 50


def test_fit_equals_record_and_from_activations(fitted):
    model, _, concept = fitted
    tokenizer = tiny_tokenizer()
    positive = record(model, tokenizer, sentences(POSITIVE_WORDS))
    negative = record(model, tokenizer, sentences(NEGATIVE_WORDS, 50, 1))
    again = Concept.from_activations("planted", positive, negative)
    for layer in concept.layers:
        assert_close(again[layer].weight, concept[layer].weight, atol=1e-3, rtol=1e-2)
        assert again.accuracy[layer] == pytest.approx(concept.accuracy[layer], abs=0.05)


@pytest.mark.parametrize("bound", [{"at_most": 0.01}, {"at_least": 0.99}, {"at_most": 1e-6}], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_controller_lands_the_probe_on_the_bound_at_the_steered_layer(fitted, bound, direction):
    """papers.md 3.7, contracts 1 and 10: read by a hook that was registered after attaching."""
    model, _, concept = fitted
    words = POSITIVE_WORDS if "at_most" in bound else NEGATIVE_WORDS
    ids = torch.tensor([[4 + word for word in list(words)[start : start + 5]] for start in (0, 5, 10)])
    seen: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).detach().clone())

    block = find_decoder(model).blocks[2]
    with torch.no_grad(), Controller(model, [concept.along(direction).constrain(**bound, layers=[2])]):
        handle = block.register_forward_hook(read)
        model(ids)
        handle.remove()
    handle = block.register_forward_hook(read)
    with torch.no_grad():
        model(ids)
    handle.remove()
    steered, plain = seen
    wanted = torch.logit(torch.tensor(next(iter(bound.values())), dtype=torch.float64))
    logits = steered[:, -1].double() @ concept[2].weight.double() + concept[2].bias
    assert_close(logits, wanted.expand(3), atol=1e-4, rtol=0)
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert (concept[2].logit(plain[:, -1]) - wanted).abs().min() > 0.5


def test_generation_stays_within_the_bound_at_every_step(fitted):
    model, _, concept = fitted
    seen: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen.append(concept[1].logit((output if isinstance(output, Tensor) else output[0])[:, -1]))

    ids = torch.tensor([[20, 30, 25], [60, 50, 55]])
    with Controller(model, [concept.constrain(at_most=0.02, layers=[1])]):
        handle = find_decoder(model).blocks[1].register_forward_hook(read)
        model.generate(ids, max_new_tokens=6, do_sample=False)
        handle.remove()
    assert len(seen) == 6
    assert torch.stack(seen).max() <= math.log(0.02 / 0.98) + 1e-4


def test_erasing_leaves_a_probe_blind(fitted):
    """Recorded under the Controller, the two sets of texts no longer differ along the direction."""
    model, _, concept = fitted
    with Controller(model, [concept.along("mean_difference").erase(layers=[0])]):
        states = record(model, tiny_tokenizer(), sentences(POSITIVE_WORDS) + sentences(NEGATIVE_WORDS), layers=0)[0]
    assert (states @ concept.directions["mean_difference"][0]).abs().max() < 1e-4


@pytest.mark.parametrize("read", ["last", "mean"])
def test_fit_on_some_layers_with_another_reading(fitted, read):
    model = fitted[0]
    concept = Concept.fit(
        "c",
        model,
        tiny_tokenizer(),
        positive=sentences(POSITIVE_WORDS),
        negative=sentences(NEGATIVE_WORDS),
        layers=[-1, 1],
        read=read,
        direction="pattern",
        batch_size=7,
        seed=2,
    )
    assert concept.layers == (1, 3)
    assert concept.direction == "pattern"
    assert concept.made["read"] == read
    assert concept.depth == DEPTH
    assert concept[-3] is concept[1]


def test_fit_leaves_the_model_and_the_tokenizer_as_they_were(fitted):
    model, tokenizer = fitted[0], tiny_tokenizer(pad=True, padding_side="left")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    backend = tokenizer.backend_tokenizer.to_str()
    positive, negative = sentences(POSITIVE_WORDS, 12), sentences(NEGATIVE_WORDS, 12)
    kept = [*positive], [*negative]
    Concept.fit("c", model, tokenizer, positive=positive, negative=negative, layers=[0])
    assert (positive, negative) == kept
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert tokenizer.backend_tokenizer.to_str() == backend


FIT_ERRORS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a bare string": (TextsError, {"positive": "w1 w2"}),
    "no positive": (TextsError, {"positive": []}),
    "no negative": (TextsError, {"negative": []}),
    "None": (TextsError, {"negative": None}),
    "a number among texts": (TextsError, {"positive": ["w1"] * 10 + [3]}),
    "too few": (TextsError, {"positive": ["w1", "w2"]}),
    "layer": (LayerError, {"layers": [4]}),
    "layers twice": (LayerError, {"layers": [3, -1]}),
    "no layers": (LayerError, {"layers": []}),
    "direction": (AmountError, {"direction": "cav"}),
    "held_out": (TextsError, {"held_out": 1.0}),
    "groups": (TextsError, {"groups": ([1], [2])}),
    "name": (TextsError, {"name": " "}),
    "read": (TextsError, {"read": "first"}),
    "batch size": (TextsError, {"batch_size": 0}),
    "model": (UnsupportedModelError, {"model": torch.nn.Linear(2, 2)}),
}


@pytest.mark.parametrize(("error", "arguments"), FIT_ERRORS.values(), ids=FIT_ERRORS.keys())
def test_fit_refuses_before_it_runs_the_model(fitted, error, arguments):
    given: dict[str, Any] = {
        "name": "c",
        "model": fitted[0],
        "tokenizer": tiny_tokenizer(),
        "positive": sentences(POSITIVE_WORDS, 20),
        "negative": sentences(NEGATIVE_WORDS, 20),
        **arguments,
    }
    calls: list[Any] = []
    handle = fitted[0].model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(error):
            Concept.fit(given.pop("name"), given.pop("model"), given.pop("tokenizer"), **given)
    finally:
        handle.remove()
    assert not calls
