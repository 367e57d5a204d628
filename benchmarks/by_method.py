"""Every method at three budgets on four concepts, with few prompts: a map to choose from, not a claim.

    python benchmarks/by_method.py --json benchmarks/results/by_method.json --output kept        (about an hour and a half of one core)

Sentiment, topic, formality after openings of 16 subjects, toxicity after toxic prompts and downwards; budgets of .03, .1 and .3
nat a token. What is claimed is claimed by matched_budget.py, whose preference vectors this takes from `--output` where they are.
What is finished is kept there too, so a run that was stopped goes on where it was. Data: concept_data.py.
"""

from pathlib import Path

from common import arguments, header, quiet, save
from concept_data import EVERY, toxicity_prompts
from matched_budget import figures, trained
from openings import DEVELOPMENT, EVIDENCE
from papers import spread

from steerkit.demo import load_model
from steerkit.evaluation import compare


def prompts_of(name, given):
    """Return prompts, and others to choose doses on."""
    if name != "toxicity":
        return spread(EVIDENCE, given.prompts), spread(DEVELOPMENT, given.development)
    toxic = [text for text, _ in toxicity_prompts(given.seed)[0]]
    return toxic[: given.prompts], toxic[given.prompts :][: given.development]


def main():
    given = arguments(
        __doc__, concepts=",".join(EVERY), budgets=".03,.1,.3", prompts=32, samples=2, tokens=16, development=12, trials=5,
        steps=20, output="kept",
    )  # fmt: skip
    settings = {key: getattr(given, key) for key in ("prompts", "samples", "tokens", "development", "trials", "steps")}
    facts = {**header(given), "settings": settings}
    quiet()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in given.concepts.split(","):
        data = EVERY[name](given.seed)
        vector, one_sided = trained(name, data, given, folder)
        model, tokenizer = load_model()
        prompts, development = prompts_of(name, given)
        made = compare(
            model, tokenizer, prompts, name=name, positive=data.positive[:320], negative=data.negative[:320],
            scorers=data.scorers, development=development, instructions=data.instructions, towards=data.towards,
            vector=vector.add(1.0), one_sided=one_sided.add(1.0), budgets=[float(b) for b in given.budgets.split(",")],
            trials=given.trials, max_new_tokens=given.tokens, samples=given.samples, seed=given.seed,
            folder=folder / f"{name}, by method",
        )  # fmt: skip
        print(made.table(), *(f"* {note}" for note in made.notes), "", sep="\n", flush=True)
        # Vectors that were there already may have been trained for longer.
        found[name] = {**figures(made, data), "steps": vector.made["towards_figures"]["steps"]}
        save(given.json, {**facts, "concepts": found})


if __name__ == "__main__":
    main()
