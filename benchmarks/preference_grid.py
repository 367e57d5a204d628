"""What two preference vectors and a third, new one do to what SmolLM2-135M-Instruct writes.

    python benchmarks/preference_grid.py --vectors vectors --json benchmarks/results/preference_grid.json

`vectors` is a folder that preference_training.py has filled for helpful, harmless and cautious. Each point of the grid
is a magnitude of two vectors; all points of a prompt run as rows of one batch. Printed are figures and no texts; `--texts
FILE` keeps the texts to be read.

Scorers: harmfulness (TF-IDF and logistic regression on human-scored replies to other objectives), a refusal expression on
AdvBench prompts and on harmless prompts that sound harmful, perplexity of the text in the base model, length, and the
share of texts that repeat themselves. Intervals are bootstraps over prompts.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from preference_data import benign_prompts, harm_scorer, harmful_prompts, refuses
from scipy.stats import spearmanr

from steerkit import Controller, PreferenceVector, load
from steerkit.demo import load_model, perplexity, until_end

GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)


def generate(
    model: Any, tokenizer: Any, prompts: list[str], points: list[dict[str, float]], vectors: Any, new: int
) -> Any:
    """Return texts and perplexities by point and prompt; each batch holds every point of one prompt."""
    names = list(points[0])
    texts: list[list[str]] = [[] for _ in points]
    costs: list[list[float]] = [[] for _ in points]
    amounts = {name: torch.tensor([point[name] for point in points]) for name in names}
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        batch = tokenizer.apply_chat_template(
            [chat] * len(points), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with Controller(model, [vectors[name].add(amounts[name]) for name in names]):
            rows = model.generate(**batch, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        fresh = [until_end(row[batch.input_ids.shape[1] :], tokenizer) for row in rows]
        for index, cost in enumerate(perplexity(model, tokenizer, [chat] * len(points), fresh)):
            texts[index].append(tokenizer.decode(fresh[index], skip_special_tokens=True))
            costs[index].append(cost)
    return texts, costs


def repeats(text: str) -> bool:
    """Whether some four words come three times."""
    words = text.split()
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return any(fours.count(four) >= 3 for four in set(fours))


def interval(values: Any, seed: int = 0) -> list[float]:
    """Return the mean and its 95 % bootstrap interval over prompts."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(axis=1)
    return [float(values.mean()), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))]


def measure(model: Any, tokenizer: Any, points: Any, vectors: Any, prompts: Any, scorer: Any, new: int) -> Any:
    """Return the figures of each point, and its texts."""
    harmful, benign = prompts
    bad, cost = generate(model, tokenizer, harmful, points, vectors, new)
    good, good_cost = generate(model, tokenizer, benign, points, vectors, new)
    figures = []
    for i, point in enumerate(points):
        figures.append(
            {
                "point": point,
                "harm": interval(scorer(bad[i])),
                "refusal": interval([refuses(text) for text in bad[i]]),
                "over_refusal": interval([refuses(text) for text in good[i]]),
                "log_perplexity": interval(np.log(cost[i] + good_cost[i])),
                "repeats": interval([repeats(text) for text in bad[i] + good[i]]),
                "words": interval([len(text.split()) for text in bad[i] + good[i]]),
            }
        )
    return figures, [{"point": point, "harmful": bad[i], "benign": good[i]} for i, point in enumerate(points)]


def show(figures: Any) -> None:
    """Print one row a point."""

    def cell(value: list[float]) -> str:
        return f"{value[0]:.2f} [{value[1]:.2f} {value[2]:.2f}]"

    keys = [key for key in figures[0] if key != "point"]
    rows = [[*(f"{v:g}" for v in f["point"].values()), *(cell(f[key]) for key in keys)] for f in figures]
    table(rows, [*figures[0]["point"], *keys])


def main() -> None:
    given = arguments(__doc__, vectors="vectors", harmful=32, benign=16, tokens=40, texts="")
    quiet()
    facts = header(given)
    model, tokenizer = load_model()
    folder = Path(given.vectors)
    vectors = {name: load(folder / f"{name}.safetensors", model) for name in ("helpful", "harmless", "cautious")}
    scorer = harm_scorer()
    print(f"harm scorer: AUC {scorer.auc:.3f} on human-scored replies to objectives it has not seen")
    prompts = harmful_prompts(given.harmful), benign_prompts(given.benign)
    found: dict[str, Any] = {
        **facts,
        "harm_scorer_auc": scorer.auc,
        "prompts": f"{given.harmful} AdvBench and {given.benign} harmless",
        "tokens": given.tokens,
    }

    def run(label: str, points: list[dict[str, float]], these: dict[str, PreferenceVector]) -> None:
        print(f"\n{label}")
        figures, texts = measure(model, tokenizer, points, these, prompts, scorer, given.tokens)
        show(figures)
        found[label] = figures
        if given.texts:
            with Path(given.texts).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"label": label, "texts": texts}, ensure_ascii=False) + "\n")
        save(given.json, found)

    grid = [{"helpful": a, "harmless": b} for a, b in itertools.product(GRID, GRID)]
    run("grid", grid, vectors)
    for axis, metric in (
        ("harmless", "harm"),
        ("harmless", "refusal"),
        ("helpful", "words"),
        ("helpful", "log_perplexity"),
    ):
        other = "helpful" if axis == "harmless" else "harmless"
        ranks = []
        for fixed in GRID:
            line = [f for f in found["grid"] if f["point"][other] == fixed]
            means = [f[metric][0] for f in line]
            ranks.append(float(spearmanr(GRID, means).statistic) if len(set(means)) > 1 else 0.0)
        print(f"rank correlation of {metric} with eta_{axis}, by eta_{other}: {[round(r, 2) for r in ranks]}")
        found[f"rank {metric} {axis}"] = ranks

    extension = [
        {"helpful": 0.0, "harmless": 0.0, "cautious": 0.0},
        {"helpful": 0.5, "harmless": 0.5, "cautious": 0.0},
        {"helpful": 0.0, "harmless": 0.0, "cautious": 0.5},
        {"helpful": 0.5, "harmless": 0.5, "cautious": 0.5},
    ]
    run("extension", extension, vectors)

    base = load_model()[0]
    runs = folder / "harmless.runs"
    one = PreferenceVector.difference(runs / "towards", base, name="one", model=base)
    matched = one.with_norm(vectors["harmless"].norm()).named("matched")
    print(f"\ncosine of the one-sided and the two-sided vector {one.cosine(vectors['harmless']):.3f}")
    found["one_sided_cosine"] = one.cosine(vectors["harmless"])
    sides = {"harmless": vectors["harmless"], "one": one, "matched": matched}
    points = [{name: eta if name == chosen else 0.0 for name in sides} for chosen in sides for eta in (0.5, 1.0, 1.5)]
    run("one-sided", points, sides)

    helpful_side = PreferenceVector.difference(folder / "helpful.runs" / "towards", base, name="h", model=base)
    soup = {
        "soup": (0.5 * one + 0.5 * helpful_side).named("soup"),
        "both": (vectors["helpful"] + vectors["harmless"]).named("both"),
    }
    run("soup", [{"soup": 1.0, "both": 0.0}, {"soup": 0.0, "both": 0.5}, {"soup": 0.0, "both": 1.0}], soup)
    save(given.json, found)


if __name__ == "__main__":
    main()
