"""Three rewards on SmolLM2-135M-Instruct, one of them random numbers: linear, GDPO, GAPO with p = 1 and p = 2.

    python benchmarks/gapo_training.py --json benchmarks/results/gapo_training.json        (about 3 hours of one core)

Rewards: probability of a positive review (TF-IDF and logistic regression on film reviews), sentences of about ten words,
and normal random numbers, which no policy can raise. Measured on openings that were not trained on, with a second
scorer fitted on other films, VADER, and perplexity under the untrained model. Finished runs are kept in the JSON file.
"""

import gc
import json
import re
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from datasets import Dataset
from peft import LoraConfig
from reviews import PROMPTS, bootstrap, continuations, losses, reviews
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from transformers.trainer_callback import PrinterCallback
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from steerkit import GAPOConfig, GAPOTrainer
from steerkit.demo import load_model

ARMS: dict[str, dict[str, Any]] = {
    "linear": {"weighting": "linear"},
    "GDPO": {"weighting": "gdpo"},
    "GAPO p = 1": {"power": 1.0},
    "GAPO p = 2": {"power": 2.0},
}
HELD_OUT = 10
TOKENS = 32


def scorer(rows: Any) -> Any:
    """Return a classifier of reviews, positive or not."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0))
    return model.fit([text for text, _, _ in rows], [label for _, label, _ in rows])


def band(text: str) -> float:
    """Return -1 to 0: how near sentences are to ten words on average."""
    words = [len(sentence.split()) for sentence in re.split(r"[.!?]+", text) if sentence.split()]
    return -1.0 if not words else -min(abs(np.mean(words) - 10) / 10, 1.0)


def objectives(classifier: Any, seed: int) -> list[Any]:
    """Return the three reward functions."""
    dice = np.random.default_rng(seed)

    def positive(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [float(p) for p in classifier.predict_proba(texts)[:, 1]]

    def ten_words(completions: list[str], **_: Any) -> list[float]:
        return [band(text) for text in completions]

    def noise(completions: list[str], **_: Any) -> list[float]:
        return [float(value) for value in dice.normal(size=len(completions))]

    return [positive, ten_words, noise]


def measured(model: Any, base: Any, tokenizer: Any, judge: Any) -> dict[str, list[float]]:
    """Return figures by held-out opening, four samples each."""
    prompts = PROMPTS[-HELD_OUT:]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    start = inputs["input_ids"].shape[1]
    vader = SentimentIntensityAnalyzer()
    found: dict[str, list[Any]] = {"positive": [], "VADER": [], "ten_words": [], "log_perplexity": []}
    for seed in range(4):
        ids = continuations(model, inputs, TOKENS, seed)
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        found["positive"].append(judge.predict_proba(whole)[:, 1])
        found["VADER"].append([vader.polarity_scores(text)["compound"] for text in texts])
        found["ten_words"].append([band(text) for text in texts])
        found["log_perplexity"].append(losses(base, inputs, ids).numpy())
    found["texts"] = texts[:3]
    return {name: values if name == "texts" else np.mean(values, axis=0).tolist() for name, values in found.items()}


def settings(folder: str, given: Any, seed: int, *, tokens: int = TOKENS, batch: int = 16, **arm: Any) -> GAPOConfig:
    """Return how a policy of these benchmarks is trained; `arm` says how the objectives are weighed."""
    return GAPOConfig(
        folder,
        max_steps=given.steps,
        per_device_train_batch_size=batch,
        num_generations=4,
        max_completion_length=tokens,
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        **arm,
    )


def diary(trainer: Any) -> dict[str, list[float]]:
    """Return what was logged of rewards and gradients: the mean of the first ten steps, of all, of the last ten."""
    history = [row for row in trainer.state.log_history if "gapo/opposed" in row]
    found = {}
    for name in history[0]:
        if name.startswith(("gapo/", "rewards/")) or name == "step_time":
            values = [row[name] for row in history if name in row]
            found[name] = [float(np.mean(values[:10])), float(np.mean(values)), float(np.mean(values[-10:]))]
    return found


def run(arm: str, seed: int, given: Any, judge: Any, classifier: Any) -> dict[str, Any]:
    """Train once and measure."""
    model, tokenizer = load_model(dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GAPOTrainer(
            model,
            objectives(classifier, seed),
            settings(scratch, given, seed, **ARMS[arm]),
            Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:-HELD_OUT]]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        cpu = time.process_time()
        trainer.train()
        cpu = time.process_time() - cpu
        figures = {
            "arm": arm,
            "seed": seed,
            "cpu_s": cpu,
            "after": measured(trainer.model.eval(), model, tokenizer, judge),
            **diary(trainer),
        }
    del trainer, model
    gc.collect()
    return figures


def main() -> None:
    given = arguments(__doc__, steps=60, seeds=3, learning_rate=5e-4)
    quiet()
    facts = header(given)
    _, second, third = reviews(given.seed)
    classifier, judge = scorer(second), scorer(third)
    auc = roc_auc_score([label for _, label, _ in third], classifier.predict_proba([t for t, _, _ in third])[:, 1])
    print(f"the reward's AUC on films that it was not fitted on: {auc:.2f}")
    found: dict[str, Any] = {**facts, "scorer_auc": float(auc), "runs": []}
    if given.json is not None and given.json.exists():
        found["runs"] = json.loads(given.json.read_text("utf-8"))["runs"]
    model, tokenizer = load_model(dtype=torch.float32)
    found["before"] = measured(model, model, tokenizer, judge)
    for seed in range(given.seeds):
        for arm in ARMS:
            if not any(run_["arm"] == arm and run_["seed"] == seed for run_ in found["runs"]):
                found["runs"].append(run(arm, seed, given, judge, classifier))
                save(given.json, found)
    found["figures"] = {
        arm: summary([run_ for run_ in found["runs"] if run_["arm"] == arm], found["before"], given.seed)
        for arm in ARMS
    }
    changes = ("positive", "VADER", "ten_words", "worst in deviations", "log_perplexity")
    shares = ("opposed", "share of noise", "signal positive", "signal ten_words", "signal noise")
    rows = [
        [
            arm,
            *("{:+.2f} [{:+.2f} {:+.2f}]".format(*f[key]) for key in changes),
            *("" if f[key] is None else f"{f[key]:+.2f}" for key in shares),
        ]
        for arm, f in found["figures"].items()
    ]
    table(rows, ["change on held-out openings", *changes, *shares])
    save(given.json, found)


def summary(runs: list[dict[str, Any]], before: dict[str, list[float]], seed: int) -> dict[str, Any]:
    """Return changes on held-out openings, mean over seeds, and what the updates did on average."""
    change = {
        key: np.mean([np.array(run_["after"][key]) - np.array(before[key]) for run_ in runs], axis=0)
        for key in ("positive", "VADER", "ten_words", "log_perplexity")
    }
    found: dict[str, Any] = {key: bootstrap(values, seed) for key, values in change.items()}
    found["seeds"] = {
        key: [float(np.mean(run_["after"][key]) - np.mean(before[key])) for run_ in runs] for key in change
    }
    # In deviations of each reward over completions, as it was at the start: the objectives that can be raised at all.
    spread = {name: np.mean([run_[f"rewards/{name}/std"][0] for run_ in runs]) for name in ("positive", "ten_words")}
    worst = min(spread, key=lambda name: float(change[name].mean() / spread[name]))
    found["worst in deviations"] = bootstrap(change[worst] / spread[worst], seed)
    found["worst is"] = worst
    names = ("positive", "ten_words", "noise")
    pulls = {n: np.mean([run_[f"gapo/weight/{n}"][1] * run_[f"gapo/norm/{n}"][1] for run_ in runs]) for n in names}
    # GDPO sums advantages before there are gradients, so what it weighs them with is not a weight of theirs.
    found["share of noise"] = None if runs[0]["arm"] == "GDPO" else float(pulls["noise"] / sum(pulls.values()))
    found["opposed"] = float(np.mean([run_["gapo/opposed"][1] for run_ in runs]))
    found |= {f"signal {n}": float(np.mean([run_[f"gapo/signal/{n}"][1] for run_ in runs])) for n in names}
    found["trained"] = {
        n: [float(np.mean([run_[f"rewards/{n}/mean"][place] for run_ in runs])) for place in (0, 2)] for n in names
    }
    return found


if __name__ == "__main__":
    main()
