"""Is a direction causal? States of one prompt are put into another, whole and along the concept. Half a minute of one core.

python examples/11_patching.py
python examples/11_patching.py --output figures      # also writes a figure
"""

import argparse
from pathlib import Path

from steerkit import Concept, experiments, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the figure")
output = parser.parse_args().output

# Clean prompt, corrupted prompt, (right, wrong) answer. Each pair differs in what was said before, and in nothing else.
PAIRS = [
    ("I loved the film. It was", "I hated the film. It was", (" great", " terrible")),
    ("The best meal of my life. The food was", "The worst meal of my life. The food was", (" great", " terrible")),
    ("A wonderful hotel. Our room was", "A terrible hotel. Our room was", (" beautiful", " dirty")),
    ("What a happy day. I feel", "What a sad day. I feel", (" happy", " sad")),
    ("I recommend this book. The story is", "I would not recommend this book. The story is", (" great", " boring")),
    ("We laughed all night. The party was", "We left after ten minutes. The party was", (" great", " boring")),
    ("The service was excellent. The staff were", "The service was awful. The staff were", (" friendly", " rude")),
    ("He won the prize. He is", "He lost his job. He is", (" happy", " sad")),
]
clean, corrupted, answers = (list(each) for each in zip(*PAIRS, strict=True))

model, tokenizer = load_model()
layers = range(1, model.config.num_hidden_layers, 4)
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy, layers=layers).along("pattern")

found = experiments.patch(model, tokenizer, sentiment, clean, corrupted, answers)
print(f"{found}\n")
print(
    "patched: where the last position begins to carry the answer. patched along: how much of that is this direction.\n"
    "erased: below 1, the answer needs the direction at the last position. Hold each against its random control.\n"
    "erased everywhere: at the first token too, an attention sink, so that more may break than the concept."
)

if output:
    output.mkdir(parents=True, exist_ok=True)
    figure = plots.layers(found, "patched", "patched along", "patched at random", "erased", "erased at random")
    figure.savefig(output / "patching.png", dpi=120, bbox_inches="tight")
