"""The tables of docs/evidence.md, each from one file of results."""

import itertools


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


def mixed_pairs(run):
    """Return what magnitudes of one's own did beyond those of others and beyond the constant, on either half."""
    keys = ("TF-IDF", "VADER", "kl")
    rows = [
        (
            f"{arm.removeprefix('mixed, ').removesuffix(', own means')}, {other}",
            *(signed(found[other][key][half], 3) for half in ("hard", "easy") for key in keys),
        )
        for arm, found in run["mixed"].items()
        for other in ("against permuted", "against constant")
        if other in found
    ]
    return table(
        ("own means", *(f"{key.replace('kl', 'KL')}, {half}" for half in ("hard", "easy") for key in keys)), rows
    )


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


# The primary comparison, and what else was compared at equal KL.


def contrasts(run):
    """Return the contrasts that were fixed before the run."""
    rows = [
        (
            c["concept"],
            c["contrast"],
            f"{c['first']} − {c['second']}",
            signed(c["difference"], 3),
            " / ".join(f"{kl[0]:.3f}" for kl in c["spent"]),
            f"{c['p']:.2g}",
            f"{c['Holm']:.2g}",
        )
        for c in run["contrasts"]
    ]
    return table(("concept", "contrast", "arms", "difference", "KL spent", "p", "Holm"), rows)


def amount(given):
    """Return an amount as it is shown: both kinds have two, and some have one a layer."""
    if given is None:
        return ""
    if not isinstance(given, dict):
        return f"{given:.6g}"
    if not set(given) <= {"edit", "weights"}:
        return "by layer"
    return ", ".join(f"{part} {amount(each)}" for part, each in given.items())


def budgeted(run, name):
    """Return what each method did to text about one concept, at one budget."""
    found = run["concepts"][name]
    measures = ("kl", "kl_p90", "perplexity", "entropy", "repetition")
    effects = [key for key in found["auc"] if key in found["cells"][0]]
    rows = [
        (
            cell["method"] + (", undosed" if cell["budget"] is None else ""),
            amount(cell["amount"]),
            *(signed(cell[effect], 3) for effect in effects),
            plain(cell["kl"], 3),
            *(f"{cell[measure][0]:.{digits}f}" for measure, digits in zip(measures[1:], (2, 1, 2, 3), strict=True)),
        )
        for cell in found["cells"]
    ]
    head = ("method", "amount", *effects, "KL", "KL, 90 %", "perplexity", "entropy", "repetition")
    return table(head, rows)


def by_budget(run, name):
    """Return each method's row: the first scorer's change at each budget with the KL that was spent, the second's, and perplexity."""
    found = run["concepts"][name]
    first, *others = [key for key in found["auc"] if key in found["cells"][0]]
    budgets = list(dict.fromkeys(cell["budget"] for cell in found["cells"] if cell["budget"]))
    arms = {}
    for cell in found["cells"]:
        place = -1 if cell["budget"] is None else budgets.index(cell["budget"])
        method = cell["method"] + (", undosed" if cell["budget"] is None else "")
        arms.setdefault(method, [None] * len(budgets))[place] = cell
    rows = [
        (
            method,
            *("" if cell is None else f"{signed(cell[first], 3)} at {cell['kl'][0]:.3f}" for cell in cells),
            *(" / ".join(f"{cell[other][0]:+.2f}" for cell in cells if cell) for other in others),
            " / ".join(f"{cell['perplexity'][0]:.0f}" for cell in cells if cell),
        )
        for method, cells in arms.items()
    ]
    return table(("method", *(f"{first}, {budget:g}" for budget in budgets), *others, "perplexity"), rows)


# The papers' tables.


def change(values, digits=3):
    """Return a difference with its interval, or nothing."""
    return "" if values is None else signed(values, digits)


def published(value, digits=3):
    return "" if value is None else f"{value:.{digits}f}"


def gcav_tables(run):
    """Return, for each concept, the methods beside the paper's."""
    figures, parts = run["figures"], []
    groups = {}
    for arm, found in figures.items():
        if isinstance(found, dict) and "against base" in found:
            stem, _, method = arm.rpartition(": ")
            groups.setdefault(stem, {})[method] = found
    for stem, methods in groups.items():
        keys = [key for key in next(iter(methods.values()))["ours"] if key not in ("perplexity", "kl", "repetition")]
        theirs = list(next(iter(methods.values()))["paper"])
        rows = []
        for method, found in methods.items():
            first = method == "base"
            ours = (plain(found["ours"][key], 3) if first else signed(found["against base"][key], 3) for key in keys)
            cost = found["ours"]["perplexity"] if first else found["against base"]["perplexity"]
            paper = (published(found["paper"][mode], 4) for mode in theirs)
            rows.append(
                (
                    method,
                    *ours,
                    f"{'' if first else '× '}{cost[0]:.2f}",
                    f"{found['ours']['kl'][0]:.2f}",
                    found["layers"] or "",
                    *paper,
                )
            )
        head = ("", *keys, "perplexity", "KL", "layers", *(f"paper, {mode}" for mode in theirs))
        parts.append(f"{stem.capitalize()}:\n\n{table(head, rows)}")
        between = methods.get("GCAV-Output", {}).get("against GCAV-Input")
        if between:
            changes = ", ".join(f"{key.replace('kl', 'KL')} {signed(between[key], 3)}" for key in (*keys, "kl"))
            parts.append(f"Output less Input: {changes}, perplexity × {plain(between['perplexity'])}.")
    return "\n\n".join(parts)


def gcav_layers(run):
    """Return what each group of layers did at one bound."""
    parts = []
    for name, found in run["figures"].items():
        if not name.endswith(", layers"):
            continue
        rows = [
            (
                f"{label}: {', '.join(map(str, f['layers']))}" if not label[0].isdigit() else label,
                f"{f['accuracy']:.2f}",
                *(signed(values, 3) for values in f["effect"].values()),
                f"{f['kl'][0]:.3f}",
                f"× {f['perplexity'][0]:.2f}",
            )
            for label, f in found["groups"].items()
        ]
        effects = next(iter(found["groups"].values()))["effect"]
        rank, p = found["accuracy follows effect"]
        parts.append(
            table(("layers", "probe accuracy", *effects, "KL", "perplexity"), rows)
            + f"\n\nRank correlation of accuracy and effect over the groups: {rank:.2f} (exact p = {p:.3f}). The rule's layers against the "
            f"best group, {found['best group']}: {signed(found['rule against best'], 3)}."
        )
    return "\n\n".join(parts)


def gcav_many(run):
    """Return three concepts at once, one swept."""
    rows = []
    for name, found in run["figures"].items():
        if not name.startswith("three concepts"):
            continue
        for k, scores in zip(found["k"], found["scores"], strict=True):
            rows.append(
                (
                    f"{name.rpartition(', ')[2]}, k = {k}",
                    *(plain(v, 1 if key == "perplexity" else 3) for key, v in scores.items()),
                )
            )
        head = tuple(found["scores"][0])
    return table(("", *head), rows)


def gcav_strength(run):
    """Return the correlations of what a prompt received with how toxic it is."""
    rows = [
        (
            name.removeprefix("figure 4, "),
            signed([found["r"], *found["interval"]]),
            f"{found['p']:.1g}",
            f"{100 * found['edited']:.0f} %",
        )
        for name, found in run["figures"].items()
        if name.startswith("figure 4")
    ]
    return table(("", "r", "p", "prompts edited"), rows)


def vector_tables(run):
    """Return the arms of Tables 1, 4 and 6 beside the paper's."""
    arms = run["figures"]["arms"]
    keys = list(dict.fromkeys(key for found in arms.values() for key in found["ours"]))
    rows = [
        (
            arm,
            *(plain(found["ours"][key], 1 if key == "words" else 2) if key in found["ours"] else "" for key in keys),
            ", ".join(f"{v:.2f}" for v in found["paper"] or ()),
        )
        for arm, found in arms.items()
    ]
    return table(("", *keys, "paper"), rows)


def vector_grids(run):
    """Return both grids of magnitudes."""
    parts = []
    for key in ("helpful", "harmless"):
        found = run["figures"][f"figure 2, {key}"]
        grid = [f"{magnitude:g}" for magnitude in found["grid"]]
        rows = [(f"helpful {a}", *(plain(v, 2) for v in line)) for a, line in zip(grid, found["ours"], strict=True)]
        ranks = ", ".join(f"{rank:.2f}" for rank in found["ranks"])
        alone = next(value for name, value in found.items() if name.endswith("alone"))
        other = "harmless" if key == "helpful" else "helpful"
        parts.append(
            f"The score for {key}:\n\n{table(('', *(f'harmless {b}' for b in grid)), rows)}\n\n"
            f"Rank correlation with its own magnitude, by the other's: {ranks} (paper: 1). {other.capitalize()} alone: {signed(alone, 3)}."
        )
    return "\n\n".join(parts)


def gapo_tables(run):
    """Return each policy's change on openings that it was not trained on."""
    rows = [
        (
            arm,
            *(signed(found["against base"][key], 3) for key in ("positive", "even", "VADER")),
            f"× {found['against base']['perplexity'][0]:.2f}",
            f"{found['ours']['kl'][0]:.3f}",
            *(
                "" if found[key] is None else f"{found[key]:.2f}"
                for key in ("cosine of the gradients", "steps that oppose an objective")
            ),
            "" if found["paper"] is None else "{}: {:.2f}, {:.2f}, {:.2f}".format(*found["paper"]),
        )
        for arm, found in run["figures"].items()
    ]
    head = ("", "positive", "even", "VADER", "perplexity", "KL", "cosine", "opposed", "paper: helpful, harmless, mean")
    return table(head, rows)


def moved(run):
    """Say how many changes of the objectives are beyond the noise, and at what KL."""
    trained = [found for found in run["figures"].values() if found["steps that oppose an objective"] is not None]
    changes = [found["against base"][key] for found in trained for key in ("positive", "even")]
    beyond = sum(low > 0 or high < 0 for _, low, high in changes)
    kls = [found["ours"]["kl"][0] for found in trained]
    return f"{beyond} of {len(changes)} changes are beyond the noise, at KL of {min(kls):.2f} to {max(kls):.2f}"


def fronts(run):
    """Return the area above all arms' lowest that each family reaches."""
    rows = [(name, f"{found['hypervolume']:.4g}", len(found["points"])) for name, found in run["fronts"].items()]
    return table(("front", "hypervolume", "points"), rows)


def differs(run):
    """Return what differs from the paper."""
    return "\n".join(f"* {line};" for line in run["differs"][:-1]) + f"\n* {run['differs'][-1]}."


# The experiments.


CONTROLS = {
    "where": "shuffled labels", "similarity": "95 % of random pairs", "persistence": "a random direction",
    "lens": "random directions, same rank", "next token": "a random direction, same rank", "patch": "a random direction",
    "inside": "a random change of its norm", "ablate by module": "a random change of its norm",
    "ablate by layer": "a random change of its norm", "alignment": "95 % of random changes",
}  # fmt: skip
"""What the control of an experiment is where a figure does not say so itself."""


def looked(run):
    """Return what each experiment found, with its control."""

    def shown(figure):
        if isinstance(figure, list):
            return "{:.3g} [{:.3g}, {:.3g}]".format(*figure)
        return f"{figure:.3g}" if isinstance(figure, float) else str(figure)

    rows = [
        (
            name if place == 0 else "",
            quote["what"],
            shown(quote["figure"]),
            shown(quote["control"]),
            quote.get("control_is", CONTROLS.get(name, "")),
        )
        for name, found in run["experiments"].items()
        for place, quote in enumerate(found["quotes"])
    ]
    return table(("experiment", "what", "figure", "control", "the control"), rows)
