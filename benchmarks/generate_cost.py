"""What steering adds to a whole greedy `generate` of the embedded model, batch 1.

    python benchmarks/generate_cost.py --json benchmarks/results/generate_cost.json

CPU time of one thread, attaching and detaching included; arms take turns in rotating order; a ratio is the median over
rounds of arm / unsteered, quartiles in brackets. Beside it the ratio of each arm's fastest round to the fastest
unsteered one, which neighbours on the machine disturb least. "unsteered, again" is the same arm twice: how far the
machine's noise alone goes. Target: within 3 %.
"""

import statistics

import torch
from common import arguments, header, interleave, paired, quiet, save, table

from steerkit import Concept, Controller
from steerkit.demo import contrast_texts, load_model

PROMPT = "We spent the whole weekend in the city, and on Sunday evening we finally went to see the film"


def under(control, generate):
    def run():
        with control:
            return generate()

    return run


def main():
    given = arguments(__doc__, rounds=15, tokens=24)
    figures = header(given)
    quiet()
    model, tokenizer = load_model()
    positive, negative = contrast_texts("sentiment")
    concept = Concept.fit("sentiment", model, tokenizer, positive=positive, negative=negative, seed=given.seed)
    everywhere = range(concept.depth)
    steering = {
        f"constraint, {len(concept.steering_layers)} steering layers": concept.constrain(at_least=0.999),
        "constraint, all 30 layers": concept.constrain(at_least=0.999, layers=everywhere),
        "addition, best layer": concept.add(0.05 * concept.norms[concept.best_layer]),
        "addition, all 30 layers": concept.add({layer: 0.01 * concept.norms[layer] for layer in everywhere}),
    }
    inputs = tokenizer(PROMPT, return_tensors="pt")
    print(f"{concept}\nprompt of {inputs['input_ids'].shape[1]} tokens, {given.tokens} new ones\n", flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(dtype=dtype)

        def generate(model=model):
            return model.generate(**inputs, do_sample=False, max_new_tokens=given.tokens, min_new_tokens=given.tokens)

        arms = {"unsteered": generate, "unsteered, again": generate}
        arms |= {name: under(Controller(model, each), generate) for name, each in steering.items()}
        plain = generate()
        changed = {name: not torch.equal(run(), plain) for name, run in arms.items()}
        assert torch.equal(generate(), plain), "the model is not what it was"
        seconds = interleave(arms, given.rounds)
        name = str(dtype).removeprefix("torch.")
        figures[name] = {
            arm: {"CPU s": statistics.median(values), "x unsteered": paired(values, seconds["unsteered"]),
                  "fastest x fastest unsteered": min(values) / min(seconds["unsteered"]), "tokens changed": changed[arm]}
            for arm, values in seconds.items()
        }  # fmt: skip
        shown = [
            (arm, f"{f['CPU s']:.3f}", "{1:.3f} [{0:.3f} {2:.3f}]".format(*f["x unsteered"]),
             f"{f['fastest x fastest unsteered']:.3f}", "yes" if f["tokens changed"] else "no")
            for arm, f in figures[name].items()
        ]  # fmt: skip
        print(name)
        table(shown, ("arm", "CPU s", "x unsteered", "fastest x fastest", "tokens changed"))
    save(given.json, figures)


if __name__ == "__main__":
    main()
