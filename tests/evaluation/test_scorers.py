"""Ready scorers: thin, honest about what they need, and known to be right on plain cases."""

import sys
from typing import Any

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny import random_addition, tiny_model, tiny_tokenizer

from steerkit import Concept, Controller, record
from steerkit.errors import MissingDependencyError, ScorerError
from steerkit.evaluation import scorers

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I cannot assist with this request.",
    "As an AI, I do not do such things.",
    "I am unable to provide instructions for that.",
    "I won't do that.",
]
ANSWERS = [
    "Sure! First, boil the water.",
    "The sorry state of the roads is well known.",
    "Cannes is a town in France.",
    "You can't go wrong with basil.",
    "I can't wait to go again, and I cannot recommend it enough.",
    "We won't be back for a while, but it can't help that it is far.",
    "",
]


def test_refusals_are_told_from_answers() -> None:
    assert scorers.refusal(REFUSALS, REFUSALS) == [1.0] * len(REFUSALS)
    assert scorers.refusal(ANSWERS, ANSWERS) == [0.0] * len(ANSWERS)
    assert scorers.refusal([""], ["x" * 300 + REFUSALS[0]]) == [0.0]  # the start decides


def test_matches_are_counted() -> None:
    assert scorers.matches(r"\bgood\b")([""] * 3, ["Good, good.", "goods", ""]) == [2.0, 0.0, 0.0]


def test_a_classifier_gives_the_probability_of_its_label() -> None:
    texts = ["sun sun", "sun day", "rain rain", "rain day"]
    fitted = make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, ["fine", "fine", "bad", "bad"])
    found = scorers.classifier(fitted, "fine")(["", ""], ["sun", "rain"])
    assert found == pytest.approx(fitted.predict_proba(["sun", "rain"])[:, 1])
    whole = scorers.classifier(fitted, "fine", whole=True)
    asked = {"role": "user", "content": "rain"}
    begun = [asked, {"role": "assistant", "content": "rai"}]
    assert whole([[asked], begun], ["sun", "n"]) == whole(["rain\n", ""], ["sun", "rain"])
    assert whole(["sun ", "rain "], ["day", "day"])[0] > 0.5 > whole(["sun ", "rain "], ["day", "day"])[1]
    with pytest.raises(ScorerError, match="label 'odd'"):
        scorers.classifier(fitted, "odd")
    with pytest.raises(ScorerError, match="predict_proba"):
        scorers.classifier(object())


@pytest.mark.parametrize(("outputs", "label"), [(2, 1), (3, 0), (1, 1)])
def test_a_sequence_classifier_gives_the_probability_of_its_label(outputs: int, label: int) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=outputs, pad_token_id=0,
    )  # fmt: skip
    judge = LlamaForSequenceClassification(config).eval()
    tokenizer = tiny_tokenizer(pad=True)
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    found = scorers.sequence_classifier(judge, tokenizer, label, batch_size=2)([""] * 3, texts)
    for text, value in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = judge(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        wanted = logits[0].sigmoid() if outputs == 1 else logits.softmax(dim=-1)[label]
        assert value == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("attached", [False, True])
def test_a_probe_reads_prompt_and_completion_unsteered(attached: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    words = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(20)]
    concept = Concept.fit(
        "warm", model, tokenizer, positive=[f"{w} w60" for w in words], negative=[f"{w} w61" for w in words]
    )
    states = record(model, tokenizer, ["w1 w2 w60", "w1 w2 w61"], layers=concept.best_layer)
    wanted = concept[concept.best_layer].probability(states[concept.best_layer]).tolist()
    scorer = scorers.probe(concept, model, tokenizer)
    if not attached:
        assert scorer(["w1 w2", "w1 w2"], [" w60", " w61"]) == pytest.approx(wanted, abs=1e-5)
        return
    with Controller(model, [random_addition(magnitude=50.0)]):
        assert scorer(["w1 w2", "w1 w2"], [" w60", " w61"]) == pytest.approx(wanted, abs=1e-5)
        model(torch.tensor([[1, 2]]))


def test_a_probe_reads_conversations() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat=True)
    words = [f"w{i} w{i + 1}" for i in range(20)]
    concept = Concept.fit(
        "warm", model, tokenizer, positive=[f"{w} w60" for w in words], negative=[f"{w} w61" for w in words]
    )
    chat = [{"role": "user", "content": "w5"}]
    states = record(model, tokenizer, [[*chat, {"role": "assistant", "content": "w60"}]], layers=concept.best_layer)
    wanted = concept[concept.best_layer].probability(states[concept.best_layer]).tolist()
    read = scorers.probe(concept, model, tokenizer)
    assert read([chat], ["w60"]) == pytest.approx(wanted, abs=1e-5)
    begun = [*chat, {"role": "assistant", "content": "w7"}]
    wanted = read([chat], ["w7 w60"])
    assert read([begun], [" w60"]) == pytest.approx(wanted, abs=1e-5)
    assert begun[-1]["content"] == "w7"


@pytest.mark.parametrize(
    ("make", "package"), [(scorers.vader, "vaderSentiment.vaderSentiment"), (scorers.profanity, "profanity_check")]
)
def test_a_library_that_is_missing_is_named(make: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        make()


def test_vader_tells_kind_from_unkind() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = scorers.vader()(["", ""], ["I love this wonderful place.", "This is a horrible, awful mess."])
    assert good > 0.5
    assert bad < -0.5


def test_profanity_is_a_probability() -> None:
    pytest.importorskip("profanity_check")
    assert all(0 <= p <= 1 for p in scorers.profanity()(["", ""], ["Good morning.", "You are an idiot."]))
