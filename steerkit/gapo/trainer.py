"""GAPO on TRL's GRPO trainer: a few overrides that call it, so that everything else stays TRL's."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from steerkit.errors import MissingDependencyError, ObjectiveError, RewardError, SteerkitWarning, TrainingError
from steerkit.gapo.balance import Balance, BalanceConfig, Update, no_loss, reduced
from steerkit.gapo.gradients import Forward, Gradients, last_output, pull, scope_of
from steerkit.gapo.rewards import checked, objective_advantages
from steerkit.model import around_same_weights

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise MissingDependencyError(
        f"Training needs trl, peft and datasets. Found {error}. Run: pip install 'steerkit-sdk[train]'."
    ) from error

_MODES = ("two_pass", "exact")


@dataclass
class GAPOConfig(BalanceConfig, GRPOConfig):  # type: ignore[misc]
    """TRL's `GRPOConfig` with what GAPO adds; every one of its arguments may be given.

    `reward_weights` are the weights of the linear update. `gram_scope` is by default the last block, as in the paper, in two
    passes, and everything that is trained in exact mode.
    """

    gram_mode: str = field(
        default="two_pass",
        metadata={
            "help": "'two_pass': weights from the gradients in `gram_scope`, then one ordinary step with re-weighted "
            "advantages; 'exact': the weighted sum of all gradients is the step."
        },
    )
    kl_inside_objectives: bool = field(
        default=True,
        metadata={
            "help": "KL (and an entropy bonus) belongs to each objective, as in the paper; False adds it once, outside: then "
            "no descent is promised for the penalised objectives."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Each objective's advantages are centred in the group; 'group' or 'batch' divides them by their deviation "
            "too, which is most of what p = 1 does."
        },
    )

    def __post_init__(self) -> None:
        self.check_balance(("gapo", "mgda", "linear", "gdpo"))
        self.check_distribution(self)
        if self.gram_mode not in _MODES:
            raise ObjectiveError(f"gram_mode must be one of {', '.join(_MODES)}. Found {self.gram_mode!r}.")
        if self.weighting == "gdpo":
            self.multi_objective_aggregation = "normalize_then_sum"
        elif self.multi_objective_aggregation != "sum_then_normalize":
            raise ObjectiveError(
                "Rewards are combined by their gradients, not by multi_objective_aggregation. Found "
                f"{self.multi_objective_aggregation!r}. For TRL's normalise-then-sum give weighting='gdpo'."
            )
        if self.gram_scope is None:
            self.gram_scope = "last_block" if self.gram_mode == "two_pass" else "trainable"
        if self.bf16 is None and not torch.cuda.is_available():
            self.bf16 = False
        super().__post_init__()
        self._refuse()

    def _refuse(self) -> None:
        """Raise for what would break a promise of the method."""
        if self.ddp_broadcast_buffers:
            raise TrainingError(
                "Processes run as many forward passes as their samples have halves, so none may wait for the others in each. "
                "Found ddp_broadcast_buffers=True. Leave it out."
            )
        self.ddp_broadcast_buffers = False
        if self.use_adaptive_entropy:
            raise TrainingError(
                "The adaptive entropy coefficient counts each pass of the loss. Found use_adaptive_entropy=True. Use entropy_coef."
            )
        assert self.steps_per_generation is not None
        block = self.steps_per_generation * self.num_iterations
        accumulation = self.gradient_accumulation_steps
        if self.gram_mode == "two_pass" and self.steps_per_generation % accumulation:
            raise TrainingError(
                "Two passes read a whole optimiser step before it is made: steps_per_generation must be a multiple of "
                f"gradient_accumulation_steps. Found {self.steps_per_generation} and {accumulation}. Use gram_mode='exact'."
            )
        if self.save_strategy == "best":
            raise TrainingError(
                "The best checkpoint may fall into a generation block. Found save_strategy='best'. Use 'steps'."
            )
        steps = self.save_steps
        if self.save_strategy == "steps" and (steps < 1 or (int(steps) * accumulation) % block):
            raise TrainingError(
                "A checkpoint must fall on the end of a generation block: TRL does not save the completions of a block in "
                f"progress, so that a resumed run would differ. A block is {block} micro-batches, a step {accumulation}. Found "
                f"save_steps={steps}. Set it to a multiple of {block // math.gcd(block, accumulation)}."
            )


class GAPOTrainer(GRPOTrainer):
    """Group-relative policy optimisation of several rewards, balanced by their gradients.

    GAPO, arXiv:2507.01915, section 3: with `g_k` the gradient of objective k and `n_k` its norm,

        alpha = argmin over the simplex of || sum_k alpha_k g_k / n_k^p ||^2 ,    d = c sum_k (alpha_k / n_k^p) g_k

    and with `preference` P-GAPO, `d = c sum_k lambda_k g_k / n_k` (equation 8). The paper has c = 1, with which the length of
    the update depends on p; by default `c` makes the weighted sum of the lengths n_k that of the linear update, so that the
    learning rate and clipping mean the same for every p, and conflict still shortens the step (`rescale`).

    That d opposes no objective is a statement about the gradients in `gram_scope`, on the samples of the step, before the
    optimiser scales each coordinate; P-GAPO states nothing of the kind. KL inside the objectives has the coefficient beta
    times the sum of the weights, for `weighting="linear"` beta times the sum of `reward_weights`.

    The paper rescales the gradients of PPO's clipped surrogates, with one critic for each reward. TRL has removed PPO; here
    an objective is GRPO's surrogate with the advantages of its own reward, centred within the group of completions of one
    prompt. The group's mean stands in for the critic: no critic to train, and a reward that is alike for all completions of
    a prompt has no gradient there. Advantages are not divided by their deviation, which would undo what the norms tell.

    Two modes. `two_pass` (default, because it costs next to nothing and its weights are near the exact ones:
    docs/evidence.md) takes the gradients over the last block, as in the paper, and makes one ordinary step
    with advantages `sum_k w_k A_k`: on the policy that generated them, the same as the weighted sum of losses. `exact`
    takes K gradients of everything that is trained, summed over the optimiser step, and steps along their weighted sum;
    it is what remains right when completions are used after the policy has moved (`num_iterations` above 1, or
    `steps_per_generation` above the accumulation), where the clip is not linear in the advantages.

    Like every Trainer it trains the model that it is given; with `peft_config` it trains an adapter on a second tree of
    modules around the same weights, and the given model stays as it is. The policy is `trainer.model`;
    `PreferenceVector.difference(trainer.model, model, name="mine")` makes it a vector.

    Logged each step, beside TRL's figures: `gapo/weight`, `norm`, `progress` (`<d, g_k>`), `signal` (cosine of an objective's
    gradients over two halves of the samples) and `dropped` for each objective, `cosine` for each pair, `norm_ratio`,
    `update_norm`, `opposed` (the update opposes an objective), `no_step`. They are of the objectives' part of the update; KL that
    is kept outside comes on top.

    Args:
        model: a causal language model, a PEFT model, or a name, as TRL takes them.
        reward_funcs: the objectives, as TRL takes them: functions, async functions, sequence classifiers; None in what they
            return means not applicable.
        args: `GAPOConfig`.
        train_dataset: rows with `prompt`.
        processing_class: the tokenizer; not changed.
        peft_config: adapter to train.
        given: TRL's other arguments.

    Raises:
        ObjectiveError: a preference of another length than there are rewards; no trainable parameter in the scope.
        RewardError: during training: a reward function raised, or returned something else than one finite number (or None)
            for each completion.
        TrainingError: a distribution or setting under which the gradients cannot be had.
    """

    _tag_names = ["steerkit", "gapo"]  # noqa: RUF012
    _name = "GAPO"

    args: GAPOConfig
    model: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GAPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        **given: Any,
    ) -> None:
        args = args or GAPOConfig("gapo")
        if not isinstance(args, GAPOConfig):
            raise TrainingError(f"A GAPOConfig is required. Found {type(args).__name__}. It takes the same arguments.")
        objectives = (
            list(reward_funcs)
            if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            else [reward_funcs]
        )
        args.check_count(len(objectives))
        if args.beta and isinstance(model, nn.Module) and peft_config is None and not hasattr(model, "peft_config"):
            _check_reference(model)
        self._window: Gradients | None = None
        self._update: Update | None = None
        self._forward: Forward | None = None
        with warnings.catch_warnings():
            # PEFT asks for an attribute that transformers has deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            super().__init__(
                model=around_same_weights(model) if peft_config is not None and isinstance(model, nn.Module) else model,
                reward_funcs=objectives,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=copy.deepcopy(processing_class),
                peft_config=peft_config,
                **given,
            )
        self.reward_funcs = [
            checked(each, name) if callable(each) and not isinstance(each, nn.Module) else each
            for each, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self.objectives = _distinct(self.reward_func_names)
        """Names under which the objectives are logged, by TRL too."""
        self.reward_func_names = self.objectives
        if len(self.objectives) == 1:
            warnings.warn(
                f"One objective, {self.objectives[0]!r}: there is nothing to balance. This is plain GRPO.",
                SteerkitWarning,
                stacklevel=2,
            )
        if args.gram_mode == "exact" and self.aux_loss_enabled:
            raise TrainingError("Exact mode has no place for a router's loss. Found one. Use gram_mode='two_pass'.")
        scope = scope_of(self.model, str(args.gram_scope))
        everything = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self._measured = everything if args.gram_mode == "exact" else scope
        self._scope = frozenset(scope)
        self._balance = Balance(args, tuple(self.reward_weights.double().tolist()), tuple(self.objectives))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; what an interrupted run left of a step is forgotten."""
        self._window = self._update = self._forward = None
        return super().train(*args, **kwargs)

    # Rewards and advantages

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for index, each in enumerate(self.reward_funcs):
            found = rewards[:, index]
            if isinstance(each, nn.Module) and not bool(found.isfinite().all()):
                raise RewardError(
                    f"A reward must be finite. Found {float(found[~found.isfinite()][0])} from {self.objectives[index]!r}."
                )
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training:
            assert self.num_generations is not None
            advantages = objective_advantages(self._rewards, self.num_generations, self.scale_rewards)
            rows = torch.arange(len(advantages), device=advantages.device)
            groups = rows // self.num_generations
            # Halves hold whole groups where there are two: the group's mean ties its completions together.
            half = (groups if int(groups[-1]) > 0 else rows) % 2
            own = slice(
                self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs)
            )
            output["objective_advantages"] = advantages[own]
            output["half"] = half[own]
        return output

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _Epochs(super()._get_train_sampler(dataset))

    # The loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training or len(self.objectives) == 1:
            return super()._compute_loss(model, inputs)
        if self.args.gram_mode == "exact":
            return self._exact(model, inputs)
        if self._update is None:
            self._update = self._look_ahead(model, inputs)
        update, forward = self._update, self._forward
        if self.accelerator.sync_gradients:
            self._update = None
        outside = self._regularised and not self.args.kl_inside_objectives
        if not update.step and not outside:
            self._forward = None
            return no_loss(self.accelerator.device)
        forward = forward or Forward(inputs["half"])
        if self.args.weighting == "gdpo":
            return self._loss(model, inputs, inputs["advantages"], forward)
        weights = torch.tensor(update.applied, device=self.accelerator.device, dtype=torch.float32)
        # The loss is homogeneous: this gives KL and entropy bonus the sum of the weights, too.
        whole = weights.sum() if self._regularised and not outside else weights.new_ones(())
        loss = whole * self._loss(model, inputs, inputs["objective_advantages"] @ (weights / whole), forward)
        if self.aux_loss_enabled:  # a router's loss is no objective's
            aux = self.router_aux_loss_coef * forward.aux / self.current_gradient_accumulation_steps
            loss = loss + (1 - whole) * aux
        return loss

    @property
    def _regularised(self) -> bool:
        return self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled

    def _look_ahead(self, model: Any, inputs: dict[str, Any]) -> Update:
        """Return the weights for the optimiser step that begins here; its completions exist already."""
        count = self.current_gradient_accumulation_steps
        if count == 1:
            batches = [inputs]
        else:
            assert self._buffered_inputs is not None
            assert self.args.steps_per_generation is not None
            start = self._step % self.args.steps_per_generation
            batches = self._buffered_inputs[start : start + count]
        gradients = Gradients(self._measured, self._scope, self._gradients)
        for batch in batches:
            forward = self._add(gradients, model, batch)
            if count == 1:
                self._forward = forward
        return self._solve(gradients)

    def _exact(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._window is None:
            self._window = Gradients(self._measured, self._scope, self._gradients)
        forward = self._add(self._window, model, inputs)
        with torch.no_grad():
            loss = self._loss(model, inputs, inputs["advantages"], forward)
        if self.accelerator.sync_gradients:
            update = self._solve(self._window)
            outside = [1.0] if self._regularised and not self.args.kl_inside_objectives else []
            if update.step or outside:
                gdpo = self.args.weighting == "gdpo"
                weights = [0.0] * len(update.weights) if gdpo else list(update.applied)
                self._window.write([*weights, *([float(update.step)] if gdpo else []), *outside])
            self._window = None
        # The gradients are in place; what goes back to the Trainer leads nowhere.
        return no_loss(self.accelerator.device) + loss.detach()

    def _loss(self, model: Any, inputs: dict[str, Any], advantages: Tensor, forward: Forward | None) -> Tensor:
        """Return TRL's loss of these advantages, on a forward pass that has been made."""
        self._forward = forward
        try:
            return super()._compute_loss(model, {**inputs, "advantages": advantages})
        finally:
            self._forward = None

    # Gradients

    @property
    def _gradients(self) -> int:
        return (
            len(self.objectives)
            + (self.args.weighting == "gdpo")
            + (self._regularised and not self.args.kl_inside_objectives)
        )

    def _add(self, gradients: Gradients, model: Any, inputs: dict[str, Any]) -> Forward:
        """Add the gradients of one micro-batch, by objective; then TRL's own advantages, then what stays outside."""
        forward = Forward(inputs["half"])
        with last_output(self.model, self._measured) as seen, self._unlogged():
            forward.seen = seen
            self._loss(model, inputs, inputs["advantages"], forward)
        forward.seen = None
        advantages = [*inputs["objective_advantages"].unbind(1)]
        signal = torch.stack(advantages).abs().double().sum(1).cpu()
        gradients.signal = signal if gradients.signal is None else gradients.signal + signal
        if self.args.weighting == "gdpo":
            advantages.append(inputs["advantages"])
        cotangents = [self._cotangent(model, inputs, each, forward) for each in advantages]
        if self._regularised and not self.args.kl_inside_objectives:
            nothing = torch.zeros_like(inputs["advantages"])
            outside = self._cotangent(model, inputs, nothing, forward)
            cotangents = [_minus(each, outside) for each in cotangents] + [outside]
        parameters = list(self._measured.values())
        for made in forward.passes:
            half_of = inputs["half"][made.rows]
            for half in half_of.unique().tolist():
                own = (half_of == half)[:, None]
                gradients.rows[half] += int(own.sum())
                ours = [
                    (logps[made.rows] * own, None if entropies is None else entropies[made.rows] * own)
                    for logps, entropies in cotangents
                ]
                for index, gradient in enumerate(pull(made, ours, parameters)):
                    gradients.put(half, index, gradient)
        return forward

    def _cotangent(
        self, model: Any, inputs: dict[str, Any], advantages: Tensor, forward: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the loss of these advantages does with each log-probability and each entropy."""
        leaves = forward.leaves()
        with self._unlogged():
            loss = self._loss(model, inputs, advantages, leaves)
        assert leaves.logps is not None
        over_logps, over_entropies = torch.autograd.grad(
            loss, [leaves.logps, leaves.entropies], allow_unused=True, materialize_grads=False
        )
        return torch.zeros_like(leaves.logps) if over_logps is None else over_logps, over_entropies

    def _solve(self, gradients: Gradients) -> Update:
        """Return the weights of the step, the same on every process, and log what they are made of."""
        reduced(gradients, self.accelerator)
        assert gradients.signal is not None
        own = len(self.objectives) if self.args.weighting == "gdpo" else None
        update = self._balance.update(gradients, (gradients.signal[: len(self.objectives)] == 0).tolist(), own)
        for name, value in update.figures(self.objectives).items():
            self._metrics["train"][name].append(value)
        return update

    # One forward pass for all objectives

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        compute = super()._get_per_token_logps_and_entropies
        if self._forward is None:
            return compute(model, input_ids, attention_mask, *args, **kwargs)
        if self._forward.logps is None:
            self._forward.make(
                lambda rows: compute(model, input_ids[rows], attention_mask[rows], *args, **kwargs),
                # A router's loss is of the whole batch, and so are the tensors of images.
                whole=self.aux_loss_enabled or any(v is not None for key, v in kwargs.items() if key not in _PLAIN),
            )
        return self._forward.logps, self._forward.entropies, self._forward.aux

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Leave what TRL logs in a pass of its loss out of its averages: it would count each objective."""
        logged = self._metrics
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics = logged


class _Epochs(Sampler[int]):
    """TRL's order of prompts, drawn for each epoch by its number: TRL draws on, and a resumed run would begin anew."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; that of the first is TRL's."""
        if self.order.shuffle and self.order.seed is not None:
            self.order.generator.manual_seed(self.order.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


_PLAIN = ("compute_entropy", "compute_aux_loss", "batch_size")
"""Arguments of a forward pass that are no tensors of the batch."""


def _minus(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    entropies = one[1] if other[1] is None or one[1] is None else one[1] - other[1]
    return one[0] - other[0], entropies


def _check_reference(model: nn.Module) -> None:
    name = str(getattr(model.config, "_name_or_path", ""))
    if not name:
        raise TrainingError(
            "With beta above 0 and full weights, TRL loads the reference anew by the model's name. Found a model without one. "
            "Load it from a folder or hub, train an adapter (peft_config), or set beta=0."
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names with a number where one comes twice."""
    seen: Mapping[str, int] = {name: list(names).count(name) for name in names}
    return [f"{name}_{index}" if seen[name] > 1 else name for index, name in enumerate(names)]
