"""Passes that experiments share, and their control: the same steps along random directions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerkit.activations import refuse_long
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import AttachError, BaseModelMismatchError, TextsError
from steerkit.experiments.looking import editing, hooked, keeping
from steerkit.hooks import rows_are_samples, steered
from steerkit.intervention import Intervention, ResidualIntervention, WeightAddition
from steerkit.maths.lowrank import Delta, LowRank, inner, parts, scaled
from steerkit.model import Decoder, Fingerprint, evaluating, find_decoder
from steerkit.passes import Continued, device_of, read

_TOKENS_A_BATCH = 2048
_ROWS_A_BATCH = 16
"""Rows whose logits are held together."""

Steps = dict[int, list[Tensor]]
"""By layer, for each forward pass in order: how far each position was moved, `"batch pos"`."""


def unedited(model: Any) -> Decoder:
    """Return the decoder of a model that nothing edits: what an experiment calls unsteered must be so.

    Raises:
        AttachError: a Controller is attached.
    """
    decoder = find_decoder(model)
    if steered(decoder.model):
        raise AttachError(
            "Experiments attach by themselves. Found a Controller attached. Leave its `with`, or detach it."
        )
    return decoder


def check_concept(model: Any, decoder: Decoder, concept: Concept) -> None:
    """Raise BaseModelMismatchError unless the concept was fitted on this model."""
    if concept.fingerprint is not None:
        concept.fingerprint.check(Fingerprint.of(model), repr(concept.name))
    width = len(concept[concept.best_layer].weight)
    if width != decoder.d_model or concept.layers[-1] >= decoder.depth:
        raise BaseModelMismatchError(
            f"{concept.name!r} reads layer {concept.layers[-1]} of a stream of width {width}; this model has {decoder.depth} "
            f"layers of width {decoder.d_model}. Fit it on this model."
        )


def listed(interventions: Intervention | Iterable[Intervention]) -> list[Intervention]:
    """Return one intervention or several as a list."""
    return [interventions] if isinstance(interventions, Intervention) else list(interventions)


def batches(decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Continued]]:
    """Yield which texts run together, and their tokens padded on the right, long texts first."""
    refuse_long(decoder.model, [len(ids) for ids in tokens], "A text")
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    while order:
        size = max(1, _TOKENS_A_BATCH // len(tokens[order[0]]))
        part, order = order[:size], order[size:]
        yield part, Continued.of([[]] * len(part), [tokens[i] for i in part], device_of(decoder))


def body(decoder: Decoder, part: Sequence[int], rows: Continued, texts: int) -> None:
    """Run a batch of so many texts through the model without its head, as the model stands."""
    with torch.no_grad(), evaluating(decoder.model), rows_are_samples(decoder.model, part, texts):
        decoder.body(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)


def prompts(decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Continued]]:
    """Yield which texts run together, and their tokens padded on the left; what follows them is never looked at."""
    refuse_long(decoder.model, [len(ids) + 1 for ids in tokens], "A text and the token after it")
    for start in range(0, len(tokens), _ROWS_A_BATCH):
        part = list(range(start, min(start + _ROWS_A_BATCH, len(tokens))))
        yield part, Continued.of([tokens[i] for i in part], [[0]] * len(part), device_of(decoder))


def after(decoder: Decoder, part: Sequence[int], rows: Continued, texts: int) -> Tensor:
    """Return the logits of the token after each text, `"text vocabulary"` float32 on the CPU, as the model stands."""
    with evaluating(decoder.model), rows_are_samples(decoder.model, part, texts):
        return read(decoder, rows)[0][:, 0].float().cpu()


def log_probabilities(decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probabilities of the token after each text, `"text vocabulary"`, as the model stands."""
    found = [after(decoder, part, rows, len(tokens)) for part, rows in prompts(decoder, tokens)]
    return F.log_softmax(torch.cat(found), dim=-1)


def divergences(one: Tensor, other: Tensor) -> Tensor:
    """Return `KL(one || other)` of each row of log-probabilities, in nats: `sum p (log p - log q)`."""
    return (one.double().exp() * (one.double() - other.double())).sum(dim=-1).clamp(min=0)


@contextmanager
def measuring(model: Any, decoder: Decoder, interventions: Sequence[Intervention]) -> Iterator[Steps]:
    """Within, interventions are attached, and how far each pass was moved after each edited block is kept."""
    residual = [each for each in interventions if isinstance(each, ResidualIntervention)]
    layers = sorted({layer for each in residual for layer in each.layers})
    before: dict[int, Tensor] = {}
    steps: Steps = {layer: [] for layer in layers}

    def measure(layer: int) -> Any:
        def keep(hidden: Tensor) -> Tensor:
            if depth() == 1:
                steps[layer].append((hidden.float() - before[layer].float()).norm(dim=-1))
            return hidden

        return editing(keep)

    with ExitStack() as stack:
        depth = stack.enter_context(_nested(decoder))
        # Hooks run in the order in which they were put on: one before the edit, one after it.
        stack.enter_context(hooked({decoder.blocks[layer]: keeping(before, layer) for layer in layers}))
        stack.enter_context(Controller(model, interventions))
        stack.enter_context(hooked({decoder.blocks[layer]: measure(layer) for layer in layers}))
        yield steps


@contextmanager
def at_random(
    model: Any, decoder: Decoder, interventions: Sequence[Intervention], steps: Steps, seed: int
) -> Iterator[dict[int, Tensor]]:
    """Within, the same passes are moved as far as they were in `measuring`, along one random direction a block.

    Changes of weights are exchanged for random ones of the same shapes, ranks and norms. Yields the directions by layer.
    """
    directions = random_directions(steps, decoder.d_model, seed)

    def move(layer: int) -> Any:
        left = iter(steps[layer])

        def step(hidden: Tensor) -> Tensor:
            if depth() > 1:
                return hidden
            return hidden + (next(left)[..., None] * directions[layer].to(hidden.device)).to(hidden.dtype)

        return editing(step)

    weighty = [
        replace(each, deltas=random_deltas(each.deltas, seed))
        for each in interventions
        if isinstance(each, WeightAddition)
    ]
    with ExitStack() as stack:
        depth = stack.enter_context(_nested(decoder))
        if weighty:
            stack.enter_context(Controller(model, weighty))
        stack.enter_context(hooked({decoder.blocks[layer]: move(layer) for layer in steps}))
        yield directions


@contextmanager
def _nested(decoder: Decoder) -> Iterator[Callable[[], int]]:
    """Yield how many forward passes are under way: conditions read their prompts in one inside the other."""
    running = 0

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal running
        running += 1

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal running
        running -= 1

    with ExitStack() as stack:
        stack.callback(decoder.owner.register_forward_pre_hook(begin, prepend=True).remove)
        stack.callback(decoder.owner.register_forward_hook(end, always_call=True).remove)
        yield lambda: running


def random_directions(layers: Iterable[int], d_model: int, seed: int) -> dict[int, Tensor]:
    """Return one random unit direction a layer, `"d_model"`."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: F.normalize(torch.randn(d_model, generator=generator), dim=0) for layer in layers}


def random_deltas(deltas: Mapping[str, Delta], seed: int) -> dict[str, Delta]:
    """Return random changes of the same parameters, of the same shapes, ranks and norms."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        noise = [torch.randn(part.shape, generator=generator) for part in parts(delta)]
        drawn = LowRank(*noise) if isinstance(delta, LowRank) else noise[0]
        found[name] = scaled(drawn, math.sqrt(inner(delta, delta) / inner(drawn, drawn)))
    return found


def refuse_few(texts: Sequence[Any], least: int) -> None:
    """Raise TextsError for fewer texts than a spread can be told from."""
    if len(texts) < least:
        raise TextsError(f"At least {least} texts are required. Found {len(texts)}. Add some.")
