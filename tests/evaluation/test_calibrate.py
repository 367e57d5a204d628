"""`calibrate`: the budget kept and used, the target reached, and the model as it was."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import D_MODEL, DEPTH, random_addition, random_constraint, random_erasure, random_vector, tiny_model

from steerkit import Controller, Report, evaluate
from steerkit.conditions import Reading
from steerkit.errors import AmountError, CalibrationError, ScorerError, SteerkitError, SteerkitWarning, TextsError
from steerkit.evaluation import Calibration, calibrate
from steerkit.evaluation.calibration import Search
from steerkit.evaluation.report import Measure
from steerkit.intervention import Addition
from steerkit.model import find_decoder

PROMPTS = ["w1 w2 w3 w4 w5", "w8", "w9 w10 w11", "w12 w13", "w20 w21 w22", "w30 w31", "w40 w41 w42 w43", "w50"]
FEW: dict[str, Any] = {"max_new_tokens": 6, "samples": 2}
WORD = "w16"


def share(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Share of the words that are one word."""
    return [text.split().count(WORD) / max(len(text.split()), 1) for text in completions]


def push(model: Any, amount: Any = 1.0, layer: int = DEPTH - 1, **more: Any) -> Addition:
    """Move along what raises that word's logit."""
    row = model.lm_head.weight[int(WORD[1:]) + 4].detach() * model.model.norm.weight.detach()
    return Addition("push", (layer,), "all", amount, None, directions={layer: F.normalize(row, dim=0)}, **more)


def edit(model: Any, kind: str) -> Any:
    made = {
        "addition": lambda: random_addition(layers=(1,), magnitude=1.0),
        "last": lambda: random_addition(layers=(0, 2), magnitude=1.0, positions="last"),
        # probes that most states hold at the least bound by default
        "at least": lambda: random_constraint(layers=(1, 2), at_least=0.9, slope=0.2, biases={1: 3.0, 2: 3.0}),
        "at most": lambda: random_constraint(layers=(1, 2), at_most=0.1, slope=0.2, biases={1: -3.0, 2: -3.0}),
        "vector": lambda: random_vector(model).add(1.0),
        "head": lambda: random_vector(model, full=True).only(modules=["lm_head"]).add(1.0),
    }
    return made[kind]()


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Count forward passes through the blocks, once the model is known."""
    count: list[int] = []
    handle = find_decoder(model).owner.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        handle.remove()


def state(model: Any) -> Any:
    modules = {
        name: (m.training, sorted(m.__dict__), {k: list(v) for k, v in m.__dict__.items() if k.endswith("hooks")})
        for name, m in model.named_modules()
    }
    return modules, model.generation_config.to_dict()


def again(model: Any, tokenizer: Any, intervention: Any, amount: Any, **more: Any) -> Any:
    with Controller(model, [intervention]) as control, control.using(**{intervention.name: amount}):
        given = {**FEW, "name": "steered", "neutral": (), "task": (), **more}
        return evaluate(model, tokenizer, PROMPTS, **given)["steered"]


# --------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("budget", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["addition", "last", "at least", "at most", "vector", "head"])
def test_a_budget_is_kept_and_used(kind: str, budget: float, model: Any, tokenizer: Any) -> None:
    intervention = edit(model, kind)
    found = calibrate(model, tokenizer, PROMPTS, intervention, budget=budget, **FEW)
    assert found.chosen.kl.value <= budget
    # A little more may make the model draw another text: no amount then lies between.
    further = min(dose.place for dose in found.curve if dose.kl.value > budget)
    assert found.chosen.kl.value >= 0.8 * budget or further - found.chosen.place < 0.005
    assert found.chosen.kl.value >= 0.4 * budget
    arm = again(model, tokenizer, intervention, found.amount)
    assert arm["kl"] == pytest.approx(found.chosen.kl)
    assert arm["kl_p90"] == pytest.approx(found.chosen.kl_p90)
    assert arm["displacement"] == pytest.approx(found.chosen.dose)
    assert found.chosen in found.curve
    assert found.chosen.score is None
    assert 1 <= len(found.curve) <= 10
    assert all(dose.kl.value > budget or dose.amount <= found.amount or kind == "at most" for dose in found.curve)


def test_the_budget_counts_what_is_attached_already(model: Any, tokenizer: Any) -> None:
    outer = random_addition(layers=(0,), magnitude=1.0, name="outer")
    alone = calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.4, **FEW)
    with Controller(model, [outer]):
        free = evaluate(model, tokenizer, PROMPTS, neutral=(), task=(), **FEW)["steered"]["kl"].value
        both = calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.4, **FEW)
    assert 0.01 < free < 0.4
    assert 0.32 <= both.chosen.kl.value <= 0.4
    assert both.amount < alone.amount


def test_a_budget_that_what_is_attached_has_spent(model: Any, tokenizer: Any) -> None:
    outer = random_addition(layers=(0,), magnitude=9.0, name="outer")
    with Controller(model, [outer]), pytest.raises(CalibrationError) as caught:
        calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.001, trials=4, **FEW)
    assert len(caught.value.curve) == 4  # type: ignore[attr-defined]


def test_a_budget_that_the_largest_amount_leaves_unspent_warns(model: Any, tokenizer: Any) -> None:
    with pytest.warns(SteerkitWarning, match="between"):
        found = calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=50.0, between=(0.0, 2.0), **FEW)
    assert found.amount == 2.0
    assert found.chosen is found.curve[-1]


def test_a_scorer_beside_a_budget_is_told_and_decides_nothing(model: Any, tokenizer: Any) -> None:
    found, plain = (
        calibrate(model, tokenizer, PROMPTS, push(model), budget=0.3, between=(0.0, 40.0), **more, **FEW)
        for more in ({"scorer": share}, {})
    )
    assert found.amount == plain.amount
    assert [dose.kl for dose in found.curve] == [dose.kl for dose in plain.curve]
    assert plain.chosen.score is None
    with Controller(model, [push(model, found.amount)]):
        report = evaluate(model, tokenizer, PROMPTS, scorers={"share": share}, neutral=(), task=(), **FEW)
    assert found.chosen.score == report["steered"]["share"]
    assert "| score |" in found.table()


def test_a_budget_met_at_once_does_not_warn(model: Any, tokenizer: Any, recwarn: Any) -> None:
    """A quarter of the range spends 98 % of the budget: nothing is unspent, and more is not asked for."""
    arm = again(model, tokenizer, edit(model, "addition"), 1.5)
    budget = arm["kl"].value / 0.98
    found = calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=budget, between=(0.0, 6.0), **FEW)
    assert found.amount == 1.5
    assert not [w for w in recwarn if issubclass(w.category, SteerkitWarning)]


def test_a_budget_that_the_least_amount_breaks(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="between") as caught:
        calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=1e-4, between=(5.0, 9.0), trials=5, **FEW)
    curve = caught.value.curve  # type: ignore[attr-defined]
    assert [dose.amount for dose in curve] == sorted(dose.amount for dose in curve)
    assert all(5.0 <= dose.amount <= 9.0 for dose in curve)


# --------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("target", [0.3, 0.6, 0.95])
def test_a_target_is_reached_by_little_more_than_it_takes(target: float, model: Any, tokenizer: Any) -> None:
    found = calibrate(
        model, tokenizer, PROMPTS, push(model), scorer=share, target=target, between=(0.0, 60.0), max_new_tokens=12
    )
    assert found.chosen.score is not None
    assert target <= found.chosen.score.value <= target + 0.2
    arm = again(model, tokenizer, push(model), found.amount, scorers={"score": share}, samples=1, max_new_tokens=12)
    assert arm["score"] == pytest.approx(found.chosen.score)
    assert all(dose.score.value < target for dose in found.curve if dose.amount < found.amount)
    assert 0 < found.amount < 60
    assert found.monotone
    assert f"{target:g}" in found.goal


def test_a_target_below_the_unsteered_score(model: Any, tokenizer: Any) -> None:
    outer = push(model, 12.0)
    with Controller(model, [outer]):
        plain = evaluate(model, tokenizer, PROMPTS, scorers=share, neutral=(), task=(), **FEW)["steered"]["share"].value
        assert plain > 0.3
        found = calibrate(
            model, tokenizer, PROMPTS, push(model, -1.0), scorer=share, target=plain / 2, between=(0.0, -12.0), **FEW
        )
    assert found.chosen.score is not None
    assert found.chosen.score.value <= plain / 2
    assert -12 <= found.amount < 0


def test_a_target_out_of_reach_tells_what_was_reached(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="push") as caught:
        calibrate(model, tokenizer, PROMPTS, push(model), scorer=share, target=0.99, between=(0.0, 1.0), **FEW)
    error: Any = caught.value
    assert [dose.amount for dose in error.curve] == [0.25, 0.5, 1.0]
    assert error.reached == max(dose.score.value for dose in error.curve)


def test_a_target_that_holds_already(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, tokenizer, PROMPTS, push(model), scorer=lambda p, c: [0.5] * len(c), target=0.5, **FEW)
    assert caught.value.curve == ()  # type: ignore[attr-defined]


def test_more_that_does_less_warns(model: Any, tokenizer: Any) -> None:
    with pytest.warns(SteerkitWarning, match="push"):
        found = calibrate(
            model, tokenizer, PROMPTS, push(model), scorer=_Humped(), target=0.9, between=(0.0, 40.0), **FEW
        )
    assert not found.monotone


class _Humped:
    """Scores by the call: unsteered 0, then high at a quarter of the range, low at half of it, and so on."""

    __name__ = "humped"

    def __init__(self) -> None:
        self.scores = iter([0.0, 0.5, 0.1, 0.95, *[0.9] * 20])

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [next(self.scores)] * len(completions)


def planted(prompts: int, **curves: Any) -> Search:
    """A search whose measures are functions of the place, with a little noise over prompts."""

    def measure(place: float) -> dict[str, Measure]:
        return {name: spread(curve(place), prompts) for name, curve in curves.items()}

    search = Search("planted", lambda place: place, 10)
    search.measure = measure
    return search


def spread(value: float, prompts: int) -> Measure:
    return Measure(tuple(value + 0.001 * i for i in range(prompts)), tuple(range(prompts)))


@pytest.mark.parametrize(("top", "width"), [(0.1, 0.06), (0.15, 0.08), (0.37, 0.08)])
def test_a_peak_between_the_first_amounts_is_found(top: float, width: float) -> None:
    search = planted(
        6, kl=lambda a: a * a, kl_p90=lambda a: a * a, score=lambda a: math.exp(-(((a - top) / width) ** 2))
    )
    with pytest.warns(SteerkitWarning, match="does less"):
        found = search.towards(0.8, spread(0.0, 6))
    assert found.chosen.score is not None
    assert found.chosen.score.value >= 0.8
    assert abs(found.amount - top) < width


def test_a_target_above_the_peak_says_that_more_did_less() -> None:
    search = planted(6, kl=lambda a: a * a, kl_p90=lambda a: a * a, score=lambda a: a * (1 - a))
    with pytest.raises(CalibrationError, match="More did less on the way"):
        search.towards(0.8, spread(0.0, 6))
    assert 0.2 < max(dose.score.value for dose in search.tried.values() if dose.score) < 0.26


@pytest.mark.parametrize("prompts", [1, 6])
def test_a_kl_that_falls_is_told_however_few_prompts(prompts: int) -> None:
    search = planted(prompts, kl=lambda a: 0.09 if a < 0.3 else 0.05, kl_p90=lambda a: 0.1)
    with pytest.warns(SteerkitWarning, match="does less"), pytest.warns(SteerkitWarning, match="More may do more"):
        found = search.within(0.2)
    assert not found.monotone


def test_a_score_of_noise_alone_is_no_fall(model: Any, tokenizer: Any, recwarn: Any) -> None:
    found = calibrate(model, tokenizer, PROMPTS, push(model), scorer=share, target=0.5, between=(0.0, 60.0), **FEW)
    assert found.monotone
    assert not [w for w in recwarn if issubclass(w.category, SteerkitWarning)]


def test_a_table_with_a_star(model: Any, tokenizer: Any) -> None:
    found = calibrate(model, tokenizer, PROMPTS, push(model), scorer=share, target=0.5, between=(0.0, 60.0), **FEW)
    assert isinstance(found, Calibration)
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(found.curve)
    assert [line.count("|") for line in lines] == [7] * len(lines)
    assert [line.endswith("| * |") for line in lines[2:]] == [dose is found.chosen for dose in found.curve]
    assert [dose.amount for dose in found.curve] == sorted(dose.amount for dose in found.curve)
    assert "w1" not in repr(found)


def test_the_same_seed_finds_the_same_amount(model: Any, tokenizer: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        found.append(calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.2, seed=seed, **FEW))
    assert found[0].amount == found[1].amount
    assert [dose.kl for dose in found[0].curve] == [dose.kl for dose in found[1].curve]
    assert found[0].chosen.kl != found[2].chosen.kl


# -------------------------------------------------------------------------------------------- signs, layers, both ends


@pytest.mark.parametrize(("kind", "own"), [("addition", -0.1), ("addition", 0.0), ("vector", -3.0), ("vector", 1.0)])
def test_the_sign_of_the_own_amount_is_kept(kind: str, own: float, model: Any, tokenizer: Any) -> None:
    made = random_addition(layers=(1,), magnitude=own) if kind == "addition" else random_vector(model).add(own)
    found = calibrate(model, tokenizer, PROMPTS, made, budget=0.1, **FEW)
    assert all(dose.amount * (own or 1.0) > 0 for dose in found.curve)
    assert 0.08 <= found.chosen.kl.value <= 0.1


BY_LAYER = {"some": {0: 1.0, 2: 0.25}, "mixed": {0: -2.0, 2: 1.0}, "off": {0: 0.0, 2: -1.0}, "less": {0: -1.0, 2: -0.5}}


@pytest.mark.parametrize(
    ("own", "between"), [("some", None), ("mixed", None), ("off", (0.0, -6.0)), ("less", None), ("less", (0.0, -6.0))]
)
def test_amounts_by_layer_keep_their_proportions(own: str, between: Any, model: Any, tokenizer: Any) -> None:
    shape = BY_LAYER[own]
    made = random_addition(layers=(0, 2), magnitude=shape)
    found = calibrate(model, tokenizer, PROMPTS, made, budget=0.1, between=between, **FEW)
    largest = max(shape, key=lambda layer: abs(shape[layer]))
    for dose in found.curve:
        size = dose.amount[largest] / shape[largest]
        assert size > 0
        assert dose.amount == pytest.approx({layer: size * part for layer, part in shape.items()})
    assert 0.08 <= found.chosen.kl.value <= 0.1
    assert Controller(model, [random_addition(layers=(0, 2), magnitude=found.amount)])
    assert "0: " in found.table()


def test_an_amount_that_follows_a_reading_is_refused(model: Any, tokenizer: Any) -> None:
    reading = Reading("asks", 0, torch.ones(D_MODEL), 0.0)
    with pytest.raises(AmountError, match="for all samples"):
        calibrate(model, tokenizer, PROMPTS, random_addition((1,), magnitude=reading.scaled(0, 5)), budget=0.1)


@pytest.mark.parametrize("own", [-1.0, {0: -1.0, 2: -0.5}, {0: 0.5, 2: -1.0}])
def test_a_range_of_the_other_sign_is_refused(own: Any, model: Any, tokenizer: Any) -> None:
    with pytest.raises(AmountError, match="sign"):
        calibrate(model, tokenizer, PROMPTS, random_addition((0, 2), magnitude=own), budget=0.1, between=(0.0, 6.0))


def test_a_vector_by_layer_keeps_its_proportions(model: Any, tokenizer: Any) -> None:
    vector = random_vector(model)
    vector = vector.only(layers=vector.layers)
    shape = {layer: 0.2 * (layer + 1) for layer in vector.layers}
    found = calibrate(model, tokenizer, PROMPTS, vector.add(shape), budget=0.1, **FEW)
    sizes = [found.amount[layer] / part for layer, part in shape.items()]
    assert sizes == pytest.approx([sizes[0]] * len(sizes))


def test_bounds_by_layer_are_kept_or_refused(model: Any, tokenizer: Any) -> None:
    made = random_constraint(layers=(1, 2), at_least={1: 0.9, 2: 0.1})
    try:
        found = calibrate(model, tokenizer, PROMPTS, made, budget=0.1, **FEW)
    except AmountError:
        return
    assert isinstance(found.amount, dict)
    assert found.amount[1] > found.amount[2]


def test_a_range_is_kept_to(model: Any, tokenizer: Any) -> None:
    for low, high in ((0.5, 6.0), (-0.5, -6.0)):
        made = random_addition(layers=(1,), magnitude=math.copysign(1.0, low))
        found = calibrate(model, tokenizer, PROMPTS, made, budget=0.2, between=(low, high), **FEW)
        assert all(min(low, high) <= dose.amount <= max(low, high) for dose in found.curve)


def test_a_range_of_probabilities(model: Any, tokenizer: Any) -> None:
    found = calibrate(model, tokenizer, PROMPTS, edit(model, "at least"), budget=0.1, between=(0.2, 0.9999), **FEW)
    assert all(0.2 <= dose.amount <= 0.9999 + 1e-9 for dose in found.curve)
    assert 0.08 <= found.chosen.kl.value <= 0.1


def test_a_range_from_the_bound_that_is_off_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(AmountError, match="probabilities inside"):
        calibrate(model, tokenizer, PROMPTS, edit(model, "at least"), budget=0.05, between=(0.0, 0.9999), **FEW)


def test_a_range_of_both_signs_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(AmountError), passes(model) as count:
        calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.1, between=(-3.0, 3.0), **FEW)
    assert not count


def test_a_range_of_the_other_sign_is_refused_or_turned(model: Any, tokenizer: Any) -> None:
    made = random_addition(layers=(1,), magnitude=-1.0)
    try:
        found = calibrate(model, tokenizer, PROMPTS, made, budget=0.1, between=(0.0, 6.0), **FEW)
    except AmountError:
        return
    assert found.amount < 0


# ------------------------------------------------------------------------------------------------------------ bad input

EARLY: dict[str, tuple[type[SteerkitError], dict[str, Any]]] = {
    "an erasure": (AmountError, {"intervention": random_erasure()}),
    "amounts by sample": (AmountError, {"intervention": random_addition(magnitude=torch.ones(len(PROMPTS)))}),
    "bounds by sample": (AmountError, {"intervention": random_constraint(at_least=torch.full((8,), 0.5))}),
    "no intervention": (AmountError, {"intervention": "push"}),
    "several": (AmountError, {"intervention": [random_addition()]}),
    "no goal": (AmountError, {"budget": None}),
    "both goals": (AmountError, {"target": 0.5, "scorer": share}),
    "a scorer without a goal": (AmountError, {"budget": None, "scorer": share}),
    "a target without scorer": (AmountError, {"budget": None, "target": 0.5}),
    "NaN budget": (AmountError, {"budget": math.nan}),
    "infinite budget": (AmountError, {"budget": math.inf}),
    "negative budget": (AmountError, {"budget": -0.1}),
    "a budget of nothing": (AmountError, {"budget": 0.0}),
    "NaN target": (AmountError, {"budget": None, "target": math.nan, "scorer": share}),
    "infinite target": (AmountError, {"budget": None, "target": math.inf, "scorer": share}),
    "equal ends": (AmountError, {"between": (2.0, 2.0)}),
    "NaN end": (AmountError, {"between": (0.0, math.nan)}),
    "infinite end": (AmountError, {"between": (0.0, math.inf)}),
    "the most first": (AmountError, {"between": (2.0, 1.0)}),
    "the stricter bound first": (AmountError, {"intervention": random_constraint(at_most=0.5), "between": (0.1, 0.9)}),
    "one end": (AmountError, {"between": (1.0,)}),
    "three ends": (AmountError, {"between": (1.0, 2.0, 3.0)}),
    "no probability": (AmountError, {"intervention": random_constraint(at_least=0.5), "between": (0.1, 1.5)}),
    "certainty": (AmountError, {"intervention": random_constraint(at_least=0.5), "between": (0.1, 1.0)}),
    "two trials": (AmountError, {"trials": 2}),
    "half a trial": (AmountError, {"trials": 4.5}),
    "no tokens": (AmountError, {"max_new_tokens": 0}),
    "no samples": (AmountError, {"samples": 0}),
    "a word for a seed": (AmountError, {"seed": "x"}),
    "no prompts": (TextsError, {"prompts": []}),
    "a string": (TextsError, {"prompts": "w1 w2"}),
    "a number": (TextsError, {"prompts": [3]}),
    "no function": (ScorerError, {"budget": None, "target": 0.5, "scorer": 3}),
    "another width": (SteerkitError, {"intervention": random_addition(d_model=16), "between": (0.0, 1.0)}),
    "a layer that is not there": (SteerkitError, {"intervention": random_addition(layers=(9,)), "between": (0.0, 1.0)}),
    "too long": (TextsError, {"prompts": [" ".join(["w1"] * 125)], "between": (0.0, 1.0)}),
    # the mean residual norm is measured before these are looked at
    "too long, default range": (TextsError, {"prompts": [" ".join(["w1"] * 125)]}),
    "another width, default range": (SteerkitError, {"intervention": random_addition(d_model=16)}),
    "a word for a budget": (AmountError, {"budget": "much"}),
    "one number for a range": (AmountError, {"between": 3.0}),
    "words for a range": (AmountError, {"between": ("a", "b")}),
}


@pytest.mark.parametrize("case", EARLY)
def test_bad_input_is_refused_before_any_pass(case: str, model: Any, tokenizer: Any) -> None:
    kind, changed = EARLY[case]
    given = {"prompts": PROMPTS, "intervention": random_addition(), "budget": 0.1, **FEW, **changed}
    prompts, intervention = given.pop("prompts"), given.pop("intervention")
    find_decoder(model)
    before = state(model)
    with passes(model) as count, pytest.raises(kind):
        calibrate(model, tokenizer, prompts, intervention, **given)
    assert not count
    assert state(model) == before


# ------------------------------------------------------------------------------------------------ nothing is left behind


class Stop(BaseException):
    pass


class Failing:
    """A scorer that fails at the nth call."""

    __name__ = "failing"

    def __init__(self, last: int, error: BaseException) -> None:
        self.left, self.error = last, error

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return share(prompts, completions)


@pytest.mark.parametrize(("call", "error"), [(1, RuntimeError("no")), (3, KeyboardInterrupt()), (2, Stop()), (0, None)])
@pytest.mark.parametrize("nested", [False, True])
def test_the_model_is_left_as_it_was(call: int, error: Any, nested: bool, model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    find_decoder(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    words = tokenizer.backend_tokenizer.to_str()
    outer = Controller(model, [random_vector(model).add(0.1)], fold=True) if nested else nullcontext()
    ids = torch.arange(3, 15).reshape(4, 3)
    start = state(model)
    with outer:
        before, chance = state(model), torch.get_rng_state()
        with torch.no_grad():
            logits = model(ids).logits
        wanted = nullcontext() if error is None else pytest.raises(
            ScorerError if isinstance(error, Exception) else type(error)
        )  # fmt: skip
        made = push(model)
        with wanted:
            calibrate(
                model, tokenizer, PROMPTS, made, scorer=Failing(call, error), target=0.6,
                between=(0.0, 60.0), max_new_tokens=6,
            )  # fmt: skip
        assert made.amount == 1.0
        assert state(model) == before
        assert torch.equal(torch.get_rng_state(), chance)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
    assert state(model) == start
    assert tokenizer.backend_tokenizer.to_str() == words
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_amount_that_was_found_is_ready_for_use(tokenizer: Any) -> None:
    model = tiny_model("llama")
    plain = evaluate(model, tokenizer, PROMPTS, neutral=(), task=(), **FEW)
    found = calibrate(model, tokenizer, PROMPTS, edit(model, "addition"), budget=0.2, **FEW)
    made = random_addition(layers=(1,), magnitude=copy.deepcopy(found.amount))
    with Controller(model, [made]):
        steered = evaluate(model, tokenizer, PROMPTS, neutral=(), task=(), **FEW)
    both = Report.join(plain, steered)
    assert both.difference("kl", "steered", "unsteered").value == pytest.approx(found.chosen.kl.value)
