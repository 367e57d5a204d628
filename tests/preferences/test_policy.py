"""Training twins: contract 7, the caller's model, the shared reference, the guards, resuming, and two processes."""

import copy
import dataclasses
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from forked import Run
from safetensors.torch import load_file, save_file
from tiny import random_addition, tiny_model, tiny_tokenizer
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from steerkit import Controller, PolicyConfig, PreferenceVector, storage, train_policy
from steerkit.cli import app
from steerkit.errors import AttachError, PolicyError, SteerkitError, TrainingError, UnsupportedModelError
from steerkit.maths.lowrank import dense, parts
from steerkit.model import Fingerprint
from steerkit.preferences import policy as module
from steerkit.preferences.pairs import split
from steerkit.preferences.policy import MARK, Policy, References, check_twins

LOG_2 = math.log(2)
IDS = torch.tensor([[5, 9, 33, 12, 4], [7, 8, 61, 20, 3]])


of_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
"""Where a test calls PEFT 0.21 itself, which asks for what transformers has deprecated."""


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{dice.randrange(95)}" for _ in range(dice.randint(low, high)))

    return [{"prompt": words(2, 6), "chosen": f" {words(1, 5)}", "rejected": f" {words(1, 5)}"} for _ in range(count)]


PAIRS = make_pairs(16)


def config(**given: Any) -> PolicyConfig:
    return PolicyConfig(**{"max_steps": 3, "learning_rate": 1e-3, "lora_r": 4, "lora_alpha": 8, **given})


def tokenizer() -> Any:
    return tiny_tokenizer(chat=True, pad=True)


def adapter(trained: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained.named_parameters() if "lora_" in name}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def all_parts(vector: PreferenceVector) -> dict[str, Tensor]:
    return {f"{name}.{i}": part for name, delta in vector.deltas.items() for i, part in enumerate(parts(delta))}


class CountedReferences:
    """How many rows the reference was computed for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        before = DPOTrainer.compute_ref_log_probs

        def counted(trainer: Any, model: Any, inputs: Any) -> Any:
            self.rows += len(inputs["input_ids"]) // 2
            return before(trainer, model, inputs)

        monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)


@pytest.fixture(scope="module")
def twins() -> SimpleNamespace:
    """Both policies of one tiny llama, with a shared reference whose computations were counted."""
    with pytest.MonkeyPatch.context() as patch:
        counted = CountedReferences(patch)
        model, references = tiny_model("llama"), References()
        settings = config()
        before = copy.deepcopy(settings)
        towards = train_policy(model, tokenizer(), PAIRS, config=settings, references=references)
        after_one = counted.rows
        away = train_policy(model, tokenizer(), PAIRS, config=settings, references=references, reverse=True)
    return SimpleNamespace(
        model=model,
        towards=towards,
        away=away,
        references=references,
        after_one=after_one,
        rows=counted.rows,
        config=settings,
        config_before=before,
    )


@pytest.fixture(scope="module")
def stock() -> SimpleNamespace:
    """The same `towards` by TRL alone."""
    train, held_out = split(PAIRS, 0.1, 42)
    arguments = DPOConfig(
        output_dir="unused",
        max_steps=3,
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        max_length=512,
        gradient_checkpointing=None,  # type: ignore[arg-type]  # off; False warns
        precompute_ref_log_probs=True,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft 0.21, transformers 5
        trainer = DPOTrainer(
            model=tiny_model("llama"),
            args=arguments,
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(held_out),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
    return SimpleNamespace(trainer=trainer, weights=adapter(trainer.model), figures=trainer.evaluate())


# What training gives.


def test_towards_is_what_trl_trains(twins: SimpleNamespace, stock: SimpleNamespace) -> None:
    ours = adapter(twins.towards.model)
    assert equal(ours, stock.weights)
    assert any(bool((w != 0).any()) for name, w in ours.items() if "lora_B" in name)
    assert twins.towards.figures["accuracy"] == stock.figures["eval_rewards/accuracies"]
    assert twins.towards.figures["margin"] == stock.figures["eval_rewards/margins"]


def test_the_reference_is_computed_once_and_is_trls(twins: SimpleNamespace, stock: SimpleNamespace) -> None:
    assert twins.after_one == twins.rows == len(PAIRS)
    for name, dataset in (("train", stock.trainer.train_dataset), ("eval", stock.trainer.eval_dataset)):
        _, chosen, rejected = twins.references.known[name]
        assert chosen == list(dataset["ref_chosen_logps"])
        assert rejected == list(dataset["ref_rejected_logps"])
        assert chosen != rejected


def test_the_reference_is_that_of_the_model(twins: SimpleNamespace) -> None:
    """By hand: the sum of log-probabilities of the answer's tokens, the end of the text among them."""
    train, _ = split(PAIRS, 0.1, 42)
    for column, side in ((1, "chosen"), (2, "rejected")):
        for row, found in zip(train[:4], twins.references.known["train"][column], strict=False):
            prompt = tokenizer()(row["prompt"])["input_ids"]
            whole = tokenizer()(row["prompt"] + row[side] + "</s>")["input_ids"]
            if whole[-1] != 2:
                whole = [*tokenizer()(row["prompt"] + row[side])["input_ids"], 2]
            with torch.no_grad():
                logps = twins.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            by_hand = sum(float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            assert found == pytest.approx(by_hand, abs=2e-3)


def test_twins_share_the_start_and_part(twins: SimpleNamespace) -> None:
    towards, away = twins.towards, twins.away
    check_twins(towards, away)
    assert towards.figures["first_loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert away.figures["first_loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert towards.order == away.order
    assert sorted(towards.order) == [0, 1, 2]
    assert len(set(towards.order.values())) == 3
    sides = [PreferenceVector.difference(p, twins.model, name="x", model=twins.model) for p in (towards, away)]
    assert -1 <= sides[0].cosine(sides[1]) < -0.3
    assert all(side.norm() > 1e-2 for side in sides)


def test_history_and_figures(twins: SimpleNamespace) -> None:
    steps = [entry for entry in twins.towards.history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert all(math.isfinite(entry["rewards/margins"]) for entry in steps)
    assert steps[0]["loss"] == pytest.approx(LOG_2, abs=1e-4)
    figures = twins.towards.figures
    assert figures["steps"] == 3
    assert figures["pairs"] == round(0.1 * len(PAIRS))
    assert 0 <= figures["accuracy"] <= 1
    assert 0 <= figures["length_only"] <= 1
    json.dumps(figures, allow_nan=False)
    assert twins.away.figures["length_only"] == figures["length_only"]


def test_the_config_is_not_changed(twins: SimpleNamespace) -> None:
    # `distributed_state` and the like come and go; what was asked for stays.
    before, after = (
        {f.name: getattr(c, f.name) for f in dataclasses.fields(c)} for c in (twins.config_before, twins.config)
    )
    assert before.keys() == after.keys()
    assert {k for k in before if before[k] != after[k] and str(before[k]) != str(after[k])} == set()


def test_merging_both_sides_gives_the_policies_logits(twins: SimpleNamespace) -> None:
    base = twins.model(IDS).logits
    for trained in (twins.towards, twins.away):
        side = PreferenceVector.difference(trained, twins.model, name="side", model=twins.model)
        merged = side.merge_into(twins.model)(IDS).logits
        assert (merged - trained.model(IDS).logits).abs().max() < 1e-4
        assert (merged - base).abs().max() > 1e-2


def test_a_trained_model_generates(twins: SimpleNamespace) -> None:
    rows = twins.towards.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3)
    assert rows.shape == (2, 8)


@of_peft
def test_a_saved_policy_loads_with_peft(twins: SimpleNamespace, tmp_path: Path) -> None:
    twins.towards.save(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, twins.towards.model(IDS).logits)
    from_folder = PreferenceVector.difference(tmp_path / "adapter", twins.away, name="x", model=twins.model)
    live = PreferenceVector.difference(twins.towards, twins.away, name="x", model=twins.model)
    assert equal(all_parts(from_folder), all_parts(live))


def test_the_model_is_untouched_by_its_twins(twins: SimpleNamespace) -> None:
    assert torch.equal(twins.model(IDS).logits, tiny_model("llama")(IDS).logits)


# Contract 7.


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_one_step_of_swapped_labels_goes_the_opposite_way(optim: str, use_peft: bool) -> None:
    model, references = tiny_model("llama"), References()
    settings = config(max_steps=1, optim=optim, use_peft=use_peft, max_grad_norm=0.5, held_out=0.0, weight_decay=0.0)
    sides = []
    for reverse in (False, True):
        trained = train_policy(model, tokenizer(), PAIRS[:8], config=settings, references=references, reverse=reverse)
        assert trained.figures["first_loss"] == pytest.approx(LOG_2, abs=2e-6)
        assert trained.history[0]["grad_norm"] > 0.5  # clipping was at work
        assert len(trained.order) == 1
        sides.append(PreferenceVector.difference(trained, model, name="side", model=model))
    assert min(side.norm() for side in sides) > 1e-5
    # AdamW's first step is the sign of each gradient, and some of those are rounding around zero.
    assert sides[0].cosine(sides[1]) == pytest.approx(-1, abs=5e-3 if "adam" in optim else 1e-4)
    assert sides[0].norm() == pytest.approx(sides[1].norm(), rel=1e-2)


def test_gradient_accumulation_starts_at_log_2() -> None:
    settings = config(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, held_out=0.0)
    trained = train_policy(tiny_model("llama"), tokenizer(), PAIRS[:6], config=settings)
    assert trained.figures["first_loss"] == pytest.approx(LOG_2, abs=1e-5)
    assert list(trained.order) == [0]


# The caller's model and tokenizer.


def snapshot(model: Any, words: Any) -> dict[str, Any]:
    names = {name for name, _ in model.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "same": {name: id(p) for name, p in model.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "grad": {name for name in names if model.get_parameter(name).requires_grad},
        "grads": {name for name in names if model.get_parameter(name).grad is not None},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "dropouts": {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)},
        "hooks": {
            name: [len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "class": (type(model).forward, type(model).generate),
        "tokenizer": (words.pad_token, words.padding_side, words.chat_template, len(words), words.truncation_side),
        "init": copy.deepcopy({k: str(v) for k, v in words.init_kwargs.items()}),
        "progress": os.environ.get("TQDM_DISABLE"),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@pytest.mark.parametrize(
    ("use_peft", "raises"),
    [(True, None), (False, None), (True, RuntimeError), (False, RuntimeError), (True, KeyboardInterrupt)],
)
def test_the_given_model_and_tokenizer_are_unchanged(
    use_peft: bool, raises: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = tiny_model("llama"), tiny_tokenizer(chat=True)  # no pad token: TRL would set one
    assert words.pad_token is None
    model.config.pad_token_id = None
    model.generation_config.pad_token_id = 7
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda *given: None)
    before = snapshot(model, words)
    if raises is not None:
        steps = []
        step = DPOTrainer.training_step

        def broken(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            if len(steps) == 2:
                raise raises("in the middle")
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(DPOTrainer, "training_step", broken)
        with pytest.raises(raises, match="in the middle"):
            train_policy(model, words, PAIRS, config=config(use_peft=use_peft))
        assert len(steps) == 2
    else:
        trained = train_policy(model, words, PAIRS, config=config(use_peft=use_peft, max_steps=2))
        changed = PreferenceVector.difference(trained, model, name="x", model=model)
        assert changed.norm() > 1e-3
        assert not trained.model.training
    after = snapshot(model, words)
    for key in before:
        assert same(before[key], after[key]), key


# The guards.


def test_a_reference_of_other_rows_is_noticed(twins: SimpleNamespace) -> None:
    wrong = References()
    prompts, chosen, rejected = twins.references.known["train"]
    wrong.known["train"] = (prompts, chosen[1:] + chosen[:1], rejected[1:] + rejected[:1])
    wrong.known["eval"] = twins.references.known["eval"]
    with pytest.raises(TrainingError, match="log 2") as caught:
        train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(), references=wrong)
    assert abs(caught.value.found - LOG_2) > 1e-3  # type: ignore[attr-defined]


def test_an_unswapped_reference_is_noticed(twins: SimpleNamespace) -> None:
    wrong = References()
    for name, (prompts, chosen, rejected) in twins.references.known.items():
        wrong.known[name] = (prompts, rejected, chosen)
    with pytest.raises(TrainingError, match="log 2"):
        train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(), references=wrong)


def test_a_reference_of_other_prompts_is_noticed(twins: SimpleNamespace) -> None:
    with pytest.raises(TrainingError, match="prompts"):
        train_policy(tiny_model("llama"), tokenizer(), make_pairs(16, 9), config=config(), references=twins.references)


def test_a_reference_of_other_answers_is_noticed(twins: SimpleNamespace) -> None:
    """One answer of the last row differs: the first batch alone does not show it."""
    train, _held_out = split(PAIRS, 0.1, 42)
    first = train_policy(
        tiny_model("llama"), tokenizer(), PAIRS, config=config(max_steps=1), references=twins.references
    )
    assert first.figures["first_loss"] == pytest.approx(LOG_2, abs=1e-4)
    for changed in range(len(train)):
        other = [{**row, "chosen": " w90 w91 w92"} if row is train[changed] else row for row in PAIRS]
        with pytest.raises(TrainingError):
            train_policy(
                tiny_model("llama"), tokenizer(), other, config=config(max_steps=1), references=twins.references
            )
        if changed == 4:  # a batch is 4 rows, so one of these lies outside of the first
            return


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_weights_that_are_not_finite_are_noticed(use_peft: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(SteerkitError):
        train_policy(model, tokenizer(), PAIRS, config=config(max_steps=1, use_peft=use_peft))


def test_twins_of_other_order_or_settings_are_noticed(twins: SimpleNamespace) -> None:
    towards, away = twins.towards, twins.away
    with pytest.raises(TrainingError, match="step 1") as caught:
        check_twins(towards, dataclasses.replace(away, order={**away.order, 1: "0" * 16}))
    assert caught.value.step == 1  # type: ignore[attr-defined]
    for name in ("learning_rate", "seed", "lora_r", "optim"):
        with pytest.raises(TrainingError, match=name):
            check_twins(towards, dataclasses.replace(away, settings={**away.settings, name: 77}))


def stand_in(monkeypatch: pytest.MonkeyPatch, give: Callable[[bool], Policy]) -> list[bool]:
    """Let `fit` have policies that are there already."""
    calls: list[bool] = []

    def train(*args: Any, reverse: bool = False, **kwargs: Any) -> Policy:
        calls.append(reverse)
        return give(reverse)

    monkeypatch.setattr(module, "train_policy", train)
    return calls


def test_twins_that_do_not_part_are_refused(twins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda reverse: twins.away if reverse else twins.towards)
    vector = PreferenceVector.fit("liked", twins.model, tokenizer(), PAIRS, config=config())
    assert vector.made["cosine_of_twins"] < 0
    assert vector.made["norms_of_twins"][0] > 0
    assert vector.fingerprint is not None
    vector.fingerprint.check(Fingerprint.of(twins.model), "vector")
    stand_in(monkeypatch, lambda reverse: twins.towards)
    with pytest.raises(SteerkitError) as caught:
        PreferenceVector.fit("liked", twins.model, tokenizer(), PAIRS, config=config())
    assert isinstance(caught.value, TrainingError)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_vector_without_a_name_is_refused_before_training(
    name: Any, twins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch, lambda reverse: twins.away if reverse else twins.towards)
    with pytest.raises(PolicyError, match="name"):
        PreferenceVector.fit(name, twins.model, tokenizer(), PAIRS, config=config())
    assert calls == []


@of_peft
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_models_that_cannot_be_trained_are_refused(use_peft: bool, tmp_path: Path) -> None:
    settings = config(use_peft=use_peft)
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="PeftModel"):
        train_policy(wrapped, tokenizer(), PAIRS, config=settings, output_dir=tmp_path / "run")
    model = tiny_model("llama")
    with Controller(model, [random_addition()]):
        with pytest.raises(AttachError):
            train_policy(model, tokenizer(), PAIRS, config=settings, output_dir=tmp_path / "run")
        model(IDS)
    with torch.device("meta"):
        hollow = type(model)(model.config)
    with pytest.raises(UnsupportedModelError):
        train_policy(hollow, tokenizer(), PAIRS, config=settings, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_that_fill_max_length_leave_nothing_to_train_on() -> None:
    """TRL drops such rows without a word."""
    with pytest.raises(SteerkitError):
        train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(max_length=2))


@pytest.mark.filterwarnings("ignore:.*pairs are left out:steerkit.errors.SteerkitWarning")
def test_held_out_prompts_that_fill_max_length_are_not_what_is_measured() -> None:
    rows = [*PAIRS[:12], *({**PAIRS[0], "prompt": " ".join(["w5"] * 20 + [f"w{i}"])} for i in range(8))]
    long = {row["prompt"] for row in rows[12:]}
    seed = next(s for s in range(5000) if {row["prompt"] for row in split(rows, 0.1, s)[1]} <= long)
    try:
        trained = train_policy(
            tiny_model("llama"), tokenizer(), rows, config=config(max_steps=1, max_length=16, seed=seed)
        )
    except SteerkitError:
        return
    # What cannot be measured is left out before the split, so that something is.
    assert trained.figures["pairs"] >= 1


# Other models.


def test_bfloat16() -> None:
    model = tiny_model("llama").bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for use_peft in (True, False):
        trained = train_policy(model, tokenizer(), PAIRS, config=config(use_peft=use_peft, max_steps=2))
        assert trained.figures["first_loss"] == pytest.approx(LOG_2, abs=0.05)
        side = PreferenceVector.difference(trained, model, name="x", model=model)
        assert side.norm() > 1e-3
        assert {parts(d)[0].dtype for d in side.deltas.values()} == {torch.float32}
        if not use_peft:
            assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT, of every Conv1D
def test_gpt2_whose_weights_lie_the_other_way() -> None:
    model = tiny_model("gpt2")
    vector = PreferenceVector.fit("liked", model, tokenizer(), PAIRS, config=config())
    assert vector.transposed == set(vector.deltas)
    references = References()
    towards, away = (
        train_policy(model, tokenizer(), PAIRS, config=config(), references=references, reverse=reverse)
        for reverse in (False, True)
    )
    assert equal(all_parts(PreferenceVector.difference(towards, away, name="liked")), all_parts(vector))
    merged = vector.merge_into(
        PreferenceVector.difference(away, model, name="a", model=model).merge_into(model), check_model=False
    )
    assert (merged(IDS).logits - towards.model(IDS).logits).abs().max() < 1e-4
    assert (merged(IDS).logits - model(IDS).logits).abs().max() > 1e-2


def test_a_mixture_of_experts_starts_at_log_2() -> None:
    """TRL adds the routers' balancing loss to DPO's; it is no sign of a wrong reference."""
    model = tiny_model("mixtral")
    trained = train_policy(
        model, tokenizer(), PAIRS, config=config(max_steps=1, lora_target_modules=["q_proj", "v_proj"])
    )
    assert PreferenceVector.difference(trained, model, name="x", model=model).norm() > 0


def test_a_weighted_loss_starts_at_its_weight_of_log_2() -> None:
    settings = config(max_steps=1, loss_weights=[0.5])
    trained = train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=settings)
    assert trained.history[0]["loss"] == pytest.approx(0.5 * LOG_2, abs=1e-4)


def test_another_loss_than_dpos_has_no_first_loss_to_check() -> None:
    trained = train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(max_steps=1, loss_type=["hinge"]))
    assert trained.figures["first_loss"] == pytest.approx(1.0, abs=1e-4)


# Folders of runs.


class Killed(BaseException):
    """What no `except Exception` holds up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, reverse: bool, step: int) -> None:
    """Die after a step of one twin, its checkpoint written."""
    whole = DPOTrainer.training_step

    def dying(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.reverse == reverse and trainer.state.global_step == step:
            raise Killed
        return whole(trainer, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", dying)


def no_more_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(DPOTrainer, "train", never)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", never)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One fit without interruption, one that was killed in the middle of `away` and called again."""
    folder = tmp_path_factory.mktemp("runs")
    model, settings = tiny_model("llama"), config(max_steps=4, save_steps=1)

    def fit(where: str) -> PreferenceVector:
        return PreferenceVector.fit("liked", model, tokenizer(), PAIRS, config=settings, output_dir=folder / where)

    whole = fit("whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, True, 2)
        with pytest.raises(Killed):
            fit("killed")
    left = sorted(path.name for path in (folder / "killed" / "away").glob("checkpoint-*"))
    # A checkpoint that was not written to its end: all of it but the trainer's state.
    half = folder / "killed" / "away" / "checkpoint-3"
    half.mkdir()
    (half / "adapter_config.json").write_text("{")
    steps: list[tuple[bool, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        step = DPOTrainer.training_step

        def noted(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append((trainer.reverse, trainer.state.global_step))
            return step(trainer, *args, **kwargs)

        patch.setattr(DPOTrainer, "training_step", noted)
        resumed = fit("killed")
    return SimpleNamespace(
        folder=folder, model=model, config=settings, fit=fit, whole=whole, resumed=resumed, left=left, steps=steps
    )


def test_a_killed_fit_goes_on_and_gives_the_same_bits(runs: SimpleNamespace) -> None:
    assert runs.left == ["checkpoint-1", "checkpoint-2"]
    assert runs.steps == [(True, 2), (True, 3)]  # `towards` was done, half of `away` too
    assert equal(all_parts(runs.whole), all_parts(runs.resumed))
    assert runs.whole.norm() > 1e-2


def test_a_resumed_run_tells_as_much_as_a_whole_one(runs: SimpleNamespace) -> None:
    for key in ("settings", "digest", "cosine_of_twins", "norms_of_twins", "towards_figures"):
        assert runs.resumed.made[key] == runs.whole.made[key], key
    assert runs.resumed.made["away_figures"] == runs.whole.made["away_figures"]


def test_a_resumed_run_knows_all_of_its_steps(runs: SimpleNamespace) -> None:
    """Else the order of rows before the kill is compared with nothing."""
    marks = [json.loads((runs.folder / where / "away" / MARK).read_text()) for where in ("whole", "killed")]
    assert marks[0]["order"] == marks[1]["order"]
    assert [e["step"] for e in marks[0]["history"]] == [e["step"] for e in marks[1]["history"]]


def test_finished_runs_are_not_trained_again(runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    no_more_training(monkeypatch)
    again = runs.fit("whole")
    assert equal(all_parts(again), all_parts(runs.whole))
    assert again.made["away_figures"] == runs.whole.made["away_figures"]
    trained = train_policy(
        runs.model, tokenizer(), PAIRS, config=runs.config, output_dir=runs.folder / "whole" / "towards"
    )
    assert sorted(trained.order) == [0, 1, 2, 3]
    assert [e["step"] for e in trained.history if "loss" in e] == [1, 2, 3, 4]
    assert torch.equal(runs.model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert (trained.model(IDS).logits - runs.model(IDS).logits).abs().max() > 1e-3


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS: dict[str, dict[str, Any]] = {
    "pairs": {"pairs": PAIRS[:15]},
    "order of pairs": {"pairs": PAIRS[::-1]},
    "reverse": {"reverse": True},
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 1},
    "rank": {"lora_r": 2},
    "full": {"use_peft": False},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "loss_weights": {"loss_weights": [2.0]},
    "ld_alpha": {"ld_alpha": 0.5},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "optim_args": {"optim": "rmsprop"},
    "base": {"model": "gpt2"},
    "base weights": {"model": "other weights"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_with_another_run_is_refused_and_untouched(
    what: str, runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_more_training(monkeypatch)
    given = dict(OTHERS[what])
    model, rows, reverse = runs.model, given.pop("pairs", PAIRS), given.pop("reverse", False)
    if "model" in given:
        model = tiny_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        model = tiny_model("gpt2") if given.pop("model") == "gpt2" else model
    folder = runs.folder / "whole" / "towards"
    before = contents(folder)
    with pytest.raises(TrainingError, match="another"):
        train_policy(
            model,
            tokenizer(),
            rows,
            config=config(max_steps=4, save_steps=1, **given),
            output_dir=folder,
            reverse=reverse,
        )
    assert contents(folder) == before


@pytest.mark.parametrize("file", ["notes.txt", ".hidden", MARK])
def test_a_folder_with_foreign_files_is_refused_and_untouched(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_more_training(monkeypatch)
    (tmp_path / file).write_text("[not ours")
    with pytest.raises(TrainingError):
        train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(), output_dir=tmp_path)
    assert contents(tmp_path) == {file: b"[not ours"}
    with pytest.raises(TrainingError):
        train_policy(tiny_model("llama"), tokenizer(), PAIRS, config=config(), output_dir=tmp_path / file)


def test_full_weights_resume_and_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny_model("llama"), config(max_steps=3, save_steps=1, use_peft=False)

    def train(where: str) -> dict[str, Tensor]:
        trained = train_policy(model, tokenizer(), PAIRS, config=settings, output_dir=tmp_path / where)
        return {name: p.detach().clone() for name, p in trained.model.named_parameters()}

    whole = train("whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, False, 2)
        with pytest.raises(Killed):
            train("killed")
    assert equal(train("killed"), whole)
    no_more_training(monkeypatch)
    assert equal(train("whole"), whole)
    assert not equal(whole, {name: p.detach() for name, p in model.named_parameters()})
    from_folder = PreferenceVector.difference(tmp_path / "whole", model, name="x", model=model)
    for name, delta in from_folder.deltas.items():
        assert torch.equal(dense(delta), whole[name] - model.get_parameter(name).detach())


# Two processes.


def two(out: Path) -> None:
    """Fit with and without a folder, as after a kill in the middle, and from the command line; write what came out."""
    rank, written = PartialState(cpu=True).process_index, []
    assert PartialState().num_processes == 2
    write = storage.write

    def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(str(path))
        return write(path, *args, **kwargs)

    storage.write = counted

    def fit(name: str, output_dir: Path | None) -> None:
        vector = PreferenceVector.fit(
            "liked", tiny_model("llama"), tokenizer(), PAIRS, config=config(save_steps=2), output_dir=output_dir
        )
        save_file({k: p.contiguous().clone() for k, p in all_parts(vector).items()}, out / f"{name}-{rank}.safetensors")
        (out / f"{name}-{rank}.json").write_text(json.dumps(dict(vector.made)))

    fit("kept", out / "runs")
    fit("scratch", None)
    PartialState().wait_for_everyone()
    if rank == 0:  # as after a kill in the middle of the second twin
        shutil.rmtree(out / "runs" / "away")
    PartialState().wait_for_everyone()
    fit("half", out / "runs")
    fit("again", out / "runs")
    words = ["vector", "train", "cli", str(out / "pairs.jsonl"), "-o", str(out / "cli.safetensors")]
    code: Any = 0
    try:
        app([*words, "--model", str(out / "model"), "--steps", "2", "--rank", "4"], standalone_mode=True)
    except SystemExit as done:
        code = done.code or 0
    (out / f"cli-{rank}.json").write_text(json.dumps({"code": code, "written": written}))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("two")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    pair = Run(two, folder, 2)
    return SimpleNamespace(folder=folder, codes=pair.codes(300), output=pair.told())


@pytest.mark.slow
def test_two_processes_end_with_the_same_bits(two_processes: SimpleNamespace) -> None:
    assert two_processes.codes == [0, 0], two_processes.output
    folder = two_processes.folder
    for name in ("kept", "scratch", "half", "again"):
        one, other = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert equal(one, other), name
        assert any(bool(part.any()) for part in one.values())
    for name in ("half", "again"):
        assert equal(load_file(folder / "kept-0.safetensors"), load_file(folder / f"{name}-0.safetensors"))
    made = [json.loads((folder / f"kept-{rank}.json").read_text()) for rank in (0, 1)]
    assert made[0] == made[1]
    assert made[0]["towards_figures"]["first_loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert made[0]["cosine_of_twins"] < 0


@pytest.mark.slow
def test_two_processes_write_the_vector_once(two_processes: SimpleNamespace) -> None:
    found = [two_processes.folder / f"cli-{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in found), two_processes.output
    told = [json.loads(file.read_text()) for file in found]
    assert [each["code"] for each in told] == [0, 0], two_processes.output
    assert sum(len(each["written"]) for each in told) == 1
    assert (two_processes.folder / "cli.safetensors").exists()
