"""Train one policy on preference pairs, or on the same pairs swapped, with TRL's DPO trainer.

Twins are comparable because everything but the labels is the same: base weights, seed, initial adapter, order of rows and
the reference's log-probabilities, which are computed once. What makes them twins is checked while they train.
"""

import copy
import gc
import hashlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from steerkit import storage
from steerkit.errors import AttachError, MissingDependencyError, PolicyError, TrainingError, UnsupportedModelError
from steerkit.model import Fingerprint, find_decoder
from steerkit.preferences.pairs import Pair, Pairs, digest, length_only_accuracy, read_pairs, split, swapped
from steerkit.preferences.sources import Source, read_source

try:
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from peft import LoraConfig, PeftModel
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
except ImportError as error:
    raise MissingDependencyError(
        f"Training needs trl, peft and datasets. Found {error}. Run: pip install 'steerkit-sdk[train]'."
    ) from error

MARK = "steerkit.json"
"""In the folder of a run: which run it is, and its figures once it is done."""

_SETTINGS = [
    "learning_rate",
    "beta",
    "loss_type",
    "label_smoothing",
    "max_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "held_out",
]
"""What makes a run this run and not another."""


@dataclass
class PolicyConfig(DPOConfig):
    """TRL's `DPOConfig` with defaults for twins; every one of its arguments may be given.

    The paper (arXiv:2504.20106, B.1) trains full weights: learning rate 1e-6, 2 epochs, cosine schedule, weight decay .05,
    which cancels in the difference; its beta is not printed, TRL's and Safe-RLHF's is 0.1.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "2e-4 for LoRA and the paper's 1e-6 for full weights, if None."}
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "The paper's."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs a step and device; the paper's."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The paper's."})
    max_length: int | None = field(default=512, metadata={"help": "Tokens of prompt and answer; the paper's."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Less memory for about a third more time; off, other than TRL's."}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "The reference runs once for both twins, not at every step."}
    )
    report_to: str | list[str] = field(default="none", metadata={"help": "Nothing leaves the machine unless asked."})
    logging_steps: float = field(default=1, metadata={"help": "Every step is kept in `Policy.history`."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Where there is a device to copy to."}
    )
    use_peft: bool = field(default=True, metadata={"help": "LoRA; False trains a float32 copy of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's scale is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "0, so that the first loss is log 2."})
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"help": "Modules that get an adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the prompts that are measured and never trained on."}
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = 2e-4 if self.use_peft else 1e-6
        if self.bf16 is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL's default asks for a device that has it; the model's own dtype decides elsewhere
        super().__post_init__()


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained policy: a live model, and what happened in training."""

    model: Any = field(repr=False)
    """A PEFT model around the base's own weights, or a float32 model of its own: nothing of it is the caller's model."""
    figures: Mapping[str, Any]
    """`first_loss`, `steps`, and on held-out pairs `accuracy` (of the implicit reward), `margin`, `length_only`, `pairs`."""
    history: Sequence[Mapping[str, float]] = field(repr=False, default=())
    """What TRL logged at each step: loss, margins, accuracies, log-probabilities."""
    order: Mapping[int, str] = field(repr=False, default_factory=dict)
    """By step, a digest of the prompts that were trained on."""
    settings: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def source(self) -> Source:
        """Return what it holds, for `PreferenceVector.difference`."""
        return read_source(self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PEFT adapter folder, or a folder of weights."""
        self.model.save_pretrained(path)


class References:
    """The reference's log-probabilities of a data set's answers, computed once and read by both twins."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, list[float], list[float]]] = {}
        """By data set: a digest of its prompts, and the log-probabilities of chosen and rejected before any swap."""


class _Trainer(DPOTrainer):
    """TRL's trainer, which also shares the reference, and notes the first loss and the order of rows."""

    args: PolicyConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, references: References, reverse: bool, **kwargs: Any) -> None:
        self.references = references
        self.reverse = reverse
        self.first_loss: float | None = None
        self.order: dict[int, str] = {}
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        prompts = hashlib.sha256(json.dumps(list(dataset["prompt_ids"])).encode()).hexdigest()
        columns = ["ref_chosen_logps", "ref_rejected_logps"]
        if self.reverse:
            columns.reverse()
        if name not in self.references.known:
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            self.references.known[name] = (prompts, *(list(dataset[column]) for column in columns))  # type: ignore[assignment]
            return dataset
        before, *values = self.references.known[name]
        if before != prompts:
            raise TrainingError(f"Twins must see the same prompts in the same order. The {name} prompts differ.")
        for column, value in zip(columns, values, strict=True):
            dataset = dataset.add_column(column, value)
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            step = self.state.global_step
            if step == 0 and self.first_loss is None:
                self.first_loss = float((loss[0] if isinstance(loss, tuple) else loss).detach())
                self._check_first_loss()
            half = len(inputs["input_ids"]) // 2
            in_prompt = (inputs["completion_mask"] == 0) & (inputs["attention_mask"] == 1)
            prompts = (inputs["input_ids"] * in_prompt)[:half].sum(dim=1).tolist()
            text = f"{self.order.get(step, '')} {prompts}"
            self.order[step] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return loss

    def _check_first_loss(self) -> None:
        if list(self.args.loss_type) != ["sigmoid"]:
            return
        low = self.args.bf16 or self.args.fp16 or next(self.model.parameters()).dtype != torch.float32
        tolerance = 0.05 if low else 1e-3
        assert self.first_loss is not None
        if not abs(self.first_loss - math.log(2)) <= tolerance:
            raise TrainingError(
                f"The first loss must be log 2 = {math.log(2):.4f}, because the policy starts as its reference. Found "
                f"{self.first_loss:.4f}. Dropout is on, the reference belongs to other rows, or weights are not finite.",
                found=self.first_loss,
            )


def train_policy(
    model: Any,
    tokenizer: Any,
    pairs: Pairs,
    *,
    config: PolicyConfig | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    reverse: bool = False,
    references: References | None = None,
) -> Policy:
    """Train a policy by DPO: on pairs as they are (theta+), or with both answers exchanged (theta-).

    Preference Vector, arXiv:2504.20106, equation 3. The given model is the reference and is not changed: LoRA is put on a
    second tree of modules around the same weights, full weights are trained on a float32 copy. A folder makes the run
    resumable: the same call after a kill goes on from the last checkpoint (`save_steps`), and returns a finished run as it
    is. Runs under `accelerate launch`.

    Args:
        model: the base model.
        tokenizer: its tokenizer; not changed.
        pairs: `prompt`, `chosen`, `rejected`, strings or conversations: a list of dicts, a `datasets.Dataset`, or the path
            of a JSON-lines or Parquet file.
        config: TRL's arguments; its `output_dir` is not used.
        output_dir: folder for checkpoints, the adapter and the figures; without one nothing is kept on disk.
        reverse: train on the swapped pairs.
        references: log-probabilities of the reference, shared with the other twin.

    Raises:
        PairsError: missing or empty columns, equal answers, nothing to train on.
        TrainingError: the first loss is not log 2; the folder holds another run.
        UnsupportedModelError: a PEFT-wrapped model, or full weights of an offloaded or quantised one.
        AttachError: a Controller is attached to the model.
    """
    config = config or PolicyConfig()
    _check_base(model, config)
    rows = read_pairs(pairs)
    train, held_out = split(rows, config.held_out, config.seed)
    settings = {name: _plain(getattr(config, name)) for name in _SETTINGS}
    run = {
        "pairs": digest(rows),
        "reverse": reverse,
        "base": Fingerprint.of(model).digest,
        "settings": settings,
    }
    folder = None if output_dir is None else Path(output_dir)
    done = None if folder is None else _begin(folder, run)
    base = _around_same_weights(model) if config.use_peft else _float32_copy(model)
    if folder is not None and done is not None:
        return _finished(folder, base, done, config)
    with tempfile.TemporaryDirectory() as scratch, _quiet(), warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        arguments = copy.copy(config)
        arguments.output_dir = str(folder or scratch)
        if folder is None:
            arguments.save_strategy = "no"
        arguments.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()
        trainer = _Trainer(
            references=references or References(),
            reverse=reverse,
            model=base,
            args=arguments,
            train_dataset=_dataset(train, reverse),
            eval_dataset=_dataset(held_out, reverse) if held_out else None,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=_lora(config) if config.use_peft else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if folder is None else _last_checkpoint(folder))
        figures = _figures(trainer)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    policy = Policy(trained, figures, tuple(trainer.state.log_history), dict(trainer.order), settings)
    if folder is not None and trainer.accelerator.is_main_process:
        policy.save(folder)
        _write_mark(folder, {**run, "figures": figures, "history": policy.history, "order": policy.order})
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return policy


def check_twins(towards: Policy, away: Policy) -> None:
    """Raise unless both policies were trained on the same rows in the same order, with the same settings.

    Raises:
        TrainingError: naming the first difference.
    """
    for name in towards.settings:
        if towards.settings[name] != away.settings.get(name):
            raise TrainingError(
                f"Twins must be trained alike. Found {name} = {towards.settings[name]!r} and {away.settings.get(name)!r}."
            )
    for step in sorted(set(towards.order) & set(away.order)):
        if towards.order[step] != away.order[step]:
            raise TrainingError(f"Twins must see the same rows in the same order. They part at step {step}.", step=step)


def _check_base(model: Any, config: PolicyConfig) -> None:
    decoder = find_decoder(model)
    if decoder.model is not model:
        raise UnsupportedModelError(
            f"A policy starts from a plain model. Found {type(model).__name__}. Merge or unload its adapter first."
        )
    if any(key.startswith("_steerkit") for key in model.__dict__):
        raise AttachError("A policy starts from a model at rest. Found a Controller attached. Detach it first.")
    for name, parameter in decoder.parameters.items():
        if parameter.device.type == "meta" or (not config.use_peft and not parameter.is_floating_point()):
            raise UnsupportedModelError(
                f"Training needs the weights in memory, and full training needs them unquantised. Found {name!r} on "
                f"{parameter.device} as {parameter.dtype}. Load the model whole, or use LoRA."
            )


def _around_same_weights(model: nn.Module) -> Any:
    """Return a second tree of modules, with a config and buffers of its own, around the very same weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    return copy.deepcopy(model, memo)


def _float32_copy(model: nn.Module) -> Any:
    """Return a copy in which steps far below the spacing of bfloat16 are not lost."""
    return copy.deepcopy(model).float().requires_grad_(True)


def _lora(config: PolicyConfig) -> LoraConfig:
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def _dataset(pairs: Sequence[Pair], reverse: bool) -> Dataset:
    return Dataset.from_list(swapped(pairs) if reverse else list(pairs))


def _figures(trainer: _Trainer) -> dict[str, Any]:
    figures: dict[str, Any] = {"first_loss": trainer.first_loss, "steps": trainer.state.global_step, "pairs": 0}
    if trainer.eval_dataset is None:
        return figures
    found = trainer.evaluate()
    held_out, train = trainer.eval_dataset, trainer.train_dataset
    lengths = [
        [(len(a), len(b)) for a, b in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        for rows in (train, held_out)
    ]
    return {
        **figures,
        "pairs": len(held_out),
        "accuracy": found["eval_rewards/accuracies"],
        "margin": found["eval_rewards/margins"],
        "length_only": length_only_accuracy(*lengths),
    }


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return list(value) if isinstance(value, list | tuple) else value


def _begin(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make a folder this run's, and return its mark if it is done.

    Raises:
        TrainingError: the folder holds something else.
    """
    mark = folder / MARK
    if mark.exists():
        try:
            found = json.loads(mark.read_text("utf-8"))
            same = {key: found.get(key) for key in run} == json.loads(json.dumps(run))
        except (ValueError, AttributeError) as error:
            raise TrainingError(
                f"{mark} must describe a run. It cannot be read ({error}). Choose another folder."
            ) from error
        if not same:
            differing = sorted(key for key in run if found.get(key) != json.loads(json.dumps(run[key])))
            raise TrainingError(
                f"A folder holds one run. Found another one in {folder}: other {', '.join(differing)}. Choose another folder."
            )
        return found if "figures" in found else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(
            f"A folder for a run must be new or empty. Found {folder} with something in it. Choose another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_mark(folder, run)
    return None


def _write_mark(folder: Path, content: Mapping[str, Any]) -> None:
    storage.write_bytes(folder / MARK, json.dumps(content, indent=1).encode())


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that was written to its end: the trainer's state comes last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _finished(folder: Path, base: Any, done: Mapping[str, Any], config: PolicyConfig) -> Policy:
    if config.use_peft:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            trained = PeftModel.from_pretrained(base, folder)
    else:
        source = read_source(folder)
        assert source.get is not None
        parameters = dict(base.named_parameters())
        if set(parameters) != set(source.shapes):
            raise PolicyError(f"{folder} must hold the weights of this model. Found others. Choose another folder.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(source.get(name))
        trained = base
    order = {int(step): text for step, text in done["order"].items()}
    return Policy(trained.eval(), done["figures"], done["history"], order, done["settings"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the bars of data preparation where nobody watches."""
    watched = sys.stderr.isatty() or not is_progress_bar_enabled()
    before = os.environ.get("TQDM_DISABLE")
    if not watched:
        disable_progress_bar()
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if not watched:
            enable_progress_bar()
            if before is None:
                os.environ.pop("TQDM_DISABLE", None)
            else:
                os.environ["TQDM_DISABLE"] = before
