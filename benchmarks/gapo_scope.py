"""How far weights from the last block's gradients are from those of all gradients, over a real run.

    python benchmarks/gapo_scope.py --json benchmarks/results/gapo_scope.json        (about 8 minutes of one core)

The run is exact (GAPO p = 1, three rewards, SmolLM2-135M-Instruct, LoRA); at every step the weights are solved once more on
the Gramian of the last block alone, which is what two passes use. Shares are weights times norms over all parameters, so
that they sum to 1. The cosine is between the updates of all parameters that the two sets of weights make.
"""

import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from datasets import Dataset
from gapo_training import HELD_OUT, PROMPTS, TOKENS, objectives, scorer
from peft import LoraConfig
from reviews import reviews
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from steerkit import GAPOConfig, GAPOTrainer, gapo_weights
from steerkit.demo import load_model
from steerkit.gapo.gradients import Gradients, scope_of

POWERS = (0.0, 1.0, 2.0)


def compared(whole: Tensor, last: Tensor, power: float) -> dict[str, float]:
    """Return how far two solutions are apart."""
    norms = whole.diagonal().sqrt()
    ours, theirs = (gapo_weights(gram, power=power) for gram in (whole, last))
    shares = [each * norms / (each @ norms) for each in (ours, theirs)]
    lengths = [float(each @ whole @ each) ** 0.5 for each in (ours, theirs)]
    return {
        "shares apart": float((shares[0] - shares[1]).abs().sum() / 2),
        "cosine of updates": float(ours @ whole @ theirs) / (lengths[0] * lengths[1]),
        "opposed": float(bool((whole @ theirs < 0).any())),
    }


class Compared(GAPOTrainer):
    """Solves twice at each step."""

    found: list[dict[str, Any]]

    def _solve(self, gradients: Gradients) -> Any:
        update = super()._solve(gradients)
        names = set(scope_of(self.model, "last_block"))
        inside = {name: p for name, p in gradients.parameters.items() if name in names}
        part = Gradients(inside, frozenset(names), gradients.count)
        for index, gradient in enumerate(gradients._over_scope(None)):
            part.put(0, index, [g for name, g in zip(gradients.parameters, gradient, strict=True) if name in names])
        last = part.products()
        self.found.append({f"p = {power:g}": compared(update.gramian, last, power) for power in POWERS})
        return update


def main() -> None:
    given = arguments(__doc__, steps=20, learning_rate=5e-4)
    quiet()
    facts = header(given)
    _, second, _ = reviews(given.seed)
    model, tokenizer = load_model(dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Compared(
            model,
            objectives(scorer(second), given.seed),
            GAPOConfig(
                scratch,
                gram_mode="exact",
                max_steps=given.steps,
                per_device_train_batch_size=16,
                num_generations=4,
                max_completion_length=TOKENS,
                learning_rate=given.learning_rate,
                save_strategy="no",
                disable_tqdm=True,
                seed=given.seed,
            ),
            Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:-HELD_OUT]]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.found = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    result: dict[str, Any] = {**facts, "steps": given.steps, "powers": {}}
    for name in trainer.found[0]:
        figures = {key: [step[name][key] for step in trainer.found] for key in trainer.found[0][name]}
        result["powers"][name] = {
            "shares apart": [float(q) for q in np.quantile(figures["shares apart"], [0.5, 0.9, 1.0])],
            "cosine of updates": [float(q) for q in np.quantile(figures["cosine of updates"], [0.5, 0.1, 0.0])],
            "opposed": float(np.mean(figures["opposed"])),
        }
    rows = [
        [
            name,
            *("{:.3f} {:.3f} {:.3f}".format(*f[k]) for k in ("shares apart", "cosine of updates")),
            f"{f['opposed']:.2f}",
        ]
        for name, f in result["powers"].items()
    ]
    table(rows, ["", "shares apart (median, 90 %, worst)", "cosine (median, 10 %, worst)", "opposed"])
    save(given.json, result)


if __name__ == "__main__":
    main()
