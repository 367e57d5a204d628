"""Why do probes detect and not steer? From the probe to its pattern at one budget, and magnitudes that are not one's own.

    python benchmarks/directions.py --json benchmarks/results/directions.json        (about an hour of one core)

Part 1: the closed form along `Sigma^t w`, t from 0 (the probe) to 1 (its pattern), and along the difference of means. Each
bound is calibrated on development prompts to one KL a token, then run on others: what differs is the direction alone.
Part 2: one bound on prompts of which half say already what is asked for. The magnitudes that the closed form gives each
sample, beside the same magnitudes given to other samples, and their mean given to all: effect on the hard half, damage to
the easy half. Every arm edits the same layers and positions. Finished arms are kept, row by row, in a file beside the
JSON file, so a run that was stopped goes on where it was.

Concepts, scorers and packages: concept_data.py.
"""

import dataclasses
import json
import time

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from concept_data import CONCEPTS
from openings import DEVELOPMENT, EASY, EVIDENCE, HARD
from sklearn.covariance import ledoit_wolf

from steerkit import Concept, Controller, Report, evaluate, record
from steerkit.demo import load_model
from steerkit.evaluation import calibrate
from steerkit.intervention import Addition

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def powers(concept, states):
    """Return `{t: {layer: unit Sigma^t w}}` on the layers that steer."""
    found = {t: {} for t in POWERS}
    for layer in concept.steering_layers:
        sigma, _ = ledoit_wolf(states[layer].double().numpy())
        values, vectors = np.linalg.eigh(sigma)
        weight = vectors.T @ concept[layer].weight.double().numpy()
        for t in POWERS:
            direction = torch.tensor(vectors @ (values**t * weight))
            found[t][layer] = torch.nn.functional.normalize(direction, dim=0).float()
    return found


class Run:
    """The model, what was measured already, and where it is kept."""

    def __init__(self, given, facts):
        self.given, self.facts = given, facts
        self.model, self.tokenizer = load_model()
        self.rows = given.json and given.json.with_suffix(".rows.json")
        done = json.loads(self.rows.read_text("utf-8")) if self.rows and self.rows.exists() else {}
        self.arms, self.notes = done.get("arms", {}), done.get("notes", {})

    def keep(self, name, report=None, **note):
        if report is not None:
            self.arms[name] = json.loads(report.to_json())["arms"][name]
        self.notes[name] = {**self.notes.get(name, {}), **note}
        save(self.rows, {"notes": self.notes, "arms": self.arms})

    def measure(self, name, prompts, scorers_, interventions, samples=4):
        """Evaluate once; the magnitudes of every row where they are asked for."""
        settings = {
            "scorers": scorers_, "samples": samples, "max_new_tokens": self.given.tokens, "batch_size": 64,
            "neutral": (), "task": (), "name": name, "seed": self.given.seed,
        }  # fmt: skip
        started = time.process_time()
        if not interventions:
            report = evaluate(self.model, self.tokenizer, prompts, **settings)
        else:
            with Controller(self.model, interventions):
                report = evaluate(self.model, self.tokenizer, prompts, **settings)
        self.keep(name, report, cpu_s=time.process_time() - started)
        print(f"{self.notes[name]['cpu_s']:5.0f} s  {name}", flush=True)

    def report(self):
        return Report.from_json(json.dumps({"steerkit": "report", "arms": self.arms}))


def part_one(run, name, data):
    """Directions at one budget."""
    both = record(run.model, run.tokenizer, [*data.positive, *data.negative])
    count = len(data.positive)
    positive, negative = (
        dataclasses.replace(both, states={k: s[rows] for k, s in both.states.items()}, digests=both.digests[rows])
        for rows in (slice(0, count), slice(count, None))
    )
    concept = Concept.from_activations(name, positive, negative, groups=data.groups, seed=run.given.seed)
    print(concept)
    layers = concept.steering_layers
    along = {f"t = {t:g}": directions for t, directions in powers(concept, both.states).items()}
    along["difference of means"] = {layer: concept.directions["mean_difference"][layer] for layer in layers}
    cosine = min(float(along["t = 1"][k] @ concept.directions["pattern"][k]) for k in layers)
    run.keep(
        name,
        layers=list(layers),
        auc=data.auc,
        accuracy=[concept.accuracy[k] for k in layers],
        cosine_of_pattern=cosine,
    )
    if f"{name}, unsteered" not in run.arms:
        run.measure(f"{name}, unsteered", EVIDENCE, data.scorers, [])
    for kind, directions in along.items():
        arm = f"{name}, {kind}"
        if arm in run.arms:
            continue
        bound = dataclasses.replace(concept.constrain(at_least=0.9), directions=directions)
        found = calibrate(
            run.model, run.tokenizer, DEVELOPMENT, bound, budget=run.given.budget, samples=2, trials=8,
            max_new_tokens=run.given.tokens, batch_size=64, seed=run.given.seed + 1,
        )  # fmt: skip
        print(found.table())
        turned = [float(torch.nn.functional.normalize(concept[k].weight, dim=0) @ directions[k]) for k in layers]
        run.keep(arm, bound=found.amount, monotone=found.monotone, cosine_with_probe=float(np.mean(turned)))
        run.measure(arm, EVIDENCE, data.scorers, [dataclasses.replace(bound, amount=found.amount)])
    return concept


def part_two(run, concept, by_name):
    """Magnitudes of one's own, somebody else's, and the mean."""
    mixed = [text for pair in zip(EASY, HARD, strict=True) for text in pair]
    layers = concept.steering_layers
    for direction in ("probe", "pattern"):
        stem = f"mixed, {direction}"
        bound = concept.along(direction).constrain(at_least=0.9)
        if f"{stem}, closed form" not in run.arms:
            found = calibrate(
                run.model, run.tokenizer, mixed[::7], bound, budget=run.given.budget, samples=4, trials=8,
                max_new_tokens=run.given.tokens, batch_size=64, seed=run.given.seed + 1,
            )  # fmt: skip
            bound = dataclasses.replace(bound, amount=found.amount)
            run.measure(f"{stem}, closed form", mixed, by_name, [bound])
            # What each sample received on average over its tokens, by layer; continuations of another seed.
            batch = run.tokenizer(mixed, return_tensors="pt", padding=True, padding_side="left")
            torch.manual_seed(run.given.seed + 2)
            with Controller(run.model, [bound], record_magnitudes=True) as control:
                run.model.generate(
                    **batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=run.given.tokens,
                    min_new_tokens=run.given.tokens,
                )  # fmt: skip
            width = batch["input_ids"].shape[1]
            own = torch.stack([control.magnitudes[concept.name][k][:, width - 1 :].mean(dim=1) for k in layers], dim=1)
            run.keep(f"{stem}, closed form", bound=found.amount, magnitudes=own.tolist())
        own = torch.tensor(run.notes[f"{stem}, closed form"]["magnitudes"])
        order = np.random.default_rng(run.given.seed).permutation(len(mixed))
        amounts = {"own means": own, "permuted": own[order], "constant": own.mean(dim=0, keepdim=True).expand_as(own)}
        movers = {k: concept.directions[direction][k] for k in layers}
        for kind, amount in amounts.items():
            if f"{stem}, {kind}" not in run.arms:
                step = Addition(concept.name, layers, "last", amount, concept.fingerprint, movers)
                run.measure(f"{stem}, {kind}", mixed, by_name, [step])
    if "mixed, unsteered" not in run.arms:
        run.measure("mixed, unsteered", mixed, by_name, [])


def halves(report, name, measure, base="mixed, unsteered"):
    """Return an arm's difference from another on the easy half (even prompts) and on the hard half."""
    found = []
    for half in (0, 1):
        sides = []
        for arm in (name, base):
            m = report[arm].measures[measure]
            rows = [i for i, cluster in enumerate(m.clusters) if cluster % 2 == half]
            weights = tuple(m.weights[i] for i in rows) if m.weights else ()
            sides.append(
                dataclasses.replace(
                    m,
                    values=tuple(m.values[i] for i in rows),
                    clusters=tuple(m.clusters[i] for i in rows),
                    weights=weights,
                )
            )
        found.append(sides[0].against(sides[1]))
    return found


def main():
    given = arguments(__doc__, budget=0.1, tokens=24)
    facts = {**header(given), "budget": given.budget, "tokens": given.tokens}
    quiet()
    run = Run(given, facts)
    data = {name: of(given.seed) for name, of in CONCEPTS.items()}
    first = part_one(run, "sentiment", data["sentiment"])
    part_two(run, first, data["sentiment"].scorers)
    part_one(run, "topic", data["topic"])
    report = run.report()
    figures = {"directions": {}, "mixed": {}}
    rows = []
    for name, by_name in ((name, each.scorers) for name, each in data.items()):
        for arm in [arm for arm in report if arm.startswith(f"{name}, ") and "unsteered" not in arm]:
            changes = {
                key: report.difference(key, arm, f"{name}, unsteered") for key in (*by_name, "perplexity", "entropy")
            }
            spent = {key: report[arm][key] for key in ("kl", "kl_p90", "displacement", "repetition")}
            against = {key: report.difference(key, arm, f"{name}, t = 0") for key in by_name}
            figures["directions"][arm] = {"against unsteered": changes, "spent": spent, "against the probe": against}
            rows.append(
                (arm, *(str(changes[key]) for key in changes), str(spent["kl"]), *(str(a) for a in against.values()))
            )
        table(
            rows[-len(POWERS) - 1 :],
            ("arm", *by_name, "perplexity", "entropy", "KL", *(f"{k} against t = 0" for k in by_name)),
        )
    rows = []
    for arm in [arm for arm in report if arm.startswith("mixed, ") and "unsteered" not in arm]:
        found = {key: halves(report, arm, key) for key in ("TF-IDF", "VADER", "kl", "perplexity")}
        figures["mixed"][arm] = {key: {"easy": easy, "hard": hard} for key, (easy, hard) in found.items()}
        rows.append((arm, *(str(each) for key in found for each in found[key])))
    for direction in ("probe", "pattern"):
        own = f"mixed, {direction}, own means"
        for other in ("permuted", "constant"):
            found = {
                key: halves(report, own, key, f"mixed, {direction}, {other}")
                for key in ("TF-IDF", "VADER", "kl", "perplexity")
            }
            figures["mixed"][own][f"against {other}"] = {
                key: {"easy": easy, "hard": hard} for key, (easy, hard) in found.items()
            }
            rows.append((f"{own}, against {other}", *(str(each) for key in found for each in found[key])))
    table(
        rows,
        ("arm", *(f"{key}, {half}" for key in ("TF-IDF", "VADER", "kl", "perplexity") for half in ("easy", "hard"))),
    )
    notes = {name: {k: v for k, v in note.items() if k != "magnitudes"} for name, note in run.notes.items()}
    save(given.json, {**facts, "notes": notes, **figures})


if __name__ == "__main__":
    main()
