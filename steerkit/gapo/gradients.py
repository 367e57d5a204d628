"""Gradients of several objectives from one forward pass, their Gramian, and the update that is made of them.

All objectives read the same log-probabilities, so their gradients differ by a cotangent c_k for each token only. Where
every parameter asked for lies inside the decoder blocks, the vocabulary is passed once for all of them: a token's
log-probability depends on its own position of the last block's output y alone, hence

    v_t = d logp_t / d y_t        once
    g_k = (d y / d theta)^T (c_k v)    for each objective
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ObjectiveError, UnsupportedModelError
from steerkit.maths.pareto import positive_part
from steerkit.model import find_decoder, hidden_states_of

SCOPES = ("trainable", "lora", "last_block")
_STATIONARY = 1e-6
"""Length of the update, relative to what it is summed from, under which it is rounding."""


def scope_of(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that the Gramian is taken over.

    Args:
        model: the policy, in whatever wrappers.
        scope: `"trainable"`: all of them; `"lora"`: those of LoRA; `"last_block"`: those of the last decoder block, as in
            the paper; or a regular expression that is searched for in their names.

    Raises:
        ObjectiveError: no trainable parameter is in the scope.
    """
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if scope == "last_block":
        last = {id(each) for each in find_decoder(model).blocks[-1].parameters()}
        chosen = {name: each for name, each in trainable.items() if id(each) in last}
    elif scope == "trainable":
        chosen = trainable
    else:
        try:
            pattern = re.compile(r"\.lora_" if scope == "lora" else scope)
        except re.error as error:
            raise ObjectiveError(
                f"A scope that is a pattern must be a regular expression. Found {scope!r}: {error}."
            ) from error
        chosen = {name: each for name, each in trainable.items() if pattern.search(name)}
    if not chosen:
        raise ObjectiveError(
            f"A scope needs a trainable parameter to measure gradients on. Found none in {scope!r} among {len(trainable)}"
            + (f", such as {next(iter(trainable))!r}." if trainable else ".")
            + f" Use one of {', '.join(map(repr, SCOPES))} or a pattern that matches.",
            scope=scope,
        )
    return chosen


@dataclass
class Pass:
    """What one forward pass over some rows of a batch left for its backward passes."""

    rows: Tensor
    """Indices of its rows in the batch."""
    logps: Tensor
    """`"row token"`, log-probabilities of the completions."""
    entropies: Tensor | None
    """`"row token"`"""
    last: Tensor | None
    """`"row position d_model"`, output of the last block; None where the vocabulary must be passed each time."""


@contextmanager
def last_output(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[list[Tensor]]:
    """Collect the last block's output in each forward pass, if all of these parameters lie in decoder blocks."""
    seen: list[Tensor] = []
    try:
        decoder = find_decoder(model)
    except UnsupportedModelError:
        yield seen  # to be trained, a model need not be one that can be steered
        return
    inside = {id(each) for each in decoder.blocks.parameters()}
    if not all(id(each) in inside for each in parameters.values()):
        yield seen
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = hidden_states_of(output)
        if hidden is not None and hidden.requires_grad:
            seen.append(hidden)

    handle = decoder.blocks[-1].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def pull(
    made: Pass, cotangents: Sequence[tuple[Tensor, Tensor | None]], parameters: Sequence[nn.Parameter]
) -> Iterator[list[Tensor]]:
    """Yield for each objective its gradient over these parameters.

    Args:
        made: the forward pass; its graph is kept.
        cotangents: for each objective what its loss does with each log-probability and each entropy, `"row token"`.
        parameters: what to differentiate by; all in decoder blocks if `made.last` is given.
    """
    outputs: list[Tensor] = [made.logps]
    slopes: list[Tensor | None] = [None]
    uses_entropy = (
        made.entropies is not None and made.entropies.requires_grad and any(e is not None for _, e in cotangents)
    )
    if uses_entropy:
        assert made.entropies is not None
        outputs.append(made.entropies)
        slopes.append(None)
    start = 0
    if made.last is not None:
        slopes = [torch.autograd.grad(each, made.last, torch.ones_like(each), retain_graph=True)[0] for each in outputs]
        # The token at position t is predicted from the one before.
        start = made.last.shape[1] - made.logps.shape[1] - 1
    for over_logps, over_entropies in cotangents:
        ours = [over_logps]
        if uses_entropy:
            ours.append(torch.zeros_like(over_logps) if over_entropies is None else over_entropies)
        if made.last is not None:
            back = torch.zeros_like(made.last)
            for cotangent, slope in zip(ours, slopes, strict=True):
                assert slope is not None
                place = slice(start, start + cotangent.shape[1])
                back[:, place] += slope[:, place] * cotangent[..., None].to(slope)
            found = torch.autograd.grad(made.last, parameters, back, retain_graph=True, allow_unused=True)
        else:
            ours = [each.to(output) for each, output in zip(ours, outputs, strict=True)]
            found = torch.autograd.grad(outputs, parameters, ours, retain_graph=True, allow_unused=True)
        yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


@dataclass
class Gradients:
    """One gradient for each objective, summed over the micro-batches of an optimiser step, in two halves of the samples."""

    parameters: Mapping[str, nn.Parameter]
    """What the objectives are differentiated by: the scope, and in exact mode everything that is trained."""
    scope: frozenset[str]
    """What the Gramian is taken over."""
    count: int
    """Number of gradients."""
    rows: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Number of samples in each half."""
    signal: Tensor | None = None
    """`"gradient"`, the sum of each objective's advantages without their sign: 0 where its rewards tell nothing."""
    _halves: list[list[list[Tensor]] | None] = field(default_factory=lambda: [None, None])
    _rest: list[list[Tensor]] | None = None

    def add(self, half: int, gradients: Iterator[list[Tensor]], rows: int) -> None:
        """Add what a forward pass over rows of one half gave."""
        self.rows[half] += rows
        names = list(self.parameters)
        for index, found in enumerate(gradients):
            inside = [g for name, g in zip(names, found, strict=True) if name in self.scope]
            outside = [g for name, g in zip(names, found, strict=True) if name not in self.scope]
            held = self._halves[half]
            if held is None:
                held = self._halves[half] = []
            if len(held) == index:
                held.append(inside)
            else:
                _accumulate(held[index], inside)
            if self._rest is None:
                self._rest = []
            if len(self._rest) == index:
                self._rest.append(outside)
            else:
                _accumulate(self._rest[index], outside)

    def reduce(self, mean: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Average over processes, before anything is computed from the gradients."""
        for half, held in enumerate(self._halves):
            counts = total(torch.tensor([self.rows[half]], dtype=torch.float64))
            self.rows[half] = float(counts)
            if held is None and self.rows[half]:
                like = [p for name, p in self.parameters.items() if name in self.scope]
                held = self._halves[half] = [[torch.zeros_like(p) for p in like] for _ in range(self.count)]
            for each in held or []:
                each[:] = [mean(g) for g in each]
        for each in self._rest or []:
            each[:] = [mean(g) for g in each]
        if self.signal is not None:
            self.signal = total(self.signal)

    def products(self, first: int | None = None, second: int | None = None) -> Tensor:
        """Return inner products over the scope, `"gradient gradient"` in float64, of one half with another or of both."""
        left, right = self._over_scope(first), self._over_scope(second)
        result = torch.zeros(self.count, self.count, dtype=torch.float64)
        for i in range(self.count):
            for j in range(self.count):
                if first == second and j < i:
                    result[i, j] = result[j, i]
                else:
                    result[i, j] = sum(
                        (a.flatten().double() @ b.flatten().double()).cpu()
                        for a, b in zip(left[i], right[j], strict=True)
                    )
        return result

    def _over_scope(self, half: int | None) -> list[list[Tensor]]:
        first, second = self._halves
        if half is not None:
            chosen = self._halves[half]
            assert chosen is not None
            return chosen
        if first is None or second is None:
            return first or second or []
        return [[a + b for a, b in zip(one, other, strict=True)] for one, other in zip(first, second, strict=True)]

    @property
    def split(self) -> bool:
        """Whether both halves hold samples."""
        return min(self.rows) > 0

    def write(self, weights: Sequence[float]) -> None:
        """Write the weighted sum into `.grad` of every parameter."""
        inside = iter(_weighted(self._over_scope(None), weights))
        outside = iter(_weighted(self._rest or [], weights))
        for name, parameter in self.parameters.items():
            parameter.grad = next(inside if name in self.scope else outside)


def _accumulate(held: list[Tensor], more: list[Tensor]) -> None:
    for each, other in zip(held, more, strict=True):
        each += other


def _weighted(gradients: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    return [
        torch.stack([w * g for w, g in zip(weights, each, strict=True)]).sum(0) for each in zip(*gradients, strict=True)
    ]


@dataclass(frozen=True)
class Geometry:
    """What the gradients of one optimiser step look like."""

    gramian: Tensor
    """`"objective objective"`, of the whole batch."""
    estimate: Tensor
    """`"objective objective"`, what the weights are solved on: the Gramian, or its split-half estimate."""
    signal: Tensor | None
    """`"objective"`, cosine of each objective's gradients over two halves of the samples; None with one half."""

    @classmethod
    def of(cls, gradients: Gradients, objectives: int, split_half: bool) -> "Geometry":
        """Take the Gramian of the first gradients."""
        gramian = gradients.products()[:objectives, :objectives]
        signal, estimate = None, gramian
        if gradients.split:
            across = gradients.products(0, 1)[:objectives, :objectives]
            own = [gradients.products(half, half).diagonal()[:objectives] for half in (0, 1)]
            signal = across.diagonal() / (own[0] * own[1]).sqrt().clamp(min=1e-300)
            if split_half:
                shares = [rows / sum(gradients.rows) for rows in gradients.rows]
                estimate = positive_part((across + across.T) / (2 * shares[0] * shares[1]))
        return cls(gramian, estimate, signal)


@dataclass(frozen=True)
class Update:
    """The weights of one optimiser step."""

    weights: tuple[float, ...]
    """One for each objective, as they are applied; all 0: no step."""
    geometry: Geometry
    dropped: tuple[bool, ...]
    """Which objectives had no advantages and left the problem."""

    @property
    def step(self) -> bool:
        """Whether there is an update at all."""
        return any(weight != 0 for weight in self.weights)

    def figures(
        self, names: Sequence[str], progress: Tensor | None = None, norm: float | None = None
    ) -> dict[str, float]:
        """Return what is logged.

        Args:
            names: of the objectives.
            progress: `"objective"`, `<d, g_i>` where the update is no sum of the objectives' gradients.
            norm: length of such an update.
        """
        gramian, weights = self.geometry.gramian, torch.tensor(self.weights, dtype=torch.float64)
        norms = gramian.diagonal().clamp(min=0).sqrt()
        ahead = gramian @ weights if progress is None else progress
        alive = norms[norms > 0]
        # Below rounding, an angle has no sign.
        floor = (
            _STATIONARY
            * norms
            * (norm if norm is not None else math.sqrt(max(float(weights @ gramian @ weights), 0.0)))
        )
        found = {
            "gapo/norm_ratio": float(alive.max() / alive.min()) if len(alive) else math.nan,
            "gapo/update_norm": norm if norm is not None else math.sqrt(max(float(weights @ gramian @ weights), 0.0)),
            "gapo/opposed": float(bool((ahead < -floor).any())),
            "gapo/no_step": float(not self.step),
        }
        for i, name in enumerate(names):
            found[f"gapo/weight/{name}"] = self.weights[i]
            found[f"gapo/norm/{name}"] = float(norms[i])
            found[f"gapo/progress/{name}"] = float(ahead[i])
            found[f"gapo/dropped/{name}"] = float(self.dropped[i])
            if self.geometry.signal is not None:
                found[f"gapo/signal/{name}"] = float(self.geometry.signal[i])
            for j in range(i + 1, len(names)):
                scale = float(norms[i] * norms[j])
                if scale > 0:
                    found[f"gapo/cosine/{name}/{names[j]}"] = float(gramian[i, j]) / scale
        return found


def update_for(
    geometry: Geometry,
    weigh: Callable[[Tensor], Tensor],
    *,
    linear: Sequence[float],
    silent: Sequence[bool],
    keeps_silent: bool,
    match_norm: bool,
) -> Update:
    """Return the weights of a step.

    Args:
        geometry: of the objectives' gradients.
        weigh: from a Gramian to weights.
        linear: weights of the linear update, whose length is the measure.
        silent: which objectives have no advantages.
        keeps_silent: whether these stay in the problem, as plain multiple-gradient descent (p = 0) has it.
        match_norm: rescale to the length of the linear update.

    Raises:
        ObjectiveError: `weigh` returns another number of weights, or negative or infinite ones.
    """
    estimate = geometry.estimate.clone()
    dropped = [quiet and not keeps_silent for quiet in silent]
    for index, gone in enumerate(dropped):
        if gone:
            estimate[index] = estimate[:, index] = 0.0
    found = torch.as_tensor(weigh(estimate)).detach().double().flatten().cpu()
    if len(found) != len(linear) or not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise ObjectiveError(
            f"A weighting must return one weight of at least 0 for each of {len(linear)} objectives. Found {found.tolist()}."
        )
    gramian = geometry.gramian
    square = float(found @ gramian @ found)
    norms = gramian.diagonal().clamp(min=0).sqrt()
    if square <= (_STATIONARY * float(found @ norms)) ** 2:
        found = torch.zeros_like(found)
    elif match_norm:
        plain = torch.tensor(linear, dtype=torch.float64)
        found = found * math.sqrt(max(float(plain @ gramian @ plain), 0.0) / square)
    return Update(tuple(found.tolist()), geometry, tuple(dropped))
