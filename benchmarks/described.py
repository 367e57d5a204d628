"""How good is a concept whose texts the model wrote itself? Its probe on written texts, beside one fitted on such texts.

    python benchmarks/described.py --json benchmarks/results/described.json        (about 10 minutes of one core)

The written texts of sentiment and formality are split in two by group. One half fits the concept that is held against; both are
measured on the other half. A third concept is fitted on written texts with
shuffled labels, half of each class on either side. Data: concept_data.py.
"""

import numpy as np
from common import arguments, header, quiet, save, table
from concept_data import EVERY
from sklearn.metrics import roc_auc_score

from steerkit import Concept, record
from steerkit.concepts.texts import contrast_texts
from steerkit.demo import load_model

DESCRIPTIONS = {
    "sentiment": ("full of praise for what it speaks of", "full of complaints about what it speaks of"),
    "formality": ("formal", "casual, like a chat with a friend"),
}


def halves(data, seed):
    """Return positive, negative texts of two halves; texts of one group stay together."""
    found = [([], []), ([], [])]
    groups = data.groups or (list(data.positive), list(data.negative))
    names = sorted({str(group) for side in groups for group in side})
    first = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2])
    for side, (texts, labels) in enumerate(zip((data.positive, data.negative), groups, strict=True)):
        for text, label in zip(texts, labels, strict=True):
            found[str(label) not in first][side].append(text)
    return found


def auc(concept, positive, negative, seed, rounds=500):
    """Return the AUC of the probe at the concept's best layer on other texts, and its 95 % bootstrap interval over texts."""
    scores = [concept[concept.best_layer].logit(states[concept.best_layer]).numpy() for states in (positive, negative)]
    draw = np.random.default_rng(seed)

    def of(one, other):
        return float(roc_auc_score([1] * len(one) + [0] * len(other), np.concatenate([one, other])))

    found = [of(*(side[draw.integers(len(side), size=len(side))] for side in scores)) for _ in range(rounds)]
    return [of(*scores), *np.quantile(found, [0.025, 0.975]).tolist()]


def main():
    given = arguments(__doc__, samples=2, tokens=48)
    facts = header(given)
    quiet()
    model, tokenizer = load_model()
    figures, rows = {}, []
    for name, (description, opposite) in DESCRIPTIONS.items():
        fit, test = halves(EVERY[name](given.seed), given.seed)
        held = [record(model, tokenizer, texts) for texts in test]
        written = Concept.fit(name, model, tokenizer, positive=fit[0], negative=fit[1], seed=given.seed)
        made = contrast_texts(
            model, tokenizer, description, opposite=opposite, samples=given.samples, max_new_tokens=given.tokens, seed=given.seed
        )  # fmt: skip
        described = Concept.fit(
            name, model, tokenizer, positive=made.positive, negative=made.negative, groups=made.groups, seed=given.seed
        )
        plain = [[turns[-1]["content"] for turns in side] for side in (made.positive, made.negative)]
        answers = Concept.fit(
            name, model, tokenizer, positive=plain[0], negative=plain[1], groups=made.groups, seed=given.seed
        )
        dice = np.random.default_rng(given.seed)
        quarters = [
            np.array_split(dice.permutation(side), 2) for side in fit
        ]  # labels that know nothing of the classes
        shuffled = Concept.fit(
            name, model, tokenizer, seed=given.seed,
            **{word: [str(t) for side in quarters for t in side[half]] for half, word in enumerate(("positive", "negative"))},
        )  # fmt: skip
        print(made)
        concepts = {
            "written": written,
            "described": described,
            "described, answers alone": answers,
            "shuffled": shuffled,
        }
        here = {}
        for kind, concept in concepts.items():
            layer = written.best_layer
            here[kind] = {
                "auc": auc(concept, *held, given.seed),
                "own held-out auc": [
                    concept.auc[concept.best_layer],
                    *concept.figures[concept.best_layer].auc_interval,
                ],
                "best layer": concept.best_layer,
                "cosine with written": {
                    direction: float(concept.directions[direction][layer] @ written.directions[direction][layer])
                    for direction in ("probe", "pattern", "mean_difference")
                },
            }
            cosines = here[kind]["cosine with written"]
            shown = [" ".join(f"{v:.2f}" for v in here[kind][key]) for key in ("auc", "own held-out auc")]
            rows.append((name, kind, *shown, str(concept.best_layer), *(f"{c:.2f}" for c in cosines.values())))
        figures[name] = {
            "separation": made.separation,
            "kept": [len(p) for p in plain],
            "written": made.written,
            **here,
        }
    table(
        rows,
        (
            "concept",
            "texts",
            "AUC on written texts",
            "AUC on its own kind",
            "layer",
            "cosine: probe",
            "pattern",
            "means",
        ),
    )
    save(given.json, {**facts, "figures": figures})


if __name__ == "__main__":
    main()
