"""One batch, every row treated as it needs: amounts, a condition, a reading that scales, a schedule. Half a minute of one core.

python examples/02_per_sample.py
"""

import argparse

from steerkit import Concept, Controller, record
from steerkit.conditions import exponential
from steerkit.demo import contrast_texts, load_model

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

PROMPTS = [
    "The train was two hours late again, and the staff",
    "What a wonderful evening it was! After dinner we",
    "I hated the film from the first minute. It",
    "Our neighbours have a dog, and in the mornings",
]

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy).along("pattern")
best = sentiment.best_layer


def write(prompts):
    """Print a greedy continuation of each prompt; return where the edits begin."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    width = inputs["input_ids"].shape[1]
    rows = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for row in rows:
        print("  ", repr(tokenizer.decode(row[width:], skip_special_tokens=True)))
    return width - 1


# What the probe reads of each prompt, before anything is edited.
states = record(model, tokenizer, PROMPTS, layers=best)
for prompt, p in zip(PROMPTS, sentiment[best].probability(states[best]).tolist(), strict=True):
    print(f"P(sentiment) {p:.2f}: {prompt}")

print("\nA bound for each row, the first prompt in all of them: off, 0.5, 0.99, 0.9999.")
with Controller(model, [sentiment.constrain(at_least=[0.0, 0.5, 0.99, 0.9999])]):
    write(PROMPTS[:1] * 4)

print("\nA condition: a bound of 0.99 where the prompt reads at most 0.7.")
needed = sentiment.constrain(at_least=0.99).when(sentiment.reads(at_most=0.7))
with Controller(model, [needed], record_magnitudes=True) as control:
    write(PROMPTS)
acted = [bool(row.any()) for row in control.magnitudes["sentiment"][sentiment.steering_layers[0]]]
print("   acted on:", acted)

print("\nAn amount that follows the reading: nothing at P = 1, a tenth of the residual norm at P = 0.")
dose = 0.1 * sentiment.norms[best]
with Controller(model, [sentiment.add(sentiment.reads().scaled(dose, 0.0))], record_magnitudes=True) as control:
    write(PROMPTS)
shares = control.magnitudes["sentiment"][best][:, -1] / sentiment.norms[best]
print("   magnitude / residual norm, row by row:", [f"{float(share):.3f}" for share in shares])

print("\nA schedule: the same dose for all, half of it left after every five new tokens.")
fading = sentiment.add(dose, positions="last").scheduled(exponential(half_life=5))
with Controller(model, [fading], record_magnitudes=True) as control:
    start = write(PROMPTS)
shares = control.magnitudes["sentiment"][best][0, start:] / sentiment.norms[best]
print("   magnitude / residual norm, first row, token by token:", [f"{float(share):.3f}" for share in shares])
