"""An addition written into the weights: refused where it cannot be exact, then as near as rank 1 comes. A minute of one core.

python examples/12_bake.py
python examples/12_bake.py --output adapter      # also writes it as a PEFT LoRA folder
"""

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

from steerkit import Concept, Controller, experiments
from steerkit.demo import contrast_texts, load_model
from steerkit.errors import UnsupportedModelError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for the adapter")
output = parser.parse_args().output

PROMPTS = ["My stay at the small hotel by the lake was", "The train was late again, and", "The new phone"]

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy[:-20], negative=unhappy[:-20]).along("pattern")
best, held_out = sentiment.best_layer, happy[-20:] + unhappy[-20:]
step = sentiment.add(0.1 * sentiment.norms[best])

# A constant is exact in a bias behind which nothing follows in the block. GPT-2 has one; Llama's kind has none.
try:
    exact = experiments.bake(model, step)
    print(experiments.fidelity(model, tokenizer, exact, step, held_out))
except UnsupportedModelError as error:
    print(f"bake: {error}\n")

# Rank 1: fitted on some texts, measured on others. `ridge` trades the weights' norm against how even the step is. By row:
# distance from the addition (stream: 0 the same, 1 no change; kl in nats), and the share of texts with one likeliest token.
for ridge in (0.01, 1.0, math.inf):
    edited = experiments.edit_weights(model, tokenizer, step, happy[:60] + unhappy[:60], ridge=ridge)
    shift = edited.made["shift"][str(best)]
    print(f"ridge {ridge:g}: step {shift['mean']:.3g} ± {shift['deviation']:.2g} over tokens, norm {edited.norm():.3g}")
    found = experiments.fidelity(model, tokenizer, edited, step, held_out)
    for change, stream, kl, agreement in found.rows:
        print(f"  {change:15} stream {stream}, kl {kl}, agreement {agreement}")
    if ridge == 1.0:
        kept = edited

print()

# The edit is a preference vector like any other: attached, merged into a new model, or exported.
inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
merged = kept.merge_into(model)
arms = (("plain", model, nullcontext()), ("hook", model, Controller(model, [step])), ("merged", merged, nullcontext()))
for name, one, control in arms:
    with control:
        rows = one.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for row in rows:
        print(f"{name:7} {tokenizer.decode(row[inputs['input_ids'].shape[1] :], skip_special_tokens=True)!r}")

if output:
    kept.to_adapter(output)
