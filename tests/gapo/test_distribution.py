"""Contract 9: two processes, gradient accumulation, resuming after a kill, and what is refused.

Every run is a process of its own: a hang ends with it.
"""

import os
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from steerkit import GAPOConfig
from steerkit.errors import TrainingError

GROUP = 4

# Three objectives that read what the prompt's row says about them.


def low(completion_ids: Any, quiet: Any, flat: Any, silent: Any, **given: Any) -> list[float]:
    found = [sum(token < 40 for token in ids) / len(ids) for ids in completion_ids]
    return [0.5 if f or s else value for value, f, s in zip(found, flat, silent, strict=True)]


def varied(completion_ids: Any, quiet: Any, flat: Any, silent: Any, **given: Any) -> list[float]:
    found = [10.0 * len(set(ids)) / len(ids) for ids in completion_ids]
    return [0.5 if f or s or q else v for v, f, s, q in zip(found, flat, silent, quiet, strict=True)]


def odd(completion_ids: Any, quiet: Any, flat: Any, silent: Any, **given: Any) -> list[float]:
    found = [float(sum(ids) % 7) for ids in completion_ids]
    return [0.5 if f or s else value for value, f, s in zip(found, flat, silent, strict=True)]


OBJECTIVES = ("low", "varied", "odd")


def rows(count: int, **where: Sequence[int]) -> list[dict[str, Any]]:
    """Return prompts; `quiet`: one objective is constant there, `flat` and `silent`: all are."""
    flags = ("quiet", "flat", "silent")
    return [
        {"prompt": f"w{i} w{i + 3} w{2 * i}", **{flag: i in where.get(flag, ()) for flag in flags}}
        for i in range(count)
    ]


# One run, in a process of its own.


def run(
    out: Path,
    settings: dict[str, Any],
    data: Sequence[dict[str, Any]],
    lora: bool = True,
    dropout: float = 0.0,
    fixed: bool = True,
    kill: int | None = None,
    resume: str | None = None,
) -> None:
    """Train, and write what each step left; with `fixed`, completions are a function of prompt, index and step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from steerkit import GAPOTrainer

    class Fixed(GAPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, count: int, **given: Any) -> Any:
            if not fixed:
                return super()._generate_single_turn(prompt_ids, images, fields, count, **given)
            first = self.accelerator.process_index * len(prompt_ids)
            made = []
            for index, ids in enumerate(prompt_ids, first):
                dice = random.Random(f"{ids} {index % count} {self.state.global_step}")
                made.append([dice.randrange(3, 99) for _ in range(dice.randint(3, 7))] + [2])
            return made, None

    class Kept(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, Tensor]] = []
            self.state: Any = None

        def keep(self) -> None:
            self.steps.append({name: p.detach().clone() for name, p in named(trainer) if p.requires_grad})

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if not self.steps:
                self.keep()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.keep()

        def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any, **given: Any) -> None:
            self.state = optimizer.state_dict()

    def named(trainer: Any) -> Iterator[tuple[str, Tensor]]:
        return trainer.accelerator.unwrap_model(trainer.model).named_parameters()

    given = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **settings,
    }
    kept = Kept()
    model = tiny_model("llama")
    if not lora and "beta" in given:  # TRL reads the reference from where the model came from
        where = out / f"model-{os.environ.get('RANK', 0)}"
        model.save_pretrained(where)
        model.config._name_or_path = str(where)
    adapter = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = Fixed(
        model,
        [low, varied, odd],
        GAPOConfig(str(out), **given),
        Dataset.from_list(list(data)),
        processing_class=tiny_tokenizer(pad=True),
        peft_config=adapter if lora else None,
        callbacks=[kept],
    )
    if kill is not None:
        whole, calls = trainer.training_step, []

        def dying(*args: Any, **kwargs: Any) -> Any:
            loss = whole(*args, **kwargs)
            calls.append(1)
            if trainer.state.global_step == kill:
                os._exit(9)  # gradients are there, the optimiser's step is not
            return loss

        trainer.training_step = dying
    trainer.train(resume_from_checkpoint=resume)
    kept.steps[0] = kept.steps[0] if resume is None else {}
    history = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]
    torch.save(
        {"history": history, "steps": kept.steps, "optimizer": kept.state, "generation": trainer._step},
        out / f"left-{trainer.accelerator.process_index}.pt",
    )


TIMES = ("step_time", "_runtime", "_per_second")


class Run(forked.Run):
    """One training in one or two processes."""

    def __init__(self, out: Path, processes: int = 1, **given: Any) -> None:
        super().__init__(run, out, processes, **given)

    def left(self) -> list[dict[str, Any]]:
        """Return what each process left at its end."""
        codes = self.codes()
        assert codes == [0] * len(self.logs), f"codes {codes} (None: it hung)\n{self.told()}"
        return [torch.load(log.with_name(f"left-{rank}.pt"), weights_only=False) for rank, log in enumerate(self.logs)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other or (one != one and other != other))


def gapo(left: dict[str, Any]) -> list[dict[str, float]]:
    """Return what GAPO logged at each step."""
    logged = [{k: v for k, v in entry.items() if k.startswith("gapo/")} for entry in left["history"]]
    return [entry for entry in logged if entry]


def moves(left: dict[str, Any]) -> list[Tensor]:
    """Return how far each step moved all parameters together, `"parameter"`."""
    flat = [torch.cat([step[name].double().flatten() for name in sorted(step)]) for step in left["steps"]]
    return [after - before for before, after in pairwise(flat)]


def ranks_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert same(gapo(first), gapo(second))
    assert same(first["steps"], second["steps"])
    assert len(gapo(first)) == len(first["steps"]) - 1


def updates_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same weights and steps up to rounding."""
    for ours, theirs in zip(gapo(one), gapo(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=2e-3, abs=2e-4, nan_ok=True), name
    for ours, theirs in zip(moves(one), moves(other), strict=True):
        assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm())


def both(folder: Path, settings: dict[str, Any], data: Sequence[dict[str, Any]], **given: Any) -> dict[str, Any]:
    """Hold two processes against one another and against one process with the whole batch; return what rank 0 left."""
    batch = settings.get("per_device_train_batch_size", 8)
    single = {**settings, "per_device_train_batch_size": 2 * batch}
    alone = Run(folder / "one", settings=single, data=data, **given)
    pair = Run(folder / "two", 2, settings=settings, data=data, **given)
    [whole], (first, second) = alone.left(), pair.left()
    ranks_agree(first, second)
    updates_agree(first, whole)
    return first


# Two processes.

KL: dict[str, dict[str, Any]] = {
    "plain": {},
    "inside": {"beta": 0.2},
    "outside": {"beta": 0.2, "kl_inside_objectives": False},
}


@pytest.mark.parametrize(
    ("mode", "lora", "accumulation", "weighting", "kl"),
    [
        ("exact", True, 1, "gapo", "inside"),
        ("exact", False, 2, "gapo", "outside"),
        ("exact", True, 2, "mgda", "outside"),
        ("two_pass", True, 2, "gapo", "outside"),
        ("two_pass", False, 2, "mgda", "inside"),
        ("two_pass", True, 1, "gdpo", "inside"),
        ("two_pass", True, 1, "linear", "plain"),
    ],
)
def test_two_processes_make_the_update_of_one(
    tmp_path: Path, mode: str, lora: bool, accumulation: int, weighting: str, kl: str
) -> None:
    settings = {"gram_mode": mode, "gradient_accumulation_steps": accumulation, "weighting": weighting, **KL[kl]}
    left = both(tmp_path, settings, rows(24), lora=lora)
    assert len(gapo(left)) == 2
    # Plain multiple-gradient descent makes no step where an objective tells nothing.
    assert all(entry["gapo/no_step"] == 0 or weighting == "mgda" for entry in gapo(left))
    assert [float(move.norm()) > 1e-4 for move in moves(left)] == [not entry["gapo/no_step"] for entry in gapo(left)]


@pytest.mark.parametrize(
    "more",
    [
        {"gram_scope": "trainable"},
        {"gram_estimate": "split_half"},
        {"power": 2.0, "gram_mode": "exact", "gram_scope": "last_block"},
        {"preference": [0.2, 0.3, 0.5], "scale_rewards": "group"},
        {"rescale": "none"},
        {"loss_type": "grpo", "gram_mode": "exact"},
    ],
    ids=lambda more: "-".join(more),
)
def test_two_processes_whatever_the_setting(tmp_path: Path, more: dict[str, Any]) -> None:
    both(tmp_path, more, rows(16))


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_the_update_is_that_of_any_split_of_the_batch(tmp_path: Path, mode: str) -> None:
    """Twice the micro-batches of half the size."""
    runs = [
        Run(
            tmp_path / str(accumulation),
            settings={
                "gram_mode": mode,
                "per_device_train_batch_size": 16 // accumulation,
                "gradient_accumulation_steps": accumulation,
                **KL["inside"],
            },
            data=rows(12),
        )
        for accumulation in (1, 2, 4)
    ]
    whole, *others = [each.left()[0] for each in runs]
    for other in others:
        updates_agree(other, whole)


@pytest.mark.parametrize(
    ("mode", "accumulation", "flag"),
    [("exact", 1, "quiet"), ("exact", 2, "silent"), ("two_pass", 2, "quiet"), ("two_pass", 1, "silent")],
)
def test_an_objective_that_tells_nothing_on_one_rank(tmp_path: Path, mode: str, accumulation: int, flag: str) -> None:
    """`quiet`: one objective on the second rank; `silent`: all of them there."""
    own = 2 * accumulation  # prompts of a rank in a step
    second = [i for i in range(8 * own) if i // own % 2]
    settings = {
        "gram_mode": mode,
        "gradient_accumulation_steps": accumulation,
        "shuffle_dataset": False,
        **(KL["inside"] if flag == "quiet" else {}),
    }
    left = both(tmp_path, settings, rows(8 * own, **{flag: second}))
    for entry in gapo(left):
        assert [entry[f"gapo/dropped/{name}"] for name in OBJECTIVES] == [0.0, 0.0, 0.0]
        assert entry["gapo/norm/varied"] > 0


@pytest.mark.parametrize(
    ("mode", "accumulation", "lora"),
    [("exact", 1, True), ("exact", 2, False), ("two_pass", 2, True), ("two_pass", 1, False)],
)
def test_steps_without_an_update_hold_nobody_up(tmp_path: Path, mode: str, accumulation: int, lora: bool) -> None:
    """The first step and the third: constant rewards everywhere."""
    prompts = 4 * accumulation
    flat = [i for i in range(4 * prompts) if i // prompts in (0, 2)]
    settings = {
        "gram_mode": mode,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
        "shuffle_dataset": False,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "learning_rate": 1e-3,
    }
    pair = Run(tmp_path, 2, settings=settings, data=rows(4 * prompts, flat=flat), lora=lora)
    first, second = pair.left()
    ranks_agree(first, second)
    assert [entry["gapo/no_step"] for entry in gapo(first)] == [1, 0, 1, 0]
    assert [bool(move.any()) for move in moves(first)] == [False, True, False, True]


def test_a_group_may_be_split_between_processes(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    both(tmp_path, settings, rows(12))


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_micro_batches_of_one_half_on_one_rank_only(tmp_path: Path, mode: str) -> None:
    """After the shuffle a rank's micro-batch may hold one half of the samples while the other's holds both."""
    settings = {
        "gram_mode": mode,
        "per_device_train_batch_size": 2,
        "steps_per_generation": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
    }
    first, second = Run(tmp_path, 2, settings=settings, data=rows(16)).left()
    ranks_agree(first, second)
    assert len(gapo(first)) == 8


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_micro_batches_of_one_row_accumulated(tmp_path: Path, mode: str) -> None:
    settings = {
        "gram_mode": mode,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        **KL["outside"],
    }
    both(tmp_path, settings, rows(16))


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
def test_completions_used_again(tmp_path: Path, mode: str) -> None:
    settings = {"gram_mode": mode, "num_iterations": 2, "max_steps": 4}
    both(tmp_path, settings, rows(8))


@pytest.mark.parametrize(
    ("mode", "lora", "accumulation"), [("exact", True, 2), ("exact", False, 1), ("two_pass", True, 1)]
)
def test_checkpointing_under_two_processes(tmp_path: Path, mode: str, lora: bool, accumulation: int) -> None:
    """Non-reentrant; the same update as without."""
    settings = {
        "gram_mode": mode,
        "gradient_accumulation_steps": accumulation,
        **KL["inside"],
    }
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    saving = Run(tmp_path / "saving", 2, settings={**settings, **checkpointing}, data=rows(16), lora=lora)
    plain = Run(tmp_path / "plain", 2, settings=settings, data=rows(16), lora=lora)
    (first, second), (one, _) = saving.left(), plain.left()
    ranks_agree(first, second)
    updates_agree(first, one)


# Resuming.

RESUMED: dict[str, dict[str, Any]] = {
    "two passes, a step a block": {"settings": {}},
    "exact, a step a block": {"settings": {"gram_mode": "exact"}},
    "two passes, two steps a block": {"settings": {"steps_per_generation": 2}},
    "exact, two steps a block, accumulated, all weights": {
        "settings": {
            "gram_mode": "exact",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        },
        "lora": False,
    },
    "two passes, accumulated, used again": {
        "settings": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    },
    "exact, used again": {"settings": {"gram_mode": "exact", "num_iterations": 2}},
    "the end of an epoch": {"settings": {}, "data": rows(4)},
    "within the second epoch": {"settings": {"max_steps": 6}, "data": rows(6), "kill": 4},
}


def resumed(folder: Path, processes: int, given: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any], int]]:
    """Return for each rank what a whole run left, what a killed and resumed one left, and the step of the checkpoint."""
    given = {"data": rows(32), "dropout": 0.1, "fixed": False, **given}
    kill = given.pop("kill", 2)
    given["settings"] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-2,
        **KL["inside"],
        **given["settings"],
    }
    whole = Run(folder / "whole", processes, **given)
    killed = Run(folder / "killed", processes, kill=kill, **given)
    assert killed.codes() == [9] * processes, killed.told()
    steps = sorted(path.name for path in (folder / "killed").glob("checkpoint-*"))
    assert steps[-1] == f"checkpoint-{kill}"
    again = Run(folder / "killed", processes, resume=str(folder / "killed" / steps[-1]), **given)
    return [(one, other, kill) for one, other in zip(whole.left(), again.left(), strict=True)]


def nothing_differs(whole: dict[str, Any], again: dict[str, Any], at: int) -> None:
    for step, (one, other) in enumerate(zip(whole["steps"][at + 1 :], again["steps"][1:], strict=True), at + 1):
        assert same(one, other), f"parameters after step {step}"
    for one, other in zip(whole["history"], again["history"], strict=True):
        differing = {key for key in one.keys() | other.keys() if not same(one.get(key), other.get(key))}
        assert differing <= {"train_loss", "total_flos"}, (one["step"], differing)
    assert same(whole["optimizer"], again["optimizer"])
    assert any(bool(move.any()) for move in moves(whole))


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_goes_on_and_gives_the_same_bits(tmp_path: Path, case: str) -> None:
    [(whole, again, at)] = resumed(tmp_path, 1, RESUMED[case])
    assert len(whole["history"]) == len(whole["steps"])
    nothing_differs(whole, again, at)


@pytest.mark.parametrize("case", ["exact, a step a block", "two passes, two steps a block"])
def test_two_killed_processes_go_on_and_give_the_same_bits(tmp_path: Path, case: str) -> None:
    ranks = resumed(tmp_path, 2, RESUMED[case])
    for whole, again, at in ranks:
        nothing_differs(whole, again, at)
    ranks_agree(ranks[0][0], ranks[1][0])


def test_a_run_that_is_not_killed_is_repeated(tmp_path: Path) -> None:
    """Else two runs with the same bits say nothing about a checkpoint: another seed gives others."""
    settings = {"optim": "adamw_torch"}
    runs = [
        Run(tmp_path / str(i), settings={**settings, "seed": seed}, data=rows(16), fixed=False)
        for i, seed in enumerate((3, 3, 4))
    ]
    first, again, other = [each.left()[0] for each in runs]
    assert same(first["steps"], again["steps"])
    assert not same(first["steps"][1:], other["steps"][1:])


@pytest.mark.parametrize(
    ("given", "multiple"),
    [
        ({"steps_per_generation": 2, "save_steps": 1}, 2),
        ({"num_iterations": 2, "save_steps": 3}, 2),
        ({"steps_per_generation": 8, "gradient_accumulation_steps": 2, "save_steps": 2}, 4),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "gram_mode": "exact", "save_steps": 2}, 3),
        ({"steps_per_generation": 4, "save_steps": 0.5}, 4),
    ],
)
def test_a_checkpoint_within_a_block_is_refused(tmp_path: Path, given: dict[str, Any], multiple: int) -> None:
    fine = {"per_device_train_batch_size": 8, "num_generations": GROUP, "use_cpu": True, "save_strategy": "steps"}
    with pytest.raises(TrainingError, match=f"multiple of {multiple}\\."):
        GAPOConfig(str(tmp_path), **fine, **given)
    GAPOConfig(str(tmp_path), **fine, **{**given, "save_steps": 2 * multiple})
    GAPOConfig(str(tmp_path), **{**fine, "save_strategy": "no"}, **given)


# Sharded parameters.


def test_sharded_parameters_are_refused_by_both_processes(tmp_path: Path) -> None:
    sharded = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    }
    pair = Run(tmp_path, 2, settings=sharded, data=rows(16), lora=False)
    assert pair.codes() == [1, 1], pair.told()
    for log in pair.logs:
        last = log.read_text().strip().splitlines()[-1]
        assert last.startswith("steerkit.errors.TrainingError: ")
        assert "sharded parameters" in last
        assert "DDP" in last


def worker(out: Path) -> None:
    run(out, {}, rows(16))
    torch.distributed.destroy_process_group()


def launched(out: Path, port: int) -> None:
    """What `accelerate launch` starts for several processes, but that they are forks and no new interpreters."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, *_ = config_from_args(parse_args(["--nproc_per_node", "2", "--master_port", str(port), "run.py"]))
    config.start_method = "fork"
    elastic_launch(config, worker)(out)


@pytest.mark.slow
def test_a_launcher(tmp_path: Path) -> None:
    """Its processes are given more than the others here: a store of its own, and how often they were started."""
    launcher = forked.Run(launched, tmp_path, port=forked.free_port())
    assert launcher.codes() == [0], launcher.told()
    left = [torch.load(tmp_path / f"left-{rank}.pt", weights_only=False) for rank in (0, 1)]
    ranks_agree(*left)
