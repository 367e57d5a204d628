"""What does a direction say in words? The logit lens, and what steering really does to the next token. Half a minute of one core.

python examples/09_vocabulary.py
python examples/09_vocabulary.py --output figures      # also writes two figures
"""

import argparse
from pathlib import Path

from steerkit import Concept, experiments, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the figures")
output = parser.parse_args().output

PROMPTS = [
    "My stay at the small hotel by the lake was", "The food at the new place was", "My first day at work was",
    "The film that we saw last night was", "The walk along the coast was", "Her speech at the wedding was",
    "The room on the third floor was", "The coffee at the station was",
]  # fmt: skip

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy).along("pattern")
best = sentiment.best_layer

# The lens reads the direction itself through the final norm and the head, as if no layer came after it: hold every effect
# against what random directions reach. Words of one meaning may be a sign where the sizes are none.
seen = [experiments.lens(model, tokenizer, sentiment, layer=layer, top=6) for layer in (best, sentiment.layers[-1])]
for found in seen:
    print(f"{found}\n")

# The other measurement is exact: probabilities with and without the step, and a random step of the same length.
step = sentiment.add(0.1 * sentiment.norms[best])
found = experiments.next_token(model, tokenizer, PROMPTS, step, top=6)
print(found)

if output:
    output.mkdir(parents=True, exist_ok=True)
    plots.bars(seen[0], "effect", "random", label="token").savefig(output / "lens.png", dpi=120, bbox_inches="tight")
    raised = found.only(side="raised")
    figure = plots.bars(raised, "change", "random change", label="token")
    figure.savefig(output / "next_token.png", dpi=120, bbox_inches="tight")
