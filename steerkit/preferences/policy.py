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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback

from steerkit import storage
from steerkit.activations import tokenise
from steerkit.errors import (
    AttachError,
    MissingDependencyError,
    PairsError,
    PolicyError,
    SteerkitError,
    SteerkitWarning,
    TrainingError,
    UnsupportedModelError,
)
from steerkit.model import Fingerprint, around_same_weights, find_decoder
from steerkit.preferences.pairs import Pair, Pairs, digest, length_only_accuracy, read_pairs, split, swapped
from steerkit.preferences.sources import Source, read_source

try:
    from accelerate.utils import gather_object
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
    "max_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "use_rslora",
    "held_out",
]
"""What a vector's file tells of how it was trained."""

_ELSEWHERE = (
    "output_dir",
    "run_name",
    "logging",
    "save_",
    "report_to",
    "disable_tqdm",
    "log_",
    "hub_",
    "push_",
    "project",
)
"""How the names of arguments begin that decide nothing about the weights."""

_STEPS = "steerkit_steps_{rank}.json"
"""Beside a checkpoint: the first loss and the order of rows so far."""


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
        """By data set: a digest of its rows, and the log-probabilities of chosen and rejected before any swap."""


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
        sides = ["chosen", "rejected"][:: -1 if self.reverse else 1]
        texts = [list(dataset[column]) for column in ("prompt_ids", *(f"{side}_ids" for side in sides))]
        rows = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        if name not in self.references.known:
            first, second = self._reference(dataset, batch_size, sides)
            self.references.known[name] = (rows, first, second)
        before, *values = self.references.known[name]
        if before != rows:
            raise TrainingError(
                f"Twins must see the same prompts and answers in the same order. Those of the {name} data differ."
            )
        for side, value in zip(sides, values, strict=True):
            dataset = dataset.add_column(f"ref_{side}_logps", value)
        return dataset

    def _reference(self, dataset: Dataset, batch_size: int, sides: Sequence[str]) -> list[list[float]]:
        """Return the reference's log-probabilities by side; each process reads all rows, in one order."""
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        found: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for batch in tqdm(loader, desc="reference", unit="batch", disable=self.args.disable_tqdm):
            batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            pair = self.compute_ref_log_probs(self.ref_model or self.model, batch)
            for side, values in zip(("chosen", "rejected"), pair, strict=True):
                found[side].extend(values.float().tolist())
        return [found[side] for side in sides]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"first_loss": self.first_loss, "order": self.order}
        (folder / _STEPS.format(rank=self.args.process_index)).write_text(json.dumps(content), "utf-8")
        super()._save_checkpoint(model, trial)

    def resume(self, checkpoint: str) -> None:
        """Take up what was noted until a checkpoint."""
        file = Path(checkpoint) / _STEPS.format(rank=self.args.process_index)
        if file.exists():
            content = json.loads(file.read_text("utf-8"))
            self.first_loss = content["first_loss"]
            self.order = {int(step): text for step, text in content["order"].items()}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            step = self.state.global_step
            if step == 0 and self.first_loss is None:
                own = (loss[0] if isinstance(loss, tuple) else loss).detach()
                self.first_loss = float(self.accelerator.gather(own.reshape(1)).mean())
                self._check_first_loss()
            half = len(inputs["input_ids"]) // 2
            in_prompt = (inputs["completion_mask"] == 0) & (inputs["attention_mask"] == 1)
            prompts = (inputs["input_ids"] * in_prompt)[:half].sum(dim=1).tolist()
            text = f"{self.order.get(step, '')} {prompts}"
            self.order[step] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return loss

    def _check_first_loss(self) -> None:
        other = self.args.loss_weights or self.args.use_weighting or self.aux_loss_enabled
        if list(self.args.loss_type) != ["sigmoid"] or other:
            return  # log 2 is the sigmoid loss of a margin of 0, and of nothing else
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
            of a JSON-lines or Parquet file. Strings are joined as they are (an answer brings its own leading space);
            for a chat model pass the prompt as messages, and its template is applied.
        config: TRL's arguments; its `output_dir` is not used.
        output_dir: folder for checkpoints, the adapter and the figures; without one nothing is kept on disk.
        reverse: train on the swapped pairs.
        references: log-probabilities of the reference, shared with the other twin.

    Raises:
        PairsError: missing or empty columns, equal answers, nothing to train on.
        TextsError: conversations, and a tokenizer without a chat template.
        TrainingError: the first loss is not log 2; the folder holds another run; TRL refuses the arguments.
        UnsupportedModelError: a PEFT-wrapped model, or full weights of an offloaded or quantised one.
        AttachError: a Controller is attached to the model.
    """
    config = config or PolicyConfig()
    _check_base(model, config)
    rows = _fitting(read_pairs(pairs), tokenizer, config.max_length)
    train, held_out = split(rows, config.held_out, config.seed)
    run = _run(model, tokenizer, rows, config, reverse)
    folder = None if output_dir is None else Path(output_dir)
    with config.main_process_first(local=False, desc="the run's folder"):
        done = None if folder is None else _begin(folder, run)
    base = around_same_weights(model) if config.use_peft else _float32_copy(model)
    if folder is not None and done is not None:
        return _finished(folder, base, done, config)
    with tempfile.TemporaryDirectory() as scratch, _quiet(), warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        # It sets what it warns of by itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        arguments = copy.copy(config)
        arguments.output_dir = str(folder or scratch)
        if folder is None:
            arguments.save_strategy = "no"
        arguments.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()
        arguments.precompute_ref_log_probs = True
        try:
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
        except (ValueError, NotImplementedError, ImportError) as error:
            if isinstance(error, SteerkitError):
                raise
            raise TrainingError(f"TRL refuses these arguments: {str(error).splitlines()[0]}") from error
        trainer.remove_callback(PrinterCallback)
        checkpoint = None if folder is None else _last_checkpoint(folder)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        figures = _figures(trainer)
        orders = gather_object([dict(trainer.order)])
    order = orders[0] if len(orders) == 1 else {step: str([each.get(step) for each in orders]) for step in orders[0]}
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    policy = Policy(trained, figures, tuple(trainer.state.log_history), order, run["settings"])
    if folder is not None and trainer.accelerator.is_main_process:
        policy.save(folder)
        _write_mark(folder, {**run, "figures": figures, "history": policy.history, "order": order})
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


def _fitting(pairs: Sequence[Pair], tokenizer: Any, max_length: int | None) -> list[Pair]:
    """Return the pairs whose prompt leaves room for an answer; TRL would drop the others without a word.

    Raises:
        PairsError: none of them does.
        TextsError: conversations, and a tokenizer without a chat template.
    """
    lengths = [len(ids) for ids in tokenise(tokenizer, [pair["prompt"] for pair in pairs])]
    kept = [pair for pair, length in zip(pairs, lengths, strict=True) if max_length is None or length < max_length]
    if not kept:
        raise PairsError(
            f"Prompts must be shorter than max_length={max_length} tokens. Found {min(lengths)} in the shortest. Raise it."
        )
    if len(kept) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(kept)} of {len(pairs)} pairs are left out: their prompts alone have max_length={max_length} "
            "tokens or more.",
            SteerkitWarning,
            stacklevel=3,
        )
    return kept


def _run(model: Any, tokenizer: Any, pairs: Sequence[Pair], config: PolicyConfig, reverse: bool) -> dict[str, Any]:
    """Return what makes a run this run and not another."""
    fingerprint = Fingerprint.of(model)
    everything = config.to_dict()
    settings = {name: _plain(getattr(config, name)) for name in _SETTINGS}
    others = {n: value for n, value in everything.items() if n not in _SETTINGS and not n.startswith(_ELSEWHERE)}
    vocabulary = [tokenizer.chat_template, sorted(tokenizer.get_vocab().items())]

    def short(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    return {
        "pairs": digest(pairs),
        "reverse": reverse,
        "base": [fingerprint.digest, short(fingerprint.values.tolist())],
        "tokenizer": short(vocabulary),
        "settings": settings,
        "arguments": short(others),
        "processes": config.world_size,
    }


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


def _float32_copy(model: nn.Module) -> Any:
    """Return a copy in which steps far below the spacing of bfloat16 are not lost."""
    return copy.deepcopy(model).float().requires_grad_(True)


def _lora(config: PolicyConfig) -> LoraConfig:
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
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
