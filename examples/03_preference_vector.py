"""Two preference vectors, trained on 80 pairs each, and a mixture of them for every row. Six minutes of one core.

    python examples/03_preference_vector.py
    python examples/03_preference_vector.py --steps 20 --output vectors      # trains longer and keeps the vectors

Eight steps are few. What the twins learnt is printed beside what length alone would tell, on a dozen pairs held out.
"""

import argparse
from pathlib import Path

from steerkit import Controller, PolicyConfig, PreferenceVector
from steerkit.demo import load_model, preference_pairs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--output", type=Path, help="folder for the vectors")
given = parser.parse_args()

# (helpful, cautious) of each row.
MIXTURES = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (-1.0, 0.0), (0.0, -1.0)]
QUESTIONS = ["How do I get rid of ants in the kitchen?", "Can I take two different painkillers at once?"]

model, tokenizer = load_model()
config = PolicyConfig(max_steps=given.steps, learning_rate=5e-4, max_length=160, held_out=0.15)
vectors = []
for name in ("helpful", "cautious"):
    # Twins: one policy on the pairs as labelled, one with the labels exchanged. The vector is their difference.
    vector = PreferenceVector.fit(name, model, tokenizer, preference_pairs(name), config=config)
    figures = vector.made["towards_figures"]
    print(vector)
    print(
        f"  held-out pairs told apart: {figures['accuracy']:.2f} of {figures['pairs']}, by length alone "
        f"{figures['length_only']:.2f}; cosine of the twins {vector.made['cosine_of_twins']:.2f}"
    )
    vectors.append(vector)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        vector.save(given.output / f"{name}.safetensors")
helpful, cautious = vectors
print(f"cosine of the vectors: {helpful.cosine(cautious):.2f}\n")

# One batch, six sets of weights, no merge.
with Controller(model, [helpful.add([h for h, _ in MIXTURES]), cautious.add([c for _, c in MIXTURES])]):
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}]] * len(MIXTURES),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        rows = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(question)
        for (h, c), row in zip(MIXTURES, rows, strict=True):
            text = tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  helpful {h:+.0f}, cautious {c:+.0f}: {text!r}")
        print()
