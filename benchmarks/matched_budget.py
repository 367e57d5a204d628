"""The primary comparison: two concepts, three contrasts, one budget, fixed before the run; everything else is descriptive.

    python benchmarks/matched_budget.py --json benchmarks/results/matched_budget.json --output kept        (about 2 hours of one core)

Sentiment and topic at .1 nat a token, 112 openings of 16 subjects × 4 samples of 24 tokens, doses chosen on 32 others. Contrasts,
by the first scorer, which is fitted on other texts than the concept: (1) the closed form along the pattern against the probe,
(2) the best closed form (by the development prompts) against constant addition, (3) both kinds against the better of its
parts (by the development prompts). Six p-values by sign flips over prompts, Holm-corrected. Vectors are trained here on the
concept's own texts as pairs. What is finished is kept in `--output`, so a run that was stopped goes on where it was.
"""

from pathlib import Path

import numpy as np
from common import arguments, header, quiet, save, table
from concept_data import CONCEPTS
from openings import DEVELOPMENT, EVIDENCE

from steerkit import PolicyConfig, PreferenceVector, load
from steerkit.demo import load_model
from steerkit.evaluation import compare


def trained(name, data, given, folder):
    """Return the vector of a concept's texts, and the same of its towards-policy alone; trained once."""
    made = []
    for one_sided in (False, True):
        file = folder / f"{name}{'-one-sided' if one_sided else ''}.safetensors"
        if not file.exists():
            model, tokenizer = load_model()
            config = PolicyConfig(
                max_steps=given.steps, learning_rate=2e-4, max_length=96, held_out=0.15, bf16=False, disable_tqdm=True,
                save_steps=20, save_total_limit=1,
            )  # fmt: skip
            runs = folder / f"{name}.runs"
            vector = PreferenceVector.fit(name, model, tokenizer, data.pairs, config=config, output_dir=runs)
            if one_sided:
                vector = PreferenceVector.difference(runs / "towards", model, name=name)
            vector.save(file)
        made.append(load(file))
    return made


def p_value(first, second, seed, rounds=20000):
    """Return a two-sided p-value for the mean difference by prompt, by flipping signs; and the difference's interval."""
    means = []
    for measure in (first, second):
        sums, counts = {}, {}
        for value, cluster in zip(measure.values, measure.clusters, strict=True):
            sums[cluster] = sums.get(cluster, 0.0) + value
            counts[cluster] = counts.get(cluster, 0) + 1
        means.append(np.array([sums[key] / counts[key] for key in sorted(sums)]))
    difference = means[0] - means[1]
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(rounds, len(difference)))
    beyond = np.abs((flips * difference).mean(axis=1)) >= abs(difference.mean()) - 1e-12
    return float((1 + beyond.sum()) / (1 + rounds))


def holm(values):
    """Return corrected p-values in the order given."""
    order = np.argsort(values)
    steps = [min(1.0, values[place] * (len(values) - rank)) for rank, place in enumerate(order)]
    corrected = np.maximum.accumulate(steps)
    return [float(corrected[list(order).index(place)]) for place in range(len(values))]


def figures(made, data):
    """Return a comparison's cells: every method's change by every scorer, and its cost."""
    return {
        "auc": data.auc,
        "goal": made.goal,
        "notes": made.notes,
        "cells": [
            {
                "method": cell.method, "budget": cell.budget, "amount": cell.amount, "development": cell.development,
                **{measure: made.report.difference(measure, cell.arm, "unsteered") for measure in data.scorers},
                **{m: made.report[cell.arm][m] for m in ("kl", "kl_p90", "perplexity", "entropy", "repetition")},
            }
            for cell in made.cells
        ],
    }  # fmt: skip


def main():
    given = arguments(__doc__, budget=0.1, tokens=24, samples=4, steps=40, output="kept", budgets="")
    facts = {**header(given), "budget": given.budget, "steps": given.steps}
    quiet()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    budgets = [float(b) for b in given.budgets.split(",")] if given.budgets else [given.budget]
    found = {"concepts": {}, "contrasts": []}
    for name, of in CONCEPTS.items():
        data = of(given.seed)
        vector, one_sided = trained(name, data, given, folder)
        model, tokenizer = load_model()
        made = compare(
            model, tokenizer, EVIDENCE, name=name, positive=data.positive, negative=data.negative, scorers=data.scorers,
            development=DEVELOPMENT, instructions=data.instructions, vector=vector.add(1.0), one_sided=one_sided.add(1.0),
            budgets=budgets, max_new_tokens=given.tokens, samples=given.samples, seed=given.seed, folder=folder / name,
        )  # fmt: skip
        print(made.table(), *(f"* {note}" for note in made.notes), "", sep="\n", flush=True)
        cells = {cell.method: cell for cell in made.cells if cell.budget == given.budget}
        closed = [method for method in cells if method.startswith("GCAV")]
        best = max(closed, key=lambda method: cells[method].development)
        part = max((best, "preference vector"), key=lambda method: cells[method].development)
        for words, first, second in (
            ("pattern against probe", "GCAV, pattern", "GCAV, probe"),
            ("best closed form against constant addition", best, "constant addition"),
            ("both kinds against the better part", "both kinds", part),
        ):
            if first not in cells or second not in cells:
                print(f"{name}: {words} could not be run")
                continue
            measures = [made.report[cells[method].arm].measures[made.goal] for method in (first, second)]
            found["contrasts"].append(
                {
                    "concept": name, "contrast": words, "first": first, "second": second, "p": p_value(*measures, given.seed),
                    "difference": made.contrast(first, second, given.budget),
                    "spent": [made.report[cells[method].arm]["kl"] for method in (first, second)],
                }
            )  # fmt: skip
        found["concepts"][name] = figures(made, data)
    for contrast, p in zip(found["contrasts"], holm([c["p"] for c in found["contrasts"]]), strict=True):
        contrast["Holm"] = p
    table(
        [
            (c["concept"], c["contrast"], str(c["difference"]), f"{c['p']:.4f}", f"{c['Holm']:.4f}")
            for c in found["contrasts"]
        ],
        ("concept", "contrast", "difference", "p", "Holm"),
    )
    save(given.json, {**facts, **found})


if __name__ == "__main__":
    main()
