"""From a description to a concept: the model writes the contrast texts itself. Three minutes of one core.

    python examples/14_describe.py
    python examples/14_describe.py full of praise --opposite "full of complaints"

A small model follows few instructions, so the concept is held against sentences that people wrote.
"""

import argparse

from sklearn.metrics import roc_auc_score

from steerkit import Concept, Controller, demo, record
from steerkit.concepts.texts import contrast_texts, default_requests

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("description", nargs="*", default=["formal"])
parser.add_argument("--opposite", default="casual, like a chat with a friend")
parser.add_argument("--requests", type=int, default=60, help="of those that ship, the first so many")
given = parser.parse_args()

model, tokenizer = demo.load_model()
made = contrast_texts(
    model, tokenizer, " ".join(given.description), opposite=given.opposite, samples=2, max_new_tokens=32,
    requests=default_requests()[: given.requests],
)  # fmt: skip
print(made)
for side, texts in (("for", made.positive), ("against", made.negative)):
    for turns in texts[:3]:
        print(f"  {side}: {turns[0]['content']!r} -> {turns[-1]['content']!r}")

described = Concept.fit(
    "described", model, tokenizer, positive=made.positive, negative=made.negative, groups=made.groups
)
print(f"\n{described}")

# Half of the written sentences fit a concept to be held against; both are measured on the other half.
formal, casual = demo.contrast_texts("formality")
written = Concept.fit("written", model, tokenizer, positive=formal[::2], negative=casual[::2])
states = record(model, tokenizer, [*formal[1::2], *casual[1::2]])
labels = [1] * len(formal[1::2]) + [0] * len(casual[1::2])
print("AUC on formal against casual sentences that neither saw, at each one's best layer:")
for concept in (described, written):
    layer = concept.best_layer
    print(f"  {concept.name:10} {roc_auc_score(labels, concept[layer].logit(states[layer])):.2f} (layer {layer})")

inputs = tokenizer.apply_chat_template(
    [[{"role": "user", "content": "Can you help me move a sofa on Saturday?"}]] * 3,
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
step = described.along("mean_difference")
dose = 0.1 * described.norms[described.best_layer]
with Controller(model, [step.add([-dose, 0.0, dose])]):
    rows = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print()
for share, row in zip((-0.1, 0.0, 0.1), rows, strict=True):
    text = tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{share:+.1f} of the residual norm: {text!r}")
