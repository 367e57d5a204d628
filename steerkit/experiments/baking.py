"""Additions to the residual stream written into weights: exactly where a bias can hold them, else by a rank-1 edit."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations import checked_texts, record, tokenise
from steerkit.controller import Controller
from steerkit.errors import AmountError, TextsError, UnsupportedModelError
from steerkit.experiments.looking import hooked, straight
from steerkit.experiments.running import batches, body, divergences, log_probabilities, random_deltas, unedited
from steerkit.experiments.table import Cell, Table, estimate
from steerkit.intervention import Addition, Intervention
from steerkit.maths.lowrank import Delta, LowRank
from steerkit.model import Decoder, Fingerprint
from steerkit.preferences.vector import PreferenceVector
from steerkit.types import Text


def bake(model: Any, addition: Intervention) -> PreferenceVector:
    """Return a constant addition at all positions as a change of biases, exact to rounding: `b' = b + m u`.

    The bias is the last one inside the block of which every change is the same change of the block's output. It is found by
    trying: the bias of the MLP's last projection in gpt2, gpt_neox, opt and bloom, that of a norm at the end of a block where there
    is one. Llama-like models have none, and a change of weights can only be exact for a constant where some input is constant:
    there `edit_weights` comes near, and `fidelity` tells how near. A model with a new bias would be another architecture.

    Args:
        model: the model to change; this only looks.
        addition: `concept.add(magnitude, positions="all")`, with one magnitude for all samples.

    Returns:
        A vector: `.add(1.0)` steers, `.merge_into(model)` makes a new model, `.save(path)` keeps it.

    Raises:
        AttachError: a Controller is attached.
        AmountError: another kind of intervention, other positions, or amounts for each sample.
        UnsupportedModelError: a block without such a bias.
        BaseModelMismatchError: an addition of another model.
    """
    decoder, steps = _steps(model, addition)
    deltas: dict[str, Delta] = {}
    for layer, step in steps.items():
        names = [name for name, p in _inside(decoder, layer) if name.endswith(".bias") and p.shape == step.shape]
        carrying = straight(decoder, layer, [name.removesuffix(".bias") for name in names])
        if not carrying:
            raise UnsupportedModelError(
                f"Block {layer} must have a bias of which every change is the same change of its output. Found "
                f"{', '.join(names) or 'no bias that wide'} in {type(decoder.model).__name__}. Use edit_weights."
            )
        deltas[f"{carrying[-1]}.bias"] = step
    return PreferenceVector(addition.name, deltas, Fingerprint.of(model), {"baked": _noted(addition, steps)})


def edit_weights(
    model: Any, tokenizer: Any, addition: Intervention, texts: Sequence[Text], *, ridge: float = 1.0
) -> PreferenceVector:
    """Return a constant addition at all positions as a rank-1 change of one weight a layer: `dW = u a^T`.

    The weight is that of the last linear module in the block whose output reaches the block's output unchanged (the MLP's last
    projection), x its input. Over the tokens of the texts, with mean `mu` and covariance `S`,

        a = m C^-1 mu / (mu . C^-1 mu),    C = S + ridge * (tr S / d) I

    is the change with the mean shift `a . mu = m` and the least `a^T C a`: its variance over tokens, and what its norm costs. It
    is ROME's closed form (Meng et al., arXiv:2202.05262, equation 2) with mu as the key; `ridge=inf` gives the one of least
    norm, `m mu / |mu|^2`. Steer2Edit (arXiv:2602.09870) spreads changes of the same form over heads and neurons, and takes the
    input direction from what a component contributes by itself. `made["shift"]` holds mean and standard deviation of the shift at
    each layer, on these texts.

    Args:
        model: the model to change; this only looks.
        tokenizer: its tokenizer.
        addition: `concept.add(magnitude, positions="all")`, with one magnitude for all samples.
        texts: over whose tokens the shift is fitted; measure it on others with `fidelity`.
        ridge: how much norm counts against variation; `math.inf` for least norm.

    Raises:
        AttachError: a Controller is attached.
        AmountError: as `bake`, or a ridge that is not positive.
        TextsError: no texts, or inputs with mean 0.
        UnsupportedModelError: a block in which no linear module adds to the stream unchanged (norms behind it, experts).
        BaseModelMismatchError: an addition of another model.
    """
    texts = checked_texts(texts, "texts")
    if not ridge > 0:
        raise AmountError(f"`ridge` must be positive. Found {ridge!r}. Try 1, or math.inf for the least norm.")
    decoder, steps = _steps(model, addition)
    modules = {layer: _projection(decoder, layer) for layer in steps}
    tokens = tokenise(tokenizer, texts)
    swapped = frozenset(f"{path}.weight" for path in modules.values() if not decoder.linears[path])
    deltas: dict[str, Delta] = {}
    shift = {}
    for layer, path in sorted(modules.items()):
        moment = _Moments(decoder.model.get_submodule(path))
        with ExitStack() as stack:
            if deltas:  # a later weight reads what the earlier ones have moved
                before = PreferenceVector(addition.name, dict(deltas), Fingerprint.of(model), {}, swapped & set(deltas))
                stack.enter_context(Controller(model, [before.add(1.0)]))
            stack.enter_context(hooked({moment.module: moment.hook}))
            for part, rows in batches(decoder, tokens):
                moment.real = rows.mask.bool()
                body(decoder, part, rows, len(texts))
        magnitude = float(steps[layer].norm())
        unit = steps[layer] / magnitude
        a, deviation = moment.solve(magnitude, ridge)
        name = f"{path}.weight"
        deltas[name] = LowRank(unit[:, None], a[None]) if decoder.linears[path] else LowRank(a[:, None], unit[None])
        shift[str(layer)] = {"mean": magnitude, "deviation": deviation}
    made = {"edited": _noted(addition, steps), "shift": shift, "ridge": str(ridge), "tokens": sum(map(len, tokens))}
    return PreferenceVector(addition.name, deltas, Fingerprint.of(model), made, swapped)


def fidelity(
    model: Any,
    tokenizer: Any,
    vector: PreferenceVector,
    addition: Intervention,
    texts: Sequence[Text],
    *,
    seed: int = 0,
) -> Table:
    """Measure how near changed weights come to the addition that they stand for, on texts.

    By row: the weights, and as controls no change at all, and a random change of the same parameters, shapes, ranks and norms.
    `stream` is `|h - h_a| / |h_a - h_0|` at the last token after the last layer of the addition, h_a under the addition and h_0
    unsteered: 0 for the same, 1 for no change. `kl` is `KL(q_a || q)` of the next token in nats, `agreement` the share of texts with
    the same likeliest token.

    Raises:
        TextsError: no texts.
        AmountError, BaseModelMismatchError: as the Controller raises them, or an addition that adds nothing.
    """
    texts = checked_texts(texts, "texts")
    decoder, _ = _steps(model, addition)
    layer = max(addition.layers)
    random = PreferenceVector("random", random_deltas(vector.deltas, seed), vector.fingerprint)
    attached = {
        "addition": Controller(model, [addition]),
        "weights": Controller(model, [vector.add(1.0)]),
        "random weights": Controller(model, [random.add(1.0)]),
    }
    tokens = tokenise(tokenizer, texts)

    def measure() -> tuple[Tensor, Tensor]:
        return record(model, tokenizer, texts, layers=layer)[layer], log_probabilities(decoder, tokens)

    found = {"nothing": measure()}
    for name, control in attached.items():
        with control:
            found[name] = measure()
    states, said = found["addition"]
    moved = (states - found["nothing"][0]).norm(dim=-1)
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            estimate((found[name][0] - states).norm(dim=-1) / moved),
            estimate(divergences(said, found[name][1])),
            estimate((found[name][1].argmax(dim=-1) == said.argmax(dim=-1)).float()),
        )
        for name in ("weights", "nothing", "random weights")
    ]
    return Table(
        f"How near weights come to {addition.name!r}",
        f"Distance from the addition, over {len(texts)} texts; brackets are 95 % intervals over texts. stream: of the state after "
        f"layer {layer}, as a share of what the addition moves; kl: nats of the next token. Controls: no change, random weights.",
        ("change",),
        ("stream", "kl", "agreement"),
        tuple(rows),
    )


class _Moments:
    """Mean and second moment of what a linear module is given at real tokens, in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.real = torch.empty(0)
        self.count = 0
        self.sum: Tensor = torch.zeros(())
        self.square: Tensor = torch.zeros(())

    @property
    def hook(self) -> Callable[..., Any]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0].reshape(-1, args[0].shape[-1])[self.real.flatten().to(args[0].device)].double().cpu()
            self.count += len(given)
            self.sum = self.sum + given.sum(dim=0)
            self.square = self.square + given.T @ given

        return keep

    def solve(self, magnitude: float, ridge: float) -> tuple[Tensor, float]:
        """Return the input direction `a`, `"input"` float32, and the standard deviation of `a . x`."""
        mean = self.sum / self.count
        spread = self.square / self.count - torch.outer(mean, mean)
        if not float(mean.norm()) > 0:
            raise TextsError(
                "Inputs must have a mean that is not 0, for a rank-1 edit to add a constant. Found 0. Use bake."
            )
        if math.isinf(ridge):
            key = mean
        else:
            level = ridge * float(spread.trace()) / len(mean)
            # The level keeps it solvable; tokens that are all alike have none.
            key = torch.linalg.solve(spread + max(level, 1e-12) * torch.eye(len(mean), dtype=mean.dtype), mean)
        a = magnitude * key / (key @ mean)
        return a.float(), math.sqrt(max(0.0, float(a @ spread @ a)))


def _steps(model: Any, addition: Intervention) -> tuple[Decoder, dict[int, Tensor]]:
    """Return the decoder and what is added after each layer, `"d_model"`."""
    if not isinstance(addition, Addition) or addition.positions != "all":
        found = type(addition).__name__ if not isinstance(addition, Addition) else f"positions={addition.positions!r}"
        raise AmountError(
            f"Weights can stand for an addition at all positions. Found {found}. Use concept.add(magnitude, positions='all')."
        )
    amounts = addition.read(addition.amount)
    if amounts.samples is not None:
        raise AmountError(
            f"Weights have one magnitude for all samples. Found {amounts.samples} of them. Pass a number."
        )
    if addition.readings or addition.schedule is not None:
        raise AmountError(
            f"Weights act on every prompt and at every step. Found a condition or a schedule of {addition.name!r}. Leave it out."
        )
    if not bool(amounts.values.any()):
        raise AmountError("An addition must add something. Found magnitude 0. Pass another.")
    decoder = unedited(model)
    if addition.fingerprint is not None:
        addition.fingerprint.check(Fingerprint.of(model), repr(addition.name))
    addition.check(decoder)
    values = dict(zip(addition.layers, amounts.values[0].tolist(), strict=True))
    return decoder, {layer: (m * addition.directions[layer]).float() for layer, m in values.items() if m}


def _noted(addition: Intervention, steps: dict[int, Tensor]) -> dict[str, Any]:
    return {"name": addition.name, "magnitudes": {str(layer): float(step.norm()) for layer, step in steps.items()}}


def _inside(decoder: Decoder, layer: int) -> list[tuple[str, Tensor]]:
    """Return the parameters of one block by their names in the model, in order."""
    own = {id(parameter) for parameter in decoder.blocks[layer].parameters()}
    return [(name, parameter) for name, parameter in decoder.parameters.items() if id(parameter) in own]


def _projection(decoder: Decoder, layer: int) -> str:
    """Return the path of the last linear module of a block whose output reaches the block's own unchanged."""
    paths = [
        name.removesuffix(".weight")
        for name, _ in _inside(decoder, layer)
        if name.endswith(".weight") and name in decoder.reachable
    ]
    wide = [
        path for path in paths if decoder.shapes[f"{path}.weight"][0 if decoder.linears[path] else 1] == decoder.d_model
    ]
    found = straight(decoder, layer, wide)
    if not found:
        raise UnsupportedModelError(
            f"Block {layer} must have a linear module whose output reaches the block's output unchanged. Found none among "
            f"{', '.join(wide) or 'its modules'}: a norm or a mixture of experts stands behind. Steer by the Controller."
        )
    return found[-1]
