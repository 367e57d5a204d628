"""A GAPO run from texts and functions: an adapter, and what was logged on the way to it."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import MissingDependencyError, TextsError, UnsupportedModelError
from steerkit.gapo.trainer import GAPOConfig, GAPOTrainer

try:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
except ImportError as error:
    raise MissingDependencyError(
        f"Training needs trl, peft and datasets. Found {error}. Run: pip install 'steerkit-sdk[train]'."
    ) from error


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    rewards: Sequence[Any],
    *,
    config: GAPOConfig,
    rank: int = 16,
) -> GAPOTrainer:
    """Train an adapter on prompts and return the trainer that did; `trainer.model` is the policy.

    Raises:
        TextsError: no prompts.
        UnsupportedModelError: the model is wrapped already.
        ObjectiveError, RewardError, TrainingError: as `GAPOTrainer`.
    """
    if not prompts:
        raise TextsError("A run needs prompts. Found none.")
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError("A run starts from a plain model. Found one under PEFT. Merge its adapter first.")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = GAPOTrainer(model, list(rewards), config, rows, processing_class=tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        # TRL asks for an attribute that transformers has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        trainer.train()
    return trainer


def summary(trainer: GAPOTrainer, window: int = 10) -> dict[str, Any]:
    """Return what a run did, by objective: reward at the start and the end, mean weight and signal; and its conflicts."""
    history: Sequence[Mapping[str, float]] = trainer.state.log_history

    def values(key: str) -> list[float]:
        return [row[key] for row in history if key in row]

    def mean(found: Sequence[float]) -> float | None:
        return sum(found) / len(found) if found else None

    found: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "opposed": mean(values("gapo/opposed")),
        "objectives": {},
    }
    for name in trainer.objectives:
        rewards = values(f"rewards/{name}/mean")
        found["objectives"][name] = {
            "reward_first": mean(rewards[:window]),
            "reward_last": mean(rewards[-window:]),
            "weight": mean(values(f"gapo/weight/{name}")),
            "signal": mean(values(f"gapo/signal/{name}")),
        }
    return found


def save(trainer: GAPOTrainer, folder: Path) -> None:
    """Write the adapter, and what was logged at each step."""
    trainer.model.save_pretrained(folder)
    (folder / "gapo.json").write_text(
        json.dumps({**summary(trainer), "history": trainer.state.log_history}, indent=1), "utf-8"
    )
