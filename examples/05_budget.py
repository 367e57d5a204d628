"""How much, and what it costs: two ways to steer, calibrated to one budget and then measured. A minute and a half of one core.

    python examples/05_budget.py
    python examples/05_budget.py --budget 0.3 --output report      # also writes a page with every text

The budget is KL from the unsteered model, in nats a generated token; whatever spends as much can be compared.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from steerkit import Concept, Controller, Report, evaluate
from steerkit.demo import contrast_texts, load_model
from steerkit.evaluation import calibrate
from steerkit.evaluation.scorers import matches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--budget", type=float, default=0.1)
parser.add_argument("--tokens", type=int, default=20)
parser.add_argument("--output", type=Path, help="folder for the page")
given = parser.parse_args()

# Amounts are chosen on some openings and measured on others.
DEVELOPMENT = ["The soup", "Our new neighbour", "The last chapter", "This morning", "The hotel room", "My old car"]
OPENINGS = [
    "The bread that I bought", "My first day at the office", "The concert in the park", "Her letter", "The garden behind the house",
    "Our holiday by the sea", "The doctor", "That film", "The new teacher", "The bus ride", "My cousin's wedding", "The printer",
]  # fmt: skip
# Knows nothing of the probe. A crude count: use a classifier of other texts for a claim.
PLEASANT = matches(
    r"\b(beautiful|best|comfort\w*|delight\w*|enjoy\w*|excit\w*|friendly|glad|good|great|happy|love\w*|nice|perfect|warm|wonderful)\b"
)

model, tokenizer = load_model()
happy, unhappy = contrast_texts("sentiment")
sentiment = Concept.fit("sentiment", model, tokenizer, positive=happy, negative=unhappy).along("pattern")

found = {}
for name, request in (("bound", sentiment.constrain(at_least=0.9)), ("constant", sentiment.add(1.0, positions="last"))):
    calibration = calibrate(
        model, tokenizer, DEVELOPMENT, request, budget=given.budget, samples=2, trials=6, max_new_tokens=given.tokens
    )
    print(f"{name}\n{calibration.table()}\n")
    found[name] = calibration.amount

arms = {
    "unsteered": nullcontext(),
    "bound": Controller(model, [sentiment.constrain(at_least=found["bound"])]),
    "constant": Controller(model, [sentiment.add(found["constant"], positions="last")]),
}
reports = []
for name, control in arms.items():
    with control:
        reports.append(
            evaluate(
                model, tokenizer, OPENINGS, scorers={"pleasant": PLEASANT}, name=name, samples=4,
                max_new_tokens=given.tokens, task=(),
            )
        )  # fmt: skip
report = Report.join(*reports)

print("Against the unsteered model, paired by opening; brackets are 95 % intervals over openings.")
for name in ("bound", "constant"):
    changes = {
        "pleasant words": report.difference("pleasant", name, "unsteered"),
        "KL a token": report[name]["kl"],
        "perplexity, ratio": report.difference("perplexity", name, "unsteered"),
        "repetition": report.difference("repetition", name, "unsteered"),
        "KL on neutral texts": report[name]["collateral"],
    }
    print(f"  {name}: " + "; ".join(f"{measure} {figure}" for measure, figure in changes.items()))
print("\nThe bound against the constant, pleasant words:", report.difference("pleasant", "bound", "constant"))
for name in arms:
    arm = report[name]
    print(f"\n{name}")
    for row in range(0, len(arm.prompts), 12):
        print(f"  {arm.prompts[row]} | {' '.join(arm.completions[row].split())}")

if given.output:
    given.output.mkdir(parents=True, exist_ok=True)
    report.save_html(given.output / "report.html")
