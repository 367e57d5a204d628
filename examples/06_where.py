"""Where can a concept be read? Probes by layer at the residual stream, attention and MLP. Less than a minute of one core.

python examples/06_where.py
python examples/06_where.py --output figures      # also writes a figure
"""

import argparse
from pathlib import Path

from steerkit import Concept, experiments, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the figure")
output = parser.parse_args().output

model, tokenizer = load_model()
layers = range(0, model.config.num_hidden_layers, 3)
happy, unhappy = contrast_texts("sentiment")

# All is read at the last token of a sentence: after the first layers that is hardly more than a full stop.
found = experiments.where("sentiment", model, tokenizer, positive=happy[:80], negative=unhappy[:80], layers=layers)
print("Held-out accuracy; in the last columns of the same states under shuffled labels.\n")
sites = ("residual", "attention", "mlp")
print("layer  " + "".join(f"{site:22}" for site in sites) + "".join(f"{site + ', shuffled':22}" for site in sites))
for layer in layers:
    cells = [
        str(found.only(layer=layer, site=site, labels=labels)["accuracy"][0])
        for labels in ("true", "shuffled")
        for site in sites
    ]
    print(f"{layer:5}  " + "".join(f"{cell:22}" for cell in cells))

# Are two concepts one direction? The probes' normals, and the directions that interventions move along.
formal, casual = contrast_texts("formality")
concepts = [
    Concept.fit(name, model, tokenizer, positive=yes[:80], negative=no[:80], layers=layers).along("pattern")
    for name, yes, no in (("sentiment", happy, unhappy), ("formality", formal, casual))
]
print(f"\n{experiments.similarity(concepts)}")

if output:
    output.mkdir(parents=True, exist_ok=True)
    plots.layers(found, "accuracy").savefig(output / "where.png", dpi=120, bbox_inches="tight")
