"""The public surface: small, documented, and the same wherever it is written down."""

import inspect

import pytest

import steerkit


def test_all_is_sorted_and_resolves() -> None:
    assert steerkit.__all__ == sorted(steerkit.__all__)
    assert set(steerkit.__all__) <= set(dir(steerkit))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Vector'"):
        steerkit.Vector  # noqa: B018


@pytest.mark.parametrize("name", steerkit.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(steerkit, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing):
        for method, function in inspect.getmembers(thing, inspect.isroutine):
            if not method.startswith("_") and function.__qualname__.startswith(thing.__name__):
                assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (lambda: steerkit.record, ["model", "tokenizer", "texts"]),
        (lambda: steerkit.Concept.fit, ["name", "model", "tokenizer"]),
        (lambda: steerkit.Concept.from_activations, ["name", "positive", "negative"]),
        (lambda: steerkit.Concept.add, ["self", "magnitude"]),
        (lambda: steerkit.Concept.erase, ["self"]),
        (lambda: steerkit.Concept.constrain, ["self"]),
        (lambda: steerkit.Controller, ["model", "interventions"]),
        (lambda: steerkit.load, ["path", "model"]),
    ],
)
def test_signatures_are_positional_only_where_the_sentence_needs_it(function, positional: list[str]) -> None:
    parameters = inspect.signature(function()).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert not [p.name for p in parameters if p.kind is p.VAR_KEYWORD]


def test_using_takes_names() -> None:
    assert [p.kind.name for p in inspect.signature(steerkit.Controller.using).parameters.values()] == [
        "POSITIONAL_OR_KEYWORD",
        "VAR_KEYWORD",
    ]
