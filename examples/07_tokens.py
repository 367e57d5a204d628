"""Which tokens carry a concept? What the probe reads at each one, before and after steering. Half a minute of one core.

python examples/07_tokens.py
python examples/07_tokens.py --output page      # writes the coloured text as a page, and a figure by layer
"""

import argparse
from pathlib import Path

from steerkit import Concept, experiments, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the page and the figure")
output = parser.parse_args().output

TEXTS = [
    "The food was cold and the waiter was rude, but the view was wonderful.",
    "She opened the letter, read it twice, and began to smile.",
]

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy).along("pattern")
best = sentiment.best_layer

# At all positions: by default a constraint acts on the last token of a prompt and on new ones.
bound = sentiment.constrain(at_least=0.9, positions="all")
tables = [experiments.tokens(model, tokenizer, sentiment, text, interventions=bound) for text in TEXTS]
for text, table in zip(TEXTS, tables, strict=True):
    here = table.only(layer=best)
    print(f"{text}\nP(sentiment) at layer {best}: as it is, and under a bound of 0.9")
    for token, before, after in zip(table.tokens, here["probability"], here["steered probability"], strict=True):
        print(f"  {token!r:14} {before:.2f} {'#' * round(10 * before):10}  {after:.2f} {'#' * round(10 * after)}")
    print()
print(
    "The first token has nothing before it, and in many models a state like no other: what is read there means nothing."
)

if output:
    output.mkdir(parents=True, exist_ok=True)
    page = "".join(f"<h2>As it is, and under a bound of 0.9</h2>{table.html()}" for table in tables)
    (output / "tokens.html").write_text(f'<!doctype html><meta charset="utf-8"><title>Tokens</title>{page}', "utf-8")
    plots.matrix(
        tables[0], "probability", down="layer", across="position", labels=tables[0].tokens
    ).savefig(output / "tokens.png", dpi=120, bbox_inches="tight")  # fmt: skip
