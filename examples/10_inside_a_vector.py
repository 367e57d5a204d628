"""Inside a preference vector: what concepts read of it, where it lies, which parts act. Four minutes of one core.

    python examples/10_inside_a_vector.py
    python examples/10_inside_a_vector.py --vector vectors/helpful.safetensors      # one that 03 kept: a minute

Without `--vector` one is trained for eight steps.
"""

import argparse
from pathlib import Path

from steerkit import Concept, PolicyConfig, PreferenceVector, experiments, load, plots
from steerkit.demo import contrast_texts, load_model, preference_pairs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vector", type=Path, help="a preference vector for this model")
parser.add_argument("--steps", type=int, default=8, help="of training, without a vector")
parser.add_argument("--output", type=Path, help="folder for two figures")
given = parser.parse_args()

QUESTIONS = [
    "How do I get rid of ants in the kitchen?", "What should I cook tonight?", "How can I sleep better?",
    "My bike has a flat tyre. What now?", "Which plants grow in the shade?", "How do I write a cover letter?",
    "What is a good book for a long flight?", "How do I clean a cast iron pan?",
]  # fmt: skip

model, tokenizer = load_model()
if given.vector:
    helpful = load(given.vector, model=model)
else:
    config = PolicyConfig(max_steps=given.steps, learning_rate=5e-4, max_length=160)
    helpful = PreferenceVector.fit("helpful", model, tokenizer, preference_pairs("helpful"), config=config)
print(f"{helpful}\n")
chats = [[{"role": "user", "content": question}] for question in QUESTIONS]

# Where its norm lies. Every entry alike would give each module its `even` share.
lies = experiments.parts(helpful)
print("Share of the squared norm by module, and the share of all entries:")
modules = list(dict.fromkeys(lies["module"]))
for module in modules:
    here = lies.only(module=module)
    rank = sum(here["effective rank"]) / len(here.rows)
    print(
        f"  {module:20} {sum(here['share']):.2f}   {sum(here['even']):.2f}   effective rank {rank:.1f} of {max(here['rank'])}"
    )

# Which parts act: KL of the next token from the unsteered model.
acts = experiments.ablate(model, tokenizer, helpful, chats, by="module")
print(f"\n{acts}\n")

# What probes see of it: the weights are changed, the activations are read.
layers = range(0, model.config.num_hidden_layers, 5)
concepts = []
for name in ("sentiment", "formality"):
    yes, no = contrast_texts(name)
    concepts.append(Concept.fit(name, model, tokenizer, positive=yes, negative=no, layers=layers))
shifts = experiments.inside(model, tokenizer, helpful, concepts, chats)
print(shifts)

if given.output:
    given.output.mkdir(parents=True, exist_ok=True)
    plots.bars(acts).savefig(given.output / "parts.png", dpi=120, bbox_inches="tight")
    plots.layers(shifts).savefig(given.output / "inside.png", dpi=120, bbox_inches="tight")
