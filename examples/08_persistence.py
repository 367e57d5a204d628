"""Does an edit last? One layer is edited, and later layers are read; then a bound at several layers. Half a minute of one core.

python examples/08_persistence.py
python examples/08_persistence.py --output figures      # also writes a figure
"""

import argparse
from pathlib import Path

from steerkit import Concept, experiments, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the figure")
output = parser.parse_args().output

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
layers = range(0, model.config.num_hidden_layers, 2)
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy, layers=layers).along("pattern")

# A tenth of the residual norm, a little before the middle; the control is a step as long along a random direction.
middle = sentiment.layers[len(sentiment.layers) * 2 // 5]
step = sentiment.add(0.1 * sentiment.norms[middle], layers=middle)
left = experiments.persistence(model, tokenizer, sentiment, unhappy[:40], step)
print(left)

# A bound at that layer and all later ones: `step` is how far each still has to move the last token, the first one being 1.
bound = sentiment.constrain(at_least=0.9, layers=[layer for layer in layers if layer >= middle])
cascade = experiments.persistence(model, tokenizer, sentiment, unhappy[:40], bound)
print("\nWhat is left to do at each layer of a bound, in units of its first step:")
for layer, share in zip(cascade["layer"], cascade["step"], strict=True):
    if share is not None:
        print(f"  layer {layer:2}: {share}")

if output:
    output.mkdir(parents=True, exist_ok=True)
    plots.layers(left, "reading").savefig(output / "persistence.png", dpi=120, bbox_inches="tight")
