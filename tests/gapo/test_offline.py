"""The offline sibling: DPO with pairs of its own for each objective."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from steerkit import gapo_weights
from steerkit.errors import ObjectiveError, TrainingError
from steerkit.gapo.offline import GAPODPOConfig, GAPODPOTrainer, InTurn

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    dice = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 95, (number,), generator=dice))

    return [{"prompt": words(3), "chosen": f" {words(3)}", "rejected": f" {words(4)}"} for _ in range(count)]


class Kept(TrainerCallback):
    """Gradients as the optimiser is about to see them."""

    def __init__(self) -> None:
        self.model: Any = None
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})


def train(objectives: dict[str, Any], *, lora: bool = True, model: Any = None, **given: Any) -> tuple[Any, Kept]:
    kept = Kept()
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        **given,
    }
    trainer = GAPODPOTrainer(
        model or tiny_model("llama"),
        objectives,
        GAPODPOConfig("out", **settings),
        tiny_tokenizer(pad=True),
        peft_config=LORA if lora else None,
        callbacks=[kept],
    )
    kept.model = trainer.model
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, kept


def gradient_of(rows: Sequence[dict[str, str]], lora: bool) -> dict[str, Tensor]:
    """The gradient of TRL's own loss of these rows at the start, in one batch."""
    from datasets import Dataset

    kept = Kept()
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(
            "out",
            max_steps=1,
            per_device_train_batch_size=len(rows),
            bf16=False,
            precompute_ref_log_probs=True,
            gradient_checkpointing=None,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tiny_tokenizer(pad=True),
        peft_config=copy.deepcopy(LORA) if lora else None,
        callbacks=[kept],
    )
    kept.model = trainer.model
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return kept.gradients[0]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_step_is_the_weighted_sum_of_trls_own_gradients(power: float, lora: bool) -> None:
    data = {"a": pairs(0, 4), "b": pairs(1, 4), "c": pairs(2, 4)}
    own = {"weighting": "mgda"} if power == 0 else {"power": power}
    _, kept = train(data, lora=lora, max_steps=1, rescale="none", **own)
    each = [gradient_of(rows, lora) for rows in data.values()]
    flat = torch.stack([torch.cat([g[name].flatten().double() for name in sorted(g)]) for g in each])
    expected = gapo_weights(flat @ flat.T, power=power) @ flat
    [found] = kept.gradients
    made = torch.cat([found[name].flatten().double() for name in sorted(found)])
    assert float((made - expected).norm() / expected.norm()) < 1e-4


def test_batches_of_one_objective_are_one_gradient() -> None:
    data = {"a": pairs(0, 8), "b": pairs(1, 8)}
    one, single = train(data, max_steps=1, per_device_train_batch_size=8)
    two, parts = train(data, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for name, gradient in single.gradients[0].items():
        assert torch.allclose(gradient, parts.gradients[0][name], rtol=1e-3, atol=1e-5)
    first = [next(row for row in t.state.log_history if "gapo/opposed" in row) for t in (one, two)]
    assert "gapo/signal/a" in first[1]
    assert "gapo/signal/a" not in first[0]
    assert first[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_the_callers_model_stays_and_the_policy_learns_all_objectives() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    trainer, _ = train({"a": pairs(0, 8), "b": pairs(1, 8)}, max_steps=12, model=model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    rows = [row for row in trainer.state.log_history if "rewards/accuracies" in row]
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.1


def test_an_objective_that_is_anothers_opposite_leaves_no_step() -> None:
    rows = pairs(0, 4)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    trainer, kept = train({"a": rows, "b": swapped}, max_steps=1)
    figures = next(row for row in trainer.state.log_history if "gapo/opposed" in row)
    assert figures["gapo/cosine/a/b"] == pytest.approx(-1, abs=1e-3)
    step = sum(float(g.square().sum()) for g in kept.gradients[0].values()) ** 0.5
    assert step <= 0.05 * figures["gapo/norm/a"]


def test_turns_hold_one_objective_each_and_all_rows_of_the_largest_once() -> None:
    order = InTurn([0] * 8 + [1] * 3 + [2] * 4, 2, seed=0)
    rows = list(order)
    assert len(rows) == len(order) == 24
    kinds = [0 if i < 8 else 1 if i < 11 else 2 for i in rows]
    assert kinds == [0, 0, 1, 1, 2, 2] * 4
    seen = Counter(rows)
    assert all(seen[i] == 1 for i in range(8))
    assert all(2 <= seen[i] <= 3 for i in range(8, 11))
    assert list(order) == rows
    order.set_epoch(1)
    assert list(order) != rows


@pytest.mark.parametrize(
    ("objectives", "given", "error", "message"),
    [
        ({}, {}, ObjectiveError, "Found none"),
        ({"a": []}, {}, ObjectiveError, "'a'"),
        ({"a": [{"prompt": "w1", "chosen": " w2"}]}, {}, ObjectiveError, "without rejected"),
        ({"a": pairs(0, 4)}, {"preference": [0.5, 0.5]}, ObjectiveError, "each of 1"),
        ({"a": pairs(0, 4)}, {"objective_weights": [0.5, 0.5]}, ObjectiveError, "each of 1"),
        ({"a": pairs(0, 4)}, {"weighting": "gdpo"}, ObjectiveError, "one of"),
        ({"a": pairs(0, 4)}, {"fp16": True}, TrainingError, "fp16"),
        ({"a": pairs(0, 4)}, {"gram_scope": "nowhere"}, ObjectiveError, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_training(
    objectives: dict[str, Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(objectives, **given)
