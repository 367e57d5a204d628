"""SmolLM2-135M-Instruct: GAPO raises two rewards on prompts it was not trained on, and the policy becomes a vector."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkit import Controller, GAPOConfig, PreferenceVector
from steerkit.demo import load_model
from steerkit.gapo import runs

pytestmark = pytest.mark.slow

TRAINED = [
    "My neighbour's garden",
    "The train to the coast",
    "On the first day of school",
    "The old clock in the hall",
    "For dinner we had",
    "The town library",
    "Her bicycle",
    "After the rain",
]
OTHERS = ["The market in the square", "My grandfather's boat", "At the end of the road", "The new bridge"]


def calm(completions: list[str], **_: Any) -> list[float]:
    """Few capital letters and signs."""
    return [-sum(not (c.islower() or c == " ") for c in text) / 10 for text in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    """Short words, in letters; another scale."""
    return [-3.0 * sum(map(len, words)) / len(words) if (words := text.split()) else -30.0 for text in completions]


def test_gapo_raises_both_rewards_where_it_was_not_trained(tmp_path: Path) -> None:
    model, tokenizer = load_model(dtype=torch.float32)
    batch = tokenizer(OTHERS * 8, return_tensors="pt", padding=True, padding_side="left")

    def written(magnitude: float) -> list[str]:
        torch.manual_seed(1)
        with Controller(model, [policy.add(magnitude)]):
            rows = model.generate(
                **batch, max_new_tokens=12, do_sample=True, top_k=0, pad_token_id=tokenizer.eos_token_id
            )
        return tokenizer.batch_decode(rows[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

    config = GAPOConfig(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=12,
        learning_rate=4e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = runs.train(model, tokenizer, TRAINED, [calm, short], config=config)
    history = [row for row in trainer.state.log_history if "gapo/opposed" in row]
    assert len(history) == 5
    assert not any(row["gapo/opposed"] for row in history)
    policy = PreferenceVector.difference(trainer.model, model, name="calm and short")
    before, after = written(0.0), written(1.0)
    for reward in (calm, short):
        gain = torch.tensor(reward(after)) - torch.tensor(reward(before))
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5  # of 32 pairs
    now = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in untouched.items())
