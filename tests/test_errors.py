"""Errors are part of the API: their builtins, their values, and messages that say what is required, found and to do."""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny import D_MODEL, random_addition, random_constraint, random_erasure, tiny_model, tiny_tokenizer

from steerkit import Concept, Controller, errors, load, record
from steerkit.activations import Activations
from steerkit.errors import SteerkitError
from steerkit.intervention import SiteEdit
from steerkit.maths.minimal_edit import minimal_edit
from steerkit.model import find_decoder, resolve_layers

BUILTINS = {
    "AmountError": ValueError,
    "ArtefactError": ValueError,
    "AttachError": RuntimeError,
    "BaseModelMismatchError": ValueError,
    "CalibrationError": ValueError,
    "ConditionError": ValueError,
    "DependentConceptsError": ValueError,
    "LayerError": IndexError,
    "MissingDependencyError": ImportError,
    "NotReachedError": RuntimeError,
    "ObjectiveError": ValueError,
    "PairsError": ValueError,
    "PolicyError": ValueError,
    "ReportError": ValueError,
    "RewardError": ValueError,
    "SamplesError": ValueError,
    "ScorerError": ValueError,
    "TextsError": ValueError,
    "TrainingError": RuntimeError,
    "UnsupportedModelError": TypeError,
}


def classes() -> dict[str, type]:
    return {
        name: item for name, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__
    }


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_every_class_is_in_the_table_above():
    assert set(classes()) == {*BUILTINS, "SteerkitError", "SteerkitWarning"}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_error_is_a_steerkit_error_and_the_builtin_that_a_caller_expects(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, SteerkitError)
    assert issubclass(error, builtin)
    assert error.__doc__
    with pytest.raises(builtin):
        raise error("required; found; do this")


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_the_tree_in_the_docstring_is_true(name, builtin):
    assert re.search(rf"──\s{name} \({builtin.__name__}\)", errors.__doc__ or "")


def test_the_warning_is_a_user_warning_and_no_error():
    assert issubclass(errors.SteerkitWarning, UserWarning)
    assert not issubclass(errors.SteerkitWarning, SteerkitError)


def test_values_are_kept_as_attributes():
    error = errors.SamplesError("three for four", expected=3, found=4)
    assert str(error) == "three for four"
    assert (error.expected, error.found) == (3, 4)  # type: ignore[attr-defined]


# --- the messages -----------------------------------------------------------------------------------------------------


def model() -> Any:
    return tiny_model("llama")


def states(shift: float, count: int = 30) -> Activations:
    generator = torch.Generator().manual_seed(int(shift))
    return Activations({1: torch.randn(count, D_MODEL, generator=generator) + shift}, "last")


def concept() -> Concept:
    return Concept.from_activations("toxicity", states(2), states(-2))


def attached_twice() -> None:
    with Controller(model(), [random_addition()]) as control:
        control.attach()


def compiled() -> None:
    plain = model()
    plain.compile(backend="eager")
    Controller(plain, [random_addition()]).attach()


def unused() -> None:
    with Controller(model(), [random_addition((1, 2), name="toxicity")]):
        pass


def only_a_prompt() -> None:
    plain = model()
    with Controller(plain, [random_addition(name="toxicity", positions="generated")]), torch.no_grad():
        plain(torch.tensor([[5, 6]]))


def wrong_rows() -> None:
    plain = model()
    with Controller(plain, [random_addition(magnitude=[1.0, 2.0, 3.0], name="helpful")]), torch.no_grad():
        plain(torch.ones(4, 2, dtype=torch.long))


def wrong_prompts() -> None:
    plain = model()
    with Controller(plain, [random_addition(magnitude=[1.0, 2.0, 3.0], name="helpful")]):
        plain.generate(torch.ones(4, 2, dtype=torch.long), max_new_tokens=1)


def dependent() -> None:
    first, second = random_constraint(name="first", seed=1), random_constraint(name="second", seed=1)
    directions = {
        1: torch.nn.functional.normalize(first.directions[1] + random_constraint(seed=3).directions[1], dim=0)
    }
    SiteEdit([first, type(second)(**{**vars(second), "directions": directions})], 1)


def contradicting() -> None:
    low, high = random_constraint(at_least=0.9, name="low"), random_constraint(at_most=0.1, name="high")
    Controller(model(), [low, high])


def other_model(tmp_path: Any) -> None:
    record(model(), tiny_tokenizer(), ["w1", "w2"]).save(tmp_path / "a")
    load(tmp_path / "a", tiny_model("gpt2"))


def newer(tmp_path: Any) -> None:
    header = json.dumps({"kind": "concept", "format": 99})
    (tmp_path / "a").write_bytes(save({"weight": torch.ones(1)}, metadata={"steerkit": header}))
    load(tmp_path / "a")


def text_file(tmp_path: Any) -> None:
    (tmp_path / "a").write_text("not a tensor in sight " * 9)
    load(tmp_path / "a")


def encoder_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    find_decoder(T5ForConditionalGeneration(config))


Trigger = Callable[..., Any]
# what triggers it, the class, what the message must say (in this order), and values that the error carries
TABLE: dict[str, tuple[Trigger, str, list[str], dict[str, Any]]] = {
    "layer of the model": (
        lambda: resolve_layers(40, 32),
        "LayerError",
        ["Layer 40 does not exist", r"32 decoder blocks \(0\.\.31\)", r"Use layers=range\(10, 21\), or -1"],
        {"layer": 40, "depth": 32},
    ),
    "layer twice": (
        lambda: resolve_layers([31, -1], 32),
        "LayerError",
        ["must differ", r"Found \[31, -1\]", "Name each one once"],
        {},
    ),
    "layer of the concept": (
        lambda: concept().erase(layers=0),
        "LayerError",
        ["Layer 0 has no probe", r"'toxicity' was fitted at layers \(1,\)", "Choose among them"],
        {"layer": 0},
    ),
    "layer of the Controller": (
        lambda: Controller(model(), [random_addition((7,), name="toxicity")]),
        "LayerError",
        ["Layer 7 of 'toxicity' does not exist", r"4 decoder blocks \(0\.\.3\)", "Fit it on this model"],
        {"layer": 7, "depth": 4},
    ),
    "shape of an amount": (
        lambda: random_addition((1, 2), torch.zeros(4, 3)),
        "AmountError",
        [r"`magnitude` must be a number, \(samples,\), or \(samples, 2\)", r"Found shape \(4, 3\)", "Pass one value"],
        {"shape": (4, 3)},
    ),
    "amount that is text": (
        lambda: random_addition(magnitude="much"),
        "AmountError",
        ["must be a number", "Found 'much'", "Pass a float"],
        {},
    ),
    "amount that is not finite": (
        lambda: random_addition(magnitude=[1.0, float("nan")]),
        "AmountError",
        ["must be finite", r"Found \[1, nan\]", "Use 0"],
        {},
    ),
    "both bounds": (
        lambda: concept().constrain(at_most=0.1, at_least=0.2),
        "AmountError",
        ["Exactly one of `at_most` and `at_least` is required", "Found both", "For a band, use two"],
        {},
    ),
    "no probability": (
        lambda: concept().constrain(at_most=5),
        "AmountError",
        ["`at_most` must be a probability", r"Found \[5\]", "Use 0 <= at_most <= 1"],
        {},
    ),
    "infinite edit": (
        lambda: concept().constrain(at_most=0),
        "AmountError",
        ["`at_most=0` asks for an infinite edit", "strictly inside", r"Use for example at_most=0\.001"],
        {},
    ),
    "half an erasure": (
        lambda: random_erasure(amount=0.5),
        "AmountError",
        [r"on \(1\) or off \(0\)", r"Found \[0\.5\]", "Use `add`"],
        {},
    ),
    "positions": (
        lambda: concept().erase(positions="first"),  # type: ignore[arg-type]
        "AmountError",
        ["must be one of last, all, prompt, generated", "Found 'first'", "Choose one"],
        {},
    ),
    "two of one name": (
        lambda: Controller(model(), [concept().add(1.0), concept().erase()], check_model=False),
        "AmountError",
        ["must differ", "Found 'toxicity' twice", "name of its own"],
        {},
    ),
    "an unknown name": (
        lambda: Controller(model(), [random_addition(name="helpful")]).using(helpfull=1.0),
        "AmountError",
        [r"by the names \['helpful'\]", r"Found \['helpfull'\]", "Check the spelling"],
        {},
    ),
    "a condition without a bound": (
        lambda: concept().add(1.0).when(concept().reads()),
        "ConditionError",
        ["needs a bound", "Found P\\(toxicity", "reads\\(at_least=0.5\\)"],
        {},
    ),
    "dependent bounds": (
        dependent,
        "DependentConceptsError",
        ["must be independent", "'first' and 'second'", "layer 1", "Leave one out"],
        {"pair": ("first", "second"), "layer": 1},
    ),
    "contradicting bounds": (
        contradicting,
        "DependentConceptsError",
        ["leave room", "'low' and 'high'", "layer 1", "Move one"],
        {"pair": ("low", "high"), "layer": 1},
    ),
    "rows of a forward pass": (
        wrong_rows,
        "SamplesError",
        ["'helpful' has amounts for 3 samples", "the batch has 4", "Pass one value a prompt"],
        {"expected": 3, "found": 4},
    ),
    "prompts of generate": (
        wrong_prompts,
        "SamplesError",
        ["'helpful' has amounts for 3 samples", "the batch has 4", "Pass one value"],
        {"expected": 3, "found": 4},
    ),
    "attached twice": (
        attached_twice,
        "AttachError",
        ["attached once at a time", "Found it attached", "Detach it"],
        {},
    ),
    "compiled before": (
        compiled,
        "AttachError",
        ["before the model is compiled", "skips hooks", r"attach\(\), then torch\.compile"],
        {},
    ),
    "not reached": (
        unused,
        "NotReachedError",
        ["'toxicity' reached no row", "no forward pass ran", r"layers 1\.\.2", "Run the model inside `with`"],
        {"name": "toxicity"},
    ),
    "no such position": (
        only_a_prompt,
        "NotReachedError",
        ["'toxicity' reached no row", "none held a position of 'generated'"],
        {"name": "toxicity"},
    ),
    "another model": (
        other_model,
        "BaseModelMismatchError",
        [
            "was extracted from base model [0-9a-f]{16}",
            "this model is [0-9a-f]{16}",
            "Load it on the model it came from",
            "check_model=False",
        ],
        {},
    ),
    "another width": (
        lambda: Controller(model(), [random_addition(d_model=7, name="toxicity")]),
        "BaseModelMismatchError",
        ["'toxicity' acts on a residual stream of width 7", "this model's has 32", "Fit it on this model"],
        {},
    ),
    "newer format": (
        newer,
        "ArtefactError",
        ["format 99", "reads up to 1", "Upgrade"],
        {},
    ),
    "a text file": (
        text_file,
        "ArtefactError",
        ["must be a safetensors file", "Found a truncated, damaged or foreign file", "again"],
        {},
    ),
    "no folder": (
        lambda tmp_path: states(1).save(tmp_path / "no" / "a"),
        "ArtefactError",
        ["must exist", "It does not", "Create it"],
        {},
    ),
    "a bare string": (
        lambda: record(model(), tiny_tokenizer(), "w1"),
        "TextsError",
        ["must be a list of texts", "Found str", "Wrap it"],
        {},
    ),
    "no text": (
        lambda: record(model(), tiny_tokenizer(), ["w1", 5]),
        "TextsError",
        ["must be a string", "Found 5 at 1", "Convert it"],
        {"index": 1},
    ),
    "too long": (
        lambda: record(model(), tiny_tokenizer(), ["w1 " * 200]),
        "TextsError",
        ["may have 128 tokens", "Found 200 in text 0", "Shorten it"],
        {"index": 0},
    ),
    "too few texts": (
        lambda: Concept.from_activations("toxicity", states(1, 3), states(-1)),
        "TextsError",
        ["At least 6 positive texts are required", "Found 3", "Add texts"],
        {"required": 6, "found": 3},
    ),
    "no model": (
        lambda: find_decoder(torch.nn.Linear(2, 2)),
        "UnsupportedModelError",
        ["transformers model is required", "Found Linear", "from_pretrained"],
        {},
    ),
    "an encoder-decoder": (
        encoder_decoder,
        "UnsupportedModelError",
        ["decoder-only model is required", "Found T5", "Use a causal model"],
        {},
    ),
}


@pytest.mark.parametrize(("trigger", "name", "parts", "values"), TABLE.values(), ids=TABLE.keys())
def test_messages_say_what_is_required_what_was_found_and_what_to_do(trigger, name, parts, values, tmp_path):
    arguments = [tmp_path] if "tmp_path" in inspect.signature(trigger).parameters else []
    with pytest.raises(SteerkitError) as caught:
        trigger(*arguments)
    assert type(caught.value) is getattr(errors, name)
    message = str(caught.value)
    place = 0
    for part in parts:
        found = re.compile(part).search(message, place)
        assert found, f"{part!r} is missing, or out of order, in: {message}"
        place = found.end()
    for key, value in values.items():
        assert getattr(caught.value, key) == value
    assert message == message.strip()
    assert message.endswith((".", "?", ")"))
    assert "\n" not in message
    assert "  " not in message


@pytest.mark.parametrize(
    "change",
    [
        {"direction": -torch.eye(2)},
        {"weight": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "direction": torch.tensor([[1.0, 0.0], [1.0, 0.5]])},
        {"bias": torch.zeros(3)},
    ],
    ids=["falls", "dependent", "shape"],
)
def test_maths_raises_value_errors_of_the_same_form(change):
    """`maths` imports nothing of ours, so plain ValueErrors: required; found; do this."""
    arguments = {"weight": torch.eye(2), "bias": torch.zeros(2), "direction": torch.eye(2), **change}
    with pytest.raises(ValueError, match=r"must be .*Found |must rise .*Found "):
        minimal_edit(torch.zeros(3, 2), logit=torch.ones(2), sense=torch.ones(2), **arguments)
