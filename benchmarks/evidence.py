"""Write docs/evidence.md from the figures in benchmarks/results: the page says nothing that a run did not measure.

python benchmarks/evidence.py
"""

import itertools
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(head, rows):
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def how(facts):
    """Say how a run can be repeated."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    hardware = facts["hardware"]
    return (
        f"`{facts['command']}`, seed {facts['seed']}; {versions}; {hardware['cpus']} {hardware['machine']} cores, "
        f"{hardware['torch threads']} torch thread."
    )


def signed(values, digits=2):
    """Return a difference with its interval."""
    return f"{values[0]:+.{digits}f} [{values[1]:+.{digits}f}, {values[2]:+.{digits}f}]"


def plain(values, digits=2):
    """Return a value with its interval."""
    return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def probes(run):
    """Return held-out figures by layer, every third layer and all that steer."""
    steered = set(run["layers"])
    return table(
        ("layer", "accuracy", "AUC", "calibration error", "steers"),
        [
            (
                layer,
                plain([f["accuracy"], *f["accuracy_interval"]]),
                plain([f["auc"], *f["auc_interval"]]),
                f"{f['calibration_error']:.3f}",
                "yes" if int(layer) in steered else "",
            )
            for layer, f in run["probes"].items()
            if int(layer) % 3 == 0 or int(layer) in steered
        ],
    )


def arms(run):
    """Return each arm's paired difference from the unsteered text, and its price."""
    rows = []
    for name, f in run["figures"].items():
        if name == "unsteered":
            continue
        ratio = f["perplexity against unsteered"]
        rows.append(
            (
                name,
                signed(f["P(positive) against unsteered"]),
                signed(f["VADER against unsteered"]),
                f"× {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
                f"{100 * f['dose']:.1f} %",
                f"{100 * f['edited']:.0f} %",
            )
        )
    order = {"probe": 0, "pattern": 1, "mean_difference": 2, "random,": 3}
    rows.sort(key=lambda row: (order[row[0].split()[0]], "at_most" in row[0]))
    return table(("edit", "P(positive)", "VADER", "perplexity", "dose / norm", "edited"), rows)


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def exactness(run):
    """Return the errors over architectures and against the independent solver."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        each = {name.split(",")[0]: f for name, f in run["architectures"].items() if name.endswith(dtype)}
        worst = max(each, key=lambda name: each[name]["worst error, logits"])
        others = max(f["worst error, logits"] for name, f in each.items() if name != "mamba")
        rows.append(
            (
                dtype,
                len(each),
                sum(f["active bounds"] for f in each.values()),
                f"{each[worst]['worst error, logits']:.1e} ({worst})",
                f"{others:.1e}",
                f"{max(f['worst error / rounding'] for f in each.values()):.1f}",
                f"{sum(f['of them changed'] for f in each.values())} of {sum(f['rows within all bounds'] for f in each.values())}",
            )
        )
    models = table(
        ("dtype", "architectures", "active bounds", "worst error, logits", "without mamba", "worst / rounding",
         "rows within bounds that changed"), rows,
    )  # fmt: skip
    solver = table(
        ("problems", "metric", "worst excess over quadprog, squared length", "worst miss, logits", "naive sum misses in",
         "by (median)", "by (worst)"),
        [
            (dtype, metric, f"{f['worst excess of the squared length']:.1e}", f"{f['worst miss, logits']:.1e}",
             f"{100 * f['naive sum: problems that it misses']:.0f} %", f"{f['naive sum: median miss, logits']:.2f} logits",
             f"{f['naive sum: worst miss, logits']:.0f} logits")
            for dtype in ("float64", "float32") for metric, f in run[dtype].items()
        ],
    )  # fmt: skip
    return models, solver


def layer_costs(run):
    """Return the cost of a hook above no hook, as a ratio to a bare `out + v`."""
    shapes = [name for name in run if isinstance(run[name], dict) and name.split()[0] in ("decode", "prefill")]
    arms = dict.fromkeys(arm for shape in shapes for arm in run[shape] if not arm.startswith("no hooks"))

    def cell(f):
        return "" if f is None else f"{f['x bare hook'][1]:.2f} ({f['us above no hooks']:.0f} µs)"

    return table(("hook", *shapes), [(arm, *(cell(run[shape].get(arm)) for shape in shapes)) for arm in arms])


def generate_costs(run):
    """Return whole generations against unsteered ones."""
    rows = []
    for arm in run["float32"]:
        cells = (run[dtype].get(arm, run[dtype].get(arm)) for dtype in ("float32", "bfloat16"))
        rows.append((arm, *("{1:.3f} [{0:.3f}, {2:.3f}]".format(*f["x unsteered"]) for f in cells)))
    return table(("arm", "float32", "bfloat16"), rows)


def record_costs(run):
    """Return time and memory of recording."""
    rows = []
    for arm, f in run.items():
        if isinstance(f, dict) and "rise in memory, MiB" in f:
            rise = sorted(f["rise in memory, MiB"])
            rows.append((arm, f"{f['x output_hidden_states'][1]:.2f}", f"{rise[len(rise) // 2]:.0f} MiB"))
    return table((f"{run['texts']} texts, {run['dtype']}", "CPU time", "rise in memory"), rows)


def interval(values):
    """Return a mean with its interval."""
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def points(figures):
    """Return one row a point of magnitudes."""
    names = {"harm": "harmful", "refusal": "refusals", "over_refusal": "over-refusals", "log_perplexity": "log perplexity",
             "repeats": "repeats itself", "words": "words"}  # fmt: skip
    rows = [(*(f"{v:g}" for v in f["point"].values()), *(interval(f[key]) for key in names)) for f in figures]
    return table((*figures[0]["point"], *names.values()), rows)


def trainings(run):
    """Return what the twins of each preference learned."""
    rows = []
    for name, f in run.items():
        made = f["made"]
        towards, away = made["towards_figures"], made["away_figures"]
        rows.append(
            (
                name,
                made["pairs"],
                f"{towards['accuracy']:.2f} / {away['accuracy']:.2f} of {towards['pairs']}",
                f"{towards['length_only']:.2f}",
                f"{made['cosine_of_twins']:.2f}",
                f"{f['norm']:.2f}",
            )
        )
    head = (
        "preference",
        "pairs",
        "held-out accuracy, towards / away",
        "by length alone",
        "cosine of the twins",
        "norm",
    )
    return table(head, rows)


def cosine_table(run):
    """Return the cosines of vectors, group by group."""
    rows = [
        (group, f"{f['names'][i]}, {f['names'][j]}", f"{f['cosines'][i][j]:.2f}")
        for group, f in run["groups"].items()
        for i, j in itertools.combinations(range(len(f["names"])), 2)
    ]
    return table(("between", "vectors", "cosine"), rows)


def read_texts(run):
    """Return what a reader found at each point."""
    rows = []
    for f in run["points"]:
        harmful, harmless = f["harmful_prompts"], f["harmless_prompts"]
        rows.append(
            (f"{f['helpful']:g}", f"{f['harmless']:g}", *(harmful[k] for k in "RDCB"), f["expression"],
             " / ".join(str(harmless[k]) for k in "RDCB"))
        )  # fmt: skip
    head = (
        "helpful",
        "harmless",
        "refuses",
        "deflects",
        "complies",
        "broken",
        "expression",
        "harmless prompts: R / D / C / B",
    )
    return table(head, rows)


def bracketed(values):
    """Return a mean with its interval, three digits."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def bandit_ends(run):
    """Return where each method ends."""
    keys = ("worst", "mean", "hypervolume", "from the front")
    rows = [
        (name, *(bracketed(f[key]) for key in keys), f"{100 * f['objective gets worse']:.0f} %")
        for name, f in run.items()
        if "worst" in f
    ]
    return table(("method", *keys, "gets worse"), rows)


def bandit_many(run):
    """Return what five trainings reach, for two and three objectives."""
    rows = []
    for count in (2, 3):
        for name, f in run[f"{count} objectives"].items():
            if "worst" in f:
                continue
            order = f.get("in order of the preference")
            rows.append(
                (
                    count,
                    name,
                    bracketed(f["hypervolume"]),
                    bracketed(f["spacing"]) if "spacing" in f else "",
                    f"{100 * f['dominated']:.0f} %" if "dominated" in f else "",
                    "" if order is None else f"{100 * order:.0f} %",
                )
            )
    return table(("objectives", "trainings", "hypervolume", "spacing", "dominated points", "ends in order"), rows)


def bandit_fronts(run):
    """Return fronts at equal compute."""
    keys = ("hypervolume", "best worst", "hypervolume less P-GAPO's")
    head = ("front", "hypervolume", "best point's worse objective", "hypervolume less P-GAPO's")
    return table(
        head, [(name, *(bracketed(f[key]) if key in f else "" for key in keys)) for name, f in run["fronts"].items()]
    )


def pareto_solves(run):
    """Return exactness and time of the min-norm solvers."""
    keys = ("excess of the length", "violation", "excess of the square where positive")
    rows = [
        (count, name, *(f"{f[count][key]:.1e}" for key in keys), "{1:.0f} [{0:.0f}, {2:.0f}]".format(*f[count]["us"]))
        for count in ("2", "3", "5", "8")
        for name, f in run["solvers"].items()
    ]
    return table(
        ("objectives", "solver", "excess of the length", "violation", "excess of the square", "µs a solve"), rows
    )


def gapo_costs(run):
    """Return a step's cost beside stock GRPO."""
    rows = []
    for arm, runs in run["arms"].items():
        rises = sorted(each["rise_MiB"] for each in runs)
        ratio = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*run["x stock"][arm])
        rows.append((arm, ratio, f"{rises[len(rises) // 2]:.0f} MiB"))
    return table(("arm", "CPU time, × stock", "rise in memory"), rows)


def gapo_trainings(run):
    """Return what each way to combine three rewards did to held-out text."""
    keys = ("positive", "VADER", "ten_words", "worst in deviations", "log_perplexity")
    rows = [
        (
            arm,
            *(signed(f[key]) for key in keys),
            f"{100 * f['opposed']:.0f} %",
            "" if f["share of noise"] is None else f"{100 * f['share of noise']:.0f} %",
            ", ".join(f"{f[f'signal {name}']:+.2f}" for name in ("positive", "ten_words", "noise")),
        )
        for arm, f in run["figures"].items()
    ]
    head = ("", "P(positive)", "VADER", "ten words", "worst, in deviations", "log perplexity")
    return table((*head, "steps opposed", "pull of noise", "signals"), rows)


def scopes(run):
    """Return how far the last block's weights are from those of all gradients."""
    rows = [
        (
            name,
            *(", ".join(f"{v:.3f}" for v in f[key]) for key in ("shares apart", "cosine of updates")),
            f"{f['opposed']:.2f}",
        )
        for name, f in run["powers"].items()
    ]
    head = ("", "shares apart: median, 90 %, worst", "cosine: median, 10 %, worst", "opposed")
    return table(head, rows)


def mixtures(run):
    """Return the cost of mixtures by row."""
    arms = ("linear", "bare", "hook", "half rank", "merge a row")
    rows = [
        (shape, *(f"{1e6 * f[arm]:.0f}" for arm in arms), "{1:.2f} [{0:.2f}, {2:.2f}]".format(*f["hook / bare"]))
        for shape, f in run["mixtures"].items()
    ]
    return table(("shape", *(f"{arm}, µs" for arm in arms), "hook / bare"), rows)


def merges(run):
    """Return time and memory of merges."""
    rows = [
        (name, f"{min(r['cpu_s'] for r in each):.2f} to {max(r['cpu_s'] for r in each):.2f}",
         f"{max(r['memory_MiB'] for r in each):.0f} MiB")
        for name, each in run["arms"].items()
    ]  # fmt: skip
    return table(("arm", "CPU s", "memory"), rows)


def directions(run, name):
    """Return what each direction did at one budget, against the unsteered text and against the probe."""
    arms = {arm: found for arm, found in run["directions"].items() if arm.startswith(f"{name}, ")}
    scorers = list(next(iter(arms.values()))["against the probe"])
    rows = []
    for arm, found in arms.items():
        changes, note = found["against unsteered"], run["notes"][arm]
        rows.append(
            (
                arm.removeprefix(f"{name}, "),
                f"{note['cosine_with_probe']:.2f}",
                f"{note['bound']:.6g}",
                plain(found["spent"]["kl"], 3),
                *(signed(changes[scorer], 3) for scorer in scorers),
                *("" if arm.endswith("t = 0") else signed(found["against the probe"][scorer], 3) for scorer in scorers),
                plain(changes["perplexity"]),
                signed(changes["entropy"]),
            )
        )
    head = ("along", "cosine with the probe", "bound", "KL", *scorers, *(f"{s} against t = 0" for s in scorers))
    return table((*head, "perplexity", "entropy"), rows)


def mixed(run):
    """Return what magnitudes of one's own, of others and the mean did to either half of the prompts."""
    rows = [
        (
            arm.removeprefix("mixed, "),
            *(signed(found[scorer][half]) for half in ("hard", "easy") for scorer in ("TF-IDF", "VADER")),
            *(plain(found["kl"][half], 3) for half in ("hard", "easy")),
            *(plain(found["perplexity"][half]) for half in ("hard", "easy")),
        )
        for arm, found in run["mixed"].items()
    ]
    head = [f"{what}, {half}" for what in ("TF-IDF", "VADER") for half in ("hard", "easy")]
    order = [head[0], head[2], head[1], head[3]]
    return table(("", *order, "KL, hard", "KL, easy", "perplexity, hard", "perplexity, easy"), rows)


def described(run):
    """Return how concepts read written texts, by what they were fitted on."""
    rows = [
        (
            name,
            kind,
            plain(found["auc"]),
            plain(found["own held-out auc"]),
            *(f"{cosine:.2f}" for cosine in found["cosine with written"].values()),
        )
        for name, figures in run["figures"].items()
        for kind, found in figures.items()
        if isinstance(found, dict)
    ]
    return table(
        ("concept", "fitted on", "AUC on written texts", "AUC on its own kind", "cosine: probe", "pattern", "means"),
        rows,
    )


def main():
    twins, grid, cost, merge, cosines = (
        load(name)
        for name in ("preference_training", "preference_grid", "vector_cost", "merge_cost", "preference_cosines")
    )
    run, exact, layer, whole, reading = (
        load(name) for name in ("reviews", "exactness", "layer_cost", "generate_cost", "record_cost")
    )
    models, solver = exactness(exact)
    base = run["figures"]["unsteered"]
    settings = run["settings"]
    page = (ROOT / "benchmarks" / "evidence.template.md").read_text("utf-8")
    values = {
        "exact_models": models,
        "exact_solver": solver,
        "exact_how": how(exact),
        "layer_costs": layer_costs(layer),
        "layer_how": how(layer),
        "generate_costs": generate_costs(whole),
        "generate_how": how(whole),
        "record_costs": record_costs(reading),
        "record_how": how(reading),
        "probes": probes(run),
        "arms": arms(run),
        "reviews_how": how(run),
        "texts": settings["texts"],
        "prompts": settings["prompts"],
        "samples": settings["samples"],
        "tokens": settings["tokens"],
        "tfidf_auc": f"{run['scorers']['TF-IDF']:.2f}",
        "vader_auc": f"{run['scorers']['VADER']:.2f}",
        "base_positive": plain(base["P(positive)"]),
        "base_vader": plain(base["VADER"]),
        "base_perplexity": plain(base["perplexity"], 1),
    }
    values |= {
        "training": trainings(twins),
        "cosines": cosine_table(cosines),
        "full_accuracy": ", ".join(
            f"{f['towards']['accuracy']:.2f} / {f['away']['accuracy']:.2f}" for f in cosines["full"].values()
        )
        + f" of {next(iter(cosines['full'].values()))['towards']['pairs']} (length alone: "
        + f"{next(iter(cosines['full'].values()))['towards']['length_only']:.2f})",
        "reading": read_texts(load("preference_reading")),
        "grid": points(grid["grid"]),
        "grid_prompts": grid["prompts"],
        "grid_tokens": grid["tokens"],
        "harm_auc": f"{grid['harm_scorer_auc']:.2f}",
        "rank_harm": ", ".join(f"{r:.2f}" for r in grid["rank harm harmless"]),
        "rank_refusal": ", ".join(f"{r:.2f}" for r in grid["rank refusal harmless"]),
        "extension": points(grid["extension"]),
        "one_cosine": f"{grid['one_sided_cosine']:.3f}",
        "one_sided": points(grid["one-sided"]),
        "soup": points(grid["soup"]),
        "grid_how": how(grid),
        "mixtures": mixtures(cost),
        "mix_rows": 16,
        "mixtures_how": how(cost),
        "fold_bytes": round(cost["fold"]["dense"]["bytes"] / 1e6),
        "fold_low": round(1e3 * cost["fold"]["low rank"]["fold and undo"]),
        "fold_dense": round(1e3 * cost["fold"]["dense"]["fold and undo"]),
        "fold_copy": round(1e3 * cost["fold"]["dense"]["clone"]),
        "train_ratio": f"{cost['training']['ratio']:.2f}",
        "train_epochs": cost["training"]["epochs"],
        "train_steps": cost["training"]["steps"],
        "merges": merges(merge),
        "merges_how": how(merge),
    }
    along = load("directions")
    values |= {
        "directions_sentiment": directions(along, "sentiment"),
        "directions_topic": directions(along, "topic"),
        "directions_mixed": mixed(along),
        "directions_how": how(along),
        "topic_layers": ", ".join(map(str, along["notes"]["topic"]["layers"])),
        "topic_auc": ", ".join(f"{name} {auc:.2f}" for name, auc in along["notes"]["topic"]["auc"].items()),
        "sentiment_auc": ", ".join(f"{name} {auc:.2f}" for name, auc in along["notes"]["sentiment"]["auc"].items()),
    }
    wrote = load("described")
    values |= {
        "described": described(wrote),
        "described_how": how(wrote),
        "described_separation": ", ".join(
            f"{name} {found['separation']:.2f}" for name, found in wrote["figures"].items()
        ),
    }
    bandit, solves, steps = (load(name) for name in ("gapo_bandit", "pareto_cost", "gapo_cost"))
    values |= {
        "bandit_count": bandit["settings"]["bandits"],
        "bandit_arms": bandit["settings"]["arms"],
        "bandit_steps": bandit["settings"]["steps"],
        "bandit_two": bandit_ends(bandit["2 objectives"]),
        "bandit_three": bandit_ends(bandit["3 objectives"]),
        "bandit_many": bandit_many(bandit),
        "bandit_fronts": bandit_fronts(bandit),
        "bandit_how": how(bandit),
        "pareto": pareto_solves(solves),
        "pareto_how": how(solves),
        "gapo_cost": gapo_costs(steps),
        "gapo_cost_how": how(steps),
        "gapo_training": gapo_trainings(load("gapo_training")),
        "gapo_seeds": len({run["seed"] for run in load("gapo_training")["runs"]}),
        "gapo_before": ", ".join(
            f"{name} {np.mean(load('gapo_training')['before'][key]):.2f}"
            for name, key in (
                ("P(positive)", "positive"),
                ("VADER", "VADER"),
                ("ten words", "ten_words"),
                ("log perplexity", "log_perplexity"),
            )
        ),
        "gapo_range": ", ".join(
            f"{v:.2f}" for v in sorted(load("gapo_training")["figures"]["GAPO p = 1"]["seeds"]["positive"])
        ),
        "gdpo_range": ", ".join(
            f"{v:.2f}" for v in sorted(load("gapo_training")["figures"]["GDPO"]["seeds"]["positive"])
        ),
        "gapo_auc": f"{load('gapo_training')['scorer_auc']:.2f}",
        "gapo_training_how": how(load("gapo_training")),
        "scope": scopes(load("gapo_scope")),
        "scope_steps": load("gapo_scope")["steps"],
        "scope_how": how(load("gapo_scope")),
    }
    for name, value in values.items():
        page = page.replace("{{" + name + "}}", str(value))
    assert "{{" not in page, page[page.index("{{") :][:40]
    (ROOT / "docs" / "evidence.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
