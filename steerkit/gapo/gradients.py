"""Gradients of several objectives from one forward pass, their Gramian, and the update that is made of them.

All objectives read the same log-probabilities, so their gradients differ by a cotangent c_k for each token only. Where
every parameter asked for lies inside the decoder blocks, the vocabulary is passed once for all of them: a token's
log-probability depends on its own position of the last block's output y alone, hence

    v_t = d logp_t / d y_t        once
    g_k = (d y / d theta)^T (c_k v)    for each objective
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ObjectiveError, UnsupportedModelError
from steerkit.model import find_decoder, hidden_states_of

SCOPES = ("trainable", "lora", "last_block")


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


class Forward:
    """One micro-batch's log-probabilities, made once, by halves of the samples."""

    def __init__(self, half: Tensor) -> None:
        self.half = half
        self.logps: Any = None
        self.entropies: Any = None
        self.aux: Any = None
        self.passes: list[Pass] = []
        self.seen: list[Tensor] | None = None

    def make(self, compute: Callable[[Any], tuple[Tensor, Tensor | None, Tensor | None]], whole: bool) -> None:
        """Run the model over each half; over all rows at once where the batch holds more than text."""
        halves = [self.half == 0, self.half == 1]
        rows = [half.nonzero()[:, 0] for half in halves if bool(half.any())]
        if whole:
            rows = [torch.arange(len(self.half), device=self.half.device)]
        logps: list[Tensor] = []
        entropies: list[Any] = []
        aux: list[Any] = []
        for each in rows:
            found = compute(slice(None) if len(rows) == 1 else each)
            last = self.seen.pop() if self.seen else None
            self.passes.append(Pass(each, found[0], found[1], last))
            logps.append(found[0])
            entropies.append(found[1])
            aux.append(found[2])
        back = torch.cat(rows).argsort()
        self.logps = torch.cat(logps)[back]
        self.entropies = None if entropies[0] is None else torch.cat(entropies)[back]
        self.aux = None if aux[0] is None else torch.stack(aux).mean()

    def leaves(self) -> "Forward":
        """Return the same values cut off from the model."""
        cut = Forward(self.half)
        cut.logps = self.logps.detach().requires_grad_()
        cut.entropies = None if self.entropies is None else self.entropies.detach().requires_grad_()
        cut.aux = None if self.aux is None else self.aux.detach()
        return cut


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
) -> Iterator[list[Tensor | None]]:
    """Yield for each objective its gradient over these parameters, None where the loss does not depend on one.

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
        yield list(found)


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
    _halves: tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]] = field(default_factory=lambda: ({}, {}))
    _rest: dict[int, list[Tensor]] = field(default_factory=dict)
    _reached: set[str] = field(default_factory=set)

    def put(self, half: int, index: int, gradient: Sequence[Tensor | None]) -> None:
        """Add one objective's gradient over samples of one half, in the order of the parameters."""
        inside: list[Tensor] = []
        outside: list[Tensor] = []
        for (name, parameter), found in zip(self.parameters.items(), gradient, strict=True):
            if found is not None:
                self._reached.add(name)
            (inside if name in self.scope else outside).append(torch.zeros_like(parameter) if found is None else found)
        _accumulate(self._halves[half], index, inside)
        _accumulate(self._rest, index, outside)

    def reduce(self, mean: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Average over processes, before anything is computed from the gradients."""
        like = [p for name, p in self.parameters.items() if name in self.scope]
        for half, held in enumerate(self._halves):
            self.rows[half] = float(total(torch.tensor([self.rows[half]], dtype=torch.float64)))
            if not self.rows[half]:
                continue  # nobody has samples here
            for index in range(self.count):
                ours = held.get(index) or [torch.zeros_like(p) for p in like]
                held[index] = [mean(g) for g in ours]
        for index, each in self._rest.items():
            self._rest[index] = [mean(g) for g in each]
        names = list(self.parameters)
        reached = total(torch.tensor([float(name in self._reached) for name in names]))
        self._reached = {name for name, count in zip(names, reached.tolist(), strict=True) if count}
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
        if half is not None:
            return [self._halves[half][index] for index in range(self.count)]
        first, second = self._halves
        if not first or not second:
            return [(first or second)[index] for index in range(self.count)]
        return [[a + b for a, b in zip(first[i], second[i], strict=True)] for i in range(self.count)]

    @property
    def split(self) -> bool:
        """Whether both halves hold samples."""
        return min(self.rows) > 0

    def write(self, weights: Sequence[float]) -> None:
        """Write the weighted sum into `.grad` of every parameter that an objective depends on."""
        inside = iter(_weighted(self._over_scope(None), weights))
        outside = iter(_weighted([self._rest[index] for index in range(self.count)], weights))
        for name, parameter in self.parameters.items():
            found = next(inside if name in self.scope else outside)
            parameter.grad = found if name in self._reached else None


def _accumulate(held: dict[int, list[Tensor]], index: int, more: list[Tensor]) -> None:
    if index not in held:
        held[index] = more
    elif more:
        torch._foreach_add_(held[index], more)


def _weighted(gradients: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    whole = [weights[0] * each for each in gradients[0]]
    for weight, gradient in zip(weights[1:], gradients[1:], strict=True):
        for each, more in zip(whole, gradient, strict=True):
            each.add_(more, alpha=weight)
    return whole
