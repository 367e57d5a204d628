"""Write docs/evidence.md from the figures in benchmarks/results: the page says nothing that a run did not measure.

python benchmarks/evidence.py
"""

import json
from pathlib import Path

import evidence_tables as made
import numpy as np
from evidence_tables import how, plain, signed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def main():
    twins, grid, cost, merge, cosines = (
        load(name)
        for name in ("preference_training", "preference_grid", "vector_cost", "merge_cost", "preference_cosines")
    )
    run, exact, layer, whole, reading = (
        load(name) for name in ("reviews", "exactness", "layer_cost", "generate_cost", "record_cost")
    )
    models, solver = made.exactness(exact)
    base = run["figures"]["unsteered"]
    settings = run["settings"]
    page = (ROOT / "benchmarks" / "evidence.template.md").read_text("utf-8")
    values = {
        "exact_models": models,
        "exact_solver": solver,
        "exact_how": how(exact),
        "layer_costs": made.layer_costs(layer),
        "layer_how": how(layer),
        "generate_costs": made.generate_costs(whole),
        "generate_how": how(whole),
        "record_costs": made.record_costs(reading),
        "record_how": how(reading),
        "probes": made.probes(run),
        "arms": made.arms(run),
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
        "training": made.trainings(twins),
        "cosines": made.cosine_table(cosines),
        "full_accuracy": ", ".join(
            f"{f['towards']['accuracy']:.2f} / {f['away']['accuracy']:.2f}" for f in cosines["full"].values()
        )
        + f" of {next(iter(cosines['full'].values()))['towards']['pairs']} (length alone: "
        + f"{next(iter(cosines['full'].values()))['towards']['length_only']:.2f})",
        "reading": made.read_texts(load("preference_reading")),
        "grid": made.points(grid["grid"]),
        "grid_prompts": grid["prompts"],
        "grid_tokens": grid["tokens"],
        "harm_auc": f"{grid['harm_scorer_auc']:.2f}",
        "rank_harm": ", ".join(f"{r:.2f}" for r in grid["rank harm harmless"]),
        "rank_refusal": ", ".join(f"{r:.2f}" for r in grid["rank refusal harmless"]),
        "extension": made.points(grid["extension"]),
        "one_cosine": f"{grid['one_sided_cosine']:.3f}",
        "one_sided": made.points(grid["one-sided"]),
        "soup": made.points(grid["soup"]),
        "grid_how": how(grid),
        "mixtures": made.mixtures(cost),
        "mix_rows": 16,
        "mixtures_how": how(cost),
        "fold_bytes": round(cost["fold"]["dense"]["bytes"] / 1e6),
        "fold_low": round(1e3 * cost["fold"]["low rank"]["fold and undo"]),
        "fold_dense": round(1e3 * cost["fold"]["dense"]["fold and undo"]),
        "fold_copy": round(1e3 * cost["fold"]["dense"]["clone"]),
        "train_ratio": f"{cost['training']['ratio']:.2f}",
        "train_epochs": cost["training"]["epochs"],
        "train_steps": cost["training"]["steps"],
        "merges": made.merges(merge),
        "merges_how": how(merge),
    }
    along = load("directions")
    values |= {
        "directions_sentiment": made.directions(along, "sentiment"),
        "directions_topic": made.directions(along, "topic"),
        "directions_mixed": made.mixed(along),
        "directions_pairs": made.mixed_pairs(along),
        "directions_how": how(along),
        "topic_layers": ", ".join(map(str, along["notes"]["topic"]["layers"])),
        "topic_auc": ", ".join(f"{name} {auc:.2f}" for name, auc in along["notes"]["topic"]["auc"].items()),
        "sentiment_auc": ", ".join(f"{name} {auc:.2f}" for name, auc in along["notes"]["sentiment"]["auc"].items()),
    }
    wrote = load("described")
    values |= {
        "described": made.described(wrote),
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
        "bandit_two": made.bandit_ends(bandit["2 objectives"]),
        "bandit_three": made.bandit_ends(bandit["3 objectives"]),
        "bandit_many": made.bandit_many(bandit),
        "bandit_fronts": made.bandit_fronts(bandit),
        "bandit_how": how(bandit),
        "pareto": made.pareto_solves(solves),
        "pareto_how": how(solves),
        "gapo_cost": made.gapo_costs(steps),
        "gapo_cost_how": how(steps),
        "gapo_training": made.gapo_trainings(load("gapo_training")),
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
        "scope": made.scopes(load("gapo_scope")),
        "scope_steps": load("gapo_scope")["steps"],
        "scope_how": how(load("gapo_scope")),
    }
    inside = load("looking_inside")
    values |= {"looked": made.looked(inside), "looked_how": how(inside)}
    primary = load("matched_budget")
    values |= {
        "primary_budget": f"{primary['budget']:g}",
        "primary_contrasts": made.contrasts(primary),
        **{f"primary_{name}": made.budgeted(primary, name) for name in primary["concepts"]},
        "primary_how": how(primary),
    }
    every = load("by_method")
    values |= {
        **{f"every_{name}": made.by_budget(every, name) for name in every["concepts"]},
        **{f"every_{name}": every["settings"][name] for name in ("prompts", "samples", "tokens", "development")},
        "every_steps": ", ".join(f"{found['steps']} ({name})" for name, found in every["concepts"].items()),
        "every_auc": "; ".join(
            f"{name}: " + ", ".join(f"{scorer} {auc:.2f}" for scorer, auc in found["auc"].items())
            for name, found in every["concepts"].items()
        ),
        "every_how": how(every),
    }
    gcav, vectors, policies = (load(f"paper_{name}") for name in ("gcav", "preference_vector", "gapo"))
    values |= {
        **{f"gcav_{name}": gcav["settings"][name] for name in ("prompts", "samples", "tokens", "budget")},
        "gcav_tables": made.gcav_tables(gcav),
        "gcav_layers": made.gcav_layers(gcav),
        "gcav_many": made.gcav_many(gcav),
        "gcav_strength": made.gcav_strength(gcav),
        "gcav_differs": made.differs(gcav),
        "gcav_how": how(gcav),
        **{f"vector_{name}": vectors["settings"][name] for name in ("prompts", "tokens", "steps")},
        "vector_auc": ", ".join(f"{name} {auc:.2f}" for name, auc in vectors["auc"].items()),
        "vector_tables": made.vector_tables(vectors),
        "vector_grids": made.vector_grids(vectors),
        "vector_twins": ", ".join(f"{name} {cosine:.2f}" for name, cosine in vectors["figures"]["twins"].items()),
        "vector_cosine": f"{vectors['figures']['cosine of helpful and harmless']:.2f}",
        "vector_differs": made.differs(vectors),
        "vector_how": how(vectors),
        "gapo_paper_steps": policies["settings"]["steps"],
        "gapo_paper": made.gapo_tables(policies),
        "gapo_fronts": made.fronts(policies),
        "gapo_slow": made.moved(load("paper_gapo_slow")),
        "gapo_slow_how": load("paper_gapo_slow")["command"],
        "gapo_differs": made.differs(policies),
        "gapo_paper_how": how(policies),
    }
    pattern = {c["concept"]: c["difference"] for c in primary["contrasts"] if c["contrast"].startswith("pattern")}
    two = bandit["2 objectives"]
    values |= {
        **{f"{name}_pattern": signed(change, 3) for name, change in pattern.items()},
        "rule_layers": signed(gcav["figures"]["sentiment, base, layers"]["rule against best"], 3),
        "bandit_powers": ", ".join(
            f"{two[name]['worst'][0]:.2f}" for name in ("GAPO p = 1", "GAPO p = 2", "MGDA (p = 0)")
        ),
        "bandit_stretched": f"{100 * two['GAPO p = 1, length of linear']['objective gets worse']:.0f} % of bandits",
        "scope_cosine": f"{load('gapo_scope')['powers']['p = 1']['cosine of updates'][0]:.3f}",
    }
    for name, value in values.items():
        page = page.replace("{{" + name + "}}", str(value))
    assert "{{" not in page, page[page.index("{{") :][:40]
    (ROOT / "docs" / "evidence.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
