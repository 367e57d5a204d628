"""One policy on two rewards: plain words, and warm ones. About 9 minutes on two busy cores.

    python examples/04_gapo.py                      # GAPO
    python examples/04_gapo.py 0.8 0.2              # P-GAPO: more weight on plain words
    steerkit gapo prompts.txt -r examples.04_gapo:plain -r examples.04_gapo:warm -o policy     # the same rewards by name

A new adapter is trained; the model itself stays as it is, so that the policy becomes a preference vector at the end.
"""

import argparse
import re
from typing import Any

import torch

from steerkit import Controller, GAPOConfig, PreferenceVector
from steerkit.demo import load_model
from steerkit.gapo import runs

WARM = re.compile(
    r"\b(thanks?|glad|happy|love|lovely|wonderful|great|enjoy|welcome|hope|please|friends?|together|best|sure|delight\w*)\b|!",
    re.IGNORECASE,
)
PROMPTS = [
    "How do I keep basil alive on my balcony?",
    "What should I cook for four people tonight?",
    "Can you explain what a mortgage is?",
    "My bicycle squeaks. What can I do?",
    "How do I start running?",
    "Which book should I read on holiday?",
    "How can I fall asleep earlier?",
    "What is the difference between weather and climate?",
    "How do I write a thank-you note?",
    "What do I pack for a weekend in the mountains?",
    "How does a heat pump work?",
    "I have a job interview tomorrow. Any advice?",
]
LIMIT = 32


def plain(completions: list[Any], **_: Any) -> list[float]:
    """How far words are from eight letters on average, in letters."""
    words = [text.split() for text in texts_of(completions)]
    return [8.0 - sum(map(len, each)) / len(each) if each else 0.0 for each in words]


def warm(completions: list[Any], **_: Any) -> list[float]:
    """Warm words and exclamation marks, five at most."""
    return [float(min(len(WARM.findall(text)), 5)) for text in texts_of(completions)]


def texts_of(completions: list[Any]) -> list[str]:
    """Answers to chats are lists of messages."""
    return [each if isinstance(each, str) else each[0]["content"] for each in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shares", nargs="*", type=float, help="one a reward; without them every reward counts alike")
    parser.add_argument("--steps", type=int, default=24)
    given = parser.parse_args()
    model, tokenizer = load_model(dtype=torch.float32)
    config = GAPOConfig(
        "gapo",
        preference=given.shares or None,
        max_steps=given.steps,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=LIMIT,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,  # TRL's bar prints thirty figures a step; a few of them follow below
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    print(f"{given.steps} steps of 16 answers; what was logged follows at the end")
    trainer = runs.train(model, tokenizer, chats, [plain, warm], config=config)
    print("step  reward: plain  warm   weight: plain  warm   cosine of the gradients")
    for step, row in enumerate(trainer.state.log_history, 1):
        if "rewards/plain/mean" in row:
            shown = [row[f"rewards/{name}/mean"] for name in ("plain", "warm")]
            shown += [row[f"gapo/weight/{name}"] for name in ("plain", "warm")]
            cosine = row.get("gapo/cosine/plain/warm", float("nan"))
            print("{:4}  {:13.2f}  {:4.2f}   {:13.2f}  {:4.2f}   {:23.2f}".format(step, *shown, cosine))
    for name, figures in runs.summary(trainer, window=6)["objectives"].items():
        print(name, {key: value if value is None else round(value, 3) for key, value in figures.items()})

    policy = PreferenceVector.difference(trainer.model, model, name="plain and warm")
    question = tokenizer.apply_chat_template(
        [[{"role": "user", "content": "How do I look after a cactus?"}]] * 3,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with Controller(model, [policy.add([0.0, 0.5, 1.0])]):  # three doses of the policy in one batch
        rows = model.generate(**question, max_new_tokens=LIMIT, do_sample=False)
    for magnitude, row in zip((0.0, 0.5, 1.0), rows, strict=True):
        print(magnitude, repr(tokenizer.decode(row[question.input_ids.shape[1] :], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
