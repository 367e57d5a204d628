"""GAPO on TRL's trainer: every update against TRL's own loss, one plain backward pass for each objective."""

import asyncio
import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tiny import LLAMA_LIKE, seeded, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from steerkit import GAPOConfig, GAPOTrainer, PreferenceVector, gapo_weights
from steerkit.errors import ObjectiveError, RewardError, SteerkitError, SteerkitWarning, TrainingError
from steerkit.maths.lowrank import dense
from steerkit.maths.pareto import split_half_gramian

Reward = Callable[[Sequence[int]], float | None]
Vector = dict[str, Tensor]

GROUP = 4
ROWS = 16
PROMPTS = Dataset.from_list([{"prompt": f"w{i} w{i + 3} w{2 * i}"} for i in range(16)])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning"),
]
"""TRL 1.16 and PEFT 0.21 ask for what transformers has deprecated."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def low(ids: Sequence[int]) -> float:
    return sum(i < 40 for i in ids) / len(ids)


def varied(ids: Sequence[int]) -> float:
    return 10.0 * sum(i % 3 == 0 for i in ids) / len(ids)


def parity(ids: Sequence[int]) -> float:
    return float(sum((n + 1) * i for n, i in enumerate(ids)) % 7)


def partial(ids: Sequence[int]) -> float | None:
    return None if ids[0] % 3 == 0 else float(ids[0] % 5)


def constant(ids: Sequence[int]) -> float:
    return 0.1


def none(ids: Sequence[int]) -> float | None:
    return None


def against(ids: Sequence[int]) -> float:
    return parity(ids) / 20 - 4 * low(ids)


THREE: tuple[Reward, ...] = (low, varied, parity)
OF_TOKENS: tuple[Any, ...] = (*THREE, partial, constant, none, against)


def reward(of: Reward) -> Callable[..., list[float | None]]:
    def function(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [of(ids) for ids in completion_ids]

    function.__name__ = of.__name__
    return function


def rewards(objectives: Iterable[Any]) -> list[Any]:
    return [reward(each) if each in OF_TOKENS else each for each in objectives]


class Settings:
    """Arguments for one run of GAPO, or of TRL itself."""

    @staticmethod
    def common(accumulation: int = 1, **given: Any) -> dict[str, Any]:
        return {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": ROWS // accumulation,
            "gradient_accumulation_steps": accumulation,
            "num_generations": GROUP,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
            "disable_dropout": True,
            **given,
        }

    @classmethod
    def gapo(cls, **given: Any) -> GAPOConfig:
        """With updates of the length of the linear one, which is what the independent computation has."""
        return GAPOConfig(**{"rescale": "update", **cls.common(**given)})

    @classmethod
    def stock(cls, **given: Any) -> GRPOConfig:
        own = {"gradient_checkpointing": None, "report_to": "none", "logging_steps": 1, "scale_rewards": "none"}
        return GRPOConfig(**{**own, "dataloader_pin_memory": False, **cls.common(**given)})


def lora(**given: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **given})


@dataclass
class Run:
    """What a run did, step by step."""

    trainer: Any
    updates: list[Vector] = field(default_factory=list)
    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    parameters: list[Vector] = field(default_factory=list)

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [each for each in self.trainer.state.log_history if "loss" in each]

    def figures(self, step: int, kind: str) -> list[float]:
        return [self.logs[step][f"gapo/{kind}/{name}"] for name in self.trainer.objectives]


class Watch(TrainerCallback):
    def __init__(self, run: Run, look: Callable[[Run, list[dict[str, Any]]], Any] | None) -> None:
        self.run = run
        self.look = look
        self.window: list[dict[str, Any]] = []
        before = run.trainer._prepare_inputs

        def prepare(batch: Any) -> Any:
            inputs = before(batch)
            if run.trainer.model.training:
                self.window.append(inputs)
            return inputs

        run.trainer._prepare_inputs = prepare

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.run.updates.append(
            {name: p.grad.detach().clone() for name, p in named(self.run.trainer.model).items() if p.grad is not None}
        )
        self.run.batches.append(list(self.window))
        if self.look is not None:
            self.run.seen.append(self.look(self.run, list(self.window)))
        self.window.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.parameters.append(state(self.run.trainer.model))


def named(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state(model: Any) -> Vector:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def steady(name: str) -> Any:
    """A tiny model without dropout, which OPT keeps where TRL does not look for it."""
    model = tiny_model(name)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def build(
    objectives: Sequence[Any] = THREE,
    *,
    model: Any = "llama",
    adapter: Any = True,
    stock: bool = False,
    tokenizer: Any = None,
    data: Any = PROMPTS,
    more: Mapping[str, Any] | None = None,
    **given: Any,
) -> Any:
    kind, settings = (GRPOTrainer, Settings.stock) if stock else (GAPOTrainer, Settings.gapo)
    return kind(
        steady(model) if isinstance(model, str) else model,
        rewards(objectives),
        settings(**given),
        data,
        processing_class=tokenizer or tiny_tokenizer(pad=True),
        peft_config=lora() if adapter is True else adapter or None,
        **(more or {}),
    )


def train(
    objectives: Sequence[Any] = THREE, *, look: Callable[[Run, list[dict[str, Any]]], Any] | None = None, **given: Any
) -> Run:
    run = Run(build(objectives, **given))
    run.trainer.remove_callback(PrinterCallback)
    run.trainer.add_callback(Watch(run, look))
    run.trainer.train()
    return run


# The oracle: TRL's class around the trainer's state, and rewards counted again from the tokens


def by_hand(batches: Sequence[dict[str, Any]], objective: Reward, others: Sequence[Any] = ()) -> list[Tensor]:
    """One objective's rewards less their mean over the completions of a prompt, by micro-batch.

    The others hold completions of the same prompts that another step is made of.
    """
    groups: dict[Any, list[float]] = defaultdict(list)
    rows: list[list[tuple[Any, float | None]]] = []
    for batch in [*batches, *others]:
        rows.append([])
        for prompt, asked, ids, said in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            key = tuple(prompt[asked.bool()].tolist())
            value = objective(ids[said.bool()].tolist())
            rows[-1].append((key, value))
            if value is not None:
                groups[key].append(value)
    return [
        torch.tensor([0.0 if v is None else v - math.fsum(groups[key]) / len(groups[key]) for key, v in each])
        for each in rows[: len(batches)]
    ]


def of_trl(
    trainer: Any, batches: Sequence[dict[str, Any]], advantages: Sequence[Tensor], half: int | None = None
) -> Vector:
    """Gradient of TRL's own loss; of one half's tokens alone if asked."""
    bare = object.__new__(GRPOTrainer)
    bare.__dict__ = {**trainer.__dict__, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}}
    parameters = named(trainer.model)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for batch, own in zip(batches, advantages, strict=True):
        inputs = {**batch, "advantages": own}
        if half is not None:
            inputs["completion_mask"] = batch["completion_mask"] * (batch["half"] == half)[:, None]
            inputs["completion_ids"] = batch["completion_ids"]
        loss = GRPOTrainer._compute_loss(bare, trainer.model, inputs)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, each in zip(parameters, found, strict=True):
            if each is not None:
                total[name] += each.double()
    return total


def product(one: Mapping[str, Tensor], other: Mapping[str, Tensor], scope: Iterable[str] | None = None) -> float:
    return math.fsum(float((one[n].double() * other[n].double()).sum()) for n in (one if scope is None else scope))


def gramian_of(gradients: Sequence[Vector], scope: Iterable[str] | None = None) -> Tensor:
    scope = None if scope is None else list(scope)
    return torch.tensor([[product(a, b, scope) for b in gradients] for a in gradients], dtype=torch.float64)


def combine(gradients: Sequence[Vector], weights: Iterable[float]) -> Vector:
    weights = list(weights)
    return {name: sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) for name in gradients[0]}


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Distance relative to the second; what is missing counts as zero."""
    square = size = 0.0
    for name in {**one, **other}:
        b = other[name].double() if name in other else torch.zeros_like(one[name]).double()
        a = one[name].double() if name in one else torch.zeros_like(b)
        square += float((a - b).square().sum())
        size += float(b.square().sum())
    return math.sqrt(square) / max(math.sqrt(size), 1e-30)


def cosine(one: Vector, other: Vector) -> float:
    return product(one, other) / math.sqrt(product(one, one) * product(other, other))


@dataclass
class Oracle:
    """What the update must be, at the parameters before the step."""

    objectives: Sequence[Reward] = THREE
    power: float = 1.0
    preference: Sequence[float] | None = None
    weigh: Callable[[Tensor], Tensor] | None = None
    scope: Callable[[str], bool] = lambda name: True
    outside: bool = False
    match: bool = True
    halves: bool = False
    signal: bool = False
    linear: Sequence[float] | None = None

    def __call__(self, run: Run, batches: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = run.trainer
        scope = [name for name in named(trainer.model) if self.scope(name)]
        assert scope
        own = {id(batch) for batch in batches}
        others = [batch for batch in trainer._buffered_inputs if id(batch) not in own]
        advantages = [by_hand(batches, each, others) for each in self.objectives]
        nothing = [torch.zeros_like(each) for each in advantages[0]]
        rest = of_trl(trainer, batches, nothing)
        gradients = [of_trl(trainer, batches, each) for each in advantages]
        if self.outside:
            gradients = [combine([each, rest], [1, -1]) for each in gradients]
        gramian = gramian_of(gradients, scope)
        signal, estimate = None, gramian
        if self.halves or self.signal:
            cut = [[of_trl(trainer, batches, each, half) for each in advantages] for half in (0, 1)]
            across = torch.tensor([[product(a, b, scope) for b in cut[1]] for a in cut[0]], dtype=torch.float64)
            signal = [
                float(across[k, k]) / math.sqrt(product(a, a, scope) * product(b, b, scope))
                for k, (a, b) in enumerate(zip(*cut, strict=True))
            ]
        weights = torch.zeros(len(gradients), dtype=torch.float64)
        live = torch.arange(len(gradients))
        if self.halves and bool((across.diagonal() > 0).any()):
            estimate = split_half_gramian(gramian, across)
            live = live[across.diagonal() > 0]
        weights[live] = (
            self.weigh(estimate).double()
            if self.weigh is not None
            else gapo_weights(estimate[live][:, live], power=self.power, preference=self.preference)
        )
        plain = torch.tensor(self.linear or [1.0] * len(gradients), dtype=torch.float64)
        if self.match:
            weights = weights * ((plain @ gramian @ plain) / (weights @ gramian @ weights)).sqrt()
        return {
            "gradients": gradients,
            "rest": rest,
            "gramian": gramian,
            "estimate": estimate,
            "signal": signal,
            "weights": weights.tolist(),
            "update": combine([*gradients, rest], [*weights.tolist(), float(self.outside)]),
            "advantages": advantages,
        }


def check(run: Run, steps: int = 2, rough: float = 2e-4) -> None:
    """Weights and update are the oracle's."""
    assert len(run.updates) == steps
    for step, (update, wanted) in enumerate(zip(run.updates, run.seen, strict=True)):
        assert run.figures(step, "weight") == pytest.approx(wanted["weights"], rel=rough)
        assert apart(update, wanted["update"]) < rough
        assert run.logs[step]["gapo/no_step"] == 0


# Exact mode


ADAPTERS = {
    "gpt2": lora(fan_in_fan_out=True),
    "mamba": lora(target_modules=["in_proj", "x_proj", "dt_proj"]),
    "mixtral": lora(target_modules=["q_proj", "v_proj"]),
}
"""Where PEFT warns of "all-linear" or refuses it."""
ARCHITECTURES = ("llama", "gpt2", "gemma2", "opt", "mixtral", "mamba", "falcon")


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_exact_update_is_the_weighted_sum_of_trls_own_gradients(name: str, adapter: bool) -> None:
    more = {"router_aux_loss_coef": 0.0} if name == "mixtral" else {}
    run = train(
        model=name,
        adapter=ADAPTERS.get(name, True) if adapter else None,
        gram_mode="exact",
        look=Oracle(),
        learning_rate=1e-3,
        **more,
    )
    check(run)


BLOCK = "layers.3."


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"power": 0.0}, {"power": 0.0}),
        ({"power": 2}, {"power": 2}),
        ({"weighting": "mgda"}, {"power": 0.0}),
        ({"preference": [0.2, 0.5, 0.3]}, {"preference": [0.2, 0.5, 0.3]}),
        ({"rescale": "none"}, {"match": False}),
        ({"reward_weights": [2.0, 0.0, 0.5]}, {"linear": [2.0, 0.0, 0.5]}),
        ({"weighting": lambda g: 1 / g.diagonal()}, {"weigh": lambda g: 1 / g.diagonal()}),
        ({"weighting": lambda g: g.new_tensor([0.0, 3.0, 1.0])}, {"weigh": lambda g: g.new_tensor([0.0, 3.0, 1.0])}),
        ({"weighting": "linear"}, {"weigh": lambda g: torch.ones(3), "match": False}),
        ({"beta": 0.2}, {}),
        ({"beta": 0.2, "kl_inside_objectives": False}, {"outside": True}),
        ({"entropy_coef": 0.3, "kl_inside_objectives": False}, {"outside": True}),
        ({"beta": 0.2, "entropy_coef": 0.3, "top_entropy_quantile": 0.5}, {}),
        ({"beta": 0.2, "use_bias_correction_kl": True, "power": 2.0}, {"power": 2.0}),
        ({"loss_type": "bnpo", "beta": 0.2}, {}),
        ({"loss_type": "cispo"}, {}),
        ({"loss_type": "sapo"}, {}),
        ({"loss_type": "vespo"}, {}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, {}),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "beta": 0.2}, {}),
        ({"gram_estimate": "split_half"}, {"halves": True}),
        ({"gram_estimate": "split_half", "beta": 0.2, "power": 2.0}, {"halves": True, "power": 2.0}),
        ({"gram_estimate": "split_half", "accumulation": 4, "power": 0}, {"halves": True, "power": 0}),
    ],
    ids=lambda given: "-".join(f"{k}={'call' if callable(v) else v}" for k, v in given.items()),
)
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_every_setting_gives_the_update_that_its_formula_says(mode: str, given: dict, wanted: dict) -> None:
    run = train(gram_mode=mode, gram_scope="trainable", look=Oracle(**wanted), **given)
    check(run)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize(
    ("scope", "inside"),
    [
        ("last_block", lambda name: BLOCK in name),
        (
            r"layers\.[01]\..*self_attn",
            lambda name: ("layers.0." in name or "layers.1." in name) and "self_attn" in name,
        ),
    ],
    ids=["last_block", "pattern"],
)
def test_the_gramian_is_over_the_scope_and_the_update_over_everything(
    mode: str, scope: str, inside: Callable[[str], bool], adapter: bool
) -> None:
    run = train(adapter=adapter, gram_mode=mode, gram_scope=scope, look=Oracle(scope=inside, power=2.0), power=2.0)
    check(run)
    assert run.figures(1, "norm") == pytest.approx(run.seen[1]["gramian"].diagonal().sqrt().tolist(), rel=2e-4)


def test_two_passes_measure_the_last_block_and_exact_mode_everything() -> None:
    assert build(adapter=False)._scope == {name for name in named(tiny_model("llama")) if BLOCK in name}
    assert build(adapter=False, gram_mode="exact")._scope == set(named(tiny_model("llama")))


def test_the_scope_of_lora_leaves_out_what_else_is_trained() -> None:
    run = train(
        adapter=lora(target_modules=["q_proj", "down_proj"], modules_to_save=["input_layernorm"]),
        gram_scope="lora",
        look=Oracle(scope=lambda name: ".lora_" in name),
    )
    check(run)
    assert any("input_layernorm" in name for name in run.updates[1])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt", "mamba", "mixtral"])
def test_two_passes_over_the_last_block_on_other_architectures(name: str) -> None:
    block = {"gpt2": "h.3.", "mamba": "layers.3."}.get(name, "layers.3.")
    more = {"router_aux_loss_coef": 0.0} if name == "mixtral" else {}
    run = train(model=name, adapter=False, look=Oracle(scope=lambda each: block in each), learning_rate=1e-3, **more)
    check(run)


def test_tied_embeddings() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True})), 0)
    check(train(model=model, adapter=False, gram_mode="exact", look=Oracle()))


def test_a_routers_loss_is_added_as_trl_adds_it() -> None:
    run = train(model="mixtral", adapter=False, router_aux_loss_coef=0.5, learning_rate=1e-3, look=Oracle())
    for step, (update, seen) in enumerate(zip(run.updates, run.seen, strict=True)):
        weights = run.figures(step, "weight")
        # Each gradient has the router's loss in it; the update has it once, whatever the weights are.
        expected = combine([*seen["gradients"], seen["rest"]], [*weights, 1 - sum(weights)])
        assert abs(1 - sum(weights)) > 0.5
        assert apart(update, expected) < 2e-4
    with pytest.raises(TrainingError, match="router"):
        build(model="mixtral", adapter=False, gram_mode="exact", router_aux_loss_coef=0.5)


@pytest.mark.parametrize("inside", [True, False])
def test_a_given_peft_model_is_trained_against_its_own_start(inside: bool) -> None:
    model = peft.get_peft_model(tiny_model("llama"), lora(init_lora_weights=False))
    before = state(model)
    run = train(
        model=model,
        adapter=False,
        gram_mode="exact",
        beta=0.3,
        kl_inside_objectives=inside,
        weight_decay=0.5,
        look=Oracle(outside=not inside),
    )
    check(run)
    assert run.trainer.model is model
    after = state(model)
    assert all(".default." in name for name in before if not torch.equal(before[name], after[name]))
    references = {name: p for name, p in after.items() if ".ref." in name}
    assert references
    assert all(torch.equal(p, before[name.replace(".ref.", ".default.")]) for name, p in references.items())


def test_bfloat16_weights_under_an_adapter() -> None:
    run = train(model=tiny_model("llama").to(torch.bfloat16), gram_mode="exact", look=Oracle())
    for update, seen in zip(run.updates, run.seen, strict=True):
        assert cosine(update, seen["update"]) > 0.98


# Completions that are used again


@pytest.mark.parametrize("more", [{}, {"beta": 0.2}, {"loss_type": "grpo", "delta": 1.5}, {"accumulation": 2}])
def test_exact_mode_clips_each_objective_by_itself(more: dict[str, Any]) -> None:
    run = train(gram_mode="exact", num_iterations=2, max_steps=4, optim="sgd", learning_rate=0.3, look=Oracle(), **more)
    check(run, steps=4)
    assert run.logs[1]["clip_ratio/region_mean"] > 0.01
    seen = run.seen[1]
    whole = [sum(w * a for w, a in zip(seen["weights"], each, strict=True)) for each in zip(*seen["advantages"])]
    assert apart(of_trl_again(run, 1, whole), run.updates[1]) > 1e-2


def of_trl_again(run: Run, step: int, advantages: Sequence[Tensor]) -> Vector:
    """TRL's gradient at the parameters before a step that is past."""
    current = state(run.trainer.model)
    try:
        with torch.no_grad():
            for name, p in run.trainer.model.named_parameters():
                p.copy_(run.parameters[step - 1][name])
        return of_trl(run.trainer, run.batches[step], advantages)
    finally:
        with torch.no_grad():
            for name, p in run.trainer.model.named_parameters():
                p.copy_(current[name])


@pytest.mark.parametrize("more", [{"num_iterations": 2}, {"steps_per_generation": 2, "per_device_train_batch_size": 8}])
def test_two_passes_step_along_one_clipped_loss(more: dict[str, Any]) -> None:
    run = train(gram_scope="trainable", optim="sgd", learning_rate=0.3, look=Oracle(), **more)
    for step, seen in enumerate(run.seen):
        weights = run.figures(step, "weight")
        assert weights == pytest.approx(seen["weights"], rel=2e-4)
        whole = [sum(w * a for w, a in zip(weights, each, strict=True)) for each in zip(*seen["advantages"])]
        if step:
            assert apart(run.updates[step], of_trl_again(run, step, whole)) < 2e-4
    assert run.logs[1]["clip_ratio/region_mean"] > 0.01


def test_a_step_over_two_generations() -> None:
    run = train(
        gram_mode="exact",
        steps_per_generation=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=16,
        look=Oracle(),
    )
    check(run)
    first, second = run.batches[0]
    assert not torch.equal(first["prompt_ids"], second["prompt_ids"])
    with pytest.raises(TrainingError, match=r"Found 1 and 2"):
        Settings.gapo(steps_per_generation=1, gradient_accumulation_steps=2)


# The same update by other ways


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_accumulation_changes_nothing(mode: str, adapter: bool) -> None:
    once, often = (
        train(gram_mode=mode, adapter=adapter, accumulation=each, optim="sgd", learning_rate=1e-3) for each in (1, 4)
    )
    for run, count in ((once, 1), (often, 4)):
        assert [len(batches) for batches in run.batches] == [count, count]
        for step in (0, 1):
            assert apart(run.updates[step], once.updates[step]) < 1e-4
            assert run.figures(step, "weight") == pytest.approx(once.figures(step, "weight"), rel=1e-4)
            assert run.figures(step, "signal") == pytest.approx(once.figures(step, "signal"), abs=1e-4)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_checkpointed_activations_change_nothing(mode: str, adapter: bool) -> None:
    plain = train(gram_mode=mode, adapter=adapter)
    saving = train(
        gram_mode=mode,
        adapter=adapter,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert saving.trainer.model.is_gradient_checkpointing
    assert [apart(a, b) for a, b in zip(saving.updates, plain.updates, strict=True)] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize(
    ("weighting", "aggregation", "more"),
    [
        ("linear", "sum_then_normalize", {"reward_weights": [1.0, 0.25, 2.0]}),
        ("linear", "sum_then_normalize", {"accumulation": 4, "entropy_coef": 0.1}),
        ("gdpo", "normalize_then_sum", {"reward_weights": [1.0, 0.25, 2.0], "accumulation": 2}),
    ],
)
def test_the_baselines_are_trls_own_training(
    mode: str, weighting: str, aggregation: str, more: dict[str, Any], adapter: bool
) -> None:
    shared = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.01, "adapter": adapter, **more}
    ours = train(gram_mode=mode, weighting=weighting, kl_inside_objectives=False, **shared)
    theirs = train(stock=True, multi_objective_aggregation=aggregation, **shared)
    start = state(theirs.trainer.model if adapter else tiny_model("llama"))
    for step in (0, 1):
        assert apart(ours.updates[step], theirs.updates[step]) < 2e-4
        assert apart(ours.parameters[step], theirs.parameters[step]) < 1e-6
    assert adapter or apart(ours.parameters[1], start) > 1e-4
    missing = {"step_time", "train_runtime", "epoch"}
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        for key in other.keys() - missing:
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_mgda_is_power_0() -> None:
    first, second = train(weighting="mgda"), train(power=0)
    assert all(apart(a, b) == 0 for a, b in zip(first.updates, second.updates, strict=True))


def test_a_preference_for_one_objective_is_training_on_it_alone() -> None:
    whole = train(preference=[0.0, 1.0, 0.0], gram_mode="exact", max_steps=1, beta=0.1)
    with pytest.warns(SteerkitWarning, match=r"'varied'.*plain GRPO"):
        alone = train([varied], max_steps=1, beta=0.1)
    assert cosine(whole.updates[0], alone.updates[0]) == pytest.approx(1, abs=1e-6)
    assert whole.figures(0, "weight")[::2] == [0, 0]


def test_one_objective_is_trls_own_training_bit_by_bit() -> None:
    for more in ({}, {"gram_mode": "exact", "preference": [1.0]}):
        with pytest.warns(SteerkitWarning, match="plain GRPO"):
            ours = train([parity], **more)
        theirs = train([parity], stock=True)
        assert all(torch.equal(p, theirs.parameters[1][name]) for name, p in ours.parameters[1].items())


@pytest.mark.parametrize("given", [{"power": 1}, {"power": 0}, {"gram_estimate": "split_half"}])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_the_order_of_the_objectives_is_no_matter(mode: str, given: dict[str, Any]) -> None:
    shared = {"gram_mode": mode, "optim": "sgd", "learning_rate": 1e-3, **given}
    one, other = train((low, varied, parity), **shared), train((parity, low, varied), **shared)
    for step in (0, 1):
        a, b = (
            {name: run.logs[step][f"gapo/weight/{name}"] for name in ("low", "varied", "parity")}
            for run in (one, other)
        )
        assert a == pytest.approx(b, rel=1e-4)
        assert len(set(a.values())) > 1
        assert apart(one.updates[step], other.updates[step]) < 1e-4


# Rewards that tell nothing


def late(of: Reward, step: int = 1, value: float | None = 0.1) -> Callable[..., list[float | None]]:
    """A reward that is alike for all from a step on."""

    def function(completion_ids: Sequence[Sequence[int]], trainer_state: Any, **_: Any) -> list[float | None]:
        return [value if trainer_state.global_step >= step else of(ids) for ids in completion_ids]

    function.__name__ = f"late_{of.__name__}"
    return function


MOVING = {"weight_decay": 0.3, "max_grad_norm": 1.0, "optim": "adamw_torch"}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize("value", [0.1, None])
def test_a_constant_reward_stops_plain_descent(mode: str, accumulation: int, value: float | None) -> None:
    given = {"gram_mode": mode, "accumulation": accumulation, **MOVING}
    run = train([low, late(parity, value=value)], power=0, max_steps=3, **given)
    start = state(build().model)
    assert apart(run.parameters[0], start) > 1e-4
    for step in (1, 2):
        assert all(torch.equal(p, run.parameters[0][name]) for name, p in run.parameters[step].items())
    assert [each["gapo/no_step"] for each in run.logs] == [0, 1, 1]
    assert [each["gapo/update_norm"] for each in run.logs[1:]] == [0, 0]
    assert run.updates[1:] == [{}, {}]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize("of", [constant, none])
def test_a_constant_reward_is_dropped(mode: str, accumulation: int, of: Reward) -> None:
    power = float(accumulation)
    given = {"gram_mode": mode, "gram_scope": "trainable", "accumulation": accumulation, "power": power}
    run = train([low, of, parity], look=Oracle((low, parity), power=power), **given)
    for step, seen in enumerate(run.seen):
        assert run.figures(step, "dropped") == [0, 1, 0]
        first, gone, last = run.figures(step, "weight")
        assert gone == 0
        assert [first, last] == pytest.approx(seen["weights"], rel=2e-4)
        assert apart(run.updates[step], seen["update"]) < 2e-4


def test_a_dropped_objective_keeps_no_kl() -> None:
    run = train(
        [low, constant, parity], gram_mode="exact", beta=0.3, rescale="none", look=Oracle((low, parity), match=False)
    )
    check_two = [run.figures(step, "weight")[::2] for step in (0, 1)]
    assert check_two == [pytest.approx(seen["weights"], rel=2e-4) for seen in run.seen]
    assert all(apart(update, seen["update"]) < 2e-4 for update, seen in zip(run.updates, run.seen, strict=True))


@pytest.mark.parametrize(
    "given",
    [{}, {"power": 0}, {"power": 2}, {"preference": [0.5, 0.5]}, {"weighting": "linear"}, {"weighting": "gdpo"}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_no_step_without_any_signal(mode: str, given: dict[str, Any]) -> None:
    run = train([late(low), late(parity)], gram_mode=mode, max_steps=2, **MOVING, **given)
    assert [each["gapo/no_step"] for each in run.logs] == [0, 1]
    assert all(torch.equal(p, run.parameters[0][name]) for name, p in run.parameters[1].items())


def test_a_step_after_none_is_as_if_nothing_had_been() -> None:
    def paused(completion_ids: Any, trainer_state: Any, **_: Any) -> list[float]:
        return [0.0 if trainer_state.global_step == 1 else parity(ids) for ids in completion_ids]

    run = train([low, paused], power=0, max_steps=3, gram_mode="exact", **MOVING)
    assert [each["gapo/no_step"] for each in run.logs] == [0, 1, 0]
    assert torch.equal(flat(run.parameters[1]), flat(run.parameters[0]))
    assert not torch.equal(flat(run.parameters[2]), flat(run.parameters[1]))


def flat(vector: Vector) -> Tensor:
    return torch.cat([each.flatten() for each in vector.values()])


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_rewards_that_cancel_still_train_under_gdpo(mode: str) -> None:
    def halved(completion_ids: Any, **_: Any) -> list[float]:
        return [-parity(ids) / 2 for ids in completion_ids]

    shared = {"reward_weights": [1.0, 2.0], "max_steps": 1}
    theirs = train([parity, halved], stock=True, multi_objective_aggregation="normalize_then_sum", **shared)
    assert math.sqrt(product(theirs.updates[0], theirs.updates[0])) > 1e-3
    ours = train([parity, halved], weighting="gdpo", gram_mode=mode, **shared)
    assert apart(ours.updates[0], theirs.updates[0]) < 2e-4


def test_opposed_rewards_make_no_step() -> None:
    def minus(completion_ids: Any, **_: Any) -> list[float]:
        return [-3 * parity(ids) for ids in completion_ids]

    for given in ({}, {"power": 0}, {"gram_mode": "exact"}, {"preference": [0.5, 0.5]}):
        run = train([parity, minus], max_steps=1, **MOVING, **given)
        assert run.logs[0]["gapo/no_step"] == 1
        assert torch.equal(flat(run.parameters[0]), flat(state(build([parity, minus]).model)))


def test_a_reward_that_applies_to_some_is_centred_over_them() -> None:
    run = train([low, partial, parity], gram_mode="exact", look=Oracle((low, partial, parity)))
    check(run)
    values = [
        partial(ids[m.bool()].tolist())
        for b in run.batches[0]
        for ids, m in zip(b["completion_ids"], b["completion_mask"])
    ]
    known = [value for value in values if value is not None]
    assert 0 < len(known) < len(values)
    assert run.logs[0]["rewards/partial/mean"] == pytest.approx(sum(known) / len(known), rel=1e-5)


# Kinds of reward functions


async def slow(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [parity(ids) for ids in completion_ids]


class Callable_:
    def __init__(self, of: Reward) -> None:
        self.of = of

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> Tensor:
        return torch.tensor([self.of(ids) for ids in completion_ids])


class AsyncCallable:
    async def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [parity(ids) for ids in completion_ids]


def scaled(completion_ids: Sequence[Sequence[int]], factor: float, **_: Any) -> list[float]:
    return [factor * parity(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    "other",
    [slow, Callable_(parity), AsyncCallable(), functools.partial(scaled, factor=1.0), functools.partial(slow)],
    ids=["async", "object", "async object", "partial", "async partial"],
)
def test_every_kind_of_function_is_the_same_objective(other: Any) -> None:
    plain, ours = train([low, parity]), train([low, other])
    assert torch.equal(flat(plain.parameters[1]), flat(ours.parameters[1]))


def judge(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return seeded(LlamaForSequenceClassification(LlamaConfig(**LLAMA_LIKE, num_labels=1)), seed)


def judges(count: int) -> dict[str, Any]:
    return {"reward_processing_classes": [None, *(tiny_tokenizer(pad=True) for _ in range(count))]}


def test_sequence_classifiers_are_objectives() -> None:
    first, second = judge(0), judge(1)
    before = [flat(state(each)) for each in (first, second)]
    scores: list[Tensor] = []
    run = Run(build([low, first, second], gram_mode="exact", gram_scope="last_block", more=judges(2), max_steps=1))
    run.trainer.remove_callback(PrinterCallback)
    run.trainer.add_callback(Watch(run, None))
    first.register_forward_hook(lambda module, args, output: scores.append(output.logits[:, 0].clone()))
    run.trainer.train()
    assert len(set(run.trainer.objectives)) == 3
    assert min(run.figures(0, "norm")) > 0
    assert sum(len(each) for each in scores) == ROWS
    found = torch.cat([batch["objective_advantages"][:, 1] for batch in run.batches[0]])
    centred = torch.cat(scores).view(-1, GROUP)
    wanted = (centred - centred.mean(1, keepdim=True)).flatten()
    assert found.sort().values.tolist() == pytest.approx(wanted.sort().values.tolist(), abs=1e-5)
    for model, old in zip((first, second), before, strict=True):
        assert torch.equal(flat(state(model)), old)


def test_a_classifier_that_breaks_is_named() -> None:
    broken = judge()
    with torch.no_grad():
        broken.score.weight.fill_(math.nan)
    with pytest.raises(RewardError, match=r"finite.*nan"):
        train([low, broken], more=judges(1))


# What the caller gave


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_the_callers_model_and_tokenizer_stay_as_they_were(mode: str) -> None:
    model, tokenizer, ids = steady("llama"), tiny_tokenizer(), torch.tensor([[5, 9, 33, 12]])
    weights, config, generation = state(model), copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes, words = set(vars(model)), tokenizer.backend_tokenizer.to_str()
    options = copy.deepcopy(tokenizer.special_tokens_map), tokenizer.padding_side, tokenizer.truncation_side
    with torch.no_grad():
        said = model(ids).logits
    run = train(model=model, tokenizer=tokenizer, gram_mode=mode)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert list(weights) == [name for name, _ in model.named_parameters()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config.to_dict() == generation.to_dict()
    assert set(vars(model)) == attributes
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert tokenizer.backend_tokenizer.to_str() == words
    assert (tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side) == options
    assert tokenizer.pad_token is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, said)
    assert not any(module._forward_hooks for module in run.trainer.model.modules())


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_policy_becomes_a_preference_vector(adapter: bool) -> None:
    model = tiny_model("llama")
    given = model if adapter else copy.deepcopy(model)
    run = train(model=given, adapter=adapter)
    vector = PreferenceVector.difference(run.trainer.model, model, name="both")
    policy = copy.deepcopy(run.trainer.model)
    trained = (policy.merge_and_unload() if adapter else policy).state_dict()
    changed = {name for name, p in model.state_dict().items() if not torch.equal(trained[name], p)}
    assert set(vector.deltas) == changed
    assert changed
    for name, delta in vector.deltas.items():
        assert apart({"d": dense(delta)}, {"d": trained[name] - model.state_dict()[name]}) < 1e-3


def test_arguments_are_copied() -> None:
    objectives, rows = rewards(THREE), copy.deepcopy(PROMPTS.to_list())
    before = list(objectives)
    trainer = GAPOTrainer(
        tiny_model("llama"), objectives, Settings.gapo(), PROMPTS, processing_class=tiny_tokenizer(), peft_config=lora()
    )
    assert objectives == before
    assert PROMPTS.to_list() == rows
    assert trainer.reward_funcs is not objectives


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_what_the_loss_does_not_reach_is_left_alone(mode: str) -> None:
    def spare() -> Any:
        model = tiny_model("llama")
        model.model.layers[3].spare = nn.Parameter(torch.ones(3, 3))
        return model

    shared = {"adapter": False, "weight_decay": 0.5, "optim": "adamw_torch"}
    name = "model.layers.3.spare"
    theirs = train(model=spare(), stock=True, **shared)
    ours = train(model=spare(), gram_mode=mode, weighting="linear", **shared)
    assert torch.equal(theirs.parameters[1][name], torch.ones(3, 3))
    assert torch.equal(ours.parameters[1][name], torch.ones(3, 3))


# What is logged


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("objectives", "given"),
    [
        ((low, against, varied), {"weighting": "linear"}),
        ((low, against), {"preference": [0.05, 0.95]}),
        (THREE, {"beta": 0.2, "power": 2.0}),
    ],
    ids=lambda value: "-".join(f.__name__ for f in value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_every_figure_is_right(mode: str, objectives: Any, given: dict[str, Any], accumulation: int) -> None:
    wanted = {k: v for k, v in given.items() if k in ("power", "preference")}
    if given.get("weighting") == "linear":
        wanted = {"weigh": lambda g: torch.ones(3), "match": False}
    run = train(
        objectives,
        gram_mode=mode,
        gram_scope="trainable",
        accumulation=accumulation,
        max_steps=1 + (accumulation == 1),
        adapter=accumulation == 1 or "beta" in given,
        look=Oracle(objectives, signal=True, **wanted),
        **given,
    )
    check(run, 1 + (accumulation == 1))
    names = [each.__name__ for each in objectives]
    for step, seen in enumerate(run.seen):
        log, gramian = run.logs[step], seen["gramian"]
        weights = torch.tensor(seen["weights"], dtype=torch.float64)
        norms, progress = gramian.diagonal().sqrt(), gramian @ weights
        size = float((weights @ gramian @ weights).sqrt())
        assert run.figures(step, "norm") == pytest.approx(norms.tolist(), rel=2e-4)
        assert run.figures(step, "progress") == pytest.approx(progress.tolist(), rel=1e-3, abs=1e-3 * size)
        assert run.figures(step, "signal") == pytest.approx(seen["signal"], abs=1e-3)
        assert run.figures(step, "dropped") == [0] * len(names)
        assert log["gapo/update_norm"] == pytest.approx(size, rel=2e-4)
        assert log["gapo/update_norm"] == pytest.approx(
            math.sqrt(product(run.updates[step], run.updates[step])), rel=1e-3
        )
        assert log["gapo/norm_ratio"] == pytest.approx(float(norms.max() / norms.min()), rel=2e-4)
        for i, one in enumerate(names):
            for j in range(i + 1, len(names)):
                angle = float(gramian[i, j] / norms[i] / norms[j])
                assert log[f"gapo/cosine/{one}/{names[j]}"] == pytest.approx(angle, abs=2e-4)
        assert log["gapo/opposed"] == float(progress.min() < -1e-5 * size * float(norms.max()))
        for name, each in zip(names, objectives, strict=True):
            values = [
                each(ids[mask.bool()].tolist())
                for batch in run.batches[step]
                for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
            ]
            assert log[f"rewards/{name}/mean"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_only_a_weighting_without_common_descent_opposes() -> None:
    pair = (low, against)
    for given, opposed in (({}, 0), ({"power": 0}, 0), ({"weighting": "linear"}, 1), ({"preference": [0.01, 0.99]}, 1)):
        run = train(pair, gram_scope="trainable", gram_mode="exact", **given)
        assert run.logs[0]["gapo/cosine/low/against"] < -0.2
        assert {each["gapo/opposed"] for each in run.logs} == {opposed}
        assert (min(run.figures(0, "progress")) < 0) == bool(opposed)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_halves_hold_whole_groups_where_there_are_two(groups: int) -> None:
    run = train(max_steps=1, per_device_train_batch_size=GROUP * groups, gram_mode="exact")
    (batch,) = run.batches[0]
    halves: dict[Any, list[int]] = defaultdict(list)
    for prompt, half in zip(batch["prompt_ids"], batch["half"], strict=True):
        halves[tuple(prompt.tolist())].append(int(half))
    assert len(halves) == groups
    count = [int((batch["half"] == half).sum()) for half in (0, 1)]
    if groups == 1:
        assert count == [2, 2]
    else:
        assert all(len(set(each)) == 1 for each in halves.values())
        assert abs(count[0] - count[1]) <= GROUP


def test_two_objectives_of_one_name_are_told_apart() -> None:
    run = train(
        [
            lambda completion_ids, **_: [low(i) for i in completion_ids],
            lambda completion_ids, **_: [parity(i) for i in completion_ids],
        ],
        max_steps=1,
    )
    assert len(run.trainer.objectives) == 2
    assert len(set(run.figures(0, "norm"))) == 2


def test_evaluation_is_no_part_of_a_step() -> None:
    run = train(
        more={"eval_dataset": PROMPTS.select(range(4))},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        accumulation=2,
        look=Oracle(scope=lambda name: BLOCK in name),
    )
    check(run)
    evaluated = [each for each in run.trainer.state.log_history if "eval_reward" in each]
    assert len(evaluated) == 2
    assert not any("gapo" in key for each in evaluated for key in each)


@pytest.mark.parametrize("given", [{"gram_mode": "exact"}, {"accumulation": 2}, {"num_iterations": 2}], ids=str)
def test_a_resumed_run_is_the_same_bit_by_bit(given: dict[str, Any]) -> None:
    shared = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **given}
    whole = train(**shared)
    again = build(**shared)
    again.train(resume_from_checkpoint="out/checkpoint-2")
    assert again.state.global_step == 4
    assert torch.equal(flat(state(again.model)), flat(whole.parameters[3]))


# Bad input


def raising(completion_ids: Any, prompts: Any, **_: Any) -> list[float]:
    if any(prompt == UNLUCKY for prompt in prompts):
        raise KeyError("no such word")
    return [0.0 for _ in completion_ids]


async def raising_later(completion_ids: Any, prompts: Any, **_: Any) -> list[float]:
    return raising(completion_ids, prompts)


UNLUCKY = "w5 w8 w10"


def bad(value: Any, row: int = 5) -> Callable[..., Any]:
    def odd(completion_ids: Any, **_: Any) -> list[Any]:
        values: list[Any] = [float(i) for i in range(len(completion_ids))]
        values[row] = value
        return values

    return odd


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize("function", [raising, raising_later])
def test_a_reward_function_that_raises_is_named_with_its_prompt(mode: str, function: Any) -> None:
    data = Dataset.from_list([{"prompt": f"w{i} w{i + 3} w{2 * i}"} for i in (3, 4, 5, 6)])
    with pytest.raises(RewardError) as caught:
        train([low, function], gram_mode=mode, data=data)
    assert function.__name__ in str(caught.value)
    assert "KeyError" in str(caught.value)
    assert "no such word" in str(caught.value)
    if function is raising:
        assert UNLUCKY in str(caught.value)
        assert caught.value.prompt == UNLUCKY


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "0.5", [1.0], 10**400, 1e39, torch.tensor(math.nan), complex(1, 1)],
    ids=lambda value: str(value)[:12],
)
def test_a_reward_that_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(RewardError, match=r"(?s)'odd' returned .* on the prompt 'w"):
        train([low, bad(value)])


@pytest.mark.parametrize(
    ("returned", "found"),
    [([0.0], "1"), ([], "0"), ([0.0] * 17, "17"), (0.5, "float"), (None, "NoneType"), ("x" * 16, "str")],
    ids=["one", "none", "seventeen", "number", "None", "text"],
)
def test_another_number_of_rewards_is_refused(returned: Any, found: str) -> None:
    def odd(**_: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=rf"each of {ROWS} completions. 'odd' returned {found}\b"):
        train([low, odd])


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"preference": [0.5, 0.4]}, ObjectiveError, r"sum 0\.9"),
        ({"preference": [1.5, -0.5]}, ObjectiveError, r"-0\.5"),
        ({"preference": [math.nan, 1.0]}, ObjectiveError, "nan"),
        ({"preference": [math.inf, 0.0]}, ObjectiveError, "inf"),
        ({"preference": []}, ObjectiveError, r"\[\]"),
        ({"preference": [0.5, 0.5], "power": 2.0}, ObjectiveError, r"power=2\.0"),
        ({"preference": [0.5, 0.5], "weighting": "mgda"}, ObjectiveError, "mgda"),
        ({"power": -1.0}, ObjectiveError, r"-1\.0"),
        ({"power": math.nan}, ObjectiveError, "nan"),
        ({"power": math.inf}, ObjectiveError, "inf"),
        ({"power": "1"}, ObjectiveError, "'1'"),
        ({"power": True}, ObjectiveError, "True"),
        ({"power": None}, ObjectiveError, "None"),
        ({"weighting": "nash"}, ObjectiveError, "nash"),
        ({"weighting": None}, ObjectiveError, "None"),
        ({"gram_mode": "approximate"}, ObjectiveError, "approximate"),
        ({"gram_mode": lambda g: g}, ObjectiveError, "function"),
        ({"gram_estimate": "halves"}, ObjectiveError, "halves"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, ObjectiveError, "normalize_then_sum"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            TrainingError,
            "non-reentrant",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, TrainingError, "DeepSpeed"),
        ({"fp16": True}, TrainingError, "fp16"),
        ({"use_adaptive_entropy": True}, TrainingError, "use_adaptive_entropy"),
        (
            {"save_strategy": "steps", "save_steps": 3, "num_iterations": 2},
            TrainingError,
            r"save_steps=3\b.*multiple of 2",
        ),
        ({"save_strategy": "steps", "save_steps": 1, "steps_per_generation": 4}, TrainingError, "multiple of 4"),
        ({"save_strategy": "steps", "save_steps": 0.5}, TrainingError, r"0\.5"),
        ({"steps_per_generation": 3, "accumulation": 2}, TrainingError, "Found 3 and 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", None),
)
def test_settings_that_cannot_be_are_refused_at_once(given: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        Settings.gapo(**given)


def test_good_save_steps_are_taken() -> None:
    assert Settings.gapo(save_strategy="steps", save_steps=4, num_iterations=2, accumulation=2).save_steps == 4
    assert Settings.gapo(save_strategy="epoch", save_steps=3, num_iterations=2).save_steps == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preference": [0.5, 0.5]}, r"3 objectives\. Found 2"),
        ({"gram_scope": "no_such_layer"}, "no_such_layer"),
        ({"gram_scope": "last_blok"}, "last_blok"),
        ({"gram_scope": "("}, r"regular expression.*'\('"),
        ({"gram_scope": "lora", "adapter": False}, "'lora'"),
        (
            {"gram_scope": "last_block", "adapter": lora(layers_to_transform=[0], target_modules=["q_proj"])},
            "last_block",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_what_does_not_fit_the_objectives_or_the_model_is_refused_before_training(given: dict, says: str) -> None:
    with pytest.raises(ObjectiveError, match=says):
        build(**given)


def test_another_trainers_settings_are_refused() -> None:
    with pytest.raises(TrainingError, match="GRPOConfig"):
        GAPOTrainer(tiny_model("llama"), rewards(THREE), Settings.stock(), PROMPTS, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["weights", "preference"])
def test_a_wrong_number_of_shares_is_an_error_of_this_package(count: int, kind: str) -> None:
    given: dict[str, Any] = (
        {"reward_weights": [1.0] * count} if kind == "weights" else {"preference": [1.0 / count] * count}
    )
    with pytest.raises((SteerkitError, ValueError), match=rf"\b{count}\b"):
        build(**given)


@pytest.mark.parametrize(
    ("weigh", "found"),
    [
        (lambda g: torch.ones(2), r"\[1\.0, 1\.0\]"),
        (lambda g: torch.tensor([1.0, -1.0, 0.0]), r"-1\.0"),
        (lambda g: torch.full((3,), math.nan), "nan"),
        (lambda g: g, "objectives"),
    ],
)
def test_a_weighting_that_returns_no_weights_is_refused(weigh: Callable[[Tensor], Tensor], found: str) -> None:
    with pytest.raises(ObjectiveError, match=found):
        train(weighting=weigh)


def test_a_weighting_of_zeros_makes_no_step() -> None:
    run = train(weighting=lambda g: torch.zeros(3), max_steps=1, **MOVING)
    assert run.logs[0]["gapo/no_step"] == 1
    assert torch.equal(flat(run.parameters[0]), flat(state(build().model)))


def test_a_callable_gets_the_gramian_and_may_return_a_list() -> None:
    given: list[Tensor] = []

    def weigh(gramian: Tensor) -> list[float]:
        given.append(gramian.clone())
        return [1.0, 2.0, 3.0]

    run = train(weighting=weigh, gram_mode="exact", look=Oracle(weigh=lambda g: torch.tensor([1.0, 2.0, 3.0])))
    check(run)
    assert len(given) == 2
    for seen, gramian in zip(run.seen, given, strict=True):
        assert apart({"g": gramian}, {"g": seen["gramian"]}) < 2e-4
