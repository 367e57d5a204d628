"""Inside an nnsight trace: record, read what a Controller did, steer without one. Half a minute of one core.

pip install nnsight
python examples/13_nnsight.py
"""

import argparse

import nnsight

from steerkit import Concept, Controller
from steerkit.demo import contrast_texts, load_model
from steerkit.integrations.nnsight import activations, residual, steer

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

PROMPTS = ["The food at the new restaurant was", "My first day at work was", "The concert"]

model, tokenizer = load_model()
lm = nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")

# The states are those of steerkit.record; `remote=True` would take them from a model on another machine.
positive, negative = (activations(lm, texts[:70]) for texts in contrast_texts("sentiment"))
sentiment = Concept.from_activations("sentiment", positive, negative).along("pattern")
print(sentiment)
layers = sentiment.steering_layers
bound = sentiment.constrain(at_least=[0.0, 0.9, 0.999])  # one a row; 0 is off

# A Controller around a trace. nnsight's `.output` of a block is what it returned before any hook; `residual` is what follows.
with Controller(lm, [bound]), lm.trace(PROMPTS):
    around = nnsight.save([residual(lm, layer)[:, -1] for layer in layers])

# The same edit set by the trace itself: no hook of ours, so it may run elsewhere, or in one invoke of several.
with lm.trace() as tracer:
    with tracer.invoke(PROMPTS):
        steer(lm, bound)
    with tracer.invoke():
        within = nnsight.save([residual(lm, layer)[:, -1] for layer in layers])

print("\nP(sentiment) at the last token of each prompt: bounds 0, 0.9, 0.999")
print("layer  under a Controller    set by the trace")
for layer, one, other in zip(layers, around, within, strict=True):
    read = [[f"{p:.3f}" for p in sentiment[layer].probability(states).tolist()] for states in (one, other)]
    print(f"{layer:5}  {'  '.join(read[0])}   {'  '.join(read[1])}")

settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
with Controller(lm, [bound]), lm.generate(PROMPTS, **settings) as tracer:
    rows = nnsight.save(tracer.result)
print()
for row in rows:
    print(repr(tokenizer.decode(row, skip_special_tokens=True)))
