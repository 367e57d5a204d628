"""Which layers carry an answer: the residual stream of one prompt put into another, and what one direction has to do with it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.activations import checked_texts, tokenise
from steerkit.concepts.concept import Concept
from steerkit.errors import TextsError
from steerkit.evaluation.report import Estimate
from steerkit.experiments.looking import editing, hooked, keeping
from steerkit.experiments.running import after, check_concept, prompts, random_directions, unedited
from steerkit.experiments.table import Cell, Table, estimate
from steerkit.model import Decoder, resolve_layers
from steerkit.passes import Continued
from steerkit.types import Layers, Text

_KINDS = (
    "patched",
    "patched along",
    "patched at random",
    "erased",
    "erased at random",
    "erased everywhere",
    "erased everywhere at random",
)


def patch(
    model: Any,
    tokenizer: Any,
    concept: Concept,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    answers: Sequence[tuple[str, str]],
    *,
    layers: Layers | None = None,
    seed: int = 0,
) -> Table:
    """Measure by layer how much of an answer the residual stream at the last position carries, and one concept's direction in it.

    The effect is of the logit difference `d = logit(right) - logit(wrong)` of the next token, summed over pairs:
    `(d - d_corrupted) / (d_clean - d_corrupted)`, 0 as in the corrupted run and 1 as in the clean one.

    - `patched`: the corrupted run with the clean run's state at the last position after the layer; 1 at the last layer.
    - `patched along`: only its component along the concept's direction u, `h + u u . (h_clean - h)`; the control is a random
      direction, `patched at random`.
    - `erased`: the clean run without that component at the last position after the layer, `h - u u . h`: 1 if the answer does
      not need it there; `erased everywhere`: at all positions, as `concept.erase` does. The control is a random direction,
      "at random"; it carries less of what varies than a concept's does. The first token of a text is an attention sink in many
      models, with a state a hundred times as long as others: what erasing everywhere breaks may be that.

    Patching, Vig et al. (arXiv:2004.12265), Meng et al. (arXiv:2202.05262); the metric, Zhang and Nanda (arXiv:2309.16042).

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        concept: whose `mover` is patched and erased.
        clean: prompts to which `right` is the answer.
        corrupted: one for each, as alike as can be, to which it is not.
        answers: one (right, wrong) for each, with the space before them that a continuation has; their first tokens count.
        layers: decoder blocks; every probed layer by default.
        seed: of the random directions.

    Raises:
        AttachError: a Controller is attached.
        TextsError: lists of other lengths, answers that begin with one token, or a pair whose clean prompt does not favour the
            right answer more than its corrupted one does.
        LayerError: a layer that was not probed.
        BaseModelMismatchError: a concept of another model.
    """
    clean, corrupted = checked_texts(clean, "clean"), checked_texts(corrupted, "corrupted")
    decoder = unedited(model)
    check_concept(model, decoder, concept)
    chosen = concept.layers if layers is None else resolve_layers(layers, decoder.depth)
    if not len(clean) == len(corrupted) == len(answers):
        raise TextsError(
            f"Each clean prompt needs one corrupted prompt and one pair of answers. Found {len(clean)}, {len(corrupted)} and "
            f"{len(answers)}. Pass lists of one length."
        )
    words = [_first_tokens(tokenizer, index, pair) for index, pair in enumerate(answers)]
    for layer in chosen:
        concept[layer]  # raises where there is no probe
    own = {layer: concept.mover[layer] for layer in chosen}
    random = random_directions(chosen, decoder.d_model, seed)
    ids = [tokenise(tokenizer, texts) for texts in (clean, corrupted)]
    total = len(clean)
    found: dict[tuple[str, int], list[Tensor]] = {}
    units: list[Tensor] = []
    for (part, good), (_, bad) in zip(*(prompts(decoder, each) for each in ids), strict=True):
        here = torch.tensor([words[i] for i in part])
        kept: dict[Any, Tensor] = {}
        with hooked({decoder.blocks[layer]: keeping(kept, layer) for layer in chosen}):
            best = _difference(decoder, part, good, total, here)
        worst = _difference(decoder, part, bad, total, here)
        gap = best - worst
        if not bool((gap > 0).all()):
            index = part[int(gap.argmin())]
            raise TextsError(
                f"A clean prompt must favour its right answer more than the corrupted one does. Found {float(gap.min()):.3g} "
                f"nats for pair {index}. Leave it out, or exchange its answers.",
                index=index,
            )
        units.append(gap)
        for layer in chosen:
            state = kept[layer][:, good.width - 1]
            edits = _edits(state, bad.width - 1, good.width - 1, own[layer], random[layer])
            for kind in _KINDS:
                rows = bad if kind.startswith("patched") else good
                with hooked({decoder.blocks[layer]: editing(edits[kind])}):
                    value = _difference(decoder, part, rows, total, here)
                found.setdefault((kind, layer), []).append((value - worst) / gap)
    weights = torch.cat(units)
    table: list[tuple[Cell, ...]] = [
        (layer, *(_effect(found[kind, layer], weights) for kind in _KINDS)) for layer in chosen
    ]
    return Table(
        f"What carries the answer, and {concept.name!r} in it",
        f"Logit difference of the answers, 0 as in the corrupted and 1 as in the clean run, over {total} pairs; brackets are 95 % "
        "intervals over pairs. Control: random directions in the place of the concept's.",
        ("layer",),
        _KINDS,
        tuple(table),
    )


def _effect(values: Sequence[Tensor], weights: Tensor) -> Estimate:
    return estimate(torch.cat(list(values)), weights)


def _edits(state: Tensor, place: int, end: int, own: Tensor, random: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each edit of a block's output, `"batch pos d_model"`; `state` is the clean run's at its last position, `end`."""

    def put(along: Tensor | None) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            edited = hidden.clone()
            if along is None:
                edited[:, place] = state
            else:
                u = along.to(hidden.device)
                gap = (state.float() - hidden[:, place].float()) @ u
                edited[:, place] = (hidden[:, place].float() + gap[:, None] * u).to(hidden.dtype)
            return edited

        return edit

    def erase(along: Tensor, where: slice) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            u, edited = along.to(hidden.device), hidden.clone()
            here = hidden[:, where].float()
            edited[:, where] = (here - (here @ u)[..., None] * u).to(hidden.dtype)
            return edited

        return edit

    last, everywhere = slice(end, end + 1), slice(None)
    edits = [put(None), put(own), put(random)]
    edits += [erase(along, where) for where in (last, everywhere) for along in (own, random)]
    return dict(zip(_KINDS, edits, strict=True))


def _difference(decoder: Decoder, part: Sequence[int], rows: Continued, texts: int, words: Tensor) -> Tensor:
    """Return the logit of the right answer less that of the wrong one, `"text"`."""
    logits = after(decoder, part, rows, texts).gather(1, words)
    return logits[:, 0] - logits[:, 1]


def _first_tokens(tokenizer: Any, index: int, pair: Any) -> list[int]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(answer, str) for answer in pair):
        raise TextsError(f"Answers are (right, wrong). Found {pair!r:.60} at {index}. Pass two strings.", index=index)
    first = [ids[0] for ids in tokenise(tokenizer, list(pair), special=False)]
    if first[0] == first[1]:
        raise TextsError(
            f"Answers must differ in their first token. Found {pair!r:.60} at {index}, which begin with the same one.",
            index=index,
        )
    return first
