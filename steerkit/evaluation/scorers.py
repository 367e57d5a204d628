"""Ready scorers: functions `(prompts, completions) -> scores`, thin over libraries that hold the knowledge.

Any function of that form is a scorer. These need nothing from a network; what a library must bring is said when it is not there.
A classifier that was fitted on the texts of the concept would grade its own work: fit it on other texts.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from steerkit.activations import record
from steerkit.concepts.concept import Concept
from steerkit.errors import MissingDependencyError, ScorerError
from steerkit.hooks import unsteered
from steerkit.model import find_decoder
from steerkit.types import Text

Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]

_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i apologi[sz]e"
    r"|i (?:can ?not|can'?t|won'?t|will not)(?! (?:wait|believe|help but|get enough|say enough|complain|imagine|stop|recommend))"
    r"|i(?:'?m| am) (?:unable|not able|not comfortable)"
    r"|(?:can ?not|can'?t|won'?t|unable to) (?:help with|assist|provide|fulfil+|support|comply|answer|do that)"
    r"|not (?:able|comfortable|appropriate) (?:to|with)|as an ai\b|against my)",
    re.IGNORECASE,
)


def refusal(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Tell whether a reply refuses, by an expression on its first 200 characters: sure where it says yes, blind to deflection."""
    return [float(bool(_REFUSAL.search(text[:200].replace("’", "'")))) for text in completions]


def matches(pattern: str, *, flags: int = re.IGNORECASE) -> Scorer:
    """Return a scorer that counts matches of a regular expression in the completion, for lexicons and formats."""
    expression = re.compile(pattern, flags)

    def count(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(len(expression.findall(text))) for text in completions]

    return count


def classifier(fitted: Any, label: Any = 1, *, whole: bool = False) -> Scorer:
    """Return the probability of a label by anything fitted with `predict_proba` and `classes_`, such as a scikit-learn pipeline.

    With `whole`, of prompt and completion together.

    Raises:
        ScorerError: it has no such label.
    """
    labels = list(getattr(fitted, "classes_", []))
    if label not in labels or not hasattr(fitted, "predict_proba"):
        raise ScorerError(
            f"A fitted classifier with predict_proba and the label {label!r} is required. Found labels {labels}. Fit it, or "
            "name another label."
        )
    column = labels.index(label)

    def probability(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        texts = [_whole(*pair) for pair in zip(prompts, completions, strict=True)] if whole else list(completions)
        return [float(row[column]) for row in fitted.predict_proba(texts)]

    return probability


def sequence_classifier(model: Any, tokenizer: Any, label: int = 1, *, batch_size: int = 32) -> Scorer:
    """Return the probability of a label by a transformers sequence classifier; one output is read as a logit."""
    import torch

    def probability(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(completions), batch_size):
            part = list(completions[start : start + batch_size])
            batch = tokenizer(part, return_tensors="pt", padding=True, truncation=True).to(model.device)
            with torch.no_grad():
                logits = model(**batch).logits.float()
            one = logits.shape[-1] == 1
            found += (logits[:, 0].sigmoid() if one else logits.softmax(dim=-1)[:, label]).tolist()
        return found

    return probability


def vader() -> Scorer:
    """Return VADER's compound sentiment of the completion, -1 to 1 (package vaderSentiment).

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingDependencyError(
            "This scorer needs VADER. It is not installed. Run: pip install vaderSentiment."
        ) from error
    analyser = SentimentIntensityAnalyzer()
    return lambda prompts, completions: [analyser.polarity_scores(text)["compound"] for text in completions]


def profanity() -> Scorer:
    """Return the probability of profanity by a small linear model (package alt-profanity-check); it calls friendly swearing toxic.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise MissingDependencyError(
            "This scorer needs a model of profanity. It is not installed. Run: pip install alt-profanity-check."
        ) from error
    return lambda prompts, completions: [float(p) for p in predict_prob(list(completions))]


def probe(concept: Concept, model: Any, tokenizer: Any, *, layer: int | None = None) -> Scorer:
    """Return what a concept's probe reads of prompt and completion under the unsteered model, a probability.

    A probe that steered reads its own work: take it for calibration, and another scorer for evidence.
    """
    layer = concept.best_layer if layer is None else layer
    decoder = find_decoder(model)

    def probability(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        texts = [_continued(*pair) for pair in zip(prompts, completions, strict=True)]
        with unsteered(decoder.model):
            states = record(model, tokenizer, texts, layers=layer)
        return [float(p) for p in concept[layer].probability(states[layer])]

    return probability


def _continued(prompt: Text, completion: str) -> Text:
    """Return prompt and completion as one text, or as one conversation, in which a begun answer goes on."""
    if isinstance(prompt, str):
        return prompt + completion
    *before, last = prompt
    if last["role"] == "assistant":
        return [*before, {**last, "content": last["content"] + completion}]
    return [*prompt, {"role": "assistant", "content": completion}]


def _whole(prompt: Text, completion: str) -> str:
    together = _continued(prompt, completion)
    if isinstance(together, str):
        return together
    turns = together[len(prompt) - 1 :]
    return "\n".join(turn["content"] for turn in turns)
