"""A concept: fit it, look at its figures, ask for a probability, see what every row received. Half a minute of one core.

python examples/01_concept.py
python examples/01_concept.py --output concept      # also writes the concept and two figures
"""

import argparse
from pathlib import Path

from steerkit import Concept, Controller, plots
from steerkit.demo import contrast_texts, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, help="folder for figures and the concept")
output = parser.parse_args().output

PROMPTS = [
    "My stay at the small hotel by the lake was",
    "What a wonderful evening it was! After dinner we",
    "The train was two hours late again, and the staff",
    "The new phone arrived this morning and it",
]

# 140 sentences a side. Of both, a share is never fitted on: every figure below is of those.
model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy)

print("layer  accuracy            AUC    calibration error")
for layer in sentiment.layers[::3]:
    probe = sentiment.figures[layer]
    low, high = probe.accuracy_interval
    print(f"{layer:5}  {probe.accuracy:.2f} [{low:.2f}, {high:.2f}]   {probe.auc:.2f}   {probe.calibration_error:.2f}")
print(f"best layer {sentiment.best_layer}; as good within a standard error: {sentiment.steering_layers}\n")

# The probe measures, its pattern moves: see docs/evidence.md for what each direction does to the text.
bound = sentiment.along("pattern").constrain(at_least=0.99)
inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
width = inputs["input_ids"].shape[1]


def write():
    return model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)[:, width:]


before = write()
with Controller(model, [bound], record_magnitudes=True) as control:
    after = write()

# From the last token of the prompt on: a constraint leaves the rest of the prompt alone.
received = {layer: values[:, width - 1 :] for layer, values in control.magnitudes["sentiment"].items()}
for row, prompt in enumerate(PROMPTS):
    print(prompt)
    print("  unsteered:", repr(tokenizer.decode(before[row], skip_special_tokens=True)))
    print("  steered:  ", repr(tokenizer.decode(after[row], skip_special_tokens=True)))
    shares = {layer: float(values[row].mean()) / sentiment.norms[layer] for layer, values in received.items()}
    shown = ", ".join(f"{layer}: {share:.1%}" for layer, share in shares.items())
    print(f"  magnitude / residual norm by layer, mean over tokens: {shown}\n")

if output:
    output.mkdir(parents=True, exist_ok=True)
    sentiment.save(output / "sentiment.safetensors")
    plots.accuracy_by_layer([sentiment]).savefig(output / "accuracy.png", dpi=120)
    rows = [{layer: values[row] for layer, values in received.items()} for row in range(len(PROMPTS))]
    edited = [[inputs["input_ids"][row, -1], *after[row][:-1]] for row in range(len(PROMPTS))]
    tokens = [[tokenizer.decode([token]).strip() or "·" for token in each] for each in edited]
    plots.magnitudes_by_token(rows, tokens, sentiment.norms, PROMPTS).savefig(output / "magnitudes.png", dpi=120)
