"""Write docs/evidence.md from the figures in benchmarks/results: the page says nothing that a run did not measure.

python benchmarks/evidence.py
"""

import json
from pathlib import Path

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


def main():
    run = json.loads((RESULTS / "reviews.json").read_text("utf-8"))
    base = run["figures"]["unsteered"]
    settings = run["settings"]
    page = (ROOT / "benchmarks" / "evidence.template.md").read_text("utf-8")
    values = {
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
    for name, value in values.items():
        page = page.replace("{{" + name + "}}", str(value))
    assert "{{" not in page, page[page.index("{{") :][:40]
    (ROOT / "docs" / "evidence.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
