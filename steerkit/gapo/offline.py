"""GAPO without rollouts: one preference data set for each objective, on TRL's DPO trainer."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from steerkit.errors import MissingDependencyError, ObjectiveError, TrainingError
from steerkit.gapo.balance import Balance, BalanceConfig, no_loss, reduced
from steerkit.gapo.gradients import Gradients, scope_of
from steerkit.model import around_same_weights

try:
    from datasets import Dataset, concatenate_datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
except ImportError as error:
    raise MissingDependencyError(
        f"Training needs trl, peft and datasets. Found {error}. Run: pip install 'steerkit-sdk[train]'."
    ) from error

_COLUMN = "objective"


@dataclass
class GAPODPOConfig(BalanceConfig, DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig` with what GAPO adds. `gradient_accumulation_steps` counts the batches of each objective."""

    objective_weights: list[float] | None = field(
        default=None, metadata={"help": "Of the linear update; equal shares of 1 by default."}
    )
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "The reference runs once, and no second model is needed."}
    )

    def __post_init__(self) -> None:
        self.check_balance(("gapo", "mgda", "linear"))
        self.check_distribution(self)
        self.gram_scope = self.gram_scope or "trainable"
        if self.bf16 is None and not torch.cuda.is_available():
            self.bf16 = False
        super().__post_init__()


class GAPODPOTrainer(DPOTrainer):
    """Direct preference optimisation of several objectives, each with its own pairs, balanced by their gradients.

    GAPO (arXiv:2507.01915) with the DPO loss of each data set in the place of a reward:

        g_k = gradient of  E_(x, y+, y-) in D_k  -log sigmoid(beta (log-ratio(y+) - log-ratio(y-)))
        d   = sum_k w_k g_k ,  w from the Gramian of all that is trained

    The batches of an optimiser step belong to one objective each, in turn: a step costs the time of one of TRL's with as many
    batches, and the memory of K gradients for each of two halves and of their sums. Smaller data sets are gone through more
    than once in an epoch of the largest.

    Like every Trainer it trains the model that it is given; with `peft_config` an adapter on a second tree of modules
    around the same weights. Logged as by `GAPOTrainer`; the signal needs two batches of each objective
    (`gradient_accumulation_steps`).

    Args:
        model: a causal language model.
        objectives: pairs by name: `prompt`, `chosen`, `rejected`, as a list of dicts or a `datasets.Dataset`.
        args: `GAPODPOConfig`.
        processing_class: the tokenizer; not changed.
        peft_config: adapter to train.
        given: TRL's other arguments.

    Raises:
        ObjectiveError: no objectives, no pairs, or weights or a preference of another number.
        TrainingError: by the config, for DeepSpeed, FSDP or fp16.
    """

    args: GAPODPOConfig
    model: Any

    def __init__(
        self,
        model: Any,
        objectives: Mapping[str, Any],
        args: GAPODPOConfig | None = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        **given: Any,
    ) -> None:
        args = copy.copy(args or GAPODPOConfig("gapo-dpo"))
        if not isinstance(args, GAPODPOConfig):
            raise TrainingError(
                f"A GAPODPOConfig is required. Found {type(args).__name__}. It takes the same arguments."
            )
        if args.gram_estimate == "split_half" and args.gradient_accumulation_steps < 2:
            raise ObjectiveError(
                "Halves need two batches of each objective. Found gradient_accumulation_steps=1. Set it to 2 or more."
            )
        names, count = list(objectives), len(objectives)
        args.check_count(count)
        if args.objective_weights is not None and len(args.objective_weights) != count:
            raise ObjectiveError(
                f"objective_weights needs one number for each of {count}. Found {args.objective_weights}."
            )
        rows = [
            _rows(name, pairs).add_column(_COLUMN, [k] * len(pairs))
            for k, (name, pairs) in enumerate(objectives.items())
        ]
        if not rows:
            raise ObjectiveError("An objective needs a name and its pairs. Found none.")
        self._batches = args.gradient_accumulation_steps
        args.gradient_accumulation_steps *= count
        self.objectives = names
        self._micro = 0
        self._window: Gradients | None = None
        with warnings.catch_warnings():
            # PEFT asks for an attribute that transformers has deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            super().__init__(
                model=around_same_weights(model) if peft_config is not None and isinstance(model, nn.Module) else model,
                args=args,
                train_dataset=concatenate_datasets(rows),
                processing_class=copy.deepcopy(processing_class),
                peft_config=peft_config,
                **given,
            )
        scope = scope_of(self.model, str(args.gram_scope))
        self._trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self._scope = frozenset(scope)
        self._balance = Balance(args, tuple(args.objective_weights or [1 / count] * count), tuple(names))
        left: Any = self.train_dataset
        for index, name in enumerate(names):
            if index not in set(left[_COLUMN]):
                raise ObjectiveError(
                    f"An objective needs pairs whose prompt leaves room for an answer. Found none for {name!r} under "
                    f"max_length={args.max_length}. Raise it."
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; what an interrupted run left of a step is forgotten."""
        self._window = None
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset  # the argument has lost the columns that the model does not read
        at_once = self.args.per_device_train_batch_size * self.accelerator.num_processes * self._batches
        return InTurn(
            list(rows[_COLUMN]), at_once, self.args.seed if self.args.data_seed is None else self.args.data_seed
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training or return_outputs:
            return found
        loss: Tensor = found
        if self._window is None:
            self._window, self._micro = Gradients(self._trained, self._scope, len(self.objectives)), 0
        objective, batch = divmod(self._micro, self._batches)
        self._micro += 1
        parameters = list(self._trained.values())
        gradient = torch.autograd.grad(loss / self._batches, parameters, allow_unused=True)
        self._window.put(batch % 2, objective, gradient)
        self._window.rows[batch % 2] += 1
        if self.accelerator.sync_gradients:
            update = self._balance.update(reduced(self._window, self.accelerator))
            if update.step:
                self._window.write(update.weights)
            for name, value in update.figures(self.objectives).items():
                self._metrics["train"][name].append(value)
            self._window = None
        # The gradients are in place; what goes back to the Trainer leads nowhere.
        return no_loss(loss.device) + loss.detach()


class InTurn(Sampler[int]):
    """Rows of each objective in turn, so many at once; every epoch in another order.

    An epoch goes through the largest objective once, in whole turns, and through the others as often as that takes.
    """

    def __init__(self, objective: Sequence[int], at_once: int, seed: int) -> None:
        self.rows = [[i for i, k in enumerate(objective) if k == each] for each in sorted(set(objective))]
        self.at_once, self.seed, self.epoch = at_once, seed, 0
        self.turns = max(1, max(map(len, self.rows)) // at_once)

    def __len__(self) -> int:
        return self.turns * self.at_once * len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self.seed + self.epoch)
        orders = []
        for rows in self.rows:
            passes = math.ceil(self.turns * self.at_once / len(rows))
            orders.append([rows[i] for _ in range(passes) for i in torch.randperm(len(rows), generator=dice).tolist()])
        for turn in range(self.turns):
            for order in orders:
                yield from order[turn * self.at_once : (turn + 1) * self.at_once]


def _rows(name: str, pairs: Any) -> Any:
    rows = pairs if isinstance(pairs, Dataset) else Dataset.from_list([dict(pair) for pair in pairs])
    missing = [column for column in ("prompt", "chosen", "rejected") if column not in rows.column_names]
    if missing or not len(rows):
        raise ObjectiveError(
            f"An objective needs pairs with prompt, chosen and rejected. Found {len(rows)} pairs"
            + (f" without {', '.join(missing)}" if missing else "")
            + f" for {name!r}."
        )
    return rows.select_columns(["prompt", "chosen", "rejected"])
