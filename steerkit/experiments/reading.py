"""What probes read: where a concept can be read, token by token, and how long an edit can be read after it was made."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from steerkit.activations import Activations, checked_texts, record, tokenise
from steerkit.concepts.concept import Concept
from steerkit.concepts.examples import Groups, check_counts, check_groups
from steerkit.controller import Controller
from steerkit.errors import AmountError, LayerError, SteerkitWarning, TextsError
from steerkit.evaluation.report import Estimate
from steerkit.experiments.looking import hooked, keeping, submodules
from steerkit.experiments.running import at_random, batches, body, check_concept, listed, measuring, unedited
from steerkit.experiments.table import Cell, Table, TokenTable, estimate
from steerkit.intervention import Intervention, ResidualIntervention
from steerkit.model import Decoder, find_decoder, resolve_layers
from steerkit.types import Layers, Text

SiteName = Literal["residual", "attention", "mlp"]

_HELD_OUT = 0.2


def where(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    positive: Sequence[Text],
    negative: Sequence[Text],
    sites: Sequence[SiteName] = ("residual", "attention", "mlp"),
    layers: Layers | None = None,
    groups: Groups | None = None,
    seed: int = 0,
) -> Table:
    """Measure how well a concept can be read at each layer and site: held-out accuracy and AUC of a probe fitted there.

    Sites are the residual stream after a block, and what its attention and its MLP put out, before any norm that follows them
    and before they are added to the stream. Each probe is fitted and measured as `Concept.fit` does, at the last token.
    The control are the same states under shuffled labels, half of each class on either side: what their probe reads is chance.
    Probing, Alain and Bengio (arXiv:1610.01644); control tasks, Hewitt and Liang (arXiv:1909.03368).

    Args:
        name: of the concept, for the title.
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        positive: texts that show the concept.
        negative: texts that do not.
        sites: which of the three to look at.
        layers: decoder blocks; all by default.
        groups: one label a positive and one a negative text; texts of one group stay on one side of the split.
        seed: of the split and the shuffle.

    Returns:
        A row a site, layer and labels ("true", "shuffled"), with 95 % intervals as in `Concept.figures`.

    Raises:
        TextsError: too few texts, groups of another number, an unknown site.
        LayerError: a layer that does not exist.
        UnsupportedModelError: blocks whose attention or MLP cannot be told apart.
    """
    if not sites or not set(sites) <= set(get_args(SiteName)):
        raise TextsError(f"`sites` are {', '.join(get_args(SiteName))}. Found {tuple(sites)}. Choose among them.")
    positive, negative = checked_texts(positive, "positive"), checked_texts(negative, "negative")
    check_counts(len(positive), len(negative), _HELD_OUT)
    check_groups(groups, len(positive), len(negative))
    decoder = find_decoder(model)
    chosen = resolve_layers(layers, decoder.depth)
    texts = [*positive, *negative]
    modules = submodules(decoder, chosen, [site for site in sites if site != "residual"])
    residual = record(model, tokenizer, texts, layers=chosen)
    found = {"residual": residual, **_at_modules(decoder, tokenise(tokenizer, texts), modules, residual)}
    count, dice = len(positive), np.random.default_rng(seed)
    halves = [np.array_split(dice.permutation(n) + first, 2) for n, first in ((count, 0), (len(negative), count))]
    labels = {
        "true": (range(count), range(count, len(texts))),
        "shuffled": tuple(np.concatenate(side).tolist() for side in zip(*halves, strict=True)),
    }
    each = None if groups is None else [*groups[0], *groups[1]]
    rows: list[tuple[Cell, ...]] = []
    for site in sites:
        for label, sides in labels.items():
            parts = [_part(found[site], side) for side in sides]
            belonging = None if each is None else ([each[i] for i in sides[0]], [each[i] for i in sides[1]])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SteerkitWarning)  # the table tells what is at chance
                concept = Concept.from_activations(name, *parts, groups=belonging, seed=seed, held_out=_HELD_OUT)
            for layer, figures in concept.figures.items():
                accuracy = Estimate(figures.accuracy, *figures.accuracy_interval)
                rows.append((site, layer, label, accuracy, Estimate(figures.auc, *figures.auc_interval)))
    return Table(
        f"Where {name!r} can be read",
        f"Held-out accuracy and AUC of a linear probe at the last token, over the held-out fifth of {len(texts)} texts; brackets are 95 % "
        "intervals. Control: the same states under shuffled labels.",
        ("site", "layer", "labels"),
        ("accuracy", "auc"),
        tuple(rows),
    )


def _at_modules(
    decoder: Decoder,
    tokens: Sequence[Sequence[int]],
    modules: Mapping[tuple[str, int], Any],
    residual: Activations,
) -> dict[str, Activations]:
    """Record what modules put out at the last token of each text, by site."""
    states = {key: torch.empty(len(tokens), decoder.d_model) for key in modules}
    kept: dict[Any, Tensor] = {}
    with hooked({module: keeping(kept, key) for key, module in modules.items()}):
        for part, rows in batches(decoder, tokens) if modules else ():
            body(decoder, part, rows, len(tokens))
            last, every = (rows.mask.sum(dim=1) - 1).cpu(), torch.arange(len(part))
            for key, out in kept.items():
                whole = out.view(*rows.ids.shape, -1)  # some modules see rows and positions as one
                states[key][part] = whole[every, last].float().cpu()
    return {
        site: replace(residual, states={layer: states[site, layer] for other, layer in modules if other == site})
        for site in {site for site, _ in modules}
    }


def _part(whole: Activations, rows: Iterable[int]) -> Activations:
    chosen = list(rows)
    states = {layer: whole[layer][chosen] for layer in whole.layers}
    return replace(whole, states=states, digests=tuple(whole.digests[i] for i in chosen))


def similarity(concepts: Sequence[Concept]) -> Table:
    """Return the cosine between each two concepts at each layer that both were fitted at.

    `cav` compares the normals of the probes, what they read; `mover` the directions that interventions move along. The
    control is chance: 95 % of pairs of random directions lie within `1.96 / sqrt(d_model)` of 0.

    Raises:
        TextsError: fewer than two concepts, or two of one name.
        LayerError: two concepts without a layer in common.
        BaseModelMismatchError: concepts of different models.
    """
    names = [concept.name for concept in concepts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise TextsError(f"Two concepts or more, each with its own name, are required. Found {names}.")
    first = concepts[0]
    width = len(first[first.best_layer].weight)
    rows: list[tuple[Cell, ...]] = []
    for index, one in enumerate(concepts):
        for other in concepts[index + 1 :]:
            if one.fingerprint is not None and other.fingerprint is not None:
                one.fingerprint.check(other.fingerprint, repr(one.name))
            shared = [layer for layer in one.layers if layer in other.layers]
            if not shared:
                raise LayerError(
                    f"Concepts are compared at a layer that both know. Found {one.layers} of {one.name!r} and {other.layers} "
                    f"of {other.name!r}. Fit them at the same layers."
                )
            rows += [
                (
                    layer,
                    f"{one.name}, {other.name}",
                    float(one[layer].cav @ other[layer].cav),
                    float(one.mover[layer] @ other.mover[layer]),
                )
                for layer in shared
            ]
    return Table(
        "How alike concepts are",
        f"Cosine of what probes read (cav) and of what interventions move along (mover). Control: 95 % of pairs of random "
        f"directions of width {width} lie within ±{1.96 / width**0.5:.3f}.",
        ("layer", "concepts"),
        ("cav", "mover"),
        tuple(rows),
    )


def tokens(
    model: Any,
    tokenizer: Any,
    concept: Concept,
    text: Text,
    *,
    interventions: Intervention | Iterable[Intervention] = (),
    layers: Layers | None = None,
) -> TokenTable:
    """Read a concept at each token and layer of one text: `logit = w . h + b` and `P = sigmoid(logit)`.

    With interventions, also what is read while they act: one pass over the text, all of it prompt. The control is the reading
    before. A probe was fitted at the last token of texts; what it reads elsewhere is an extrapolation, and at a first token that
    serves as an attention sink it means nothing.

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        concept: whose probes read.
        text: one text or conversation.
        interventions: what to attach for the second reading.
        layers: where to read; every probed layer by default.

    Raises:
        AttachError: a Controller is attached.
        TextsError: no text.
        LayerError: a layer that was not probed.
        BaseModelMismatchError: a concept or an intervention of another model.
    """
    [ids] = tokenise(tokenizer, checked_texts([text], "text"))
    decoder = unedited(model)
    check_concept(model, decoder, concept)
    chosen = concept.layers if layers is None else resolve_layers(layers, decoder.depth)
    readings = [_read_tokens(decoder, concept, ids, chosen)]
    names = ["logit", "probability"]
    attached = listed(interventions)
    if attached:
        with Controller(model, attached):
            readings.append(_read_tokens(decoder, concept, ids, chosen))
        names += ["steered logit", "steered probability"]
    rows = tuple(
        (place, layer, *(value for logits in readings for value in _both(logits[layer][place])))
        for layer in chosen
        for place in range(len(ids))
    )
    return TokenTable(
        f"{concept.name} at each token",
        "The probe's logit and probability, unsteered" + (" and with the interventions attached." if attached else "."),
        ("position", "layer"),
        tuple(names),
        rows,
        tuple(tokenizer.decode([token]) for token in ids),
        max(chosen, key=lambda layer: (concept.accuracy[layer], -concept.figures[layer].log_loss)),
    )


def _read_tokens(
    decoder: Decoder, concept: Concept, ids: Sequence[int], layers: Sequence[int]
) -> dict[int, list[float]]:
    kept: dict[Any, Tensor] = {}
    probes = {layer: concept[layer] for layer in layers}
    with hooked({decoder.blocks[layer]: keeping(kept, layer) for layer in layers}):
        for part, rows in batches(decoder, [ids]):
            body(decoder, part, rows, 1)
    return {layer: probes[layer].logit(kept[layer][0]).tolist() for layer in layers}


def _both(logit: float) -> tuple[float, float]:
    return logit, float(torch.tensor(logit).sigmoid())


def persistence(
    model: Any,
    tokenizer: Any,
    concept: Concept,
    texts: Sequence[Text],
    intervention: Intervention,
    *,
    seed: int = 0,
) -> Table:
    """Measure how much of an edit at one layer can still be read at every later layer.

    The edit acts at the first layer `l` of the intervention alone. With `D_k` the change of the probe's logit at layer k, summed
    over texts, `reading` is `D_k / D_l`: 1 where it is made, and at a later layer 1 if its probe sees as much of it, 0 if
    nothing is left. `along` is the same of the component along the edit's own direction, `u . (h'_k - h_k)`. `step`, of a
    constraint or an addition at several layers, is how far the whole cascade still moves the last token there, in units of its
    first step: little where the first edit has lasted. Texts that the edit leaves alone are left out.

    The control ("random") moves every token as far at layer l, along a random direction: its `reading` is what the probes see
    of it, in the unit of the real edit, its `along` what is left of it along its own direction. Later layers may undo an edit, as
    they make up for an ablation: McGrath et al. (arXiv:2307.15771).

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        concept: whose probes read, at the token that they were fitted at.
        texts: the mean is over them, and intervals resample them.
        intervention: an addition, an erasure or a constraint, with one amount for all texts.
        seed: of the random direction.

    Raises:
        AttachError: a Controller is attached.
        AmountError: a change of weights, or amounts for each sample.
        LayerError: no probe at the first layer of the intervention.
        TextsError: no texts, or none that the edit changes.
        BaseModelMismatchError: a concept or an intervention of another model.
    """
    texts = checked_texts(texts, "texts")
    if not isinstance(intervention, ResidualIntervention):
        raise AmountError(
            f"An edit of the residual stream is required. Found {type(intervention).__name__}. For a preference vector use "
            "`inside`."
        )
    if intervention.read(intervention.amount).samples is not None:
        raise AmountError(
            f"{intervention.name!r} must have one amount for all texts. Found one a sample. Pass a number."
        )
    decoder = unedited(model)
    check_concept(model, decoder, concept)
    intervention.check(decoder)
    start = min(intervention.layers)
    later = [layer for layer in concept.layers if layer >= start]
    if start not in later:
        raise LayerError(
            f"{concept.name!r} must have a probe at layer {start}, where {intervention.name!r} acts first. Found {concept.layers}. "
            "Edit at a probed layer, or fit one there.",
            layer=start,
        )
    # In the order in which `record` runs them, so that passes can be matched with texts.
    lengths = [len(ids) for ids in tokenise(tokenizer, texts)]
    order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
    texts, lengths = [texts[i] for i in order], [lengths[i] for i in order]

    def states() -> Activations:
        return record(model, tokenizer, texts, layers=later, read=concept.made.get("read", "last"))

    alone = [_first(intervention, start)]
    plain = states()
    with measuring(model, decoder, alone) as steps:
        moved = {"concept": states()}
    with at_random(model, decoder, alone, steps, seed) as directions:
        moved["random"] = states()
    along = {"concept": intervention.directions[start], "random": directions[start]}
    shifts = {
        edit: {layer: concept[layer].logit(there[layer] - plain[layer]) - concept[layer].bias for layer in later}
        for edit, there in moved.items()
    }
    inside = {
        edit: {layer: (there[layer] - plain[layer]) @ along[edit] for layer in later} for edit, there in moved.items()
    }
    touched = (shifts["concept"][start] != 0) & (inside["concept"][start] != 0)
    if not bool(touched.any()):
        raise TextsError(
            f"{intervention.name!r} must change what is read of some text at layer {start}. Found that it leaves all "
            f"{len(texts)} alone. Use other texts or another amount."
        )
    cascade = _cascade(model, decoder, intervention, states, lengths) if len(intervention.layers) > 1 else {}
    rows: list[tuple[Cell, ...]] = []
    for edit in moved:
        for layer in later:
            figures: list[Cell] = [
                _ratio(shifts[edit][layer][touched], shifts["concept"][start][touched]),
                _ratio(inside[edit][layer][touched], inside[edit][start][touched]),
            ]
            if cascade:
                own = edit == "concept" and layer in cascade
                figures.append(_ratio(cascade[layer], cascade[start]) if own else None)
            rows.append((layer, edit, *figures))
    return Table(
        f"What is left of {intervention.name!r} behind layer {start}",
        f"Mean over {int(touched.sum())} of {len(texts)} texts, those that the edit changes, in units of the change at layer "
        f"{start}; brackets are 95 % intervals over texts. Control: steps of the same length along a random direction.",
        ("layer", "edit"),
        ("reading", "along", *(("step",) if cascade else ())),
        tuple(rows),
    )


def _first(intervention: ResidualIntervention, layer: int) -> ResidualIntervention:
    """Return an intervention at one of its layers alone."""
    amount: Any = intervention.amount
    if isinstance(amount, Mapping):
        amount = {layer: amount[layer]}
    return replace(intervention, layers=(layer,), amount=amount)


def _cascade(
    model: Any, decoder: Decoder, intervention: ResidualIntervention, states: Any, lengths: Sequence[int]
) -> dict[int, Tensor]:
    """Return how far the last token of each text is moved at each layer of an intervention, `"text"`, texts in order."""
    with measuring(model, decoder, [intervention]) as steps:
        states()
    last = torch.tensor(lengths) - 1
    found = {}
    for layer, passes in steps.items():
        ends = last.split([len(each) for each in passes])
        each = [step.cpu().gather(1, end[:, None])[:, 0] for step, end in zip(passes, ends, strict=True)]
        found[layer] = torch.cat(each)
    return found


def _ratio(values: Tensor, units: Tensor) -> Estimate:
    """Return `sum values / sum units` with its interval over texts: the mean of the ratios, weighted by their unit's size."""
    real = units != 0
    return estimate(values[real] / units[real], units[real].abs())
